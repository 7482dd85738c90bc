"""The command line: help that answers at once, one-line errors, exit codes, and a chain of commands that works."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
from forked import forked_command

from ultralong import __version__, cli, miniature
from ultralong.cli.options import metavar_of, options_of
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.demo import DemoConfig, load
from ultralong.evaluation.runs import commands
from ultralong.training.config import PRESETS, TrainConfig, preset
from ultralong.utils import settings
from ultralong.utils.files import read_json, read_jsonl
from ultralong.utils.hub import find_checkpoint, load_tokenizer


def said(words, capsys):
    """Exit code, output and errors of a command line in this process."""
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    shown = capsys.readouterr()
    return left.value.code, shown.out, shown.err


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_every_command_with_what_it_does(words, capsys):
    code, shown, _ = said(words, capsys)
    assert code == 0
    for name in cli.COMMANDS:
        assert f"\n  {name} " in shown
    order = [shown.index(f"\n  {name} ") for name in ("extend", "pack", "train", "eval needle")]
    assert order == sorted(order)


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself_with_an_example(name, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    code, shown, _ = said([*name.split(), "--help"], capsys)
    assert code == 0
    assert shown.startswith(f"usage: ultralong {name} [-h] ")
    text, options = shown.split("\n options\n")
    assert f"ultralong {name}" in text.split("usage", 1)[1].split("\n", 1)[1], "there is no example"
    for private in ("STR", "{None}", "None", "(default: )", "PATH|", "VALUE ", "`"):
        assert private not in shown.replace("KEY=VALUE ", "").replace("NAME=VALUE ", ""), private
    assert "--traceback" in options
    for option in options_of(cli.COMMANDS[name]):
        assert option.text.endswith("."), f"{option.name}: no sentence"
        assert option.positional or f"--{option.name.replace('_', '-')}" in options
    explained = text.splitlines()
    for line in shown.splitlines():
        example = line in explained and line.startswith(("  ", "Example")) and "ultralong" in line
        assert len(line) <= (120 if example or line.startswith("usage") else width), line
        assert line == line.rstrip()


def test_first_lines_are_short_sentences():
    for name, command in cli.COMMANDS.items():
        first = command.__doc__.splitlines()[0]
        assert first.endswith("."), name
        assert len(first) <= 105, name


def test_options_of_one_name_take_one_kind_of_value():
    """A length is asked for as tokens everywhere, and a list is given in one way."""
    kinds = {}
    for command in cli.COMMANDS.values():
        for option in options_of(command):
            kinds.setdefault(option.name, set()).add(metavar_of(option.name, option.kind, option.commas))
    for name in ("lengths", "length", "tokens", "chunk"):
        assert {word.split()[0] for word in kinds[name]} == {"TOKENS"}, name
    for name in ("lengths", "set", "depths", "kernels"):
        assert all(word.endswith("...]") for word in kinds[name]), name


@pytest.mark.parametrize("group", cli.GROUPS)
def test_a_group_alone_lists_its_commands(group, capsys):
    code, shown, errors = said([group], capsys)
    asked, helped, _ = said([group, "--help"], capsys)
    assert (code, shown, asked) == (2, "", 0)
    for text in (errors, helped):
        listed = [line.split("  ")[1] for line in text.splitlines() if line.startswith(f"  {group} ")]
        assert listed == [name for name in cli.COMMANDS if name.startswith(f"{group} ")]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["extnd"], "extend"),
        (["eval", "nedle", "model"], "eval needle"),
        (["evl", "needle"], "eval needle"),
        (["needle", "model"], "eval needle"),
        (["bench", "atention"], "bench attention"),
        (["data", "buidl"], "data build"),
        (["trian", "x.yaml"], "train"),
    ],
)
def test_a_command_that_does_not_exist_is_named_with_the_one_that_was_meant(words, meant, capsys):
    code, _, errors = said(words, capsys)
    assert code == 2
    assert errors.startswith("ultralong: unknown command '")
    assert errors.endswith(f". Did you mean: ultralong {meant}?\n")


def test_without_a_likely_command_all_are_listed(capsys):
    assert "unknown command 'xyzzy'. Commands: demo, extend, pack" in said(["xyzzy"], capsys)[2]
    assert "Commands: eval needle, eval perplexity" in said(["eval", "poetry,verse", "model"], capsys)[2]


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_version(word, capsys):
    assert said([word], capsys) == (0, f"ultralong {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["extend", "m", "--to", "1m", "--out", "x", "--methd", "yarn"], "--method METHOD"),
        (["train", "tiny-cpu", "--processses", "2"], "--processes INT"),
        (["eval", "needle", "m", "--lenghts", "4k"], "--lengths TOKENS"),
    ],
)
def test_an_option_that_was_meant_is_named(words, named, capsys):
    code, _, errors = said(words, capsys)
    assert code == 2
    assert "Perhaps you meant" in errors
    assert named in errors


def test_a_preset_that_was_meant_is_named(capsys):
    code, _, errors = said(["plan", "llama31-8b-1mm"], capsys)
    assert code == 1
    assert "Did you mean 'llama31-8b-1m'?" in errors


@pytest.mark.parametrize("given", [["1k", "2K", "4096"], ["1k,2k", "4_096"], ["1024", "2k", "0.00390625m"]])
def test_tokens_are_read_with_units(given, monkeypatch):
    found = []
    monkeypatch.setattr(commands, "measure_one", lambda task, model, **options: found.append(options) or {})
    monkeypatch.setattr(commands, "summary", lambda result: "")
    cli.main(["eval", "needle", str(miniature.path()), "--lengths", *given])
    assert found[0]["lengths"] == (1024, 2048, 4096)


def test_tokens_that_are_none_are_refused(capsys):
    code, _, errors = said(["eval", "needle", "m", "--lengths", "long"], capsys)
    assert code == 2
    assert "k is 1,024" in " ".join(errors.replace("│", " ").split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_of_all_commands(shell, tmp_path):
    done = forked_command("completion", shell)
    assert done.returncode == 0, done.stderr
    for word in ("decontaminate", "needle", "--gpus-per-node", "--traceback"):
        assert word in done.stdout
    if shell == "bash":
        path = tmp_path / "ultralong.bash"
        path.write_text(done.stdout)
        subprocess.run(["bash", "-n", path], check=True)


@functools.cache
def bash_completion() -> str:
    return forked_command("completion", "bash").stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ultralong ev", "eval"),
        ("ultralong eval n", "needle"),
        ("ultralong train --proc", "--processes"),
        ("ultralong launch reh", "rehearse"),
        ("ultralong launch --gpus", "--gpus-per-node"),
        ("ultralong launch rehearse --los", "--lose"),
        ("ultralong runs ver", "verify"),
        ("ultralong launch x --scheduler jo", "jobset"),
    ],
)
def test_bash_completes(line, expected, tmp_path):
    path = tmp_path / "ultralong.bash"
    path.write_text(bash_completion())
    words = line.split(" ")
    script = f"""
source {path}
COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}
function_name=$(complete -p ultralong | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
"$function_name"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert expected in done.stdout.split(), done.stderr


def test_help_does_not_load_torch():
    """So that help and mistyped options answer at once."""
    code = (
        "import sys\nfrom ultralong import cli\nfrom ultralong.cli.options import parser_of\n"
        "[parser_of(command) for command in cli.COMMANDS.values()]\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    """What is written like a path, and what has no owner, is looked for here alone."""
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *words, **options: asked.append(words))
    for name in ("./model", "../a/b", "/no/such/folder", "~/no/such", "runs/a/model", "llama-1m"):
        with pytest.raises(ValueError, match=r"There is no folder .* is no hub id, which is like owner/name"):
            load_tokenizer(name)
    assert not asked
    assert find_checkpoint("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert find_checkpoint(tmp_path) == str(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a file"):
        find_checkpoint(tmp_path / "config.json")


@pytest.mark.parametrize(
    "words",
    [
        ["pack", "x", "--tokenizer", "no/such/model", "--length", "1k", "--out", "r"],
        ["data", "build", "x", "--tokenizer", "./model", "--out", "r"],
        ["eval", "needle", "no-model"],
        ["eval", "perplexity", "~/no-model", "--rows", "r"],
        ["eval", "loss", "no-model", "r"],
        ["eval", "run", "needle", "a/b/c", "--out", "r"],
        ["eval", "answer", "/no", "--tasks", "ruler_vt", "--lengths", "1k", "--out", "r"],
        ["eval", "make", "ruler_vt", "--length", "1k", "--samples", "1", "--tokenizer", "none", "--out", "f"],
        ["extend", "no-model", "--to", "8x", "--out", "r"],
    ],
)
def test_commands_say_that_a_model_is_not_there(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, errors = said(words, capsys)
    assert (code, errors.count("\n")) == (1, 1)
    assert "There is no folder" in errors


def test_documents_to_a_trained_model_by_commands_alone(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(12):
        (tmp_path / "texts" / f"{number}.txt").write_text(
            f"Chapter {number}. " + "It was a dark and stormy night. " * 60
        )
    for words in (
        ("extend", miniature.path(), "--to", 1024, "--out", "long", "--json", "extend.json"),
        ("pack", "texts", "--tokenizer", "long", "--length", 1024, "--out", "rows", "--json", "pack.json"),
        ("train", preset("tiny-cpu"), "--json", "train.json",
         "--set", "model=long", "length=1024", "out=run", "steps=2", "save_every=0", "data=[{rows: rows}]",
         "parallel.context_parallel_size=1"),
        ("eval", "needle", "run/model", "--lengths", 256, "--depths", 0.5, "--samples", 1, "--json", "needle.json"),
    ):  # fmt: skip
        done = forked_command(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "extend.json")["new_window"] == 1024
    assert read_json(tmp_path / "pack.json")["rows"] == len(PackedRows(tmp_path / "rows"))
    assert read_json(tmp_path / "train.json")["steps"] == len(read_jsonl(tmp_path / "run" / "log.jsonl")) == 2
    assert "needle" in str(read_json(tmp_path / "needle.json"))
    refused = forked_command(
        "sft", preset("tiny-cpu"), "--set", "data=[{rows: rows}]", "length=1024", "parallel.context_parallel_size=1",
        cwd=tmp_path,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "holds documents, not conversations" in refused.stderr


def test_every_preset_is_readable():
    for path in PRESETS.glob("*.yaml"):
        if path.stem.startswith("demo-"):
            assert isinstance(load(path.stem.removeprefix("demo-")), DemoConfig)
        else:
            config = settings.load(TrainConfig, path)
            assert config.base_model, "the planner needs a shape before there is a checkpoint"
            assert f"--length {config.length} " in path.read_text(), "the length that the preset's commands pack"


def test_the_demo_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="beyond the target window"):
        load("miniature", ["target=1024"])
    with pytest.raises(ValueError, match="neither a settings file nor a preset"):
        load("no-such-model")

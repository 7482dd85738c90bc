"""What `check` says that other programs read; tests/checkpoints/test_readers.py opens the same folders in them."""

from __future__ import annotations

import ast
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from ultralong import check, miniature
from ultralong.bench.checkpoints.config_sweep import bench_configs, sweep
from ultralong.bench.checkpoints.readers import compared, unnamed
from ultralong.bench.checkpoints.tables import configs_table, lines_table, readers_table
from ultralong.checkpoints.config import rope_entries
from ultralong.checkpoints.extend import extend
from ultralong.checkpoints.readers import VERSIONS_4, knows
from ultralong.cli import main
from ultralong.utils.files import read_json, write_json

PAIRS = 32  # of the miniature's heads


def made(folder: Path, method: str, source: Path | None = None, **options) -> Path:
    extend(source or miniature.path(), 2048, folder, method, quiet=True, **options)
    return folder


def verdicts(folder: Path) -> dict[str, str]:
    """Verdicts by name: a version for transformers, the program for others."""
    return {
        one.version.partition(".")[0] if one.version.startswith("5.") else f"transformers {one.version}"
        if one.program == "transformers" else one.program: one.verdict
        for one in check(folder).readings
    }  # fmt: skip


def remarks(folder: Path, program: str, version: str = "") -> str:
    (one,) = (r for r in check(folder).readings if r.program == program and r.version.startswith(version))
    return " ".join((*one.remarks, one.typed))


def only_wrong(folder: Path) -> set[str]:
    return {name for name, verdict in verdicts(folder).items() if verdict != "right"}


LONG = {"short_factors": (1.0,) * PAIRS, "long_factors": (4.0,) * PAIRS}
CASES = [
    ("llama3", {}, set()),
    ("linear", {}, set()),
    ("default", {"theta": 5e5}, set()),
    ("yarn", {"beta": 32.0}, {"transformers 4.46"}),
    ("yarn", {}, {"transformers 4.46", "llama.cpp"}),
    ("yarn", {"factor": 8.0}, {"transformers 4.46", "transformers 4.51", "llama.cpp"}),
    ("yarn", {"attention_factor": 1.0}, {"transformers 4.46", "SGLang", "llama.cpp"}),
    ("dynamic", {}, {"vLLM", "SGLang", "llama.cpp"}),
]


@pytest.mark.parametrize(("method", "options", "wrong"), CASES, ids=[f"{m} {o}" for m, o, _ in CASES])
def test_who_reads_another_table(tmp_path, method, options, wrong):
    assert only_wrong(made(tmp_path / "out", method, **options)) == wrong


def test_what_to_type_names_a_folder_as_shells_and_python_take_it(tmp_path):
    folder = made(tmp_path / 'my "models" WINDOW \u00e9', "yarn")
    for program in ("vLLM", "SGLang"):
        typed = next(one.typed for one in check(folder).readings if one.program == program)
        assert str(folder) in shlex.split(typed)
    for one in check(folder).readings:
        if one.program == "transformers":
            (call,) = (node for node in ast.walk(ast.parse(one.typed)) if isinstance(node, ast.Call))
            assert ast.literal_eval(call.args[0]) == str(folder)


def test_a_tokenizer_that_transformers_5_wrote_is_one_of_version_4_in_the_copy(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(miniature.path(), source)
    file = source / "tokenizer_config.json"
    for kind in ("Qwen2Tokenizer", "TokenizersBackend"):
        write_json(file, read_json(file) | {"tokenizer_class": kind, "extra_special_tokens": ["<x>"]})
        copy = made(tmp_path / kind, "yarn", source=source)
        written = read_json(copy / "tokenizer_config.json")
        assert written["additional_special_tokens"] == ["<x>"]
        assert "extra_special_tokens" not in written
        assert "refused" not in {one.verdict for one in check(copy).readings}


def test_what_is_said_of_it_and_what_to_type(tmp_path):
    folder = made(tmp_path / "out", "yarn")
    assert "max_position_embeddings for the original window of yarn" in remarks(folder, "transformers", "4.46")
    assert "4.57 or later" in remarks(folder, "transformers", "4.46")
    assert "--yarn-beta-fast 4 --yarn-beta-slow 1" in remarks(folder, "llama.cpp").partition("llama-server")[2]
    assert f"vllm serve {folder} --max-model-len 2048" in remarks(folder, "vLLM")
    assert 'torch_dtype="auto"' in remarks(folder, "transformers", "4.57")
    longrope = made(tmp_path / "long", "longrope", **LONG)
    assert "one table for all lengths" in remarks(longrope, "vLLM")
    assert read_json(longrope / "config.json")["original_max_position_embeddings"] == 512
    assert verdicts(longrope)["transformers 4.57"] == "right"


def test_keys_that_only_version_5_reads_are_told(tmp_path):
    folder = made(tmp_path / "out", "llama3", theta=5e5)
    entries = read_json(folder / "config.json")
    write_json(folder / "config.json", {k: v for k, v in entries.items() if k not in ("rope_theta", "rope_scaling")})
    assert only_wrong(folder) == {f"transformers {version}" for version in VERSIONS_4}
    assert "no rope_theta" in remarks(folder, "transformers", "4.57")
    assert "no rope_scaling" in remarks(folder, "transformers", "4.57")
    write_json(folder / "config.json", entries | {"dtype": "float32", "torch_dtype": "float32"})
    assert only_wrong(folder) == set()
    assert "weights are bfloat16" in remarks(folder, "transformers", "4.57")


def test_tokenizers_and_types_that_older_versions_do_not_open(tmp_path):
    folder = made(tmp_path / "out", "llama3")
    settings = read_json(folder / "tokenizer_config.json")
    for change in ({"tokenizer_class": "TokenizersBackend"}, {"extra_special_tokens": ["<x>"]}):
        write_json(folder / "tokenizer_config.json", settings | change)
        found = verdicts(folder)
        assert {found[f"transformers {version}"] for version in VERSIONS_4} == {"refused"}
        assert found["5"] == found["vLLM"] == "right"
    write_json(folder / "tokenizer_config.json", {k: v for k, v in settings.items() if k != "chat_template"})
    assert "no chat template" in remarks(folder, "transformers", "4.46")
    assert "no chat template" not in remarks(folder, "transformers", "4.51")
    assert knows("4.46", "llama")
    assert [knows(version, "qwen3") for version in VERSIONS_4] == [False, True, True]
    assert [knows(version, "smollm3") for version in VERSIONS_4] == [False, False, True]
    assert not any(knows(version, "youtu") for version in VERSIONS_4)


TWO = {
    "another text": "{{ 'Q: ' + messages[0]['content'] }}",
    "nothing": "",
    "a list": [{"name": "default", "template": "x"}],
}


@pytest.mark.parametrize("entry", TWO.values(), ids=TWO)
def test_two_chat_templates_that_differ_are_told_with_the_one_that_each_program_takes(tmp_path, entry):
    """As tokenization_utils_base.py of transformers 4.46.3, 4.51.3, 4.57.3 and 5, and gguf's vocab.py, have it."""
    folder = made(tmp_path / "out", "llama3")
    settings, kept = read_json(folder / "tokenizer_config.json"), (folder / "chat_template.jinja").read_text()
    said = "It takes {}, and other programs"
    for program, version in (("transformers", "4.46"), ("transformers", "5."), ("llama.cpp", ""), ("vLLM", "")):
        assert "It takes chat" not in remarks(folder, program, version)
    write_json(folder / "tokenizer_config.json", settings | {"chat_template": entry})
    for program, version in (("transformers", "4.46"), ("llama.cpp", "")):
        assert said.format("chat_template in tokenizer_config.json") in remarks(folder, program, version)
    for program, version in (("transformers", "4.51"), ("transformers", "5."), ("vLLM", ""), ("SGLang", "")):
        assert said.format("chat_template.jinja") in remarks(folder, program, version)
    write_json(folder / "tokenizer_config.json", settings | {"chat_template": [{"name": "default", "template": kept}]})
    assert "It takes chat" not in remarks(folder, "transformers", "5.")
    assert AutoTokenizer.from_pretrained(folder).chat_template == kept


def test_the_command_prints_a_table_and_refuses_what_is_no_model(tmp_path, capsys):
    main(["check", str(made(tmp_path / "out", "yarn")), "--json", str(tmp_path / "said.json")])
    told = capsys.readouterr().out
    assert "transformers 4.46     wrong" in told
    assert len(read_json(tmp_path / "said.json")["readings"]) == 7
    other = made(tmp_path / "other", "llama3")
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor.to(torch.float16) for name, tensor in tensors.items()}, other / "model.safetensors")
    assert "weights are float16" in remarks(other, "transformers", "4.51")
    (other / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        check(other)


def test_what_a_program_reads_is_compared_with_ours():
    ours = {"tables": [[1.0], [0.5]], "factor": 1.0, "window": 4, "dtype": ["x"], "ids": [1], "chat": True}
    assert compared(ours, ours) == ("right", [])
    assert compared(ours, ours | {"tables": [[1.0], [0.6]]}) == ("wrong", ["table at 2048 tokens"])
    assert compared(ours, ours | {"ids": [2], "factor": 1.1}) == ("wrong", ["ids", "attention factor 1.1 for 1"])
    assert compared(ours, {"refused": "why"}) == ("refused", ["why"])
    rows = [
        {"kind": "a", "program": "p", "version": "1", "read": "wrong", "check": "right"},
        {"kind": "a", "program": "q", "version": "1", "read": None, "check": "wrong"},
        {"kind": "b", "program": "p", "version": "1", "read": "refused", "check": "wrong"},
    ]
    assert unnamed(rows) == rows[:1]
    assert readers_table([{"rows": rows}])[2:] == ["| a | wrong, not said | (wrong) |", "| b | refused, said |  |"]


def test_config_classes_are_scaled_or_refused(tmp_path):
    """A handful of cases, some of which crashed; `ultralong bench configs` takes all."""
    cases = [("qwen3", "default", "auto"), ("qwen3", "yarn", "auto"), ("mamba", "linear", "auto")]
    cases += [("xlnet", "yarn", "auto"), ("gemma4_text", "yarn", "auto"), ("rwkv", "llama3", "auto")]
    found = [row["result"] for row in sweep(cases)]
    assert found == ["equal", "equal", "refused", "refused", "refused", "refused"]
    (row,) = bench_configs(("gpt2",), tmp_path / "rows.json")
    assert row["counts"] == {"refused": 9}
    assert configs_table([read_json(tmp_path / "rows.json")])[3].startswith("| refused | 9 | 1 of 1 |")
    with pytest.raises(ValueError, match="no causal language model of the type nothing"):
        bench_configs(("nothing",), None)


@pytest.mark.parametrize(
    ("method", "options", "declared", "offered"),
    [
        ("yarn", {}, 512, {"vLLM": 512, "SGLang": 512}),
        ("yarn", {}, 1024, {"vLLM": 1024, "SGLang": 1024}),
        ("llama3", {}, 2048, {"vLLM": 2048, "SGLang": 2048}),
        ("linear", {}, 512, {"vLLM": 2048, "SGLang": 2048}),
        ("dynamic", {}, 512, {"vLLM": 2048, "SGLang": 2048}),
        ("longrope", LONG, 2048, {"vLLM": 512, "SGLang": 2048}),
    ],
)
def test_the_window_that_a_server_offers(tmp_path, method, options, declared, offered):
    """vLLM 0.33 and SGLang 0.5: a factor of yarn does not reach beyond max_position_embeddings."""
    folder = made(tmp_path / "out", method, **options)
    write_json(folder / "config.json", read_json(folder / "config.json") | {"max_position_embeddings": declared})
    found = {one.program: one for one in check(folder).readings}
    assert {name: found[name].window for name in offered} == offered
    capped = method == "yarn" and declared < 2048
    assert ("--hf-overrides '{\"max_position_embeddings\": 2048}'" in found["vLLM"].typed) == capped
    assert ("--json-model-override-args" in found["SGLang"].typed) == capped
    assert any(f"{declared:,} tokens for the whole window" in text for text in found["vLLM"].remarks) == capped


def of_type(folder: Path, kind: str, method: str, **rope) -> Path:
    """A config of another class alone, as `extend` writes it."""
    options = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
    config = AutoConfig.for_model(kind, **options, max_position_embeddings=512).to_dict()
    scaling = {"rope_type": method, "rope_theta": 1e4, "factor": 4.0, **rope}
    window = 512 if method == "linear" else 2048
    entries = {key: value for key, value in config.items() if not key.startswith("rope")}
    entries |= {"max_position_embeddings": window, **rope_entries(scaling, kind, window)}
    if method in ("longrope", "linear"):
        entries["original_max_position_embeddings"] = 512
    folder.mkdir()
    write_json(folder / "config.json", entries)
    return folder


FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 512}
YARN = {"original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("kind", "method", "rope", "said"),
    [
        ("phi3", "longrope", FACTORS, ["right", "right", "right"]),  # a class of its own, by each text's length
        ("phi3", "longrope", FACTORS | {"attention_factor": 1.0}, ["refused"] * 3),  # an entry that it does not know
        ("phi3", "longrope", FACTORS | {"factor": 8.0}, ["refused"] * 3),
        ("qwen2", "longrope", FACTORS, ["wrong", "right", "right"]),
        ("mistral", "longrope", FACTORS, ["wrong", "right", "right"]),
        ("olmo", "linear", {}, ["wrong", "right", "right"]),
        ("olmo2", "yarn", YARN, ["refused"] * 3),
    ],
)
def test_a_class_of_version_4_is_judged_by_what_it_reads_itself(tmp_path, kind, method, rope, said):
    """As the programs themselves answer: ultralong bench readers."""
    folder = of_type(tmp_path / "out", kind, method, **rope)
    found = {one.version: one.verdict for one in check(folder).readings if one.program == "transformers"}
    assert [found[version] for version in VERSIONS_4] == said
    strict = said[-1] == "right" and kind in ("phi3", "olmo")
    assert ("type" in read_json(folder / "config.json")["rope_scaling"]) == strict


def test_lines_to_type_stand_in_a_table_with_the_window_that_a_program_offers():
    def row(kind, program, typed, window):
        return {"kind": kind, "program": program, "version": "1", "typed": typed, "window": window}

    rows = [row("a", "p", "open FOLDER --long", 512), row("b", "p", "open FOLDER", 2048), row("c", "q", "x", None)]
    rows += [row("c", "p", "open FOLDER", 2048), row("a", "q", "run FOLDER", 2048)]
    assert lines_table([{"rows": rows}])[2:] == [
        "| p 1 | `open FOLDER` | 2,048 | the other 2 |",
        "| p 1 | `open FOLDER --long` | 512 | a |",
        "| q 1 | `run FOLDER` | 2,048 | the other 1 |",
    ]

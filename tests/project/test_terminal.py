"""What other people wrote is printed as text: no escape sequence, turned direction or odd letter reaches a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys

import pytest
from forked import forked_command

from ultralong import cli, miniature
from ultralong.cli.shared import ON_ERRORS, ON_OUTPUT, plain_streams, shown

ORDERS = {
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;b3duZWQ=\x07",
    "up": "\x1b[2Aforged",
    "clear": "\x1b[2J",
    "C1": "\x9b2J",
    "bell": "\x07",
    "over": "all right\rnot",
    "turned": "\u202egnp.exe",
    "isolate": "\u2066x\u2069",
    "surrogate": "\udcff",
}
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.parametrize("name", ORDERS)
def test_no_order_is_printed_and_none_is_hidden(name):
    text = f"before {ORDERS[name]} after\n"
    for found in (shown(text), shown(text, ON_OUTPUT)):
        assert not HIDDEN.search(found)
        assert found.startswith("before ")
        assert found.endswith(" after\n")
        assert "\\" in found


def test_colours_and_progress_bars_are_printed():
    for text in ("\x1b[1;97;45mred\x1b[0m\n", "tide\tand ship\n", "caf\u00e9 \u6f6e \u05e9\u05dc\n", "a\r\n"):
        assert shown(text, ON_OUTPUT) == text
    for text in ("\r 50%|####", "\n\x1b[A", "\x1b[36m"):
        assert shown(text, ON_ERRORS) == text


def test_every_stream_of_a_command(monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    with plain_streams():
        print(ORDERS["title"], "x")
        print(ORDERS["title"], file=sys.stderr)
        sys.stdout.writelines([ORDERS["clear"], "\n"])
    assert (sys.stdout, sys.stderr) == (out, err)
    assert out.getvalue() == "\\x1b]0;owned\\x07 x\n\\x1b[2J\n"
    assert err.getvalue() == "\\x1b]0;owned\\x07\n"


@pytest.mark.parametrize("name", ["title", "up", "over", "turned"])
def test_a_name_in_an_error(name, capsys):
    with pytest.raises(SystemExit):
        cli.main(["check", f"no {ORDERS[name]} model"])
    said = capsys.readouterr().err
    assert not HIDDEN.search(said)
    assert "error: " in said
    assert len(said.splitlines()) == 1


def test_a_document_a_source_and_a_run_that_are_printed(tmp_path):
    """`data show` prints documents, `data build` names sources, `runs` folders and what stopped them."""
    evil = ORDERS["title"] + ORDERS["turned"]
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"{evil} the tide came in {n} " * 30, "id": f"{evil}{n}"}) + "\n" for n in range(9))
    )
    recipe = {"name": "r", "description": "d", "sources": [{"name": "a", "license": evil, "path": "texts.jsonl"}]}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    model = miniature.path()
    rows = ("data", "build", "r.yaml", "--tokenizer", model, "--length", "256", "--out", "rows")
    (tmp_path / evil / "checkpoints").mkdir(parents=True)
    (tmp_path / evil / "config.yaml").write_text("model: m\n")
    for words in (rows, ("data", "show", "rows", "--tokenizer", model), ("data", "stats", "r.yaml"), ("runs", ".")):
        done = forked_command(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        for text, kept in ((done.stdout, ON_OUTPUT), (done.stderr, ON_ERRORS)):
            assert shown(text, kept) == text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_lacks_a_letter(tmp_path, encoding):
    """Letters are spelled then, where printing them would be an error; the command is one that loads little."""
    folder = tmp_path / "\u6f6e"
    (folder / "checkpoints").mkdir(parents=True)
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    words = [sys.executable, "-m", "ultralong", "eval", "report", str(folder)]
    done = subprocess.run(words, capture_output=True, env=environment, check=False)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    script = "from ultralong.cli.shared import plain_streams\nwith plain_streams(): print('\\u6f6e', '\\udcff')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, check=True)
    assert done.stdout.decode(encoding).strip() == ("\u6f6e" if encoding == "utf-8" else "\\u6f6e") + " \\udcff"

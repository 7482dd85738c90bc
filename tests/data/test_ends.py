"""How data commands end: workers with their parent, outputs of one run alone, and a reason where nothing was read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ultralong.data.recipe import clean_files
from ultralong.data.recipe.build import pack_recipe
from ultralong.data.recipe.clean_files import write_clean
from ultralong.data.recipe.schema import load_recipe
from ultralong.data.select.decontaminate import Decontaminate, TestSet
from ultralong.utils.files import locked, read_json

WORDS = "the tide came in at dawn and nobody but the keeper of the light saw it come over the stones"
SCRIPT = """
import sys, time
from ultralong.data.read.documents import Document
from ultralong.data.tokens.encoding import load_tokenizer
from ultralong.data.tokens.tokenize import tokenize_corpus

def endless():
    for number in range(10**9):
        yield Document(f"d{number}", "the tide came in at dawn. " * 400)
        time.sleep(0.02)

if __name__ == "__main__":
    tokenize_corpus(endless(), load_tokenizer(sys.argv[1]), sys.argv[2], workers=2, batch_characters=9000, quiet=True)
"""


def children(parent: int) -> list[int]:
    path = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def alive(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells children of their parent's end")
@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGTERM, marks=pytest.mark.soak),
        pytest.param(signal.SIGHUP, marks=pytest.mark.soak),
        signal.SIGKILL,
    ],
)
def test_workers_end_with_what_started_them(tiny_tokenizer, tmp_path, how):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "run.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "tokenizer"), str(tmp_path / "out")]
    if signal.getsignal(how) is signal.SIG_IGN:  # under nohup, which the run would inherit
        signal.signal(how, signal.SIG_DFL)
    run = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(root)})
    try:
        partial = tmp_path / "out" / ".tokens-00000.bin.partial"
        until = time.monotonic() + 120
        while not partial.exists() and time.monotonic() < until:  # both workers have started by then
            time.sleep(0.1)
        workers = children(run.pid)
        assert len(workers) >= 2
        run.send_signal(how)
        run.wait(30)
    finally:
        run.kill()
        run.wait()
    until = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [worker for worker in workers if alive(worker)]


def recipe_of(tmp_path, texts):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "r.yaml").write_text("name: r\ndescription: d\nsources: [{name: a, license: x, path: in.jsonl}]\n")
    (tmp_path / "tests.jsonl").write_text(json.dumps({"q": WORDS}) + "\n")
    return load_recipe(tmp_path / "r.yaml"), Decontaminate((TestSet("t", path=str(tmp_path / "tests.jsonl")),))


def test_a_killed_decontamination_leaves_nothing_of_two_runs(tmp_path, monkeypatch):
    recipe, settings = recipe_of(tmp_path, [WORDS, "something else", WORDS + " again"])
    out = tmp_path / "clean"
    out.mkdir()
    for name in (".clean.jsonl.abcdef012345.partial", ".contaminated.jsonl.abcdef012345.partial"):
        (out / name).write_text("left by a kill")
    assert write_clean(recipe, settings, out, quiet=True)["sources"]["a"]["dropped"] == 2
    assert not list(out.glob("*.partial"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def failing(*arguments, **options):
        raise KeyboardInterrupt

    other, settings = recipe_of(tmp_path, ["a text of another run", WORDS])
    monkeypatch.setattr(clean_files, "asdict", failing)
    with pytest.raises(KeyboardInterrupt):
        write_clean(other, settings, out, quiet=True)
    assert not (out / "report.json").exists(), "no report: what is here is of no finished run"
    for name in ("clean.jsonl", "contaminated.jsonl"):
        assert (out / name).read_bytes() == before[name], "both of the run before, whole"
    monkeypatch.undo()
    write_clean(other, settings, out, quiet=True)
    assert read_json(out / "report.json")["sources"]["a"]["dropped"] == 1
    assert len((out / "contaminated.jsonl").read_text().splitlines()) == 1
    with locked(out), pytest.raises(ValueError, match="Another process"):
        write_clean(other, settings, out, quiet=True)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"body": "x"}\n', r"1 no field 'text' \(texts/a.jsonl:1\)|1 no field 'text'"),
        ("a.jsonl", b'{"messages": []}\n', r"1 holds a conversation .*a recipe of `kind: chat`"),
        ("a.txt", b"\xff\xfe", "1 not UTF-8"),
        ("a.pdf", b"%PDF-1.4", r"a kind of file that is not read \(.*a PDF"),
        ("a.txt", b" ", "1 empty"),
        ("a.parquet", b"PAR1", "truncated or damaged"),
    ],
)
def test_nothing_was_read_says_why(tiny_tokenizer, tmp_path, name, content, reason):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"nothing was read. texts: .*{reason}"):
        pack_recipe(tmp_path / "texts", tiny_tokenizer, 64, tmp_path / "rows", quiet=True)

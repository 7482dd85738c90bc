"""Tests whose data is damaged: found before the first answer, and with --skip-missing never the end of a run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from induction import InductionModel

from ultralong.cli import main
from ultralong.evaluation.runs.records import answer_pairs
from ultralong.evaluation.runs.results import summarise
from ultralong.evaluation.runs.run import run
from ultralong.evaluation.runs.settings import RunSettings
from ultralong.inference.engines import LocalEngine
from ultralong.utils import settings
from ultralong.utils.files import append_jsonl, read_json, read_jsonl

QA = "infinitebench_longbook_qa_eng"
ROW = {"context": "A stone lies there. " * 300, "input": "What?", "answer": ["stone"]}
BROKEN = {
    "no JSON": b'{"context": "A st',
    "no record": b"[1, 2]",
    "a field missing": json.dumps({"context": "x", "input": "y"}).encode(),
    "a number for a text": json.dumps(ROW | {"context": 7}).encode(),
    "no answers": json.dumps(ROW | {"answer": None}).encode(),
}


@pytest.fixture
def wanted(tmp_path):
    (tmp_path / "data").mkdir()
    text = tmp_path / "text.txt"
    text.write_text("The keeper of the light wrote in his log that no ship had passed. " * 60)
    return RunSettings(
        "reader", (QA, "infinitebench_passkey"), (1024,), samples=4, chat=False, data=str(tmp_path / "data"),
        haystack=str(text), skip_missing=True,
    )  # fmt: skip


def rows(folder, broken: bytes):
    good = json.dumps(ROW).encode()
    (folder / "data" / "longbook_qa_eng.jsonl").write_bytes(b"\n".join([good, good, broken, good]) + b"\n")


def opened(tokenizer):
    return InductionModel(len(tokenizer)), tokenizer


@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_row_is_found_before_the_first_answer(wanted, tiny_tokenizer, tmp_path, what):
    rows(tmp_path, BROKEN[what])
    with pytest.raises(ValueError, match=f"cannot be made.*{QA}: .*longbook_qa_eng.*row 3"):
        run(replace(wanted, skip_missing=False), tmp_path / "strict", opened=opened(tiny_tokenizer), quiet=True)
    assert not (tmp_path / "strict").exists()
    result = run(wanted, tmp_path / "run", opened=opened(tiny_tokenizer), draw=False, quiet=True)
    assert "row 3" in result["skipped"][QA]
    assert [values["task"] for values in result["results"]] == ["infinitebench_passkey"]
    assert result["results"][0]["n"] == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_what_fails_later_leaves_the_other_tests_their_answers(wanted, tiny_tokenizer, tmp_path, workers):
    """A file that changes after the check, or fails where the check does not look."""
    rows(tmp_path, BROKEN["no JSON"])
    model, tokenizer = opened(tiny_tokenizer)
    pairs = [(QA, 1024), ("infinitebench_passkey", 1024)]
    options = {"chat": False, "questions": {QA: tmp_path / "data"}, "workers": workers, "quiet": True}
    engine = LocalEngine(model, tokenizer, None, 1)
    with pytest.raises(ValueError, match="row 3: not valid JSON"):
        answer_pairs(engine, tokenizer, pairs, 4, 0, tmp_path / "strict", **options)
    left_out = {}
    found = answer_pairs(engine, tokenizer, pairs, 4, 0, tmp_path / "out", left_out=left_out, **options)
    assert list(left_out) == [(QA, 1024)]
    assert "row 3: not valid JSON" in left_out[QA, 1024]
    counts = {result.task: result.n for result in found}
    assert counts["infinitebench_passkey"] == 4
    there = tmp_path / "out" / f"{QA}-1024.jsonl"
    assert counts.get(QA, 0) == (len(read_jsonl(there)) if there.exists() else 0)


def test_the_reason_stands_in_the_report(wanted, tiny_tokenizer, tmp_path, monkeypatch):
    rows(tmp_path, BROKEN["no JSON"])
    from ultralong.evaluation.runs import checks

    monkeypatch.setattr(checks, "check_task", lambda *_, **__: None)
    result = run(wanted, tmp_path / "run", opened=opened(tiny_tokenizer), draw=False, quiet=True)
    assert "row 3: not valid JSON" in result["skipped"][f"{QA} at 1,024"]
    assert read_json(tmp_path / "run" / "environment.json")["skipped"] == result["skipped"]
    assert {values["task"]: values["n"] for values in result["results"]}["infinitebench_passkey"] == 4


@pytest.fixture
def folder(tmp_path):
    """A small run's files, as `eval report` reads them."""
    settings.save(RunSettings("m", ("infinitebench_passkey",), (1024,)), tmp_path / "run.yaml")
    record = {
        "task": "infinitebench_passkey", "index": 0, "seed": 0, "max_length": 1024, "outputs": ["yes"], "seconds": 1.0,
        "prediction": "yes", "source": "made up", "depth": None,
    }  # fmt: skip
    append_jsonl(tmp_path / "infinitebench_passkey-1024.jsonl", record)
    (tmp_path / "environment.json").write_text('{"window": 4096, "skipped": {}}')
    assert summarise(tmp_path)["results"][0]["n"] == 1
    return tmp_path


WRONG = ["[1, 2]\n", "7\n", '"text"\n', "null\n", '{"a": 1}\n', '{"results": 5}\n', "[{}]\n", "{\n", "\udce4\n"]
FILES = [
    "run.yaml", "environment.json", "infinitebench_passkey-1024.jsonl", "needle.jsonl", "perplexity.json", "loss.json",
    "lm_eval.json",
]  # fmt: skip


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("text", WRONG, ids=repr)
def test_files_of_the_wrong_shape_are_one_line(folder, file, text, capsys):
    """Any of a run's files, of any wrong shape: an error that names the file, or a report; never a traceback."""
    (folder / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    code = 0
    try:
        main(["eval", "report", str(folder)])
    except SystemExit as left:
        code = left.code
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    if code:
        assert code == 1
        assert file in told.err


def test_a_report_of_a_run_without_answers_is_an_error(folder, capsys):
    (folder / "infinitebench_passkey-1024.jsonl").unlink()
    with pytest.raises(SystemExit):
        main(["eval", "report", str(folder)])
    assert "holds no answers yet: repeat its `ultralong eval run`" in capsys.readouterr().err
    assert not (folder / "report.html").exists()

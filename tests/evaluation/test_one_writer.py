"""A folder of a measurement, a demo or a search is of one process: a second one is refused and changes nothing."""

from __future__ import annotations

import pytest
from induction import InductionModel

from ultralong import demo
from ultralong.evaluation.runs.records import answer_tasks, write_samples
from ultralong.evaluation.runs.run import run
from ultralong.evaluation.runs.settings import RunSettings
from ultralong.search.run import search
from ultralong.search.settings import SearchSettings
from ultralong.utils import settings
from ultralong.utils.files import file_lock, locked

TEXT = "The keeper of the light wrote in his log that no ship had passed. " * 60
TASKS = [("needle",), ("infinitebench_passkey",), ("perplexity",), ("needle", "infinitebench_passkey")]


@pytest.mark.parametrize("tasks", TASKS, ids=" and ".join)
def test_an_evaluation(tmp_path, tiny_tokenizer, tasks):
    """Its settings were written over those of the first one before it was refused, and perplexity never was."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "run").mkdir()
    more = {"samples": 2, "haystack": str(tmp_path / "text.txt"), "chat": False, "rows": str(tmp_path)}
    first = RunSettings("reader", ("nonliteral_world",), (1024,), **more)
    settings.save(first, tmp_path / "run" / "run.yaml")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    other = RunSettings("reader", tasks, (1024,), **more)
    opened = (InductionModel(len(tiny_tokenizer)), tiny_tokenizer)
    with locked(tmp_path / "run"), pytest.raises(ValueError, match="Another process is writing"):
        run(other, tmp_path / "run", opened=opened, draw=False, quiet=True)
    after = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != ".lock"}
    assert after == before


def test_answers_and_their_table(tmp_path, tiny_tokenizer):
    with locked(tmp_path), pytest.raises(ValueError, match="Another process is writing"):
        answer_tasks(
            InductionModel(len(tiny_tokenizer)), tiny_tokenizer, ["infinitebench_passkey"], [1024], 1, 0, tmp_path,
            quiet=True,
        )  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}


def test_a_demo(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="Another process is writing"):
        demo.run(demo.load("miniature"), tmp_path, say=lambda text: None)
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}


def test_a_search(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="Another process is writing"):
        search(SearchSettings("model", 2048), tmp_path, quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}


def test_a_file_of_samples(tmp_path, tiny_tokenizer):
    """Two at once wrote each sample twice, and both said that all was well."""
    out, given = tmp_path / "s.jsonl", ("infinitebench_passkey", tiny_tokenizer, 1024, 2, 0)
    with file_lock(tmp_path / ".s.jsonl.lock", "busy"), pytest.raises(ValueError, match="Another process is writing"):
        write_samples(*given, out, quiet=True)
    assert not out.exists()
    assert write_samples(*given, out, quiet=True)["made"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl"]
    assert write_samples(*given, out, quiet=True)["made"] == 0


@pytest.mark.parametrize("samples", [0, -1])
def test_no_samples(tmp_path, tiny_tokenizer, samples):
    with pytest.raises(ValueError, match="samples must be 1 or more"):
        write_samples("infinitebench_passkey", tiny_tokenizer, 1024, samples, 0, tmp_path / "s.jsonl", quiet=True)
    assert not list(tmp_path.iterdir())

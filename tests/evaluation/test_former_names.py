"""Runs of version 0.3 open, are reported and resumed; its names of tests are understood with a note."""

import json

import pytest
from induction import InductionModel
from test_samples import prose

from ultralong.evaluation.measures.result import Result
from ultralong.evaluation.runs.compare import compare_answers
from ultralong.evaluation.runs.results import summarise, write_results
from ultralong.evaluation.runs.run import run
from ultralong.evaluation.runs.settings import RunSettings
from ultralong.evaluation.tasks.groups import expand
from ultralong.evaluation.tasks.samples import TASKS, current_name, find_task, make_samples
from ultralong.utils import settings
from ultralong.utils.files import append_jsonl, read_jsonl

OLD = [f"facts_qa{number}" for number in range(1, 6)]
NEW = [f"babilong_style_qa{number}" for number in range(1, 6)]


@pytest.fixture
def old_run(tmp_path, tiny_tokenizer):
    """A folder as version 0.3 left it, stopped after one of two samples."""
    folder = tmp_path / "old"
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(prose(count=2)))
    wanted = RunSettings("reader", ("facts_qa1",), (2048,), samples=2, chat=False, haystack=str(text))
    settings.save(wanted, folder / "run.yaml")
    kept = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text("".join(x for x in kept.splitlines(True) if not x.startswith("needle_")))
    (folder / "environment.json").write_text(json.dumps({"window": 2048, "skipped": {"x": "no data"}, "torch": "2.13"}))
    record = next(make_samples(NEW[0], tiny_tokenizer, 2048, 1, chat=False, haystack=prose(count=2)))
    kept = {key: value for key, value in record.items() if key != "input"}
    append_jsonl(
        folder / "facts_qa1-2048.jsonl",
        {**kept, "task": "facts_qa1", "prediction": record["outputs"][0], "engine": "x", "reused": 0, "seconds": 1.0},
    )
    cell = {"length": 1024, "depth": 0.5, "n": 4, "correct": 3, "low": 0.3, "high": 0.95, "haystack": "repeated noise"}
    append_jsonl(folder / "needle.jsonl", {**cell, "correct": 0, "n": 1, "wrong": []})
    append_jsonl(folder / "needle.jsonl", {**cell, "wrong": [{"sample": 0, "expected": "1", "got": "2"}]})
    bins = [{"start": 0, "end": 256, "n": 9, "rows": 2, "nll": 2.0, "perplexity": 7.4, "low": 7.0, "high": 8.0}]
    (folder / "perplexity.json").write_text(json.dumps({"row": bins, "document": bins}))
    score = {"task": "PIQA", "lm_eval": ["piqa"], "metric": "acc_norm,none", "score": 60.0, "stderr": 1.0, "n": 1838}
    (folder / "standard.json").write_text(
        json.dumps({"scores": [score], "skipped": {"MMLU": "no network"}, "version": "0.4"})
    )
    return folder, wanted


def test_a_folder_of_03_opens(old_run):
    folder, _ = old_run
    found = summarise(folder)
    results = {(result.task, result.metric): result for result in map(Result.from_dict, found["results"])}
    assert set(results) == {
        ("needle", "found"),
        ("perplexity", "perplexity_by_row"),
        ("perplexity", "perplexity_by_document"),
        ("PIQA", "acc_norm,none"),
        (NEW[0], "score"),
    }
    needle = results["needle", "found"]
    assert [(part.n, part.value) for part in needle.by_depth] == [(4, 75.0)], "the later cell counts"
    assert results["PIQA", "acc_norm,none"].low == pytest.approx(58.04, abs=0.01)
    assert results[NEW[0], "score"].value == 100
    assert found["skipped"] == {"x": "no data", "MMLU": "no network"}
    assert found["window"] == 2048
    assert found["families"][0]["family"] == "BABILong-style"


def test_a_folder_of_03_is_resumed_in_its_own_files(old_run, tiny_tokenizer):
    pytest.importorskip("plotly")
    folder, wanted = old_run
    before = (folder / "facts_qa1-2048.jsonl").read_bytes()
    with pytest.warns(UserWarning, match="facts_qa1 is called babilong_style_qa1 now"):
        result = run(
            wanted, folder, opened=(InductionModel(len(tiny_tokenizer)), tiny_tokenizer), draw=False, quiet=True
        )
    file = folder / "facts_qa1-2048.jsonl"
    assert file.read_bytes().startswith(before)
    assert [record["index"] for record in read_jsonl(file)] == [0, 1]
    assert not (folder / "babilong_style_qa1-2048.jsonl").exists()
    assert next(item for item in result["results"] if item["task"] == NEW[0])["n"] == 2
    # A run of today has its files under today's names: the two are compared sample by sample.
    with pytest.warns(UserWarning, match="is called"):
        run(
            wanted,
            folder.parent / "new",
            opened=(InductionModel(len(tiny_tokenizer)), tiny_tokenizer),
            draw=False,
            quiet=True,
        )
    assert (folder.parent / "new" / "babilong_style_qa1-2048.jsonl").exists()
    (row,) = compare_answers(folder, folder.parent / "new")
    assert (row["task"], row["n"]) == (NEW[0], 2)
    write_results(folder.parent / "new", folder)


@pytest.mark.parametrize(("old", "new"), list(zip(OLD, NEW, strict=True)))
def test_a_test_keeps_its_samples_under_its_new_name(tiny_tokenizer, old, new):
    with pytest.warns(UserWarning, match=f"{old} is called {new} now"):
        assert find_task(old) is TASKS[new]
    assert current_name(old) == current_name(new) == new
    assert TASKS[new].seed_name == old, "the name that seeds the draws"


@pytest.mark.parametrize(
    ("old", "new"), [("facts", NEW), ("standard", ["lm_eval"]), ("facts_qa2,standard", [NEW[1], "lm_eval"])]
)
def test_groups_of_03_are_understood_with_a_note(old, new):
    with pytest.warns(UserWarning, match="now; the old name will go"):
        assert expand([old]) == new

"""Outcomes of the short benchmarks' samples: read from lm-eval's log, compared in pairs, shown."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ultralong.cli.measure import compare
from ultralong.evaluation.measures.lm_eval_samples import read_outcomes
from ultralong.evaluation.measures.result import benchmark_result
from ultralong.evaluation.report.sections import section_list
from ultralong.evaluation.runs import direct
from ultralong.evaluation.runs.compare import compare_answers
from ultralong.evaluation.runs.settings import RunSettings

STAMP = "2026-11-30T12-05-44.123456"


def log(folder, task, samples):
    path = folder / "some__model" / f"samples_{task}_{STAMP}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples), encoding="utf-8")


def generated(number, filtered, score, text):
    return {
        "doc_id": number,
        "doc": {"question": "long"},
        "target": "18",
        "arguments": {"gen_args_0": {"arg_0": "a long prompt"}},
        "resps": [[text]],
        "filtered_resps": [text[-2:]],
        "filter": filtered,
        "doc_hash": f"d{number}",
        "prompt_hash": f"p{number}",
        "exact_match": score,
    }


def test_the_log_is_read_by_metric_and_filter(tmp_path):
    lines = [
        generated(number, filtered, score, f"It is\u2028{number}")
        for filtered, scores in (("strict_match", (0.0, 0.0)), ("flexible_extract", (1.0, 0.0)))
        for number, score in zip((1, 0), scores, strict=True)
    ]
    log(tmp_path, "gsm8k_llama", lines)
    log(tmp_path, "a_task_10", lines[2:])
    found = read_outcomes(("gsm8k_llama",), "exact_match,flexible_extract", tmp_path)
    assert [(item["task"], item["index"], item["score"]) for item in found] == [
        ("a_task_10", 0, 0.0),
        ("a_task_10", 1, 1.0),
        ("gsm8k_llama", 0, 0.0),
        ("gsm8k_llama", 1, 1.0),
    ]
    assert found[3] == {
        "task": "gsm8k_llama",
        "index": 1,
        "doc": "d1",
        "prompt": "p1",
        "score": 1.0,
        "answer": "It is\u20281",
        "expected": "18",
    }
    with pytest.raises(ValueError, match=r"Sample 1 of a_task_10 in .* does not hold acc"):
        read_outcomes(("gsm8k_llama",), "acc,flexible_extract", tmp_path)
    with pytest.raises(ValueError, match=r"no samples of mmlu_llama with the filter none"):
        read_outcomes(("mmlu_llama",), "acc,none", tmp_path)


def test_endings_that_were_compared_have_no_answer(tmp_path):
    sample = {**generated(0, "none", 0, "x"), "resps": [[["-3.5", "False"]], [["-4.0", "True"]]], "acc_norm": 1.0}
    log(tmp_path, "piqa", [sample])
    (found,) = read_outcomes(("piqa",), "acc_norm,none", tmp_path)
    assert (found["score"], "answer" in found, "expected" in found) == (1.0, False, False)


def run_folder(folder, name, scores, doc="d", prompt="p", task="mmlu_anatomy"):
    """What a run leaves of one benchmark."""
    kept = folder / "lm_eval"
    kept.mkdir(parents=True, exist_ok=True)
    records = [
        {"task": task, "index": index, "doc": f"{doc}{index}", "prompt": f"{prompt}{index}", "score": score}
        for index, score in enumerate(scores)
    ]
    (kept / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (kept / f"{name}.json").write_text("{}")
    return folder


def test_benchmarks_are_compared_over_the_samples_of_both(tmp_path, capsys):
    draw = np.random.default_rng(5)
    before = (draw.random(400) < 0.6).astype(float).tolist()
    # One in ten changes, more to the worse.
    after = [1 - score if draw.random() < (0.15 if score else 0.05) else score for score in before]
    run_folder(tmp_path / "a", "MMLU", before)
    run_folder(tmp_path / "b", "MMLU", [*after, 1.0, 1.0])
    run_folder(tmp_path / "a", "HumanEval", [1.0, 0.0, 1.0])
    run_folder(tmp_path / "b", "HumanEval", [1.0, 0.0, 1.0])
    run_folder(tmp_path / "a", "PIQA", [1.0])
    mmlu, code = compare_answers(tmp_path / "a", tmp_path / "b")
    assert (mmlu["task"], mmlu["length"], mmlu["n"]) == ("MMLU", None, 400), "what one alone was asked does not count"
    change = np.asarray(after) - np.asarray(before)
    assert mmlu["difference"] == pytest.approx(100 * change.mean())
    assert mmlu["second"] - mmlu["first"] == pytest.approx(mmlu["difference"])
    half = 1.96 * 100 * change.std(ddof=1) / 20
    assert mmlu["high"] - mmlu["low"] == pytest.approx(2 * half, rel=0.1)
    alone = 1.96 * 100 * np.std(before) / 20
    assert half < alone, "pairs tell more than two intervals"
    assert (code["task"], code["difference"], code["n"]) == ("HumanEval", 0, 3)
    assert -code["low"] == code["high"] > 50, "three alike are no certainty"
    compare(tmp_path / "a", tmp_path / "b")
    line = capsys.readouterr().out.splitlines()[0]
    assert line.split()[:4] == ["MMLU", f"{mmlu['first']:.1f}", "->", f"{mmlu['second']:.1f}"]


def test_other_samples_are_refused_and_other_prompts_named(tmp_path):
    one = run_folder(tmp_path / "a", "PIQA", [1.0, 0.0])
    with pytest.raises(ValueError, match="PIQA has other samples"):
        compare_answers(one, run_folder(tmp_path / "b", "PIQA", [1.0, 1.0], doc="e"))
    with pytest.raises(ValueError, match="PIQA has other samples"):
        compare_answers(one, run_folder(tmp_path / "c", "PIQA", [1.0, 1.0], task="another"))
    with pytest.warns(UserWarning, match="PIQA: .* in other words"):
        (row,) = compare_answers(one, run_folder(tmp_path / "d", "PIQA", [1.0, 1.0], prompt="q"))
    assert row["difference"] == 50
    older = run_folder(tmp_path / "e", "PIQA", [1.0, 1.0])
    (older / "lm_eval" / "PIQA.jsonl").unlink()
    with (
        pytest.warns(UserWarning, match=r"PIQA was measured in .*e before .* delete .*PIQA.json"),
        pytest.raises(ValueError, match="no samples of the same benchmark"),
    ):
        compare_answers(one, older)


@pytest.mark.parametrize(("score", "ends"), [(0.0, (0.0, 16.1)), (100.0, (83.9, 100.0))])
def test_samples_all_alike_are_no_certainty(score, ends):
    """Wilson's interval of 0 and of 20 of 20, where lm-eval's standard error is 0."""
    values = {"task": "HumanEval", "metric": "pass@1,create_test", "lm_eval": ["humaneval_instruct"]}
    found = benchmark_result({**values, "score": score, "stderr": 0.0, "n": 20})
    assert (found.low, found.high) == (pytest.approx(ends[0], abs=0.05), pytest.approx(ends[1], abs=0.05))


def test_the_page_shows_the_pairs_of_benchmarks():
    rows = [{"task": "MMLU", "length": None, "n": 9, "first": 55.0, "second": 54.0, "difference": -1.0}]
    (section,) = section_list(
        [], {"compared": [{**rows[0], "low": -2.0, "high": 0.5}]}, draw=lambda *names, **more: None
    )
    assert section.tables[0].rows == [["MMLU", "55.0", "54.0", "-1.0", "-2.0 to +0.5", "9"]]


def test_batches_of_benchmarks_are_those_of_their_own_prompts(monkeypatch):
    """Not lm-eval's trial of whole windows: 131,072 tokens of a large vocabulary fit once, if at all."""
    asked, fits = [], [500, 9]
    monkeypatch.setattr(direct, "batch_that_fits", lambda model, capacity, batch: asked.append(capacity) or fits.pop(0))
    wanted, gpu = RunSettings("model", ("lm_eval",)), SimpleNamespace(device=torch.device("cuda"))
    assert [direct._benchmark_batch(wanted, gpu) for _ in range(2)] == [64, 9]
    assert asked == [8192, 8192]
    assert direct._benchmark_batch(wanted, SimpleNamespace(device=torch.device("cpu"))) is None
    assert direct._benchmark_batch(wanted, None) is None
    assert direct._benchmark_batch(RunSettings("model", ("lm_eval",), batch=200), gpu) == 200


def test_a_gpu_is_lm_evals_once_nothing_else_needs_the_model(tmp_path, monkeypatch):
    """A model of more than half of a GPU would not fit there twice; one that the caller opened stays where it is."""

    class OnGpu(torch.nn.Linear):
        """Says that it is on a GPU until it is moved."""

        device = torch.device("cuda", 0)

        def parameters(self, recurse=True):
            return iter([SimpleNamespace(device=self.device)])

        def to(self, place):
            self.device = torch.device(place)

    seen = []

    def measured(*words, device, batch, **more):
        seen.append((device, batch, model.device.type))
        return [], {}

    monkeypatch.setattr(direct, "measure_lm_eval", measured)
    monkeypatch.setattr(direct, "lm_eval_version", lambda: "0")
    monkeypatch.setattr(direct, "batch_that_fits", lambda *words: 9)
    for release in (False, True):
        model = OnGpu(1, 1)
        direct.measure_benchmarks(
            RunSettings("model", ("lm_eval",)), model, SimpleNamespace(chat_template=None), tmp_path, release=release
        )
    assert seen == [("cuda", 9, "cuda"), ("cuda", 9, "cpu")]

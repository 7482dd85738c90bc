"""Samples and answers in files: continued, not repeated; scored as made."""

import json
import os
import threading

import pytest
from induction import InductionModel

from ultralong.cli import main
from ultralong.evaluation.measures.result import Part, Result, read_measurements
from ultralong.evaluation.measures.score import effective_length, mean_by_length
from ultralong.evaluation.runs.answer_files import score_file
from ultralong.evaluation.runs.compare import compare_answers
from ultralong.evaluation.runs.records import answer_tasks, write_samples
from ultralong.utils.files import read_jsonl

# Tests whose answer is a copy of a line of the prompt, which a model of repetition can give.
TASKS = ("infinitebench_passkey", "infinitebench_number_string")


def test_samples_go_on_where_they_stopped(tiny_tokenizer, tmp_path):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    told = write_samples("needle", tiny_tokenizer, 2048, 6, 1, whole, quiet=True)
    assert told["samples"] == told["made"] == 6
    assert told["longest"] <= 2048
    write_samples("needle", tiny_tokenizer, 2048, 2, 1, stopped, quiet=True)
    with open(stopped, "a") as stream:
        stream.write('{"task": "needle", "ind')  # a crash in the middle of a line
    told = write_samples("needle", tiny_tokenizer, 2048, 6, 1, stopped, quiet=True)
    assert (told["samples"], told["made"]) == (6, 4)
    assert stopped.read_bytes() == whole.read_bytes()
    assert write_samples("needle", tiny_tokenizer, 2048, 6, 1, stopped, quiet=True)["made"] == 0
    assert stopped.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(("length", "seed"), [(2048, 2), (4096, 1)])
def test_a_file_of_another_run_is_left_alone(tiny_tokenizer, tmp_path, length, seed):
    out = tmp_path / "samples.jsonl"
    write_samples("needle", tiny_tokenizer, 2048, 1, 1, out, quiet=True)
    before = out.read_bytes()
    with pytest.raises(ValueError, match="of another run"):
        write_samples("needle", tiny_tokenizer, length, 3, seed, out, quiet=True)
    assert out.read_bytes() == before


def test_files_of_answers_are_scored(tiny_tokenizer, tmp_path):
    out = tmp_path / "samples.jsonl"
    write_samples("needle", tiny_tokenizer, 1024, 4, 1, out, quiet=True)
    answers = tmp_path / "answers.jsonl"
    records = read_jsonl(out)
    answers.write_text(
        "".join(
            json.dumps({**record, "prediction": f"It is {record['outputs'][0]}." if number else "?"}) + "\n"
            for number, record in enumerate(records)
        )
    )
    assert score_file("needle", answers)["score"] == 75
    with pytest.raises(ValueError, match="no file"):
        score_file("needle", tmp_path / "missing.jsonl")


def test_a_model_answers_within_its_window_and_a_stopped_run_goes_on(tiny_tokenizer, tmp_path, monkeypatch):
    model = InductionModel(len(tiny_tokenizer), window=1500)
    arguments = (model, tiny_tokenizer, TASKS, (1024, 4096), 8, 0)
    whole = answer_tasks(*arguments, tmp_path / "whole", chat=False, quiet=True)
    results = [Result.from_dict(values) for values in whole["results"]]
    assert [result.task for result in results] == list(TASKS)
    # Samples 0 to 7 put the key into the first eighth of the text, far outside of this model's window at 4,096.
    assert [[(part.length, part.value) for part in result.by_length] for result in results] == [
        [(1024, 100), (4096, 0)]
    ] * 2
    assert whole["means"] == [{"length": 1024, "tasks": 2, "score": 100.0}, {"length": 4096, "tasks": 2, "score": 0.0}]
    assert read_measurements(tmp_path / "whole" / "results.json") == results
    record = read_jsonl(tmp_path / "whole" / "infinitebench_passkey-1024.jsonl")[3]
    assert "input" not in record
    assert record["outputs"][0] in record["prediction"]

    answered = []
    forward = InductionModel.next_token

    def stop_after_a_while(self, tokens):
        answered.append(1)
        if len(answered) == 20:
            raise KeyboardInterrupt
        return forward(self, tokens)

    monkeypatch.setattr(InductionModel, "next_token", stop_after_a_while)
    with pytest.raises(KeyboardInterrupt):
        answer_tasks(*arguments, tmp_path / "stopped", chat=False, quiet=True)
    first = (tmp_path / "stopped" / "infinitebench_passkey-1024.jsonl").read_bytes()
    assert 0 < first.count(b"\n") < 8
    monkeypatch.setattr(InductionModel, "next_token", forward)
    again = answer_tasks(*arguments, tmp_path / "stopped", chat=False, quiet=True)
    assert (tmp_path / "stopped" / "infinitebench_passkey-1024.jsonl").read_bytes().startswith(first)
    assert [item["value"] for item in again["results"]] == [item["value"] for item in whole["results"]]


def test_means_and_effective_length():
    scores = [
        Result(
            task,
            "score",
            0.0,
            1,
            "per cent",
            "samples",
            by_length=tuple(Part(value, 1, length=length) for length, value in zip((4096, 8192, 16384), values)),
        )
        for task, values in (("a", (100.0, 90.0, 100.0)), ("b", (80.0, 50.0, 100.0)))
    ]
    means = mean_by_length(scores)
    assert [mean["score"] for mean in means] == [90.0, 70.0, 100.0]
    assert effective_length(means) == 4096, "a dip ends it, whatever comes after"
    assert effective_length(means, bar=60.0) == 16384
    assert effective_length(means, bar=95.0) is None


def test_two_models_are_compared_sample_by_sample(tiny_tokenizer, tmp_path, capsys):
    for name, window in (("short", 700), ("long", None)):
        answer_tasks(
            InductionModel(len(tiny_tokenizer), window=window),
            tiny_tokenizer,
            TASKS[:1],
            (1024, 2048),
            5,
            0,
            tmp_path / name,
            chat=False,
            quiet=True,
        )
    one, two = compare_answers(tmp_path / "short", tmp_path / "long")
    assert (one["task"], one["length"], two["length"], one["n"]) == (TASKS[0], 1024, 2048, 5)
    assert (two["first"], two["second"], two["difference"], two["low"], two["high"]) == (
        0,
        100,
        100,
        pytest.approx(13.1, abs=0.1),
        100,
    )
    assert [item["difference"] for item in compare_answers(tmp_path / "long", tmp_path / "long")] == [0, 0]
    answer_tasks(
        InductionModel(len(tiny_tokenizer)),
        tiny_tokenizer,
        TASKS[:1],
        (1024,),
        5,
        1,
        tmp_path / "other",
        chat=False,
        quiet=True,
    )
    with pytest.raises(ValueError, match="other samples"):
        compare_answers(tmp_path / "long", tmp_path / "other")
    with pytest.raises(ValueError, match="no answers to the same test"):
        compare_answers(tmp_path / "long", tmp_path)
    for name in ("short", "long"):
        (tmp_path / name / "perplexity.json").touch()
    (tmp_path / "long" / "needle.jsonl").touch()
    capsys.readouterr()
    main(["eval", "compare", str(tmp_path / "short"), str(tmp_path / "long")])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "note: not compared here: perplexity. Each report has its own; ultralong ablate pairs them."
    ]


def answer_line(outputs, prediction, **more):
    return json.dumps({"outputs": outputs, "prediction": prediction, **more})


@pytest.mark.parametrize("ending", ["", "\n", "\n\n", "\r\n"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_line_of_a_file_of_answers_counts(tmp_path, ending, count):
    """Also the last one without a line break, as most programs write it, and with the marks of other systems."""
    file = tmp_path / "answers.jsonl"
    lines = [answer_line(["42"], "42" if number else "7") for number in range(count)]
    for start in ("", "\ufeff"):
        file.write_text(start + "\n".join(lines) + ending, encoding="utf-8", newline="")
        result = score_file("needle", file)
        assert (result["n"], result["score"]) == (count, pytest.approx(100 * (count - 1) / count))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (answer_line("42", "42"), r"Record 1: outputs must be a list of texts, found str '42'"),
        (answer_line([42], "42"), r"outputs must be a list of texts, found int '42' in it"),
        (answer_line(["a", None], "a"), r"outputs must be a list of texts, found NoneType"),
        (answer_line({"a": 1}, "a"), r"outputs must be a list of texts, found dict"),
        (answer_line([], "a"), r"Record 1 has no references"),
        (answer_line(["", " "], "a"), r"Record 1 has no references"),
        (answer_line(["a"], ["a"]), r"prediction must be a text, found list"),
        (answer_line(["a"], 5), r"prediction must be a text, found int '5'"),
        (answer_line(["a"], "a", max_length="4096"), r"max_length must be a number of tokens, found str '4096'"),
        (answer_line(["a"], "a", max_length=-5), r"max_length must be a number of tokens, found int '-5'"),
        ('{"outputs": ["a"]}', r"Record 1 has no prediction"),
        ("[1, 2]", r"line 1: an object of fields is needed, found list"),
        ('{"outputs": ["a"], "pred', r"line 1: not valid JSON"),
    ],
)
def test_what_is_no_answer_is_refused_by_name(tmp_path, line, said):
    (tmp_path / "answers.jsonl").write_text(line)
    with pytest.raises(ValueError, match=said):
        score_file("needle", tmp_path / "answers.jsonl")


@pytest.mark.parametrize(
    ("task", "outputs"),
    [
        ("infinitebench_code_debug", ["name"]),
        ("infinitebench_math_calc", ["five"]),
        ("infinitebench_math_find", ["many"]),
    ],
)
def test_references_that_a_test_cannot_use_are_refused_by_name(tmp_path, task, outputs):
    (tmp_path / "answers.jsonl").write_text(answer_line(outputs, "5"))
    with pytest.raises(ValueError, match=f"Record 1 cannot be scored as {task}"):
        score_file(task, tmp_path / "answers.jsonl")


def test_the_command_prints_one_sample_without_an_interval(tmp_path, capsys):
    from ultralong import cli

    (tmp_path / "answers.jsonl").write_text(answer_line(["42"], "It is 42."))
    cli.main(["eval", "score", "needle", str(tmp_path / "answers.jsonl"), "--json", str(tmp_path / "score.json")])
    assert capsys.readouterr().out.split() == ["needle", "100.0", "[n", "=", "1]", "n", "1", "(retrieval)"]
    assert json.loads((tmp_path / "score.json").read_text())["n"] == 1


def answers(file, *changes):
    """A file of answers: the same sample, changed."""
    base = {"task": "needle", "index": 0, "max_length": 4096, "seed": 0, "outputs": ["7"], "prediction": "7"}
    file.write_text("".join(json.dumps(base | change) + "\n" for change in changes))
    return file


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depth": [0.5], "positions": [3]}, "depth must be a number from 0 to 1"),
        ({"depth": float("nan"), "positions": [3]}, "depth must be"),
        ({"depth": 1.5, "positions": [3]}, "depth must be"),
        ({"depth": 0.5, "positions": 3}, "positions must be a list"),
        ({"depth": 0.5, "positions": True}, "positions must be a list"),
    ],
)
def test_places_of_a_wrong_type_are_named(tmp_path, change, said):
    with pytest.raises(ValueError, match=f"Record 2: {said}"):
        score_file("needle", answers(tmp_path / "a.jsonl", {}, {"index": 1} | change))


@pytest.mark.parametrize("again", [{}, {"prediction": "8"}, {"depth": 0.2}])
def test_a_sample_counts_once(tmp_path, again):
    with pytest.raises(ValueError, match="Records 1 and 3 answer one sample"):
        score_file("needle", answers(tmp_path / "a.jsonl", {}, {"index": 1}, again))


@pytest.mark.parametrize("other", [{"index": 1}, {"max_length": 8192}, {"seed": 1}, {"outputs": ["9"]}])
def test_another_sample_is_another(tmp_path, other):
    """Of another length or seed, or of a program whose indices start again."""
    assert score_file("needle", answers(tmp_path / "a.jsonl", {}, other))["n"] == 2


@pytest.mark.parametrize("task", ["ruler_vt", "graphwalks_bfs", "lveval_hotpotwikiqa_mixup_16k"])
def test_answers_of_another_test_are_not_scored_by_this_ones_rule(tmp_path, task):
    with pytest.raises(ValueError, match=f"Record 1 is an answer to {task}, and is not scored as needle"):
        score_file("needle", answers(tmp_path / "a.jsonl", {"task": task}))
    assert score_file("needle", answers(tmp_path / "a.jsonl", {"task": "our own name"}))["n"] == 1


def test_answers_are_read_from_a_pipe(tmp_path):
    """As a shell's <(zcat answers.jsonl.gz)."""
    content = answers(tmp_path / "a.jsonl", {}, {"index": 1}).read_bytes()
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
    writer.start()
    assert score_file("needle", tmp_path / "pipe")["n"] == 2
    writer.join()

"""`--gpus` and `--kv` of the evaluation: the same answers, from processes that share one cache."""

import sys

import pytest

from ultralong import cli
from ultralong.evaluation.runs.results import summarise
from ultralong.evaluation.runs.run import RunSettings, run
from ultralong.inference.server.serve import serve
from ultralong.inference.server.settings import ServeSettings
from ultralong.inference.sharded_engine import with_model
from ultralong.utils.files import append_jsonl, locked, read_json, read_jsonl

# Answers of few tokens: those of 128, as the needles of RULER have, took most of the time.
TASKS = ("infinitebench_passkey", "infinitebench_number_string")


@pytest.fixture
def checkpoint(tmp_path, make_tiny_model, tiny_tokenizer):
    model = make_tiny_model(3, max_position_embeddings=4096, vocab_size=len(tiny_tokenizer))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def answers(folder):
    return {
        path.name: [(record["index"], record["prediction"], record["outputs"]) for record in read_jsonl(path)]
        for path in sorted(folder.glob("*-*.jsonl"))
    }


def needles(summary):
    return next(result for result in summary["results"] if result["task"] == "needle")["by_depth"]


def test_two_processes_and_batches_answer_as_one_does(checkpoint, tmp_path):
    settings = {
        "model": checkpoint,
        "tasks": (*TASKS, "needle"),
        "lengths": (768, 1024),
        "samples": 2,
        "grid": (2, 2),
        "grid_samples": 1,
        "chat": False,
    }
    plain = run(RunSettings(**settings, batch=1), tmp_path / "plain", device="cpu", draw=False, quiet=True)
    two = run(RunSettings(**settings, gpus=2, chunk=300), tmp_path / "two", device="cpu", draw=False, quiet=True)
    many = run(RunSettings(**settings, batch=5, workers=1), tmp_path / "many", device="cpu", draw=False, quiet=True)
    assert answers(tmp_path / "plain") == answers(tmp_path / "two") == answers(tmp_path / "many")
    assert len(answers(tmp_path / "many")) == 4
    engines = {record["engine"] for record in read_jsonl(tmp_path / "two" / f"{TASKS[0]}-1024.jsonl")}
    assert engines == {"transformers, 2 processes"}
    for one, other in zip(needles(plain), needles(two), strict=True):
        assert [one[key] for key in ("length", "depth", "n", "value")] == [
            other[key] for key in ("length", "depth", "n", "value")
        ]
    assert {item["task"] for item in many["results"]} == {*TASKS, "needle"}


def test_a_run_stopped_in_a_batch_goes_on(checkpoint, tmp_path, monkeypatch):
    from ultralong.inference import engines

    settings = RunSettings(model=checkpoint, tasks=TASKS, lengths=(1024,), samples=4, chat=False, batch=3)
    run(settings, tmp_path / "whole", device="cpu", draw=False, quiet=True)
    prefill, calls = engines.BatchedRunner.prefill, []

    def stop_later(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return prefill(*arguments)

    monkeypatch.setattr(engines.BatchedRunner, "prefill", stop_later)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "stopped", device="cpu", draw=False, quiet=True)
    assert sum(map(len, answers(tmp_path / "stopped").values())) == 3
    run(settings, tmp_path / "stopped", device="cpu", draw=False, quiet=True)
    assert answers(tmp_path / "stopped") == answers(tmp_path / "whole")


def test_the_command_line(checkpoint, tmp_path, capsys):
    words = [
        "eval",
        "answer",
        checkpoint,
        "--tasks",
        TASKS[0],
        "--lengths",
        "1024",
        "--samples",
        "2",
        "--device",
        "cpu",
    ]
    cli.main([*words, "--out", str(tmp_path / "one"), "--json", str(tmp_path / "one.json")])
    cli.main([*words, "--out", str(tmp_path / "two"), "--gpus", "2", "--kv", "fp8", "--chunk", "256"])
    assert "infinitebench_passkey" in capsys.readouterr().out
    assert read_json(tmp_path / "one.json")["results"][0]["n"] == 2
    (record, _) = read_jsonl(tmp_path / "two" / f"{TASKS[0]}-1024.jsonl")
    assert record["engine"] == "transformers, 2 processes, 8-bit keys and values"


def fail(model, tokenizer, engine):
    raise ValueError("these tests cannot be made")


@pytest.mark.parametrize("gpus", [1, 2])
def test_what_the_first_process_refuses_is_said_and_nobody_waits(checkpoint, gpus):
    with pytest.raises(ValueError, match="these tests cannot be made"):
        with_model(fail, checkpoint, gpus=gpus, device="cpu", quiet=True)
    with pytest.raises(ValueError, match="cannot be opened as a checkpoint"):
        with_model(fail, checkpoint + "x", gpus=gpus, device="cpu", quiet=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpus": 2, "tasks": ("perplexity",)}, "run on one GPU"),
        ({"kv_dtype": "fp8", "batch": 4}, "one prompt at a time"),
        ({"kv_dtype": "int4"}, "auto or fp8"),
        ({"gpus": 0}, "gpus at least 1"),
        ({"workers": -1}, "not negative"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        RunSettings(**{"model": "model", "tasks": ("ruler",)} | options)


@pytest.mark.skipif(sys.platform != "linux", reason="counts the GPUs of this machine")
def test_more_gpus_than_there_are(checkpoint):
    import torch

    missing = torch.cuda.device_count() + 2
    with pytest.raises(ValueError, match=f"gpus is {missing}, and this machine has"):
        with_model(fail, checkpoint, gpus=missing)


def test_two_runs_never_write_one_folder(checkpoint, tmp_path):
    settings = RunSettings(model=checkpoint, tasks=TASKS[:1], lengths=(1024,), samples=2, chat=False)
    with locked(tmp_path / "run"), pytest.raises(ValueError, match="Another process is writing to"):
        run(settings, tmp_path / "run", device="cpu", draw=False, quiet=True)
    run(settings, tmp_path / "run", device="cpu", draw=False, quiet=True)
    path = tmp_path / "run" / f"{TASKS[0]}-1024.jsonl"
    append_jsonl(path, read_jsonl(path)[1])
    with pytest.raises(ValueError, match=r"holds samples \[0, 1, 1\].*two runs wrote"):
        summarise(tmp_path / "run")


def test_a_server_says_how_gpus_exchange(checkpoint, monkeypatch):
    """The setting reaches what decodes, and a misspelt one is refused before a model is read."""
    asked = []

    class Asked(Exception):
        pass

    def runner(*_, exchange, **__):
        asked.append(exchange)
        raise Asked

    monkeypatch.setattr("ultralong.inference.sharded_engine.ShardedRunner", runner)
    for given, wanted in (({}, "auto"), ({"exchange": "direct"}, "direct")):
        with pytest.raises(Asked):
            serve(ServeSettings(str(checkpoint), port=0, kv="fp8", device="cpu", **given))
        assert asked.pop() == wanted
    with pytest.raises(ValueError, match="exchange takes auto, direct, gather, symmetric, found 'symetric'"):
        ServeSettings(str(checkpoint), exchange="symetric")

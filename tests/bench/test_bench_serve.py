"""The serving bench on a CPU: its numbers are the client's, its work is counted as prefill's, a kept prompt is kept."""

import json
import subprocess

import pytest

from ultralong import cli
from ultralong.bench.prefill import prefill_flops
from ultralong.bench.serving import measure
from ultralong.bench.serving.options import ServeBench
from ultralong.bench.tables import serve_table
from ultralong.planner.shapes import model_config, shape_of

pytest.importorskip("fastapi")
pytest.importorskip("openai")


@pytest.fixture
def folder(tmp_path, make_tiny_model):
    make_tiny_model(num_hidden_layers=3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(("gpus", "kv"), [(1, "bf16"), (2, "fp8")])
def test_a_row_holds_what_the_client_saw(folder, tmp_path, gpus, kv, capsys):
    options = ServeBench(str(folder), 600, 12, gpus, layers=2, kv=kv, chunk=128)
    row = measure.bench_serve(options, tmp_path / "out.json")
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["rows"] == [row]
    assert kept["options"]["kv"] == kv
    assert row["model"] == "model, cut to 2 of 3 layers"
    assert (row["tokens"], row["gpus"], row["chunk"], row["new_tokens"]) == (600, gpus, 128, 12)
    assert 600 <= row["again_cached_tokens"] <= 612
    shape = shape_of(model_config(str(folder)))
    work = sum(prefill_flops(shape, 600)) / gpus
    assert 0 < row["tflops"] <= work / row["seconds_to_first_token"] / 1e12 * 1.01
    assert row["of_kernel"] == pytest.approx(row["tflops"] / row["kernel_tflops"], rel=0.1)
    assert min(row["tokens_per_second_after"], row["again_seconds_to_first_token"]) > 0


def test_an_asking_program_that_fails_ends_the_bench(folder, monkeypatch):
    failed = subprocess.CompletedProcess([], 3, "")
    monkeypatch.setattr(measure.subprocess, "run", lambda *words, **options: failed)
    with pytest.raises(RuntimeError, match="asking program ended with exit code 3"):
        measure.bench_serve(ServeBench(str(folder), 20, 2, chunk=16))


def test_the_table_holds_what_was_recorded():
    row = {"model": "m", "tokens": 2**20, "gpus": 2, "kv": "fp8", "seconds_to_first_token": 250.0, "tflops": 606.4}
    row |= {"of_kernel": 0.912, "tokens_per_second_after": 21.25, "again_seconds_to_first_token": 0.8}
    assert serve_table([{"rows": [row]}])[2:] == ["| m | 1,048,576 | 2 | fp8 | 250.0 | 606 | 91% | 21.2 | 0.80 s |"]
    assert "| not known |" in serve_table([{"rows": [row | {"of_kernel": 1.16}]}])[2]
    assert serve_table([]) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere/model"], "neither a model folder"),
        (["meta-llama/Llama-3.1-8B", "--kv", "int4"], "bf16"),
        (["meta-llama/Llama-3.1-8B", "--tokens", "1"], "two tokens or more"),
    ],
)
def test_bad_input_is_a_sentence(words, said, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "serve", *words])
    assert said in " ".join(capsys.readouterr().err.split())

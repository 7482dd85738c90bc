"""The prefill bench on a CPU: its numbers fit together, its work is counted right, and a cut model is named so."""

import json

import pytest

from ultralong import cli
from ultralong.bench.prefill import PrefillBench, bench_prefill, prefill_flops
from ultralong.planner.shapes import model_config, shape_of


@pytest.fixture
def folder(tmp_path, make_tiny_model):
    make_tiny_model(num_hidden_layers=3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_work_is_counted_as_the_rule_says():
    shape = shape_of(model_config("meta-llama/Llama-3.1-8B"))
    attended, multiplied = prefill_flops(shape, 2**20)
    assert attended == 2 * 2.0**40 * 4096 * 32
    # 6.98e9 parameters in the layers.
    assert multiplied == pytest.approx(2 * 6.98e9 * 2**20, rel=1e-3)


@pytest.mark.parametrize(("gpus", "kv"), [(1, "bf16"), (1, "fp8"), (2, "bf16")])
def test_rows_fit_together(folder, tmp_path, gpus, kv, capsys):
    options = PrefillBench(str(folder), (301, 600), gpus, layers=2, kv=kv, chunk=128)
    rows = bench_prefill(options, tmp_path / "out.json")
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["rows"] == rows
    assert kept["options"]["kv"] == kv
    for row, tokens in zip(rows, (301, 600), strict=True):
        assert row["model"] == "model, cut to 2 of 3 layers"
        assert (row["tokens"], row["gpus"], row["chunk"], row["finite"]) == (tokens, gpus, 128, True)
        assert row["apart_from_plain"] < (0.1 if kv == "fp8" else 1e-5)
        assert row["of_kernel"] == pytest.approx(row["tflops"] / row["kernel_tflops"], rel=0.1)
        work = sum(prefill_flops(shape_of(model_config(str(folder))), tokens))
        assert 0 < row["tflops"] <= work / row["seconds"] / 1e12 * 1.01
    if gpus == 1 and kv == "fp8":
        assert rows[0]["cache_gib"] == pytest.approx(2 * 2 * 309 * 2 * (16 + 2) / 2**30, abs=1e-3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere/model"], "neither a model folder"),
        (["meta-llama/Llama-3.1-8B", "--kv", "int4"], "bf16"),
        (["meta-llama/Llama-3.1-8B", "--lengths", "1"], "two tokens or more"),
    ],
)
def test_bad_input_is_a_sentence(words, said, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "prefill", *words])
    assert said in " ".join(capsys.readouterr().err.split())

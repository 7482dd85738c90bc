"""The decoding bench on a CPU: every way says what transformers says, and its numbers fit together."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from ultralong import cli
from ultralong.bench import decode
from ultralong.bench.compare import compare
from ultralong.bench.decode import DecodeBench, bench_decode
from ultralong.bench.tables import decode_table
from ultralong.inference import sharded_generation
from ultralong.inference.decode_step import plain
from ultralong.inference.decode_step.step import DecodeStep
from ultralong.utils.local_ranks import run_ranks


@pytest.fixture
def folder(tmp_path, make_tiny_model):
    make_tiny_model(num_hidden_layers=3, initializer_range=0.2).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def ways(gpus):
    return [("transformers", 1, "bf16"), ("ultralong", 1, "bf16")] + [
        ("ultralong, sharded, ahead", gpus, kv) for kv in ("bf16", "fp8")
    ]


@pytest.mark.parametrize("gpus", [1, 2])
def test_rows_fit_together(folder, tmp_path, gpus, capsys):
    options = DecodeBench(folder, (50, 120), 3, 40, new_tokens=6, gpus=gpus, layers=2, chunk=32)
    rows = bench_decode(options, tmp_path / "out.json")
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["rows"] == rows
    assert kept["machine"]["packages"]["transformers"]
    assert kept["options"]["new_tokens"] == 6
    expected = [(1, tokens, *way) for tokens in (50, 120) for way in ways(gpus)]
    expected += [(3, 40, name, 1, "bf16") for name in ("transformers", "ultralong, batched")]
    assert [(row["batch"], row["tokens"], row["name"], row["gpus"], row["kv"]) for row in rows] == expected
    plain = {(row["batch"], row["tokens"]): row for row in rows if row["name"] == "transformers"}
    for row in rows:
        assert row["model"] == "model, cut to 2 of 3 layers"
        assert row["kv"] == "fp8" or row["same_tokens"] == 1, row
        assert row["tokens_per_second"] == pytest.approx(row["batch"] / row["decode_seconds_per_token"], rel=1e-2)
        base = plain[row["batch"], row["tokens"]]
        assert row["of_transformers"] == pytest.approx(row["tokens_per_second"] / base["tokens_per_second"], rel=1e-2)
        assert row["prefill_seconds"] > 0
    assert not compare(rows, rows, 0.03).regressions
    table = decode_table([kept])
    assert len(table) == 2 + len(rows)
    assert {line.count("|") for line in table} == {12}


def test_rows_say_which_way_attention_was_joined(folder, monkeypatch, capsys):
    """By the operations in torch, which no runner takes by itself."""
    monkeypatch.setattr(
        sharded_generation, "fast_step", lambda model, cache, group, way: DecodeStep(model, cache, group, plain, way)
    )
    options = {"new_tokens": 5, "chunk": 32, "filled": True, "fused_only": True, "kv": ("bf16",)}
    for gpus, names in ((1, [""]), (2, ["", "", ", exchange gather"])):  # `auto` is `direct` on CPUs
        ways = ("auto", "direct", "gather")[: len(names)]
        rows = bench_decode(DecodeBench(folder, (90,), 0, gpus=gpus, exchange=ways, **options))
        assert [row["name"] for row in rows] == [f"ultralong, sharded, fused{name}, ahead" for name in names]
        assert all("note" not in row for row in rows)


def test_a_filled_cache_in_place_of_a_prompt(folder, capsys):
    options = DecodeBench(folder, (90,), 0, new_tokens=5, chunk=32, filled=True)
    rows = bench_decode(options)
    assert [(row["name"], row["kv"]) for row in rows] == [("ultralong, sharded, ahead", kv) for kv in ("bf16", "fp8")]
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = 4 * (sum(x.numel() for x in model.parameters()) - (embedding is not head) * embedding.numel())
    token = 2 * config.num_hidden_layers * config.num_key_value_heads
    size = config.hidden_size // config.num_attention_heads
    for row, each in zip(rows, (4 * size, size + 2), strict=True):
        assert row["read_gib"] == pytest.approx((weights + 90 * token * each) / 2**30, abs=6e-5)
        assert row["gigabytes_per_second"] > 0
        assert row["of_copy"] > 0


@pytest.mark.parametrize("gpus", [1, 2])
def test_decoding_ahead_stands_beside_waiting_and_says_the_same(folder, gpus, capsys):
    rows = bench_decode(DecodeBench(folder, (90,), 0, new_tokens=6, chunk=32, filled=True, gpus=gpus, waiting=True))
    names = ["ultralong, sharded", "ultralong, sharded, ahead"]
    assert [(row["name"], row["kv"]) for row in rows] == [(name, kv) for kv in ("bf16", "fp8") for name in names]
    for waiting, ahead in zip(rows[::2], rows[1::2], strict=True):
        assert "same_as_waiting" not in waiting
        assert ahead["same_as_waiting"] == 1
        assert ahead["read_gib"] == waiting["read_gib"]


def copies_alone(rank, world):
    return decode.copy_rate(torch.device("cpu")) if rank == 0 else None


def test_the_rate_of_a_copy_waits_for_no_other_process():
    rate, none = run_ranks(copies_alone, 2, timeout=30)
    assert rate > 0
    assert none is None


def test_what_does_not_fit_is_a_row_too(folder, monkeypatch, capsys):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decode, "_by_transformers", full)
    rows = bench_decode(DecodeBench(folder, (20,), 0, new_tokens=3))
    assert rows[0]["note"] == "out of memory"
    assert "tokens_per_second" not in rows[0]
    assert all(row["tokens_per_second"] > 0 and "of_transformers" not in row for row in rows[1:])
    assert "out of memory" in decode_table([{"rows": rows}])[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere/model"], "neither a model folder"),
        (["meta-llama/Llama-3.1-8B", "--new-tokens", "1"], "two tokens or more"),
        (["meta-llama/Llama-3.1-8B", "--batch", "-1"], "batch 0 or more"),
        (["meta-llama/Llama-3.1-8B", "--filled"], "--batch 0"),
        (["meta-llama/Llama-3.1-8B", "--kv", "int4"], "bf16 and fp8"),
    ],
)
def test_bad_input_is_a_sentence(words, said, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "decode", *words])
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_fused_step_that_failed_is_not_measured_by_another_name(folder):
    runner = decode.ShardedRunner(AutoModelForCausalLM.from_pretrained(folder), fused=False)
    way = decode.Way("ultralong, sharded, fused", "bf16", 1, lambda *_: None, runner)
    timed = decode.Timed(1.0, 0.1, 0.0, torch.zeros(1, 2))
    row = decode._traffic(way, runner.model, torch.zeros(1, 9), timed, 1.0)
    assert row == {"note": "the fused step failed, and the model's own code was measured"}


def test_the_models_own_code_can_be_left_out(folder, capsys):
    with pytest.raises(ValueError, match="leave out --fused-only"):
        bench_decode(DecodeBench(folder, (20,), 0, new_tokens=3, filled=True, fused_only=True))

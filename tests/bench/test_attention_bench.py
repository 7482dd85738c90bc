"""The attention bench: its counting, its options, and a small run on this machine."""

import json
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ultralong import cli
from ultralong.attention import make_attention_context
from ultralong.bench.attention import measure as measuring
from ultralong.bench.attention.accuracy import exact_row, relative_errors
from ultralong.bench.attention.measure import SCHEMES, AttentionBench, bench_attention, documents
from ultralong.bench.attention.peers import PEERS
from ultralong.bench.attention.timing import causal_flops, measure_passes
from ultralong.utils.local_ranks import run_ranks


def test_useful_work_is_causal_and_counts_documents_one_by_one():
    """Llama-3.1-8B at 1,048,576 tokens: attention forward is 9.0e15 a layer, 2 n^2 H D."""
    assert causal_flops(2**20, 32, 128) == 3.5 * 2 * 2**40 * 4096
    assert causal_flops(2**20, 32, 128) / 3.5 == pytest.approx(9.0e15, rel=1e-2)
    assert causal_flops(10, 2, 4, (0, 3, 10)) == 3.5 * 2 * 2 * 4 * (9 + 49)


@pytest.mark.parametrize("tokens", [256, 131072])
def test_documents_are_of_mixed_length_and_the_same_each_time(tokens):
    edges = documents(tokens, 32)
    assert edges == documents(tokens, 32)
    assert (edges[0], edges[-1]) == (0, tokens)
    lengths = [b - a for a, b in pairwise(edges)]
    assert min(lengths) > 0
    assert max(lengths) > 20 * min(lengths)
    assert tokens < 1000 or len(lengths) == 32


def test_options_come_from_the_command_line(monkeypatch):
    asked = []
    monkeypatch.setattr(measuring, "bench_attention", lambda options, path: asked.append((options, path)) or [])
    words = [
        "--schemes",
        "all",
        "--kernels",
        "auto",
        "cudnn",
        "flash",
        "--peers",
        "--json",
        "out.json",
        "--budget",
        "8",
    ]
    for lengths in (["131072,524288"], ["128k", "512k"]):
        cli.main(["bench", "attention", "--lengths", *lengths, *words])
    expected = AttentionBench(kernels=("auto", "cudnn", "flash"), peers=True, budget=8.0)
    assert asked == [(expected, Path("out.json"))] * 2
    with pytest.raises(ValueError, match=r"schemes must be among all, .* found rings"):
        AttentionBench(schemes=("rings",))
    with pytest.raises(ValueError, match=r"one of auto, .* found 'fast'"):
        bench_attention(AttentionBench(kernels=("fast",)))


def test_errors_are_the_kernels_own():
    row = [torch.randn(1, 64, heads, 16, generator=torch.Generator().manual_seed(0)) for heads in (4, 2, 2, 4)]
    context = make_attention_context(64, heads=4, kv_heads=2, boundaries=(0, 20, 64))
    exact = exact_row(context, row)
    assert exact[0].dtype == torch.float64
    assert all(0 < error < 1e-6 for error in relative_errors(context, row, exact).values())
    exact[2] *= 1.01
    errors = relative_errors(context, row, exact)
    assert errors["dk"] == pytest.approx(0.01, rel=0.02)
    assert errors["dv"] < 1e-6


class Slow(torch.autograd.Function):
    """Takes the rank in its argument a while forward, and tells when it began and ended."""

    @staticmethod
    def forward(ctx, x, rank, events):
        ctx.events = events
        time.sleep(0.05 * (rank == 0))
        events.append(("forward ended", time.monotonic()))
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        ctx.events.append(("backward began", time.monotonic()))
        return dout, None, None


def passes(rank, _):
    events = []
    measure_passes(lambda x: Slow.apply(x, rank, events), [torch.ones(2)], torch.ones(2), repeats=1)
    return events


def test_no_ranks_backward_pass_begins_before_every_ranks_forward_pass_has_ended():
    """Else a rank waits for the others in what is timed as its backward pass."""
    for slow, fast in zip(*run_ranks(passes, 2), strict=True):
        if slow[0] == "forward ended":
            ended = slow[1]
        else:
            assert fast[1] > ended


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs at full size where there is a GPU")
def test_a_small_run_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "result.json"
    words = ["--lengths", "131072", "--repeats", "1", "--peers", "--check", "--check-length", "256"]
    cli.main(["bench", "attention", *words, "--json", str(path)])
    shown, saved = capsys.readouterr().out, json.loads(path.read_text())
    results = saved["rows"]
    assert {r["tokens"] for r in results} == {256, 2048}, "cut down to what a CPU can do"
    assert saved["machine"]["device"] == "cpu"
    assert saved["options"]["dtype"] == "float32"
    measured = [r for r in results if not r["note"]]
    assert {(r["name"], r["packed"]) for r in measured} == {(n, p) for n in ("single", *SCHEMES) for p in (True, False)}
    assert all(r["forward_ms"] > 0 and r["backward_ms"] > 0 for r in measured)
    checked = [r for r in measured if r["errors"]]
    assert checked == [r for r in measured if r["tokens"] == 256], "a longer row is not checked"
    assert all(max(r["errors"].values()) < 1e-6 for r in checked)
    assert {r["name"]: r["note"] for r in results if r["note"]} == dict.fromkeys(
        PEERS, "peers are measured on two CUDA GPUs or more"
    )
    for r in measured:
        edges = documents(r["tokens"], 8) if r["packed"] else None
        rate = causal_flops(r["tokens"], 8, 32, edges) / r["ranks"] / (r["forward_ms"] + r["backward_ms"]) / 1e9
        assert r["tflops"] == pytest.approx(rate, rel=0.05, abs=1e-3)
    assert "TF/s/GPU" in shown
    assert shown.count("relative error") == len(checked) == 2 * (1 + len(SCHEMES))

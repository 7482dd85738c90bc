"""The one cost model: what layouts are chosen with, and what the planner takes seconds from."""

import json
from pathlib import Path

import pytest
import torch

from ultralong.attention import make_attention_context
from ultralong.attention.cost_model import H200
from ultralong.attention.kernels.reference import Reference
from ultralong.planner import load_machine


def test_layouts_are_chosen_with_the_costs_that_were_measured():
    """In query-key pairs of one layer; every layout and scheme that is chosen rests on these three."""
    assert (H200.pairs_per_token, H200.pairs_per_call, H200.pairs_per_exchange) == (1000, 500_000, 5_000_000)


def test_the_planners_machine_is_the_one_that_layouts_are_chosen_for():
    machine = load_machine("h200")
    assert machine.costs == H200
    assert machine.name == H200.hardware
    forward, backward = machine.attention_rates("flash4", 128, 131_072)
    both = 3.5 / (1 / forward + 2.5 / backward)
    assert pytest.approx(both, rel=0.05) == H200.attention


def test_attentions_rates_are_those_of_the_files_they_name():
    """One GPU, whole rows: FLOP of the causal half, 2.5 times as many backward as forward."""
    root = Path(__file__).resolve().parents[2]
    rates = json.loads((root / "ultralong/planner/machines/h200.json").read_text())["rates"]["attention"]
    named = [rate for rate in rates if "recorded_in" in rate]
    assert {(rate["kernel"], rate["tokens"]) for rate in named} >= {("flash4", 8192), ("flash4", 131_072)}
    for rate in named:
        recorded = json.loads((root / rate["recorded_in"]).read_text())
        wanted, options = ("single", rate["kernel"], rate["tokens"], False), recorded["options"]
        (row,) = (
            row for row in recorded["results"] if (row["name"], row["kernel"], row["tokens"], row["packed"]) == wanted
        )
        assert options["head_size"] == rate["head_size"]
        forward = 2 * rate["tokens"] ** 2 * options["heads"] * options["head_size"]
        assert rate["forward_tflops"] == pytest.approx(forward / row["forward_ms"] / 1e9, abs=0.06)
        assert rate["backward_tflops"] == pytest.approx(2.5 * forward / row["backward_ms"] / 1e9, abs=0.06)


class Counting(Reference):
    """A kernel that is none of those with names."""

    name = "counting"
    calls = 0

    def forward(self, q, k, v, spec):
        self.calls += 1
        return super().forward(q, k, v, spec)


def test_a_kernel_of_ones_own_is_used_as_it_is():
    kernel, (q, k, v) = Counting(), torch.randn(3, 1, 16, 2, 8)
    context = make_attention_context(16, kernel=kernel, heads=2)
    expected = make_attention_context(16, kernel="reference", heads=2).attend(q, k, v)
    assert torch.equal(context.attend(q, k, v), expected)
    assert kernel.calls == 1
    assert context.kernels_used == ("counting",)
    with pytest.raises(ValueError, match="kernel 'counting' can't compute this attention: it takes floating types"):
        context._scheme(torch.zeros(1, 16, 2, 8, dtype=torch.int64), context.scheme_and_spec(q, k, v)[1])

"""The one cost model: what layouts are chosen with, and what the planner takes seconds from."""

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

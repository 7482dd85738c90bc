"""Prompts are sized by arithmetic: full, never too long, in few tries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultralong.evaluation.tasks.fit_length import ENOUGH, Line, fit, learn_line


class Maker:
    """A prompt whose tokens grow with its size, unevenly; counts how often one is made."""

    def __init__(self, base, cost, bend=0.0):
        self.base, self.cost, self.bend, self.made = base, cost, bend, []

    def tokens(self, size):
        return int(self.base + self.cost * size * (1 + self.bend * size / (size + 1000)))

    def __call__(self, size):
        self.made.append(size)
        return size, self.tokens(size)


@given(base=st.integers(0, 400), cost=st.floats(0.4, 60), bend=st.floats(-0.3, 0.3), limit=st.integers(4096, 1 << 22))
def test_fits_and_fills(base, cost, bend, limit):
    maker = Maker(base, cost, bend)
    line = learn_line(maker.tokens, 5, 100)
    fitted = fit(maker, limit, 5, line)
    assert fitted.tokens <= limit
    assert fitted.tokens >= ENOUGH * limit or maker.tokens(fitted.size + 1) > limit
    # What matters for long prompts: each try makes and tokenises a whole one.
    assert len(maker.made) <= 6


def test_a_straight_line_needs_one_try():
    maker = Maker(200, 25.0)
    fit(maker, 1 << 20, 1, learn_line(maker.tokens, 1, 50))
    assert len(maker.made) == 1


def test_a_very_wrong_line_still_fits():
    for cost in (0.1, 1000.0):
        fitted = fit(Maker(100, 10.0), 100_000, 1, Line(0.0, cost))
        assert ENOUGH * 100_000 <= fitted.tokens <= 100_000


def test_coarse_units_give_the_largest_that_fits():
    fitted = fit(Maker(0, 300.0), 1000, 1, Line(0.0, 300.0))
    assert (fitted.size, fitted.tokens) == (3, 900)


def test_too_short_a_limit_is_named():
    with pytest.raises(ValueError, match=r"1,000 tokens are too few: the shortest prompt of this test takes 1,200"):
        fit(Maker(1000, 40.0), 1000, 5, Line(1000.0, 40.0))
    with pytest.raises(ValueError, match="does not count"):
        learn_line(lambda size: 0, 1, 10)

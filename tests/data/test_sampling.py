"""Sampling: the paper's rule within binomial error, budgets within one document, fate by seed and id alone."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultralong.data.read.documents import Document
from ultralong.data.select.length_rule import LengthCounts, LengthRule, sample, uniform


def texts(count: int, characters: int, name: str = "d") -> list[Document]:
    return [Document(f"{name}{i}", "x" * characters) for i in range(count)]


@pytest.mark.parametrize(("characters", "expected"), [(100, 0.1), (4095, 0.1), (4096, 1.0), (8192, 1.0), (8193, 2.3)])
def test_rates_within_binomial_error(characters, expected):
    rule, count, text = LengthRule(4096, 0.1, 8192, 2.3), 40_000, "x" * characters
    documents = (Document(f"d{i}", text) for i in range(count))
    got = len(list(sample(documents, rule=rule, characters_per_token=1.0, seed=3)))
    part = expected - math.floor(expected)
    deviation = math.sqrt(count * part * (1 - part))
    assert abs(got - count * expected) <= 4 * deviation


def test_copies_have_their_own_ids_and_share_their_text():
    taken = list(sample(texts(1, 10), rule=LengthRule(0, 1, 5, 3.0), characters_per_token=1.0))
    assert [document.id for document in taken] == ["d0", "d0#2", "d0#3"]
    assert taken[0].text is taken[2].text


@given(seed=st.integers(0, 100), order=st.permutations(range(30)), cut=st.integers(0, 30))
def test_fate_depends_on_seed_and_id_alone(seed, order, cut):
    rule = LengthRule(5, 0.5, 8, 1.5)
    documents = [Document(f"d{i}", "x" * (1 + i % 12)) for i in range(30)]
    whole = Counter(d.id for d in sample(documents, rule=rule, seed=seed, characters_per_token=1.0))
    shuffled = [documents[i] for i in order]
    parts = Counter(
        d.id
        for part in (shuffled[:cut], shuffled[cut:])
        for d in sample(part, rule=rule, seed=seed, characters_per_token=1.0)
    )
    assert whole == parts


def test_another_seed_takes_others():
    rule = LengthRule(100, 0.5, 100, 1.0)
    ids = [{d.id for d in sample(texts(200, 10), rule=rule, seed=seed)} for seed in (0, 1)]
    assert ids[0] != ids[1]
    assert 60 < len(ids[0] & ids[1]) + len(ids[0] - ids[1]) < 140


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    budget=st.integers(1, 600),
    copy=st.floats(1, 3, allow_nan=False),
)
def test_budgets_are_met_within_one_document(lengths, budget, copy):
    documents = [Document(f"d{i}", "x" * n) for i, n in enumerate(lengths)]
    rule = LengthRule(0, 1, 10, copy)
    everything = [len(d.text) for d in sample(documents, rule=rule, characters_per_token=1.0)]
    taken = [len(d.text) for d in sample(documents, rule=rule, characters_per_token=1.0, budget=budget)]
    assert taken == everything[: len(taken)]
    assert sum(taken[:-1]) < budget
    assert sum(taken) >= min(budget, sum(everything))


def test_a_budget_stops_the_reading():
    def endless():
        number = 0
        while True:
            yield Document(f"d{number}", "x" * 10)
            number += 1

    assert len(list(sample(endless(), budget=100, characters_per_token=1.0))) == 10


def test_lengths_before_and_after_are_counted():
    counts = LengthCounts()
    documents = texts(100, 1000, "short") + texts(10, 5000, "middle") + texts(10, 200_000, "long")
    list(sample(documents, rule=LengthRule(4096, 0.0, 8192, 2.0), characters_per_token=1.0, counts=counts))
    found = counts.as_json()
    assert found["edges"] == [4096, 8192, 32768, 131072]
    assert found["before"] == {"documents": [100, 10, 0, 0, 10], "tokens": [100_000, 50_000, 0, 0, 2_000_000]}
    assert found["after"] == {"documents": [0, 10, 0, 0, 20], "tokens": [0, 50_000, 0, 0, 4_000_000]}


def test_the_papers_rule_by_default():
    """Fu et al. 2024: below 4,096 tokens of 3.68 characters, one in ten."""
    rule = LengthRule()
    assert (rule.expected(4095), rule.expected(4096), rule.expected(100_000)) == (0.1, 1.0, 1.0)
    kept = list(sample(texts(1, math.ceil(4096 * 3.68)), rule=LengthRule(short_keep=0.0)))
    assert len(kept) == 1
    assert not list(sample(texts(1, math.floor(4095 * 3.68)), rule=LengthRule(short_keep=0.0)))


def test_uniform_is_uniform_and_fixed():
    values = [uniform(0, f"d{i}") for i in range(20_000)]
    assert all(0 <= value < 1 for value in values)
    assert max(abs(sum(v < q for v in values) / 20_000 - q) for q in (0.1, 0.25, 0.5, 0.9)) < 0.015
    # Written down: a change here would change every recipe's corpus.
    assert round(uniform(0, "a"), 6) == 0.897922


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"short_below": -1}, "short_below"),
        ({"short_below": 9000}, "short_below"),
        ({"short_keep": 1.1}, "short_keep"),
        ({"long_copies": -1.0}, "long_copies"),
    ],
)
def test_nonsense_rules_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        LengthRule(**wrong)


@pytest.mark.parametrize("wrong", [{"budget": 0}, {"characters_per_token": 0.0}])
def test_nonsense_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="positive"):
        list(sample(texts(1, 1), **wrong))

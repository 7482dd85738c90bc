"""Word lists whose order is computed, running text that never ends, made-up words."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultralong.evaluation.tasks import texts as sources
from ultralong.evaluation.tasks.texts import Essays, WordPairs, made_up_words, word_lists, word_pairs

names = st.text(st.sampled_from("ab-z '"), min_size=1, max_size=4)


@given(st.lists(names, min_size=1, max_size=12), st.lists(names, min_size=1, max_size=12))
def test_pairs_are_the_sorted_set_without_writing_it_out(adjectives, nouns):
    expected = sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
    pairs = WordPairs(adjectives, nouns)
    assert len(pairs) == len(expected)
    assert list(pairs) == expected


def test_pairs_end_where_a_list_ends():
    pairs = WordPairs(["red", "blue"], ["sea", "sky"])
    assert random.Random(3).choice(pairs) == random.Random(3).choice(["blue-sea", "blue-sky", "red-sea", "red-sky"])
    with pytest.raises(IndexError):
        pairs[4]


def test_made_up_words_differ_and_hold_no_other():
    words = made_up_words(50_000)
    assert len(set(words)) == 50_000
    assert {len(word) for word in words} == {6}
    with pytest.raises(ValueError, match="512,000"):
        made_up_words(512_001)


@given(st.integers(0, 400))
def test_running_text_counts_words_and_starts_again(words):
    texts = ["One two three. Four five six seven.", "Eight nine ten eleven twelve!"]
    sentences = Essays(texts, "test").sentences(words)
    whole = " ".join(texts).split()
    assert " ".join(sentences).split() == [whole[index % len(whole)] for index in range(words)]
    assert all(sentences)


def test_running_text_needs_text():
    with pytest.raises(ValueError, match="empty"):
        Essays([" ", ""], "test")


def test_the_published_lists_are_those_the_benchmark_draws_from():
    try:
        lists, pairs = word_lists(), word_pairs()
    except ValueError as error:
        pytest.skip(f"the word lists cannot be fetched here: {error}")
    assert (len(lists.nouns), len(lists.adjectives)) == (6782, 912)
    assert len(pairs) == 6_171_620
    assert len({*lists.nouns, *lists.adjectives, *lists.verbs}) == 8166


def test_packages_are_pinned():
    for package in (sources.WORD_LISTS, sources.ESSAYS, sources.SQUAD):
        assert len(package.sha256) == 64
        assert package.version in package.file

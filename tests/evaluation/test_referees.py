"""Samples against lm-eval's own generators, byte for byte: the same seed and size give the same prompt and answers.

Runs where `lm-eval[ruler]` is installed. lm-eval's inner functions draw from the global generators; ours take one.
"""

import random

import pytest

from ultralong.evaluation.tasks.ruler import NIAH
from ultralong.evaluation.tasks.ruler.counting import CODED_PREFIX, CodedBuilder
from ultralong.evaluation.tasks.ruler.niah import DEPTHS, NiahBuilder

NOISE_NAMES = {"noise": "repeat", "needle": "needle", "essay": "essay"}


def referee(module):
    return pytest.importorskip(f"lm_eval.tasks.ruler.{module}", exc_type=ImportError)


class Text:
    """A haystack whose sentences are given, so that the referee's sentence splitter is out of the comparison."""

    name = "given"

    def __init__(self, sentences):
        self.words = " ".join(sentences).split(" ")

    def sentences(self, words):
        return [f"{sentence}." for sentence in " ".join(self.words[:words]).rstrip(".").split(". ")]


@pytest.mark.parametrize("size", [25, 100, 500])
@pytest.mark.parametrize("task", list(NIAH))
def test_needle_prompts_are_byte_equal(task, size, monkeypatch):
    theirs, utils = referee("prepare_niah"), referee("niah_utils")
    kind = NIAH[task]
    text = Text([f"Sentence {number} of the text stands here." for number in range(400)])
    monkeypatch.setattr(
        theirs, "cached_sent_tokenize", lambda whole: [f"{sentence}." for sentence in whole.rstrip(".").split(". ")]
    )
    haystack = text.words if kind.haystack == "essay" else theirs.get_haystack(NOISE_NAMES[kind.haystack])
    for seed in (42, 7):
        random.seed(seed)
        expected, answers, query = theirs.generate_input_output(
            size,
            haystack,
            type_haystack=NOISE_NAMES[kind.haystack],
            num_needle_k=kind.key_count,
            type_needle_k=kind.keys,
            num_needle_v=kind.value_count,
            type_needle_v=kind.values,
            template=utils.TEMPLATE,
            num_needle_q=kind.query_count,
        )
        ours = NiahBuilder(kind, text).build(random.Random(seed), size, 0)
        assert ours.input == expected
        assert list(ours.outputs) == answers
        assert query in ours.answer_prefix


def test_depths_are_the_referees():
    assert [int(depth) for depth in referee("prepare_niah").DEPTHS] == list(DEPTHS)


@pytest.mark.parametrize(("length", "size"), [(4096, 1200), (16384, 5000)])
def test_coded_words_are_byte_equal(length, size, tiny_tokenizer):
    theirs = referee("fwe_utils")
    for seed in (42, 7):
        random.seed(seed)
        expected, answers, _ = theirs.generate_input_output(
            10**9, tiny_tokenizer, num_words=size, vocab_size=length // 50
        )
        ours = CodedBuilder(length // 50).build(random.Random(seed), size, 0)
        assert ours.input + ours.answer_prefix == expected
        assert list(ours.outputs) == answers
        assert ours.answer_prefix == CODED_PREFIX

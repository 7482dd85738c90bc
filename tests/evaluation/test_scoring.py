"""Scores equal the benchmarks' own formulas, written out again here, on answers made to be awkward."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultralong.evaluation.tasks import scoring

PIECES = [
    "France",
    "in the country of France",
    "paris",
    "7",
    "42",
    "0042",
    "3.5",
    "-7",
    " ",
    ", ",
    "\n",
    "\x07",
    ". ",
    "'",
    '"',
    "func_3(2)",
    "{",
    "}",
    "The answer is: ",
    "abc-def",
    "7.",
    "1,000",
]
answers = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
references = st.lists(
    st.sampled_from(["France", "paris", "7", "42", "abc-def", "in the country of France"]), min_size=1, max_size=4
)


def official_clean(text):
    return re.compile(r"[\x00-\x1f]").sub("\n", text.strip()).strip()


@given(answers, references)
def test_ruler_scores_equal_nvidias(answer, refs):
    predictions, groups = [official_clean(answer)], [refs]
    every = sum(
        sum(1.0 if r.lower() in p.lower() else 0.0 for r in ref) / len(ref)
        for p, ref in zip(predictions, groups, strict=True)
    ) / len(predictions)
    any_of = sum(
        max(1.0 if r.lower() in p.lower() else 0.0 for r in ref) for p, ref in zip(predictions, groups, strict=True)
    ) / len(predictions)
    assert scoring.match_all(answer, refs) == every
    assert scoring.match_part(answer, refs) == any_of


def test_part_counts_a_question_once_however_many_answers_it_has():
    refs = ["France", "in the country of France", "France Europe", "France"]
    assert scoring.match_part("It was in France, I think", refs) == 1.0
    assert scoring.match_all("It was in France, I think", refs) == 0.5


@given(answers, st.sampled_from(["7", "42", "0042", "1"]))
def test_integers_equal_the_official_code(answer, label):
    first = next((item for item in re.split("[^0-9]", answer) if item != ""), "")
    assert scoring.first_integer(answer, [label]) == float(first == label)

    text = answer.strip()
    for character in ["\n", ".", "`", "'", '"', ":"]:
        text = text.replace(character, " ")
    words = text.split()
    try:
        last = int(words[-1]) == int(label) if words else False
    except ValueError:
        last = False
    assert scoring.last_integer(answer, [label]) == float(last)


@given(answers, st.sampled_from(["7", "abc-def", "France"]))
def test_whole_words_equal_the_official_code(answer, label):
    text = answer
    for character in ["\n", ":", '"', "'", ".", ",", "?", "!", "{", "}"]:
        text = text.replace(character, " ")
    assert scoring.whole_word(answer, [label]) == float(label in text.split())


@pytest.mark.parametrize(
    ("answer", "label", "score"),
    [
        ("It is 42.", "42", 1),
        ("4 2", "42", 0),
        ("3.5", "3.5", 1),
        ("3.50", "3.5", 1),
        ("3", "3.5", 0),
        ("none", "3", 0),
        ("3.5", "3", 0),
        ("-7", "7", 1),
    ],
)
def test_first_number(answer, label, score):
    assert scoring.first_number(answer, [label]) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("[1, 4, 8]", 1.0),
        ("1 4 9", 2 / 3),
        ("", 0.0),
        ("1", 1 / 3),
        ("2, 4, 8", 0.0),
        ("1 4 8 5 5", 1.0),
    ],
)
def test_correct_prefix(answer, score):
    assert scoring.correct_prefix(answer, ["1", "4", "8"]) == pytest.approx(score)


def random_pairs(count, seed=0):
    draw = random.Random(seed)
    for _ in range(count):
        yield "".join(draw.choices(PIECES, k=draw.randint(0, 8))), draw.choices(["France", "paris", "7", "42"], k=3)


def test_match_all_equals_lm_evals():
    theirs = pytest.importorskip("lm_eval.tasks.ruler.common_utils", exc_type=ImportError)
    for answer, refs in random_pairs(500):
        assert scoring.match_all(answer, refs) == theirs.string_match_all(theirs.postprocess_pred([answer]), [refs])


def test_infinitebench_equals_lm_evals():
    theirs = pytest.importorskip("lm_eval.tasks.infinitebench.utils", exc_type=ImportError)
    for answer, refs in random_pairs(500):
        if "\x07" in answer or "\n" in answer:
            continue  # lm-eval cleans these first, the official code does not
        for function, score in (
            (theirs.process_results_int_match, scoring.first_integer),
            (theirs.process_results_kv, scoring.whole_word),
        ):
            values = function({"answer": refs[:1]}, [answer])
            assert score(answer, refs[:1]) == float(next(iter(values.values())))

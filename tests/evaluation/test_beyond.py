"""The families beyond the paper: facts that chain, and a needle without a literal match."""

import contextlib
import random
import re

import numpy as np
import pytest
from fact_solver import solve
from test_samples import prose

from ultralong.evaluation.measures.score import score_predictions
from ultralong.evaluation.tasks.babilong_style import (
    BABILONG_STYLE_TASKS,
    PEOPLE,
    PLACES,
    STORIES,
    StoryBuilder,
    only_named,
)
from ultralong.evaluation.tasks.nonliteral import NONLITERAL_TASKS, TABLES, TASK, name_alone
from ultralong.evaluation.tasks.samples import make_samples
from ultralong.evaluation.tasks.texts import Essays

HAYSTACK = prose()
IDLE = set(
    re.findall(
        r"\w+",
        """a an and the of in on to for so that is was were be been has have had do does not no
    nor who whom which when it its they them their he she his her as at by with from but or up only there this will
    would must can cannot""",
    )
)


def make(task, tokenizer, length=4096, samples=1, seed=0, **options):
    return list(make_samples(task, tokenizer, length, samples, seed, haystack=HAYSTACK, **options))


@pytest.mark.parametrize("task", sorted(BABILONG_STYLE_TASKS))
def test_reading_the_facts_in_order_scores_full_and_one_fact_alone_does_not(task, tokenizer_of_words):
    records = make(task, tokenizer_of_words, samples=60, seed=2)
    solved = [{**record, "prediction": f" The {solve(record['input'])}."} for record in records]
    assert score_predictions(task, solved).value == 100
    for guess in (PLACES[0], PEOPLE[0], "I do not know", " ".join((*PLACES, *PEOPLE))):
        assert score_predictions(task, [{**record, "prediction": guess} for record in records]).value < 30
    assert len({record["outputs"][0] for record in records}) >= 5, "no answer is likely by itself"


@pytest.mark.parametrize("name", sorted(STORIES))
def test_an_answer_needs_all_the_facts_it_is_said_to_rest_on(name):
    """Without one of them, the same reader comes to another answer or to none."""
    for seed in range(40):
        story = STORIES[name](random.Random(seed), PEOPLE)
        assert len(story.needed) == {"babilong_style_qa1": 1, "babilong_style_qa3": 3}.get(name, 2)
        ask = f" Question: {story.question} Answer with one word"
        assert solve(" ".join(story.lines) + ask) == story.answer
        for missing in story.needed:
            rest = " ".join(line for number, line in enumerate(story.lines) if number != missing)
            with contextlib.suppress(KeyError):
                assert solve(rest + ask) != story.answer


def test_facts_stand_in_order_where_they_are_said(tokenizer_of_words):
    builder = StoryBuilder(Essays(HAYSTACK, "test"), STORIES["babilong_style_qa3"])
    depths = []
    for seed in range(120):
        draft = builder.build(random.Random(seed), 3000, 0)
        assert list(draft.gold) == sorted(draft.gold)
        assert all(
            re.match(r"[A-Z]\w+ (took|picked|walked|went|hurried|made)", draft.input[place:]) for place in draft.gold
        )
        depths += [place / len(draft.input) for place in draft.gold]
    counts, _ = np.histogram(depths, bins=4, range=(0, 1))
    assert counts.min() > 0.1 * len(depths), "facts are needed from every quarter of the text"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("granary", True),
        (" The Granary.", True),
        ("It is in the granary. Then the orchard.", True),
        ("", False),
        ("the granary or the orchard", False),
        ("before the quarry it was in the granary", True),
        ("granaries", False),
        ("the quarry", False),
    ],
)
def test_an_answer_names_one_place_and_may_repeat_the_question(answer, right):
    assert only_named(answer, ["granary"], kind="places", named=["quarry"]) == right
    assert name_alone("Ottilie.", ["Ottilie"]) == 1
    assert name_alone("Ottilie or Isolde", ["Ottilie"]) == name_alone("nobody", ["Ottilie"]) == 0


def content_words(text):
    """Words that carry meaning, without common endings."""
    words = set(re.findall(r"[a-z]+", text.lower().replace("{name}", " ").replace("{asked}", " "))) - IDLE - {"context"}
    return {re.sub(r"(?:'s|ings?|ed|es|ers?|s|e)$", "", word) if len(word) > 4 else word for word in words}


@pytest.mark.parametrize("table", sorted(TABLES))
def test_needles_share_no_word_with_what_is_asked(table):
    assert len(TABLES[table]) >= 16
    for needle, asked in TABLES[table]:
        question = content_words(TASK.format(context="", asked=asked))
        assert needle.count("{name}") == 1
        assert not content_words(needle) & question, (needle, asked)
        for word in content_words(asked):
            assert len(word) < 4 or word not in needle.lower(), f"{word} stands inside a word of {needle!r}"
    questions = [asked for _, asked in TABLES[table]]
    assert len(set(questions)) == len(questions), "one answer a question"


@pytest.mark.parametrize("task", sorted(NONLITERAL_TASKS))
def test_the_needle_stands_once_at_an_even_depth(task, tokenizer_of_words):
    records = make(task, tokenizer_of_words, 2048, samples=60)
    for record in records:
        assert record["input"].count(record["outputs"][0]) == 1
        assert sum(name in record["input"] for name in PEOPLE) == 1
        assert abs(record["positions"][0] / record["length"] - record["depth"]) < 0.06
    counts, _ = np.histogram([record["depth"] for record in records], bins=5, range=(0, 1))
    assert set(counts.tolist()) <= {11, 12, 13}
    names = [{**record, "prediction": f" {record['outputs'][0]}"} for record in records]
    assert score_predictions(task, names).value == 100


def test_names_that_the_text_holds_are_not_hidden_in_it(tokenizer_of_words):
    text = ["Cosima and ottilie met. " + " ".join(PEOPLE[8:16]) + " came too. "] * 3 + HAYSTACK
    free = Essays(text, "test").without(PEOPLE)
    assert set(PEOPLE) - set(free) == {"Cosima", "Ottilie", *PEOPLE[8:16]}
    with pytest.raises(ValueError, match=r"nearly every name .* 0 are left"):
        Essays([" ".join(PEOPLE)], "test").without(PEOPLE)

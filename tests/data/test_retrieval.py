"""Practice in finding: every fact stands before what comes back to it, and no sentence is a test's."""

from __future__ import annotations

import hashlib
import inspect
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from ultralong.data.read.documents import Document
from ultralong.data.recipe.schema import load_recipe
from ultralong.data.recipe.sources import SourceReader
from ultralong.data.rows.packing import PackSettings, pack
from ultralong.data.select.retrieval import HANDED, SEVERAL, WORDINGS, Retrieval
from ultralong.data.tokens.tokenize import tokenize_corpus

LINES = ("The keeper wrote in his log.", "No ship had passed.", "The tide came in at dawn, cold and grey.")
TEXT = "".join(f"{LINES[(i * i + i // 7) % 3]} Night {i} fell.\n" for i in range(4000))
SETTINGS = Retrieval(shortest=4000, longest=40_000, spacing=800)


@pytest.fixture(scope="module")
def pieces():
    texts = [Document(f"book-{i}", TEXT[1000 * i :]) for i in range(4)]
    return list(SETTINGS.documents(texts, seed=3))


def pattern(sentence: str) -> re.Pattern[str]:
    """A sentence of a wording, its key and value as named groups."""
    text = re.escape(sentence)
    for name, of in (("key", "[A-Z][a-z]+ [A-Z][a-z]+"), ("value", r"\w+(?: [A-Z]\w+)?"), ("before", r"\w+ [A-Z]\w+")):
        text = text.replace(rf"\{{{name}\}}", f"(?P<{name}>{of})", 1)
    return re.compile(text)


def facts_of(piece: str) -> dict[str, list[tuple[int, str]]]:
    """Place and value of every fact, by question."""
    found: dict[str, list[tuple[int, str]]] = {}
    for wording in (*WORDINGS, SEVERAL, HANDED):
        for match in pattern(wording.fact).finditer(piece):
            asked = wording.question.format(key=match["key"])
            found.setdefault(asked, []).append((match.start(), match["value"]))
    for match in pattern(HANDED.again).finditer(piece):
        found[HANDED.question.format(key=match["key"])].append((match.start(), match["value"]))
    return found


def test_every_question_is_answered_by_what_stands_before_it(pieces):
    asked, several, chained = 0, 0, 0
    for piece in pieces:
        for question, told in facts_of(piece.text).items():
            place = piece.text.find(question)
            if place < 0:
                continue
            assert all(where < place for where, _ in told)
            values = [value for _, value in sorted(told)]
            behind = piece.text[place + len(question) : place + len(question) + 120]
            if pattern(HANDED.question).fullmatch(question):
                assert behind.lstrip('\nA:" ').startswith(f"With the clerk of {values[-1]}")
                chained += 1
            else:
                assert behind.lstrip('\nA:" ').startswith(", ".join(values))
                several += len(values) > 1
            asked += 1
    assert asked > 200
    assert several > 20
    assert chained > 10


def test_keys_have_as_many_values_as_wanted(pieces):
    texts = [Document("book", TEXT)]
    for settings, made, wanted in ((SETTINGS, pieces, (2, 4)), (replace(SETTINGS, values=(5, 8)), None, (5, 8))):
        counts = Counter()
        for piece in made or list(settings.documents(texts, seed=3)):
            keys = Counter(match["key"] for match in pattern(SEVERAL.fact).finditer(piece.text))
            counts.update(keys.values())
        assert (min(counts), max(counts)) == wanted


def test_recipes_of_before_make_the_same_pieces():
    """A setting that is new must not move the draws of those that were packed without it."""
    made = Retrieval(spacing=800).with_facts(TEXT, random.Random(5))
    assert hashlib.sha256(made.encode()).hexdigest()[:16] == "a7c293835f8d048f"


def test_what_is_told_again_stands_behind_its_fact_and_agrees(pieces):
    again = 0
    for piece in pieces:
        for wording in WORDINGS:
            told = {m["key"]: (m.start(), m["value"]) for m in pattern(wording.fact).finditer(piece.text)}
            for match in pattern(wording.again).finditer(piece.text):
                place, value = told[match["key"]]
                assert place < match.start()
                assert value == match["value"]
                again += 1
    assert again > 60


def test_the_text_itself_is_whole(pieces):
    """Without the lines put in and the questions, a piece is the text that it was cut from."""
    for piece in pieces:
        kept = [line for line in piece.text.splitlines() if "Night" in line]
        start = TEXT.index(kept[0] + "\n" + kept[1])
        assert TEXT[start:].startswith("\n".join(kept))


def test_lengths_cover_the_range(pieces):
    lengths = sorted(len(piece.text) for piece in pieces)
    assert lengths[0] < 8000
    assert lengths[-1] > 30_000


def test_a_piece_depends_on_its_document_alone(pieces):
    other = [Document("else", TEXT[:9000]), Document("book-2", TEXT[2000:])]
    again = [piece for piece in SETTINGS.documents(other, seed=3) if piece.id.startswith("book-2")]
    assert again == [piece for piece in pieces if piece.id.startswith("book-2")]
    assert list(SETTINGS.documents(other, seed=4)) != list(SETTINGS.documents(other, seed=3))


def grams(text: str, words: int) -> set[tuple[str, ...]]:
    tokens = re.findall(r"[a-z]+", text.lower())
    return {tuple(tokens[i : i + words]) for i in range(len(tokens) - words + 1)}


def test_no_wording_shares_four_words_with_a_test():
    """The sources of every test, and of the conversations that rehearse the needle, hold none of these sentences."""
    from ultralong.data.chat import synthetic_qa
    from ultralong.evaluation.tasks import babilong_style, haystack, infinitebench, needle, nonliteral, prompts, ruler
    from ultralong.evaluation.tasks.ruler import counting, niah, questions, tracking

    modules = (synthetic_qa, babilong_style, haystack, infinitebench, needle, nonliteral, prompts, ruler)
    sources = " ".join(inspect.getsource(module) for module in (*modules, counting, niah, questions, tracking))
    tests = grams(re.sub(r'"\s+"', "", sources), 4)
    assert ("one", "of", "the", "special") in tests  # the needle's own words are found
    for wording in (*WORDINGS, SEVERAL, HANDED):
        for sentence in (wording.fact, wording.again, wording.question):
            shared = grams(re.sub(r"\{\w+\}", " . ", sentence), 4) & tests
            assert not shared, f"{sentence!r} shares {shared} with a test"


def test_a_share_of_the_pieces_comes_from_all_over():
    whole = Retrieval(shortest=1000, longest=1500, spacing=500)
    some = Retrieval(shortest=1000, longest=1500, spacing=500, keep=0.3)
    book = [Document("book", TEXT)]
    every, kept = list(whole.documents(book, 0)), list(some.documents(book, 0))
    assert 0.15 * len(every) < len(kept) < 0.45 * len(every)
    numbers = [int(piece.id.rpartition("?")[2]) for piece in kept]
    assert min(numbers) < len(every) / 4
    assert max(numbers) > len(every) * 3 / 4


def test_another_draw_takes_the_same_texts_with_no_fact_twice(pieces):
    texts = [Document(f"book-{i}", TEXT[1000 * i :]) for i in range(4)]
    others = list(replace(SETTINGS, draw=1).documents(texts, seed=3))
    seen = {(asked, value) for piece in pieces for asked, found in facts_of(piece.text).items() for _, value in found}
    again = {(asked, value) for piece in others for asked, found in facts_of(piece.text).items() for _, value in found}
    assert len(seen) > 100
    assert len(seen & again) < 0.02 * len(seen), "invented names may meet, hardly ever with one value"
    assert [piece.text for piece in SETTINGS.documents(texts, seed=3)] == [piece.text for piece in pieces]


def test_reach_makes_every_distance_up_to_it_as_frequent():
    far = replace(SETTINGS, reach=30_000, inside=1.0, several=0.0, chained=0.0)
    piece = far.with_facts(TEXT[:60_000], random.Random(5))
    distances = [piece.find(asked) - told[0][0] for asked, told in facts_of(piece).items() if asked in piece]
    assert len(distances) > 30
    assert min(distances) > 0
    assert max(distances) < 36_000, "what is put in between lengthens a distance a little"
    assert 0.25 < sum(distance > 16_000 for distance in distances) / len(distances) < 0.75
    near = [place for place, _ in [told[0] for told in facts_of(piece).values()]]
    assert max(near) > 40_000, "facts stand all over the piece"


def test_the_recipe_for_rows_of_131072_asks_across_more_than_the_old_window():
    def shares(name):
        settings = next(source.retrieval for source in load_recipe(name).sources if source.retrieval)
        texts = [Document(f"book-{i}", TEXT * 8) for i in range(4)]
        made = list(settings.documents(texts, seed=0))
        told = [(piece.text, *item) for piece in made for item in facts_of(piece.text).items()]
        apart = [text.find(asked) - facts[0][0] for text, asked, facts in told if asked in text]
        assert len(apart) > 500
        assert min(apart) > 0
        return max(len(piece.text) for piece in made) / 4, sum(one > 4 * 32_768 for one in apart) / len(apart)

    (longest, far), (shorter, near) = map(shares, ("gutenberg-sotu-retrieval-128k", "gutenberg-sotu-retrieval"))
    assert shorter < 80_000 < 131_072 < longest, "tokens of the longest piece, at four characters a token"
    assert near < 0.2 < 0.4 < far


def test_a_row_asks_only_for_what_it_has_told_where_its_end_drops_the_rest(tmp_path, tiny_tokenizer):
    """A row that goes on with the rest of a piece asks for facts that its reader never saw, which teaches guessing."""
    settings = Retrieval(shortest=3000, longest=9000, spacing=600, inside=1.0, several=0.0, chained=0.0)
    pieces = list(settings.documents([Document(f"book-{i}", TEXT) for i in range(3)], seed=0))
    store = tokenize_corpus(iter(pieces), tiny_tokenizer, tmp_path / "store", quiet=True)

    def unseen(row_end):
        how = PackSettings(2000, mask_documents=True, row_end=row_end)
        rows = pack(store, tiny_tokenizer, tmp_path / row_end, how, quiet=True)
        asked = missing = 0
        for row in rows:
            for first, end in pairwise(row.boundaries):
                text = tiny_tokenizer.decode(row.input_ids[first:end])
                for wording in WORDINGS:
                    for question in pattern(wording.question).finditer(text):
                        fact = re.escape(wording.fact.split("{value}")[0].format(key=question["key"]))
                        asked += 1
                        missing += re.search(fact, text[: question.start()]) is None
        assert asked > 50
        return missing

    assert unseen("continue") > 10
    assert unseen("drop") == 0


@pytest.mark.parametrize(("size", "least"), [("16k", 60), ("72k", 300)])
def test_the_recipes_for_one_row_a_piece_ask_as_far_as_the_longest_prompt_does(size, least):
    """A piece of either is about a row: the longest prompts stand 79% of a row of 73,728 apart."""
    sources = load_recipe(f"gutenberg-sotu-retrieval-{size}").sources
    every = [source.retrieval for source in sources if source.retrieval and source.retrieval.reach]
    assert len({settings.draw for settings in every}) == len(every) > 1, "no fact twice"
    text = (TEXT * 8)[: every[0].longest]
    made = [every[0].with_facts(text, random.Random(seed)) for seed in range(3)]
    told = [(piece, *item) for piece in made for item in facts_of(piece).items()]
    apart = [piece.find(asked) - facts[0][0] for piece, asked, facts in told if asked in piece]
    assert len(apart) > least
    assert min(apart) > 0
    far = sum(one > 0.8 * len(made[0]) for one in apart) / len(apart)
    assert 0.15 < far < 0.25, "of distances that are drawn evenly, a fifth lies beyond four fifths"


@pytest.mark.parametrize(("size", "tokens"), [("16k", 16_384), ("32k", 32_768), ("72k", 73_728), ("128k", 131_072)])
def test_the_recipes_for_rows_of_one_length_cut_no_question_off_from_its_fact(size, tokens):
    recipe = load_recipe(f"gutenberg-sotu-retrieval-{size}")
    settings = [source.retrieval for source in recipe.sources if source.retrieval][-1]
    assert recipe.row_settings(tokens).row_end == "drop"
    assert settings.inside == 1, "what stands at the end of a piece is dropped with it"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"shortest": 10}, "shortest"),
        ({"reach": 0}, "reach"),
        ({"values": (1, 4)}, "values must rise from 2"),
        ({"values": (5, 4)}, "values must rise from 2"),
        ({"longest": 2000}, "longest"),
        ({"spacing": 10}, "spacing"),
        ({"asked": 1.5}, "asked"),
        ({"several": 0.8, "chained": 0.4}, "several and chained"),
    ],
)
def test_settings_without_sense_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Retrieval(**wrong)


def test_a_recipe_asks_for_it(tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "name: a\ndescription: b\nsources:\n- {name: book, license: x, path: book.txt,"
        " retrieval: {shortest: 4000, longest: 8000, spacing: 500}}\n"
    )
    recipe = load_recipe(file)
    made = list(SourceReader(recipe.sources[0], recipe, None, quiet=True).documents())
    assert len(made) > 10
    assert all(piece.source == "book" and "?" in piece.id for piece in made)
    with pytest.raises(ValueError, match="retrieval: it is for documents"):
        load_recipe(file, ("kind=chat",))


def test_names_and_values_vary():
    piece = SETTINGS.with_facts(TEXT[:30_000], random.Random(1))
    assert len(facts_of(piece)) > 20

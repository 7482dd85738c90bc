"""Decontamination: the hits are those of a plain search; what is cut or dropped is listed with the words it shares."""

from __future__ import annotations

import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultralong.cli import main
from ultralong.data.read.conversations import Conversation
from ultralong.data.read.documents import Document, ReadReport
from ultralong.data.recipe.build import pack_recipe
from ultralong.data.recipe.texts import read_documents
from ultralong.data.select.decontaminate import Decontaminate, OverlapFilter, TestSet, cut, read_tests
from ultralong.data.select.overlap import NgramIndex, spans_of, words_of
from ultralong.utils.files import read_jsonl

QUESTION = "If a train leaves at nine and the tide comes in at dawn, when does the keeper light his lamp?"


def plain_hits(text: str, items: list[str], most: int, least: int) -> set[tuple[int, int]]:
    """(start, words) of every gram that occurs, by comparing every window with every gram."""
    words = re.sub(r"[^\w\s]|_", "", text.lower()).split()
    found = set()
    for item in items:
        asked = re.sub(r"[^\w\s]|_", "", item.lower()).split()
        if len(asked) < least:
            continue
        size = min(most, len(asked))
        grams = {tuple(asked[i : i + size]) for i in range(len(asked) - size + 1)}
        found |= {(i, size) for i in range(len(words) - size + 1) if tuple(words[i : i + size]) in grams}
    return found


WORDS = st.lists(st.sampled_from(["a", "b,", "C", "d.", "--", "it's"]), max_size=25).map(" ".join)


@given(text=WORDS, items=st.lists(WORDS, min_size=1, max_size=4), most=st.integers(2, 5), least=st.integers(1, 2))
def test_hits_are_those_of_a_plain_search(text, items, most, least):
    expected = plain_hits(text, items, most, least)
    try:
        grams = NgramIndex((("t", str(n), item) for n, item in enumerate(items)), most, least)
    except ValueError:
        assert all(len(words_of(item)) < least for item in items)
        return
    assert {(hit.start, hit.words) for hit in grams.hits(text)} == expected


@given(text=st.text(max_size=60))
def test_spans_are_those_of_the_words(text):
    spans = spans_of(text)
    assert [w for a, b in spans for w in words_of(text[a:b])] == words_of(text)


def test_thirteen_words_in_a_row_and_no_fewer():
    grams = NgramIndex([("t", "q", QUESTION)])
    words = QUESTION.split()
    assert grams.hits("x " + " ".join(words[2:15]) + " y")[0].item == "q"
    assert grams.hits("IF A TRAIN - leaves at nine; and the tide (comes) in at dawn... when, does") != []
    assert grams.hits(" ".join([*words[2:14], "other", *words[15:]])) == []
    short = NgramIndex([("t", "eight", "one two three four five six seven eight"), ("t", "seven", "a b c d e f g")])
    assert [hit.words for hit in short.hits("so one two three four five six seven eight it is")] == [8]
    assert (short.items, short.too_short) == ({"t": 1}, {"t": 1})
    with pytest.raises(ValueError, match="nothing to look for"):
        NgramIndex([("t", "seven", "a b c d e f g")])


def test_many_texts_at_speed_and_without_false_hits():
    draw = random.Random(0)
    vocabulary = [f"w{n}" for n in range(50)]
    items = [("t", str(n), " ".join(draw.choices(vocabulary, k=20))) for n in range(200)]
    grams = NgramIndex(items)
    noise = " ".join(draw.choices(vocabulary, k=100_000))
    assert grams.hits(noise) == []
    planted = noise[:3000] + " " + items[7][2] + " " + noise[3000:]
    hits = grams.hits(planted)
    assert len(hits) == 20 - 13 + 1
    assert {hit.item for hit in hits} == {"7"}


def text_around(gram: str, before: int, after: int) -> str:
    return "p" * before + " " + gram + " " + "s" * after


@pytest.mark.parametrize(
    ("before", "after", "expected"), [(1000, 1000, [801, 801]), (1000, 300, [801]), (100, 398, []), (100, 399, [200])]
)
def test_cutting_takes_the_words_and_two_hundred_characters(before, after, expected):
    grams = NgramIndex([("t", "q", QUESTION)])
    text = text_around(QUESTION, before, after)
    pieces = cut(text, grams.hits(text))
    assert [len(piece) for piece in pieces] == expected
    assert all(not grams.hits(piece) for piece in pieces)


def test_a_document_full_of_tests_is_dropped():
    grams = NgramIndex([("t", "q", QUESTION)])
    for times, left in ((9, 10), (10, 0)):
        text = ("x" * 900 + " " + QUESTION + " ") * times + "x" * 900
        assert len(cut(text, grams.hits(text))) == left


@pytest.fixture
def tests(tmp_path):
    (tmp_path / "math.jsonl").write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in [
                {"question": QUESTION, "answer": "#### 9", "choices": ["too short to count", "another one"]},
                {"question": "What is two and two and two and two and two and two and two less five?", "answer": "9"},
            ]
        )
    )
    (tmp_path / "book.txt").write_text("Only the keeper knew how many ships had passed that night without a sound.")
    return Decontaminate((TestSet("math", str(tmp_path / "math.jsonl")), TestSet("book", str(tmp_path / "book.txt"))))


def test_test_sets_are_files_and_a_broken_one_stops(tests, tmp_path):
    grams = read_tests(tests)
    assert (grams.items, grams.too_short) == ({"math": 2, "book": 1}, {"math": 4})
    with pytest.raises(ValueError, match=r"math\.jsonl:1 has no field 'prompt'"):
        read_tests(Decontaminate((TestSet("math", str(tmp_path / "math.jsonl"), fields=("prompt",)),)))
    (tmp_path / "math.jsonl").write_text("{broken")
    with pytest.raises(ValueError, match="not JSON"):
        read_tests(tests)
    with pytest.raises(ValueError, match="either path or packages"):
        TestSet("math")


def test_conversations_with_a_test_question_are_dropped_and_named(tests):
    def talk(number, question):
        return Conversation(
            f"t{number}", [{"role": "user", "content": question}, {"role": "assistant", "content": "At dawn."}]
        )

    report = ReadReport()
    clean = OverlapFilter(tests, read_tests(tests), report)
    kept = list(clean.conversations([talk(0, "Where?"), talk(1, "Tell me: " + QUESTION.upper()), talk(2, "When?")]))
    assert [talk.id for talk in kept] == ["t0", "t2"]
    assert report.skipped == {"overlaps with a test": 1}
    told = clean.overlap.as_json()
    assert (told["checked"], told["dropped"]) == (3, 1)
    assert told["tests"]["math"] == {"items": 2, "too_short": 4, "items_found": 1, "texts_hit": 1}
    assert told["tests"]["book"]["texts_hit"] == 0


@pytest.mark.parametrize("action", ["drop", "cut"])
def test_documents_of_a_recipe(tests, tmp_path, tiny_tokenizer, action):
    (tmp_path / "texts").mkdir()
    for number in range(8):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Text {number}. " + "The tide came in at dawn. " * 40)
    dirty = "The lamp was lit. " * 60 + QUESTION + " The ship went by. " * 60
    (tmp_path / "texts" / "dirty.txt").write_text(dirty)
    path = tmp_path / "mine.yaml"
    path.write_text(
        json.dumps(
            {
                "name": "mine",
                "description": "d",
                "sources": [{"name": "a", "license": "MIT", "path": "texts"}],
                "decontaminate": {"action": action, "against": [{"name": "math", "path": "math.jsonl"}]},
            }
        )
    )
    report = pack_recipe(path, tiny_tokenizer, 256, tmp_path / "rows", quiet=True)
    told = report.sources["a"]["decontaminated"]
    assert (told["checked"], told["dropped"], told["cut"]) == (9, *((1, 0) if action == "drop" else (0, 1)))
    ids = [document.id for document in read_documents(path)]
    assert [id for id in ids if "dirty" in id] == ([] if action == "drop" else ["a/dirty.txt!1", "a/dirty.txt!2"])
    listed = read_jsonl(tmp_path / "rows" / "contaminated.jsonl")
    assert [(entry["id"], entry["action"]) for entry in listed] == [
        ("a/dirty.txt", "dropped" if action == "drop" else "cut")
    ]
    assert listed[0]["shared"][0]["words"] in " ".join(words_of(QUESTION))
    grams = read_tests(tests)
    assert not any(grams.hits(document.text) for document in read_documents(path))
    again = pack_recipe(path, tiny_tokenizer, 256, tmp_path / "rows", quiet=True)
    assert again.sources == report.sources
    (tmp_path / "math.jsonl").write_text(json.dumps({"question": QUESTION + " And why?"}) + "\n")
    with pytest.raises(ValueError, match=r"provenance\."):
        pack_recipe(path, tiny_tokenizer, 256, tmp_path / "rows", quiet=True)


def test_a_recipe_of_conversations_keeps_its_report(tests, tmp_path, tiny_tokenizer):
    rows = [{"question": f"Where is {n}?", "answer": "There."} for n in range(20)] + [
        {"question": QUESTION, "answer": "At dawn."}
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "mine.yaml"
    path.write_text(
        json.dumps(
            {
                "name": "mine",
                "description": "d",
                "kind": "chat",
                "sources": [{"name": "a", "license": "MIT", "path": "talks.jsonl"}],
                "decontaminate": {"against": [{"name": "math", "path": "math.jsonl", "fields": ["question"]}]},
            }
        )
    )
    report = pack_recipe(path, tiny_tokenizer, 256, tmp_path / "rows", quiet=True)
    assert report.skipped == {"overlaps with a test": 1}
    assert report.sources["a"]["decontaminated"]["dropped"] == 1
    again = pack_recipe(path, tiny_tokenizer, 256, tmp_path / "rows", quiet=True)
    assert again.sources == report.sources
    (tmp_path / "rows" / "sources.json").unlink()
    assert pack_recipe(path, tiny_tokenizer, 256, tmp_path / "rows", quiet=True).sources == report.sources


def test_nothing_is_lost_without_overlap(tests):
    documents = [Document(f"d{n}", f"Text {n}. " * 50) for n in range(10)]
    clean = OverlapFilter(tests, read_tests(tests), ReadReport())
    assert list(clean.documents(documents)) == documents


@pytest.mark.parametrize(("wrong", "message"), [({"against": ()}, "at least one"), ({"shortest": 14}, "shortest")])
def test_nonsense_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Decontaminate(**{"against": (TestSet("a", "b"),), **wrong})


@pytest.mark.parametrize("kind", ["documents", "chat"])
def test_clean_files_by_command(tests, tmp_path, kind, capsys):
    lines = [{"question": f"Where is {n}?", "answer": "There."} for n in range(5)] + [
        {"question": QUESTION, "answer": "At dawn."}
    ]
    texts = [{"text": line["question"]} for line in lines]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (lines if kind == "chat" else texts)))
    path = tmp_path / "mine.yaml"
    path.write_text(
        json.dumps(
            {
                "name": "mine",
                "description": "d",
                "kind": kind,
                "sources": [{"name": "a", "license": "MIT", "path": "in.jsonl"}],
            }
        )
    )
    main(
        [
            "data",
            "decontaminate",
            str(path),
            "--against",
            str(tmp_path / "math.jsonl"),
            "--out",
            str(tmp_path / "clean"),
            "--quiet",
        ]
    )
    assert "a: 6 checked, 1 dropped" in capsys.readouterr().out
    kept = read_jsonl(tmp_path / "clean" / "clean.jsonl")
    assert [row["id"] for row in kept] == [f"a/in.jsonl:{n}" for n in range(1, 6)]
    assert [row["id"] for row in read_jsonl(tmp_path / "clean" / "contaminated.jsonl")] == ["a/in.jsonl:6"]

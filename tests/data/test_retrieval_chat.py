"""Conversations about long texts: answers are what the text tells, at any distance, and they alone are learned."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import pkgutil
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from ultralong.ablation.study import load_study
from ultralong.data.chat import retrieval_facts, synthetic_qa
from ultralong.data.chat.retrieval_chat import AHEAD, ALONE, BEHIND, COPY, OPENINGS, WHOLE, RetrievalChat
from ultralong.data.chat.retrieval_facts import DEBT, LOAD, NUMBERS, SINGLE, Facts, Names
from ultralong.data.read.documents import Document
from ultralong.data.recipe.build import pack_recipe
from ultralong.data.recipe.schema import load_recipe
from ultralong.data.recipe.sources import SourceReader
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.data.select.retrieval import ENDINGS, HANDED, SEVERAL, SYLLABLES
from ultralong.evaluation import tasks
from ultralong.evaluation.measures import needle

LINE = (
    "On night {i} the keeper of the light\nwrote that {n} ships had passed. He then slept until\nthe tide of day {i} "
    "came in cold. Nothing else is told about week {i} in any book.\n\n"
)
TEXT = "".join(LINE.format(i=i, n=i * i % 97) for i in range(9000))
TEXTS = [Document(f"book-{i}", TEXT[i * 200_000 : (i + 1) * 200_000], "book", "CC0-1.0") for i in range(7)]
SETTINGS = RetrievalChat(24_000, questions=(16, 32), spacing=(200, 2000))
NAME = r"[A-Z][a-z]+ [A-Z][a-z]+"


def measure(messages):
    return sum(len(message["content"]) for message in messages) // 4


@pytest.fixture(scope="module")
def talks():
    return [talk.messages for talk in SETTINGS.conversations(lambda: TEXTS, 3, measure, "long", "general")]


def pattern(sentence: str) -> re.Pattern[str]:
    text = re.escape(sentence)
    # Chains lead from place to place; a debt is taken over by the one that its sentence begins with.
    value = NAME if "clerk" in sentence or sentence.startswith("{value}") else r"\w+"
    for name, of in (("key", NAME), ("value", value), ("before", NAME)):
        text = text.replace(rf"\{{{name}\}}", f"(?P<{name}>{of})", 1)
    return re.compile(text)


def told(talk, wording):
    """Place, key and value of every fact of a wording, in the order of the text."""
    return [(m.start(), m["key"], m["value"]) for m in pattern(wording.fact).finditer(talk[0]["content"])]


def of_key(talk, wording, key):
    return [value for _, found, value in told(talk, wording) if found == key]


def followed(talk, sentence, start):
    """Where a chain goes from a start: each step stands behind the one before."""
    steps = [(m.start(), m["before"], m["value"]) for m in pattern(sentence).finditer(talk[0]["content"])]
    chain, place = [start], -1
    while step := next(((at, to) for at, a, to in steps if a == chain[-1] and at > place), None):
        place = step[0]
        chain.append(step[1])
    return chain


def solved(talk, asked):
    """(kind, bare answer, parts that a sentence must hold) of a question, found in the text alone."""
    text = talk[0]["content"]
    for before, behind in (part.split("{cue}") for part in COPY):
        if asked.startswith(before) or f" {before}" in asked:
            cue = asked.partition(before)[2].rpartition(behind)[0]
            plain = " ".join(text.removesuffix(asked).split())
            ahead = any(opening.format(question=f"{before}{cue}{behind}") in text for opening in AHEAD)
            assert plain.count(cue) == 1 + ahead
            return "copied", plain.rpartition(cue)[2].strip(), []
    singles = [(m.start(), wording, m["key"]) for wording in SINGLE for m in pattern(wording.question).finditer(asked)]
    if singles:
        values = []
        for _, wording, key in sorted(singles, key=lambda item: item[0]):
            (value,) = of_key(talk, wording, key)
            values.append(value)
        return ("joint" if len(values) > 1 else "single"), ", ".join(values), values
    if m := pattern(SEVERAL.question).search(asked):
        values = of_key(talk, SEVERAL, m["key"])
        return "several", ", ".join(values), values
    if m := re.search(f"How many boats are moored at ({NAME})", asked):
        count = len(of_key(talk, SEVERAL, m[1]))
        return "counted", str(count), [NUMBERS[count].capitalize()]
    if m := re.search(f"rolled through ({NAME})", asked):
        (a, x), (b, y), (c, z), (_, w) = Counter(of_key(talk, LOAD, m[1])).most_common(4)
        assert x > y > z > w
        wanted = [a, b, c] if "three loads" in asked else [a]
        return "counted", ", ".join(wanted), wanted
    if m := re.search(r"owed the debt of (\d+) crowns", asked):
        (first,) = [key for _, key, value in told(talk, DEBT) if value == m[1]]
        chain = followed(talk, DEBT.again, first)
        return "chained", ", ".join(chain), chain
    m = re.search(f"the seal of ({NAME})", asked)
    (first,) = of_key(talk, HANDED, m[1])
    chain = followed(talk, HANDED.again.replace("{key}", m[1]), first)
    wanted = chain if "in order" in asked else chain[-1:]
    return "chained", ", ".join(wanted), wanted


def test_every_answer_is_what_the_text_tells(talks):
    kinds: Counter[str] = Counter()
    for talk in talks:
        for asked, answer in zip(talk[::2], talk[1::2], strict=True):
            question = asked["content"].rpartition("\n\n")[2]
            kind, bare, parts = solved(talk, question)
            alone = any(question.endswith(how) for how in ALONE)
            if kind == "copied":
                assert bare.startswith(answer["content"] + " ")
                assert re.fullmatch(r"[^.!?]+[.!?]", answer["content"])
            elif alone:
                assert answer["content"] == bare
            else:
                assert re.search(".*".join(rf"\b{part}\b" for part in parts), answer["content"])
                assert answer["content"] != bare
            kinds[f"{kind} {alone}"] += 1
    assert all(
        kinds[f"{kind} {alone}"] > 3 for kind in ("joint", "several", "counted", "chained") for alone in (True, False)
    )
    assert kinds["single True"] > 20 < kinds["single False"]
    assert kinds["copied False"] > 20


def test_keys_have_as_many_values_as_wanted_and_answers_may_be_numbered_lists(talks):
    longer = replace(SETTINGS, near=0.0, several=0.5, values=(3, 8), numbered=0.5)
    made = [talk.messages for talk in longer.conversations(lambda: TEXTS, 3, measure, "long", "general")]
    counts: Counter[int] = Counter()
    numbered = 0
    for talk in made:
        for asked, answer in zip(talk[::2], talk[1::2], strict=True):
            if not (found := pattern(SEVERAL.question).search(asked["content"])):
                continue
            values = of_key(talk, SEVERAL, found["key"])
            counts[len(values)] += 1
            if answer["content"].startswith("1. "):
                assert answer["content"].splitlines() == [f"{n}. {value}" for n, value in enumerate(values, 1)]
                assert asked["content"].endswith("Name each."), "nothing else is asked for"
                numbered += 1
            else:
                assert re.search(".*".join(rf"\b{value}\b" for value in values), answer["content"])
    assert counts.keys() == set(range(3, 9))
    assert 0.35 < numbered / counts.total() < 0.65
    assert not any(message["content"].startswith("1. ") for talk in talks for message in talk), "not unless asked for"


def test_recipes_of_before_make_the_same_conversations():
    """A setting that is new must not move the draws of those that were packed without it."""
    made = SETTINGS.conversation(TEXT[:60_000], random.Random(5))
    assert hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16] == "49cd356a25c65f6b"


def test_conversations_fill_their_tokens_and_are_of_as_many_turns_as_wanted(talks):
    assert len(talks) > 8
    for talk in talks:
        assert 0.995 * SETTINGS.tokens < measure(talk) <= SETTINGS.tokens
        assert 16 <= len(talk) / 2 <= 32
        assert [message["role"] for message in talk] == ["user", "assistant"] * (len(talk) // 2)


@pytest.mark.parametrize("lines", [1, 30], ids=["one line a book", "a paragraph a line"])
def test_texts_of_long_lines_fill_conversations_too(lines):
    """Another place to cut than a line's end is needed where there are few."""
    short = RetrievalChat(9600, questions=(8, 16))
    plain = " ".join(TEXT[:90_000].split())
    step = -(-len(plain) // lines)
    text = "\n".join(plain[at : at + step] for at in range(0, len(plain), step))
    books = [Document(f"book-{i}", text, "book", "CC0-1.0") for i in range(4)]
    made = [talk.messages for talk in short.conversations(lambda: books, 3, measure, "long", "general")]
    assert len(made) > 7
    assert all(0.98 * 9600 < measure(talk) <= 9600 for talk in made), [measure(talk) for talk in made]


def test_texts_of_uneven_density_fill_conversations_too():
    """Prose, tables of spaces and lines of signs: one character makes a twelfth of a token or a whole one."""
    draw, short = random.Random(0), RetrievalChat(16_000, questions=(8, 16))
    kinds = (TEXT[:4000], f"{' ' * 40}x\n" * 90, "{}[];,." * 400, "A line without an end " * 150)
    texts = ["\n".join(draw.choice(kinds)[: draw.randrange(200, 4000)] for _ in range(80)) for _ in range(6)]
    books = [Document(f"book-{i}", text, "book", "CC0-1.0") for i, text in enumerate(texts)]

    def tokens(messages):
        return sum(len(re.findall(r"\w{1,4}|[^\w\s]|\s{8}", message["content"])) for message in messages)

    made = [talk.messages for talk in short.conversations(lambda: books, 3, tokens, "long", "general")]
    assert len(made) > 7
    assert all(0.95 * 16_000 < tokens(talk) <= 16_000 for talk in made)


def test_facts_asked_for_stand_at_every_depth(talks):
    depths = []
    for talk in talks:
        text = talk[0]["content"]
        asked = " ".join(message["content"].rpartition("\n\n")[2] for message in talk[::2])
        for wording in SINGLE:
            keys = {m["key"] for m in pattern(wording.question).finditer(asked)}
            depths += [place / len(text) for place, key, _ in told(talk, wording) if key in keys]
    assert len(depths) > 100
    shares = np.histogram(depths, bins=4, range=(0, 1))[0] / len(depths)
    assert shares.min() > 0.15, "a quarter of the window holds a quarter of what is asked for"


def test_facts_that_are_not_asked_for_are_there_to_be_mistaken(talks):
    facts = [sum(len(told(talk, wording)) for wording in SINGLE) for talk in talks]
    for talk in talks:
        asked = " ".join(message["content"].rpartition("\n\n")[2] for message in talk[::2])
        wanted = sum(len(pattern(wording.question).findall(asked)) for wording in SINGLE)
        assert sum(len(told(talk, wording)) for wording in SINGLE) > wanted
    assert max(facts) > 3 * min(facts), "texts differ in how close their facts stand"
    names = Names(random.Random(0))
    key = names.new()
    others = [names.near(key) for _ in range(20)]
    assert len({key, *others}) == 21
    for other in others:
        same = [a == b for a, b in zip(key.split(), other.split(), strict=True)]
        letters = sum(a != b for a, b in zip(key, other, strict=False))
        assert same == [True, False] or (same == [False, True] and letters == 1)


def test_half_of_the_texts_have_no_line_breaks_in_paragraphs_and_half_are_asked_about_in_front_too():
    made = [SETTINGS.conversation(TEXT[:60_000], random.Random(i))[0]["content"] for i in range(40)]
    flowing = sum("light wrote" in text for text in made)
    ahead = sum(any(text.find(opening.split("{")[0]) in range(200) for opening in AHEAD) for text in made)
    assert 8 < flowing < 32
    assert 8 < ahead < 32


def test_the_text_itself_is_whole():
    """Without what is put in, the text is what it was made from, in both layouts."""
    for draw in range(6):
        text = SETTINGS.conversation(TEXT[:30_000], random.Random(draw))[0]["content"]
        for sentence in ("wrote that 81 ships had passed.", "He then slept until"):
            assert " ".join(text.split()).count(sentence) >= TEXT[:30_000].count(sentence)
        for wording in (*SINGLE, SEVERAL, HANDED, DEBT, LOAD):
            text = pattern(wording.fact).sub("", text)
            text = pattern(wording.again).sub("", text) if wording in (HANDED, DEBT) else text
        words = text.split()
        start = next(i for i in range(len(words)) if words[i : i + 3] == ["On", "night", "0"])
        wanted = TEXT[:30_000].split()
        assert words[start : start + len(wanted)] == wanted


def test_a_text_without_sentences_is_asked_for_facts_alone():
    bare = RetrievalChat(24_000, questions=(8, 8), copied=1.0, near=0, joint=0, several=0, chained=0, counted=0)
    talk = bare.conversation("no sentence here\n" * 3000, random.Random(0))
    assert len(talk) == 16
    assert {solved(talk, message["content"].rpartition("\n\n")[2])[0] for message in talk[::2]} == {"single"}


def test_what_is_copied_is_a_sentence_and_no_data():
    """Six words of a thousand signs each would be most of what is learned."""
    line = "The table of day {i} says {data} and no more. It was kept dry until spring. "
    text = "".join(line.format(i=i, data="0x4f," * 400) for i in range(60))
    bare = RetrievalChat(24_000, questions=(8, 8), copied=1.0, near=0, joint=0, several=0, chained=0, counted=0)
    talk = bare.conversation(text, random.Random(0))
    assert max(len(message["content"]) for message in talk[1:]) < 1500


def test_a_count_takes_the_texts_again_with_other_facts():
    few = RetrievalChat(24_000, count=15)
    first = list(few.conversations(lambda: TEXTS, 0, measure, "long", "general"))
    assert [talk.id for talk in first] == [f"long/{i + 1}" for i in range(15)]
    assert len({talk.messages[0]["content"][:5000] for talk in first}) == 15
    facts = [set(told(talk.messages, wording)) for talk in first for wording in SINGLE]
    keys = [key for found in facts for _, key, _ in found]
    assert len(set(keys)) > 0.9 * len(keys)
    again = list(few.conversations(lambda: TEXTS, 0, measure, "long", "general"))
    assert again == first
    other = next(few.conversations(lambda: TEXTS, 1, measure, "long", "general"))
    assert other.messages != first[0].messages
    with pytest.raises(ValueError, match="do not fill 24,000 tokens"):
        list(few.conversations(lambda: [Document("short", TEXT[:9000], "book", "x")], 0, measure, "long", "general"))
    close = RetrievalChat(24_000, spacing=(100, 100))
    with pytest.raises(ValueError, match="facts at 100 characters"):  # at a token a character they alone are too long
        list(close.conversations(lambda: TEXTS, 0, lambda talk: 4 * measure(talk), "long", "general"))


def test_texts_that_fill_one_conversation_are_taken_again_where_a_skip_leaves_too_little():
    few = RetrievalChat(9600, questions=(8, 16), count=8)
    book = [Document("book", TEXT[:42_000], "book", "CC0-1.0")]
    made = list(few.conversations(lambda: book, 0, measure, "long", "general"))
    assert len(made) == 8
    assert len({talk.messages[0]["content"] for talk in made}) == 8


def grams(text: str, words: int) -> set[tuple[str, ...]]:
    tokens = re.findall(r"[a-z]+", text.lower())
    return {tuple(tokens[i : i + words]) for i in range(len(tokens) - words + 1)}


def test_no_wording_shares_four_words_with_a_test():
    modules = [
        pkgutil.resolve_name(module.name) for module in pkgutil.walk_packages(tasks.__path__, f"{tasks.__name__}.")
    ]
    sources = " ".join(inspect.getsource(module) for module in (*modules, needle, synthetic_qa))
    known = grams(re.sub(r'"\s+f?"', "", sources), 4)
    assert ("one", "of", "the", "special") in known
    assert len(modules) > 20
    said = [part for wording in (*SINGLE, DEBT, LOAD) for part in (wording.fact, wording.again, wording.question)]
    said += [*OPENINGS, *AHEAD, *BEHIND, *ALONE, *WHOLE, *COPY]
    said += re.findall(r'"([^"]*\{key\}[^"]*)"', inspect.getsource(retrieval_facts))
    assert len(said) > 50
    shared = {sentence: grams(re.sub(r"\{[^}]*\}", " . ", sentence), 4) & known for sentence in said}
    assert {sentence: found for sentence, found in shared.items() if found} == {}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"questions": (0, 3)}, "questions must rise from 1"),
        ({"questions": (9, 3)}, "questions must rise from 1"),
        ({"spacing": (10, 300)}, "spacing must rise from 100"),
        ({"tokens": 3000}, "tokens must be 400 for each of up to 24 questions, which is 9,600"),
        ({"near": -0.1}, "near is a share"),
        ({"numbered": 1.5}, "numbered is a share"),
        ({"values": (1, 4)}, "values must rise from 2"),
        ({"values": (5, 4)}, "values must rise from 2"),
        ({"near": 0.8, "joint": 0.4}, "must not exceed 1 together"),
        ({"count": 0}, "count must be 1 or more"),
    ],
)
def test_settings_without_sense_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        RetrievalChat(**{"tokens": 20_000, **wrong})


RECIPE = """
name: a
description: b
{kind}
sources:
- name: long
  license: CC0-1.0
  path: book.txt
  system: Be short.
  {key}: {{tokens: 8000, questions: [4, 8], spacing: [800, 2000], count: 3}}
"""


def test_a_recipe_packs_them_with_a_loss_on_answers_alone(tmp_path, tiny_tokenizer):
    (tmp_path / "book.txt").write_text(TEXT[:60_000])
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(kind="kind: chat", key="retrieval_chat"))
    report = pack_recipe(file, tiny_tokenizer, 8000, tmp_path / "rows", quiet=True)
    rows, recipe = PackedRows(tmp_path / "rows"), load_recipe(file)
    talks = list(SourceReader(recipe.sources[0], recipe, None, quiet=True).conversations(tiny_tokenizer))
    assert len(rows) == len(talks) == 3
    assert report.sources["long"]["licenses"].keys() == {"CC0-1.0"}
    wanted = {
        "".join(message["content"] for message in talk.messages if message["role"] == "assistant") for talk in talks
    }
    for row in rows:
        targets = np.asarray(row.labels)
        learned = [int(token) for token in targets if token >= 0]
        assert 10 < len(learned) < 1000
        text = tiny_tokenizer.decode(learned).replace("<|turn|>", "")
        assert text in wanted
        assert row.boundaries[1] > 0.95 * 8000, "the conversation fills the row"
        assert "Be short." in tiny_tokenizer.decode(row.input_ids[:60])


def test_a_recipe_of_the_wrong_kind_is_refused(tmp_path):
    (tmp_path / "book.txt").write_text(TEXT[:3000])
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(kind="kind: documents", key="retrieval_chat"))
    with pytest.raises(ValueError, match="retrieval_chat: it is for kind chat; long is of documents"):
        load_recipe(file)


def test_the_recipe_for_rows_of_131072_fills_them():
    recipe = load_recipe("retrieval-chat-128k")
    long, short = recipe.sources
    assert long.retrieval_chat.tokens == recipe.row_settings(131_072).length == 131_072
    assert short.retrieval_chat is None
    books = {
        package.name for source in load_recipe("gutenberg-sotu-retrieval-128k").sources for package in source.packages
    }
    assert {package.name for package in long.packages} < books
    assert long.packages[0].exclude == ("*/shakespeare-*.txt",), "tests are asked in the plays"


def test_the_recipe_of_longer_lists_is_the_same_otherwise():
    plain, lists = (load_recipe(name) for name in ("retrieval-chat-128k", "retrieval-chat-lists-128k"))
    (long, short), (of_lists, other) = plain.sources, lists.sources
    assert short == other
    assert of_lists.retrieval_chat == replace(long.retrieval_chat, values=(2, 8), numbered=0.5)
    assert replace(of_lists, retrieval_chat=long.retrieval_chat) == long
    assert replace(lists, name=plain.name, description=plain.description, sources=plain.sources) == plain


def test_the_recipe_for_rows_of_73728_has_its_row_and_nothing_else_but_more_questions():
    plain, shorter = (load_recipe(name) for name in ("retrieval-chat-128k", "retrieval-chat-72k"))
    (long, _), (of_shorter, _) = plain.sources, shorter.sources
    assert of_shorter.retrieval_chat.tokens == shorter.row_settings(73_728).length == 73_728
    assert of_shorter.retrieval_chat.questions == (48, 96)
    assert replace(of_shorter, retrieval_chat=long.retrieval_chat) == long
    (arm,) = (arm for arm in load_study("smollm2-135m-64k-longer").arms if arm.name == "chat-answers")
    steps = arm.changes["sft"]["training"]["steps"]
    short = 3  # rows of short conversations, as they were packed with SmolLM2's tokenizer
    assert of_shorter.retrieval_chat.count + short == steps, "a step for each row"


def test_the_recipe_for_rows_of_16384_has_its_row_and_a_step_for_each_row():
    plain, shorter = (load_recipe(name) for name in ("retrieval-chat-128k", "retrieval-chat-16k"))
    (long, _), (of_shorter, _) = plain.sources, shorter.sources
    assert of_shorter.retrieval_chat.tokens == shorter.row_settings(16_384).length == 16_384
    assert replace(of_shorter, retrieval_chat=long.retrieval_chat) == long
    arms = {arm.name: arm for arm in load_study("tinyllama-1.1b-16k").arms}
    sft = arms["chat-answers"].changes["sft"]
    assert arms["chat-only"].changes["sft"] == sft
    short = 10  # rows of short conversations, as they were packed with TinyLlama's tokenizer
    assert of_shorter.retrieval_chat.count + short == sft["training"]["steps"] * 4, "four rows a step"


class FewDraws(random.Random):
    """Draws that end, where a loop would not."""

    left = 10_000

    def choice(self, of):
        self.left -= 1
        assert self.left, "no name is found"
        return super().choice(of)


def test_names_do_not_run_out():
    """A text of four million tokens can hold more facts than there are names of three syllables."""
    words = ["".join(word) for size in (2, 3) for word in itertools.product(SYLLABLES, repeat=size)]
    taken = {f"{word.capitalize()} {ending}" for word in words for ending in ENDINGS}
    assert len(taken) == 126_000
    names = Names(FewDraws(0), set(taken))
    assert len({names.new() for _ in range(50)} - taken) == 50


def test_facts_draw_every_kind():
    facts = Facts(random.Random(0), SINGLE, Names(random.Random(1)))
    for kind in retrieval_facts.KINDS:
        made = facts.ask(kind)
        assert made.kind == kind
        assert made.told
        assert made.question.endswith("?") or made.question.endswith(".")

"""Chat records: every public shape to one form; what is malformed is counted by kind, named, and costs nothing else."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ultralong.data.chat.pack import ChatSettings, encode_chat, pack_chat
from ultralong.data.chat.subsample import HashSample, Subsample
from ultralong.data.read.conversations import Conversation, PairFields, to_messages
from ultralong.data.recipe.build import pack_recipe
from ultralong.data.recipe.schema import load_recipe
from ultralong.data.recipe.texts import read_conversations, read_documents
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.data.select.length_rule import uniform
from ultralong.data.tokens.store import TokenStore
from ultralong.utils.files import read_json, read_jsonl

ASK, SAY = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ([ASK, SAY], [ASK, SAY]),
        ({"messages": [SYSTEM, ASK, SAY], "source": "x"}, [SYSTEM, ASK, SAY]),
        ({"messages": [ASK], "answer": "There."}, [ASK, SAY]),
        ({"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "There."}]}, [ASK, SAY]),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief.", "weight": None},
                    {"from": "human", "value": "Where?"},
                    {"from": "gpt", "value": "There.", "weight": 1},
                ]
            },
            [SYSTEM, ASK, SAY],
        ),
        ({"instruction": "Where?", "input": "", "output": "There.", "text": "all of it"}, [ASK, SAY]),
        (
            {"instruction": "Where", "input": "The key.", "response": "There."},
            [{"role": "user", "content": "Where\n\nThe key."}, SAY],
        ),
        ({"type": "GSM_Rephrased", "query": "Where?", "original_question": "W?", "response": "There."}, [ASK, SAY]),
        ({"question": "Where?", "answer": "There."}, [ASK, SAY]),
        ({"lang": "python", "problem": "Where?", "solution": "There."}, [ASK, SAY]),
        ({"system_prompt": "Be brief.", "question": "Where?", "response": "There."}, [SYSTEM, ASK, SAY]),
        ({"input": "Where?", "output": "There."}, [ASK, SAY]),
    ],
)
def test_every_shape_comes_to_the_same(record, expected):
    assert to_messages(record) == expected


def test_named_fields_and_named_styles():
    assert to_messages({"q": "Where?", "a": "There.", "messages": []}, pairs=PairFields("q", "a")) == [ASK, SAY]
    both = {"messages": [ASK, SAY], "instruction": "Other?", "output": "Other."}
    assert to_messages(both) == [ASK, SAY]
    assert to_messages(both, "pairs")[0]["content"] == "Other?"


TURN = {"from": "human", "value": "a"}
SAID = {"from": "gpt", "value": "b"}


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({}, "no known fields"),
        ({"instruction": "a"}, "no known fields"),
        (7, "no messages"),
        ({"messages": []}, "no messages"),
        ({"conversations": ["a"]}, "a turn is not an object"),
        ({"conversations": [{"value": "a"}]}, "missing or unknown role"),
        ({"conversations": [TURN, {"from": "narrator", "value": "b"}]}, "missing or unknown role"),
        ({"conversations": [TURN, {"from": "gpt", "value": None}]}, "missing content"),
        ({"conversations": [TURN, {"from": "gpt", "value": " "}]}, "empty answer"),
        ({"conversations": [TURN]}, "no answer"),
        ({"messages": [SAY]}, "no question"),
        ({"question": " ", "answer": "b"}, "no question"),
        ({"question": "a", "answer": None}, "missing content"),
        ({"question": "a", "answer": ""}, "empty answer"),
        ({"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]}, "empty question"),
        ({"conversations": [{"from": "human", "value": " \n"}, {"from": "gpt", "value": "a"}]}, "empty question"),
        ({"conversations": [TURN, SAID, {"from": "human", "value": ""}, SAID]}, "empty question"),
        ({"question": "a\ud800", "answer": "b"}, "not valid Unicode"),
    ],
)
def test_what_is_malformed_has_a_short_name(record, kind):
    with pytest.raises(ValueError, match=f"^{kind}$"):
        to_messages(record)


def recipe(tmp_path, lines: list[bytes], **changes):
    (tmp_path / "talks.jsonl").write_bytes(b"\n".join(lines))
    source = {"name": "a", "license": "MIT", "path": "talks.jsonl", "read": {"id_field": "id"}, **changes}
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({"name": "mine", "description": "d", "kind": "chat", "sources": [source]}))
    return path


def line(number: int, answer: str = "There.", **more) -> bytes:
    return json.dumps({"id": f"t{number}", "question": f"Where is {number}?", "answer": answer, **more}).encode()


def bad_lines() -> list[bytes]:
    broken = [
        b'{"id": "x", "question": ',
        b"[1, 2]",
        b'{"id": "x"}',
        line(90, ""),
        b'{"id": "x", "messages": [{"content": "a"}]}',
        '{"id": "x", "question": "Köln", "answer": "b"}'.encode("latin-1"),
        b'{"id": "x", "question": "a\\ud800", "answer": "b"}',
        line(91, "y " * 5_000_000),
    ]
    return [*map(line, range(5)), *broken, *map(line, range(3, 8))]


def test_malformed_records_are_counted_named_and_cost_nothing_else(tmp_path, tiny_tokenizer):
    lines = bad_lines()
    path = recipe(tmp_path, lines)
    report = pack_recipe(path, tiny_tokenizer, 256, tmp_path / "rows", quiet=True)
    assert report.skipped == {
        "not JSON": 1,
        "not an object": 2,
        "no known fields": 1,
        "empty answer": 1,
        "missing or unknown role": 1,
        "not UTF-8": 1,
        "not valid Unicode": 1,
        "longer than 256 tokens by its characters alone": 1,
    }
    # A line with a list of two is two records, neither an object.
    assert report.counts["documents"] + sum(report.skipped.values()) == len(lines) + 1
    named = read_jsonl(tmp_path / "rows" / "left_out.jsonl")
    assert len(named) == sum(report.skipped.values()) + 2
    assert [entry["where"] for entry in named if entry["reason"] == "repeated id"] == ["a/t3", "a/t4"]
    assert next(e["where"] for e in named if e["reason"] == "not JSON") == "talks.jsonl:6"
    row = report.sources["a"]
    assert (row["documents"], row["licenses"]) == (10, {"MIT": row["tokens"]})
    assert row["target_tokens"] == report.counts["target_tokens"]
    assert sum(row["lengths"]["before"]["documents"]) == 11
    assert sum(row["lengths"]["after"]["documents"]) == 10
    assert [talk.messages[0]["content"] for talk in read_conversations(path)][-5:] == [
        f"Where is {n}?" for n in range(3, 8)
    ]


def test_an_answer_that_nobody_asked_for_is_left_off_and_noted(tmp_path, tiny_tokenizer):
    """A third of the ShareGPT package: pieces of conversations that begin in the middle."""
    opening = {"from": "gpt", "value": "As I said."}
    turns = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "There."}]
    system = {"from": "system", "value": "Be brief."}
    records = [[opening, *turns], [system, opening, opening, *turns], turns, [opening, turns[0]], [opening]]
    lines = [json.dumps({"id": f"c{n}", "conversations": record}).encode() for n, record in enumerate(records)]
    path = recipe(tmp_path, lines)
    roles = [[turn["role"] for turn in talk.messages] for talk in read_conversations(path)]
    assert roles == [["user", "assistant"], ["system", "user", "assistant"], ["user", "assistant"]]
    report = pack_recipe(path, tiny_tokenizer, 256, tmp_path / "rows", quiet=True)
    assert report.skipped == {"no answer": 1, "no question": 1}
    named = [
        entry["where"]
        for entry in read_jsonl(tmp_path / "rows" / "left_out.jsonl")
        if "before the first question" in entry["reason"]
    ]
    assert named == ["a/c0", "a/c1"]
    with pytest.raises(ValueError, match="begins with an answer"):
        encode_chat(tiny_tokenizer, [{"role": "assistant", "content": "As I said."}])


@pytest.mark.parametrize("budget", [1, 40, 400, 10_000])
def test_a_budget_is_met_within_one_conversation(tmp_path, tiny_tokenizer, budget):
    path = recipe(tmp_path, [line(n, "There. " * (1 + n % 7)) for n in range(60)])
    every = [sum(len(turn["content"]) for turn in talk.messages) / 3.68 for talk in read_conversations(path)]
    report = pack_recipe(path, tiny_tokenizer, 256, tmp_path / "rows", limit=budget, quiet=True)
    taken = report.counts["documents"]
    assert taken == 60 or sum(every[:taken]) >= budget
    assert sum(every[: taken - 1]) < budget
    assert taken + sum(report.skipped.values()) <= 60
    again = pack_recipe(path, tiny_tokenizer, 256, tmp_path / "rows", limit=budget, quiet=True)
    assert again.counts == report.counts


@pytest.mark.parametrize(
    ("bad", "message"),
    [(b"{broken", "not JSON"), (line(1, ""), "empty answer"), (b'{"messages": [{"content": "a"}]}', "role")],
)
def test_strict_stops(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        list(read_conversations(recipe(tmp_path, [line(0), bad], read={"strict": True})))


def test_documents_that_are_too_long_badly_encoded_or_named_twice(tmp_path):
    word = "tide" * 50  # one token, so that ten million characters take no time
    core = Tokenizer(models.WordLevel({"<unk>": 0, word: 1, "<": 2}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    long = f"{word}\n" * 50_000
    (tmp_path / "d.jsonl").write_bytes(
        b"\n".join(
            [
                json.dumps({"id": "long", "text": long}).encode(),
                b'{"id": "b", "text": "a\\ud800b"}',
                b'{"id": "same", "text": "one"}',
                b'{"id": "same", "text": "two"}',
                b'{"id": "same", "text": "two"}',
                b"{",
            ]
        )
    )
    (tmp_path / "mine.yaml").write_text(
        json.dumps(
            {
                "name": "mine",
                "description": "d",
                "sources": [{"name": "a", "license": "MIT", "path": "d.jsonl", "read": {"id_field": "id"}}],
            }
        )
    )
    report = pack_recipe(tmp_path / "mine.yaml", tokenizer, 4096, tmp_path / "rows", quiet=True)
    assert len(long) > 10_000_000
    read = report.sources["a"]["read"]
    assert (read["documents"], read["skipped"], read["noted"]) == (
        4,
        {"not JSON": 1, "not valid Unicode": 1},
        {"repeated id": 2},
    )
    assert [d.id for d in read_documents(tmp_path / "mine.yaml")] == ["a/long", "a/same", "a/same~2", "a/same~3"]
    store = TokenStore(tmp_path / "rows" / "tokens")
    assert store.length(0) == 50_000
    assert {*store[0].tolist()} == {1}
    strict = load_recipe(
        tmp_path / "mine.yaml",
        ("sources=[{name: a, license: MIT, path: d.jsonl, read: {id_field: text, strict: true}}]",),
    )
    with pytest.raises(ValueError, match="not valid Unicode"):
        list(read_documents(strict))


@given(
    total=st.integers(1, 500),
    seen=st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 1000), min_size=1),
    given_shares=st.booleans(),
)
def test_quotas_add_up_and_are_within_one_of_the_share(total, seen, given_shares):
    every = sum(seen.values())
    shares = {name: count / every for name, count in seen.items()}
    quotas = Subsample(total, shares if given_shares else None).quotas(seen)
    assert sum(quotas.values()) == total
    assert all(abs(quotas[name] - shares[name] * total) < 1 for name in seen)


TALKS = [
    Conversation(f"t{i}", [{"role": "user", "content": f"Where is {i}?"}, SAY], "s", "MIT", "abc"[i % 7 % 3])
    for i in range(300)
]


@given(order=st.permutations(range(60)), seed=st.integers(0, 50), total=st.integers(1, 40))
def test_the_choice_hangs_on_seed_and_id_alone(order, seed, total):
    shares = {"a": 0.5, "b": 0.25, "c": 0.25}
    chosen = HashSample(Subsample(total, shares), seed)
    for number, place in enumerate(order):
        talk = TALKS[place]
        if chosen.wanted(talk.id, talk.category):
            chosen.add(talk.id, talk.category, number, place)
    expected = set()
    for name, quota in Subsample(total, shares).quotas({}).items():
        ids = sorted(
            (place for place in range(60) if TALKS[place].category == name),
            key=lambda place: uniform(seed, TALKS[place].id),
        )
        expected |= {*ids[:quota]}
    taken = chosen.taken()
    assert {*taken} == expected
    assert [order.index(place) for place in taken] == sorted(order.index(place) for place in taken)


def test_rows_hold_the_sample_and_say_where_it_fell_short(tiny_tokenizer, tmp_path):
    rule = Subsample(100, {"a": 0.3, "b": 0.2, "c": 0.5})
    settings = ChatSettings(128, seed=4)
    rows = pack_chat(TALKS, tiny_tokenizer, tmp_path / "a", settings, subsample=rule, quiet=True)
    told = rows.manifest["subsampled"]
    seen = {name: sum(talk.category == name for talk in TALKS) for name in "abc"}
    assert {name: row["seen"] for name, row in told.items()} == seen
    assert {name: row["taken"] for name, row in told.items()} == {"a": 30, "b": 20, "c": 50}
    places = {int(d) for i in range(len(rows)) for d in rows[i].document_ids if d >= 0}
    assert len(places) == rows.manifest["documents"] == 100
    more = pack_chat(TALKS, tiny_tokenizer, tmp_path / "b", settings, subsample=Subsample(300, rule.shares), quiet=True)
    assert places <= {int(d) for i in range(len(more)) for d in more[i].document_ids}, "samples of one seed are nested"
    short = more.manifest["subsampled"]["c"]
    assert (short["wanted"], short["taken"]) == (150, seen["c"])


def test_what_cannot_be_encoded_does_not_take_a_place(tiny_tokenizer, tmp_path):
    talks = [
        *TALKS[:20],
        *(Conversation(f"x{i}", [ASK, {"role": "assistant", "content": "y " * 300}]) for i in range(20)),
    ]
    plain = [Conversation(t.id, t.messages) for t in talks]
    rows = pack_chat(plain, tiny_tokenizer, tmp_path, ChatSettings(128), subsample=Subsample(20), quiet=True)
    assert rows.manifest["documents"] == 20
    assert {int(d) for i in range(len(rows)) for d in rows[i].document_ids if d >= 0} == {*range(20)}


def test_a_recipe_of_categories(tmp_path, tiny_tokenizer):
    for name, count in (("math", 40), ("code", 10)):
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(line(i) for i in range(count)))
    values = {
        "name": "mine",
        "description": "d",
        "kind": "chat",
        "subsample": {"total": 20},
        "sources": [
            {"name": name, "license": "MIT", "path": f"{name}.jsonl", "category": name} for name in ("math", "code")
        ],
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(values))
    report = pack_recipe(tmp_path / "mine.yaml", tiny_tokenizer, 256, tmp_path / "rows", quiet=True)
    assert {name: row["taken"] for name, row in report.subsampled.items()} == {"math": 16, "code": 4}
    assert report.sources["code"]["documents"] == 4
    assert "taken: code 4 of 10, math 16 of 40" in str(report)
    assert read_json(tmp_path / "rows" / "report.json")["subsampled"] == report.subsampled
    again = pack_recipe(tmp_path / "mine.yaml", tiny_tokenizer, 256, tmp_path / "rows", quiet=True)
    assert again.sources == report.sources
    assert len(PackedRows(tmp_path / "rows")) == report.rows
    values["subsample"]["shares"] = {"math": 1.0}
    (tmp_path / "mine.yaml").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="code is missing"):
        load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"total": 0}, "total"),
        ({"total": 5, "shares": {"a": 0.5}}, "add up to 1"),
        ({"total": 5, "shares": {"a": 1.5, "b": -0.5}}, "0 or more"),
    ],
)
def test_nonsense_samples_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Subsample(**wrong)


def test_masks_do_not_depend_on_the_shape(tiny_tokenizer):
    talk = to_messages({"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "There."}]})
    assert encode_chat(tiny_tokenizer, talk) == encode_chat(tiny_tokenizer, [ASK, SAY])


def test_a_json_list_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path):
    rows = [{"id": f"t{n}", "question": f"Where is {n}, in Köln?", "answer": "There."} for n in range(5)]
    whole = json.dumps(rows, ensure_ascii=False, indent=1).encode()
    places = {whole.index(b'"t4"'): 4, whole.index("ö".encode()) + 1: 0, len(whole) - 2: 5, 0: 0}
    for place, count in places.items():
        (tmp_path / "talks.json").write_bytes(whole[:place])
        path = tmp_path / "mine.yaml"
        path.write_text(
            json.dumps(
                {
                    "name": "mine",
                    "description": "d",
                    "kind": "chat",
                    "sources": [{"name": "a", "license": "MIT", "path": "talks.json"}],
                }
            )
        )
        assert len(list(read_conversations(path))) == count

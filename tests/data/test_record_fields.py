"""Fields of chat records: used, or counted and listed; nothing that changes the meaning of the rest vanishes."""

from __future__ import annotations

import json
import math

import pytest

from ultralong.data.chat.refine import INSTRUCTION, prompt
from ultralong.data.read.conversations import PairFields, to_messages
from ultralong.data.read.readers import RecordReader
from ultralong.data.recipe.build import pack_recipe
from ultralong.data.recipe.clean_files import write_clean
from ultralong.data.recipe.schema import load_recipe
from ultralong.data.recipe.texts import read_conversations
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.data.select.decontaminate import Decontaminate, TestSet
from ultralong.utils.files import read_json, read_jsonl

ASK, SAY = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}
AGAIN, MORE = {"role": "user", "content": "And the other?"}, {"role": "assistant", "content": "Behind it."}
SYSTEM = {"role": "system", "content": "Be brief."}
UNLEARNED = {**SAY, "train": False}


@pytest.mark.parametrize("key", ["train", "weight", "loss", "loss_mask"])
@pytest.mark.parametrize("no", [0, False, 0.0])
def test_a_turn_that_is_not_to_be_learned_says_so_in_any_spelling(key, no):
    assert to_messages([ASK, {**SAY, key: no}, AGAIN, {**MORE, key: 1}]) == [ASK, UNLEARNED, AGAIN, MORE]
    assert to_messages({"messages": [ASK, {**SAY, key: True}, AGAIN, {**MORE, key: None}]}) == [ASK, SAY, AGAIN, MORE]
    share = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "There.", key: no}]
    with pytest.raises(ValueError, match=r"^no answer to be learned$"):
        to_messages({"conversations": share})


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([ASK, {**SAY, "weight": 0.5}], "a weight of a turn that is neither 0 nor 1"),
        ([ASK, {**SAY, "weight": "1"}], "a weight of a turn that is neither 0 nor 1"),
        ([ASK, {**SAY, "loss": [1, 0]}], "a weight of a turn that is neither 0 nor 1"),
        ([ASK, {**SAY, "weight": 0, "train": True}], "a turn that is learned and not learned"),
        ([{**ASK, "train": True}, SAY], "a loss on a turn that is not the assistant's"),
        ([ASK, {**SAY, "train_detail": [{"begin_offset": 0}]}], "holds a loss of its own for parts of a text"),
        ([ASK, {**SAY, "tool_calls": [{"function": {"name": "f"}}]}], "holds tool calls"),
        ([ASK, {**SAY, "function_call": {"name": "f"}}], "holds tool calls"),
        ([{**ASK, "images": ["a.png"]}, SAY], "holds images, sound or video"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, SAY],
            "a content that is not all text",
        ),
        ([{**ASK, "reasoning_content": "Hm."}, SAY], "reasoning in a turn that is not the assistant's"),
        ([ASK, {**SAY, "reasoning": ["Hm."]}], "reasoning that is no text, or two that differ"),
        ([ASK, {**SAY, "reasoning": "Hm.", "thinking": "Ah."}], "reasoning that is no text, or two that differ"),
    ],
)
def test_what_a_turn_cannot_be_packed_with_is_a_reason(turns, reason):
    for record in (turns, {"messages": turns}):
        with pytest.raises(ValueError, match=f"^{reason}$"):
            to_messages(record)


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ({"tools": '[{"name": "f"}]'}, "holds tools"),
        ({"functions": [{"name": "f"}]}, "holds tools"),
        ({"images": ["a.png"]}, "holds images, sound or video"),
        ({"video": "a.mp4"}, "holds images, sound or video"),
        ({"audios": ["a.wav"]}, "holds images, sound or video"),
        ({"documents": [{"text": "x"}]}, "holds documents beside the conversation"),
        ({"train": False}, "says that it is not learned"),
        ({"loss": 0}, "says that it is not learned"),
        ({"weight": 0.3}, "a weight of a record that is not 1"),
        ({"system": "Rhyme.", "messages": [SYSTEM, ASK, SAY]}, "two system messages that differ"),
        ({"system": ["Rhyme."]}, "a system message that is no text"),
    ],
)
def test_what_a_record_cannot_be_packed_with_is_a_reason(field, reason):
    with pytest.raises(ValueError, match=f"^{reason}$"):
        to_messages({"messages": [ASK, SAY], **field})
    if "messages" not in field and "system" not in field:
        with pytest.raises(ValueError, match=f"^{reason}$"):
            to_messages({"question": "Where?", "answer": "There.", **field})


@pytest.mark.parametrize("context", [["a passage", "another"], {"title": "It"}, 7])
@pytest.mark.parametrize("question", ["question", "instruction"])
def test_a_question_does_not_stand_without_its_context(context, question):
    with pytest.raises(ValueError, match=r"^a context that is no text$"):
        to_messages({question: "Where?", "context": context, "answer": "There."})


@pytest.mark.parametrize("nothing", [None, "", "[]", "{}", " ", [], {}, "null", float("nan")])
@pytest.mark.parametrize("key", ["tools", "images", "tool_calls", "documents", "functions"])
def test_a_field_that_holds_nothing_is_as_good_as_absent(nothing, key):
    assert to_messages({"messages": [ASK, SAY], key: nothing}) == [ASK, SAY]
    assert to_messages([ASK, {**SAY, key: nothing}]) == [ASK, SAY]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"system": "Be brief.", "messages": [ASK, SAY]}, [SYSTEM, ASK, SAY]),
        ({"system_prompt": "Be brief.", "conversations": [ASK, SAY]}, [SYSTEM, ASK, SAY]),
        ({"system": "Be brief.", "messages": [SYSTEM, ASK, SAY]}, [SYSTEM, ASK, SAY]),
        ({"system": " ", "messages": [ASK, SAY]}, [ASK, SAY]),
        (
            {"instruction": "And the other?", "output": "Behind it.", "history": [["Where?", "There."]]},
            [ASK, SAY, AGAIN, MORE],
        ),
        ({"question": "Where?", "answer": "There.", "history": []}, [ASK, SAY]),
        (
            {
                "system": "Be brief.",
                "query": "And the other?",
                "response": "Behind it.",
                "history": [("Where?", "There.")],
            },
            [SYSTEM, ASK, SAY, AGAIN, MORE],
        ),
        ({"messages": [ASK, {**SAY, "reasoning_content": "Hm."}]}, [ASK, {**SAY, "reasoning_content": "Hm."}]),
        ({"messages": [ASK, {**SAY, "thinking": "Hm."}]}, [ASK, {**SAY, "reasoning_content": "Hm."}]),
        ({"question": "Where?", "reasoning": "Hm.", "answer": "There."}, [ASK, {**SAY, "reasoning_content": "Hm."}]),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Whe"}, {"type": "text", "text": "re?"}]},
                    SAY,
                ]
            },
            [ASK, SAY],
        ),
        # Tables give every record all fields, null where it has none.
        (
            {"messages": None, "conversations": [{"from": None, "value": None, **ASK}, {"from": None, **SAY}]},
            [ASK, SAY],
        ),
        (
            {"conversations": [{"from": "human", "value": "Where?", "role": None}, {"from": "gpt", "value": "There."}]},
            [ASK, SAY],
        ),
        ({"instruction": None, "problem": "Where?", "output": None, "solution": "There.", "input": None}, [ASK, SAY]),
        ({"messages": [], "prompt": "Where?", "completion": "There."}, [ASK, SAY]),
        ({"instruction": "", "query": "Where?", "output": "", "response": "There."}, [ASK, SAY]),
        ({"messages": [ASK, SAY], "conversations": None, "question": None}, [ASK, SAY]),
        ({"messages": [ASK, SAY], "system": math.nan, "weight": math.nan}, [ASK, SAY]),
        ({"question": "Where?", "context": math.nan, "answer": "There.", "input": []}, [ASK, SAY]),
        ({"messages": [{**ASK, "weight": math.nan}, {**SAY, "thinking": math.nan}]}, [ASK, SAY]),
        ({"messages": [ASK, SAY], "system_message": SYSTEM["content"]}, [SYSTEM, ASK, SAY]),
    ],
)
def test_fields_that_change_the_meaning_are_used(record, expected):
    unused: set[str] = set()
    assert to_messages(record, unused=unused) == expected
    assert unused == set()


@pytest.mark.parametrize("history", ["earlier", [["only one"]], [["a", 1]], {"a": "b"}, ["ab"]])
def test_a_history_of_another_form_is_a_reason(history):
    with pytest.raises(ValueError, match="a history that is not pairs"):
        to_messages({"question": "Where?", "answer": "There.", "history": history})


@pytest.mark.parametrize(
    ("record", "names"),
    [
        (
            {"messages": [ASK, {**SAY, "name": "Ann", "channel": "final"}], "url": "u"},
            {"messages.name", "messages.channel", "url"},
        ),
        (
            {"conversations": [{"from": "human", "value": "a", "id": 1}, {"from": "gpt", "value": "b"}]},
            {"conversations.id"},
        ),
        ({"question": "Where?", "answer": "There.", "rationale": "r", "query": "q"}, {"rationale", "question"}),
        ({"messages": [ASK, SAY], "conversations": [ASK, MORE], "text": "t"}, {"conversations", "text"}),
    ],
)
def test_fields_that_are_not_used_are_named(record, names):
    unused: set[str] = set()
    to_messages(record, unused=unused)
    assert unused == names


def test_fields_that_a_recipe_names_are_all_that_it_wants():
    unused: set[str] = set()
    record = {"q": "Where?", "a": "There.", "reasoning": "Hm.", "question": "Other?"}
    assert to_messages(record, pairs=PairFields("q", "a"), unused=unused) == [ASK, SAY]
    assert unused == {"reasoning", "question"}


def recipe(tmp_path, records, **source):
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = {"name": "a", "license": "MIT", "path": "talks.jsonl", **source}
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({"name": "mine", "description": "d", "kind": "chat", "sources": [source]}))
    return path


def test_rows_hold_no_loss_where_a_record_wants_none_and_the_report_counts_the_rest(tmp_path, tiny_tokenizer):
    records = [
        {"messages": [ASK, {**SAY, "weight": 0}, AGAIN, MORE], "url": "u"},
        {"messages": [ASK, SAY], "tools": [{"name": "f"}]},
        {"messages": [ASK, SAY], "url": "v", "system": "Be brief."},
    ]
    path = recipe(tmp_path, records, read={"field": "messages"})
    report = pack_recipe(path, tiny_tokenizer, 128, tmp_path / "rows", quiet=True)
    assert report.skipped == {"holds tools": 1}
    assert report.unused_fields == {"url": 2}
    assert "url (2)" in str(report)
    assert [line["reason"] for line in read_jsonl(tmp_path / "rows" / "left_out.jsonl")] == ["holds tools"]
    row = PackedRows(tmp_path / "rows")[0]
    learned = tiny_tokenizer.decode([label for label in row.labels if label >= 0])
    assert learned.count("There.") == learned.count("Behind it.") == 1
    assert "Be brief." in tiny_tokenizer.decode(row.input_ids)
    again = pack_recipe(path, tiny_tokenizer, 128, tmp_path / "rows", quiet=True)
    assert (again.skipped, again.unused_fields) == (report.skipped, report.unused_fields)


def test_what_is_written_as_clean_keeps_what_is_not_learned(tmp_path):
    records = [
        {"messages": [ASK, {**SAY, "loss": False}, AGAIN, {**MORE, "thinking": "Hm."}]},
        {"messages": [ASK, SAY]},
    ]
    loaded = load_recipe(recipe(tmp_path, records))
    (tmp_path / "tests.txt").write_text("nothing of all this stands in any of the talks that are here at all")
    tests = Decontaminate((TestSet("t", str(tmp_path / "tests.txt")),))
    write_clean(loaded, tests, tmp_path / "clean", quiet=True)
    lines = read_jsonl(tmp_path / "clean" / "clean.jsonl")
    again = recipe(tmp_path, lines, read={"field": "messages", "id_field": "id"})
    talks = [talk.messages for talk in read_conversations(again, quiet=True)]
    assert talks == [[ASK, UNLEARNED, AGAIN, {**MORE, "reasoning_content": "Hm."}], [ASK, SAY]]
    assert read_json(tmp_path / "clean" / "report.json")["sources"]["a"]["checked"] == 2
    assert "Hm." not in prompt(INSTRUCTION, talks[0])[1]["content"]


@pytest.mark.parametrize("write", ["pylist", "ipc"])
def test_a_table_of_several_dialects_gives_each_record_what_it_holds(tmp_path, write):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [
        {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "There."}], "question": None},
        {"conversations": [ASK, SAY], "tools": None},
        {"question": "Where?", "answer": "There."},
        {"instruction": "Where?", "output": "There.", "history": []},
    ]
    turn_keys = ("from", "value", "role", "content", "weight")
    filled = [
        {
            **{key: record.get(key) for key in ("question", "answer", "instruction", "output", "tools")},
            "conversations": [{key: turn.get(key) for key in turn_keys} for turn in record.get("conversations") or []],
        }
        for record in records
    ]
    parquet.write_table(arrow.Table.from_pylist(filled), tmp_path / "t.parquet")
    rows = [row for _, row in RecordReader().rows([("t.parquet", tmp_path / "t.parquet")])]
    assert [to_messages(row) for row in rows] == [[ASK, SAY]] * 4

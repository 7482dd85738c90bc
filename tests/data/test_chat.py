"""Chat: the mask is the template's, token by token; nothing is guessed; rows hold whole examples."""

from __future__ import annotations

import pickle
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ultralong.data.chat import rendering
from ultralong.data.chat.pack import ChatSettings, encode_chat, pack_chat
from ultralong.data.chat.subsample import Subsample
from ultralong.data.read.conversations import Conversation
from ultralong.data.read.documents import ReadReport
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.utils.files import read_json

# The shapes of the templates in the field, reduced to what matters here: where a turn ends, and what follows it.
CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
REWRITING = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}think: {% endif %}"
    "{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)

TALK = [
    {"role": "system", "content": "Answer in short."},
    {"role": "user", "content": "Where is the key?"},
    {"role": "assistant", "content": "Under the stone."},
    {"role": "user", "content": "Which?"},
    {"role": "assistant", "content": "The third one."},
]


def with_template(tokenizer, template):
    copy = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301 - our own object
    copy.chat_template = template
    return copy


def learned(tokenizer, ids, mask):
    """The stretches of text under the mask."""
    edges = np.flatnonzero(np.diff([0, *mask, 0]))
    return [tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|end|>"), (MARKED, "<|end|>"), (None, "<|turn|>"), (INSTRUCT, "<|eos|>")]
)
def test_only_answers_and_their_end_are_learned(tiny_tokenizer, template, end):
    tokenizer = with_template(tiny_tokenizer, template or tiny_tokenizer.chat_template)
    ids, mask = encode_chat(tokenizer, TALK)
    assert ids == list(tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False))
    assert learned(tokenizer, ids, mask) == [f"Under the stone.{end}", f"The third one.{end}"]


TEXT = st.text(alphabet="abcdefg hij\n.", min_size=1, max_size=30).map(str.strip).filter(bool)


@given(turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), system=st.none() | TEXT)
def test_marks_and_prefixes_agree(tiny_tokenizer, turns, system):
    """The same template with and without generation marks: two independent ways, one mask."""
    talk = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        talk += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids, mask = encode_chat(with_template(tiny_tokenizer, MARKED), talk)
    other_ids, other_mask = encode_chat(with_template(tiny_tokenizer, CHATML), talk)
    assert ids == other_ids
    assert mask == other_mask


def test_a_template_that_rewrites_history_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        encode_chat(with_template(tiny_tokenizer, REWRITING), TALK)
    ids, mask = encode_chat(with_template(tiny_tokenizer, REWRITING), TALK[:3])
    assert learned(tiny_tokenizer, ids, mask) == ["think: Under the stone.<|end|>"]


@pytest.mark.parametrize("template", [REWRITING, CHATML])
def test_with_an_example_of_each_answer_a_rewriting_template_is_learned_as_used(tiny_tokenizer, tmp_path, template):
    """Every example is what the model reads when it is asked for that answer, followed by the answer; nothing else."""
    tokenizer, end = with_template(tiny_tokenizer, template), "<|end|>"
    unlearned = [*TALK[:2], TALK[2] | {"train": False}, *TALK[3:]]
    talks = [TALK, unlearned, TALK[:3]]
    settings = ChatSettings(256, shuffle=False, each_answer=True)
    rows = pack_chat(talks, tokenizer, tmp_path, settings, quiet=True)
    found = []
    for row in rows:
        ids, places = row.input_ids, row.boundaries.tolist()
        for document, start, stop in zip(row.document_ids.tolist(), places, places[1:], strict=False):
            if document >= 0:
                labels = row.labels[start : stop - 1]
                found.append((document, tokenizer.decode(ids[start:stop]), tokenizer.decode(labels[labels >= 0])))
    thought = "think: " if template == REWRITING else ""
    expected = []
    for number, places in enumerate([(2, 4), (4,), (2,)]):
        for place in places:
            asked = tokenizer.apply_chat_template(TALK[:place], tokenize=False, add_generation_prompt=True)
            answer = f"{thought}{TALK[place]['content']}{end}"
            expected.append((number, f"{asked}{answer}", answer))
    assert sorted((number, text.strip(), answer) for number, text, answer in found) == sorted(expected)


def test_each_answer_is_no_setting_of_rows_that_were_made_without_it(tiny_tokenizer, tmp_path):
    pack_chat([TALK], tiny_tokenizer, tmp_path, ChatSettings(256), quiet=True)
    assert "each_answer" not in read_json(tmp_path / "settings.json")
    with pytest.raises(ValueError, match="each_answer was nothing, now True"):
        pack_chat([TALK], tiny_tokenizer, tmp_path, ChatSettings(256, each_answer=True), quiet=True)


def test_of_a_conversation_that_is_too_long_the_answers_that_fit_are_kept(tiny_tokenizer, tmp_path):
    """And one of which no answer is learned is counted, as it is without the setting."""
    long = [*TALK, {"role": "user", "content": "x" * 10**6}, {"role": "assistant", "content": "No."}]
    none = [turn | {"train": False} if turn["role"] == "assistant" else turn for turn in TALK]
    for each, documents in ((True, 2), (False, 1)):
        report, out = ReadReport(), tmp_path / str(each)
        settings = ChatSettings(256, shuffle=False, each_answer=each)
        talks = [long, none] if each else [TALK, long, none]
        rows = pack_chat(talks, tiny_tokenizer, out, settings, report=report, quiet=True)
        assert rows.manifest["documents"] == documents
        assert sorted(report.skipped.values()) == [1, 1]
        assert "longer than 256 tokens by its characters alone" in report.skipped


def test_a_subsample_counts_conversations_and_takes_all_answers_of_each(tiny_tokenizer, tmp_path):
    talks = [Conversation(str(number), TALK) for number in range(8)]
    settings = ChatSettings(256, each_answer=True)
    rows = pack_chat(talks, tiny_tokenizer, tmp_path, settings, subsample=Subsample(total=3), quiet=True)
    taken = [document for row in rows for document in row.document_ids.tolist() if document >= 0]
    assert sorted(Counter(taken).values()) == [2, 2, 2]
    (source,) = rows.manifest["sources"].values()
    found = [source["lengths"][when] for when in ("before", "after")]
    assert [sum(table["documents"]) for table in found] == [8, 3]
    before, after = (sum(table["tokens"]) for table in found)
    assert after * 8 == before * 3, "a conversation counts once, whole, however many examples it becomes"
    assert source["documents"] == rows.manifest["documents"] == 6
    answers = [len("".join(turn["content"] for turn in TALK[:turns])) for turns in (3, 5)]
    assert source["characters"] == 3 * sum(answers)


def test_added_tokens_are_listed_once_and_again_when_there_are_more(tiny_tokenizer, monkeypatch):
    tokenizer, asked = pickle.loads(pickle.dumps(tiny_tokenizer)), []  # noqa: S301 - our own object
    every = type(tokenizer).added_tokens_decoder
    monkeypatch.setattr(
        type(tokenizer), "added_tokens_decoder", property(lambda self: asked.append(1) or every.fget(self))
    )
    for _ in range(3):
        encode_chat(tokenizer, TALK)
    assert len(asked) == 1, "of thousands of them a list takes longer than a conversation"
    talk = [{"role": "user", "content": "Where is <|new|>?"}, TALK[2]]
    encode_chat(tokenizer, talk)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|new|>"]})
    with pytest.raises(ValueError, match="control token"):
        encode_chat(tokenizer, talk)


@pytest.mark.parametrize("template", [CHATML, REWRITING, INSTRUCT], ids=["chatml", "rewriting", "instruct"])
def test_beginnings_are_told_by_their_ends_as_by_encoding_them_whole(tiny_tokenizer, monkeypatch, template):
    tokenizer, draw = with_template(tiny_tokenizer, template), random.Random(0)
    pieces = ["the", " key", "\n", "\n\n", " ", "é", "日本", "123", "a\u0301", "|", "\r\n", "."]
    by_its_end, told = rendering.Whole._by_its_end, []

    def counted(self, text):
        told.append(by_its_end(self, text))
        return told[-1]

    def outcome(talk, by):
        monkeypatch.setattr(rendering.Whole, "_by_its_end", by)
        try:
            return encode_chat(tokenizer, talk)
        except ValueError as error:
            return str(error)

    found = []
    for _ in range(60):
        contents = ["".join(draw.choices(pieces, k=draw.randint(1, 9))) for _ in range(2 * draw.randint(1, 3))]
        talk = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
        found.append(outcome(talk, counted))
        assert found[-1] == outcome(talk, lambda self, text: None), talk
    assert any(isinstance(each, tuple) for each in found)
    assert any(isinstance(each, str) for each in found), "some are refused: edges merge, or turns are rewritten"
    assert any(told), "some were told by their ends"


def test_a_long_conversation_is_encoded_about_as_often_as_it_has_tokens(tiny_tokenizer, monkeypatch):
    """Each beginning of it, two a turn, was encoded whole: minutes for a book with a hundred questions."""
    tokenizer, encode, letters = with_template(tiny_tokenizer, CHATML), type(tiny_tokenizer).__call__, []
    talk = [{"role": "user", "content": "the key " * 500}, TALK[2]] + TALK[1:3] * 30

    def counted(self, text, *arguments, **options):
        letters.append(len(text) if isinstance(text, str) else sum(map(len, text)))
        return encode(self, text, *arguments, **options)

    encode_chat(tokenizer, talk[:2])  # what the template writes behind an answer is known then
    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    ids, mask = encode_chat(tokenizer, talk)
    assert len(learned(tokenizer, ids, mask)) == 31
    assert sum(letters) < 4 * sum(len(turn["content"]) for turn in talk)


def test_an_answer_that_merges_with_the_prompt_is_refused(tiny_tokenizer):
    """In ChatML the prompt ends in a line break; with one more at the answer's start, a tokenizer may join the two."""
    core = Tokenizer(models.BPE({"\n": 0, "\n\n": 1, "<unk>": 2, "a": 3}, [("\n", "\n")], unk_token="<unk>"))
    joining = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", chat_template=CHATML)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\na"}]
    with pytest.raises(ValueError, match="merges with the template's text"):
        encode_chat(joining, talk)
    talk[1]["content"] = "a"
    encode_chat(joining, talk)


def test_what_the_template_refuses_is_a_reason_not_a_crash(tiny_tokenizer, tmp_path):
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    with pytest.raises(ValueError, match="refuses it: user first"):
        encode_chat(with_template(tiny_tokenizer, strict), TALK)


def test_no_template_is_refused(tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no chat template"):
        encode_chat(with_template(tiny_tokenizer, None), TALK)
    with pytest.raises(ValueError, match="no chat template"):
        pack_chat([TALK], with_template(tiny_tokenizer, None), tmp_path, ChatSettings(64), quiet=True)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ("hello", "no messages"),
        ([{"content": "a"}], "role"),
        ([{"role": "bot", "content": "a"}], "role"),
        ([{"role": "user"}], "missing content"),
        ([{"role": "user", "content": None}], "missing content"),
        ([{"role": "user", "content": "a"}], "no answer"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}], "empty answer"),
        ([{"role": "user", "content": "\n"}, {"role": "assistant", "content": "a"}], "empty question"),
        ([{"role": "user", "content": "a<|turn|>"}, {"role": "assistant", "content": "b"}], "control token"),
    ],
)
def test_malformed_conversations_are_named(tiny_tokenizer, messages, reason):
    with pytest.raises(ValueError, match=reason):
        encode_chat(tiny_tokenizer, messages)


def talk(words: int, name: str = "x") -> list[dict[str, str]]:
    return [{"role": "user", "content": f"say {name}"}, {"role": "assistant", "content": " ".join([name] * words)}]


def test_rows_hold_whole_examples_once(tiny_tokenizer, tmp_path):
    talks = [talk(1 + (7 * i) % 20, f"n{i}") for i in range(60)]
    talks[5] = [{"role": "user", "content": "unanswered"}]
    talks[9] = talk(300)
    report = ReadReport()
    rows = pack_chat(
        talks, tiny_tokenizer, tmp_path, ChatSettings(128, buffer_rows=3), report=report, rows_per_shard=4, quiet=True
    )
    assert rows.mask_documents
    assert report.skipped == {"no answer": 1, "longer than 128 tokens": 1}
    assert report.examples["no answer"] == ["conversation 5"]
    seen = []
    for number in range(len(rows)):
        row = rows[number]
        assert row.input_ids.size == 128
        for place, document in enumerate(row.document_ids):
            begin, end = row.boundaries[place : place + 2]
            assert np.array_equal(row.position_ids[begin:end], np.arange(end - begin))
            if document == -1:
                assert (row.labels[begin:end] == -100).all()
                continue
            seen.append(document)
            ids, mask = encode_chat(tiny_tokenizer, talks[document])
            assert row.input_ids[begin:end].tolist() == ids
            targets = [token if learn else -100 for token, learn in zip(ids[1:], mask[1:], strict=True)]
            assert row.labels[begin:end].tolist() == [*targets, -100]
    assert sorted(seen) == [i for i in range(60) if i not in (5, 9)]
    manifest = rows.manifest
    assert manifest["target_tokens"] == sum((rows[i].labels != -100).sum() for i in range(len(rows)))
    assert manifest["document_tokens"] + manifest["padding_tokens"] == 128 * len(rows)
    assert manifest["padding_tokens"] < 0.1 * 128 * len(rows), "first fit, longest first, fills rows well"


def test_chat_rows_resume_to_the_same_bytes(tiny_tokenizer, tmp_path):
    talks = [talk(1 + i % 20, f"n{i}") for i in range(60)]
    settings = ChatSettings(128, max_tokens=100)
    pack_chat(talks, tiny_tokenizer, tmp_path / "a", settings, rows_per_shard=4, quiet=True)
    pack_chat(talks, tiny_tokenizer, tmp_path / "b", settings, rows_per_shard=4, quiet=True)
    for name in ("manifest.json", "rows-00002.json"):
        (tmp_path / "b" / name).unlink()
    pack_chat(talks, tiny_tokenizer, tmp_path / "b", settings, rows_per_shard=4, quiet=True)
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir() if p.name != ".lock"} for n in "ab"]
    assert files[0] == files[1]
    assert len(PackedRows(tmp_path / "a")) > 8
    with pytest.raises(ValueError, match="input_sha256"):
        pack_chat(talks[:-1], tiny_tokenizer, tmp_path / "a", settings, rows_per_shard=4, quiet=True)


def test_with_provenance_finished_rows_are_not_made_again(tiny_tokenizer, tmp_path):
    def unreadable():
        raise AssertionError("read again")
        yield

    pack_chat([talk(3)], tiny_tokenizer, tmp_path, ChatSettings(64), provenance={"a": 1}, quiet=True)
    rows = pack_chat(unreadable(), tiny_tokenizer, tmp_path, ChatSettings(64), provenance={"a": 1}, quiet=True)
    assert len(rows) == 1


def test_nothing_left_is_an_error(tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"could be used: longer than 64 tokens \(1, such as conv.* 0 \("):
        pack_chat([talk(300)], tiny_tokenizer, tmp_path, ChatSettings(64), quiet=True)


@pytest.mark.parametrize("wrong", [{"length": 1}, {"buffer_rows": 0}, {"max_tokens": 65}, {"max_tokens": 1}])
def test_nonsense_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        ChatSettings(**{"length": 64, **wrong})

"""The end of a turn is learned whatever a template's marks say, or the template is refused with the reason."""

from __future__ import annotations

import copy
import datetime
import re

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers.utils import chat_template_utils

from ultralong.data.chat.pack import ChatSettings, pack_chat
from ultralong.data.chat.template import UnusableTemplate, encode_chat
from ultralong.data.read.documents import ReadReport
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.utils.chat_template import apply_chat_template, with_fixed_date
from ultralong.utils.files import read_json

TALK = [
    {"role": "user", "content": "Where is the key?"},
    {"role": "assistant", "content": "Under the stone."},
    {"role": "user", "content": "Which?"},
    {"role": "assistant", "content": "The third one."},
]
THOUGHT = {"role": "assistant", "content": "<think>It is dry there.</think>Under the stone."}
PROMPT = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"


@pytest.fixture
def tokenizer(tiny_tokenizer):
    made = copy.deepcopy(tiny_tokenizer)
    made.add_tokens([AddedToken(text, special=True) for text in ("<|start|>", "<|end|>", "<|user|>", "<|assistant|>")])
    made.add_tokens([AddedToken(text) for text in ("<think>", "</think>", "</tool>")])
    return made


def with_template(tokenizer, template):
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    return made


def turns(assistant, other="{{ m['content'] }}<|end|>"):
    """A template of turns, each with its role in front."""
    return (
        "{% for m in messages %}<|start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        f"{assistant}{{% else %}}{other}{{% endif %}}{{{{ '\\n' }}}}{{% endfor %}}{PROMPT}"
    )


def learned(tokenizer, messages):
    ids, mask = encode_chat(tokenizer, messages)
    edges = np.flatnonzero(np.diff([0, *mask, 0]))
    return [tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]


BOTH = ["Under the stone.<|end|>", "The third one.<|end|>"]
MARKED = {
    "the content alone": turns("{% generation %}{{ m['content'] }}{% endgeneration %}<|end|>"),
    "the content and its end": turns("{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"),
    "the end and the line break": turns("{% generation %}{{ m['content'] }}<|end|>{{ '\\n' }}{% endgeneration %}"),
    "half of an end of two tokens": turns("{% generation %}{{ m['content'] }}</tool>{% endgeneration %}<|end|>"),
    "nothing of an end of two tokens": turns("{% generation %}{{ m['content'] }}{% endgeneration %}</tool><|end|>"),
}


@pytest.mark.parametrize("name", MARKED)
def test_marks_that_end_early_are_lengthened_to_the_turns_end(tokenizer, name):
    found = learned(with_template(tokenizer, MARKED[name]), TALK)
    expected = [text.replace("<|end|>", "</tool><|end|>") for text in BOTH] if "two" in name else BOTH
    assert [text.rstrip("\n") for text in found] == expected


def test_marks_in_pieces_are_kept_as_they_are(tokenizer):
    template = turns(
        "{% set a = m['content'].split(' ') %}{% generation %}{{ a[0] }}{% endgeneration %} -- "
        "{% generation %}{{ m['content'] }}{% endgeneration %}<|end|>"
    )
    assert learned(with_template(tokenizer, template), TALK) == ["Under", BOTH[0], "The", BOTH[1]]


@pytest.mark.parametrize(
    ("assistant", "reason"),
    [
        (
            "{{ m['content'] }}{% if loop.last %}{% generation %}<|end|>{% endgeneration %}"
            "{% else %}<|end|>{% endif %}",
            "",
        ),
        ("{% generation %}{{ m['content'][:4] }}{% endgeneration %}{{ m['content'][4:] }}<|end|>", "0 of 2"),
        ("{{ m['content'] }}<|end|>{% if false %}{% generation %}{% endgeneration %}{% endif %}", "cover none"),
    ],
)
def test_marks_that_leave_out_answers_are_refused(tokenizer, assistant, reason):
    with pytest.raises(ValueError, match=reason or "give 1 of 2 answers an end"):
        encode_chat(with_template(tokenizer, turns(assistant)), TALK)


ENDLESS = {
    "the next role ends the turn": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "a line break": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "nothing for the last": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% if not loop.last %}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    "nothing, and marks": "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_an_end_of_turn_is_refused_before_anything_is_packed(tokenizer, tmp_path, name):
    made = with_template(tokenizer, ENDLESS[name])
    with pytest.raises(UnusableTemplate, match="writes nothing behind an answer"):
        encode_chat(made, TALK)

    def unread():
        raise AssertionError("conversations were read")
        yield

    with pytest.raises(ValueError, match="could not learn to stop"):
        pack_chat(unread(), made, tmp_path, ChatSettings(64), quiet=True)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (turns("{{ m['content'] }}<|end|>"), "<|end|>"),
        (turns("{{ m['content'] }}</tool><|end|>"), "</tool><|end|>"),
        (turns("{% generation %}{{ m['content'] }}{% endgeneration %}<|end|>"), "<|end|>"),
        (turns("{{ m['content'] }}\n###"), "\n###\n"),
        (turns("{% generation %}{{ m['content'] }}\n###{% endgeneration %}"), "\n###"),
    ],
)
@pytest.mark.parametrize("answer", ["<think>why</think>Because.", "Ends in </tool>", "<think>", "a</tool>b</tool>c"])
def test_added_tokens_inside_an_answer_do_not_end_it(tokenizer, template, end, answer):
    talk = [TALK[0], {"role": "assistant", "content": answer}, *TALK[2:]]
    found = learned(with_template(tokenizer, template), talk)
    assert found == [answer + end, TALK[3]["content"] + end]


def test_turns_that_are_not_to_be_learned_have_no_loss(tokenizer):
    for template in (
        turns("{{ m['content'] }}<|end|>"),
        MARKED["the content alone"],
        MARKED["the content and its end"],
    ):
        made = with_template(tokenizer, template)
        assert learned(made, [TALK[0], {**TALK[1], "train": False}, *TALK[2:]]) == BOTH[1:]
        assert learned(made, [*TALK[:3], {**TALK[3], "train": False}]) == BOTH[:1]
        with pytest.raises(ValueError, match="no answer to be learned"):
            encode_chat(made, [TALK[0], {**TALK[1], "train": False}])


def test_reasoning_is_learned_where_the_template_writes_it_and_refused_where_it_does_not(tokenizer):
    knows = turns("{% if m['NAME'] %}<think>{{ m['NAME'] }}</think>{% endif %}{{ m['content'] }}<|end|>")
    talk = [TALK[0], {**TALK[1], "reasoning_content": "Keys lie low."}, *TALK[2:]]
    for template in (knows.replace("NAME", "reasoning_content"), knows.replace("NAME", "thinking")):
        assert learned(with_template(tokenizer, template), talk) == ["<think>Keys lie low.</think>" + BOTH[0], BOTH[1]]
    with pytest.raises(ValueError, match="reasoning that the chat template leaves out"):
        encode_chat(with_template(tokenizer, turns("{{ m['content'] }}<|end|>")), talk)


KNOWN_ROLES = (
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}<|start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|end|>\n{% elif m['role'] == 'tool' and tools_as_json is defined %}{{ m['content'] | tojson }}{% endif %}"
    f"{{% endfor %}}{PROMPT}"
)


@pytest.mark.parametrize(
    ("template", "talk", "left"),
    [
        (KNOWN_ROLES, [{"role": "system", "content": "Rhyme."}, *TALK], "a system message"),
        (KNOWN_ROLES, [TALK[0], {"role": "tool", "content": "4"}, TALK[1]], "a tool message"),
        (turns("{{ m['content'].split('</think>')[-1] }}<|end|>"), [TALK[0], THOUGHT], "a part of an answer"),
        (turns("{% generation %}{{ m['content'][:9] }}<|end|>{% endgeneration %}"), TALK, "a part of an answer"),
        (turns("{{ m['content'] }}<|end|>", "{{ m['content'] | upper }}<|end|>"), TALK, "a user message"),
    ],
)
def test_a_template_that_leaves_out_what_was_said_is_refused(tokenizer, template, talk, left):
    with pytest.raises(ValueError, match=f"{left} that the chat template leaves out|does not write an answer as it is"):
        encode_chat(with_template(tokenizer, template), talk)


def test_white_space_and_the_spelling_of_json_are_the_templates_own(tokenizer):
    talk = [{**TALK[0], "content": " Where? \n"}, {"role": "tool", "content": '{"a": "4 \\u00e9"}\nok'}, TALK[1]]
    trimmed = KNOWN_ROLES.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")
    made = with_template(tokenizer, trimmed.replace("tools_as_json is defined", "true"))
    assert learned(made, talk) == [BOTH[0]]


@pytest.mark.parametrize("opening", ["<think>\n", "<think>\n\n</think>\n\n", "Thoughts:\n"])
def test_a_prompt_that_opens_the_answer_has_its_own_reason(tokenizer, opening):
    template = turns("{{ m['content'] }}<|end|>").replace(
        "assistant\n{% endif %}", f"assistant\n{opening}{{% endif %}}"
    )
    made = with_template(tokenizer, template)
    with pytest.raises(ValueError, match=re.escape(f"generation prompt ends in {opening.strip()!r}")):
        encode_chat(made, TALK)
    thought = [TALK[0], {"role": "assistant", "content": f"{opening}Under the stone."}]
    assert learned(made, thought) == [BOTH[0]]


# Dates: the templates of Llama 3.2 and Granite, reduced to their line with the date, and two more ways to write one.
DATED = [
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}Today: {{ date_string }}\n",
    "Today's Date: {{ strftime_now('%B %d, %Y') }}.\n",
    "{% macro head() %}It is {{ strftime_now('%A, %-d %B %Y, %H:%M') }}{% endmacro %}{{ head() }}\n",
    "{{ strftime_now('%Y-%m-%dT%H:%M:%S%z') }}\n",
]


def on(monkeypatch, day):
    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return day

    monkeypatch.setattr(chat_template_utils, "datetime", Day)


@pytest.mark.parametrize("head", DATED)
def test_a_template_with_todays_date_gives_the_same_bytes_on_another_day(tokenizer, tmp_path, monkeypatch, head):
    made = with_template(tokenizer, head + turns("{{ m['content'] }}<|end|>"))
    texts, rows = [], []
    for number, day in enumerate((datetime.datetime(2026, 5, 3), datetime.datetime(2027, 9, 27, 23, 59))):
        on(monkeypatch, day)
        texts.append(apply_chat_template(made, TALK, tokenize=False))
        today = made.apply_chat_template(TALK, tokenize=False)
        assert today != texts[-1], "the clock of the day is not what was written"
        folder = tmp_path / str(number)
        rows.append(pack_chat([TALK] * 3, made, folder, ChatSettings(256), quiet=True)[0].input_ids.tolist())
    assert texts[0] == texts[1]
    assert rows[0] == rows[1]
    assert "2024" in texts[0]
    assert read_json(tmp_path / "0" / "manifest.json")["date"] == "2024-07-26"
    made.chat_template = with_fixed_date(made.chat_template)
    assert made.apply_chat_template(TALK, tokenize=False) == texts[0]


def test_a_template_without_a_date_is_left_alone(tokenizer, tmp_path):
    made = with_template(tokenizer, turns("{{ m['content'] }}<|end|>"))
    assert with_fixed_date(made.chat_template) == made.chat_template
    pack_chat([TALK], made, tmp_path, ChatSettings(64), quiet=True)
    assert "date" not in PackedRows(tmp_path).manifest


def test_plain_lists_are_read_as_records_of_files_are(tokenizer, tmp_path):
    made, report = with_template(tokenizer, turns("{{ m['content'] }}<|end|>")), ReadReport()
    calls = [TALK[0], {**TALK[1], "tool_calls": [{"name": "f"}]}]
    weighted = [TALK[0], {**TALK[1], "weight": 0, "name": "Ann"}, *TALK[2:]]
    rows = pack_chat([TALK, calls, weighted], made, tmp_path, ChatSettings(256), report=report, quiet=True)
    assert rows.manifest["skipped"] == {"holds tool calls": 1}
    assert rows.manifest["unused_fields"] == {"messages.name": 1}
    text = [made.decode([label]) for label in rows[0].labels if label >= 0]
    assert "".join(text).count("third") == 2
    assert "".join(text).count("stone") == 1

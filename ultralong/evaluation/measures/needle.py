"""Needle in a haystack: a number hidden in a long text, asked for at its end, by prompt length and depth.

Every prompt is exactly as long as asked, for any tokenizer, because it is put together from ids: the frame, haystack up
to the needle, the needle, haystack that fills what is left, the question. Wording and scoring follow RULER's
`niah_single` tasks (Hsieh et al. 2024); the grid is the passkey map that long-context papers print. It is the easiest
long-context test there is: it shows that positions work, not that the model understands what it reads.

B batch, T tokens, A answer tokens, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ultralong.evaluation.measures.intervals import wilson
from ultralong.evaluation.tasks.haystack import Haystack
from ultralong.evaluation.tasks.needle import NeedleFormat, NeedleSample, make_needle, prepare_haystack
from ultralong.inference.generate import generate_greedy, prefill
from ultralong.utils.progress import progress


def needle_grid(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
    haystack: Haystack | str | Sequence[str] | None = None,
    *,
    form: NeedleFormat | None = None,
    chat: bool | None = None,
    method: str = "forward",
    batch_tokens: int = 8192,
    chunk: int | None = None,
    keep_wrong: int = 3,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Needle retrieval for every length and depth.

    Args:
        model: A causal language model; it is put into eval mode.
        tokenizer: Its tokenizer.
        lengths: Tokens of prompt and answer together.
        depths: Fractions from 0 (first) to 1 (last).
        samples: Prompts a cell.
        seed: Seed of the prompts; see `make_needle`.
        haystack: What to hide in: see `make_needle`.
        form: The words; None takes RULER's.
        chat: As for `make_needle`.
        method: `"forward"` feeds the answer behind the prompt and asks whether every one of its tokens is the most
            likely: one pass a batch, and the same outcome as greedy decoding of that answer. `"generate"` decodes and
            compares the first number, which also finds an answer put in other words or split into other tokens.
        batch_tokens: Tokens of one forward pass, at least one prompt.
        chunk: Tokens of one prefill pass, for prompts whose activations do not fit.
        keep_wrong: Wrong answers to keep in each cell.
        quiet: True draws no progress bar.

    Returns:
        One dictionary a cell, lengths in order and depths within: `length`, `depth`, `n`, `correct`, `low` and `high`
        (Wilson's interval at 95%) and `wrong`, a list of `sample`, `expected` and `got`.

    Raises:
        ValueError: An empty grid, another method, or what `make_needle` refuses.
    """
    if not len(lengths) or not len(depths) or samples < 1:
        raise ValueError("A needle grid needs at least one length, one depth and one sample a cell.")
    if method not in ("forward", "generate"):
        raise ValueError(f"method must be 'forward' or 'generate', got {method!r}.")
    model.eval()
    haystack = prepare_haystack(tokenizer, haystack, max(lengths))
    cells = {
        (length, depth): {"length": int(length), "depth": float(depth), "n": 0, "correct": 0, "wrong": []}
        for length in lengths
        for depth in depths
    }
    with progress(
        total=sum(lengths) * len(depths) * samples, desc="needle", unit="tok", unit_scale=True, quiet=quiet
    ) as bar:
        for length in lengths:
            wanted = [(depth, sample) for depth in depths for sample in range(samples)]
            size = max(1, batch_tokens // length)
            for first in range(0, len(wanted), size):
                batch = [
                    (
                        depth,
                        sample,
                        make_needle(tokenizer, length, depth, seed, haystack, sample=sample, form=form, chat=chat),
                    )
                    for depth, sample in wanted[first : first + size]
                ]
                needles = [needle for _, _, needle in batch]
                answers = (
                    answer_forward(model, tokenizer, needles, chunk=chunk)
                    if method == "forward"
                    else answer_generate(model, tokenizer, needles, chunk=chunk)
                )
                for (depth, sample, needle), (correct, got) in zip(batch, answers, strict=True):
                    _count(cells[length, depth], sample, needle.answer, correct, got, keep_wrong)
                bar.update(length * len(batch))
    for cell in cells.values():
        cell["low"], cell["high"] = wilson(cell["correct"], cell["n"])
    return list(cells.values())


def _count(cell: dict[str, Any], sample: int, expected: str, correct: bool, got: str, keep_wrong: int) -> None:
    cell["n"] += 1
    cell["correct"] += int(correct)
    if not correct and len(cell["wrong"]) < keep_wrong:
        cell["wrong"].append({"sample": sample, "expected": expected, "got": got})


def answer_forward(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    needles: Sequence[NeedleSample],
    *,
    chunk: int | None = None,
) -> list[tuple[bool, str]]:
    """Check answers in one pass: each is right if each of its tokens is the most likely after those before it.

    Args:
        model: A causal language model in eval mode.
        tokenizer: Its tokenizer.
        needles: Samples of one length.
        chunk: Tokens of one prefill pass.

    Returns:
        For each sample whether it is right, and what the model would say. Behind a first wrong token the rest is what
        it says after the right one, so read it only up to there.
    """
    whole = torch.from_numpy(
        np.stack(
            [np.concatenate([needle.input_ids, np.asarray(needle.answer_ids, np.int32)]) for needle in needles]
        ).astype(np.int64)
    ).to(model.device)  # (B, T)
    longest = max(len(needle.answer_ids) for needle in needles)
    # The last token predicts nothing that is asked for.
    guesses = prefill(model, whole[:, :-1], keep=longest, chunk=chunk).argmax(-1)  # (B, A)
    return [
        _compare(tokenizer, guesses[row, longest - len(needle.answer_ids) :], needle)
        for row, needle in enumerate(needles)
    ]


def _compare(tokenizer: PreTrainedTokenizerBase, guess: Tensor, needle: NeedleSample) -> tuple[bool, str]:
    ids = guess.tolist()
    return ids == list(needle.answer_ids), tokenizer.decode(ids).strip()


def answer_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    needles: Sequence[NeedleSample],
    *,
    chunk: int | None = None,
    spare: int = 8,
) -> list[tuple[bool, str]]:
    """Decode answers greedily: each is right if the first number in it is the hidden one.

    Args:
        model: A causal language model in eval mode.
        tokenizer: Its tokenizer.
        needles: Samples of one length; prompts whose answers take different numbers of tokens run apart.
        chunk: Tokens of one prefill pass.
        spare: Tokens to decode beyond those of the answer, for a few words around it.

    Returns:
        For each sample whether it is right, and what was decoded.
    """
    answers: dict[int, tuple[bool, str]] = {}
    by_length: dict[int, list[int]] = {}
    for index, needle in enumerate(needles):
        by_length.setdefault(len(needle.input_ids), []).append(index)
    for indices in by_length.values():
        prompts = np.stack([needles[index].input_ids for index in indices]).astype(np.int64)  # (B, T)
        budget = max(len(needles[index].answer_ids) for index in indices) + spare
        decoded = generate_greedy(model, torch.from_numpy(prompts).to(model.device), budget, chunk=chunk)
        for index, ids in zip(indices, decoded, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            found = re.search(r"\d+", text)
            answers[index] = (found is not None and found.group() == needles[index].answer, text)
    return [answers[index] for index in range(len(needles))]

"""The needle map: how often a hidden number is found, by prompt length and depth.

The grid is the passkey map that long-context papers print. It is the easiest long-context test there is: it shows that
positions work, not that the model understands what it reads.

B batch, T tokens, A answer tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ultralong.evaluation.measures.intervals import wilson
from ultralong.evaluation.tasks.haystack import Haystack
from ultralong.evaluation.tasks.needle import NeedleFormat, NeedleSample, make_needle, prepare_haystack
from ultralong.inference.decoding import NotANumber
from ultralong.inference.engines import Engine, LocalEngine
from ultralong.inference.generate import prefill
from ultralong.utils.progress import progress

SPARE = 8  # tokens to decode beyond the answer's, for a few words around it
Judged = list[tuple[bool, str]]  # for each needle whether it was found, and what was said


def needle_grid(
    model: PreTrainedModel | None,
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
    engine: Engine | None = None,
    capacity: int | None = None,
    batch_tokens: int = 8192,
    chunk: int | None = None,
    keep_wrong: int = 3,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Needle retrieval for every length and depth.

    Args:
        model: A causal language model; it is put into eval mode. None where an engine answers.
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
        engine: What decodes, where the model's own forward pass cannot hold the prompt; `method` is then `"generate"`.
        capacity: With an engine: tokens of the longest prompt of a map that is asked in several calls, so that one
            cache serves all.
        batch_tokens: Tokens of one forward pass, at least one prompt.
        chunk: Tokens of one prefill pass, for prompts whose activations do not fit.
        keep_wrong: Wrong answers to keep in each cell.
        quiet: True draws no progress bar.

    Returns:
        One dictionary a cell, lengths in order and depths within: `length`, `depth`, `n`, `correct`, `low` and `high`
        (Wilson's interval at 95%), `wrong`, a list of `sample`, `expected` and `got` of some wrong answers, `missed`,
        the samples of all, and `contained`, how many answers hold the number. Those that are not `correct` say
        something else first, as a model that goes on with a colon: forward, each digit follows the right ones.

    Raises:
        ValueError: An empty grid, another method, neither model nor engine, or what `make_needle` refuses.
    """
    if not len(lengths) or not len(depths) or samples < 1:
        raise ValueError("A needle grid needs at least one length, one depth and one sample a cell.")
    haystack = prepare_haystack(tokenizer, haystack, max(lengths))
    judge = _judge(model, tokenizer, method, engine, chunk, max(*lengths, capacity or 0))
    cells = []
    with progress(
        total=sum(lengths) * len(depths) * samples, desc="needle", unit="tok", unit_scale=True, quiet=quiet
    ) as bar:
        for length in lengths:
            wanted = [(float(depth), sample) for depth in depths for sample in range(samples)]
            size = max(1, batch_tokens // length)
            judged: Judged = []
            expected: list[str] = []
            for first in range(0, len(wanted), size):
                needles = [
                    make_needle(tokenizer, length, depth, seed, haystack, sample=sample, form=form, chat=chat)
                    for depth, sample in wanted[first : first + size]
                ]
                judged += judge(needles)
                expected += [needle.answer for needle in needles]
                bar.update(length * len(needles))
            for place, depth in enumerate(depths):
                part = slice(place * samples, (place + 1) * samples)
                cells.append(_cell(length, float(depth), judged[part], expected[part], keep_wrong))
    return cells


def _judge(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    method: str,
    engine: Engine | None,
    chunk: int | None,
    longest: int,
) -> Callable[[Sequence[NeedleSample]], Judged]:
    """What tells of needles of one length whether they are found."""
    if method not in ("forward", "generate"):
        raise ValueError(f"method must be 'forward' or 'generate', got {method!r}.")
    if engine is None:
        if model is None:
            raise ValueError("A needle grid needs a model or an engine.")
        if method == "forward":
            ready = model.eval()
            return lambda needles: answer_forward(ready, tokenizer, needles, chunk=chunk)
        engine = LocalEngine(model, tokenizer, chunk)
    answering = engine
    return lambda needles: answer_by_engine(answering, needles, longest)


def _cell(length: int, depth: float, judged: Judged, expected: Sequence[str], keep_wrong: int) -> dict[str, Any]:
    correct = sum(right for right, _ in judged)
    low, high = wilson(correct, len(judged))
    wrong = [
        {"sample": sample, "expected": answer, "got": got}
        for sample, ((right, got), answer) in enumerate(zip(judged, expected, strict=True))
        if not right
    ]
    return {
        "length": int(length),
        "depth": depth,
        "n": len(judged),
        "correct": correct,
        "wrong": wrong[:keep_wrong],
        "missed": [item["sample"] for item in wrong],
        "contained": correct + sum(str(item["expected"]) in str(item["got"]) for item in wrong),
        "low": low,
        "high": high,
    }


def answer_forward(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    needles: Sequence[NeedleSample],
    *,
    chunk: int | None = None,
) -> Judged:
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
    logits = prefill(model, whole[:, :-1], keep=longest, chunk=chunk)  # (B, A, V)
    if logits.isnan().any():
        raise NotANumber
    guesses = logits.argmax(-1)  # (B, A)
    judged = []
    for row, needle in enumerate(needles):
        ids = guesses[row, longest - len(needle.answer_ids) :].tolist()
        judged.append(
            (ids == list(needle.answer_ids), str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).strip())
        )
    return judged


def answer_by_engine(engine: Engine, needles: Sequence[NeedleSample], longest: int, *, spare: int = SPARE) -> Judged:
    """Let an engine answer: right is an answer whose first number is the hidden one.

    Args:
        engine: What answers.
        needles: Samples.
        longest: Tokens of the longest prompt of all calls, so that one cache serves all.
        spare: Tokens to decode beyond those of the answer, for a few words around it.

    Returns:
        For each sample whether it is right, and what was said.
    """
    prompts = [needle.input_ids.tolist() for needle in needles]
    budgets = [len(needle.answer_ids) + spare for needle in needles]
    size = len(needles) if len(needles) > 1 and engine.max_batch(longest + spare) > 1 else 1
    groups = [slice(start, start + size) for start in range(0, len(needles), size)]
    answers = [
        answer for group in groups for answer in engine.answer(prompts[group], budgets[group], capacity=longest + spare)
    ]
    judged = []
    for needle, answer in zip(needles, answers, strict=True):
        found = re.search(r"\d+", answer.text)
        judged.append((found is not None and found.group() == needle.answer, answer.text.strip()))
    return judged

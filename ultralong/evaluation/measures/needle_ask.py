"""A cell of the needle map by asking an engine, where the model's own forward pass cannot hold the prompt."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from ultralong.evaluation.measures.intervals import wilson
from ultralong.evaluation.tasks.haystack import Haystack
from ultralong.evaluation.tasks.needle import make_needle
from ultralong.inference.engines import Engine

SPARE = 8  # tokens to decode beyond the answer's, for a few words around it
MOST_WRONG = 3


def ask_cell(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    depth: float,
    samples: int,
    seed: int,
    haystack: Haystack,
    chat: bool | None,
    longest: int,
) -> dict[str, Any]:
    """Ask for the needles of one length and depth; right is an answer whose first number is the hidden one.

    Args:
        engine: What answers, one prompt at a time.
        tokenizer: Its tokenizer.
        length: Tokens of prompt and answer together.
        depth: From 0 (first) to 1 (last).
        samples: Prompts.
        seed: As for `make_needle`.
        haystack: What to hide in.
        chat: As for `make_needle`.
        longest: Tokens of the longest prompt of the map, so that one cache serves all.

    Returns:
        A cell as `needle_grid` gives it.

    Raises:
        ValueError: As for `make_needle`.
    """
    cell: dict[str, Any] = {"length": int(length), "depth": float(depth), "n": 0, "correct": 0, "wrong": []}
    for sample in range(samples):
        needle = make_needle(tokenizer, length, depth, seed, haystack, sample=sample, chat=chat)
        said, _ = engine.answer(needle.input_ids.tolist(), len(needle.answer_ids) + SPARE, longest + SPARE)
        found = re.search(r"\d+", said)
        correct = found is not None and found.group() == needle.answer
        cell["n"] += 1
        cell["correct"] += int(correct)
        if not correct and len(cell["wrong"]) < MOST_WRONG:
            cell["wrong"].append({"sample": sample, "expected": needle.answer, "got": said.strip()})
    cell["low"], cell["high"] = wilson(cell["correct"], cell["n"])
    return cell

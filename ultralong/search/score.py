"""Scores of a scaling on tokens that need the long context: answers of needles, and LongPPL's key tokens.

The model stays loaded. A candidate's table goes into its rotary module, so that a trial costs the reading alone; it is
the table that the checkpoint written by `extend` has for texts of this length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ultralong.data.rows.packed_rows import IGNORE, PackedRows
from ultralong.evaluation.measures.key_tokens import KeyRule, Text, find_key_tokens, long_texts, read_long
from ultralong.evaluation.measures.perplexity import token_losses
from ultralong.evaluation.tasks.haystack import read_haystack
from ultralong.evaluation.tasks.needle import NeedleSample, make_needle, prepare_haystack
from ultralong.inference.load import load_model
from ultralong.rope import RopeScaling, from_config, inverse_frequencies
from ultralong.search.settings import SearchSettings

ONE_PASS = 32768


def rotary_modules(model: nn.Module) -> list[Any]:
    """The modules that hold a model's rotary table.

    Raises:
        ValueError: It has none of one table.
    """
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "inv_freq", None), torch.Tensor)
        and isinstance(getattr(module, "rope_type", None), str)
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no rotary module of one table, which a search could change.")
    return found


@contextmanager
def scaled(model: PreTrainedModel, scaling: RopeScaling, length: int) -> Iterator[None]:
    """Let a model read with a scaling's table for texts of a length; its own comes back at the end."""
    table, factor = inverse_frequencies(scaling, length)
    modules = rotary_modules(model)
    before = [(module.inv_freq, module.attention_scaling, module.rope_type) for module in modules]
    for module in modules:
        module.inv_freq, module.attention_scaling = table.to(module.inv_freq.device), factor
        module.rope_type = "default"  # a table that follows the length is fixed at this one
    try:
        yield
    finally:
        for module, (inv_freq, attention_scaling, rope_type) in zip(modules, before, strict=True):
            module.inv_freq, module.attention_scaling, module.rope_type = inv_freq, attention_scaling, rope_type


class Scorer:
    """What scalings of one model are scored on: the same prompts and texts for all.

    Args:
        model: The model, in eval mode.
        tokenizer: Its tokenizer.
        wanted: Lengths, depths, rows.
        device: Where an evaluator is opened.

    Raises:
        ValueError: Lengths within the window of pretraining, where nothing differs, or beyond the new one; what
            `make_needle` or `long_texts` refuse.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: SearchSettings, device: str = "auto"
    ) -> None:
        self.model, self.wanted = model.eval(), wanted
        lengths = wanted.lengths or (wanted.to,)
        window = from_config(model.config).original_window or 0
        if min(lengths) <= window or max(lengths) > wanted.to:
            raise ValueError(
                f"lengths must be beyond the {window:,} tokens of pretraining and within the new window of "
                f"{wanted.to:,}, found {', '.join(f'{length:,}' for length in lengths)}."
            )
        haystack = prepare_haystack(tokenizer, read_haystack(wanted.haystack), max(lengths))
        self.needles = [
            make_needle(tokenizer, length, depth, wanted.seed, haystack, sample=sample)
            for length in lengths
            for depth in wanted.depths
            for sample in range(wanted.samples)
        ]
        self.texts: list[Text] = []
        self.keys: list[np.ndarray] = []
        if wanted.rows is not None and wanted.evaluator is not None:
            rule = KeyRule(wanted.short_context, wanted.short_stride, wanted.key_alpha, wanted.key_beta)
            self.texts = long_texts(PackedRows(Path(wanted.rows)), rule, "row", wanted.max_rows)
            reader = load_model(wanted.evaluator, device)
            self.keys, _ = find_key_tokens(reader, self.texts, rule, chunk=self._chunk(ONE_PASS + 1), quiet=True)
            if not any(key.any() for key in self.keys):
                raise ValueError(f"{wanted.evaluator} finds no key token in {wanted.rows}: take milder thresholds.")

    def score(self, scaling: RopeScaling | None, model: PreTrainedModel | None = None) -> dict[str, float]:
        """Mean losses in nats, less is better: `needles` (answers' tokens), and `longppl` (key tokens) with rows.

        Args:
            scaling: What to read with; None is the model's own.
            model: Another model, such as one that was trained; None is the search's.
        """
        return {name: self.mean(parts) for name, parts in self.parts(scaling, model).items()}

    def parts(
        self, scaling: RopeScaling | None, model: PreTrainedModel | None = None
    ) -> dict[str, list[tuple[float, int]]]:
        """Nats and tokens of every needle and text. See `score`."""
        reader = self.model if model is None else model
        found = {"needles": [self._needle(reader, scaling, needle) for needle in self.needles]}
        if self.texts:
            parts = []
            for text, key in zip(self.texts, self.keys, strict=True):
                with _maybe(reader, scaling, len(text.labels)):
                    (losses,) = read_long(reader, [text], chunk=self._chunk(len(text.labels)), quiet=True)
                parts.append((float(losses[key].sum()), int(key.sum())))
            found["longppl"] = parts
        return found

    def _needle(self, model: PreTrainedModel, scaling: RopeScaling | None, needle: NeedleSample) -> tuple[float, int]:
        """Nats and tokens of one answer."""
        ids = np.concatenate([needle.input_ids, np.asarray(needle.answer_ids)]).astype(np.int64)
        labels = np.full(len(ids) - 1, IGNORE)
        labels[-len(needle.answer_ids) :] = needle.answer_ids
        given = (torch.from_numpy(x)[None] for x in (ids[:-1], labels))
        with _maybe(model, scaling, len(ids)):
            losses = token_losses(model, *given, chunk=self._chunk(len(ids)))
        return float(losses.double().sum()), len(needle.answer_ids)

    def _chunk(self, tokens: int) -> int | None:
        if self.wanted.chunk is not None:
            return self.wanted.chunk
        return ONE_PASS // 2 if tokens > ONE_PASS else None

    @staticmethod
    def mean(parts: list[tuple[float, int]]) -> float:
        """Nats a token over all of them."""
        nats, tokens = (math.fsum(column) for column in zip(*parts, strict=True))
        return nats / tokens


@contextmanager
def _maybe(model: PreTrainedModel, scaling: RopeScaling | None, length: int) -> Iterator[None]:
    if scaling is None:
        yield
        return
    with scaled(model, scaling, length):
        yield

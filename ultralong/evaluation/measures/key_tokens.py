"""Key tokens: the tokens of a text that need its long context, after arXiv 2410.23771.

T tokens of a text, P ranks, S tokens of a short context, W tokens that share one.

A token is a key token when its log-likelihood under an evaluator rises by more than `alpha` nats as the evaluator reads
the whole text instead of a short context (LSD, the long-short difference), and is above `beta` then (LCL, the
long-context likelihood).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ultralong.attention import make_attention_context
from ultralong.attention.collectives import Group
from ultralong.checkpoints.config import head_counts
from ultralong.data.rows.packed_rows import IGNORE, PADDING, PackedRows
from ultralong.data.rows.short_contexts import equal_lengths, short_contexts
from ultralong.evaluation.measures.perplexity import token_losses
from ultralong.training.loss import LanguageModelLoss
from ultralong.utils.progress import progress

TOGETHER = 16384  # tokens of short contexts that are read in one pass
By = Literal["document", "row"]


@dataclass(frozen=True)
class KeyRule:
    """Which tokens need the long context. The defaults are the paper's.

    Attributes:
        short_context: Tokens of the short context at least.
        stride: Tokens that share a short context; fewer make it more even and cost more.
        alpha: Nats by which the long context must raise the log-likelihood (LSD above it).
        beta: What the log-likelihood with the long context must be above (LCL).
    """

    short_context: int = 4096
    stride: int = 1024
    alpha: float = 2.0
    beta: float = -2.0

    def __post_init__(self) -> None:
        if self.short_context < 1 or self.stride < 1:
            raise ValueError(
                f"short_context and stride are tokens, found {self.short_context} and {self.stride}: the paper takes "
                "4,096 and 1,024."
            )
        if not (math.isfinite(self.alpha) and math.isfinite(self.beta)):
            raise ValueError(f"alpha and beta must be numbers, found {self.alpha} and {self.beta}.")

    @property
    def shortest(self) -> int:
        """Tokens of the shortest text that has a token with more than a short context before it."""
        return self.short_context + self.stride


@dataclass(frozen=True, eq=False)
class Text:
    """What is read as one text.

    Attributes:
        document: The document it is of (or the row): intervals draw these.
        input_ids: (T,).
        labels: (T,) shifted, -100 where there is no target.
    """

    document: int
    input_ids: np.ndarray
    labels: np.ndarray


def long_texts(rows: PackedRows, rule: KeyRule, by: By = "document", most: int | None = None) -> list[Text]:
    """The texts of packed rows that are long enough to have key tokens.

    Args:
        rows: The rows.
        rule: Says how long that is.
        by: `document` reads every document's part of a row by itself, `row` a whole row as one text.
        most: Rows to use; None is all.

    Raises:
        ValueError: There is none, `row` is asked of rows whose documents do not see each other, or another `by`.
    """
    if by not in ("document", "row"):
        raise ValueError(f"by must be 'document' or 'row', got {by!r}.")
    if by == "row" and (rows.mask_documents or rows.restart_positions):
        raise ValueError(f"Documents in {rows.folder} do not see each other: read them by document.")
    found = []
    for index in range(len(rows) if most is None else min(most, len(rows))):
        row = rows[index]
        edges = row.boundaries if by == "document" else [0, rows.length]
        names = row.document_ids if by == "document" else [index]
        for start, end, name in zip(edges[:-1], edges[1:], names, strict=True):
            if end - start >= rule.shortest and name != PADDING:
                labels = row.labels[start:end].copy()
                if by == "document":
                    labels[-1] = IGNORE  # it is the first token of what follows
                found.append(Text(int(name), row.input_ids[start:end], labels))
    if not found:
        raise ValueError(
            f"No {by} in {rows.folder} has {rule.shortest:,} tokens (short context and stride): pack longer ones, read "
            "whole rows (by row), or take a smaller short context and stride."
        )
    return found


@torch.inference_mode()
def long_losses(
    model: PreTrainedModel, text: Text, *, chunk: int | None = None, group: Group | None = None
) -> np.ndarray:
    """Losses (T,) in nats with all of the text before each token.

    Args:
        model: A causal language model in eval mode; with several ranks on this library's attention.
        text: The text.
        chunk: Tokens of one pass with a key-value cache; None takes all at once.
        group: Ranks that share the text, each with the whole model, in one pass; None is this one alone.

    Raises:
        ValueError: A model that changes its logits after the head.
    """
    ids, labels = (torch.from_numpy(array.astype(np.int64))[None] for array in (text.input_ids, text.labels))
    if group is None:
        return token_losses(model, ids, labels, chunk=chunk)[0].double().cpu().numpy()
    heads, kv_heads = head_counts(model.config)
    tokens = ids.shape[1]
    context = make_attention_context(tokens, group, heads=heads, kv_heads=kv_heads)
    ids, labels = (context.shard(x, pad=pad).to(model.device) for x, pad in ((ids, 0), (labels, IGNORE)))
    positions = context.positions(model.device)
    losses = LanguageModelLoss(model)(
        ids, labels, torch.full_like(ids, tokens), position_ids=positions, attention_context=context
    )[1]
    return context.unshard(losses)[0].double().cpu().numpy()


@torch.inference_mode()
def short_losses(model: PreTrainedModel, text: Text, rule: KeyRule, *, group: Group | None = None) -> np.ndarray:
    """Losses (T,) in nats with a short context before each token; NaN where it is no shorter than the text.

    Args:
        model: A causal language model in eval mode.
        text: The text.
        rule: How short.
        group: Ranks that share the work.
    """
    contexts = short_contexts(text.labels[None], None, rule.short_context, rule.stride)
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    found = np.zeros((2, len(text.labels)))  # sums, and which are known
    for alike in list(equal_lengths(contexts, TOGETHER))[rank::ranks]:
        cut = [slice(context.start, context.end) for context in alike]
        ids, labels = (
            torch.from_numpy(np.stack([array[part] for part in cut]).astype(np.int64))
            for array in (text.input_ids, text.labels)
        )
        losses = token_losses(model, ids, labels).double().cpu().numpy()  # (B, S + W - 1)
        for context, own in zip(alike, losses, strict=True):
            found[0, context.first : context.end] = own[context.first - context.start :]
            found[1, context.first : context.end] = 1
    if group is not None:
        shared = torch.from_numpy(found).to(model.device)
        dist.all_reduce(shared, group=group)
        found = shared.cpu().numpy()
    return np.where(found[1] > 0, found[0], np.nan)


def key_tokens(long: np.ndarray, short: np.ndarray, labels: np.ndarray, rule: KeyRule) -> np.ndarray:
    """Which places (T,) predict a key token.

    Args:
        long: (T,) losses of the evaluator with the whole text.
        short: (T,) its losses with a short context, NaN where there is none.
        labels: (T,) shifted labels.
        rule: The thresholds.
    """
    return (labels != IGNORE) & (np.nan_to_num(short - long, nan=-np.inf) > rule.alpha) & (-long > rule.beta)


def find_key_tokens(
    evaluator: PreTrainedModel,
    texts: Sequence[Text],
    rule: KeyRule,
    *,
    chunk: int | None = None,
    group: Group | None = None,
    quiet: bool = False,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Key tokens of texts, and the evaluator's losses with the whole text, both (T,) for each text.

    Args:
        evaluator: The model that chooses.
        texts: The texts.
        rule: The thresholds.
        chunk: Tokens of one pass over a text.
        group: Ranks that share the work.
        quiet: True draws no progress bar.
    """
    evaluator.eval()
    keys, losses = [], []
    for text in progress(texts, desc="key tokens", unit="text", quiet=quiet):
        losses.append(long_losses(evaluator, text, chunk=chunk, group=group))
        keys.append(key_tokens(losses[-1], short_losses(evaluator, text, rule, group=group), text.labels, rule))
    return keys, losses


def read_long(
    model: PreTrainedModel,
    texts: Sequence[Text],
    *,
    chunk: int | None = None,
    group: Group | None = None,
    quiet: bool = False,
) -> list[np.ndarray]:
    """Losses (T,) of each text with all of it before each token; arguments as for `find_key_tokens`."""
    model.eval()
    return [
        long_losses(model, text, chunk=chunk, group=group)
        for text in progress(texts, desc="LongPPL", unit="text", quiet=quiet)
    ]

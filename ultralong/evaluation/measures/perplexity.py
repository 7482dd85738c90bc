"""Perplexity by position: does the model still gain from what lies far back, or does it break past its old window?

B batch, T tokens, R rows, C bins, d hidden size, V vocabulary.

A mean over a whole document hides the failure it should show: most tokens lie early. Here every position counts in its
own bin, with an interval over documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ultralong.data.rows.packed_rows import IGNORE
from ultralong.evaluation.measures.intervals import bootstrap_ratio
from ultralong.inference.decoding import NotANumber
from ultralong.inference.generate import hidden_states
from ultralong.utils.progress import progress

WAYS = ("row", "document")  # what positions are counted from
FIRST_BIN = 256
TILE_LOGITS = 1 << 25  # logits of one tile: 128 MiB in float32


def _decoder_and_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Linear]:
    """The model below its head, and the head, checked to give the model's own logits together.

    Raises:
        ValueError: They do not, as in models that cap or scale their logits; or they are not numbers.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    probe = torch.arange(1, 5, device=model.device)[None]  # not 0: often padding, whose embedding is 0
    whole = model(input_ids=probe, use_cache=False).logits
    if whole.isnan().any():
        raise NotANumber
    parts = head(decoder(input_ids=probe, use_cache=False).last_hidden_state)
    if not torch.allclose(whole.float(), parts.float(), rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{type(model).__name__} changes its logits after the head, which tiled perplexity would "
            "miss. Measure it with the model's own forward pass."
        )
    return decoder, head


def _tile_losses(head: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
    """Losses (N,) of hidden states (N, d) against labels (N,), a tile of logits at a time; 0 where ignored."""
    losses = torch.zeros(len(labels), dtype=torch.float32, device=hidden.device)
    tile = max(1, TILE_LOGITS // head.weight.shape[0])
    for part in (labels != IGNORE).nonzero().squeeze(1).split(tile):  # of answers alone, few tokens of a text
        logits = head(hidden[part]).float()  # (tile, V)
        losses[part] = nn.functional.cross_entropy(logits, labels[part], reduction="none")
    return losses


@torch.inference_mode()
def token_losses(model: PreTrainedModel, input_ids: Tensor, labels: Tensor, *, chunk: int | None = None) -> Tensor:
    """Loss of every token in nats; logits never exist for more than a tile of tokens.

    Args:
        model: A causal language model in eval mode.
        input_ids: (B, T) token ids.
        labels: (B, T) the token that follows each input, already shifted; -100 where there is none.
        chunk: Tokens of one pass with a key-value cache; None runs all T at once.

    Returns:
        (B, T) float32 losses, 0 where the label is -100.

    Raises:
        ValueError: Shapes that differ, or a model that changes its logits after the head.
    """
    if input_ids.shape != labels.shape or input_ids.ndim != 2:
        raise ValueError(
            f"Inputs and labels must both be (batch, tokens), got {tuple(input_ids.shape)} and {tuple(labels.shape)}."
        )
    decoder, head = _decoder_and_head(model)
    losses = torch.zeros(input_ids.shape, dtype=torch.float32, device=model.device)
    for part, hidden in hidden_states(decoder, model, input_ids, chunk=chunk):  # (B, chunk, d)
        target = labels[:, part].to(model.device)
        losses[:, part] = _tile_losses(head, hidden.flatten(0, 1), target.flatten()).view(target.shape)
    return losses


def _as_row(row: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Inputs, shifted labels and boundaries of a packed row, or of a plain sequence of token ids."""
    if hasattr(row, "labels"):
        return np.asarray(row.input_ids), np.asarray(row.labels), getattr(row, "boundaries", None)
    tokens = np.asarray(row)
    if tokens.ndim != 1 or len(tokens) < 2:
        raise ValueError(f"A row must be a sequence of at least two token ids, got shape {tokens.shape}.")
    return tokens[:-1], tokens[1:], None


def _positions(length: int, boundaries: np.ndarray | None, by: str) -> np.ndarray:
    """Place of each token in the row, or in its own document."""
    places = np.arange(length)
    if by == "row":
        return places
    starts = np.asarray([0] if boundaries is None else boundaries[:-1])
    return places - starts[np.searchsorted(starts, places, side="right") - 1]


def position_edges(length: int) -> tuple[int, ...]:
    """Borders of perplexity bins that double: fine where the text begins, coarse where it is long."""
    edges = [0, FIRST_BIN]
    while edges[-1] < length:
        edges.append(edges[-1] * 2)
    return (*edges[:-1], length) if length > FIRST_BIN else (0, length)


def perplexity_by_position(
    model: PreTrainedModel,
    rows: Sequence[Any],
    edges: Sequence[int],
    *,
    by: str = "row",
    chunk: int | None = None,
    seed: int = 0,
    level: float = 0.95,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Perplexity in bins of position, with a bootstrap interval over rows.

    A loss counts at the position of the token that predicts, counted from 0: position p is predicted from p + 1 tokens.

    Args:
        model: A causal language model; it is put into eval mode.
        rows: Token id sequences (documents), or packed rows with `input_ids` and shifted `labels`.
        edges: Borders of the bins in tokens, rising; bin i holds positions edges[i] to edges[i + 1] - 1.
        by: `"row"` counts from the start of the row, `"document"` from the start of the token's own document.
        chunk: Tokens of one pass; None runs a row at once.
        seed: Seed of the bootstrap.
        level: Confidence of the interval, two-sided.
        quiet: True draws no progress bar.

    Returns:
        One dictionary a bin that holds tokens: `start`, `end` (tokens, end excluded), `n` (tokens), `rows`, `nll` (mean
        loss, nats), `perplexity`, `low` and `high` of the perplexity (None where fewer than two rows reach), and
        `each`: nats and tokens of every row, in order.

    Raises:
        ValueError: No rows, edges that do not rise, or another `by`.
    """
    found = perplexity_by_positions(model, rows, edges, (by,), chunk=chunk, seed=seed, level=level, quiet=quiet)
    return found[by]


def perplexity_by_positions(
    model: PreTrainedModel,
    rows: Sequence[Any],
    edges: Sequence[int],
    ways: Sequence[str] = WAYS,
    *,
    chunk: int | None = None,
    seed: int = 0,
    level: float = 0.95,
    quiet: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """As `perplexity_by_position`, counted in several ways; the model reads each row once for all of them.

    Args:
        model: As there, and so are the others.
        rows: As there.
        edges: As there.
        ways: What positions are counted from, `"row"` and `"document"`.
        chunk: As there.
        seed: As there.
        level: As there.
        quiet: As there.

    Returns:
        For each way its bins.

    Raises:
        ValueError: As there.
    """
    borders = np.asarray(edges)
    if len(borders) < 2 or (np.diff(borders) <= 0).any():
        raise ValueError(f"edges must rise and hold at least two positions, got {list(edges)[:8]}.")
    if unknown := [by for by in ways if by not in WAYS]:
        raise ValueError(f"by must be 'row' or 'document', got {unknown[0]!r}.")
    if not len(rows):
        raise ValueError("There are no rows to measure perplexity on.")
    model.eval()
    sums, counts = np.zeros((2, len(ways), len(rows), len(borders) - 1))
    for index in progress(range(len(rows)), desc="perplexity", unit="row", quiet=quiet):
        inputs, labels, boundaries = _as_row(rows[index])
        tensors = [torch.from_numpy(array.astype(np.int64))[None] for array in (inputs, labels)]
        losses = token_losses(model, *tensors, chunk=chunk)[0].double().cpu().numpy()
        for way, by in enumerate(ways):
            bins = np.searchsorted(borders, _positions(len(inputs), boundaries, by), side="right") - 1
            used = (labels != IGNORE) & (bins >= 0) & (bins < len(borders) - 1)
            sums[way, index] = np.bincount(bins[used], losses[used], minlength=len(borders) - 1)
            counts[way, index] = np.bincount(bins[used], minlength=len(borders) - 1)
    return {
        by: _bins(borders, sums[way], counts[way], *bootstrap_ratio(sums[way], counts[way], seed=seed, level=level))
        for way, by in enumerate(ways)
    }


def _bins(
    borders: np.ndarray, sums: np.ndarray, counts: np.ndarray, low: np.ndarray, high: np.ndarray
) -> list[dict[str, Any]]:
    """Bins that hold tokens, of nats and tokens (R, C) and the ends (C,) of the mean loss."""
    return [
        _describe(borders[i], borders[i + 1], sums[:, i], counts[:, i], low[i], high[i])
        for i in range(len(borders) - 1)
        if counts[:, i].sum()
    ]


def _describe(start: int, end: int, sums: np.ndarray, counts: np.ndarray, low: float, high: float) -> dict[str, Any]:
    mean = float(sums.sum() / counts.sum())
    return {
        "start": int(start),
        "end": int(end),
        "n": int(counts.sum()),
        "rows": int((counts > 0).sum()),
        "nll": mean,
        "perplexity": math.exp(mean),
        "low": None if math.isnan(low) else math.exp(low),
        "high": None if math.isnan(high) else math.exp(high),
        "each": [[float(nats), int(tokens)] for nats, tokens in zip(sums, counts, strict=True)],
    }

"""The loss of a model on packed rows, by the trainer's own path: what SFT lowers on answers that it never saw.

B rows at once, T tokens a row, N documents (conversations) of all rows, C stretches of a row.

Rows go through the same `collate`, the same attention under their document mask and the same tiled loss as in
`ultralong.training.loop`, so the number is the one that a training step on these rows would log. It is the mean over
targets, as a step's is; its interval is a bootstrap over documents, since tokens of one answer are not independent.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ultralong import attention
from ultralong.attention.register import check_layers
from ultralong.checkpoints.config import head_counts
from ultralong.data.rows.packed_rows import IGNORE, PADDING, PackedRows
from ultralong.data.rows.row_checks import check_vocabulary
from ultralong.evaluation.measures.intervals import bootstrap_ratio
from ultralong.evaluation.measures.result import Part, Result
from ultralong.inference.load import load_model
from ultralong.rope.tables import text_lengths
from ultralong.training.batches import Batch, collate
from ultralong.training.loss import LanguageModelLoss
from ultralong.utils.environment import describe_environment
from ultralong.utils.progress import progress

Compute = Literal["auto", "bfloat16", "float32"]


@dataclass(frozen=True, eq=False)
class RowLoss:
    """Losses of packed rows, document by document.

    Attributes:
        sums: (N,) float64, nats of each document's targets.
        counts: (N,) float64, its targets; 0 where it has none.
        place_sums: (C,) float64, nats of each equal stretch of the row, over all rows.
        place_counts: (C,) float64, its targets.
        rows: Rows read.
        length: T, tokens of a row; 0 where an older record did not say.
    """

    sums: np.ndarray
    counts: np.ndarray
    place_sums: np.ndarray
    place_counts: np.ndarray
    rows: int
    length: int = 0

    @property
    def mean(self) -> float:
        """Nats per target."""
        return float(self.sums.sum() / self.counts.sum())

    def summary(self, seed: int = 0, level: float = 0.95) -> dict[str, Any]:
        """`loss` with `low` and `high`, `targets`, `documents` (those with a target), `rows`, `loss_by_position`.

        Args:
            seed: Seed of the bootstrap over documents.
            level: Confidence of the interval, two-sided.
        """
        low, high = bootstrap_ratio(self.sums[:, None], self.counts[:, None], seed=seed, level=level)
        places = zip(self.place_sums.tolist(), self.place_counts.tolist(), strict=True)
        return {
            "loss": self.mean,
            "low": _number(low[0]),
            "high": _number(high[0]),
            "targets": int(self.counts.sum()),
            "documents": int((self.counts > 0).sum()),
            "rows": self.rows,
            "loss_by_position": [total / count if count else None for total, count in places],
        }

    def result(self, seed: int = 0) -> Result:
        """The mean loss with its interval, and the loss of each stretch of the row (by position, in targets).

        Args:
            seed: Seed of the bootstrap over documents.
        """
        said = self.summary(seed)
        edges = [-(-place * self.length // len(self.place_sums)) for place in range(len(self.place_sums) + 1)]
        parts = tuple(
            Part(float(total / count), int(count), start=edges[place], end=edges[place + 1])
            for place, (total, count) in enumerate(zip(self.place_sums, self.place_counts, strict=True))
            if count
        )
        details = {"documents": said["documents"], "rows": self.rows}
        ends = (said["low"], said["high"])
        return Result(
            "loss",
            "loss",
            self.mean,
            said["targets"],
            "nats per target",
            "targets",
            *ends,
            by_position=parts,
            details=details,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; `RowLoss.from_dict` reads it."""
        arrays = ("sums", "counts", "place_sums", "place_counts")
        return {**{name: getattr(self, name).tolist() for name in arrays}, "rows": self.rows, "length": self.length}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RowLoss:
        """The reverse of `to_dict`."""
        sums, counts, place_sums, place_counts = (
            np.asarray(values[name], float) for name in ("sums", "counts", "place_sums", "place_counts")
        )
        return cls(sums, counts, place_sums, place_counts, int(values["rows"]), int(values.get("length", 0)))


def open_for_loss(model: str | os.PathLike[str], device: str = "auto") -> PreTrainedModel:
    """A checkpoint as the trainer holds it: parameters in float32, attention by this library.

    Args:
        model: Folder or hub id.
        device: `auto`, or any of torch's.

    Raises:
        ValueError: There is no such checkpoint, or no such device.
    """
    return load_model(model, device, torch.float32)


@torch.no_grad()
def row_loss(
    model: PreTrainedModel,
    rows: PackedRows,
    *,
    most: int | None = None,
    micro_batch_size: int = 1,
    places: int = 8,
    tile: int = 2048,
    kernel: str = "auto",
    dtype: Compute = "auto",
    quiet: bool = False,
) -> RowLoss:
    """Loss of every document of packed rows.

    Args:
        model: A causal language model with this library's attention, see `open_for_loss`; put into eval mode.
        rows: Rows of documents or of conversations.
        most: Read only this many rows; None reads all.
        micro_batch_size: Rows of one forward pass.
        places: Equal stretches of the row that are also counted apart, as `position_buckets` of a training run.
        tile: Tokens whose logits exist at a time.
        kernel: Attention kernel.
        dtype: What the forward pass computes in: bfloat16 as a training run does (autocast), or float32; auto is
            bfloat16 on a GPU.
        quiet: True draws no progress bar.

    Returns:
        The losses; a document that lies in several rows counts once for each.

    Raises:
        ValueError: There is no row, no target, a setting below 1, or the rows were made for another vocabulary.
    """
    count = len(rows) if most is None else min(most, len(rows))
    if min(count, micro_batch_size, places) < 1:
        raise ValueError(
            f"At least one row, one row at once and one place are needed, found {count}, {micro_batch_size} "
            f"and {places}."
        )
    check_vocabulary(rows, cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0])
    model.eval()
    loss, low = LanguageModelLoss(model, tile), dtype == "bfloat16" or (dtype == "auto" and model.device.type == "cuda")
    documents: list[tuple[float, float]] = []
    stretches = np.zeros((2, places))
    for first in progress(range(0, count, micro_batch_size), desc="loss", unit="batch", quiet=quiet):
        chosen = [rows[index] for index in range(first, min(first + micro_batch_size, count))]
        batch = collate(chosen, (), rows.mask_documents)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=low):
            losses = _losses(model, loss, batch, kernel).reshape(len(chosen), -1)  # (B, T)
        for row, nats in zip(chosen, losses, strict=True):
            used = (row.labels != IGNORE).astype(float)  # (T,)
            stretch = np.arange(rows.length) * places // rows.length
            stretches += [np.bincount(stretch, nats, places), np.bincount(stretch, used, places)]
            starts = row.boundaries[:-1]
            parts = zip(np.add.reduceat(nats, starts), np.add.reduceat(used, starts), row.document_ids, strict=True)
            documents += [(float(a), float(b)) for a, b, document in parts if document != PADDING]
    sums, counts = np.asarray(documents).T
    if not counts.sum():
        raise ValueError(f"{rows.folder}: none of the {count} rows read has a target.")
    return RowLoss(sums, counts, stretches[0], stretches[1], count, rows.length)


def _losses(model: PreTrainedModel, loss: LanguageModelLoss, batch: Batch, kernel: str) -> np.ndarray:
    """(B * T,) float64 losses of a batch, 0 where there is no target, computed as a training step on one process."""
    extra: dict[str, Any] = {}
    names = ("input_ids", "labels", "position_ids")
    tensors = {name: getattr(batch, name).to(model.device) for name in names}
    tokens = batch.input_ids.numel()
    if batch.boundaries is not None:
        check_layers(model, 1, True)
        heads, kv_heads = head_counts(model.config)
        context = attention.make_attention_context(
            batch.input_ids.shape[1], kernel=kernel, boundaries=batch.boundaries, heads=heads, kv_heads=kv_heads
        )
        tensors["text_lengths"] = text_lengths(tensors["position_ids"])
        padding = {"labels": IGNORE, "text_lengths": 1}  # 0 for all others
        tensors = {name: context.shard(tensor, dim=1, pad=padding.get(name, 0)) for name, tensor in tensors.items()}
        extra = {"attention_context": context}
    _, losses = loss(**tensors, **extra)
    return losses.flatten()[:tokens].double().cpu().numpy()


def loss_change(before: RowLoss, after: RowLoss, *, seed: int = 0, level: float = 0.95) -> dict[str, float | None]:
    """How the mean loss changed between two models on the same rows, with a bootstrap over the documents, paired.

    Args:
        before: Of the first model.
        after: Of the second.
        seed: Seed of the draws.
        level: Confidence, two-sided.

    Returns:
        `change` (after minus before, nats per target), `low` and `high` (None with fewer than two documents), and
        `better`, the share of documents whose own mean loss fell.

    Raises:
        ValueError: They are of different rows.
    """
    if before.counts.shape != after.counts.shape or (before.counts != after.counts).any():
        raise ValueError("The two losses are of different rows: measure both models on the same.")
    known = before.counts > 0
    fell = after.sums[known] < before.sums[known]
    low, high = bootstrap_ratio((after.sums - before.sums)[:, None], before.counts[:, None], seed=seed, level=level)
    return {
        "change": after.mean - before.mean,
        "low": _number(low[0]),
        "high": _number(high[0]),
        "better": float(fell.mean()),
    }


def measure_loss(
    model: str | os.PathLike[str],
    rows: str | os.PathLike[str],
    *,
    before: str | None = None,
    device: str = "auto",
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """What `ultralong eval loss` does: open checkpoints, read rows, give JSON values.

    Args:
        model: Folder or hub id.
        rows: Folder of packed rows.
        before: A second checkpoint that the first is compared with.
        device: `auto`, or any of torch's.
        seed: Seed of the intervals.
        **options: As `row_loss` takes them.

    Returns:
        `model`, `rows_folder`, `environment`, `result` (a `Result` as JSON values), and with `before` its `model` and
        `result`, and `change` as `loss_change` gives it.

    Raises:
        ValueError: As `open_for_loss`, `PackedRows` and `row_loss`.
    """
    packed = PackedRows(rows)
    found = row_loss(open_for_loss(model, device), packed, **options)
    measured: dict[str, Any] = {
        "model": str(model),
        "rows_folder": str(rows),
        "result": found.result(seed).to_dict(),
        "environment": describe_environment(),
    }
    if before is not None:
        first = row_loss(open_for_loss(before, device), packed, **options)
        measured["before"] = {"model": str(before), "result": first.result(seed).to_dict()}
        measured["change"] = loss_change(first, found, seed=seed)
    return measured


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)

"""A data collator that hands a process its part of a row, and the attention context of the whole row.

Legend: T tokens of a row, t tokens that this process holds of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig

from ultralong.attention import make_attention_context
from ultralong.checkpoints.config import head_counts
from ultralong.data.rows.packed_rows import IGNORE
from ultralong.training.parallel import sequence_groups

FOLLOW_LENGTH = {"dynamic", "longrope"}  # their tables depend on the length of the whole row, not of the part


class ContextParallelCollator:
    """Makes the inputs of one forward pass from one row.

    A row has `input_ids`, and `shift_labels` (labels that are shifted already) or `labels` (that are not); without
    either, every token is a target. `boundaries` (cumulative lengths from 0) or `seq_lengths` (as TRL's packing writes)
    keep its documents apart; a target never lies in another document. `position_ids` are 0 to T - 1 by default, and
    start again at each document where there are several.

    Args:
        config: The model's.
        context_parallel_size: Neighbouring processes that share a row.
        scheme: As in `ultralong.attention.make_attention_context`.
        kernel: As there.
        head_chunks: As there.

    Raises:
        ValueError: The model's RoPE follows the length of a text, which a part of a row does not tell.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        context_parallel_size: int = 1,
        scheme: str = "auto",
        kernel: str = "auto",
        head_chunks: int | None = None,
    ) -> None:
        text = config.get_text_config()
        rope: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
        kinds = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
        if followed := kinds & FOLLOW_LENGTH:
            raise ValueError(
                f"rope_type {min(followed)!r} follows the length of a text, of which a process sees a part: train with "
                "`ultralong train`, or extend the model with method yarn, linear, ntk or llama3."
            )
        self.heads, self.kv_heads = head_counts(config)
        self.context_parallel_size = context_parallel_size
        self._options = (scheme, kernel, head_chunks)
        self._group: dist.ProcessGroup | None = None

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The part of a row that this process holds.

        Args:
            features: One row.

        Returns:
            `input_ids`, `labels`, `shift_labels` (which are the same, shifted) and `position_ids`, (1, t) each, and the
            `attention_context`, which the model passes on to its attention layers.

        Raises:
            ValueError: More than one row, boundaries that don't end at T, or heads that can't be split.
        """
        if len(features) != 1:
            raise ValueError(f"per_device_train_batch_size must be 1, found {len(features)}: pack texts into one row.")
        (row,) = features
        ids = _tensor(row["input_ids"])  # (T,)
        edges = _boundaries(row)
        labels = _shifted(row, ids, edges)
        positions = _tensor(row["position_ids"]) if "position_ids" in row else _positions(len(ids), edges)
        scheme, kernel, head_chunks = self._options
        context = make_attention_context(
            len(ids),
            self._own_group(),
            scheme,
            kernel,
            boundaries=edges,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_chunks=head_chunks,
        )
        padded = ((ids, 0), (labels, IGNORE), (positions, 0))
        ids, labels, positions = (context.shard(x[None], dim=1, pad=pad) for x, pad in padded)
        return {
            "input_ids": ids,
            "labels": labels,
            "shift_labels": labels,
            "position_ids": positions,
            "attention_context": context,
        }

    def _own_group(self) -> dist.ProcessGroup | None:
        """The processes that share this one's rows; all processes of the run make the groups together."""
        if self.context_parallel_size > 1 and self._group is None:
            world, rank = dist.get_world_size(), dist.get_rank()
            for ranks in sequence_groups(world, self.context_parallel_size):
                made = dist.new_group(ranks)
                self._group = made if rank in ranks else self._group
        return self._group


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.int64)


def _boundaries(row: Mapping[str, Any]) -> list[int] | None:
    """Cumulative lengths of a row's documents, None where they see each other."""
    if row.get("boundaries") is not None:
        return [int(edge) for edge in row["boundaries"]]
    if row.get("seq_lengths") is not None:
        return [0, *np.cumsum(row["seq_lengths"]).tolist()]
    return None


def _shifted(row: Mapping[str, Any], ids: Tensor, edges: Sequence[int] | None) -> Tensor:
    """For each token its target (T,), -100 for none: a document's last token has none."""
    if row.get("shift_labels") is not None:
        return _tensor(row["shift_labels"])
    labels = ids if row.get("labels") is None else _tensor(row["labels"])
    shifted = torch.cat([labels[1:], labels.new_full((1,), IGNORE)])
    if edges is not None:
        shifted[torch.tensor(edges[1:]) - 1] = IGNORE
    return shifted


def _positions(tokens: int, edges: Sequence[int] | None) -> Tensor:
    """Positions (T,), from 0 in each document."""
    positions = torch.arange(tokens)
    for start, stop in pairwise(edges or ()):
        positions[start:stop] -= start
    return positions

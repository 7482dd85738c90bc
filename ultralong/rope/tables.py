"""RoPE whose frequencies follow the length of a text (longrope, dynamic), kept right where a text is read in parts.

B batch, T tokens, D rotated size.

transformers' rotary modules take the length from the largest position of a forward pass. A pass over a chunk, over one
rank's part of a row, over a batch of unequal texts, or over packed documents then uses another table than a pass over
the whole text would, and keys in a cache keep the one of their own pass. `RopeTables.at` says how long the text is.

Two methods do so: longrope has one set of frequencies up to the original window and one beyond it, dynamic has the
original ones up to its window and others for every length beyond.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Lengths = int | Tensor  # tokens of the text: one number, or one for each token


def text_lengths(position_ids: Tensor) -> Tensor:
    """For each token of packed texts, (B, T), how long its text is: positions that begin again begin another text."""
    flat = position_ids.flatten()
    begins = torch.ones_like(flat, dtype=torch.bool)
    begins[1:] = flat[1:] != flat[:-1] + 1
    text = begins.cumsum(0) - 1  # (B * T,)
    longest = torch.zeros_like(flat).scatter_reduce_(0, text, flat + 1, "amax", include_self=True)
    return longest[text].view_as(position_ids)


class RopeTables:
    """The rotary modules of a model whose frequencies follow the length of a text; none for most models.

    Args:
        model: A model of transformers; its classes stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if _follows_length(module)]

    def same(self, first: int, second: int) -> bool:
        """Whether texts of these numbers of tokens, and so of all between them, have the same frequencies."""
        return all(
            _representative(module, torch.tensor(first)) == _representative(module, torch.tensor(second))
            for module in self._modules
        )

    @contextmanager
    def at(self, lengths: Lengths | None) -> Iterator[None]:
        """Compute the tables of texts of these lengths in all forward passes inside.

        Args:
            lengths: Tokens of the text, or of the text of each token of the pass (B, T); None leaves it to the model.
        """
        handles = (
            []
            if lengths is None
            else [
                module.register_forward_hook(_Tables(torch.as_tensor(lengths)), with_kwargs=True)
                for module in self._modules
            ]
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Tables:
    """A forward hook of a rotary module that gives the tables of texts of these lengths instead of its own."""

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        names = ("x", "position_ids", "layer_type")
        given = dict(zip(names, args, strict=False)) | kwargs
        x, position_ids = given.pop("x"), given.pop("position_ids")
        wanted = _representative(module, self.lengths.to(position_ids.device))
        found: Any = None
        for length in wanted.unique().tolist():
            here = wanted == length  # () or (B, T)
            # One more token, the last of such a text: from its position the module takes the length.
            last = position_ids.new_full((*position_ids.shape[:-1], 1), length - 1)
            positions = torch.cat([position_ids.where(here, 0), last], -1)
            _reset(module)
            parts = module.forward(x, positions, **given)
            parts = tuple(part[..., :-1, :] for part in ((parts,) if isinstance(parts, Tensor) else parts))
            found = parts if found is None else tuple(new.where(here[..., None], old) for new, old in zip(parts, found))
        return found[0] if isinstance(output, Tensor) else found


def _kinds(module: nn.Module) -> dict[str, str]:
    """RoPE methods of a rotary module by the prefix of its buffers: one, or one for each type of layers."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        return {"": kinds}
    return {f"{layers}_": kind for layers, kind in kinds.items()} if isinstance(kinds, dict) else {}


def _follows_length(module: nn.Module) -> bool:
    return any(kind == "longrope" or "dynamic" in kind for kind in _kinds(module).values())


def _representative(module: nn.Module, lengths: Tensor) -> Tensor:
    """A length with the same frequencies, the same for all lengths that have them."""
    kinds = {prefix: kind for prefix, kind in _kinds(module).items() if kind == "longrope" or "dynamic" in kind}
    windows = [_window(module, prefix, kind) for prefix, kind in kinds.items()]
    lengths = lengths.clamp(min=min(windows))
    # Two sets of frequencies for all layers: what is beyond the window is alike.
    return lengths.clamp(max=windows[0] + 1) if list(kinds.values()) == ["longrope"] else lengths


def _window(module: nn.Module, prefix: str, kind: str) -> int:
    """Tokens up to which frequencies do not change."""
    if kind != "longrope":
        return int(module.original_max_seq_len)  # type: ignore[arg-type]  # a number of transformers' own
    entry: Any = module.config.rope_parameters  # type: ignore[union-attr]  # likewise a config
    return int((entry[prefix[:-1]] if prefix else entry)["original_max_position_embeddings"])


def _reset(module: nn.Module) -> None:
    """Forget a longer text, whose frequencies dynamic RoPE would keep."""
    for prefix, kind in _kinds(module).items():
        if "dynamic" in kind:
            original: Any = getattr(module, f"{prefix}original_inv_freq")
            setattr(module, f"{prefix}inv_freq", original.to(getattr(module, f"{prefix}inv_freq").device))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)

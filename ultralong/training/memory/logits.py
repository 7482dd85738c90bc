"""One tile of the head's logits, its normaliser and its gradient: what the tiled loss is made of.

A vocabulary that is no multiple of 8 gets rows of zeros up to the next one. Rows of logits would not begin at addresses
that a GPU's fast kernels for matrix products can read: the 100,278 words of OLMo 3 ran on kernels for the Ampere
generation, at 250 TF/s where 670 are usual, in each of the head's three products
(notebooks/results/models_window_h200.json). The logits of such rows are -inf, so that their probabilities and all
gradients through them are exactly 0.

Legend: m tokens of a tile, V vocabulary, V' its rows with padding, d hidden size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ultralong.utils.compiled import CheckedCompile

MULTIPLE = 8  # elements of two bytes in the 16 bytes that the fast kernels read at once


def aligned_head(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A head (V, d) in `dtype` and with rows of zeros to a multiple of 8: (V', d); a copy only where it must be."""
    words = len(weight)
    rows = -(-words // MULTIPLE) * MULTIPLE
    if rows == words:
        return weight.to(dtype)
    head = weight.new_empty((rows, weight.shape[1]), dtype=dtype)
    head[:words], head[words:] = weight, 0
    return head


def logits_of(hidden: Tensor, head: Tensor, words: int, dtype: torch.dtype) -> Tensor:
    """Logits (m, V') in `dtype` of hidden states (m, d) against an `aligned_head`; -inf beyond its `words`."""
    logits = product(hidden, head.T, dtype)
    if words < len(head):
        logits[:, words:] = -math.inf
    return logits


def product(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix product that comes out in `dtype`: on a GPU straight from the accumulators, unrounded."""
    if first.is_cuda and first.dtype != dtype:
        return torch.mm(first, second, out_dtype=dtype)
    return (first @ second).to(dtype)


def _normaliser(logits: Tensor) -> Tensor:
    return logits.logsumexp(dim=1, keepdim=True)


def _softmax_minus_targets(logits: Tensor, normaliser: Tensor, wanted: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the summed losses by the logits (m, V'), in place: they are not needed any more."""
    softmax = logits.sub_(normaliser).exp_()
    return softmax.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=softmax.dtype)).to(dtype)


def _softmax_minus_targets_compilable(logits: Tensor, normaliser: Tensor, wanted: Tensor, dtype: torch.dtype) -> Tensor:
    softmax = (logits - normaliser).exp()
    words = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(words == wanted, softmax - 1, softmax).to(dtype)


normalise, by_logits = (
    CheckedCompile(_normaliser),
    CheckedCompile(_softmax_minus_targets, _softmax_minus_targets_compilable),
)

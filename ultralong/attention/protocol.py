"""The interfaces that attention contexts and activation stores fill, for annotations.

Legend: B batch, T tokens a process holds, H query heads, K kv heads, D head size.

A transformers model is called with `attention_context=`. What is passed there may be `AttentionContext` (training and
scoring of whole rows), or a context of `ultralong.inference` (prefill and decoding with a KV cache): the attention
function only calls `attend`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from ultralong.attention.scheme import Scheme
    from ultralong.attention.spec import AttentionSpec

OutLse = tuple[Tensor, Tensor]  # attention output (B, T, H, D) and log-sum-exp, what a backward pass starts from


@runtime_checkable
class AttentionContextLike(Protocol):
    """What a model accepts as `attention_context=`: causal attention of this process's tokens."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sink: Tensor | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Attention output (B, T, H, D) of one layer.

        Args:
            q: (B, T, H, D), positions already applied.
            k: (B, T, K, D), of the same tokens.
            v: (B, T, K, D).
            scale: Factor on scores, 1 / sqrt(D) by default.
            window: Sliding window in tokens, the query's own included.
            softcap: Scores become softcap * tanh(score / softcap).
            sink: (H,) logits of one more key with value zero.
            layer: Index of the calling layer, by which a context tells apart what it stores.
        """


@runtime_checkable
class SchemeContext(AttentionContextLike, Protocol):
    """A context that also gives its scheme, for decoder layers that run forward and backward themselves."""

    def scheme_and_spec(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Scheme, AttentionSpec]:
        """The scheme and the attention spec that `attend` would compute with; arguments as for `attend`."""


@runtime_checkable
class AttentionOutputStore(Protocol):
    """Stores attention outputs over a recomputed forward pass, so that attention is computed once.

    Under activation checkpointing a layer's forward runs twice. The first time `pop` has nothing and the result is
    handed to `save`; the second time `pop` gives it back and no kernel and no exchange runs. Where the pair stays in
    between (on the device, in host memory, or nowhere) is up to the store.
    """

    def pop(self, layer: int) -> OutLse | None:
        """The pair (out, lse) of a layer, removed from the store; None when there is none."""

    def save(self, layer: int, out: Tensor, lse: Tensor) -> None:
        """Offer a layer's out (B, T, H, D) and lse; the store may ignore them."""

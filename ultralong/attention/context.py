"""One row's attention context: who holds which tokens, which documents there are, and how attention is computed.

Legend: B batch, T tokens of the row, P ranks, H query heads, K kv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ultralong.attention.balance import sends_nothing
from ultralong.attention.collectives import Group, all_gather
from ultralong.attention.gathered import Gathered
from ultralong.attention.kernels import Kernel, choose_kernel
from ultralong.attention.kv_plan import plan_kv
from ultralong.attention.layout import Layout, held
from ultralong.attention.protocol import AttentionOutputStore
from ultralong.attention.ring import Ring
from ultralong.attention.scheme import Anchored, AnchorPlaces, Local, Scheme, attention
from ultralong.attention.spec import (
    AttentionSpec,
    VarlenSegments,
    check_tensors,
)
from ultralong.attention.ulysses import Ulysses


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """How the attention of one row (or of a batch of rows with the same documents) is distributed over processes.

    Made by `make_attention_context`, passed to an unmodified transformers model as `attention_context=`.

    Attributes:
        tokens: Length of the row, without padding.
        layout: Who holds which tokens.
        process: This process's place in the layout.
        scheme: One of `SCHEMES`.
        kernel: A kernel's name, a kernel, or "auto".
        heads: Query heads H.
        kv_heads: Kv heads K.
        boundaries: Document boundaries when documents don't see each other, else None: every token sees all before it.
        outer: Group of the layout's ranks (None for one rank).
        inner: Group of the sequence-to-head all-to-all (Ulysses; None without).
        head_chunks: Head chunks of Ulysses, of gathered keys, or of one process's backward pass.
        store: Stores attention outputs over recomputed forward passes.
        reason: Why `auto` chose this scheme, and whether there is anything for it to exchange.
        anchors: Tokens that all documents behind them see, up to the next; starts of documents.
    """

    tokens: int
    layout: Layout
    process: int
    scheme: str
    kernel: str | Kernel
    heads: int
    kv_heads: int
    boundaries: tuple[int, ...] | None
    outer: Group | None = None
    inner: Group | None = None
    head_chunks: int = 1
    store: AttentionOutputStore | None = None
    reason: str = ""
    anchors: tuple[int, ...] = ()
    _schemes: dict[Kernel, Scheme] = field(default_factory=dict, repr=False)
    _asked: list[int] = field(default_factory=lambda: [0], repr=False)

    @property
    def size(self) -> int:
        """Number of processes that share the row."""
        return self.layout.ranks * self.layout.inner

    @property
    def local_tokens(self) -> int:
        """Tokens this process holds, padding included."""
        return self.layout.local

    def row_degrees(self, lengths: Sequence[int]) -> list[int]:
        """Processes that compute each of several rows laid end to end, from their lengths."""
        if self.inner is not None and self.exchanges:  # after its all-to-all every process has a part of the heads
            return [self.size] * len(lengths)
        return self.layout.holders(lengths)

    @property
    def kernels_used(self) -> tuple[str, ...]:
        """Names of the kernels that this context's attention has run on so far."""
        return tuple(kernel.name for kernel in self._schemes)

    @contextmanager
    def asked_by_every_layer(self, model: Any) -> Iterator[None]:
        """Check that a forward pass inside asks this context for the attention of every layer of a model.

        One process alone that has no document mask computes whatever a layer is; else a layer that is no attention, or
        whose model does not hand `attention_context` on to it, would be wrong without a word.

        Raises:
            ValueError: Some layers did not ask; names the model.
        """
        before, layers = self._asked[0], model.config.get_text_config().num_hidden_layers
        yield
        asked = self._asked[0] - before
        if asked < layers and (self.size > 1 or self.boundaries is not None):
            raise ValueError(
                f"{type(model).__name__}: {asked} of {layers} layers asked the attention context for their attention. "
                "The others are no attention, or the model's code does not pass attention_context on to them: it can't "
                "be used with rows that are shared by processes or masked by document."
            )

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Positions (1, local tokens) in the row of this process's tokens, for RoPE over the whole row."""
        return self.layout.positions(self.process)[None].to(device)

    def shard(self, x: Tensor, dim: int = 1, pad: float = 0) -> Tensor:
        """This process's tokens of a row that every process has whole.

        Args:
            x: Any tensor with `tokens` along `dim`: input ids, labels, position ids, hidden states.
            dim: The token dimension.
            pad: Value of the tokens past the end (-100 for labels).

        Returns:
            `local_tokens` along `dim`, in the order this process holds them.

        Raises:
            ValueError: `x` has another length along `dim`.
        """
        return self.layout.shard(x, self.process, dim, pad)

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The row in order and without padding, on every process, from everyone's tokens. Without gradient.

        Args:
            x: `local_tokens` along `dim`.
            dim: The token dimension.

        Raises:
            ValueError: `x` has another length along `dim`, or would need a gradient through the gathering.
        """
        if x.shape[dim] != self.local_tokens:
            raise ValueError(
                f"unshard needs {self.local_tokens} local tokens along dimension {dim}, found {x.shape[dim]}"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("unshard has no gradient: call it on x.detach(), or compute the loss on local tokens")
        dim = dim % x.dim()
        x = x.contiguous()
        for group in (self.inner, self.outer):
            if group is not None:
                x = torch.cat(list(all_gather(x, group).wait()), dim)
        return self.layout.restore(x, dim)

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
        """Causal attention of this process's tokens, equal to one process's on the whole row. Differentiable.

        Args:
            q: (B, local tokens, H, D).
            k: (B, local tokens, K, D).
            v: (B, local tokens, K, D).
            scale: Factor on scores, 1 / sqrt(D) by default.
            window: Sliding window in tokens, the query's own included.
            softcap: Scores become softcap * tanh(score / softcap).
            sink: (H,) logits of one more key with value zero.
            layer: Index of the calling layer, for the store.

        Returns:
            (B, local tokens, H, D).

        Raises:
            ValueError: A shape, type or device differs from what the context is for, or no kernel can compute it.
        """
        scheme, spec = self.scheme_and_spec(q, k, v, scale=scale, window=window, softcap=softcap)
        return attention(q, k, v, scheme, spec, sink=sink, store=self.store, layer=layer)

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
        """The scheme and the attention spec that `attend` computes with, for callers that store (out, lse) themselves.

        Args and errors as `attend`'s.
        """
        check_tensors(q, k, v, self.local_tokens, self.heads, self.kv_heads)
        self._asked[0] += 1
        window = None if window is None or window >= self.tokens else window
        spec = AttentionSpec(
            scale=q.shape[-1] ** -0.5 if scale is None else scale, window=window, softcap=softcap or None
        )
        if self.anchors and (window is not None or softcap):
            raise ValueError(f"an anchor can't be joined to a sliding window ({window}) or soft cap ({softcap})")
        return self._scheme(q, spec), spec

    @cached_property
    def exchanges(self) -> bool:
        """Whether processes exchange anything: not one alone, nor where each has whole documents that see no other."""
        if self.boundaries is None or self.size == 1 or self.layout.inner > 1:
            return self.size > 1
        return not sends_nothing(self.layout, self.boundaries)

    @cached_property
    def _segments(self) -> VarlenSegments | None:
        """The row's documents, or this process's where all of them are its own."""
        if self.boundaries is None:
            return None
        if self.exchanges or self.size == 1:
            return VarlenSegments(self.boundaries, self.boundaries)
        (call,) = plan_kv(self.layout.ranges(self.process), self.boundaries).calls
        return call.segments

    @cached_property
    def _anchor_places(self) -> tuple[AnchorPlaces, ...]:
        """Where this process's rank of the first level holds the anchors, and the tokens that see them."""
        edges, own = self.boundaries or (), self.layout.ranges(self.process // self.layout.inner)
        behind = [edges[edges.index(anchor) + 1] for anchor in self.anchors]  # their own document sees them already
        return tuple(
            AnchorPlaces(next((place.start for place in held(own, a, a + 1)), None), held(own, start, stop))
            for a, start, stop in zip(self.anchors, behind, (*self.anchors[1:], self.tokens), strict=True)
        )

    def _scheme(self, q: Tensor, spec: AttentionSpec) -> Scheme:
        bottom_right = self.exchanges and "gathered" in self.scheme
        kernel = choose_kernel(self.kernel, q, spec.with_segments(self._segments), bottom_right=bottom_right)
        if kernel not in self._schemes:
            if not self.exchanges or self.outer is None:
                core: Scheme = Local(kernel, self._segments, self.head_chunks if self.size == 1 else 1)
            elif self.scheme.endswith("ring"):
                core = Ring(self.outer, self.layout, kernel, self.boundaries)
            else:
                chunks = self.head_chunks if self.inner is None else 1
                core = Gathered(self.outer, self.layout, kernel, self.boundaries, chunks)
            if self.anchors:
                inside = self.exchanges and self.inner is not None
                groups = [group for group in (None if inside else self.inner, self.outer) if group is not None]
                core = Anchored(core, self._anchor_places, tuple(groups))
            if self.exchanges and self.inner is not None:
                core = Ulysses(self.inner, core, self.head_chunks)
            self._schemes[kernel] = core
        return self._schemes[kernel]

"""Attention and mask functions of transformers' registries, under the name `ultralong`.

Legend: B batch, T tokens a process holds, T_k keys (cache included), H query heads, K kv heads, D head size.

With `attention_context=` in the model's call, the layer's attention is the context's and no mask is ever built. Without
one it is ordinary attention of one process: causal, with whatever mask and key-value cache transformers has for it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from ultralong.attention.kernels import choose_kernel
from ultralong.attention.protocol import AttentionContextLike
from ultralong.attention.scheme import Local, attention
from ultralong.attention.spec import AttentionSpec

NAME = "ultralong"
SEEN = ("full_attention", "sliding_attention")  # kinds of layers whose keys a context shares out
COUNT_TOKENS = "such layers count tokens, so a skipped stretch would not be there for them"
WITHOUT_STATE = {*SEEN, "attention", "mlp", "moe", "sparse", "dense"}


class DeferredMask:
    """A mask that is only built if a layer turns out to need it, and then once for all layers.

    transformers makes masks before it knows how attention will be computed; at a million tokens a mask is a terabyte.

    Attributes:
        padding: The (B, T_k) mask of real tokens that the caller gave, or None.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._built: Tensor | None = None
        self._is_built = False
        self.padding: Tensor | None = arguments.get("attention_mask")

    @cached_property
    def hides(self) -> bool:
        """Whether the caller's mask hides any token (looked at once, since on a GPU it waits for the device)."""
        return self.padding is not None and not bool(self.padding.all())

    def plain(self, window: int | None) -> bool:
        """Whether it says no more than "causal, in this window, the last query lines up with the last key"."""
        offsets = [self._arguments.get(name, 0) for name in ("q_offset", "kv_offset")]
        if self.hides or not all(isinstance(offset, int) for offset in offsets):
            return False
        ends = [offset + self._arguments[name] for offset, name in zip(offsets, ("q_length", "kv_length"))]
        local = self._arguments.get("local_size")
        unchanged = self._arguments.get("allow_is_causal_skip", False)  # False where transformers has added to it
        causal = self._arguments.get("mask_function") is causal_mask_function if local is None else local == window
        return ends[0] == ends[1] and unchanged and causal

    def build(self) -> Tensor | None:
        """The (B, 1, T, T_k) mask as transformers makes it for sdpa; None where plain causal says it all."""
        if not self._is_built:
            self._built, self._is_built = sdpa_mask(**self._arguments), True
        return self._built


def mask_function(**arguments: Any) -> DeferredMask:
    """What transformers calls to make a mask for `attn_implementation="ultralong"`."""
    return DeferredMask(arguments)


def attention_function(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | DeferredMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    attention_context: AttentionContextLike | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Args:
        module: The attention layer.
        query: (B, H, T, D), positions already applied.
        key: (B, K, T_k, D).
        value: (B, K, T_k, D).
        attention_mask: A mask tensor, a deferred one, or None.
        dropout: Refused under a context.
        scaling: Factor on scores.
        is_causal: Overrides the layer's own.
        attention_context: The context that computes the attention; None for ordinary attention of one process.
        **kwargs: What else the layer passes: `sliding_window`, `softcap`, `s_aux` (sinks), ...

    Returns:
        (B, T, H, D) and None.

    Raises:
        ValueError: The context or the kernel can't honour what the layer asks for; names it.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    query, key, value = _under_autocast(query, key, value)
    if attention_context is not None:
        _refuse(module, key, query, attention_mask, dropout, causal, kwargs)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (B, T, H, D)
        out = attention_context.attend(
            q,
            k,
            v,
            scale=scaling,
            window=kwargs.get("sliding_window"),
            softcap=kwargs.get("softcap"),
            sink=kwargs.get("s_aux"),
            layer=getattr(module, "layer_idx", 0),
        )
        return out, None
    return _ordinary(module, query, key, value, attention_mask, dropout, scaling, causal, kwargs)


def _under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, float32 becomes its type, as for torch's own attention (positions and norms give float32)."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) if x.dtype == torch.float32 else x for x in tensors)


def _refuse(
    module: torch.nn.Module,
    key: Tensor,
    query: Tensor,
    mask: Tensor | DeferredMask | None,
    dropout: float,
    causal: bool,
    kwargs: dict[str, Any],
) -> None:
    """Raise on whatever a context would otherwise silently leave out."""
    name = type(module).__name__
    hidden = mask.hides if isinstance(mask, DeferredMask) else mask is not None
    if hidden:
        raise ValueError(
            f"{name}: an attention_mask with hidden tokens can't be used with an attention context; pass "
            "boundaries to make_attention_context instead (padding at the end of the row needs no mask)"
        )
    if dropout:
        raise ValueError(_dropout(name, dropout))
    if not causal:
        raise ValueError(f"{name}: only causal attention can be distributed, this layer is not causal")
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{name}: a key-value cache can't be used with an attention context (found {key.shape[2]} "
            f"keys for {query.shape[2]} queries); pass use_cache=False"
        )
    for option in ("position_bias", "cache"):
        if kwargs.get(option) is not None:
            raise ValueError(f"{name}: {option} is not supported with an attention context")
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    kind = kinds[module.layer_idx] if kinds and hasattr(module, "layer_idx") else "full_attention"
    if kind not in SEEN:
        raise ValueError(_other_attention(name, kind))
    if kind == "sliding_attention" and kwargs.get("sliding_window") is None:
        raise ValueError(f"{name}: a sliding_attention layer that passes no sliding_window can't be honoured")


def _dropout(name: str, dropout: float) -> str:
    return (
        f"{name}: attention dropout {dropout} is not supported with an attention context; set the config's "
        "attention_dropout to 0"
    )


def _other_attention(name: str, kind: str) -> str:
    return f"{name}: layer type {kind!r} is not supported with an attention context; {' and '.join(SEEN)} are"


def check_full_attention(text: Any, setting: str = "skip_positions_to", reason: str = COUNT_TOKENS) -> None:
    """Refuse a setting that needs full attention in every layer.

    Args:
        text: The config of the model, or of its text part.
        setting: Its name.
        reason: Why other layers cannot have it.

    Raises:
        ValueError: A layer has a sliding window, or is no attention.
    """
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    sliding = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True) is not False
    if kinds or (sliding and not getattr(text, "layer_types", None)):
        found = ", ".join(sorted(kinds)) or "sliding windows"
        raise ValueError(f"{setting} needs full attention in every layer, the model has {found}: {reason}.")


def state_layers(model: PreTrainedModel) -> list[str]:
    """Kinds of a model's layers that carry a state along the row and take no part in attention."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return sorted(kinds - WITHOUT_STATE) or (["recurrent layers"] if getattr(model, "_is_stateful", False) else [])


def check_layers(model: PreTrainedModel, ranks: int, apart: bool) -> None:
    """Refuse a model whose layers could not be given an attention context; only its config and class are looked at.

    Layers that carry a state along the row (linear attention, state-space models, short convolutions) take no part in
    attention: their state would pass from one document to the next, and each rank would begin with an empty one.

    Args:
        model: May be on the meta device.
        ranks: Processes that share a row.
        apart: Rows hold documents that must not see each other.

    Raises:
        ValueError: Names the kind of layer.
    """
    text, name = model.config.get_text_config(), type(model).__name__
    kinds = set(getattr(text, "layer_types", None) or ())
    for kind in sorted(kinds):
        if kind.endswith("_attention") and kind not in (*SEEN, "linear_attention"):
            raise ValueError(_other_attention(name, kind))
    if dropout := getattr(text, "attention_dropout", 0.0):
        raise ValueError(_dropout(name, dropout))
    if (states := state_layers(model)) and (ranks > 1 or apart):
        why = (
            f"a row can't be shared by {ranks} processes (parallel.context_parallel_size)"
            if ranks > 1
            else "documents of a row can't be kept apart: pack them with mask_documents: false, or train another model"
        )
        raise ValueError(f"{name} carries a state along the row ({', '.join(states)}), so {why}.")


def _ordinary(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | DeferredMask | None,
    dropout: float,
    scaling: float | None,
    causal: bool,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """One process's attention: a kernel where the mask is plain causal, else transformers' sdpa with the mask built."""
    window = kwargs.get("sliding_window")
    plain = mask is None if not isinstance(mask, DeferredMask) else mask.plain(window)
    special = any(kwargs.get(option) is not None for option in ("position_bias", "cache"))
    scores = any(kwargs.get(option) is not None for option in ("softcap", "s_aux"))
    if plain and causal and not dropout and not special and (scores or query.shape[2] > 1):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        spec = AttentionSpec(
            scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=kwargs.get("softcap") or None,
            window=None if window is None or window >= k.shape[1] else window,
        )
        kernel = choose_kernel("auto", q, spec, bottom_right=q.shape[1] != k.shape[1])
        return attention(q, k, v, Local(kernel), spec, sink=kwargs.get("s_aux")), None
    if scores:
        raise ValueError(
            f"{type(module).__name__}: soft caps and sinks together with padding, dropout or a static "
            "cache are not supported by 'ultralong' attention; use attn_implementation='eager' instead"
        )
    built = mask.build() if isinstance(mask, DeferredMask) else mask
    return sdpa_attention_forward(
        module, query, key, value, built, dropout=dropout, scaling=scaling, is_causal=causal, **kwargs
    )


def register() -> None:
    """Make `attn_implementation="ultralong"` known to transformers (runs on import of `ultralong.attention`)."""
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)

"""PyTorch's own CUDA kernels: cuDNN, flash and memory-efficient, called so that they give the log-sum-exp.

Legend: B batch, T tokens, H query heads, K kv heads, D head size, N segments.

The operators are private and have changed between releases, so each kernel checks on creation that its operators take
the arguments used here. That is also why dropout's random state is an empty stand-in: nothing here drops anything.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from ultralong.attention.kernels.base import BOTTOM_RIGHT, GQA, VARLEN, WINDOW, Kernel
from ultralong.attention.kernels.reference import Reference
from ultralong.attention.spec import AttentionSpec

log = logging.getLogger(__name__)
_aten = torch.ops.aten

INT32_ELEMENTS = 2**31 - 1
LSE_ALIGNMENT = 32  # the efficient kernel reads its log-sum-exp in blocks of 32 queries
NO_MASK, CAUSAL_BOTTOM_RIGHT = 0, 2  # its names for masks
PLANS = 64  # lengths of causal calls for which cuDNN makes a plan each; later ones share plans
STEPS = 32  # plans from a length to twice that length which they share
TILE = 128  # queries of a block of cuDNN's: less padding than to its multiple spares nothing
PADDED = 2**19  # B H T of the largest call that is padded: the work of larger ones is worth a plan


def _require(operator: str, *names: str) -> None:
    """Check that an operator exists and has arguments of these names."""
    if not torch.cuda.is_available():
        raise ValueError(f"torch's {operator} needs a CUDA GPU, and torch {torch.__version__} finds none")
    schema = getattr(_aten, operator).default._schema if hasattr(_aten, operator) else None
    missing = set(names) - {argument.name for argument in schema.arguments} if schema else set(names)
    if missing:
        raise ValueError(
            f"torch {torch.__version__} has no {operator} with {', '.join(sorted(missing))}; "
            "choose another kernel, or a torch between 2.11 and 2.13"
        )


class TorchFlash(Kernel):
    """FlashAttention-2 as torch carries it: packed rows, grouped heads and sliding windows, no extra package."""

    name = "flash"
    device = "cuda"
    features = frozenset({GQA, VARLEN, BOTTOM_RIGHT, WINDOW})
    max_elements = INT32_ELEMENTS
    rounds_per_query_head = True

    def __init__(self) -> None:
        _require("_flash_attention_forward", "cum_seq_q", "cum_seq_k", "window_size_left", "scale")
        _require("_flash_attention_backward", "cum_seq_q", "cum_seq_k", "rng_state", "window_size_left", "scale")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """The operator takes (B, T, H, D), or (T, H, D) with the segments' edges."""
        if spec.segments is None:
            out, lse, *_ = _aten._flash_attention_forward(
                q, k, v, None, None, q.shape[1], k.shape[1], 0.0, spec.causal, False, **_options(spec)
            )
            return out, lse
        edges, longest = spec.segments.cu_seqlens(q.device), (spec.segments.max_seqlen_q, spec.segments.max_seqlen_k)
        out, lse, *_ = _aten._flash_attention_forward(
            q[0], k[0], v[0], *edges, *longest, 0.0, spec.causal, False, **_options(spec)
        )
        return out[None], lse[None]  # (1, T, H, D), (1, H, T)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mirror of `forward`."""
        state = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        tensors = [x.contiguous() for x in (dout, q, k, v, out, lse)]
        if spec.segments is None:
            dq, dk, dv = _aten._flash_attention_backward(
                *tensors, None, None, q.shape[1], k.shape[1], 0.0, spec.causal, *state, **_options(spec)
            )
            return dq, dk, dv
        edges, longest = spec.segments.cu_seqlens(q.device), (spec.segments.max_seqlen_q, spec.segments.max_seqlen_k)
        grads = _aten._flash_attention_backward(
            *(x[0] for x in tensors), *edges, *longest, 0.0, spec.causal, *state, **_options(spec)
        )
        dq, dk, dv = (grad[None] for grad in grads)
        return dq, dk, dv


def _options(spec: AttentionSpec) -> dict[str, float | int]:
    if spec.window is None:
        return {"scale": spec.scale}
    right = {"window_size_right": 0} if spec.causal else {"window_size_right": -1}
    return {"scale": spec.scale, "window_size_left": spec.window - 1, **right}


class TorchCudnn(Kernel):
    """cuDNN's fused attention: Hopper speed without an extra package; one unpacked segment a call.

    Its plan for a backward call is looked up by the strides of q, k and v alone, so out, dout and lse are always given
    in one layout. It refuses a single query with a single key: single queries go to the reference, in float32. Of a
    tensor of 2^32 elements its dq was wrong (torch 2.11, cuDNN 9.19, H200), so heads are taken in groups below 2^31.

    torch makes a plan for each shape and stride that it meets, which takes the host tens of milliseconds (pytorch PR
    155958), and packed rows have documents of ever new lengths. So a run's first lengths have plans of their own, and
    later ones are padded with zeros up to a length that others share. Padded keys come after all queries that count,
    and padded queries have no gradient, so the result is the same.
    """

    name = "cudnn"
    device = "cuda"
    head_sizes = (128, 8)
    max_elements = INT32_ELEMENTS
    rounds_per_query_head = True

    def __init__(self) -> None:
        _require("_scaled_dot_product_cudnn_attention", "compute_log_sumexp", "is_causal", "scale")
        _require("_scaled_dot_product_cudnn_attention_backward", "logsumexp", "attn_bias", "cum_seq_q", "scale")
        if not torch.backends.cudnn.is_available():
            raise ValueError("torch was built without cuDNN: choose another kernel")
        self._planned = set[tuple[int, ...]]()  # before the kernel is tried below
        self.features = frozenset({GQA})
        if not _agrees(self):
            log.info("cuDNN's grouped heads don't work here: kv heads are repeated")
            self.features = frozenset()

    def _padding(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> int:
        """Tokens to be added to a call, so that it shares its plan with others."""
        rows, tokens, heads = q.shape[:3]
        if not spec.causal or k.shape[1] != tokens or rows * tokens * heads > PADDED:
            return 0
        kind = (rows, tokens, heads, *k.shape[2:])
        if kind in self._planned or len(self._planned) < PLANS:
            self._planned.add(kind)
            return 0
        return -tokens % max(TILE, (1 << tokens.bit_length() - 1) // STEPS)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """The operator takes (B, H, T, D) in any strides."""
        if q.shape[1] == 1:
            return Reference().forward(q, k, v, spec)
        tokens, padding = q.shape[1], self._padding(q, k, spec)
        q, k, v = (_one_layout(x, padding) for x in (q, k, v))
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            None,
            True,
            0.0,
            spec.causal,
            False,
            scale=spec.scale,
        )
        return out.transpose(1, 2)[:, :tokens], lse.flatten(2)[:, :, :tokens]  # lse comes as (B, H, T, 1)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mirror of `forward`."""
        if q.shape[1] == 1:
            return Reference().backward(dout, q, k, v, out, lse, spec)
        padding = self._padding(q, k, spec)
        dout, q, k, v, out = (_one_layout(x, padding) for x in (dout, q, k, v, out))
        lse = torch.nn.functional.pad(lse, (0, padding)) if padding else lse
        seed = torch.zeros(1, dtype=torch.int64, device=q.device)
        dout, out = (x.contiguous().transpose(1, 2) for x in (dout, out))
        grads = _aten._scaled_dot_product_cudnn_attention_backward(
            dout,
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            out,
            lse.contiguous().unsqueeze(-1),
            seed,
            seed,
            None,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            spec.causal,
            scale=spec.scale,
        )
        dq, dk, dv = (grad.transpose(1, 2)[:, : grad.shape[2] - padding] for grad in grads)
        return dq, dk, dv


def _one_layout(x: Tensor, padding: int) -> Tensor:
    """X (B, T, H, D) with zeros behind it, or as it is; of one row in the same strides whatever it was a part of."""
    if padding:
        return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding))
    return x[0][None] if x.shape[0] == 1 else x


def _agrees(kernel: Kernel) -> bool:
    """Whether a kernel computes a small call with grouped heads as the reference does, gradients too."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        torch.manual_seed(0)
        q, dout = (torch.randn(1, 128, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        k, v = (torch.randn(1, 128, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    spec = AttentionSpec(scale=0.125)
    try:
        out, lse = kernel.forward(q, k, v, spec)
        mine = (out, lse, *kernel.backward(dout, q, k, v, out, lse, spec))
    except RuntimeError:
        return False
    expected, expected_lse = Reference().forward(q.float(), k.float(), v.float(), spec)
    theirs = (
        expected,
        expected_lse,
        *Reference().backward(dout.float(), q.float(), k.float(), v.float(), expected, expected_lse, spec),
    )
    return all(a.shape == b.shape and (a.float() - b).abs().max() < 0.05 * b.abs().max() for a, b in zip(mine, theirs))


class TorchEfficient(Kernel):
    """torch's memory-efficient kernel: the fast one for float32 on a GPU."""

    name = "efficient"
    device = "cuda"
    dtypes = frozenset({torch.float16, torch.bfloat16, torch.float32})
    features = frozenset({BOTTOM_RIGHT})
    max_elements = INT32_ELEMENTS

    def __init__(self) -> None:
        _require("_efficient_attention_forward", "custom_mask_type", "compute_log_sumexp", "scale")
        _require("_efficient_attention_backward", "custom_mask_type", "logsumexp", "scale")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """The operator takes (B, T, H, D) and pads its log-sum-exp."""
        mask = CAUSAL_BOTTOM_RIGHT if spec.causal else NO_MASK
        out, lse, *_ = _aten._efficient_attention_forward(
            q, k, v, None, None, None, q.shape[1], k.shape[1], 0.0, mask, True, scale=spec.scale
        )
        return out, lse[:, :, : q.shape[1]]

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mirror of `forward`; padded queries get an infinite log-sum-exp, hence no probability."""
        padding = -q.shape[1] % LSE_ALIGNMENT
        statistic = torch.nn.functional.pad(lse, (0, padding), value=math.inf).contiguous()
        mask = CAUSAL_BOTTOM_RIGHT if spec.causal else NO_MASK
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv, _ = _aten._efficient_attention_backward(
            dout.contiguous(),
            q,
            k,
            v,
            None,
            out.contiguous(),
            None,
            None,
            q.shape[1],
            k.shape[1],
            statistic,
            0.0,
            seed,
            seed,
            mask,
            False,
            scale=spec.scale,
        )
        return dq, dk, dv

"""The backward pass of one call in parts of its heads, one after another.

Legend: B batch, T tokens, H query heads, K kv heads, D head size.

A kernel adds dq, and of grouped heads dk and dv, in float32 buffers that are twice their size: for Llama-3.1-8B at
524,288 tokens 12 GiB beside 6 GiB of gradients. Heads don't meet in attention, so the buffers need only exist for a
part of them at a time.
"""

from __future__ import annotations

from torch import Tensor

from ultralong.attention.kernels.backward import attention_backward
from ultralong.attention.kernels.base import Kernel
from ultralong.attention.spec import AttentionSpec


def backward_in_head_chunks(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    chunks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_backward`, a few kv heads and their query heads at a time.

    Args:
        kernel: Who computes.
        dout: (B, T, H, D).
        q: (B, T, H, D).
        k: (B, T, K, D).
        v: (B, T, K, D).
        out: (B, T, H, D).
        lse: (B, H, T).
        spec: The call's spec.
        chunks: In how many parts; divides K.

    Returns:
        The gradients of q, k and v.
    """
    if chunks == 1:
        return attention_backward(kernel, dout, q, k, v, out, lse, spec)
    heads, kv_heads = q.shape[2] // chunks, k.shape[2] // chunks
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    for chunk in range(chunks):
        of_q, of_kv = (slice(chunk * n, (chunk + 1) * n) for n in (heads, kv_heads))
        # Copies: a kernel is then called as for a model of fewer heads, whatever strides it knows.
        dout_part, q_part, out_part = (x[:, :, of_q].contiguous() for x in (dout, q, out))
        k_part, v_part = (x[:, :, of_kv].contiguous() for x in (k, v))
        lse_part = lse[:, of_q].contiguous()
        found = attention_backward(kernel, dout_part, q_part, k_part, v_part, out_part, lse_part, spec)
        del dout_part, q_part, k_part, v_part, out_part, lse_part
        for total, part, place in zip(grads, found, (of_q, of_kv, of_kv), strict=True):
            total[:, :, place] = part
        del found, part  # before the next chunk's
    return grads

"""The GPU kernels' calls without a GPU: stand-ins with the packages' and torch's own argument lists, computed plainly.

Each stand-in takes exactly the arguments that the real function takes, in its order, its layout and its alignment of a
causal mask, so that a wrong order, name, shape or missing transposition gives a wrong number or a TypeError here.
"""

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
from attention_yardstick import plain_attention, random_qkv, relative, visible

from ultralong.attention.kernels import (
    attention_backward,
    attention_forward,
    backward_accumulate,
    backward_with_partials,
    flash_attn,
    flash_attn_4,
    flash_attn_4_hooks,
    partials_at,
    torch_cuda,
)
from ultralong.attention.kernels.base import SOFTCAP, WINDOW
from ultralong.attention.kernels.head_chunks import backward_in_head_chunks
from ultralong.attention.kernels.reference import Reference
from ultralong.attention.spec import AttentionSpec, VarlenSegments

PLAIN = Reference()


def for_each_segment(function, tensors, edges, spec):
    """Run on packed (T, heads, D) tensors, piece by piece: queries' side first where `edges` has two lists."""
    results = []
    for (a, b), (c, d) in zip(*(pairwise(side.tolist()) for side in edges)):
        cut = [x[..., slice(*(c, d) if on_keys else (a, b)), :, :] for x, on_keys in tensors]
        results.append(function([x[None] for x in cut], (a, b), spec))
    return results


def forward(q, k, v, spec, edges=None):
    """(B, T, H, D) or, with edges, (T, H, D); lse (B, H, T) or (H, T)."""
    if edges is None:
        return PLAIN.forward(q, k, v, spec)
    parts = for_each_segment(lambda x, _, r: PLAIN.forward(*x, r), [(q, 0), (k, 1), (v, 1)], edges, spec)
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], 1)


def backward(dout, q, k, v, out, lse, spec, edges=None):
    assert all(x.is_contiguous() for x in (dout, out, lse))
    if edges is None:
        return PLAIN.backward(dout, q, k, v, out, lse, spec)
    parts = for_each_segment(
        lambda x, at, r: PLAIN.backward(*x, lse[None, :, slice(*at)], r),
        [(dout, 0), (q, 0), (k, 1), (v, 1), (out, 0)],
        edges,
        spec,
    )
    return tuple(torch.cat([grads[i][0] for grads in parts]) for i in range(3))


def spec_of(scale, causal, left=-1, right=-1, softcap=0.0):
    left = -1 if left is None else left
    assert right in (None, -1, 0)
    assert left == -1 or causal or right != 0
    return AttentionSpec(scale=scale, causal=causal, window=None if left < 0 else left + 1, softcap=softcap or None)


def edges_of(cu_q, cu_k, max_seqlen_q, max_seqlen_k):
    if cu_q is None:
        return None
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (max_seqlen_q, max_seqlen_k) == (cu_q.diff().max().item(), cu_k.diff().max().item())
    return cu_q, cu_k


# --- flash-attn 4 ---


def fa4_forward(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    softcap=None,
    window_size_left=None,
    window_size_right=None,
    tile_mn=None,
    return_lse=False,
):
    TILES.append(tile_mn)
    edges = edges_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = forward(q, k, v, spec_of(softmax_scale, causal, window_size_left, window_size_right, softcap), edges)
    return out, lse if return_lse else None, None, None, None


TILES: list = []  # that calls were given or chose


@dataclass(frozen=True)
class Tile:
    m_block_size: int
    n_block_size: int = 128
    dQ_swapAB: bool = False
    num_stages_dO: int = 2


def _tile_size_bwd_sm90(head_dim, head_dim_v, causal, local, sparse_block_size_q=None):
    return Tile(64)


def fa4_backward(
    q,
    k,
    v,
    out,
    dout,
    lse,
    softmax_scale=None,
    causal=False,
    softcap=0.0,
    window_size_left=None,
    window_size_right=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    dq=None,
    dk=None,
    dv=None,
):
    """With grouped heads dK and dV go through buffers of sums, as in the package."""
    TILES.append(_tile_size_bwd_sm90(q.shape[-1], v.shape[-1], causal, False, sparse_block_size_q=None))
    edges = edges_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    spec = spec_of(softmax_scale, causal, window_size_left, window_size_right, softcap)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grads = backward(*(x.to(wide) for x in (dout, q, k, v, out)), lse, spec, edges)
    dq, dk, dv = (torch.empty_like(x) if y is None else y for x, y in zip((q, k, v), (dq, dk, dv)))
    if q.shape[-2] == k.shape[-2]:
        return tuple(place.copy_(grad) for place, grad in zip((dq, dk, dv), grads))
    _bwd_postprocess_convert(grads[0], dq, 1.0, cu_seqlens_q, None, 90, None, 64, 64, 256, 1, False)
    for place, grad, scale in ((dk, grads[1], softmax_scale), (dv, grads[2], 1.0)):
        sums = hopper_sums(grad / scale, cu_seqlens_k)
        _bwd_postprocess_convert(
            sums, place, scale, cu_seqlens_k, None, 90, None, q.shape[-1], 128, 256, 2, False, cluster_size=1
        )
    return dq, dk, dv


def hopper_sums(grad, cu_seqlens):
    """Buffers (B, K, n), or (K, n) packed, of (B, T, K, D) or (T, K, D): blocks of 128 keys, pieces padded to them.

    A warp group has 64 keys; of its 64 x 8 columns, thread `lane` of warp `warp` holds rows `16 warp + lane // 4` and 8
    more, columns `2 (lane % 4)` and the next (PTX's figure of the D fragment of wgmma.m64nNk16), four numbers a thread.
    """
    if cu_seqlens is None and grad.dim() == 4:
        return torch.stack([hopper_sums(row, None) for row in grad])
    tokens, heads, size = grad.shape
    edges = (0, tokens) if cu_seqlens is None else cu_seqlens.tolist()
    total = tokens if cu_seqlens is None else tokens + len(edges) * 128 - 1
    buffer = grad.new_full((heads, -(-total // 128) * 128 * size), float("nan"))
    for piece, (start, stop) in enumerate(pairwise(edges)):
        first = (start + 128 * piece) // 128 * 128
        buffer[:, first * size : (first + -(-(stop - start) // 128) * 128) * size] = 0.0
        row, column = torch.meshgrid(torch.arange(stop - start), torch.arange(size), indexing="ij")
        group, warp, half = row // 64, row % 64 // 16, row % 16 // 8
        lane, register = row % 8 * 4 + column % 8 // 2, 2 * half + column % 2
        at = 64 * size * group + 512 * (column // 8) + 4 * (32 * warp + lane) + register
        buffer[:, (first * size + at).flatten()] = grad[start:stop].transpose(0, 1).flatten(1)
    return buffer


def _bwd_postprocess_convert(
    accum,
    output,
    scale,
    cu_seqlens,
    seqused,
    arch,
    dtype,
    hdim,
    block_size,
    num_threads,
    atom_layout,
    swap_ab,
    use_2cta_instrs=False,
    cluster_size=1,
):
    """Scales, rounds and puts in order: looked up, where the buffer is one of sums."""
    if block_size != 128:
        output.copy_(accum)
        return
    places = torch.arange(1, output.numel() // output.shape[-2] + 1, dtype=torch.float64)
    order = hopper_sums(places.view(*output.shape[:-2], 1, output.shape[-1]), cu_seqlens)
    flat = order.flatten(0, -2)[0]
    found = flat.nan_to_num(0.0) > 0  # what is not padding
    for row, of_row in zip(output if output.dim() == 4 else [output], accum if accum.dim() == 3 else [accum]):
        values = torch.empty_like(of_row[:, found])
        values[:, (flat[found] - 1).long()] = of_row[:, found] * scale
        row.copy_(values.unflatten(1, (-1, row.shape[-1])).transpose(0, 1))


# --- flash-attn 3 ---


def fa3_forward(
    q,
    k,
    v,
    k_new=None,
    v_new=None,
    qv=None,
    out_=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    cu_seqlens_k_new=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    softmax_scale=None,
    causal=False,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
):
    edges = edges_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = forward(q, k, v, spec_of(softmax_scale, causal, window_size_left, window_size_right, softcap), edges)
    return out, lse, torch.empty(0), torch.empty(0)


def fa3_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    sequed_q=None,
    sequed_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    dq=None,
    dk=None,
    dv=None,
    softmax_scale=None,
    is_causal=False,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    deterministic=False,
    sm_margin=0,
):
    edges = edges_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    spec = spec_of(softmax_scale, is_causal, window_size_left, window_size_right, softcap)
    for place, grad in zip((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, spec, edges)):
        place.copy_(grad)


def fa3_old_forward(
    q,
    k,
    v,
    k_new,
    v_new,
    qv,
    out,
    cu_seqlens_q,
    cu_seqlens_k,
    cu_seqlens_k_new,
    seqused_q,
    seqused_k,
    max_seqlen_q=None,
    max_seqlen_k=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
):
    edges = edges_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return forward(q, k, v, spec_of(softmax_scale, causal, *window_size, softcap), edges)


def fa3_old_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    cu_seqlens_q,
    cu_seqlens_k,
    sequed_q,
    sequed_k,
    max_seqlen_q,
    max_seqlen_k,
    dq,
    dk,
    dv,
    softmax_scale,
    causal,
    window_size=(-1, -1),
    softcap=0.0,
):
    edges = edges_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    spec = spec_of(softmax_scale, causal, *window_size, softcap)
    for place, grad in zip((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, spec, edges)):
        place.copy_(grad)


# --- flash-attn 2 ---


def fa2_forward(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    return_softmax,
):
    assert dropout_p == 0.0
    assert alibi_slopes is None
    spec = spec_of(softmax_scale, causal, window_size_left, window_size_right, softcap)
    return *forward(q, k, v, spec), torch.empty(0), None


def fa2_varlen_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
):
    edges = edges_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    spec = spec_of(softmax_scale, causal, window_size_left, window_size_right, softcap)
    return *forward(q, k, v, spec, edges), torch.empty(0), None


def fa2_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
):
    spec = spec_of(softmax_scale, causal, window_size_left, window_size_right, softcap)
    for place, grad in zip((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, spec)):
        place.copy_(grad)


def fa2_varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
):
    edges = edges_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    spec = spec_of(softmax_scale, causal, window_size_left, window_size_right, softcap)
    for place, grad in zip((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, spec, edges)):
        place.copy_(grad)


# --- torch ---


def torch_flash_forward(
    query,
    key,
    value,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
):
    assert (dropout_p, return_debug_mask) == (0.0, False)
    edges = edges_of(cum_seq_q, cum_seq_k, max_q, max_k)
    spec = spec_of(scale, is_causal, window_size_left, window_size_right)
    return *forward(query, key, value, spec, edges), None, None, None


def torch_flash_backward(
    grad_out,
    query,
    key,
    value,
    out,
    logsumexp,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    rng_state,
    unused,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
):
    assert dropout_p == 0.0
    edges = edges_of(cum_seq_q, cum_seq_k, max_q, max_k)
    spec = spec_of(scale, is_causal, window_size_left, window_size_right)
    return backward(grad_out, query, key, value, out, logsumexp, spec, edges)


def cudnn_forward(
    query,
    key,
    value,
    attn_bias,
    compute_log_sumexp,
    dropout_p=0.0,
    is_causal=False,
    return_debug_mask=False,
    *,
    scale=None,
):
    assert (attn_bias, compute_log_sumexp, dropout_p, return_debug_mask) == (None, True, 0.0, False)
    assert not is_causal or query.shape[2] == key.shape[2], "cuDNN's causal mask is aligned at the top left"
    out, lse = forward(*(x.transpose(1, 2) for x in (query, key, value)), spec_of(scale, is_causal))
    return out.transpose(1, 2), lse.unsqueeze(-1), *[None] * 7


def cudnn_backward(
    grad_out,
    query,
    key,
    value,
    out,
    logsumexp,
    philox_seed,
    philox_offset,
    attn_bias,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    *,
    scale=None,
):
    assert (attn_bias, cum_seq_q, cum_seq_k, dropout_p) == (None, None, None, 0.0)
    assert (max_q, max_k) == (query.shape[2], key.shape[2])
    assert logsumexp.shape == (*query.shape[:3], 1)
    tensors = [x.transpose(1, 2) for x in (grad_out, query, key, value, out)]
    return tuple(x.transpose(1, 2) for x in backward(*tensors, logsumexp.squeeze(-1), spec_of(scale, is_causal)))


def efficient_forward(
    query,
    key,
    value,
    bias,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    custom_mask_type,
    compute_log_sumexp=False,
    *,
    scale=None,
):
    assert (bias, cu_seqlens_q, cu_seqlens_k, dropout_p, compute_log_sumexp) == (None, None, None, 0.0, True)
    assert query.shape[2] == key.shape[2], "this kernel wants as many kv heads"
    out, lse = forward(query, key, value, spec_of(scale, custom_mask_type == 2))
    return out, torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=float("nan")), None, None, None, None


def efficient_backward(
    grad_out_,
    query,
    key,
    value,
    bias,
    out,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    logsumexp,
    dropout_p,
    philox_seed,
    philox_offset,
    custom_mask_type,
    bias_requires_grad,
    *,
    scale=None,
):
    assert logsumexp.shape[2] % 32 == 0
    assert logsumexp[:, :, query.shape[1] :].isinf().all()
    lse = logsumexp[:, :, : query.shape[1]].contiguous()
    return *backward(grad_out_, query, key, value, out, lse, spec_of(scale, custom_mask_type == 2)), None


STAND_INS = {
    "flash4": SimpleNamespace(
        _flash_attn_fwd=fa4_forward, _flash_attn_bwd=fa4_backward, _bwd_postprocess_convert=_bwd_postprocess_convert
    ),
    "flash3": SimpleNamespace(_flash_attn_forward=fa3_forward, _flash_attn_backward=fa3_backward),
    "flash3-old": SimpleNamespace(_flash_attn_forward=fa3_old_forward, _flash_attn_backward=fa3_old_backward),
    "flash2": SimpleNamespace(
        _flash_attn_forward=fa2_forward,
        _flash_attn_backward=fa2_backward,
        _flash_attn_varlen_forward=fa2_varlen_forward,
        _flash_attn_varlen_backward=fa2_varlen_backward,
    ),
    "torch": SimpleNamespace(
        _flash_attention_forward=torch_flash_forward,
        _flash_attention_backward=torch_flash_backward,
        _scaled_dot_product_cudnn_attention=cudnn_forward,
        _scaled_dot_product_cudnn_attention_backward=cudnn_backward,
        _efficient_attention_forward=efficient_forward,
        _efficient_attention_backward=efficient_backward,
    ),
}
CLASSES = {
    "flash4": flash_attn_4.FlashAttn4,
    "flash3": flash_attn.FlashAttn3,
    "flash3-old": flash_attn.FlashAttn3,
    "flash2": flash_attn.FlashAttn2,
    "flash": torch_cuda.TorchFlash,
    "cudnn": torch_cuda.TorchCudnn,
    "efficient": torch_cuda.TorchEfficient,
}


@pytest.fixture(params=CLASSES)
def kernel(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if request.param in STAND_INS:
        monkeypatch.setattr(flash_attn_4, "kept_kernels", nullcontext)
        for module in (flash_attn, flash_attn_4):
            monkeypatch.setattr(module, "import_package", lambda *_: STAND_INS[request.param])
    else:
        monkeypatch.setattr(torch_cuda, "_aten", STAND_INS["torch"])
        monkeypatch.setattr(torch_cuda, "_require", lambda *_: None)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(torch_cuda, "_agrees", lambda _: True)
    return CLASSES[request.param]()


EDGES = ((0, 1, 9, 10, 30), (0, 1, 12, 13, 37))


PIECES = (((0, 30), (0, 30), 2), ((0, 30), (0, 37), 2), (EDGES[0], EDGES[0], 1), (*EDGES, 1), (*EDGES, 2))


def test_a_gpu_kernel_is_called_as_it_wants_to_be(kernel):
    tried = 0
    for causal, pieces, window, softcap in product((True, False), PIECES, (None, 6), (None, 1.5)):
        allowed = (not window or (causal and WINDOW in kernel.features)) and (not softcap or SOFTCAP in kernel.features)
        if allowed:
            compare(kernel, causal, *pieces, window, softcap)
            tried += 1
    assert tried == 10 * (1.5 if WINDOW in kernel.features else 1) * (2 if SOFTCAP in kernel.features else 1)


def compare(kernel, causal, edges_q, edges_k, batch, window, softcap):
    q, k, v, dout = random_qkv(0, batch, edges_q[-1], edges_k[-1], 4, 2, 8)
    spec = AttentionSpec(scale=0.4, causal=causal, window=window, softcap=softcap).with_segments(
        VarlenSegments(edges_q, edges_k)
    )
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    seen = visible(edges_q[-1], edges_k[-1], causal=causal, window=window, edges_q=edges_q, edges_k=edges_k)
    expected, expected_lse = plain_attention(*leaves, seen, scale=0.4, softcap=softcap)
    expected.backward(dout)
    out, lse = attention_forward(kernel, q, k, v, spec)
    grads = attention_backward(kernel, dout, q, k, v, out, lse, spec)
    wanted = (expected.detach(), expected_lse.detach(), *(x.grad for x in leaves))
    for found, right in zip((out, lse, *grads), wanted):
        assert found.shape == right.shape
        assert relative(found, right) <= 1e-12
    for found, right in zip(backward_in_head_chunks(kernel, dout, q, k, v, out, lse, spec, 2), wanted[2:]):
        assert found.is_contiguous()
        assert relative(found, right) <= 1e-12


LONG = ((0, 1, 130, 300), (0, 1, 200, 460))


@pytest.mark.parametrize(
    ("edges", "batch", "heads"),
    [(((0, 300), (0, 460)), 2, (4, 2)), (LONG, 1, (4, 2)), (LONG, 2, (6, 2)), (((0, 300), (0, 460)), 1, (4, 4))],
)
def test_shares_of_several_calls_add_up(kernel, edges, batch, heads):
    """What is there already stays, and what is added is the gradient."""
    q, k, v, dout = random_qkv(0, batch, edges[0][-1], edges[1][-1], *heads, 32)
    spec = AttentionSpec(scale=0.4).with_segments(VarlenSegments(*edges, frozenset({1})))
    out, lse = attention_forward(kernel, q, k, v, spec)
    wanted = attention_backward(kernel, dout, q, k, v, out, lse, spec)
    for _ in range(2):
        row = torch.ones(2, batch, k.shape[1] + 5, *k.shape[2:], dtype=torch.float64)
        dq = backward_accumulate(kernel, dout, q, k, v, out, lse, spec, row[0][:, 3:-2], row[1][:, 3:-2])
        assert (row[:, :, :3] == 1).all()
        assert (row[:, :, -2:] == 1).all()
        for found, right in zip((dq, *(row[:, :, 3:-2] - 1)), wanted):
            assert relative(found, right) <= 1e-12


@pytest.mark.parametrize(
    ("shared", "batch", "heads"),
    [(None, 1, (4, 2)), ((), 1, (4, 2)), ((1,), 1, (4, 2)), ((0, 2), 1, (4, 4)), ((1,), 2, (4, 2))],
)
def test_shares_stand_apart_from_what_is_final(kernel, shared, batch, heads):
    """Keys of shared pieces have a share, the others their gradient; the two fill dK and dV."""
    q, k, v, dout = random_qkv(0, batch, LONG[0][-1], LONG[1][-1], *heads, 32)
    spec = AttentionSpec(scale=0.4, segments=VarlenSegments(*LONG, None if shared is None else frozenset(shared)))
    out, lse = attention_forward(kernel, q, k, v, spec)
    wanted = attention_backward(kernel, dout, q, k, v, out, lse, spec)
    dq, dk, dv, shares = backward_with_partials(kernel, dout, q, k, v, out, lse, spec)
    own = [slice(*LONG[1][i : i + 2]) for i in range(3) if shared is not None and i not in shared]
    if shared == ():
        assert not shares
    if batch == 1 and not kernel.rounds_per_query_head:
        assert all(
            relative(found[:, keys], right[:, keys]) <= 1e-12
            for found, right in zip((dk, dv), wanted[1:])
            for keys in own
        )
        of_shares, settled = (
            {key for keys in places for key in range(460)[keys]} for places in ([keys for keys, *_ in shares], own)
        )
        assert not of_shares & settled
    for keys, *sums in shares:
        one_key = slice(keys.stop - 1, keys.stop)
        assert all(torch.equal(part, total[:, -1:]) for part, total in zip(partials_at(shares, one_key), sums))
        for found, total in zip((dk, dv), sums):
            assert total.dtype == torch.float64
            found[:, keys] = total
    with pytest.raises(LookupError, match="keys 460 to 461 have no partial gradients; there are"):
        partials_at(shares, slice(460, 461))
    for found, right in zip((dq, dk, dv), wanted):
        assert relative(found, right) <= 1e-12


@pytest.mark.parametrize("kernel", ["flash4"], indirect=True)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_flash_attn_4s_shares_are_added_before_it_rounds_them(kernel, size, caplog):
    """With grouped heads and shared pieces the sum of two calls is as near as float32 makes it; else it is not."""
    errors = {}
    for name, heads, shared in (
        ("grouped", (4, 2), None),
        ("shared", (4, 2), frozenset({0, 1, 2})),
        ("own", (4, 2), frozenset()),
        ("alone", (2, 2), None),
    ):
        q, k, v, dout = random_qkv(1, 1, 300, 460, *heads, size, torch.bfloat16)
        spec = (
            AttentionSpec(scale=0.1)
            if name in ("grouped", "alone")
            else AttentionSpec(scale=0.1, segments=VarlenSegments(*LONG, shared))
        )
        cuts = [AttentionSpec(scale=r.scale, segments=r.segments, softcap=c) for r, c in ((spec, None), (spec, 2.0))]
        total, apart, exact = (torch.zeros(2, *k.shape, dtype=t) for t in 2 * [torch.float32] + [torch.float64])
        for cut in cuts:
            out, lse = attention_forward(kernel, q.double(), k.double(), v.double(), cut)
            low = [x.bfloat16() for x in (dout, q, k, v, out)]
            kernel.backward_accumulate(*low, lse.float(), cut, *total)
            kernel.backward_accumulate(*(x.double() for x in low), lse, cut, *exact)
            if name == "shared":
                apart += torch.stack(
                    [
                        torch.cat(side, 1)
                        for side in list(zip(*kernel.backward_with_partials(*low, lse.float(), cut)[3]))[1:]
                    ]
                )
        errors[name] = ((total - exact).norm() / exact.norm()).item()
        assert name != "shared" or relative(apart, exact) < 1e-6
    assert max(errors["grouped"], errors["shared"]) < 1e-6
    assert min(errors["own"], errors["alone"]) > 1e-3
    assert not caplog.records


@pytest.mark.parametrize("kernel", ["flash4"], indirect=True)
def test_an_unknown_order_of_flash_attn_4s_sums_is_noticed(kernel, monkeypatch, caplog):
    monkeypatch.setitem(globals(), "hopper_sums", lambda grad, edges: hopper_sums_before(grad, edges).roll(1, -1))
    q, k, v, dout = random_qkv(1, 1, 128, 128, 4, 2, 32)
    spec = AttentionSpec(scale=0.1)
    out, lse = attention_forward(kernel, q, k, v, spec)
    total = torch.zeros(2, *k.shape, dtype=torch.float64)
    for times in (1, 2):
        kernel.backward_accumulate(dout, q, k, v, out, lse, spec, *total)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        wanted = kernel.backward(dout, q, k, v, out, lse, spec)[1:]
        assert all(relative(found, times * right) <= 1e-12 for found, right in zip(total, wanted))


hopper_sums_before = hopper_sums

USUAL, LARGER = [None, Tile(64)], [(128, 160), Tile(80, dQ_swapAB=True, num_stages_dO=1)]
BETWEEN = [USUAL[0], LARGER[1]]
HALVES = VarlenSegments((0, 100, 200), (0, 100, 300))  # as zigzag cuts a row: 50 and 150 keys in the mean


@pytest.mark.parametrize("kernel", ["flash4"], indirect=True)
@pytest.mark.parametrize(
    ("tokens", "size", "spec", "capability", "tiles"),
    [
        (200, 128, AttentionSpec(scale=0.1), (9, 0), LARGER),
        (198, 128, AttentionSpec(scale=0.1), (9, 0), BETWEEN),
        (100, 128, AttentionSpec(scale=0.1), (9, 0), BETWEEN),
        (98, 128, AttentionSpec(scale=0.1), (9, 0), USUAL),
        (200, 128, AttentionSpec(scale=0.1, segments=HALVES), (9, 0), LARGER),
        (200, 128, AttentionSpec(scale=0.1, segments=VarlenSegments((0, 100, 200), (0, 100, 298))), (9, 0), BETWEEN),
        (200, 128, AttentionSpec(scale=0.1), (10, 0), USUAL),
        (200, 64, AttentionSpec(scale=0.1), (9, 0), USUAL),
        (200, 128, AttentionSpec(scale=0.1, causal=False), (9, 0), USUAL),
        (200, 128, AttentionSpec(scale=0.1, window=199), (9, 0), USUAL),
        (200, 128, AttentionSpec(scale=0.1, softcap=2.0), (9, 0), USUAL),
    ],
)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_flash_attn_4_has_larger_tiles_where_queries_see_many_keys(
    kernel, tokens, size, spec, capability, tiles, kv_heads, monkeypatch
):
    monkeypatch.setattr(flash_attn_4_hooks, "FORWARD_KEYS", 100)
    monkeypatch.setattr(flash_attn_4_hooks, "BACKWARD_KEYS", 50)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    q, k, v, dout = random_qkv(
        1, 1, tokens, spec.segments.k[-1] if spec.segments else tokens, 2, kv_heads, size, torch.float64
    )
    TILES.clear()
    out, lse = kernel.forward(q, k, v, spec)
    kernel.backward(dout, q, k, v, out, lse, spec)
    assert tiles == TILES
    kernel.backward_accumulate(dout, q, k, v, out, lse, spec, torch.zeros_like(k), torch.zeros_like(v))
    assert TILES[2:] == tiles[1:]
    assert fa4_backward.__globals__["_tile_size_bwd_sm90"](128, 128, True, False) == Tile(64), "the package's own stays"


def test_the_larger_tiles_can_be_had_on_a_short_row():
    q, k, _, _ = random_qkv(1, 1, 8, 8, 2, 1, 128)
    with flash_attn_4_hooks.tiles_everywhere():
        assert flash_attn_4_hooks.sees_many_keys(q, k, AttentionSpec(scale=0.1), 5)
        assert not flash_attn_4_hooks.sees_many_keys(q, k, AttentionSpec(scale=0.1, window=4), 4)
    assert not flash_attn_4_hooks.sees_many_keys(q, k, AttentionSpec(scale=0.1), 5)
    assert flash_attn_4_hooks.sees_many_keys(q, k, AttentionSpec(scale=0.1), 4)


def test_a_backward_function_that_chooses_otherwise_is_left_alone():
    assert flash_attn_4_hooks.with_tiles(fa3_backward) is fa3_backward
    assert flash_attn_4_hooks.with_tiles(print) is print


@pytest.mark.parametrize("name", STAND_INS["torch"].__dict__)
def test_stand_ins_of_torch_have_torchs_arguments(name):
    schema = getattr(torch.ops.aten, name).default._schema
    mine = inspect.signature(STAND_INS["torch"].__dict__[name]).parameters.values()
    positional = [p.name for p in mine if p.kind is not p.KEYWORD_ONLY]
    assert positional == [a.name for a in schema.arguments if not a.kwarg_only]
    assert {p.name for p in mine if p.kind is p.KEYWORD_ONLY} <= {a.name for a in schema.arguments if a.kwarg_only}

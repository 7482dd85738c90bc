"""The GPU kernels' calls without a GPU: stand-ins with the packages' and torch's own argument lists, computed plainly.

Each stand-in takes exactly the arguments that the real function takes, in its order, its layout and its alignment of a
causal mask, so that a wrong order, name, shape or missing transposition gives a wrong number or a TypeError here.
"""

import inspect
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
from attention_yardstick import plain_attention, random_qkv, relative, visible

from ultralong.attention.kernels import attention_backward, attention_forward, flash_attn, torch_cuda
from ultralong.attention.kernels.base import SOFTCAP, WINDOW
from ultralong.attention.kernels.reference import Reference
from ultralong.attention.rule import Rule, Spans

PLAIN = Reference()


def each_piece(function, tensors, edges, rule):
    """Run on packed (T, heads, D) tensors, piece by piece: queries' side first where `edges` has two lists."""
    results = []
    for (a, b), (c, d) in zip(*(pairwise(side.tolist()) for side in edges)):
        cut = [x[..., slice(*(c, d) if on_keys else (a, b)), :, :] for x, on_keys in tensors]
        results.append(function([x[None] for x in cut], (a, b), rule))
    return results


def forward(q, k, v, rule, edges=None):
    """(B, T, H, D) or, with edges, (T, H, D); lse (B, H, T) or (H, T)."""
    if edges is None:
        return PLAIN.forward(q, k, v, rule)
    parts = each_piece(lambda x, _, r: PLAIN.forward(*x, r), [(q, 0), (k, 1), (v, 1)], edges, rule)
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], 1)


def backward(dout, q, k, v, out, lse, rule, edges=None):
    assert all(x.is_contiguous() for x in (dout, out, lse))
    if edges is None:
        return PLAIN.backward(dout, q, k, v, out, lse, rule)
    parts = each_piece(lambda x, at, r: PLAIN.backward(*x, lse[None, :, slice(*at)], r),
                       [(dout, 0), (q, 0), (k, 1), (v, 1), (out, 0)], edges, rule)
    return tuple(torch.cat([grads[i][0] for grads in parts]) for i in range(3))


def rule_of(scale, causal, left=-1, right=-1, softcap=0.0):
    left = -1 if left is None else left
    assert right in (None, -1, 0)
    assert left == -1 or causal or right != 0
    return Rule(scale=scale, causal=causal, window=None if left < 0 else left + 1, softcap=softcap or None)


def edges_of(cu_q, cu_k, max_q, max_k):
    if cu_q is None:
        return None
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (max_q, max_k) == (cu_q.diff().max().item(), cu_k.diff().max().item())
    return cu_q, cu_k


# --- flash-attn 4 ---


def fa4_forward(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
                max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None,
                causal=False, softcap=None, window_size_left=None, window_size_right=None, return_lse=False):
    edges = edges_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = forward(q, k, v, rule_of(softmax_scale, causal, window_size_left, window_size_right, softcap), edges)
    return out, lse if return_lse else None, None, None, None


def fa4_backward(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
                 window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None):
    edges = edges_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    rule = rule_of(softmax_scale, causal, window_size_left, window_size_right, softcap)
    return backward(dout, q, k, v, out, lse, rule, edges)


# --- flash-attn 3 ---


def fa3_forward(q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
                cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
                softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0):
    edges = edges_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = forward(q, k, v, rule_of(softmax_scale, causal, window_size_left, window_size_right, softcap), edges)
    return out, lse, torch.empty(0), torch.empty(0)


def fa3_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
                 max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
                 window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0):
    edges = edges_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    rule = rule_of(softmax_scale, is_causal, window_size_left, window_size_right, softcap)
    for place, grad in zip((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, rule, edges)):
        place.copy_(grad)


def fa3_old_forward(q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
                    max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None, causal=False, window_size=(-1, -1),
                    softcap=0.0):
    edges = edges_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return forward(q, k, v, rule_of(softmax_scale, causal, *window_size, softcap), edges)


def fa3_old_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q,
                     max_seqlen_k, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0):
    edges = edges_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    rule = rule_of(softmax_scale, causal, *window_size, softcap)
    for place, grad in zip((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, rule, edges)):
        place.copy_(grad)


# --- flash-attn 2 ---


def fa2_forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
                return_softmax):
    assert dropout_p == 0.0
    assert alibi_slopes is None
    rule = rule_of(softmax_scale, causal, window_size_left, window_size_right, softcap)
    return *forward(q, k, v, rule), torch.empty(0), None


def fa2_varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
                       causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
                       return_softmax=False):
    edges = edges_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    rule = rule_of(softmax_scale, causal, window_size_left, window_size_right, softcap)
    return *forward(q, k, v, rule, edges), torch.empty(0), None


def fa2_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
                 window_size_right, softcap, alibi_slopes, deterministic, rng_state=None):
    rule = rule_of(softmax_scale, causal, window_size_left, window_size_right, softcap)
    for place, grad in zip((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, rule)):
        place.copy_(grad)


def fa2_varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
                        alibi_slopes, deterministic, rng_state=None):
    edges = edges_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    rule = rule_of(softmax_scale, causal, window_size_left, window_size_right, softcap)
    for place, grad in zip((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, rule, edges)):
        place.copy_(grad)


# --- torch ---


def torch_flash_forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask,
                        *, scale=None, window_size_left=None, window_size_right=None):
    assert (dropout_p, return_debug_mask) == (0.0, False)
    edges = edges_of(cum_seq_q, cum_seq_k, max_q, max_k)
    rule = rule_of(scale, is_causal, window_size_left, window_size_right)
    return *forward(query, key, value, rule, edges), None, None, None


def torch_flash_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
                         is_causal, rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None):
    assert dropout_p == 0.0
    edges = edges_of(cum_seq_q, cum_seq_k, max_q, max_k)
    rule = rule_of(scale, is_causal, window_size_left, window_size_right)
    return backward(grad_out, query, key, value, out, logsumexp, rule, edges)


def cudnn_forward(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False,
                  return_debug_mask=False, *, scale=None):
    assert (attn_bias, compute_log_sumexp, dropout_p, return_debug_mask) == (None, True, 0.0, False)
    assert not is_causal or query.shape[2] == key.shape[2], "cuDNN's causal mask is aligned at the top left"
    out, lse = forward(*(x.transpose(1, 2) for x in (query, key, value)), rule_of(scale, is_causal))
    return out.transpose(1, 2), lse.unsqueeze(-1), *[None] * 7


def cudnn_backward(grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q,
                   cum_seq_k, max_q, max_k, dropout_p, is_causal, *, scale=None):
    assert (attn_bias, cum_seq_q, cum_seq_k, dropout_p) == (None, None, None, 0.0)
    assert (max_q, max_k) == (query.shape[2], key.shape[2])
    assert logsumexp.shape == (*query.shape[:3], 1)
    tensors = [x.transpose(1, 2) for x in (grad_out, query, key, value, out)]
    return tuple(x.transpose(1, 2) for x in backward(*tensors, logsumexp.squeeze(-1), rule_of(scale, is_causal)))


def efficient_forward(query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                      custom_mask_type, compute_log_sumexp=False, *, scale=None):
    assert (bias, cu_seqlens_q, cu_seqlens_k, dropout_p, compute_log_sumexp) == (None, None, None, 0.0, True)
    assert query.shape[2] == key.shape[2], "this kernel wants as many kv heads"
    out, lse = forward(query, key, value, rule_of(scale, custom_mask_type == 2))
    return out, torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=float("nan")), None, None, None, None


def efficient_backward(grad_out_, query, key, value, bias, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                       logsumexp, dropout_p, philox_seed, philox_offset, custom_mask_type, bias_requires_grad, *,
                       scale=None):
    assert logsumexp.shape[2] % 32 == 0
    assert logsumexp[:, :, query.shape[1]:].isinf().all()
    lse = logsumexp[:, :, : query.shape[1]].contiguous()
    return *backward(grad_out_, query, key, value, out, lse, rule_of(scale, custom_mask_type == 2)), None


STAND_INS = {
    "flash4": SimpleNamespace(_flash_attn_fwd=fa4_forward, _flash_attn_bwd=fa4_backward),
    "flash3": SimpleNamespace(_flash_attn_forward=fa3_forward, _flash_attn_backward=fa3_backward),
    "flash3-old": SimpleNamespace(_flash_attn_forward=fa3_old_forward, _flash_attn_backward=fa3_old_backward),
    "flash2": SimpleNamespace(_flash_attn_forward=fa2_forward, _flash_attn_backward=fa2_backward,
                              _flash_attn_varlen_forward=fa2_varlen_forward,
                              _flash_attn_varlen_backward=fa2_varlen_backward),
    "torch": SimpleNamespace(_flash_attention_forward=torch_flash_forward,
                             _flash_attention_backward=torch_flash_backward,
                             _scaled_dot_product_cudnn_attention=cudnn_forward,
                             _scaled_dot_product_cudnn_attention_backward=cudnn_backward,
                             _efficient_attention_forward=efficient_forward,
                             _efficient_attention_backward=efficient_backward),
}
CLASSES = {"flash4": flash_attn.FlashAttn4, "flash3": flash_attn.FlashAttn3, "flash3-old": flash_attn.FlashAttn3,
           "flash2": flash_attn.FlashAttn2, "flash": torch_cuda.TorchFlash, "cudnn": torch_cuda.TorchCudnn,
           "efficient": torch_cuda.TorchEfficient}


@pytest.fixture(params=CLASSES)
def kernel(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if request.param in STAND_INS:
        monkeypatch.setattr(flash_attn, "_import", lambda *_: STAND_INS[request.param])
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
    rule = Rule(scale=0.4, causal=causal, window=window, softcap=softcap).with_spans(Spans(edges_q, edges_k))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    seen = visible(edges_q[-1], edges_k[-1], causal=causal, window=window, edges_q=edges_q, edges_k=edges_k)
    expected, expected_lse = plain_attention(*leaves, seen, scale=0.4, softcap=softcap)
    expected.backward(dout)
    out, lse = attention_forward(kernel, q, k, v, rule)
    grads = attention_backward(kernel, dout, q, k, v, out, lse, rule)
    wanted = (expected.detach(), expected_lse.detach(), *(x.grad for x in leaves))
    for found, right in zip((out, lse, *grads), wanted):
        assert found.shape == right.shape
        assert relative(found, right) <= 1e-12


@pytest.mark.parametrize("name", STAND_INS["torch"].__dict__)
def test_stand_ins_of_torch_have_torchs_arguments(name):
    schema = getattr(torch.ops.aten, name).default._schema
    mine = inspect.signature(STAND_INS["torch"].__dict__[name]).parameters.values()
    positional = [p.name for p in mine if p.kind is not p.KEYWORD_ONLY]
    assert positional == [a.name for a in schema.arguments if not a.kwarg_only]
    assert {p.name for p in mine if p.kind is p.KEYWORD_ONLY} <= {a.name for a in schema.arguments if a.kwarg_only}

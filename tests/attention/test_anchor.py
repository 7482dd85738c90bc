"""Anchors: one shared token for masked documents, exact in every scheme against attention written out with its mask."""

import pytest
import torch
import torch.distributed as dist
from attention_yardstick import plain_attention, random_qkv, relative, visible
from torch.distributed.device_mesh import init_device_mesh

from ultralong.attention import make_attention_context
from ultralong.utils.local_ranks import run_ranks

ROWS = {  # boundaries, anchors
    "one anchor": ((0, 7, 8, 30, 45, 61), (0,)),
    "two rows end to end": ((0, 7, 20, 34, 41, 61), (0, 34)),
    "first documents alone": ((0, 40, 61), (0, 40)),
    "equal documents": (tuple(range(0, 65, 8)), (0, 32)),
}


def seen_with_anchors(edges, anchors):
    seen = visible(edges[-1], edges[-1], edges_q=edges, edges_k=edges)
    for anchor, end in zip(anchors, (*anchors[1:], edges[-1]), strict=True):
        seen[anchor:end, anchor] = True
    return seen


def errors(group, scheme, heads, kv_heads, head_chunks, dtype, sink):
    """Largest relative error of output and gradients over all ranks, for each row."""
    found = {}
    for name, (edges, anchors) in ROWS.items():
        inputs = random_qkv(3, 1, edges[-1], edges[-1], heads, kv_heads, 8, dtype)
        leaves = [x.double().clone().requires_grad_() for x in inputs[:3]]
        sinks = torch.linspace(-2, 2, heads, dtype=torch.float64) if sink else None
        out, _ = plain_attention(*leaves, seen_with_anchors(edges, anchors), sink=sinks)
        out.backward(inputs[3].double())
        expected = [out.detach(), *(x.grad for x in leaves)]
        context = make_attention_context(
            edges[-1], group, scheme, boundaries=edges, heads=heads, kv_heads=kv_heads, head_chunks=head_chunks,
            anchors=anchors,
        )  # fmt: skip
        own = [context.shard(x).clone().requires_grad_() for x in inputs[:3]]
        mine = context.attend(*own, sink=None if sinks is None else sinks.to(dtype))
        mine.backward(context.shard(inputs[3]))
        parts = [mine.detach(), *(x.grad for x in own)]
        worst = max(relative(context.unshard(a).double(), b) for a, b in zip(parts, expected, strict=True))
        if dist.is_initialized():
            total = torch.tensor(worst, dtype=torch.float64)
            dist.all_reduce(total, dist.ReduceOp.MAX)
            worst = total.item()
        found[name, context.exchanges] = worst
    return found


def test_one_process_with_every_kind_of_heads():
    for heads, kv_heads in ((4, 4), (8, 2), (6, 1)):
        for dtype, most in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
            assert max(errors(None, "auto", heads, kv_heads, None, dtype, heads == 8).values()) <= most
    unlike = seen_with_anchors(*ROWS["one anchor"]) ^ visible(
        61, 61, edges_q=ROWS["one anchor"][0], edges_k=ROWS["one anchor"][0]
    )
    assert unlike.sum() == 61 - 7  # every token of the later documents sees one key more


def shared(rank, world, shape):
    if shape is None:
        group, schemes = dist.group.WORLD, ("ulysses", "gathered", "ring")
    else:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("hosts", "gpus"))
        group, schemes = mesh, ("hybrid-gathered", "hybrid-ring")
    return {
        (scheme, heads, chunks): errors(group, scheme, heads, kv_heads, chunks, torch.float64, heads == 8)
        for scheme in schemes
        for heads, kv_heads, chunks in ((8, 4, None), (4, 1, None), *([(8, 4, 2)] if scheme != "ring" else []))
    }


@pytest.mark.parametrize(("world", "shape"), [(2, None), pytest.param(4, None, marks=pytest.mark.soak), (4, (2, 2))])
def test_every_scheme_equals_the_written_out_mask(world, shape):
    found = run_ranks(shared, world, shape)[0]
    assert max(worst for errors_ in found.values() for worst in errors_.values()) <= 1e-12
    # Rows of equal documents are shared out whole: only the anchors travel.
    assert {exchanges for errors_ in found.values() for _, exchanges in errors_} == {True, False}


def test_what_cannot_be_an_anchor_is_named():
    def make(**options):
        return make_attention_context(61, boundaries=(0, 7, 61), heads=2, **options)

    for anchors in ((3,), (7, 0), (0, 0), (61,)):
        with pytest.raises(ValueError, match="rising starts of documents"):
            make(anchors=anchors)
    q, k, v, _ = random_qkv(0, 1, 61, 61, 2, 2, 8)
    for options in ({"window": 5}, {"softcap": 3.0}):
        with pytest.raises(ValueError, match="an anchor can't be joined"):
            make(anchors=(0,)).attend(q, k, v, **options)
    # One document alone sees its first token as it is.
    alone = make_attention_context(61, heads=2, anchors=(0,))
    torch.testing.assert_close(alone.attend(q, k, v), make_attention_context(61, heads=2).attend(q, k, v))

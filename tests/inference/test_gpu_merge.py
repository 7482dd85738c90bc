"""Ranks' parts of attention joined by Triton: equal bits whether they were gathered or lie in several memories."""

import re

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
HEADS, SIZES, RANKS = 32, (64, 80, 128), (2, 4, 8)
LAYER = 3  # parts begin behind those of so many layers


def emulated(ranks, size, batch=2):
    """Parts (P, B H D + B H) as ranks would send them, and the shape (B, H, D).

    Log-sum-exps are near each other, so that every part counts, or far apart. Of one sequence the last rank holds
    nothing; elsewhere a rank holds no key of some rows, and in one row nobody does.
    """
    draw = torch.Generator().manual_seed(ranks * size)
    shape = torch.Size((batch, HEADS, size))
    lses = torch.randn(ranks, *shape[:-1], generator=draw)
    lses *= 10.0 ** torch.randint(-1, 2, shape[:-1], generator=draw)
    lses[torch.rand(lses.shape, generator=draw) < 0.1] = -float("inf")
    lses[-1, -1] = -float("inf")
    lses[:, 0, 5] = -float("inf")
    outs = torch.randn(ranks, *shape, generator=draw).where(lses[..., None] > -float("inf"), 0.0)
    return torch.cat([outs.flatten(1), lses.flatten(1)], 1), shape


def apart(parts):
    """A memory for each rank, with the part behind those of other layers, and a table of their addresses (P,)."""
    memories = [torch.cat([torch.full((LAYER * len(part),), torch.nan), part]).cuda() for part in parts]
    return memories, torch.tensor([memory.data_ptr() for memory in memories], device="cuda")


def bits(x):
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def in_float64(parts, shape):
    outs, lses = parts.double().split([shape.numel(), shape[:-1].numel()], 1)
    weights = torch.exp2(lses - lses.max(0).values.nan_to_num(neginf=0.0))
    total = weights.sum(0).clamp(min=1e-30).view(shape[:-1])
    return (outs.view(-1, *shape) * weights.view(-1, *shape[:-1], 1)).sum(0) / total[..., None]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ranks", RANKS)
def test_parts_of_many_memories_join_to_the_bits_of_gathered_ones(ranks, size, dtype):
    from ultralong.inference.decode_step.peer_merge import merge_at, merge_gathered

    parts, shape = emulated(ranks, size)
    memories, addresses = apart(parts)
    gathered = merge_gathered(parts.cuda(), shape, dtype)
    read = merge_at(addresses, LAYER * parts.shape[1], shape, dtype)
    assert torch.equal(bits(read), bits(gathered))
    assert (read[0, 5] == 0).all()
    expected = in_float64(parts, shape)
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}[dtype]
    assert ((read.cpu().double() - expected).abs() <= rounding * expected.abs() + 1e-5).all()
    assert len(memories) == ranks  # they lived until here


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("ranks", RANKS)
def test_bits_do_not_follow_the_number_of_warps(ranks):
    from ultralong.inference.decode_step import peer_merge

    parts, shape = emulated(ranks, 128)
    memories, addresses = apart(parts)
    gathered, start = parts.cuda(), LAYER * parts.shape[1]
    found = []
    for warps in (1, 2, 4):
        given = (shape, torch.float32)
        found.append(peer_merge._launch(addresses, start, 0, *given, peers=True, warps=warps))
        found.append(peer_merge._launch(gathered, 0, gathered.stride(0), *given, peers=False, warps=warps))
    assert all(torch.equal(bits(found[0]), bits(x)) for x in found)
    assert len(memories) == ranks


def compiled(kernel, kinds, fixed, warps, by_16=0):
    """PTX of a kernel for an H100 or H200, with so many first arguments divisible by 16. Compiling takes no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {(len(kinds) + number,): value for number, value in enumerate(fixed.values())}
    attributes = {(number,): [["tt.divisibility", 16]] for number in range(by_16)}
    kinds = kinds | dict.fromkeys(fixed, "constexpr")
    source = ASTSource(kernel, signature=kinds, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def floats(ptx):
    """The float32 instructions in their order, without registers."""
    return re.findall(r"\b(?:fma|mul|add|sub|div|ex2|max|min|neg|cvt)\.[a-z0-9_.]*f32[a-z0-9_.]*", ptx)


def arithmetic(parts, size, peers, warps, aligned):
    """The float32 instructions of the compiled kernel."""
    from ultralong.inference.decode_step.peer_merge import _join

    names = ("start", "stride", "rows")
    kinds = {"parts_at": "*i64" if peers else "*fp32", "out_at": "*bf16"} | dict.fromkeys(names, "i32")
    fixed = {"D": size, "PARTS": parts, "WIDTH": min(size & -size, 32), "PEERS": peers}
    return floats(compiled(_join, kinds, fixed, warps, 5 if aligned else 0))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ranks", RANKS)
def test_both_ways_compile_to_the_same_arithmetic(ranks, size):
    pytest.importorskip("triton", reason="compiles with Triton")
    expected = arithmetic(ranks, size, True, 1, True)
    assert not [one for one in expected if one.startswith("fma")]
    assert [one.startswith("mul") for one in expected].count(True) == ranks  # outs times weights; none is lost
    for peers in (True, False):
        for warps in (1, 4):
            for aligned in (True, False):
                assert arithmetic(ranks, size, peers, warps, aligned) == expected, (peers, warps, aligned)

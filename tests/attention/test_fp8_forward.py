"""Far keys in FP8: blocks and merging against exact attention, and what quantising costs."""

from __future__ import annotations

import importlib.metadata
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ultralong.attention.kernels import choose_kernel
from ultralong.attention.kernels.fallbacks import attention_forward
from ultralong.attention.kernels.fp8 import Fp8Forward
from ultralong.attention.kernels.fp8_blocks import Fp8Keys, merge_keys, quantise_keys, quantise_queries, vendor_kernel
from ultralong.attention.kernels.reference import Reference
from ultralong.attention.spec import AttentionSpec, VarlenSegments

SIZE = 128
SCALE = SIZE**-0.5


def dequantised(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, scale: float):
    """What the vendor's kernel computes, in float32, from what it is given: probabilities in e4m3 of 256 times."""
    queries = q.float() * q_scale.unsqueeze(-1)
    keys = k.float() * k_scale.repeat_interleave(16, -1).unsqueeze(-1)
    scores = queries @ keys.transpose(-1, -2) * scale
    top = scores.amax(-1, keepdim=True)
    p = torch.exp(scores - top)
    rounded = (p * 256).to(torch.float8_e4m3fn).float() / 256
    out = rounded @ (v.float() * v_scale.unsqueeze(-1)).transpose(-1, -2) / p.sum(-1, keepdim=True)
    return out.to(torch.bfloat16), scores.logsumexp(-1)


def inputs(tokens: int, keys: int, heads: int = 4, kv_heads: int = 2, batch: int = 1, seed: int = 0) -> list[Tensor]:
    make = torch.Generator().manual_seed(seed)
    shapes = (batch, tokens, heads, SIZE), (batch, keys, kv_heads, SIZE), (batch, keys, kv_heads, SIZE)
    q, k, v = (torch.randn(shape, generator=make) for shape in shapes)
    return [q, k + 3 * torch.randn(SIZE, generator=make), v]  # keys with a mean, as real ones have


def kernel(queries: int = 128, keys: int = 256) -> Fp8Forward:
    return Fp8Forward(Reference(), dequantised, queries, keys)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("tokens", "keys"), [(512, 512), (300, 700), (384, 1000), (129, 641), (1, 513)])
def test_near_exact_attention(tokens: int, keys: int, causal: bool) -> None:
    q, k, v = inputs(tokens, keys)
    spec = AttentionSpec(SCALE, causal)
    wanted, wanted_lse = Reference().forward(q, k, v, spec)
    found, lse = kernel().forward(q, k, v, spec)
    assert found.shape == wanted.shape
    assert lse.shape == wanted_lse.shape
    assert lse.dtype == torch.float32
    assert 1e-4 < error(found, wanted) < 0.06  # e4m3 has 3 bits of mantissa: rounded by up to 1 part in 16
    assert (lse - wanted_lse).abs().max() < 0.12


def test_blocks_and_merging_are_exact_apart_from_rounding_the_parts() -> None:
    def exact(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, scale: float):
        queries = q.float() * q_scale.unsqueeze(-1)
        keys = k.float() * k_scale.repeat_interleave(16, -1).unsqueeze(-1)
        scores = queries @ keys.transpose(-1, -2) * scale
        return scores.softmax(-1) @ (v.float() * v_scale.unsqueeze(-1)).transpose(-1, -2), scores.logsumexp(-1)

    q, k, v = inputs(640, 640)
    # Numbers that e4m3 holds, with scales that are powers of two, lose nothing on the way.
    q, k, v = (
        torch.randint(-8, 9, x.shape, generator=torch.Generator().manual_seed(i)).float() / 8
        for i, x in enumerate((q, k, v))
    )
    for x in (q, k, v):
        x[..., 0] = 7.0 / 8 * 448 / 448
    quantised = quantise_keys(k, v)
    lossless = Fp8Keys(
        k.transpose(1, 2).mul(8).to(torch.float8_e4m3fn),
        torch.full_like(quantised.k_scale, 0.125),
        v.permute(0, 2, 3, 1).mul(8).to(torch.float8_e4m3fn),
        torch.full_like(quantised.v_scale, 0.125),
        torch.zeros_like(quantised.mean),
    )
    spec = AttentionSpec(SCALE, causal=False)
    for most in (128, 256, 384, 1024):
        out, lse = torch.zeros(q.shape), torch.full((1, 4, 640), -torch.inf)
        merge_keys(exact_queries(exact), out, lse, q, lossless, 512, SCALE, most)
        wanted, wanted_lse = Reference().forward(q, k[:, :512], v[:, :512], spec)
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)


def exact_queries(kernel):
    """A block kernel that gets queries as they are: their quantising is undone, as eighths are exact in bfloat16."""

    def call(q: Tensor, q_scale: Tensor, *rest):
        whole = (q.float() * q_scale.unsqueeze(-1) * 8).round() / 8
        return kernel(whole, torch.ones_like(q_scale), *rest)

    return call


def test_a_key_that_every_query_looks_for_is_found_among_all_blocks() -> None:
    tokens, planted = 1024, 37
    q, k, v = inputs(tokens, tokens)
    direction = torch.nn.functional.normalize(torch.randn(SIZE, generator=torch.Generator().manual_seed(9)), dim=0)
    q = q * 0.3 + 20 * direction
    k[:, planted] = 60 * direction
    spec = AttentionSpec(SCALE)
    found, _ = kernel().forward(q, k, v, spec)
    late = found[0, 512:]  # (T, H, D), whose queries see it in FP8 only
    assert torch.cosine_similarity(late, v[0, planted].repeat_interleave(2, 0)[None], -1).min() > 0.99


def test_segments_long_ones_apart_and_short_ones_exact() -> None:
    edges = (0, 100, 700, 760, 800, 1400)
    q, k, v = inputs(1400, 1400)
    spec = AttentionSpec(SCALE, segments=VarlenSegments(edges, edges))
    found, lse = kernel().forward(q, k, v, spec)
    wanted, wanted_lse = attention_forward(Reference(), q, k, v, spec)
    for start, stop in pairwise(edges):
        rows = slice(start, stop)
        if stop - start < 256:
            torch.testing.assert_close(found[:, rows], wanted[:, rows])
            torch.testing.assert_close(lse[:, :, rows], wanted_lse[:, :, rows])
        else:
            alone, alone_lse = kernel().forward(q[:, rows], k[:, rows], v[:, rows], AttentionSpec(SCALE))
            torch.testing.assert_close(found[:, rows], alone)
            torch.testing.assert_close(lse[:, :, rows], alone_lse)
            assert 1e-4 < error(found[:, rows], wanted[:, rows]) < 0.06


def test_windows_and_short_calls_are_the_exact_kernels() -> None:
    q, k, v = inputs(640, 640)
    for spec in (AttentionSpec(SCALE, window=100), AttentionSpec(SCALE, softcap=5.0)):
        torch.testing.assert_close(kernel().forward(q, k, v, spec), Reference().forward(q, k, v, spec), rtol=0, atol=0)
    spec = AttentionSpec(SCALE)
    short = [x[:, :255] for x in (q, k, v)]
    torch.testing.assert_close(kernel().forward(*short, spec), Reference().forward(*short, spec), rtol=0, atol=0)


def test_smoothing_keys_lowers_the_error() -> None:
    q, k, v = inputs(256, 1024)
    k += 20 * torch.randn(SIZE, generator=torch.Generator().manual_seed(5))
    wanted, _ = Reference().forward(q, k, v, AttentionSpec(SCALE, causal=False))
    with_mean, _ = kernel().forward(q, k, v, AttentionSpec(SCALE, causal=False))
    plain = quantise_keys(k, v)
    keys = k.transpose(1, 2).unflatten(2, (-1, 16))
    scales = keys.abs().amax((3, 4)) / 448
    raw = Fp8Keys(
        (keys / scales[..., None, None]).flatten(2, 3).to(torch.float8_e4m3fn),
        scales,
        plain.v,
        plain.v_scale,
        plain.mean * 0,
    )
    out, lse = torch.zeros(q.shape), torch.full((1, 4, 256), -torch.inf)
    merge_keys(dequantised, out, lse, q, raw, 1024, SCALE)
    assert error(with_mean, wanted) < 0.6 * error(out, wanted)


def test_quantised_queries_are_laid_out_by_kv_head() -> None:
    q = inputs(128, 128, heads=6, kv_heads=2)[0]
    q8, scale = quantise_queries(q, 2)
    assert q8.shape == (1, 2, 3 * 128, SIZE)
    assert scale.shape == (1, 2, 3 * 128)
    back = (q8.float() * scale.unsqueeze(-1)).unflatten(2, (3, 128)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    torch.testing.assert_close(back, q, rtol=2**-4, atol=q.abs().max().item() / 448)


def test_it_is_only_taken_when_named_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    assert not choose_kernel("auto", torch.empty(1, 1, 1, SIZE), AttentionSpec(SCALE)).approximate
    reason = kernel().unsupported_reason(torch.empty(1, 1, 1, 64), AttentionSpec(SCALE))
    assert reason is not None
    assert "head size 128" in reason
    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(ImportError, match=r"'flash4_fp8' is not installed: pip install 'nvidia-cudnn-frontend>=1\.32'"):
        vendor_kernel()


def test_what_is_only_listed_is_not_told_to_be_in_use(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = inputs(300, 300)
    with caplog.at_level("INFO"):
        made = kernel()  # as `available_kernels` makes each kernel that is there
        assert not caplog.records
        for _ in range(2):
            made.forward(q, k, v, AttentionSpec(SCALE))
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        "attention's forward pass takes far keys in FP8"
    ]


def test_an_old_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.27.0")
    with pytest.raises(ImportError, match=r"needs nvidia-cudnn-frontend 1\.32, found 1\.27\.0"):
        vendor_kernel()


def test_gradients_are_the_exact_kernels_from_the_merged_pair() -> None:
    q, k, v = inputs(640, 640)
    spec = AttentionSpec(SCALE)
    approximate = kernel()
    out, lse = approximate.forward(q, k, v, spec)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    found = approximate.backward(dout, q, k, v, out, lse, spec)
    exact = Reference().forward(q, k, v, spec)
    wanted = Reference().backward(dout, q, k, v, *exact, spec)
    for name, a, b in zip("qkv", found, wanted):
        assert error(a, b) < 0.1, name


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a GPU of Hopper's kind"
)
def test_the_vendors_kernel_computes_what_it_is_given() -> None:
    pytest.importorskip("cudnn")
    q, k, v = (x.to("cuda", torch.bfloat16) for x in inputs(1024, 2048, 8, 2))
    keys, (q8, q_scale) = quantise_keys(k, v), quantise_queries(q, 2)
    found, lse = vendor_kernel()(q8, q_scale, *keys.part(0, 2048), SCALE)
    wanted, wanted_lse = dequantised(q8, q_scale, *keys.part(0, 2048), SCALE)
    assert error(found.float(), wanted.float()) < 0.02
    torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=0.01)

"""What the exercises of 13_serve_and_cost ask for, the usual mistakes, and the checks that tell them apart."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from ultralong.checkpoints.check import Readings
from ultralong.checkpoints.check import check as readings_of
from ultralong.inference.kv_cache import KvCache
from ultralong.planner.shapes import model_config

GIB = 2**30

# ---- 13.kv_bytes


def kv_bytes(layers: int, heads: int, kv_heads: int, head_dim: int, tokens: int, kv: str) -> int:
    """Bytes of a cache: two vectors a token, layer and kv head; in fp8 a byte a number and a scale of two a vector."""
    vector = 2 * head_dim if kv == "bf16" else head_dim + 2
    return 2 * layers * kv_heads * tokens * vector


def kv_bytes_of_all_heads(layers: int, heads: int, kv_heads: int, head_dim: int, tokens: int, kv: str) -> int:
    """Wrong: query heads have no keys and values of their own."""
    return kv_bytes(layers, heads, heads, head_dim, tokens, kv)


def kv_bytes_of_keys(layers: int, heads: int, kv_heads: int, head_dim: int, tokens: int, kv: str) -> int:
    """Wrong: the values are left out."""
    return kv_bytes(layers, heads, kv_heads, head_dim, tokens, kv) // 2


def kv_bytes_one_layer(layers: int, heads: int, kv_heads: int, head_dim: int, tokens: int, kv: str) -> int:
    """Wrong: one layer only."""
    return kv_bytes(1, heads, kv_heads, head_dim, tokens, kv)


def kv_bytes_no_scale(layers: int, heads: int, kv_heads: int, head_dim: int, tokens: int, kv: str) -> int:
    """Wrong: fp8 without its scales."""
    return 2 * layers * kv_heads * tokens * head_dim * (2 if kv == "bf16" else 1)


def kv_bytes_always_16(layers: int, heads: int, kv_heads: int, head_dim: int, tokens: int, kv: str) -> int:
    """Wrong: fp8 is taken for 16 bits."""
    return kv_bytes(layers, heads, kv_heads, head_dim, tokens, "bf16")


SAYS_OF_BYTES = (
    (kv_bytes_of_all_heads, "Query heads have no keys and values of their own: only kv heads are kept."),
    (kv_bytes_of_keys, "That is the keys alone, or the values alone: a token has both."),
    (kv_bytes_one_layer, "That is one layer: each layer has a cache of its own."),
    (kv_bytes_always_16, "fp8 takes one byte a number, not two."),
    (kv_bytes_no_scale, "In fp8 each vector of a head has a scale of two bytes too."),
)


def _held(layers: int, kv_heads: int, head_dim: int, tokens: int, kv: str) -> int:
    """Bytes that the library's own cache takes when it is filled."""
    cache = KvCache(tokens, "auto" if kv == "bf16" else "fp8")
    for layer in range(layers):
        k = torch.ones(1, tokens, kv_heads, head_dim, dtype=torch.bfloat16)
        cache.write(layer, 0, k, k)
    return cache.bytes


def check_kv_bytes(answer: Any) -> str:
    """Compare with the bytes that the library's own cache takes."""
    for sizes in ((3, 8, 2, 16, 24, "bf16"), (3, 8, 2, 16, 24, "fp8"), (2, 6, 3, 8, 10, "fp8")):
        layers, heads, kv_heads, head_dim, tokens, kv = sizes
        right, found = _held(layers, kv_heads, head_dim, tokens, kv), answer(*sizes)
        what = (
            f"{layers} layers, {heads} query heads, {kv_heads} kv heads of {head_dim}, {tokens} tokens in {kv}: you "
            f"find {found} bytes, and the library's cache takes {right}."
        )
        assert found == 0 or found > right / 2**9, f"{what} Give bytes, not KiB or GiB."
        for wrong, says in SAYS_OF_BYTES:
            assert found == right or found != wrong(*sizes), f"{what} {says}"
        assert found == right, f"{what} 2 x layers x kv heads x tokens x bytes of a vector."
    million = answer(32, 32, 8, 128, 2**20, "bf16")
    assert million == 128 * GIB, f"Llama-3.1-8B at 1,048,576 tokens takes 128 GiB in bf16; you find {million / GIB:g}."
    return "as many bytes as the library's own cache takes; 128 GiB for 8B parameters at a million tokens."


# ---- 13.repair

TARGET = 2**20
# A checkpoint of Llama-3.1-8B that was to read 1,048,576 tokens: entries of config.json and tokenizer_config.json.
CAPPED = {
    "max_position_embeddings": 131072,
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "model_max_length": 131072,
}
REPAIRED = {**CAPPED, "max_position_embeddings": TARGET, "factor": 128.0, "model_max_length": TARGET}


def _readings(entries: dict[str, Any]) -> Readings:
    """What programs would read from a folder with these entries."""
    config = model_config("meta-llama/Llama-3.1-8B").to_dict()
    rope = {key: entries[key] for key in ("rope_type", "factor", "original_max_position_embeddings")}
    if rope["rope_type"] == "yarn":
        rope |= {"beta_fast": 4.0, "beta_slow": 1.0}
    if rope["rope_type"] == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config |= {"rope_parameters": {**rope, "rope_theta": 500000.0}, "rope_scaling": rope, "rope_theta": 500000.0}
    config["max_position_embeddings"] = entries["max_position_embeddings"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": entries["model_max_length"]}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        return readings_of(folder)


def check_repair(answer: Any) -> str:
    """Ask `ultralong check` what programs would read."""
    assert isinstance(answer, dict) and set(answer) == set(CAPPED), f"Give a dict with the keys {', '.join(CAPPED)}."
    original = CAPPED["original_max_position_embeddings"]
    assert answer["original_max_position_embeddings"] == original, (
        f"{original:,} was right: the window of the pretraining without any scaling. A repair changes what is wrong."
    )
    try:
        found = _readings(answer)
    except (ValueError, TypeError) as error:
        raise AssertionError(f"No program opens it: {' '.join(str(error).split())}") from error
    for one in found.readings:
        if one.program in ("vLLM", "SGLang"):
            assert one.verdict == "right", f"{one.program} would read another RoPE. {' '.join(one.remarks)}"
    declared = answer["max_position_embeddings"]
    assert declared == TARGET, f"max_position_embeddings is {declared:,}: transformers and llama.cpp offer no more."
    limit = answer["model_max_length"]
    assert limit == TARGET, f"The tokenizer's model_max_length is {limit:,}: texts are truncated there."
    assert answer["factor"] * original == TARGET, (
        f"Factor {answer['factor']:g}: it counts from {original:,}, the unscaled window, so it reaches "
        f"{answer['factor'] * original:,.0f} tokens."
    )
    assert found.window == TARGET, f"The window comes out as {found.window:,}."
    return "transformers, vLLM, SGLang and llama.cpp all offer 1,048,576 tokens."


# ---- 13.gpus


def gpus(users: int, tokens: int, token_bytes: int, weights: float, memory: float, share: float) -> int:
    """GPUs that each hold the whole model and together all caches, in `share` of what the weights leave free."""
    return math.ceil(users * tokens * token_bytes / (share * (memory - weights)))


def gpus_rounded(users: int, tokens: int, token_bytes: int, weights: float, memory: float, share: float) -> int:
    """Wrong: rounded down."""
    return int(users * tokens * token_bytes / (share * (memory - weights)))


def gpus_no_weights(users: int, tokens: int, token_bytes: int, weights: float, memory: float, share: float) -> int:
    """Wrong: the model itself takes no memory."""
    return gpus(users, tokens, token_bytes, 0, memory, share)


def gpus_weights_once(users: int, tokens: int, token_bytes: int, weights: float, memory: float, share: float) -> int:
    """Wrong: one model for all GPUs."""
    return math.ceil((users * tokens * token_bytes + weights) / (share * memory))


def gpus_one_user(users: int, tokens: int, token_bytes: int, weights: float, memory: float, share: float) -> int:
    """Wrong: one user."""
    return gpus(1, tokens, token_bytes, weights, memory, share)


def gpus_full(users: int, tokens: int, token_bytes: int, weights: float, memory: float, share: float) -> int:
    """Wrong: no room for anything else."""
    return gpus(users, tokens, token_bytes, weights, memory, 1.0)


SAYS_OF_GPUS = (
    (gpus_one_user, "That is enough for one user."),
    (gpus_rounded, "Round up: the last part of the caches needs a place too."),
    (gpus_weights_once, "Every GPU holds the whole model, not one of them."),
    (gpus_no_weights, "The weights stand on every GPU before the first token comes."),
    (gpus_full, "Only `share` of the free memory is for caches: a piece of a prompt needs room for its activations."),
)


def check_gpus(answer: Any) -> str:
    """Compare at sizes where each usual mistake gives a number of its own."""
    for sizes in ((20, 2**18, 131072, 45 * GIB, 140 * GIB, 0.6), (24, 2**18, 131072, 60 * GIB, 140 * GIB, 0.7)):
        users, tokens, token_bytes, weights, memory, share = sizes
        right, found = gpus(*sizes), answer(*sizes)
        what = (
            f"{users} users of {tokens:,} tokens at {token_bytes / 1024:g} KiB, weights {weights / GIB:g} of "
            f"{memory / GIB:g} GiB, share {share:g}: {found} GPUs."
        )
        for wrong, says in SAYS_OF_GPUS:
            assert found == right or found != wrong(*sizes), f"{what} {says}"
        assert found == right, f"{what} Expected {right}: all caches over what one GPU has left for them, rounded up."
    eight = answer(10, 2**18, 131072, 15 * GIB, 139.8 * GIB, 0.8)
    return f"ten users at 256K on Llama-3.1-8B in bf16 need {eight} H200s."


# ---- 13.break_even


def break_even(prefill_seconds: float, cache_bytes: float, gpu_bytes: float) -> float:
    """Seconds after which keeping a cache has cost as much of a GPU as reading the prompt again."""
    return prefill_seconds * gpu_bytes / cache_bytes


def check_break_even(answer: Any) -> str:
    """Compare at two prompts."""
    for seconds, cache, memory in ((36.0, 32 * GIB, 140 * GIB), (460.0, 65 * GIB, 140 * GIB)):
        right, found = break_even(seconds, cache, memory), float(answer(seconds, cache, memory))
        what = f"{seconds:g} s to read, {cache / GIB:g} of {memory / GIB:g} GiB: {found:.4g} s."
        assert abs(found / seconds - 1) > 1e-6, (
            f"{what} That would be right if the cache took the whole GPU; it takes {cache / memory:.0%} of it, and "
            "costs so much less to keep."
        )
        assert abs(found / (seconds * cache / memory) - 1) > 1e-6, (
            f"{what} Upside down: the smaller the cache, the longer it may wait."
        )
        assert abs(found / (right / 3600) - 1) > 1e-6, f"{what} Those are hours; give seconds."
        assert abs(found / (seconds * memory / (memory - cache)) - 1) > 1e-6, (
            f"{what} What counts is the memory that the cache takes from others, not what it leaves."
        )
        assert abs(found / right - 1) < 1e-6, (
            f"{what} Expected {right:.4g}: seconds x share of the GPU that the cache takes = seconds of reading."
        )
    return "at that time both cost the same, whatever a GPU-hour costs."

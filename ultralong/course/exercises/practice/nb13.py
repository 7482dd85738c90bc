"""Exercises of 13_serve_and_cost: bytes of a cache, a config that servers cap, GPUs for users, a cache kept or not."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from ultralong.checkpoints.check import Readings
from ultralong.checkpoints.check import check as readings_of
from ultralong.course.exercise import Exercise, Mistake
from ultralong.inference.kv_cache import KvCache
from ultralong.miniature import path as miniature

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


def _check_kv_bytes(answer: Any) -> str:
    for sizes in ((3, 8, 2, 16, 24, "bf16"), (3, 8, 2, 16, 24, "fp8"), (2, 6, 3, 8, 10, "fp8")):
        layers, heads, kv_heads, head_dim, tokens, kv = sizes
        right, found = _held(layers, kv_heads, head_dim, tokens, kv), answer(*sizes)
        what = (
            f"{layers} layers, {heads} query heads, {kv_heads} kv heads of {head_dim}, {tokens} tokens in {kv}: you "
            f"find {found} bytes, and the library's cache takes {right}."
        )
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
_REPAIRED = {**CAPPED, "max_position_embeddings": TARGET, "factor": 128.0, "model_max_length": TARGET}


def _readings(entries: dict[str, Any]) -> Readings:
    """What programs would read from a folder with these entries; its shapes are the miniature's."""
    config = json.loads((miniature() / "config.json").read_text(encoding="utf-8"))
    rope = {key: entries[key] for key in ("rope_type", "factor", "original_max_position_embeddings")}
    if rope["rope_type"] == "yarn":
        rope |= {"beta_fast": 4.0, "beta_slow": 1.0}
    config |= {"rope_parameters": {**rope, "rope_theta": 500000.0}, "rope_scaling": rope, "rope_theta": 500000.0}
    config["max_position_embeddings"] = entries["max_position_embeddings"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": entries["model_max_length"]}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        return readings_of(folder)


def _check_repair(answer: Any) -> str:
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
    assert limit == TARGET, f"The tokenizer's model_max_length is {limit:,}: vLLM ends the window there."
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


def _gpus_rounded(users: int, tokens: int, token_bytes: int, weights: float, memory: float, share: float) -> int:
    return round(users * tokens * token_bytes / (share * (memory - weights)) - 0.49)


def _gpus_no_weights(users: int, tokens: int, token_bytes: int, weights: float, memory: float, share: float) -> int:
    return gpus(users, tokens, token_bytes, 0, memory, share)


def _gpus_weights_once(users: int, tokens: int, token_bytes: int, weights: float, memory: float, share: float) -> int:
    return math.ceil((users * tokens * token_bytes + weights) / (share * memory))


def _gpus_one_user(users: int, tokens: int, token_bytes: int, weights: float, memory: float, share: float) -> int:
    return gpus(1, tokens, token_bytes, weights, memory, share)


def _gpus_full(users: int, tokens: int, token_bytes: int, weights: float, memory: float, share: float) -> int:
    return gpus(users, tokens, token_bytes, weights, memory, 1.0)


SAYS_OF_GPUS = (
    (_gpus_one_user, "That is enough for one user."),
    (_gpus_rounded, "Round up: the last part of the caches needs a place too."),
    (_gpus_weights_once, "Every GPU holds the whole model, not one of them."),
    (_gpus_no_weights, "The weights stand on every GPU before the first token comes."),
    (_gpus_full, "Only `share` of the free memory is for caches: a piece of a prompt needs room for its activations."),
)


def _check_gpus(answer: Any) -> str:
    # At these sizes each usual mistake gives a number of its own.
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


def _check_break_even(answer: Any) -> str:
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


EXERCISES = (
    Exercise(
        name="13.kv_bytes",
        title="Bytes of a KV cache",
        task=(
            "Write `kv_bytes(layers, heads, kv_heads, head_dim, tokens, kv)`: bytes of keys and values; kv is "
            '"bf16", two bytes a number, or "fp8", one byte a number and two for each vector of a head.'
        ),
        check=_check_kv_bytes,
        solution=kv_bytes,
        mistakes=(
            Mistake("query heads", kv_bytes_of_all_heads, "only kv heads are kept"),
            Mistake("keys only", kv_bytes_of_keys, "a token has both"),
            Mistake("one layer", kv_bytes_one_layer, "a cache of its own"),
            Mistake("fp8 as 16 bits", kv_bytes_always_16, "one byte a number, not two"),
            Mistake("no scales", kv_bytes_no_scale, "has a scale of two bytes"),
        ),
        hints=(
            "How many vectors does one token leave behind, over all layers and kv heads?",
            "2 x layers x kv_heads vectors a token; a vector takes 2 x head_dim bytes, or head_dim + 2.",
        ),
        difficulty="easy",
        minutes=5,
    ),
    Exercise(
        name="13.gpus",
        title="GPUs for ten users",
        task=(
            "Write `gpus(users, tokens, token_bytes, weights, memory, share)`: GPUs that hold the caches of all users "
            "at once. Each GPU holds the whole model, and `share` of the memory that it leaves is for caches."
        ),
        check=_check_gpus,
        solution=gpus,
        mistakes=(
            Mistake("rounded down", _gpus_rounded, "Round up"),
            Mistake("no weights", _gpus_no_weights, "before the first token comes"),
            Mistake("weights once", _gpus_weights_once, "holds the whole model"),
            Mistake("one user", _gpus_one_user, "enough for one user"),
            Mistake("all the memory", _gpus_full, "for its activations"),
        ),
        hints=(
            "First: how many bytes has one GPU left for caches?",
            "All caches together over share x (memory - weights), rounded up.",
        ),
        minutes=6,
    ),
    Exercise(
        name="13.repair",
        title="A config that servers would cap",
        task="Give `CAPPED` with what is wrong repaired, so that every program offers 1,048,576 tokens.",
        check=_check_repair,
        solution=_REPAIRED,
        mistakes=(
            Mistake("only the tokenizer", {**_REPAIRED, "max_position_embeddings": 131072}, "offer no more"),
            Mistake("tokenizer forgotten", {**_REPAIRED, "model_max_length": 131072}, "vLLM ends the window there"),
            Mistake("factor over 131,072", {**_REPAIRED, "factor": 8.0}, "the unscaled window"),
            Mistake(
                "another original window",
                {**_REPAIRED, "factor": 8.0, "original_max_position_embeddings": 131072},
                "without any scaling",
            ),
            Mistake("dynamic", {**_REPAIRED, "rope_type": "dynamic"}, "would read another RoPE"),
        ),
        hints=(
            "Three numbers say where the window ends. Which program looks at which?",
            "The factor is the new window over the one of the unscaled pretraining: 1,048,576 / 8,192.",
            "The tokenizer has a limit of its own.",
        ),
        minutes=6,
    ),
    Exercise(
        name="13.break_even",
        title="Keep the cache, or read again?",
        task=(
            "Write `break_even(prefill_seconds, cache_bytes, gpu_bytes)`: seconds that a cache may wait for its next "
            "question until keeping it has cost as much as reading the prompt again on a whole GPU. A kept cache costs "
            "its share of the GPU's memory."
        ),
        check=_check_break_even,
        solution=break_even,
        mistakes=(
            Mistake("whole GPU", lambda seconds, cache, memory: seconds, "took the whole GPU"),
            Mistake("upside down", lambda seconds, cache, memory: seconds * cache / memory, "Upside down"),
            Mistake("hours", lambda seconds, cache, memory: break_even(seconds, cache, memory) / 3600, "are hours"),
            Mistake(
                "what is left", lambda seconds, cache, memory: seconds * memory / (memory - cache), "not what it leaves"
            ),
        ),
        hints=(
            "Reading again: prefill_seconds of a whole GPU. Waiting: so many seconds of a part of it.",
            "seconds x cache_bytes / gpu_bytes = prefill_seconds.",
        ),
        minutes=6,
    ),
)

"""Exercises of 13_serve_and_cost: bytes of a cache, a config that servers cap, GPUs for users, a cache kept or not."""

from __future__ import annotations

from ultralong.course.exercise import Exercise, Mistake
from ultralong.course.exercises.practice.nb13_checks import (
    REPAIRED,
    break_even,
    check_break_even,
    check_gpus,
    check_kv_bytes,
    check_repair,
    gpus,
    gpus_full,
    gpus_no_weights,
    gpus_one_user,
    gpus_rounded,
    gpus_weights_once,
    kv_bytes,
    kv_bytes_always_16,
    kv_bytes_no_scale,
    kv_bytes_of_all_heads,
    kv_bytes_of_keys,
    kv_bytes_one_layer,
)

EXERCISES = (
    Exercise(
        name="13.kv_bytes",
        title="Bytes of a KV cache",
        task=(
            "Write `kv_bytes(layers, heads, kv_heads, head_dim, tokens, kv)`: bytes of keys and values; kv is "
            '"bf16", two bytes a number, or "fp8", one byte a number and two for each vector of a head.'
        ),
        check=check_kv_bytes,
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
        check=check_gpus,
        solution=gpus,
        mistakes=(
            Mistake("rounded down", gpus_rounded, "Round up"),
            Mistake("no weights", gpus_no_weights, "before the first token comes"),
            Mistake("weights once", gpus_weights_once, "holds the whole model"),
            Mistake("one user", gpus_one_user, "enough for one user"),
            Mistake("all the memory", gpus_full, "for its activations"),
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
        check=check_repair,
        solution=REPAIRED,
        mistakes=(
            Mistake("only the tokenizer", {**REPAIRED, "max_position_embeddings": 131072}, "offer no more"),
            Mistake("tokenizer forgotten", {**REPAIRED, "model_max_length": 131072}, "texts are truncated there"),
            Mistake("factor over 131,072", {**REPAIRED, "factor": 8.0}, "the unscaled window"),
            Mistake(
                "another original window",
                {**REPAIRED, "factor": 8.0, "original_max_position_embeddings": 131072},
                "without any scaling",
            ),
            Mistake("dynamic", {**REPAIRED, "rope_type": "dynamic"}, "would read another RoPE"),
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
        check=check_break_even,
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

"""Read the rotary scaling of a model from its config, or say why it can't be read.

A scaling is only returned when `ultralong.rope` reproduces the model's own table from it; everything else is refused by
name, because a checkpoint written from a misread scaling would open without complaint and answer nonsense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ultralong.rope.scaling import METHODS, RopeScaling, require

READABLE = tuple(method for method in METHODS if method != "ntk")  # a changed base looks like any other base
# transformers' own defaults where a config leaves them out.
RAMP_KEYS = {
    "yarn": (("beta_slow", 1.0), ("beta_fast", 32.0)),
    "llama3": (("low_freq_factor", 1.0), ("high_freq_factor", 4.0)),
}


# Keys of a RoPE entry that are understood, whatever the method; others change a table in ways of one model class.
ENTRY_KEYS = frozenset(
    {
        "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor",
        "beta_slow", "beta_fast", "low_freq_factor", "high_freq_factor", "truncate", "attention_factor",
        "short_factor", "long_factor", "finetuned",
    }
)  # fmt: skip


FULL, SLIDING = "full_attention", "sliding_attention"


def from_config(config: Any) -> RopeScaling:
    """Read the scaling of a model config: of its full-attention layers, where sliding-window layers have their own.

    Those never see further than their window, so that a longer text asks nothing new of them (`other_ropes`).

    Args:
        config: A transformers config (version 5's `rope_parameters`, or the older `rope_scaling` with `rope_theta`), or
            a mapping with the same entries.

    Returns:
        The scaling, with transformers' defaults filled in. The original window is None for a "linear" scaling whose
        config does not say whether the window that it gives is the one before or after scaling.

    Raises:
        ValueError: The model has no RoPE, or one that this library can't reproduce; the message names it.
    """
    read = reader(config)
    entry = _rope_entry(read)
    found = entry.get("rope_type") or entry.get("type") or "default"
    method = {"su": "longrope"}.get(found, found)
    require(method in READABLE, f"RoPE type {found!r} can't be rescaled here. Known types: {', '.join(READABLE)}.")
    scaling = {
        "method": method,
        "head_dim": _head_size(read),
        "theta": entry["rope_theta"],
        "partial_rotary_factor": entry["partial_rotary_factor"],
    }
    return RopeScaling(**scaling, **_settings(method, entry, read))


def other_ropes(config: Any) -> dict[str, dict[str, Any]]:
    """RoPE entries by layer type that a longer window leaves as they are; none where all layers share one."""
    entries = reader(config)("rope_parameters") or {}
    return {key: dict(entry) for key, entry in entries.items() if key != FULL and isinstance(entry, Mapping)}


def window_of(config: Any) -> int:
    """Tokens that a model with this config is declared to read.

    It is `max_position_embeddings`, but for three methods: "dynamic" keeps the unscaled window there and grows by its
    factor, "linear" does where the config has its original window, and "yarn" counts from its original window, which
    some configs leave as the only one.
    """
    scaling, read = from_config(config), reader(config)
    window = read("max_position_embeddings")
    if scaling.method == "linear":
        return int(scaling.original_window * scaling.factor) if scaling.original_window else int(window)
    if scaling.method == "dynamic":
        return int(window * scaling.factor)
    if scaling.method == "yarn":
        return max(window, int((scaling.original_window or window) * scaling.factor))
    return int(window)


def declared_window(config: Any) -> int:
    """`window_of`, and for a model whose RoPE can't be rescaled here its `max_position_embeddings`; 0 without either.

    For programs that only run a model: what can't be extended can be read all the same.
    """
    try:
        return window_of(config)
    except ValueError:
        return int(reader(config)("max_position_embeddings") or 0)


def reader(config: Any) -> Callable[[str], Any]:
    """One way to read an entry (None when absent) from a config object and from a mapping."""
    if isinstance(config, Mapping):
        return config.get

    def read(name: str) -> Any:
        try:
            return getattr(config, name, None)
        except RuntimeError as error:  # transformers' answer for what differs between layers
            raise ValueError(
                f"a model of type {config.model_type!r} has a {name} that differs between its layers, so it has more "
                "than one RoPE, which is not supported."
            ) from error

    return read


def _settings(method: str, entry: dict[str, Any], read: Callable[[str], Any]) -> dict[str, Any]:
    """The arguments of RopeScaling that are particular to a method."""
    window = read("max_position_embeddings")
    require(window is not None, "the config has no max_position_embeddings, so its window is unknown.")
    if method == "default":
        return {"original_window": window}
    if method == "linear":
        return {
            "factor": _entry(entry, "factor", method),
            "original_window": read("original_max_position_embeddings"),
        }
    if method == "dynamic":
        return {"factor": _entry(entry, "factor", method), "original_window": window}
    # Phi-3 keeps the original window beside its rope entry, and transformers lets that one win.
    original = read("original_max_position_embeddings") or entry.get("original_max_position_embeddings") or window
    settings: dict[str, Any] = {"original_window": original, "factor": entry.get("factor") or window / original}
    if method in RAMP_KEYS:
        (slow, alpha), (fast, beta) = RAMP_KEYS[method]
        settings |= {"alpha": entry.get(slow) or alpha, "beta": entry.get(fast) or beta}
    if method == "yarn":
        settings |= {"truncate": entry.get("truncate", True), "attention_factor": entry.get("attention_factor")}
    if method == "longrope":
        settings |= {
            "short_factors": tuple(_entry(entry, "short_factor", method)),
            "long_factors": tuple(_entry(entry, "long_factor", method)),
            "attention_factor": entry.get("attention_factor"),
        }
    return settings


def _rope_entry(read: Callable[[str], Any]) -> dict[str, Any]:
    """The rope entry with its base and rotated share filled in; refuses what is not one for all full layers."""
    name = f"a model of type {read('model_type')!r}"
    entry = dict(read("rope_parameters") or read("rope_scaling") or {})
    layers = [key for key, value in entry.items() if isinstance(value, Mapping)]
    by_type = bool(layers) and FULL in layers and set(entry) <= {FULL, SLIDING}
    require(
        (by_type or not layers) and not read("local_rope_theta"),
        f"{name} has more than one RoPE ({', '.join([*layers, 'local_rope_theta'][: len(layers) or 1])}): which of its "
        "layers to scale is known for full_attention beside sliding_attention alone.",
    )
    entry = dict(entry[FULL]) if by_type else entry
    theta = entry.get("rope_theta") or read("rope_theta") or read("rotary_emb_base")
    hint = " Its language model is in 'text_config': save that as a model of its own." if read("text_config") else ""
    require(
        theta is not None and not read("alibi"),
        f"{name} has no rotary position embedding (RoPE) in its config, so there is nothing to rescale.{hint}",
    )
    for key in ("mrope_section", "mscale", "mscale_all_dim"):
        require(
            not entry.get(key),
            f"{name} sets {key} in its RoPE, which changes more than the rotary table; such a model is not supported.",
        )
    unknown = sorted(key for key, value in entry.items() if key not in ENTRY_KEYS and value is not None and value != 0)
    require(
        not unknown,
        f"{name} has {', '.join(unknown)} in its RoPE entry, which only its own class reads: without it the table "
        "would be another one, so such a model is not supported.",
    )
    for key in ("factor", "rope_theta", "attention_factor", "original_max_position_embeddings"):
        require(
            entry.get(key) is None or (isinstance(entry[key], int | float) and not isinstance(entry[key], bool)),
            f"{name} has {key}: {entry.get(key)!r} in its RoPE entry, where a number belongs.",
        )
    share = entry.get("partial_rotary_factor") or read("partial_rotary_factor") or read("rotary_pct") or 1.0
    return entry | {"rope_theta": float(theta), "partial_rotary_factor": float(share)}


def _entry(entry: dict[str, Any], key: str, method: str) -> Any:
    require(entry.get(key) is not None, f"the config's RoPE type {method!r} lacks {key!r}.")
    return entry[key]


def _head_size(read: Callable[[str], Any]) -> int:
    # Multi-head latent attention rotates only a part of its head, which its configs call qk_rope_head_dim.
    if size := read("qk_rope_head_dim") or read("head_dim"):
        return int(size)
    size, heads = read("hidden_size"), read("num_attention_heads")
    require(
        bool(size and heads),
        f"a model of type {read('model_type')!r} says neither head_dim nor hidden_size and num_attention_heads in its "
        "config, so the size of its rotary table is unknown.",
    )
    return int(size // heads)

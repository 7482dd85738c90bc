"""From a model's config and a target window to the scaling that reaches it, and to the config entries that carry it.

The recipe's rule: a model whose config has the `llama3` type (Llama 3.1 and later) keeps it with a larger factor, which
is the recipe's YaRN (alpha 1, beta 4) to the last bit; any other model gets transformers' `yarn` type with the same
alpha and beta. The factor is the target over the window of the *unscaled* pretraining (8,192 for Llama 3.1, although it
serves 131,072), and replaces a factor that is already there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ultralong.checkpoints.config import rope_entries
from ultralong.rope import METHODS, RopeScaling, from_config, rope_parameters, window_of
from ultralong.rope.config import FULL, other_ropes, reader
from ultralong.rope.explain import explain_scaling, explanation_lines
from ultralong.rope.scaling import require
from ultralong.utils.units import check_length

# vLLM takes the original window times the factor as the longest input of these types.
SERVED_BY_FACTOR = ("yarn", "linear", "dynamic")
# In these types transformers (dynamic) and vLLM (both) read max_position_embeddings as the window before scaling.
KEEPS_OLD_WINDOW = ("linear", "dynamic")
SHORT_PRETRAINING = 4096  # tokens


@dataclass(frozen=True)
class Extension:
    """What a longer window is asked for with; None leaves the choice to the recipe or to the model's config.

    Attributes:
        to: Tokens of the new window.
        method: "auto" for the recipe's rule, or one of `ultralong.rope.METHODS`.
        factor: Scaling factor; None for `to` over the original window.
        attention_factor: 1.0 turns YaRN's temperature off; None keeps the method's own, which every server knows.
        original_window: Tokens of the unscaled pretraining, where the config doesn't tell or tells wrong.
        theta: A new RoPE base; None keeps the model's.
        ramp: For "yarn", as in RopeScaling. Only "dimension" can be written with a temperature.
        alpha: End of the ramp on the slow side, in turns; None for the model's own llama3 value or the recipe's 1.
        beta: End of the ramp on the fast side, in turns; None for the model's own llama3 value or the recipe's 4.
        short_factors: For "longrope", as in RopeScaling.
        long_factors: For "longrope", as in RopeScaling.
    """

    to: int
    method: str = "auto"
    factor: float | None = None
    attention_factor: float | None = None
    original_window: int | None = None
    theta: float | None = None
    ramp: str = "dimension"
    alpha: float | None = None
    beta: float | None = None
    short_factors: tuple[float, ...] | None = None
    long_factors: tuple[float, ...] | None = None


def choose_scaling(config: Any, wish: Extension) -> RopeScaling:
    """The scaling that gives a model of this config the window asked for.

    Args:
        config: What `ultralong.rope.from_config` reads.
        wish: The window, and what is not to be left to the recipe.

    Raises:
        ValueError: The window is not longer than the one there is, the model has no RoPE that can be rescaled, or the
            settings contradict each other; the message says which and what to do.
    """
    old = from_config(config)
    check_length("the target window", wish.to)
    require(
        wish.method == "auto" or wish.method in METHODS,
        f"RoPE method {wish.method!r} is unknown. Use 'auto' or one of: {', '.join(METHODS)}.",
    )
    original = wish.original_window or old.original_window
    if original is None:
        raise ValueError(
            "the model's linear scaling doesn't record the window of its pretraining. Pass it as "
            f"original_window: the {reader(config)('max_position_embeddings'):,} tokens in its config may be before or "
            "after it."
        )
    window = int(original * old.factor) if old.method == "linear" else window_of(config)
    require(
        wish.to > window,
        f"the target window of {wish.to:,} tokens is not longer than the {window:,} that the "
        "model has already: nothing needs extending.",
    )
    method = wish.method if wish.method != "auto" else "llama3" if old.method == "llama3" else "yarn"
    alpha, beta = (old.alpha, old.beta) if method == old.method == "llama3" else (1.0, 4.0)
    factor = 1.0 if method == "default" else _given(wish.factor, _factor(wish.to, original))
    scaling = RopeScaling(
        method=method,
        head_dim=old.head_dim,
        theta=_given(wish.theta, old.theta),
        factor=factor,
        original_window=original,
        alpha=_given(wish.alpha, alpha),
        beta=_given(wish.beta, beta),
        ramp=wish.ramp,
        attention_factor=wish.attention_factor,
        short_factors=wish.short_factors,
        long_factors=wish.long_factors,
        partial_rotary_factor=old.partial_rotary_factor,
    )
    _check_reach(scaling, old, wish)
    return scaling


def config_entries(config: Any, scaling: RopeScaling, to: int) -> dict[str, Any]:
    """What changes in a model's config.json.

    `rope_parameters` is what transformers 5 reads; `rope_theta` and `rope_scaling` say the same to transformers 4 and
    to servers built on it, which would otherwise fall back to an unscaled table without a word.
    """
    written = rope_parameters(scaling)
    window_key = getattr(config, "attribute_map", {}).get("max_position_embeddings", "max_position_embeddings")
    kept = scaling.original_window if scaling.method in KEEPS_OLD_WINDOW else None
    window, read = to if kept is None else kept, reader(config)
    others = other_ropes(config)
    by_type = others | {FULL: written} if others else written
    entries = {window_key: window, **rope_entries(by_type, str(read("model_type")), window)}
    if scaling.method in ("linear", "longrope"):
        # The first has no entry for it, so that nobody could tell whether the window above is before or after scaling;
        # of the second transformers 4 looks for it here alone.
        entries["original_max_position_embeddings"] = scaling.original_window
    if hasattr(config, "head_dim") and config.head_dim is None:
        entries["head_dim"] = scaling.head_dim  # transformers computes a scaled table from it, and from nothing else
    for key, value in (
        ("rotary_emb_base", written["rope_theta"]),
        ("original_max_position_embeddings", scaling.original_window),
    ):
        if read(key) is not None:
            entries[key] = value
    return entries


def caveats(config: Any, scaling: RopeScaling, to: int) -> tuple[str, ...]:
    """What a user of the extended model should know beyond its scaling: one sentence each."""
    read, old = reader(config), from_config(config)
    kind, reach = rope_parameters(scaling)["rope_type"], int((scaling.original_window or 0) * scaling.factor)
    sliding = read("sliding_window") if read("use_sliding_window") is not False else None
    notes = []
    if sliding and sliding < to:
        notes.append(f"Layers attend over a sliding window of {sliding:,} tokens, which rescaling RoPE does not widen.")
    if others := other_ropes(config):
        notes.append(f"Layers of {' and '.join(others)} keep their own RoPE: they see no further than before.")
    if scaling.method in KEEPS_OLD_WINDOW:
        notes.append(
            f"max_position_embeddings stays at {scaling.original_window:,}: for the {scaling.method} type, "
            "transformers and vLLM read it as the window before scaling."
        )
    if kind == "yarn":
        notes.append(
            "Take transformers 4.57 or later: of this YaRN entry 4.46 ignores the original window and 4.51 the factor, "
            "without a word."
        )
    if kind == "yarn" and (scaling.alpha, scaling.beta) != (1.0, 32.0):
        notes.append(
            f"llama.cpp ignores beta_fast for most architectures: pass --yarn-beta-fast {scaling.beta:g} "
            f"--yarn-beta-slow {scaling.alpha:g} there."
        )
    if read("dual_chunk_attention_config"):
        notes.append(
            "dual_chunk_attention_config is kept as it was: vLLM then reads long inputs by chunks of the old window. "
            "Remove it from config.json to be served by the rescaled RoPE alone."
        )
    if kind == "yarn" and scaling.attention_factor is not None:
        notes.append("SGLang and older vLLM releases ignore attention_factor and apply YaRN's own temperature.")
    if kind == "dynamic":
        notes.append(
            "vLLM 0.33 scales nothing of a dynamic type and its table ends with the old window, SGLang takes the table "
            "of the whole window for short texts too, llama.cpp converts none: choose yarn or llama3 to serve there."
        )
    if kind in SERVED_BY_FACTOR and reach > to:
        offered = f"{to:,} unless told otherwise" if kind == "yarn" else f"up to {reach:,}"
        notes.append(
            f"The factor of {scaling.factor:g} is larger than the window needs, and reaches {reach:,} tokens: vLLM "
            f"offers {offered}, and transformers warns about it once."
        )
    if old.method not in ("default", scaling.method):
        notes.append(f"The {old.method} scaling that the weights were trained with is replaced by {scaling.method}.")
    if read("quantization_config"):
        notes.append("The weights are quantized and copied as they are: they can be served, but not trained in full.")
    return tuple(notes)


def explanation(config: Any, wish: Extension, scaling: RopeScaling, norms: frozenset[str]) -> dict[str, Any]:
    """What a scaling changes and what the model's traits let expect, as JSON values with their text in `lines`."""
    old = from_config(config)
    found = explain_scaling(old, scaling, wish.to)
    names, said = traits(config, scaling, norms)
    lines = [why(old, wish, scaling), *explanation_lines(found), "", *said, expectation(names)]
    return {**found.to_dict(), "traits": names, "lines": lines}


def why(old: RopeScaling, wish: Extension, scaling: RopeScaling) -> str:
    """Which method was chosen, and by what: one sentence."""
    if wish.method != "auto":
        return f"Method {scaling.method}: asked for."
    if scaling.method == "llama3":
        return (
            "Method llama3: the model has it, and the recipe keeps it with a larger factor (its YaRN, alpha 1, beta 4)."
        )
    before = "is not scaled yet" if old.method == "default" else f"has {old.method}"
    return (
        f"Method yarn: the recipe's for a model without llama3 (this one {before}), with alpha {scaling.alpha:g} and "
        f"beta {scaling.beta:g}."
    )


def traits(config: Any, scaling: RopeScaling, norms: frozenset[str]) -> tuple[list[str], list[str]]:
    """What of a model's own design bears on extending it: those that OlmPool found to cost quality, and all in words.

    OlmPool (Ai2, 2026) extended 26 models of 7B alike that differ in normalisation, grouped queries, the window of
    pretraining and sliding windows: each costs little, three or more up to 47% of long-context scores, and neither
    training loss nor perplexity shows it. The cut of 4,096 tokens is ours.

    Args:
        config: The model's.
        scaling: With its original window.
        norms: As `class_table.class_norms` gives them.

    Returns:
        Names of the traits that are there, and a sentence for each of the four.
    """
    read = reader(config)
    heads = int(read("num_attention_heads") or 0)
    kv_heads = int(read("num_key_value_heads") or heads)
    window = scaling.original_window or 0
    layers = list(read("layer_types") or ())
    sliding = read("sliding_window") if read("use_sliding_window") is not False else None
    local = sum(layer != "full_attention" for layer in layers) if layers else (read("num_hidden_layers") or 0)
    has = {
        "normalisation": bool(norms),
        "grouped queries": kv_heads < heads,
        "short window of pretraining": 0 < window <= SHORT_PRETRAINING,
        "sliding windows": bool(sliding and local),
    }
    said = [
        f"Norms: {' and '.join(sorted(norms))}, beside the usual ones."
        if norms
        else "Norms: before each sublayer only.",
        f"Heads: {heads} query heads share {kv_heads} kv heads."
        if has["grouped queries"]
        else f"Heads: every one of the {heads} has its own keys and values.",
        f"Pretraining: {window:,} tokens; {SHORT_PRETRAINING:,} or fewer are counted as short here.",
        f"Windows: {local} of {read('num_hidden_layers')} layers see {sliding:,} tokens, which no scaling widens."
        if has["sliding windows"]
        else "Windows: every layer sees the whole text.",
    ]
    return [name for name, there in has.items() if there], said


def expectation(found: Sequence[str]) -> str:
    """What the number of traits lets expect, with its source."""
    named = f" ({', '.join(found)})" if found else ""
    what = f"{len(found)} of 4 traits that cost long-context quality{named}"
    outlook = (
        "three or more cost up to 47% of long-context scores in 26 models of 7B (OlmPool, Ai2 2026). Training loss and "
        "perplexity do not show it: measure retrieval, and plan for more training"
        if len(found) >= 3
        else "one or two cost little in 26 models of 7B (OlmPool, Ai2 2026)"
    )
    return f"{what}: {outlook}."


def _given(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _factor(to: int, original: int) -> float:
    """`to / original`, rounded so that the product, cut to whole tokens, reaches `to`: vLLM computes it like that."""
    factor = to / original
    while int(original * factor) < to:
        factor = math.nextafter(factor, math.inf)
    return factor


def _check_reach(scaling: RopeScaling, old: RopeScaling, wish: Extension) -> None:
    kind = rope_parameters(scaling)["rope_type"]  # raises where transformers can't express the scaling
    if scaling.method == "default":
        require(
            scaling.theta > old.theta and wish.factor is None,
            "method 'default' extends a window by a larger base "
            f"alone: pass theta above the model's {old.theta:g}, and no factor.",
        )
    if kind in SERVED_BY_FACTOR:
        original = scaling.original_window or 0
        reach = int(original * scaling.factor)
        require(
            reach >= wish.to,
            f"a factor of {scaling.factor:g} on a window of {original:,} reaches {reach:,}, "
            f"not the {wish.to:,} tokens asked for. Leave the factor out, or use {wish.to / original:g} or more.",
        )

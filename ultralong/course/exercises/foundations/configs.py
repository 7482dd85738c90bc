"""Exercises whose answer is a piece of a config.json: 01.repair and 02.config."""

from __future__ import annotations

from typing import Any

import torch

from ultralong.course.exercise import Exercise, Mistake
from ultralong.rope import RopeScaling, from_config, inverse_frequencies

HEAD_DIM, BASE, WINDOW = 128, 500_000.0, 8_192  # Llama 3, before any scaling
MILLION, TWO_MILLION = 2**20, 2**21
LEFT_ALONE = 32  # turns in the window from which on no common ramp slows a pair


def _table(rope: Any, window: int) -> torch.Tensor:
    """Inverse frequencies, float64, (64,), that a model of Llama 3's shape has with this `rope_parameters`."""
    assert isinstance(rope, dict), f"rope_parameters is a dict, as in a config.json; found {rope!r}."
    config = {
        "model_type": "llama", "head_dim": HEAD_DIM, "hidden_size": 4096, "num_attention_heads": 32, "rope_theta": BASE,
        "max_position_embeddings": window, "rope_parameters": {"rope_theta": BASE, **rope},
    }  # fmt: skip
    try:
        return inverse_frequencies(from_config(config), window, torch.float64)[0]
    except (ValueError, TypeError, KeyError) as error:
        raise AssertionError(f"No program opens a config with this: {' '.join(str(error).split())}") from error


def _plain() -> torch.Tensor:
    return inverse_frequencies(RopeScaling("default", HEAD_DIM, BASE, original_window=WINDOW), dtype=torch.float64)[0]


# ---- 01.repair

LLAMA3 = {
    "rope_type": "llama3", "factor": 128.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": WINDOW,
}  # fmt: skip


def _check_repair(answer: Any) -> str:
    found, before = _table(answer, MILLION), _plain()
    turns = WINDOW * before / (2 * torch.pi)
    slowed = (before / found - 1).abs()
    worst = int(slowed.where(turns >= LEFT_ALONE, torch.zeros(())).argmax())
    assert float(slowed[worst]) < 1e-6 or turns[worst] < LEFT_ALONE, (
        f"Pair {worst} turns {float(turns[worst]):,.0f} times in the window, and is "
        f"{float(before[worst] / found[worst]):g} times slower now. Pairs that have shown their whole circle "
        "meet no new angle: they tell neighbours apart, so leave them alone."
    )
    slow = turns < 1
    reach = WINDOW * float((before / found)[slow].min())  # tokens until the first of them leaves what it has shown
    assert reach > WINDOW * 1.01 or "original_max_position_embeddings" in answer or answer.get("factor", 1) == 1, (
        "Without original_max_position_embeddings programs take the new window for the old one: there nearly every "
        "pair turned, and none is slowed."
    )
    assert reach >= MILLION * (1 - 1e-9), (
        f"Pair {int((before / found).where(slow, torch.inf).argmin())} never turned in the window, and meets new "
        f"angles from token {reach:,.0f} on: {MILLION:,} tokens take {MILLION / WINDOW:g} times slower slow pairs."
    )
    blended = int(((slowed > 1e-6) & ~slow).sum())
    return f"no new angle up to {reach:,.0f} tokens; {int(slow.sum())} slow pairs and {blended} on the ramp are slower."


REPAIR = Exercise(
    name="01.repair",
    title="Repair a table by its config",
    task=(
        "A model has head size 128, base 500,000 and a window of 8,192. Give `rope_parameters`, a dict as in a "
        "config.json (rope_type and what belongs to it), so that up to 1,048,576 tokens no pair that never turned in "
        f"the window meets a new angle, and pairs that turned {LEFT_ALONE} times or more keep their frequency."
    ),
    check=_check_repair,
    solution=LLAMA3,
    mistakes=(
        Mistake("all pairs", {"rope_type": "linear", "factor": 128.0}, "leave them alone"),
        Mistake("Llama 3.1's own factor", {**LLAMA3, "factor": 8.0}, "meets new angles from token 65,536 on"),
        Mistake("a larger base only", {"rope_type": "default", "rope_theta": 1e6}, "times slower now"),
        Mistake("no old window", {"rope_type": "llama3", "factor": 128.0}, "take the new window for the old one"),
        Mistake("another type", {**LLAMA3, "rope_type": "slow"}, "No program opens a config"),
        Mistake("a number", 128, "rope_parameters is a dict"),
    ),
    hints=(
        "Which types slow only the slow pairs? Play the figure with the methods.",
        "Look at the cell that makes `recipe`, and print `rope_parameters(recipe)` of `ultralong.rope`.",
        "llama3 wants factor, low_freq_factor, high_freq_factor and original_max_position_embeddings.",
    ),
    minutes=8,
)

# ---- 02.config

TWO_MILLION_CONFIG = {
    "max_position_embeddings": TWO_MILLION,
    "rope_parameters": {**LLAMA3, "rope_theta": BASE, "factor": 256.0},
}


def _changed(**entries: Any) -> dict[str, Any]:
    """The right config with other entries in its `rope_parameters`."""
    return {**TWO_MILLION_CONFIG, "rope_parameters": {**TWO_MILLION_CONFIG["rope_parameters"], **entries}}  # type: ignore[dict-item]


def _check_config(answer: Any) -> str:
    keys = {"max_position_embeddings", "rope_parameters"}
    assert isinstance(answer, dict) and set(answer) == keys, f"Give a dict with the keys {', '.join(sorted(keys))}."
    found, before = _table(answer["rope_parameters"], TWO_MILLION), _plain()
    recipe = RopeScaling("llama3", HEAD_DIM, BASE, TWO_MILLION / WINDOW, WINDOW)
    right = inverse_frequencies(recipe, dtype=torch.float64)[0]
    slowest = float(before[-1] / found[-1])
    reaches = f"the slowest pair is {slowest:,.0f} times slower, and reaches {slowest * WINDOW:,.0f} tokens"
    assert slowest < 1.01 * TWO_MILLION / WINDOW, (
        f"In this config {reaches}: the factor counts from the unscaled window, and replaces Llama 3.1's own."
    )
    assert slowest > 0.99 * TWO_MILLION / WINDOW, (
        f"In this config {reaches}. The factor counts from the window of pretraining, {WINDOW:,}, not from 131,072."
    )
    off = (found / right - 1).abs()
    assert float(off.max()) < 1e-6, (
        f"Both ends are right, and {int((off > 1e-6).sum())} pairs are not, by up to {float(off.max()):.0%}: another "
        "ramp, or turns counted in another window. The recipe's ramp is linear in turns, from 1 to 4, within 8,192 "
        "tokens; transformers' yarn is linear in the index of the pair."
    )
    declared = answer["max_position_embeddings"]
    assert declared == TWO_MILLION, (
        f"The table is right. But servers cap prompts at {declared} tokens, the window said."
    )
    return "the recipe's own table for 2,097,152 tokens, and a window that servers offer."


CONFIG = Exercise(
    name="02.config",
    title="The config of the recipe's second model",
    task=(
        "Give what has to stand in Llama-3.1-8B's config.json for the recipe's 2,097,152 tokens: a dict with "
        "max_position_embeddings and rope_parameters (a dict as those in `FAULTY`)."
    ),
    check=_check_config,
    solution=TWO_MILLION_CONFIG,
    mistakes=(
        Mistake("factor over 131,072", _changed(factor=16.0), "not from 131,072"),
        Mistake("multiplied", _changed(factor=2048.0), "replaces Llama 3.1's own"),
        Mistake(
            "transformers' yarn",
            {
                **TWO_MILLION_CONFIG,
                "rope_parameters": {
                    "rope_type": "yarn", "rope_theta": BASE, "factor": 256.0, "beta_fast": 4.0, "beta_slow": 1.0,
                    "original_max_position_embeddings": WINDOW,
                },
            },
            "linear in the index",
        ),
        Mistake("window left", {**TWO_MILLION_CONFIG, "max_position_embeddings": 131072}, "cap prompts at 131072"),
        Mistake("the table alone", TWO_MILLION_CONFIG["rope_parameters"], "Give a dict with the keys"),
    ),
    hints=(
        "Config D of `FAULTY` is the recipe's for 1,048,576 tokens. Which two numbers change?",
        "The table of the recipe above has the factor of each window.",
    ),
    difficulty="easy",
    minutes=5,
)  # fmt: skip

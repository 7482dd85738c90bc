"""Tables of `notebooks/results/real_models.md`: goals, the recipe's choices, and what a study of a real model found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ultralong.bench.results import markdown

# What an arm of `smollm2-135m-32k` changes, and what the paper (arXiv 2504.06214, tables 3 and 4, one run each) says.
CHOICES = {
    "no-separator": ("separator, none", "none costs 1.0 point of RULER up to 1M"),
    "bos-eos": ("separator, BOS and EOS", "not asked"),
    "mask": ("no mask, documents masked", "no mask, not compared"),
    "anchor": ("no mask, masked with one first token that all see", "not asked"),
    "beta-4": ("beta 32, the recipe's 4", "4, not compared"),
    "rotations-ramp": ("transformers' ramp, the one of YaRN's paper", "not asked"),
    "no-temperature": ("YaRN's temperature, none", "not asked"),
    "ntk": ("YaRN, NTK-aware", "NTK costs 3.6 points of RULER up to 1M"),
    "linear": ("YaRN, linear interpolation", "not asked"),
    "searched": ("YaRN, factors searched for each pair", "not asked"),
    "two-steps": ("one step of extension, two", "two cost 2.7 points of RULER up to 1M"),
    "long-upsampling": ("as they come, long documents up-sampled", "up-sampled, not compared"),
    "skipped-equal-tokens": ("full rows, short rows at skipped positions, as many tokens", "not asked"),
    "skipped-equal-seconds": ("full rows, short rows at skipped positions, as many seconds", "not asked"),
}


def goals_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """The goals that were set before the runs, what was found, and whether that is a hit.

    Args:
        recorded: The six result files of the goals, each with its name as `file`.
    """
    files = {each["file"]: each for each in recorded}
    chat, longer = files["smollm2_64k_chat_h200.json"], files["smollm2_64k_longer_h200.json"]
    ruler, study = files["ruler_qwen25_coder_1_5b.json"], files["ablation_qwen25_coder_1_5b_128k.json"]
    longest, short = files["ruler_qwen25_coder_1_5b_262k.json"], files["short_qwen25_coder_1_5b.json"]

    found = [seed["chat_answers"]["needles"]["found"] for seed in chat["seeds"]]
    seconds = [sum(seed[stage]["step_seconds"] for stage in ("pretraining", "sft")) for seed in chat["seeds"]]
    goal = ruler["goal"]
    arm, inside, beyond = _best_arm(study)
    difference = longest["difference"]
    rows = [
        [
            "SmolLM2-135M, 8K to 64K: 95 of 100 needles over the new window on each of three seeds, within 30 minutes",
            f"{_listed(found)}; {_listed(f'{each:.0f}' for each in seconds)} s of steps",
            f"{longer['rescaled_only']['needles']['found']}",
            "met" if min(found) >= 95 and max(seconds) < 1800 else "missed",
        ],
        [
            "Qwen2.5-Coder-1.5B: RULER (13 tests) at 131,072 of 40 or more",
            f"{goal['mean_of_12']} over 12 tests, {goal['mean_of_13_if_the_missing_test_gave_0']} if the missing one "
            "gave 0, without training",
            "the same",
            "met" if goal["mean_of_13_if_the_missing_test_gave_0"] >= 40 else "missed",
        ],
        [
            "Qwen2.5-Coder-1.5B, trained: above rescaled only at every length by a significant paired difference",
            f"best of {len(study['runs'])} trainings and averages, `{arm}`: {effect(inside)} at 32,768, "
            f"{effect(beyond)} at 131,072",
            "0 by this rule",
            "met" if min(inside["low"], beyond["low"]) > 0 else "missed",
        ],
        [
            "Qwen2.5-Coder-1.5B at 262,144: RULER within 10 points of its own 32,768",
            f"{effect(difference)}, not trained",
            "the same",
            _ten_points(difference),
        ],
        *(_short_goal(short, benchmark, arm) for benchmark in ("MMLU", "GSM-8K", "HumanEval")),
    ]
    return markdown("goal | found | rescaled only | verdict", rows)


def _ten_points(found: Mapping[str, float]) -> str:
    if found["low"] >= -10 or found["high"] < -10:
        return "met" if found["low"] >= -10 else "missed"
    return f"undecided, mean {'within it' if found['mean'] >= -10 else 'missed'}"


def _best_arm(study: Mapping[str, Any]) -> tuple[str, Mapping[str, float], Mapping[str, float]]:
    """The trained arm with the highest mean beyond the old window: its name and its differences to rescaled only."""
    beyond = _outcome(study, "all tests beyond the old window")
    name = max((arm for arm in beyond if beyond[arm]["by_training"]), key=lambda arm: beyond[arm]["trained"])
    (inside,) = (each for title, each in study["within_the_old_window"].items() if title.partition(",")[0] == name)
    return name, inside["by_training"], beyond[name]["by_training"]


def _short_goal(short: Mapping[str, Any], benchmark: str, arm: str) -> list[str]:
    pairs = {
        pair["second"]: {"mean": pair["difference"], "low": pair["low"], "high": pair["high"]}
        for pair in short["paired_differences"]
        if pair["benchmark"] == benchmark and pair["first"] == "before"
    }
    trained, rescaled = pairs.get(arm), pairs.get("rescaled")
    verdict = "not measured"
    if trained:
        near = "mean within it" if trained["mean"] >= -1 else "mean missed"  # a gain is no miss
        verdict = "met" if trained["low"] >= -1 else "missed" if trained["high"] < -1 else f"undecided, {near}"
    alone = {score["model"]: score["score"] for score in short["scores"] if score["benchmark"] == benchmark}
    cells = [
        effect(pair, 2) if pair else f"{alone[model]:.1f}, the start not measured" if model in alone else "not measured"
        for model, pair in ((arm, trained), ("rescaled", rescaled))
    ]
    return [f"Qwen2.5-Coder-1.5B, trained (`{arm}`): {benchmark} within 1 point of the start", *cells, verdict]


def choices_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """The choices of the recipe, one arm each against the base: what the paper says, and what three seeds say here.

    Args:
        recorded: The record of the study `smollm2-135m-32k` alone.
    """
    (study,) = recorded
    arms = _outcome(study, "needles beyond the old window")
    rows = []
    for arm, (change, paper) in CHOICES.items():
        found = arms[arm]["to_base"]
        rows.append([change, paper, f"{arms[arm]['trained']:.0f}", effect(found), _side(found)])
    base = f"{arms['base']['trained']:.0f}"
    return markdown(f"base, instead | paper | needles, % (base {base}) | against the base, points | read", rows)


def study_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """The arms of a study that ran: seeds, before, rescaled only, trained, by training and against the base.

    Args:
        recorded: The record of one study: `outcomes` as `ultralong ablate` writes them.
    """
    (study,) = recorded
    rows = []
    for outcome in study["outcomes"]:
        if "beyond" not in outcome["name"]:
            continue
        digits = 1 if outcome["unit"] == "per cent" else 2
        for arm in outcome["arms"]:
            if arm["trained"] is None:
                continue
            stages = [_number(arm[stage], digits) for stage in ("before", "rescaled", "trained")]
            against = effect(arm["to_base"]) if arm["to_base"] else ""
            seeds = str(arm["by_training"]["seeds"]) if arm["by_training"] else ""
            rows.append([outcome["name"], f"`{arm['arm']}`", seeds, *stages, effect(arm["by_training"]), against])
    head = "measure | arm | seeds | before | rescaled only | trained | by training | against the base, same seeds"
    return markdown(head, rows)


def effect(found: Mapping[str, Any] | None, digits: int = 1) -> str:
    """A difference with its 95% interval: `+2.6 (-5.1 to +10.8)`; "" for none."""
    if found is None:
        return ""
    mean, low, high = (f"{found[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _outcome(study: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    (outcome,) = (each for each in study["outcomes"] if each["name"] == name)
    return {arm["arm"]: arm for arm in outcome["arms"]}


def _side(found: Mapping[str, float]) -> str:
    return "better" if found["low"] > 0 else "worse" if found["high"] < 0 else "undecided"


def _number(value: float | None, digits: int) -> str:
    return "not measured" if value is None else f"{value:,.{digits}f}"


def _listed(values: Iterable[object]) -> str:
    *first, last = [str(value) for value in values]
    return f"{', '.join(first)} and {last}"


# As `ultralong.bench.tables.TABLES`.
TABLES: dict[str, tuple[tuple[str, ...], Callable[[Sequence[dict[str, Any]]], list[str]]]] = {
    "goals": (
        (
            "smollm2_64k_chat_h200.json",
            "smollm2_64k_longer_h200.json",
            "ruler_qwen25_coder_1_5b.json",
            "ablation_qwen25_coder_1_5b_128k.json",
            "ruler_qwen25_coder_1_5b_262k.json",
            "short_qwen25_coder_1_5b.json",
        ),
        goals_table,
    ),
    "choices": (("ablation_smollm2_32k.json",), choices_table),
    "tinyllama": (("tinyllama_16k_h200.json",), study_table),
    "qwen": (("ablation_qwen25_coder_1_5b_128k.json",), study_table),
}

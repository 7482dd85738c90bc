"""The demo's page: what every stage left, in one report."""

from __future__ import annotations

import shlex
import time
from typing import Any

from ultralong.demo.stages import Demo
from ultralong.evaluation.report.report import ReportData, count_needles, write_report
from ultralong.utils import settings
from ultralong.utils.environment import describe_environment
from ultralong.utils.files import read_json, read_jsonl

MANY_KEYS = (
    "One needle among many of the same form is too hard for the miniature at new lengths, trained or not: "
    "notebooks/results/many_keys_miniature.json."
)


def report(demo: Demo) -> dict[str, Any]:
    """Write `report.html` and `report.json`; returns the latter's content."""
    config = demo.config
    before, rescaled, after = (demo.measure(which) for which in ("base", "extended", "tuned"))
    logs = {name: read_jsonl(demo.out / name / "log.jsonl") for name in ("pretraining", "tuning")}
    checkpoint = demo.tuned()
    plain = read_json(demo.out / "plain.json")
    data = ReportData(
        title=f"{config.model}: {demo.base_window():,} to {config.target:,} tokens",
        base_window=demo.base_window(),
        target_window=config.target,
        seconds=round(time.perf_counter() - demo.started, 1),
        checkpoint=str(checkpoint),
        needle_before=before["needle"],
        needle_after=after["needle"],
        needle_rescaled=rescaled["needle"],
        perplexity={
            "before": before["perplexity"],
            "rescaled only": rescaled["perplexity"],
            "after": after["perplexity"],
        },
        losses={name: [(record["step"], record["loss"]) for record in log] for name, log in logs.items()},
        packed_rows=demo.busiest_rows(6),
        facts=_facts(demo, logs, plain),
        settings=settings.to_mapping(config),
        commands={
            f"ultralong eval needle {shlex.quote(str(checkpoint))} --lengths {config.target}": "ask it more",
            "ultralong course start ~/ultralong-course && jupyter lab ~/ultralong-course": "the same, step by step",
        },
        notes=(
            credit(rescaled, after, demo.base_window(), config.target),
            "No training sample of any stage hides a needle farther away than the old window: pretraining "
            "reads plain documents, SFT uses examples that fit into the old window.",
            "The needle test is the easiest long-context test there is; it shows that positions work.",
            *([MANY_KEYS] if config.model == "miniature" else []),
        ),
        environment=describe_environment(),
    )
    write_report(demo.out, data)
    return read_json(demo.out / "report.json")


def credit(rescaled: dict[str, Any], after: dict[str, Any], window: int, target: int) -> str:
    """Which step of the recipe brought what, in two sentences made from what was measured.

    Args:
        rescaled: What `Demo.measure` found with RoPE rescaled and nothing trained.
        after: The same after training.
        window: The old window in tokens.
        target: The new one.
    """
    alone, trained = (count_needles(found["needle"], window, target) for found in (rescaled, after))
    last = [found["perplexity"][-1]["perplexity"] for found in (rescaled, after)]
    perplexity = (
        f"Perplexity of the last positions is {last[0]:.1f} with rescaling alone and {last[1]:.1f} after training."
    )
    if alone is None or trained is None:
        return perplexity
    if trained["low"] > alone["high"]:
        who = "training found the rest"
    elif alone["correct"] >= trained["correct"]:
        who = "training added none of them"
    else:
        who = "what training added is within the intervals"
    return (
        f"Beyond the old window RoPE rescaled alone finds {alone['correct']} of {alone['n']} needles, and the trained "
        f"model {trained['correct']}: {who}. {perplexity}"
    )


def _facts(demo: Demo, logs: dict[str, list[dict[str, Any]]], plain: dict[str, Any]) -> dict[str, str]:
    extension = read_json(demo.out / "extend.json")
    facts = {"RoPE": f"{extension['method']}, factor {extension['factor']:g}"}
    for name, log in logs.items():
        seconds = sum(record["seconds"] for record in log)
        facts[name] = f"{log[-1]['tokens']:,} tokens in {len(log)} steps, {seconds:.0f} s"
    found = "found" if plain["expected"] in plain["answered"] else "missed"
    facts["plain transformers"] = (
        f"opened it and {found} a number at {plain['tokens']:,} tokens: {plain['answered'].strip()}"
    )
    return facts

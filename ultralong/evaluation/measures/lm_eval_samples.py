"""Outcomes of a short benchmark's samples, kept beside its score: so that two models are compared sample by sample.

One model's score on 1,000 questions has an interval some three points to either side. Two models, one trained from the
other, answer most questions alike: what changed is known far better from the pairs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultralong.utils.files import read_jsonl

STAMP = r"_\d{4}-\d{2}-\d{2}T[\d.-]+"  # the date behind a task's name in the name of its file


def read_outcomes(tasks: Sequence[str], metric: str, folder: Path) -> list[dict[str, Any]]:
    """One record a sample from what lm-eval's `--log_samples` wrote.

    Args:
        tasks: lm-eval's tasks and groups of them.
        metric: The metric and its filter, such as `exact_match,strict_match`.
        folder: Folder that lm-eval wrote to.

    Returns:
        Records in the order of tasks and samples: `task` (lm-eval's), `index` (in the data), `doc` and `prompt`
        (lm-eval's SHA-256 of both), `score` (0 to 1), and of generated text `answer` and `expected`. Prompts can be
        made again and are left out.

    Raises:
        ValueError: There are none, or one lacks the metric.
    """
    name, _, filtered = metric.partition(",")
    outcomes = []
    for path in sorted(folder.rglob("samples_*.jsonl")):
        task = re.sub(f"{STAMP}$", "", path.stem.removeprefix("samples_"))
        for sample in read_jsonl(path):
            if sample["filter"] != filtered:
                continue
            if name not in sample:
                raise ValueError(f"Sample {sample['doc_id']} of {task} in {path} does not hold {name}.")
            outcomes.append(
                {
                    "task": task,
                    "index": sample["doc_id"],
                    "doc": sample["doc_hash"],
                    "prompt": sample["prompt_hash"],
                    "score": float(sample[name]),
                    **_text(sample),
                }
            )
    if not outcomes:
        raise ValueError(f"lm-eval logged no samples of {', '.join(tasks)} with the filter {filtered} in {folder}.")
    return sorted(outcomes, key=lambda outcome: (outcome["task"], outcome["index"]))


def _text(sample: dict[str, Any]) -> dict[str, str]:
    """What a model wrote, unfiltered, and what was expected; nothing where likelihoods of endings were compared."""
    answer = sample["resps"][0]
    while isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    return {"answer": answer, "expected": sample["target"]} if isinstance(answer, str) else {}

"""A study of one arm that runs in seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ARM = {
    "name": "low",
    "changes": {"training.optimizer.lr": 1e-6},
    "hypothesis": "A rate of almost nothing changes nothing.",
    "refuted_if": {"outcome": "needles", "above": 0},
}


def study_file(folder: Path, texts: Path, *, arms: Sequence[dict[str, Any]] = (ARM,), **changes: Any) -> Path:
    """Write a study of the miniature, whose base has these changes.

    Args:
        folder: Where the file goes.
        texts: Folder of texts, to train on and held out alike.
        arms: Its arms.
        changes: Values of the base; of a group only the keys that are given.
    """
    base: dict[str, Any] = {
        "model": "miniature",
        "stages": [{"to": 576, "factor": 2}],
        "rows": {"recipe": str(texts)},
        "heldout": {"recipe": str(texts)},
        "training": {"steps": 1, "dtype": "float32", "optimizer": {"lr": 1e-3}},
        "evaluation": {
            "tasks": ["needle", "perplexity"], "needle_lengths": [128], "needle_depths": [0.5], "grid_samples": 2,
            "max_rows": 2,
        },
    }  # fmt: skip
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) else value
    path = folder / "study.yaml"
    path.write_text(json.dumps({"name": "small", "question": "Does it run?", "base": base, "arms": list(arms)}))
    return path

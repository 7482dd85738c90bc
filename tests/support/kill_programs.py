"""The programs of `command_kill_trials`, and what they read: a tiny model, texts, conversations, a study, configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from small_study import ARM, study_file

TEXTS, TALKS = 6, 120
TRAINING = {"dtype": "float32", "global_batch_size": 2, "save_every": 2, "optimizer": {"lr": 1e-3}}
TESTS = "needle,niah_single_1,niah_multikey_1,infinitebench_passkey,perplexity,longppl,loss"
PACK = ("--tokenizer", "model", "--quiet", "--workers", "2", "--length")
# Name -> commands, each of which resumes what an earlier start of it has left in `work/`.
PROGRAMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "pack": (
        ("pack", "texts.yaml", *PACK, "128", "--out", "work/texts"),
        ("data", "build", "talks.yaml", *PACK, "128", "--out", "work/talks"),
    ),
    "sft": (
        ("pack", "talks.yaml", *PACK, "128", "--out", "work/rows"),
        ("sft", "sft.yaml", "--processes", "2", "--resume", "--quiet"),
    ),
    "ablate": (("ablate", "study.yaml", "--out", "work/study", "--quiet"),),
    "eval": (
        ("pack", "texts.yaml", *PACK, "256", "--out", "work/rows"),
        (
            "eval", "run", TESTS, "model", "--lengths", "1024", "1280", "--samples", "6", "--no-chat",
            "--grid", "3", "2", "--grid-samples", "2", "--rows", "work/rows", "--max-rows", "3",
            "--short-context", "64", "--short-stride", "32", "--key-alpha", "-10", "--key-beta", "-100",
            "--beyond-window", "--workers", "2", "--out", "work/eval",
        ),
    ),
}  # fmt: skip


def prepare(folder: Path, make_tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Write what the programs read into a folder; the last two are the fixtures of these names."""
    make_tiny_model(num_hidden_layers=1, max_position_embeddings=1024).save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    for number in range(TEXTS):
        text = "".join(f"Entry {n} of log {number}: the tide came in and no ship had passed. " for n in range(60))
        (folder / "texts" / f"{number}.txt").write_text(text)
    talks = [
        [{"role": "user", "content": f"What is in box {n}?"}, {"role": "assistant", "content": f"A stone of {n} kg."}]
        for n in range(TALKS)
    ]
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    _recipe(folder / "texts.yaml", "texts")
    _recipe(folder / "talks.yaml", "talks.jsonl", kind="chat")
    sft = {**TRAINING, "model": "model", "data": [{"rows": "work/rows"}], "out": "work/sft", "steps": 40}
    (folder / "sft.yaml").write_text(json.dumps(sft))
    tuned = {"rows": {"recipe": "talks.yaml"}, "length": 128, "training": {**TRAINING, "steps": 8}}
    arms = (ARM, {**ARM, "name": "sft", "changes": {"sft": tuned, "start_share": 0.25}})
    study_file(
        folder,
        Path("texts"),
        arms=arms,
        model="model",
        stages=[{"to": 1536, "factor": 2}],
        training={**TRAINING, "steps": 8},
        evaluation={
            "tasks": ["needle", "niah_single_1", "perplexity"],
            "lengths": [1024],
            "samples": 2,
            "chat": False,
            "needle_lengths": [300],
        },
    )


def _recipe(path: Path, source: str, **changes: Any) -> None:
    sources = [{"name": "own", "license": "CC0-1.0", "path": source}]
    path.write_text(json.dumps({"name": path.stem, "description": "Made here.", "sources": sources, **changes}))

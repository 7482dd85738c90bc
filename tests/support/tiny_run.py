"""A real run small enough for a test: a tiny model folder, packed rows, and the config that trains one on the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ultralong.data.read.documents import Document
from ultralong.data.rows.packing import PackSettings, pack
from ultralong.data.tokens.tokenize import tokenize_corpus
from ultralong.training import step
from ultralong.training.config import DataSource, OptimizerConfig, TrainConfig

LENGTH = 64


def make_run(folder: Path, model: Any, tokenizer: Any, **changes: Any) -> TrainConfig:
    """Write `folder/model` and `folder/rows`; return a config with paths relative to `folder`."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    text = "Entry {0} of the log: the tide came in at {0} and no ship had passed. "
    documents = [Document(f"d{i}", text.format(i) * 6, "test", "CC0-1.0") for i in range(40)]
    store = tokenize_corpus(documents, tokenizer, folder / "tokens", quiet=True)
    pack(store, tokenizer, folder / "rows", PackSettings(length=LENGTH), quiet=True)
    config = TrainConfig(
        model="model",
        out="run",
        data=(DataSource("rows"),),
        steps=4,
        global_batch_size=2,
        dtype="float32",
        optimizer=OptimizerConfig(lr=1e-3),
    )
    return replace(config, **changes)


def before_reading(monkeypatch: pytest.MonkeyPatch, rank: int, at: int, work: Callable[[], object]) -> None:
    """Have one rank do something before it reads the rows of a step, and of all that follow."""
    real = step._step_batches

    def reads(run: Any, number: int) -> Any:
        if run.processes.accelerator.process_index == rank and number >= at:
            work()
        return real(run, number)

    monkeypatch.setattr(step, "_step_batches", reads)

"""Extend a checkpoint of every causal language model that transformers knows, and open it again.

Only configs matter here: `extend` never loads a weight, so each checkpoint has one tensor of one number. The layers are
cut to two where a config takes that; what is compared is the table that the model class computes for itself.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ultralong.bench.results import write_rows
from ultralong.checkpoints.class_table import class_table
from ultralong.checkpoints.config import CONFIG_ERRORS, one_line
from ultralong.checkpoints.extend import extend
from ultralong.rope import from_config, inverse_frequencies, window_of
from ultralong.utils.files import read_json, write_json

# What a config may say of its RoPE before it is extended, beside its own default, and the methods asked for.
SOURCES: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
METHODS = ("auto", "linear", "dynamic", "llama3", "ntk")


def model_types() -> list[str]:
    """Names of all architectures with a causal language model, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def cases() -> Iterator[tuple[str, str, str]]:
    """Architecture, RoPE of the source, method: every source extended by "auto", the default one by each method."""
    for kind in model_types():
        for method in METHODS:
            yield kind, "default", method
        for source in SOURCES:
            if source != "default":
                yield kind, source, "auto"


def sweep(wanted: Sequence[tuple[str, str, str]]) -> list[dict[str, str]]:
    """Extend each case eightfold and compare the class's table with the one meant.

    Returns:
        Rows of `type`, `source`, `method`, `result` and `reason`. A result is "equal", "refused" (one line says why),
        "unmade" (transformers itself cannot make or write the source), "different" or "crash".
    """
    rows = []
    for kind, source, method in wanted:
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result, reason = _case(Path(scratch), kind, SOURCES[source], method)
        rows.append({"type": kind, "source": source, "method": method, "result": result, "reason": reason})
    return rows


def counts(rows: Sequence[dict[str, str]]) -> dict[str, int]:
    """Rows by result."""
    return dict(Counter(row["result"] for row in rows))


def bench_configs(types: Sequence[str], json: Path | None) -> list[dict[str, Any]]:
    """Sweep all cases of some architectures.

    Args:
        types: Names of architectures; all where it is empty.
        json: Result file that is written after every architecture.

    Returns:
        A row for each architecture: how many cases have which result, and the reasons given, each once.

    Raises:
        ValueError: There is no causal language model of such a name.
    """
    if unknown := sorted(set(types) - set(model_types())):
        raise ValueError(f"transformers has no causal language model of the type {', '.join(unknown)}.")
    rows = []
    for kind in types or model_types():
        found = sweep([case for case in cases() if case[0] == kind])
        reasons = dict.fromkeys(f"{row['result']}: {row['reason']}"[:240] for row in found if row["reason"])
        rows.append({"type": kind, "counts": counts(found), "reasons": list(reasons)})
        if json is not None:
            write_rows(json, rows, methods=METHODS, sources=SOURCES)
    return rows


def _case(folder: Path, kind: str, rope: dict[str, Any] | None, method: str) -> tuple[str, str]:
    try:
        _write_source(folder / "source", kind, rope)
        AutoConfig.from_pretrained(folder / "source")
    except Exception as error:  # noqa: BLE001 - the class's own fault, whatever it is: there is no source to extend
        return "unmade", f"{type(error).__name__}: {one_line(error)}"[:300]
    try:
        report = extend(folder / "source", "8x", folder / "out", method, quiet=True)
    except ValueError as error:
        return "refused", str(error).replace(str(folder), "FOLDER")
    except Exception as error:  # noqa: BLE001 - anything but a ValueError is what is looked for
        return "crash", f"{type(error).__name__}: {one_line(error)}"
    try:
        return _compare(folder / "out", report.new_window)
    except CONFIG_ERRORS as error:
        return "crash", f"after: {type(error).__name__}: {one_line(error)}"


def _write_source(folder: Path, kind: str, rope: dict[str, Any] | None) -> None:
    config = AutoConfig.for_model(kind)
    config.save_pretrained(folder)
    written = read_json(folder / "config.json")
    if rope is not None:
        before = written.get("rope_parameters") or {}
        written["rope_parameters"] = {"rope_theta": before.get("rope_theta", 10_000.0)} | rope
        if rope["rope_type"] in ("yarn", "llama3"):
            window = written.get("max_position_embeddings") or 2048
            written["rope_parameters"]["original_max_position_embeddings"] = max(1, window // int(rope["factor"]))
    write_json(folder / "config.json", written)
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")


def _compare(folder: Path, window: int) -> tuple[str, str]:
    config = AutoConfig.from_pretrained(folder)
    meant = inverse_frequencies(from_config(config))
    found = class_table(config)
    if found is None:
        return "different", "the class has no rotary table"
    if found[0].shape != meant[0].shape or not torch.allclose(found[0], meant[0], rtol=1e-6, atol=0):
        return "different", "another table"
    if abs(found[1] - meant[1]) > 1e-6:
        return "different", f"attention factor {found[1]} instead of {meant[1]}"
    if window_of(config) < window:
        return "different", f"window {window_of(config)} instead of {window}"
    return "equal", ""

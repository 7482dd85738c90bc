"""Checkpoints of every kind opened by programs of several versions, beside what `ultralong check` says of them.

Each version of transformers is an interpreter of its own (`make readers` makes them). It opens every checkpoint and
says window, rotary table at two lengths, type of the parameters and tokens of a text; what the installed version says
is the measure. vLLM and SGLang are asked for their reading of the config and their table, which needs no GPU, where an
interpreter has them. What did not run stands in the rows as `check` has it from its source.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import __version__ as transformers_version

from ultralong import miniature
from ultralong.bench.checkpoints.questions import QUESTIONS
from ultralong.bench.results import write_rows
from ultralong.checkpoints.check import Readings, check
from ultralong.checkpoints.extend import extend
from ultralong.utils.files import read_json, write_json

WINDOW = 2048  # tokens of the extended models; the miniature has 512
TEXT = "The tide came in at dawn; no ship had passed. 1048576"


def _extended(method: str, **options: Any) -> Callable[[Path], Any]:
    return partial(_extend, method, options)


def _extend(method: str, options: Mapping[str, Any], out: Path) -> None:
    extend(miniature.path(), WINDOW, out, method, quiet=True, **options)


def _longrope(out: Path, base: Path | None = None) -> None:
    pairs = AutoConfig.from_pretrained(miniature.path()).head_dim // 2
    long = tuple(1.0 + 3.0 * pair / pairs for pair in range(pairs))
    source = base or miniature.path()
    extend(source, WINDOW, out, "longrope", short_factors=(1.0,) * pairs, long_factors=long, quiet=True)


def _window_left(window: int, out: Path) -> None:
    """A yarn config whose max_position_embeddings was not raised with the scaling."""
    _extend("yarn", {}, out)
    write_json(out / "config.json", read_json(out / "config.json") | {"max_position_embeddings": window})


def _saved_by_transformers(out: Path) -> None:
    """A yarn model that transformers itself saved again: its config and tokenizer lose the older spelling."""
    with tempfile.TemporaryDirectory() as scratch:
        _extend("yarn", {"theta": 500_000.0}, Path(scratch) / "model")
        AutoModelForCausalLM.from_pretrained(Path(scratch) / "model").save_pretrained(out)
        AutoTokenizer.from_pretrained(Path(scratch) / "model").save_pretrained(out)


def _without_older_keys(out: Path) -> None:
    """The same, with a tokenizer that every version opens: a theta and a scaling that transformers 4 does not see."""
    _extend("llama3", {"theta": 500_000.0}, out)
    entries = read_json(out / "config.json")
    write_json(out / "config.json", {k: v for k, v in entries.items() if k not in ("rope_theta", "rope_scaling")})


def _of_type(kind: str, method: str, out: Path) -> None:
    """A model of another architecture with the miniature's tokenizer."""
    base = out.with_name(f"{out.name}-base")
    shape = read_json(miniature.path() / "config.json")
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    tokens = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(
        kind, **{key: shape[key] for key in keys if key in shape}, num_hidden_layers=2, **tokens
    )
    config.max_position_embeddings = 512
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(miniature.path() / name, base / name)
    if method == "longrope":
        _longrope(out, base)
    else:
        extend(base, WINDOW, out, method, quiet=True)


KINDS: dict[str, Callable[[Path], Any]] = {
    "larger base": _extended("default", theta=500_000.0),
    "linear": _extended("linear"),
    "ntk": _extended("ntk"),
    "dynamic": _extended("dynamic"),
    "yarn": _extended("yarn"),
    "yarn, larger base, beta 32": _extended("yarn", theta=500_000.0, beta=32.0),
    "yarn, no temperature": _extended("yarn", attention_factor=1.0),
    "yarn, paper's ramp": _extended("yarn", ramp="rotations", attention_factor=1.0),
    "yarn, larger factor": _extended("yarn", factor=8.0),
    "llama3": _extended("llama3"),
    "longrope": _longrope,
    "phi3, longrope": partial(_of_type, "phi3", "longrope"),
    "qwen2, longrope": partial(_of_type, "qwen2", "longrope"),
    "mistral, longrope": partial(_of_type, "mistral", "longrope"),
    "olmo, linear": partial(_of_type, "olmo", "linear"),
    "yarn, window left at the base's": partial(_window_left, 512),
    "yarn, window half-way": partial(_window_left, 1024),
    "qwen2, yarn": partial(_of_type, "qwen2", "yarn"),
    "qwen3, yarn": partial(_of_type, "qwen3", "yarn"),
    "mistral, yarn": partial(_of_type, "mistral", "yarn"),
    "mistral, llama3": partial(_of_type, "mistral", "llama3"),
    "yarn, saved again by transformers 5": _saved_by_transformers,
    "llama3 without rope_theta and rope_scaling": _without_older_keys,
}


def bench_readers(
    pythons: Sequence[Path],
    kinds: Sequence[str],
    *,
    vllm: Path | None,
    sglang: Path | None,
    json: Path | None,
) -> list[dict[str, Any]]:
    """Open a checkpoint of each kind with each interpreter, and compare with what `check` says.

    Args:
        pythons: Interpreters with other versions of transformers.
        kinds: Names in `KINDS`; all where it is empty.
        vllm: Interpreter with vLLM.
        sglang: Interpreter with SGLang.
        json: Result file.

    Returns:
        Rows of `kind`, `program`, `version`, `read` ("right", "wrong", "refused", or None where the program did not
        run), `differs` (what is wrong, or the error), and of `check` its verdict (`check`), `remarks`, the `window`
        that the program offers and what is `typed`.
    """
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folders: dict[str, Path] = {}
        for kind in kinds or KINDS:
            folders[kind] = Path(scratch) / str(len(folders))
            KINDS[kind](folders[kind])
        _, measure = ask(Path(sys.executable), folders)
        asked = [("transformers", python) for python in pythons]
        asked += [(name, python) for name, python in (("vLLM", vllm), ("SGLang", sglang)) if python is not None]
        for program, python in asked:
            version, answers = ask(python, folders, program)
            for kind in folders:
                read, differs = compared(measure[kind], answers[kind])
                said = {"kind": kind, "program": program, "version": version, "read": read, "differs": differs}
                rows.append(said | {key: answers[kind][key] for key in ("offered",) if key in answers[kind]})
        for kind, folder in folders.items():
            rows = _with_check(rows, kind, check(folder), measure[kind], str(folder))
    if json is not None:
        write_rows(json, rows, window=WINDOW)
    return rows


def _with_check(
    rows: list[dict[str, Any]], kind: str, readings: Readings, ours: dict[str, Any], folder: str
) -> list[dict[str, Any]]:
    """The rows with what `check` says of one kind; programs that did not run get rows of their own."""
    for one in readings.readings:
        same = [row for row in rows if (row["kind"], row["program"]) == (kind, one.program)]
        mine = [row for row in same if row["version"].startswith(one.version)]
        said: dict[str, Any] = {"check": one.verdict}
        said["remarks"] = [text.replace(folder, "FOLDER") for text in one.remarks]
        said |= {"window": one.window, "typed": one.typed.replace(folder, "FOLDER")}
        if mine:
            mine[0].update(said)
            if mine[0].pop("offered", one.window) != one.window:
                mine[0]["differs"] = [*mine[0]["differs"], "another window than check says"]
                mine[0]["read"] = "wrong"
            continue
        own = one.version == transformers_version
        read, differs = compared(ours, ours) if own else (None, [])
        head = {"kind": kind, "program": one.program, "version": one.version, "read": read, "differs": differs}
        rows.append(head | said)
    return rows


def unnamed(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows in which a program reads something wrong, or refuses, and `check` did not say so."""
    return [row for row in rows if row["read"] in ("wrong", "refused") and row["check"] not in ("wrong", "refused")]


def ask(
    python: Path, folders: Mapping[str, Path], program: str = "transformers"
) -> tuple[str, dict[str, dict[str, Any]]]:
    """What one interpreter says of checkpoints: the program's version, and an answer by kind.

    Raises:
        ValueError: The interpreter could not be run, or has no such program.
    """
    words = [str(python), "-c", QUESTIONS[program], TEXT, json.dumps([512, WINDOW]), *map(str, folders.values())]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    answers = [json.loads(rest) for word, _, rest in lines if word == "said"]
    if done.returncode or len(answers) != len(folders):
        raise ValueError(f"{python} could not open the checkpoints: {done.stderr.strip()[-300:]}")
    version = next(rest for word, _, rest in lines if word == "version")
    return version, dict(zip(folders, answers, strict=True))


def compared(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Verdict: "right", "wrong" or "refused", and what differs."""
    if "refused" in theirs:
        return "refused", [theirs["refused"]]
    differs = [key for key in ("window", "dtype", "ids", "chat") if key in theirs and ours[key] != theirs[key]]
    if theirs.get("positions", WINDOW) < WINDOW:
        differs.append(f"a table of {theirs['positions']:,} positions")
    for length, one, other in zip((512, WINDOW), ours["tables"], theirs["tables"], strict=True):
        if not torch.allclose(torch.tensor(one), torch.tensor(other), rtol=1e-5, atol=0):
            differs.append(f"table at {length} tokens")
    if abs(ours["factor"] - theirs["factor"]) > 1e-6:
        differs.append(f"attention factor {theirs['factor']:g} for {ours['factor']:g}")
    return ("wrong" if differs else "right"), differs

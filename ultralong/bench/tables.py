"""Tables of the pages in `notebooks/results`, made from recorded measurements: `ultralong bench tables`.

A table stands between two comment lines, `<!-- table NAME -->` and `<!-- end -->`; what is between them is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ultralong.bench import model_tables
from ultralong.bench.checkpoints.tables import configs_table, faults_table, lines_table, readers_table
from ultralong.bench.results import KERNELS, Row, all_rows, facts_of, markdown, rows_of
from ultralong.bench.training.longest_rows import longest_table
from ultralong.bench.training.saves_summary import saves_table
from ultralong.bench.training.tables import (
    capped_table,
    curves_table,
    families_table,
    packed_table,
    refused_table,
    training_table,
)
from ultralong.utils.files import read_json, write_text

ROOT = Path(__file__).parents[2]  # of a clone
PAGES = ("README.md", "real_models.md")  # of notebooks/results
# How the names of training's peers begin, and the package that is measured.
PEER_PACKAGES = {"torch-cp": "accelerate", "trl": "trl", "deepspeed": "deepspeed", "torchtitan": "torchtitan"}
SCHEMES = ("single", "ulysses", "gathered", "ring")
# Peers, and the column of the scheme that they use.
PEERS = {
    "torch-cp-cudnn": ("torch context_parallel, cuDNN", "gathered"),
    "torch-cp-flash": ("torch context_parallel, flash", "gathered"),
    "ring-flash-attn-zigzag": ("ring-flash-attn on {kernel}", "ring"),
}


def attention_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """Useful TF/s per GPU by length, rows and kernel: one GPU, then each scheme with its share of one GPU's rate.

    Other projects' attention stands in the column of the scheme that it uses.

    Args:
        recorded: What `ultralong bench attention --json` wrote, one or more files.

    Returns:
        Lines of a Markdown table; lengths rise, whole rows before packed ones. What two files measured is the later's.
    """
    results = [row for row in all_rows(recorded) if row["tflops"] is not None]
    lengths = sorted({length for file in recorded for length in file["options"]["lengths"]})
    cells: list[list[str]] = []
    for length in lengths:
        for packed in (False, True):
            here = [r for r in results if r["tokens"] == length and r["packed"] == packed]
            for kernel in dict.fromkeys(r["kernel"] for r in here if r["name"] in SCHEMES):
                rates = {r["name"]: r for r in here if r["kernel"] == kernel}
                before = [f"{length:,}", "packed" if packed else "whole", KERNELS.get(kernel, kernel)]
                cells.append([*before, *(_cell(rates.get(name)) for name in SCHEMES)])
            for peer in (r for r in here if r["name"] in PEERS):
                name, column = PEERS[peer["name"]]
                rate = [f"{peer['tflops']:.0f}" if scheme == column else "" for scheme in SCHEMES]
                cells.append([f"{length:,}", "whole", name.format(**peer), *rate])
    return markdown("tokens | rows | kernel | one GPU | Ulysses | gathered | ring", cells)


def _cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    rate = f"{result['tflops']:.0f}"
    return rate if result["name"] == "single" else f"{rate} ({100 * result['of_one']:.1f}%)"


def prefill_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """Prefill of a long prompt: seconds, memory, and the share of the attention kernel's own rate.

    Args:
        recorded: What `ultralong bench prefill --json` wrote, one or more files.

    Returns:
        Lines of a Markdown table.
    """

    def cells(row: Row) -> list[str]:
        what = [row["model"], row["gpus"], f"{row['tokens']:,}", row["kv"]]
        took = [f"{row['seconds']:.1f}", f"{row['tflops']:.0f}", f"{100 * row['of_kernel']:.0f}%"]
        return [*what, *took, f"{row['peak_gib']:.1f}"]

    rows = sorted(all_rows(recorded), key=lambda row: (row["tokens"], row["gpus"]))
    head = "model | GPUs | tokens | cache | seconds | TF/s per GPU | of the kernel's | GiB of a GPU"
    return markdown(head, map(cells, rows))


def serve_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """One long prompt through the server, asked by OpenAI's client.

    Args:
        recorded: What `ultralong bench serve --json` wrote.

    Returns:
        Lines of a Markdown table; none where nothing was recorded.
    """

    def cells(row: Row) -> list[str]:
        cells = [row["model"], f"{row['tokens']:,}", row["gpus"], row["kv"]]
        # A prompt that was read faster than its kernel alone says that the kernel's time was not its own.
        of_kernel = "not known" if row["of_kernel"] > 1 else f"{row['of_kernel']:.0%}"
        cells += [f"{row['seconds_to_first_token']:.1f}", f"{row['tflops']:.0f}", of_kernel]
        return [*cells, f"{row['tokens_per_second_after']:.1f}", f"{row['again_seconds_to_first_token']:.2f} s"]

    head = (
        "model | prompt | GPUs | cache | seconds to the first token | TF/s per GPU | of the kernel's | "
        "tokens/s after | first token again"
    )
    return markdown(head, map(cells, sorted(all_rows(recorded), key=lambda row: (row["tokens"], row["gpus"]))))


SHARES = {"of_copy": ".0%", "of_transformers": ".2f"}  # of a decoding row, and how they are written


def decode_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """Decoding: tokens a second by prompt and batch, with what they are compared with in the same run.

    Args:
        recorded: What `ultralong bench decode --json` wrote, one or more files.

    Returns:
        Lines of a Markdown table; batches and lengths rise, transformers stands first.
    """

    def cells(row: Row) -> list[str]:
        what = [row["model"], row["batch"], f"{row['tokens']:,}", row["name"], row["gpus"], row["kv"]]
        if "note" in row:
            return [*what, row["note"]]
        shares = [format(row[key], spec) if key in row else "" for key, spec in SHARES.items()]
        rates = [f"{row['tokens_per_second']:,.1f}", f"{1000 * row['decode_seconds_per_token']:.1f}"]
        return [*what, *rates, *shares, f"{row['peak_gib']:.1f}"]

    rows = sorted(all_rows(recorded), key=lambda row: (row["batch"], row["tokens"]))
    head = (
        "model | prompts | tokens of each | by | GPUs | cache | tokens/s | ms a step | of a copy's rate | "
        "of transformers' | GiB of a GPU"
    )
    return markdown(head, map(cells, rows))


def plans_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """What `ultralong plan` says of measured steps, by version 0.3 and later, and how far that is off.

    Args:
        recorded: Plans of measured steps, one or more files.

    Returns:
        Lines of a Markdown table; steps of later versions of the trainer first.
    """

    def cells(row: Row) -> list[str]:
        cells = [row["model"], row["gpus"], f"{row['tokens']:,}", row["trainer"]]
        for key, digits in (("peak_gpu_gib", 1), ("seconds_per_step", 2)):
            cells.append(f"{row[key]:.{digits}f}")
            for by in (row.get("plan_0_3"), row["plan_now"]):  # 0.3 has no plan of what it could not train
                cells.append(f"{by[key]:.{digits}f} ({100 * (by[key] / row[key] - 1):+.1f}%)" if by else "")
        return cells

    rows = sorted(all_rows(recorded), key=lambda row: (row["model"], row["gpus"], row["tokens"]))
    rows.sort(key=lambda row: str(row["trainer"]), reverse=True)
    head = "model | GPUs | tokens | trainer | GiB, GPU | plan of 0.3 | plan now | seconds | plan of 0.3 | plan now"
    return markdown(head, map(cells, rows))


def host_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """Attention over the GPUs of a host: useful TF/s per GPU by GPUs, length, rows, kernel and scheme.

    Args:
        recorded: What the attention steps of `ultralong bench host` wrote.

    Returns:
        Lines of a Markdown table; none where nothing was recorded.
    """

    def cells(row: Row) -> list[str]:
        what = [row["ranks"], f"{row['tokens']:,}", "packed" if row["packed"] else "whole"]
        what += [KERNELS.get(row["kernel"], row["kernel"]), row["name"]]
        return [*what, f"{row['tflops']:.0f}", "" if row["of_one"] is None else format(row["of_one"], ".1%")]

    rows = [row for row in all_rows(recorded) if row["tflops"] is not None and row["ranks"] > 1]
    rows.sort(key=lambda row: (row["ranks"], row["tokens"], row["packed"], row["kernel"]))
    return markdown("GPUs | tokens | rows | kernel | scheme | TF/s per GPU | of one GPU", map(cells, rows))


# Name of a table: the recorded files it is made from (in notebooks/results), and how.
TABLES: dict[str, tuple[tuple[str, ...], Callable[[Sequence[dict[str, Any]]], list[str]]]] = {
    "attention": (
        ("attention_131k.json", "attention_512k_first.json", "attention_512k.json", "attention_512k_cudnn.json"),
        attention_table,
    ),
    # A star stands for files that need not be there: hosts are measured when one is to be had.
    "training": (
        ("training_sharded_h200.json", "training_1gpu_h200.json", "host_*_train_*.json", "models_*.json"),
        training_table,
    ),
    "host": (("host_*_attention_*.json",), host_table),
    "plans": (("plans_h200.json",), plans_table),
    "longest": (("plans_longest_rows.json",), longest_table),
    "capped": (("capped_*.json",), capped_table),
    "packed": (("packed_*.json",), packed_table),
    "prefill": (
        (
            "prefill_1gpu_262144.json",
            "prefill_2gpu_262144.json",
            "prefill_1gpu_1m_4layers_fp8.json",
            "prefill_2gpu_1m_4layers.json",
        ),
        prefill_table,
    ),
    "decode": (("decode_*_ahead.json",), decode_table),
    "serve": (("serve_1m_*.json",), serve_table),
    "saves": (("saves_*.json",), saves_table),
    "readers": (("readers.json",), readers_table),
    "lines": (("readers.json",), lines_table),
    "configs": (("config_sweep.json",), configs_table),
    "families": (("families_cpu.json",), families_table),
    "refused": (("families_cpu.json",), refused_table),
    "curves": (("reported_smollm2.json",), curves_table),
    "curves_1_5b": (("reported_qwen25_coder_1_5b.json",), curves_table),
    "faults": (("faults.json",), faults_table),
    **model_tables.TABLES,
}


def measured_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """Who measured what the other tables show: version and commit of this library, torch, peers, hardware and date.

    Args:
        recorded: Result files, each with its name as `file`; one line for each file, version of it and peer in it.
    """
    cells = []
    for file in recorded:
        found = {(facts_of(file, row), _peer(row)): None for row in rows_of(file)}
        for facts, peer in sorted(found, key=lambda each: (each[0].date, each[0].version, each[0].commit, each[1])):
            version = facts.version or "not recorded"
            cells.append([file["file"], version, facts.commit, facts.torch, peer, facts.hardware, facts.date])
    return markdown("file | ultralong | commit | torch | peer | hardware | date", cells)


def _peer(row: Mapping[str, Any]) -> str:
    """A peer's name with its package's version, which the oldest rows lack; "" for a row of ours."""
    name = row.get("peer", "")
    package = next((package for begin, package in PEER_PACKAGES.items() if name.startswith(begin)), None)
    return name and f"{name}, {package} {row['versions'].get(package, 'of a version not recorded')}"


# Plans are made from other files' measurements, errors depend on no machine, and the page of real models names its own.
OTHERS = ("plans", "longest", "families", "refused", "curves", "curves_1_5b", *model_tables.TABLES)
MEASURED = tuple(dict.fromkeys(file for name, (files, _) in TABLES.items() if name not in OTHERS for file in files))
TABLES["measured"] = (MEASURED, measured_table)


def filled(text: str, results: Path) -> str:
    """A Markdown text with every table in it filled from the recorded files.

    Args:
        text: With pairs of comment lines as this module's docstring says.
        results: Folder of the recorded measurements.

    Raises:
        ValueError: A table in the text has a name that is not in `TABLES`.
    """

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"There is no table {name!r}; there are {', '.join(TABLES)}.")
        files, make = TABLES[name]
        found = [path for file in files for path in (sorted(results.glob(file)) if "*" in file else [results / file])]
        lines = make([{**read_json(path), "file": path.name} for path in found])
        return "\n".join([f"<!-- table {name} -->", *lines, "<!-- end -->"])

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def rewrite(files: Sequence[Path] = ()) -> Sequence[Path]:
    """Fill the tables of Markdown files, by default of the pages of results, from this clone's records; returns them.

    Raises:
        ValueError: This is no clone of the repository, or a table has an unknown name.
    """
    results = ROOT / "notebooks" / "results"
    if not results.is_dir():
        raise ValueError(f"There are no recorded measurements at {results}: run this in a clone of the repository.")
    files = files or [results / page for page in PAGES]
    for file in files:
        write_text(file, filled(file.read_text(encoding="utf-8"), results))
    return files

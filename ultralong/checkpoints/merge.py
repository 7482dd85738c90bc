"""Linear averages of checkpoints of one model: the last ones of a run, or a trained model and the one it started from.

Averaging the last checkpoints evens out how long-context scores swing between them; a tenth of the start given back
restores what a later stage lost (SmolLM3 merged 0.9 and 0.1). Tensors are averaged one at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ultralong.checkpoints.config import DTYPES, load_config
from ultralong.checkpoints.files import CARD, INDEX, check_links, companion_files, copy_file, header, weight_files
from ultralong.checkpoints.merge_sources import Source, open_source
from ultralong.checkpoints.model_card import merged_card, read_licence
from ultralong.checkpoints.write import check_free, write_checkpoint
from ultralong.rope import from_config, rope_parameters, window_of
from ultralong.utils.files import read_json, sha256, write_json
from ultralong.utils.progress import progress

REPORT = "merge.json"
PIECE = 1 << 22  # numbers that are averaged at a time, so that float32 takes little memory
# Entries of a config that change no output of the forward pass; those that start with _ are notes of who wrote it, such
# as a model's name. The window and RoPE are compared apart.
NO_MATTER = {
    "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "max_position_embeddings", "original_max_position_embeddings", "pad_token_id", "pretraining_tp", "rope_parameters",
    "rope_scaling", "rope_theta", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
VOCABULARIES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did.

    Attributes:
        models: What was passed in, in order.
        weights: The weight of each.
        out: The new folder.
        tensors: Tensors averaged.
        copied: Tensors of whole numbers, which are the same in all and were copied.
        dtypes: Types that the averages are written in, those of the first model.
        notes: What a user should know, one sentence each.
        adapter: Whether the second model is a LoRA adapter of the first, and was added to it.
    """

    models: tuple[str, ...]
    weights: tuple[float, ...]
    out: str
    tensors: int
    copied: int
    dtypes: tuple[str, ...]
    notes: tuple[str, ...]
    adapter: bool = False

    def __str__(self) -> str:
        """One line for a terminal."""
        done = f"of {len(self.models)} checkpoints averaged"
        return f"{self.out}: {self.tensors:,} tensors {'changed by the adapter' if self.adapter else done}."

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists, numbers and strings, ready for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def merge(
    models: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    weights: Sequence[float] = (),
    *,
    quiet: bool = False,
) -> MergeReport:
    """Write the weighted average of checkpoints of one model.

    Each tensor is `w1 * t1 + w2 * t2 + ...`, summed in that order in float32 (float64 for tensors of that type) and
    rounded once to the type that it has in the first model. Config, tokenizer and licence are the first's.

    Args:
        models: Two or more: checkpoint folders with safetensors weights, hub ids, or checkpoints of a run
            (`run/checkpoints/step-0000100`), whose config and tokenizer are those of the model that the run started
            from.
        out: New folder; it must not exist or be empty.
        weights: A number a model; they add up to 1. All alike when empty.
        quiet: True draws no progress bar.

    Raises:
        ValueError: Fewer than two models, weights that don't add up to 1, another architecture, shape or tokenizer, a
            tensor that is missing, quantised or not finite, or `out` is in use. Nothing is written then.
    """
    shares = _shares(len(models), weights)
    check_free(Path(os.path.realpath(Path(out).expanduser())))
    sources = [open_source(model) for model in models]
    first = sources[0]
    notes = [note for other in sources[1:] for note in _compare(first, other)]
    names = weight_files(first.folder)
    check_links(first.folder, names)
    shards = {name: header(first.folder / name) for name in names if name != INDEX}
    entries = {name: entry for shard in shards.values() for name, entry in shard.items()}
    for source in sources:
        _check_tensors(entries, source, first)
    real = [name for name, entry in entries.items() if entry["dtype"] in DTYPES]
    report = MergeReport(
        models=tuple(str(model) for model in models),
        weights=shares,
        out=str(out),
        tensors=len(real),
        copied=len(entries) - len(real),
        dtypes=tuple(sorted({entries[name]["dtype"] for name in real})),
        notes=tuple(notes),
    )

    def card(folder: Path) -> str:
        write_json(folder / REPORT, report.to_dict())
        before = first.folder / CARD
        text = before.read_text(encoding="utf-8") if before.is_file() else f"# {Path(out).name}\n"
        return merged_card(text, len(sources), _section(report, sources))

    companions, _ = companion_files(first.folder)
    needed = sum((first.folder / name).stat().st_size for name in [*names, *companions])
    write_checkpoint(out, first.folder, _averages(sources, shares, shards, quiet), card, needed=needed)
    return report


def average(tensors: Sequence[torch.Tensor], weights: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """The weighted sum, in float32 (float64 where `dtype` is that), rounded once to `dtype`.

    Args:
        tensors: Of one shape and any floating-point types.
        weights: A number a tensor.
        dtype: Type of the result.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    made = torch.empty(tensors[0].shape, dtype=dtype)
    pieces = zip(made.view(-1).split(PIECE), *(tensor.reshape(-1).split(PIECE) for tensor in tensors), strict=True)
    for piece, *parts in pieces:
        total = parts[0].to(wide) * weights[0]
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total += part.to(wide) * weight
        piece.copy_(total)
    return made


def _shares(count: int, weights: Sequence[float]) -> tuple[float, ...]:
    if count < 2:
        raise ValueError(f"merge needs two models or more, or the folder of a LoRA adapter, found {count} model.")
    if not weights:
        return (1 / count,) * count
    if len(weights) != count:
        raise ValueError(f"There are {count} models and {len(weights)} weights: give one a model, in the same order.")
    total = math.fsum(weights)
    if not all(map(math.isfinite, weights)) or not math.isclose(total, 1, abs_tol=1e-6):
        raise ValueError(f"weights must add up to 1, found {', '.join(f'{w:g}' for w in weights)}: {total:g} in all.")
    return tuple(float(weight) for weight in weights)


def _compare(first: Source, other: Source) -> list[str]:
    """Refuse another architecture or tokenizer; what differs in RoPE and window is allowed and noted."""
    config, theirs = load_config(first.folder), load_config(other.folder)
    if config.model_type != theirs.model_type:
        raise ValueError(
            f"{other.title} is of another architecture ({theirs.model_type}) than {first.title} ({config.model_type})."
        )
    ours, others = config.to_dict(), theirs.to_dict()
    for key in sorted((ours.keys() | others.keys()) - NO_MATTER):
        if not key.startswith("_") and ours.get(key) != others.get(key):
            raise ValueError(
                f"{other.title} has {key} = {others.get(key)!r} in its config, {first.title} {ours.get(key)!r}: they "
                "compute differently, and an average of their weights means nothing."
            )
    if (name := _other_tokenizer(first.folder, other.folder)) is not None:
        raise ValueError(f"{other.title} has another tokenizer than {first.title}: {name} differs.")
    if rope_parameters(from_config(config)) == rope_parameters(from_config(theirs)):
        return []
    return [
        f"{other.title} has another RoPE (window {window_of(theirs):,} tokens) than {first.title} (window "
        f"{window_of(config):,}); the merged model has the latter's."
    ]


def _other_tokenizer(first: Path, other: Path) -> str | None:
    """The file by which two tokenizers differ, None where they are the same."""
    if (first / "tokenizer.json").is_file() and (other / "tokenizer.json").is_file():
        return None if _tokenizer(first) == _tokenizer(other) else "tokenizer.json"
    for name in ("tokenizer.json", *VOCABULARIES):
        held = [sha256(folder / name) if (folder / name).is_file() else None for folder in (first, other)]
        if held[0] != held[1]:
            return name
    return None


def _tokenizer(folder: Path) -> dict[str, Any]:
    """The content of tokenizer.json that decides tokens, with merges spelt in one way."""
    content = {k: v for k, v in read_json(folder / "tokenizer.json").items() if k not in ("padding", "truncation")}
    model = content.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
        content["model"] = model | {"merges": merges}
    return content


def _check_tensors(entries: Mapping[str, Any], source: Source, first: Source) -> None:
    """Refuse tensors that are missing, of another shape, or of a type that no average can be taken of."""
    shapes = source.shapes()
    for one, names, other in (
        (source, entries.keys() - shapes.keys(), first),
        (first, shapes.keys() - entries.keys(), source),
    ):
        if names:
            raise ValueError(f"{one.title} has no tensor {min(names)} (it lacks {len(names)}), {other.title} has.")
    for name, entry in entries.items():
        if entry["dtype"].startswith("F8") or entry["dtype"] == "U8":
            raise ValueError(f"{first.title} is quantised ({name} is {entry['dtype']}): merge the unquantised models.")
        if shapes[name] != tuple(entry["shape"]):
            raise ValueError(
                f"{name} has the shape {shapes[name]} in {source.title} and {tuple(entry['shape'])} in {first.title}."
            )


def _averages(
    sources: Sequence[Source], weights: Sequence[float], shards: Mapping[str, Mapping[str, Any]], quiet: bool
) -> Callable[[Path], None]:
    """For `write_checkpoint`: files that are laid out as the first model's, a tensor in memory at a time."""
    first = sources[0].folder

    def write(folder: Path) -> None:
        if (first / INDEX).is_file():
            copy_file(first / INDEX, folder / INDEX, lambda count: None)
        total = sum((first / name).stat().st_size for name in shards)
        with progress(total=total, desc="merging", unit="B", unit_scale=True, unit_divisor=1024, quiet=quiet) as bar:
            for shard, entries in shards.items():
                with open(first / shard, "rb") as stream:  # length of the header, then the header
                    start = stream.read(8)
                    start += stream.read(int.from_bytes(start, "little"))
                with open(folder / shard, "wb") as target:
                    target.write(start)
                    for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
                        content = _merged(name, sources, weights).reshape(-1).view(torch.uint8).numpy()
                        target.write(content.data)
                        bar.update(content.nbytes)

    return write


def _merged(name: str, sources: Sequence[Source], weights: Sequence[float]) -> torch.Tensor:
    read = [source.read(name) for source in sources]
    if not read[0].is_floating_point():
        for tensor, source in zip(read, sources, strict=True):
            if not torch.equal(tensor, read[0]):
                raise ValueError(f"{name} holds whole numbers that differ in {source.title} and {sources[0].title}.")
        return read[0]
    made = average(read, weights, sources[0].dtype(name))
    if not _finite(made):
        wrong = next((source for tensor, source in zip(read, sources, strict=True) if not _finite(tensor)), None)
        raise ValueError(f"{name} is not finite {f'in {wrong.title}' if wrong else 'once averaged'}.")
    return made


def _finite(tensor: torch.Tensor) -> bool:
    return all(bool(piece.isfinite().all()) for piece in tensor.reshape(-1).split(PIECE))


def _section(report: MergeReport, sources: Sequence[Source]) -> str:
    """What was merged, as a section of the model card."""
    rows = []
    for source, weight in zip(sources, report.weights, strict=True):
        licence = read_licence(source.folder)
        stated = licence.get("license_name") or licence.get("license") or "not stated"
        rows.append(f"| {source.title} | {weight:g} | {stated} |")
    lines = [
        "## Merge",
        "",
        f"The weights are a linear average of {len(rows)} checkpoints, taken in float32 and rounded once to "
        f"{', '.join(report.dtypes)}; config and tokenizer are the first's.",
        "",
        "| checkpoint | weight | licence |",
        "|---|---|---|",
        *rows,
        *(f"\n{note}" for note in report.notes),
    ]
    return "\n".join(lines) + "\n"

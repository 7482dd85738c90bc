"""A checkpoint in, the same checkpoint with a longer window out: config, tokenizer, generation config, model card.

The weights are copied file by file and never loaded, so memory stays flat at any model size. The new folder is built
beside its final place and moved there in one step: it is complete or it does not exist.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers import __version__ as transformers_version

from ultralong.checkpoints.files import check_space, companion_files, copy_file, locate, weight_files
from ultralong.checkpoints.model_card import cache_bytes_per_token, model_card, read_licence
from ultralong.checkpoints.rescale import Extension, caveats, choose_scaling, config_entries
from ultralong.rope import (
    RopeScaling,
    from_config,
    inverse_frequencies,
    pair_counts,
    rope_parameters,
    window_of,
)
from ultralong.rope import attention_factor as attention_factor_of
from ultralong.utils.files import file_lock, read_json, write_json, write_text
from ultralong.utils.progress import progress
from ultralong.utils.token_count import parse_tokens

CARD, REPORT = "README.md", "extend.json"
EDITED = ("config.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class ExtendReport:
    """What `extend` did; every value goes into JSON as it is (`to_dict`).

    Attributes:
        source: What was passed in.
        hub_id: The hub's name of the source, None for a local folder.
        base_model: Short name of the source.
        out: The new folder.
        model_type: transformers' name of the architecture.
        method: RoPE method of the new table.
        old_window: Tokens the source declares.
        new_window: Tokens the new checkpoint declares.
        original_window: Tokens of the unscaled pretraining, which the factor refers to.
        factor: New scaling factor.
        factor_by_rule: Whether the factor is `new_window / original_window`.
        theta: RoPE base as written.
        attention_factor: What cosine and sine are multiplied by.
        old_attention_factor: The same in the source.
        old_rope: The source's `rope_parameters`.
        new_rope: The new `rope_parameters`.
        pairs: Rotary pairs "untouched", in between ("ramp") and "scaled" by the whole factor.
        files: Names in the new folder.
        bytes: Their size together, but for the model card and the file with this report.
        left_out: Files of the source that are no part of the model.
        licence: The source's licence where its card states one.
        notes: What a user should know, one sentence each.
    """

    source: str
    hub_id: str | None
    base_model: str
    out: str
    model_type: str
    method: str
    old_window: int
    new_window: int
    original_window: int
    factor: float
    factor_by_rule: bool
    theta: float
    attention_factor: float
    old_attention_factor: float
    old_rope: dict[str, Any]
    new_rope: dict[str, Any]
    pairs: dict[str, int]
    files: tuple[str, ...]
    bytes: int
    left_out: tuple[str, ...]
    licence: str | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists, numbers and strings, ready for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def extend(
    source: str | os.PathLike[str],
    to: int | str,
    out: str | os.PathLike[str],
    method: str = "auto",
    *,
    factor: float | None = None,
    attention_factor: float | None = None,
    original_window: int | None = None,
    theta: float | None = None,
    ramp: str = "dimension",
    alpha: float | None = None,
    beta: float | None = None,
    short_factors: tuple[float, ...] | None = None,
    long_factors: tuple[float, ...] | None = None,
    revision: str | None = None,
    quiet: bool = False,
) -> ExtendReport:
    """Write a copy of a checkpoint whose declared window is `to` tokens, without training or loading it.

    Args:
        source: Checkpoint folder with safetensors weights, or a hub id.
        to: Tokens of the new window, as a number or as "1m"; "8x" is eight times the source's window.
        out: New folder; it must not exist or be empty.
        method: "auto" keeps a model's `llama3` type and gives any other `yarn`; or one of `ultralong.rope.METHODS`.
        factor: As in `Extension`; the default is `to` over the window of the unscaled pretraining.
        attention_factor: As in `Extension`; 1.0 turns YaRN's temperature off, None keeps `0.1 ln(factor) + 1`.
        original_window: As in `Extension`.
        theta: As in `Extension`.
        ramp: As in `Extension`.
        alpha: As in `Extension`.
        beta: As in `Extension`.
        short_factors: As in `Extension`.
        long_factors: As in `Extension`.
        revision: Branch, tag or commit of a hub model.
        quiet: True draws no progress bar.

    Raises:
        ValueError: The source is no whole checkpoint, its RoPE can't be rescaled, the target is not longer than its
            window, the settings contradict each other, or `out` is in use. Nothing is written then.
    """
    target = Path(out).expanduser().absolute()
    _check_free(target)
    folder = locate(source, revision)
    config = _load_config(folder)
    to = target_window(to, window_of(config)) if isinstance(to, str) else to
    wish = Extension(
        to, method, factor, attention_factor, original_window, theta, ramp, alpha, beta, short_factors, long_factors
    )
    scaling = choose_scaling(config, wish)
    weights = weight_files(folder)
    companions, left_out = companion_files(folder)
    copied = weights + [name for name in companions if name not in EDITED]
    with _folder_beside(target, sum((folder / name).stat().st_size for name in copied)) as temporary:
        notes = caveats(config, scaling, to) + _write_settings(folder, temporary, config, scaling, to)
        _check_opens(temporary, scaling, to)
        _copy(folder, temporary, copied, quiet)
        licence = read_licence(folder)
        report = ExtendReport(
            source=str(source),
            hub_id=None if folder == Path(source).expanduser() else str(source),
            base_model=_short_name(source),
            out=str(out),
            files=_names(temporary),
            bytes=_size(temporary),
            factor_by_rule=factor is None and scaling.method != "default",
            left_out=tuple(left_out),
            notes=notes,
            licence=licence.get("license_name") or licence.get("license"),
            **_facts(config, scaling, to),
        )
        write_text(temporary / CARD, model_card(report, licence, cache_bytes_per_token(config)))
        write_json(temporary / REPORT, report.to_dict())
    return report


def target_window(text: str, window: int) -> int:
    """Tokens of the window that a text asks for: "1048576", "1m", or "8x" for eight times `window`.

    Raises:
        ValueError: It is none of these.
    """
    times = re.fullmatch(r"(\d+(?:\.\d+)?)x", text.strip().lower())
    if times is None:
        return parse_tokens(text)
    tokens = float(times[1]) * window
    if tokens != int(tokens):
        raise ValueError(f"{text} of a window of {window:,} tokens is {tokens:,} tokens: give a whole number.")
    return int(tokens)


def _check_free(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"The output {target} exists and is not an empty folder. Choose another, or delete it first.")


def _load_config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise ValueError(
            f"{folder} is not a checkpoint: it has no config.json."
            f"{' It holds an adapter: merge it into its base first.' if adapter else ''}"
        )
    kind = read_json(folder / "config.json").get("model_type")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"transformers {transformers_version} can't read the config in {folder} (type {kind!r}). "
            "Models that bring their own code are not supported."
        ) from error


@contextmanager
def _folder_beside(target: Path, needed: int) -> Iterator[Path]:
    """A new folder beside `target` that becomes `target` when the block ends without an error.

    A run that was killed leaves its folder behind without the lock on it; the next run to the same place clears it.
    """
    temporary = target.parent / f".{target.name}.partial"
    target.parent.mkdir(parents=True, exist_ok=True)
    busy = f"Another run is writing {target} right now. Wait for it or choose another."
    with file_lock(target.parent / f".{target.name}.lock", busy, remove=True):
        temporary.mkdir(exist_ok=True)
        try:
            for left in temporary.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            check_space(temporary, needed)
            yield temporary
            os.replace(temporary, target)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary)


def _copy(folder: Path, target: Path, names: list[str], quiet: bool) -> None:
    total = sum((folder / name).stat().st_size for name in names)
    with progress(total=total, desc="copying", unit="B", unit_scale=True, unit_divisor=1024, quiet=quiet) as bar:
        for name in names:
            copy_file(folder / name, target / name, bar.update)


def _write_settings(folder: Path, target: Path, config: Any, scaling: RopeScaling, to: int) -> tuple[str, ...]:
    """Write the three edited JSON files; returns what a user should know about them."""
    old_lengths = {window_of(config), config.max_position_embeddings}
    edited = read_json(folder / "config.json") | config_entries(config, scaling, to)
    write_json(target / "config.json", _raise_max_length(edited, old_lengths, to))
    if (folder / "generation_config.json").is_file():
        edited = read_json(folder / "generation_config.json")
        write_json(target / "generation_config.json", _raise_max_length(edited, old_lengths, to))
    if not (folder / "tokenizer_config.json").is_file():
        return ("The source has no tokenizer_config.json, so no tokenizer limit was set.",)
    write_json(target / "tokenizer_config.json", read_json(folder / "tokenizer_config.json") | {"model_max_length": to})
    return ()


def _raise_max_length(settings: dict[str, Any], old: set[int], to: int) -> dict[str, Any]:
    """A generation limit that was the old window becomes the new one; any other was chosen and stays."""
    return settings | ({"max_length": to} if settings.get("max_length") in old else {})


def _check_opens(folder: Path, scaling: RopeScaling, to: int) -> None:
    """Read the new config as transformers does, and compare the table it leads to with the one that was meant."""
    trouble = f"transformers {transformers_version} can't give this model type a {scaling.method!r} scaling by config"
    try:
        written = from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except (ValueError, KeyError) as error:  # Phi-3, for one, takes every yarn for a longrope
        raise ValueError(f"{trouble} ({str(error).strip()}). Choose another method.") from error
    for length in (None, to):
        meant, read = inverse_frequencies(scaling, length), inverse_frequencies(written, length)
        if not torch.equal(meant[0], read[0]) or meant[1] != read[1]:
            raise ValueError(
                f"{trouble}: it reads {rope_parameters(written)} where {rope_parameters(scaling)} was "
                "meant. Choose another method."
            )


def _facts(config: Any, scaling: RopeScaling, to: int) -> dict[str, Any]:
    old, new_rope = from_config(config), rope_parameters(scaling)
    return {
        "model_type": config.model_type,
        "method": scaling.method,
        "old_window": window_of(config),
        "new_window": to,
        "original_window": scaling.original_window,
        "factor": scaling.factor,
        "theta": new_rope["rope_theta"],
        "attention_factor": attention_factor_of(scaling),
        "old_attention_factor": attention_factor_of(old),
        "old_rope": rope_parameters(old),
        "new_rope": new_rope,
        "pairs": pair_counts(scaling, to, old.theta),
    }


def _short_name(source: str | os.PathLike[str]) -> str:
    return Path(source).expanduser().absolute().name


def _names(folder: Path) -> tuple[str, ...]:
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return tuple(sorted(files | {CARD, REPORT}))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

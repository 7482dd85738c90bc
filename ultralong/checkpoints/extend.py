"""A checkpoint in, the same checkpoint with a longer window out: config, tokenizer, generation config, model card.

The weights are copied file by file and never loaded, so memory stays flat at any model size.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig
from transformers import __version__ as transformers_version

from ultralong.checkpoints.class_table import check_class_table, check_class_weights, class_norms
from ultralong.checkpoints.config import CONFIG_ERRORS, check_companions, load_config, one_line, tokenizer_notes
from ultralong.checkpoints.files import CARD, check_links, companion_files, locate, weight_files
from ultralong.checkpoints.model_card import cache_bytes_per_token, model_card, read_licence
from ultralong.checkpoints.rescale import Extension, caveats, choose_scaling, config_entries, explanation
from ultralong.checkpoints.write import check_free, copy_weights, write_checkpoint, write_entries
from ultralong.rope import (
    METHODS,
    RopeScaling,
    from_config,
    inverse_frequencies,
    pair_counts,
    rope_parameters,
    window_of,
)
from ultralong.rope import attention_factor as attention_factor_of
from ultralong.rope.scaling import require
from ultralong.utils.files import read_json_object, write_json
from ultralong.utils.units import target_window

REPORT = "extend.json"


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
        explanation: Where it was asked for: the scaling pair by pair (`ultralong.rope.explain.ScalingExplanation`),
            the model's `traits` that cost long-context quality, and all of it as text (`lines`); nothing was written.
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
    explanation: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists, numbers and strings, ready for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def extend(
    source: str | os.PathLike[str],
    to: int | str,
    out: str | os.PathLike[str] | None = None,
    method: str = "auto",
    *,
    explain: bool = False,
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
        explain: Write nothing and need no weights: the report then says what the scaling changes (`explanation`).
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
    require(out is not None or explain, "give the folder to write (out), or ask to explain, which writes nothing.")
    if out is not None and not explain:
        check_free(Path(os.path.realpath(Path(out).expanduser())))
    folder = locate(source, revision, config_only=explain)
    config = load_config(folder)
    to = target_window(to, window_of(config)) if isinstance(to, str) else to
    wish = Extension(
        to, method, factor, attention_factor, original_window, theta, ramp, alpha, beta, short_factors, long_factors
    )
    scaling = choose_scaling(config, wish)
    refused = _refused(folder, config, wish, scaling)
    facts = {
        "source": str(source),
        "hub_id": None if folder == Path(source).expanduser() else str(source),
        "base_model": Path(source).expanduser().absolute().name,
        "factor_by_rule": factor is None and scaling.method != "default",
        **_facts(config, scaling, to),
    }
    if out is None or explain:
        return ExtendReport(
            **facts,
            out="",
            files=(),
            bytes=0,
            left_out=(),
            licence=None,
            notes=(*caveats(config, scaling, to), *(f"It can't be written: {why}" for why in refused)),
            explanation=explanation(config, wish, scaling, class_norms(config)),
        )
    require(not refused, "".join(refused))
    return _write(folder, out, config, scaling, to, facts, quiet)


def _write(
    folder: Path,
    out: str | os.PathLike[str],
    config: Any,
    scaling: RopeScaling,
    to: int,
    facts: dict[str, Any],
    quiet: bool,
) -> ExtendReport:
    """Write the copy of a checkpoint with another scaling."""
    weights = weight_files(folder)
    companions, left_out = companion_files(folder)
    check_companions(folder, companions)
    check_class_weights(folder, config)
    check_links(folder, weights)
    notes = caveats(config, scaling, to) + tokenizer_notes(companions)
    made: list[ExtendReport] = []

    def card(temporary: Path) -> str:
        licence = read_licence(folder)
        report = ExtendReport(
            **facts,
            out=str(out),
            files=_names(temporary),
            bytes=_size(temporary),
            left_out=tuple(left_out),
            notes=notes,
            licence=licence.get("license_name") or licence.get("license"),
        )
        write_json(temporary / REPORT, report.to_dict())
        made.append(report)
        return model_card(report, licence, cache_bytes_per_token(config))

    write_checkpoint(
        out,
        folder,
        copy_weights(folder, quiet),
        card,
        changes=_changes(folder, config, scaling, to),
        needed=sum((folder / name).stat().st_size for name in [*weights, *companions]),
    )
    return made[0]


def _changes(folder: Path, config: Any, scaling: RopeScaling, to: int) -> dict[str, dict[str, Any]]:
    """New entries of the three JSON files that know the window."""
    old = {window_of(config), config.max_position_embeddings}
    entries = config_entries(config, scaling, to)
    generation = folder / "generation_config.json"
    return {
        "config.json": entries | _raised(read_json_object(folder / "config.json"), old, to),
        "generation_config.json": _raised(read_json_object(generation), old, to) if generation.is_file() else {},
        "tokenizer_config.json": {"model_max_length": to},
    }


def _raised(settings: dict[str, Any], old: set[int], to: int) -> dict[str, Any]:
    """A generation limit that was the old window becomes the new one; any other was chosen and stays."""
    return {"max_length": to} if settings.get("max_length") in old else {}


def _refused(folder: Path, config: Any, wish: Extension, scaling: RopeScaling) -> tuple[str, ...]:
    """Why a folder with this scaling is not written, where it is not, and which methods work, found by trying them."""
    try:
        _check_opens(folder, config, scaling, wish.to)
        return ()
    except ValueError as error:
        works = []
        for method in METHODS:
            with suppress(ValueError):  # of those that lack something, too
                _check_opens(folder, config, choose_scaling(config, replace(wish, method=method)), wish.to)
                works.append(method)
        advice = f"Methods that work: {', '.join(works)}." if works else "No other method works with these settings."
        own = f" Its own longrope has factors to be found: ultralong search MODEL --to {wish.to} --methods longrope."
        return (f"{error} {advice}{own * ('longrope' in str(error))}",)


def _check_opens(source: Path, config: Any, scaling: RopeScaling, to: int) -> None:
    """Read the new config as transformers does, and compare the table it leads to with the one that was meant."""
    entries = read_json_object(source / "config.json") | _changes(source, config, scaling, to)["config.json"]
    trouble = f"transformers {transformers_version} can't give this model type a {scaling.method!r} scaling by config"
    try:
        with TemporaryDirectory() as folder:
            write_entries(Path(folder) / "config.json", entries)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        written = from_config(config)
    except CONFIG_ERRORS as error:  # Phi-3, for one, takes every yarn for a longrope
        raise ValueError(f"{trouble} ({one_line(error)[:-1]}).") from error
    for length in (None, to):
        meant, read = inverse_frequencies(scaling, length), inverse_frequencies(written, length)
        if not torch.equal(meant[0], read[0]) or meant[1] != read[1]:
            raise ValueError(
                f"{trouble}: it reads {rope_parameters(written)} where {rope_parameters(scaling)} was meant."
            )
    check_class_table(config, scaling)


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


def _names(folder: Path) -> tuple[str, ...]:
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return tuple(sorted(files | {CARD, REPORT}))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

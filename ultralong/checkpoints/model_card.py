"""The model card of an extended checkpoint: what was done to the model, what was not, and how to open it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ultralong import __version__
from ultralong.checkpoints.config import head_counts, head_size
from ultralong.utils.text_formats import read_yaml

if TYPE_CHECKING:
    from ultralong.checkpoints.extend import ExtendReport

UNTRAINED = (
    "**Not trained at this length yet.** The weights are the base model's, byte for byte; only the rotary table,\n"
    "the declared window and the tokenizer's limit differ. Train it on long rows before judging it.\n"
)
TRAINED = re.compile(r"^\*\*(?:Not trained at|Trained at|Merged from) (?:.+\n)+", re.MULTILINE)
LICENCE_KEYS = ("license", "license_name", "license_link")
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


def read_licence(folder: Path) -> dict[str, Any]:
    """The licence entries of a model card's front matter (`license`, `license_name`, `license_link`).

    Args:
        folder: Checkpoint folder.

    Returns:
        Those entries that are there; empty where the card states none, has no readable front matter, or is missing.
    """
    card = folder / "README.md"
    found = FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    if found is None:
        return {}
    try:
        entries = read_yaml(found.group(1))
    except ValueError:  # a card that nobody could read states no licence; model_card then says so
        return {}
    return {key: entries[key] for key in LICENCE_KEYS if entries.get(key)} if isinstance(entries, dict) else {}


def cache_bytes_per_token(config: Any) -> int | None:
    """Bytes of keys and values a token, at two bytes a number; None where the config doesn't tell."""
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if not layers or not heads or getattr(config, "kv_lora_rank", None):
        return None
    return 2 * 2 * layers * head_counts(config)[1] * head_size(config)


def model_card(report: ExtendReport, licence: dict[str, Any], cache_per_token: int | None) -> str:
    """The README.md of an extended checkpoint.

    Args:
        report: What was done.
        licence: As from `read_licence`.
        cache_per_token: As from `cache_bytes_per_token`.
    """
    front: dict[str, Any] = dict(licence)
    if report.hub_id:
        front["base_model"] = report.hub_id
    front |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["long-context", "ultralong"]}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n",
        f"# {report.base_model}, window extended to {report.new_window:,} tokens\n",
        UNTRAINED,
        f"## What was changed\n\n{_table(report)}\n\n{_rule(report)}\n",
    ]
    if report.notes:
        parts.append("## To know\n\n" + "\n".join(f"* {note}" for note in report.notes) + "\n")
    parts += [
        _opening(report, cache_per_token),
        _terms(report, licence),
        f"Made by ultralong {__version__}; `extend.json` of the extended checkpoint holds these facts for programs.\n",
    ]
    return "\n".join(parts)


def trained_card(card: str, tokens: int, length: int, section: str) -> str:
    """The card of a trained model, from that of the checkpoint it started from.

    Args:
        card: The earlier card; what it says of training is replaced.
        tokens: Tokens that the run read.
        length: Tokens of a row.
        section: What was done, as a section of the card; added at the end.
    """
    said = f"**Trained at {length:,} tokens a row**, {tokens:,} tokens in all: see Training below.\n"
    return _with_section(card, said, section)


def merged_card(card: str, count: int, section: str) -> str:
    """The card of a merged model, from that of the first model. Arguments as for `trained_card`."""
    return _with_section(card, f"**Merged from {count} checkpoints**: see Merge below.\n", section)


def _with_section(card: str, said: str, section: str) -> str:
    changed, count = TRAINED.subn(said, card, count=1)
    return (changed if count else card).rstrip() + "\n\n" + section


def _table(report: ExtendReport) -> str:
    rows = [
        ("", "before", "after"),
        ("---", "---", "---"),
        ("window (tokens)", f"{report.old_window:,}", f"{report.new_window:,}"),
        ("RoPE type", report.old_rope["rope_type"], report.new_rope["rope_type"]),
        ("RoPE base", f"{report.old_rope['rope_theta']:,.0f}", f"{report.new_rope['rope_theta']:,.0f}"),
        ("factor", f"{report.old_rope.get('factor', 1.0):g}", f"{report.factor:g}"),
        ("attention factor", f"{report.old_attention_factor:.4f}", f"{report.attention_factor:.4f}"),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _rule(report: ExtendReport) -> str:
    pairs = report.pairs
    counts = (
        f"Of {sum(pairs.values())} rotary pairs, {pairs['untouched']} keep their speed, {pairs['scaled']} are "
        f"slowed down by the whole factor and {pairs['ramp']} {'lies' if pairs['ramp'] == 1 else 'lie'} in between."
    )
    rule = "The window grows by its base alone."
    if report.factor_by_rule:
        rule = (
            f"The factor is {report.new_window:,} / {report.original_window:,}: the new window over the one of the "
            "unscaled pretraining. It replaces any earlier factor."
        )
    elif report.factor != 1.0:
        rule = f"The factor of {report.factor:g} was set by hand."
    return f"{rule} {counts}\n\n```json\n{json.dumps({'rope_parameters': report.new_rope}, indent=2)}\n```"


def _opening(report: ExtendReport, cache_per_token: int | None) -> str:
    memory = (
        ""
        if cache_per_token is None
        else (
            f"\nKeys and values take {cache_per_token / 1024:,.4g} KiB a token at 16 bits: "
            f"{cache_per_token * report.new_window / 2**30:,.1f} GiB for one full window.\n"
        )
    )
    return (
        "## How to open it\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")\n'
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n```\n\n"
        f"```sh\nvllm serve FOLDER --max-model-len {report.new_window}\n```\n{memory}"
    )


def _terms(report: ExtendReport, licence: dict[str, Any]) -> str:
    if licence:
        return f"## Licence\n\nThat of the base model: {licence.get('license_name') or licence['license']}.\n"
    legal = [name for name in report.files if re.match(r"(?i)(licen[cs]e|copying|use_policy)", name)]
    where = (
        f"That of the base model, see {', '.join(legal)}."
        if legal
        else ("The base model's folder states none. Find out the terms it came under before passing this on.")
    )
    return f"## Licence\n\n{where}\n"

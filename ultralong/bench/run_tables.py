"""Tables of what runs on GPUs beside training and attention: a served prompt, and what saves cost."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from ultralong.bench.results import rows_of

# Work of reading a prompt: causal attention of all layers, and two operations a token for each weight of a layer.
# Of Llama-3.1-8B, which is what is served.
LAYERS, WIDTH, WEIGHTS = 32, 4096, 6.979e9


def serve_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """One long prompt through `ultralong serve`, Llama-3.1-8B's shape.

    Args:
        recorded: What the asking program wrote: `tokens`, `command`, and for the prompt (`asked`) and the same one with
            16 tokens more (`again_with_the_prompt_kept`) the seconds to the first token and the tokens a second after.

    Returns:
        Lines of a Markdown table; none where nothing was recorded.
    """
    lines = [
        "| prompt | GPUs | cache | seconds to the first token | TF/s per GPU | tokens/s after | first token again |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(recorded, key=lambda row: int(row["tokens"])):
        words, tokens, asked = list(row["command"]), int(row["tokens"]), row["asked"]
        gpus = int(_after(words, "--gpus", "1"))
        rate = (2 * tokens**2 * WIDTH * LAYERS + 2 * WEIGHTS * tokens) / asked["seconds_to_first_token"] / gpus / 1e12
        again = row.get("again_with_the_prompt_kept", {}).get("seconds_to_first_token")
        cells = [f"{tokens:,}", str(gpus), _after(words, "--kv", "bf16").replace("auto", "bf16")]
        cells += [f"{asked['seconds_to_first_token']:.1f}", f"{rate:.0f}", f"{asked['tokens_per_second_after']:.1f}"]
        lines.append(f"| {' | '.join(cells)} | {'' if again is None else f'{again:.2f} s'} |")
    return lines if recorded else []


def _after(words: list[str], option: str, otherwise: str) -> str:
    return words[words.index(option) + 1] if option in words else otherwise


def saves_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """What a checkpoint that is written in the background takes from a step.

    Args:
        recorded: What `ultralong bench saves --json` wrote.

    Returns:
        Lines of a Markdown table; none where nothing was recorded.
    """
    rows = [row for file in recorded for row in rows_of(file) if "note" not in row]
    lines = [
        "| model | GPUs | tokens | seconds a step | checkpoint, GiB | copied in | written in | costs | of a step |"
        " waited for |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["model"], row["gpus"], row["tokens"])):
        copied, written = (median(save[key] for save in row["saves"]) for key in ("copy_seconds", "write_seconds"))
        cells = [row["model"], str(row["gpus"]), f"{row['tokens']:,}", f"{row['seconds_per_step']:.2f}"]
        cells += [f"{row['checkpoint_gib']:.1f}", f"{copied:.2f} s", f"{written:.1f} s", f"{row['cost_seconds']:.2f} s"]
        lines.append(f"| {' | '.join(cells)} | {row['cost_of_a_step']:.1%} | {row['waited_seconds']:.1f} s |")
    return lines if rows else []

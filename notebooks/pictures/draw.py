"""Draw the README's picture, once for light pages and once for dark ones: `python notebooks/pictures/draw.py`.

It shows the recipe's one step on Llama-3.1-8B: every rotary pair's wavelength before and after. Fast pairs, which tell
neighbours apart, stay as they are; slow ones stretch with the window. The numbers come from `ultralong.rope`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from ultralong.figures import PALETTE
from ultralong.rope import RopeScaling, inverse_frequencies, wavelengths
from ultralong.utils.files import atomic_path

RELEASED = RopeScaling(method="llama3", head_dim=128, theta=500_000.0, factor=8.0, original_window=8192)
EXTENDED = replace(RELEASED, factor=128.0)
THEMES = {"light": ("#1f2328", "#ffffff"), "dark": ("#e6edf3", "#0d1117")}
COLOURS = {"light": (PALETTE[1], PALETTE[0]), "dark": (PALETTE[3], PALETTE[5])}


def draw(theme: str) -> Figure:
    """One figure in the colours of a page."""
    ink, paper = THEMES[theme]
    before_colour, after_colour = COLOURS[theme]
    before, after = (wavelengths(inverse_frequencies(scaling)[0]).tolist() for scaling in (RELEASED, EXTENDED))
    figure = Figure(figsize=(8.4, 3.6), facecolor=paper, layout="constrained")
    axes = figure.add_subplot(facecolor=paper)
    pairs = range(len(before))
    axes.fill_between(pairs, before, after, color=after_colour, alpha=0.18, linewidth=0)
    axes.plot(pairs, before, color=before_colour, linestyle="--", linewidth=2, label="as released: 131,072 tokens")
    axes.plot(pairs, after, color=after_colour, linewidth=2.5, label="after one step: 1,048,576 tokens")
    for window, name in ((131_072, "128K window"), (1_048_576, "1M window")):
        axes.axhline(window, color=ink, linewidth=0.8, alpha=0.5)
        axes.text(0, window * 1.15, name, color=ink, fontsize=9, alpha=0.8)
    axes.set_yscale("log")
    axes.set_xlabel("rotary pair, fast to slow", color=ink)
    axes.set_ylabel("tokens per turn", color=ink)
    axes.set_title("Llama-3.1-8B: fast pairs stay, slow pairs stretch with the window", color=ink, loc="left")
    axes.tick_params(colors=ink)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(ink)
    axes.legend(frameon=False, labelcolor=ink, loc="lower right")
    return figure


def main() -> None:
    """Write both pictures beside this file; the same versions write the same bytes."""
    for theme in THEMES:
        target = Path(__file__).parent / f"window-{theme}.svg"
        with mpl.rc_context({"svg.hashsalt": "ultralong"}), atomic_path(target) as path:
            draw(theme).savefig(path, format="svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()

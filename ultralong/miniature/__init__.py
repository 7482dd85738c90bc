"""The miniature: a real Llama-architecture model small enough to extend on a laptop, trained by this project.

5.5 million parameters, its own tokenizer of 4,096 tokens, a window of 512 tokens, 11 MB. It was trained from nothing on
public-domain prose and permissively licensed conversations, and answers questions about a passage inside its window.
`build` makes it again from the recipe `data_recipes/miniature.yaml`; `model/` holds the result with its training log.
"""

from __future__ import annotations

from pathlib import Path

from ultralong.utils.hub import MINIATURE

WINDOW = 512


def path() -> Path:
    """Folder of the miniature's checkpoint, as installed with the package."""
    return MINIATURE

"""Names of checkpoints: folders here, ids on the Hugging Face hub, and miniature, the model that ships.

The hub is asked only for a name that can be an id there, and no path is ever sent to it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What transformers raises for files of a tokenizer that it cannot read.
TOKENIZER_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
MINIATURE = Path(__file__).parents[1] / "miniature" / "model"  # by place: the trainer makes it, far above this room
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether a name can be an id on the hub: `owner/name`, and nothing that is written like a path."""
    return HUB_ID.fullmatch(str(name)) is not None


def unless_miniature(name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The folder of the model that ships for `miniature`, where nothing is called so here; else the name as it is."""
    return MINIATURE if str(name) == "miniature" and not Path(name).exists() else name


def local_folder(name: str | os.PathLike[str]) -> Path:
    """A name as a path, its `~` expanded; for `miniature` that of the model that ships."""
    return Path(unless_miniature(name)).expanduser()


def find_checkpoint(name: str | os.PathLike[str]) -> str:
    """A folder that is there, its `~` expanded, that of `miniature`, or a hub id as it is. Nothing is fetched.

    Raises:
        ValueError: There is no such folder, and the name can be no hub id; or it is a file.
    """
    folder = local_folder(name)
    if folder.is_dir():
        return str(folder)
    if folder.exists():
        raise ValueError(f"{name} is a file; the folder of a checkpoint is needed, the one with config.json.")
    if is_hub_id(name):
        return str(name)
    raise ValueError(
        f"There is no folder {folder.absolute()}, and {str(name)!r} is no hub id, which is like owner/name."
    )


def load_tokenizer(name: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id.

    Raises:
        ValueError: There is no such folder or hub id, or no tokenizer in it; says what was looked for.
    """
    from transformers import AutoTokenizer

    place = find_checkpoint(name)
    try:
        return AutoTokenizer.from_pretrained(place)
    except TOKENIZER_ERRORS as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if Path(place).is_dir():
            raise ValueError(f"The folder {place} has no tokenizer that transformers opens: {reason}") from error
        raise ValueError(
            f"There is no folder {place} here, and the hub gave no tokenizer of that name: {reason} Check the name, "
            "log in with `hf auth login` if it is gated, or pass a local folder."
        ) from error

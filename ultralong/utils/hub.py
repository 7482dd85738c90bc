"""Names of checkpoints: folders here, ids on the Hugging Face hub, and miniature, the model that ships.

The hub is asked only for a name that can be an id there, and no path is ever sent to it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What transformers raises for files of a tokenizer that it cannot read.
TOKENIZER_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
MINIATURE = Path(__file__).parents[1] / "miniature" / "model"  # by place: the trainer makes it, far above this room
LARGEST_TOKENIZER = 1 << 28  # bytes of a tokenizer.json; the largest there are have 40 MB
# The largest vocabularies have a million. The tokenizers library lists the ids without a piece each time it copies or
# writes a tokenizer: for an id of 2**31 - 1 that took 8 GiB and half a minute.
MOST_IDS = 1 << 24
MOST_GROWTH = 64  # times that a tokenizer may lengthen a text; Unicode's normal forms make 18 letters of one at most
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


def folder_name(model: str | os.PathLike[str]) -> str:
    """Name of a model by its folder, with the folder above in front where it is `model`, as that of every run is.

    >>> folder_name("runs/cpt/model"), folder_name("llama-1m"), folder_name("meta-llama/Llama-3.1-8B")
    ('cpt/model', 'llama-1m', 'Llama-3.1-8B')

    Args:
        model: Folder, which need not be there, or hub id; of the model that ships its name is `miniature`.
    """
    folder = local_folder(model).absolute()
    if folder == MINIATURE:
        return "miniature"
    return "/".join(folder.parts[-2:]).lstrip("/") if folder.name == "model" else folder.name


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


@contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """Raise what the tokenizers library throws, such as of a pattern that it gives up, as the ValueError that it is.

    Args:
        what: Beginning of the sentence.

    Raises:
        ValueError: The library failed.
    """
    try:
        yield
    except BaseException as error:
        # It raises no class of its own, and a panic of its is no Exception.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from error


def check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer.json that would not end, fill the memory, or give ids that mean something else.

    Raises:
        ValueError: It is too large, no tokenizer, gives one id to two pieces, has an id that is none, or lengthens
            texts without bound; one line that names the file.
    """
    from ultralong.utils.files import read_json_object  # the public API is imported without packages

    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    if (size := path.stat().st_size) > LARGEST_TOKENIZER:
        raise ValueError(f"{path} has {size:,} bytes, and no tokenizer has more than {LARGEST_TOKENIZER:,}.")
    entries = read_json_object(path)
    model, added = entries.get("model"), entries.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(added, list):
        raise ValueError(f"{path} holds no tokenizer: its model is a {type(model).__name__}. Restore it.")
    vocabulary = model.get("vocab")
    pieces = list(vocabulary.items()) if isinstance(vocabulary, dict) else []
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not token["content"]:
            raise ValueError(f"{path} has an added token without a text: {str(token)[:80]}. Restore it.")
        pieces.append((token["content"], token.get("id")))
    named: dict[Any, str] = {}
    for piece, number in pieces:
        if type(number) is not int or not 0 <= number < MOST_IDS:
            raise ValueError(f"{path} gives {piece[:40]!r} the id {str(number)[:40]}, which is none. Restore it.")
        if named.setdefault(number, piece) != piece:
            raise ValueError(f"{path} gives the id {number} to {named[number][:40]!r} and {piece[:40]!r}. Restore it.")
    for name in ("normalizer", "decoder"):
        if (growth := _growth(entries.get(name))) > MOST_GROWTH:
            raise ValueError(f"{path} has a {name} that may lengthen a text {growth:,.0f} times. Restore it.")


def _growth(step: Any) -> float:
    """How many times a tokenizer's step may lengthen a text, at most."""
    if isinstance(step, list):
        found = 1.0
        for each in step:
            found = min(found * _growth(each), 1e300)
        return found
    if not isinstance(step, Mapping):
        return 1.0
    grown = _growth([value for value in step.values() if isinstance(value, list)])
    content, pattern = step.get("content"), step.get("pattern")
    if step.get("type") == "Replace" and isinstance(content, str) and isinstance(pattern, Mapping):
        replaced = pattern.get("String")  # a pattern may match a single letter
        grown *= max(1.0, len(content.encode()) / max(1, len(replaced.encode()) if isinstance(replaced, str) else 1))
    return grown


def load_tokenizer(name: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id.

    Raises:
        ValueError: There is no such folder or hub id, or no tokenizer in it; says what was looked for.
    """
    from transformers import AutoTokenizer

    place = find_checkpoint(name)
    check_tokenizer(Path(place))
    try:
        with tokenizer_errors("the tokenizers library refuses it"):
            return AutoTokenizer.from_pretrained(place)
    except TOKENIZER_ERRORS as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if Path(place).is_dir():
            raise ValueError(f"The folder {place} has no tokenizer that transformers opens: {reason}") from error
        raise ValueError(
            f"There is no folder {place} here, and the hub gave no tokenizer of that name: {reason} Check the name, "
            "log in with `hf auth login` if it is gated, or pass a local folder."
        ) from error

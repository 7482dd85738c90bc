"""What the functions of the public API accept, and how a command line spells it.

A function's signature and docstring are the only place where its options are declared: `ultralong.cli` reads names,
types, defaults and help texts from here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias


@dataclass(frozen=True)
class Words:
    """Marks a parameter whose value on a command line is narrower than in Python.

    Attributes:
        kind: The type that the words are read as.
        shown: The word for the value in usage and help; by default that of the option's name.
    """

    kind: Any
    shown: str | None = None


StrPath: TypeAlias = Annotated[str | os.PathLike[str], Words(Path)]  # a file or folder
Named: TypeAlias = Annotated[str | os.PathLike[str], Words(str)]  # a folder, a hub id, or the name of what ships
File: TypeAlias = Annotated[str | os.PathLike[str], Words(Path, "FILE")]
OtherModel: TypeAlias = Annotated[str | os.PathLike[str], Words(str, "MODEL")]
# New values of a config by key, or the same as texts, such as "optimizer.lr=1e-5".
Changes: TypeAlias = Annotated[Mapping[str, Any] | Sequence[str] | None, Words(tuple[str, ...])]


def as_overrides(changes: Mapping[str, Any] | Sequence[str] | None) -> list[str]:
    """`{"a.b": value}` as the `a.b=value` strings that `ultralong.utils.settings` reads."""
    import json

    if isinstance(changes, Mapping):
        return [f"{key}={json.dumps(value, default=str)}" for key, value in changes.items()]
    return list(changes or ())

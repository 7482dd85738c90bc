"""What a learner has done, in one file of the folder that `ultralong course start` made.

Outside of such a folder nothing is written: a notebook that CI or a visitor runs leaves no trace.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ultralong.utils.files import read_json, write_json

FILE = "course.json"


@dataclass
class Progress:
    """Exercises solved and predictions made.

    Attributes:
        path: The file, or None outside of a course folder.
        solved: Names of solved exercises with the date of the first time.
        tried: Number of wrong answers so far by exercise.
        guesses: Prediction by its name.
        outcomes: For each revealed prediction whether it was right.
    """

    path: Path | None = None
    solved: dict[str, str] = field(default_factory=dict)
    tried: dict[str, int] = field(default_factory=dict)
    guesses: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, bool] = field(default_factory=dict)

    def save(self) -> None:
        """Write the file, atomically; nothing where there is none."""
        if self.path is not None:
            write_json(self.path, {name: getattr(self, name) for name in ("solved", "tried", "guesses", "outcomes")})


def find(start: str | os.PathLike[str] = ".") -> Path | None:
    """The course's file of `start` or of the nearest folder above it, or None."""
    here = Path(start).resolve()
    return next((folder / FILE for folder in (here, *here.parents) if (folder / FILE).is_file()), None)


def load(start: str | os.PathLike[str] = ".") -> Progress:
    """The progress of the course folder that `start` lies in; empty and not written outside of one.

    Raises:
        ValueError: The file is not what `save` writes.
    """
    path = find(start)
    if path is None:
        return Progress()
    content: Any = read_json(path)
    names = {"solved", "tried", "guesses", "outcomes"}
    if (
        not isinstance(content, dict)
        or not set(content) <= names
        or not all(isinstance(x, dict) for x in content.values())
    ):
        raise ValueError(f"{path} is not a file of the course. Move it away; `ultralong course start` makes a new one.")
    return Progress(path, **content)

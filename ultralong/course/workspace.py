"""The folder a learner works in: a copy of the notebooks, so that opening one never changes the clone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ultralong.course import progress
from ultralong.course.exercise import exercises
from ultralong.course.links import as_words

CLONE = Path(__file__).parents[2] / "notebooks"
PACKAGED = Path(__file__).parent / "notebooks"
INDEX = "README.md"  # the course's front page
MADE = "made"  # folder of a work folder for what notebooks hand on
TEMPORARY = ("00", "03")  # run again with other parameters they would find, and refuse, what they made before


@dataclass(frozen=True)
class NotebookProgress:
    """How far one notebook is.

    Attributes:
        notebook: Its name.
        solved: Exercises solved.
        exercises: Exercises there are.
        open: Names of those not solved yet.
        wrong: Wrong answers so far.
    """

    notebook: str
    solved: int
    exercises: int
    open: tuple[str, ...]
    wrong: int


def source_folder() -> Path:
    """Where the notebooks are: in the clone, or inside the installed package.

    Raises:
        ValueError: Neither is there.
    """
    for folder in (CLONE, PACKAGED):
        if any(folder.glob("[0-9][0-9]_*.ipynb")):
            return folder
    raise ValueError(f"No notebooks were found in {CLONE} or {PACKAGED}. Run this from a clone of the repository.")


def start(folder: str | os.PathLike[str], names: Sequence[str] = ()) -> list[Path]:
    """Copy the notebooks, with the recorded results they show, into a work folder.

    What is there already stays as it is: a learner's answers are never overwritten. What a copy hands on goes to
    `made/NN` in the work folder; in the clone, and for `TEMPORARY` notebooks, that is a temporary folder.

    Args:
        folder: The work folder; made where it is missing.
        names: Notebooks to copy, by number or name; all when empty.

    Returns:
        The notebooks that were copied now.

    Raises:
        ValueError: A name fits no notebook, or the folder lies inside the notebooks' own.
    """
    source, target = source_folder(), Path(folder).expanduser()
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{target} lies inside the notebooks themselves. Choose a folder outside of {source}.")
    found = sorted(source.glob("[0-9][0-9]_*.ipynb"))
    for name in names:
        if not any(path.stem.startswith(name) for path in found):
            raise ValueError(f"No notebook starts with {name!r}. There are: {', '.join(path.stem for path in found)}.")
    chosen = [path for path in found if not names or any(path.stem.startswith(name) for name in names)]
    target.mkdir(parents=True, exist_ok=True)
    copied = []
    for path in chosen:
        if not (target / path.name).exists():
            (target / path.name).write_text(_keeping(path), encoding="utf-8")
            copied.append(target / path.name)
    for extra in ("results", "pictures"):
        if (source / extra).is_dir():
            shutil.copytree(source / extra, target / extra, dirs_exist_ok=True)
    if (source / INDEX).is_file():
        (target / INDEX).write_text(as_words((source / INDEX).read_text(encoding="utf-8")), encoding="utf-8")
    if not (target / progress.FILE).exists():
        progress.Progress(target / progress.FILE).save()
    return copied


def _keeping(path: Path) -> str:
    """A notebook's text whose parameter `OUT` names a folder that stays; links into the clone are words."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = as_words("".join(cell["source"])).splitlines(keepends=True)
        if "parameters" in cell["metadata"].get("tags", []) and path.stem[:2] not in TEMPORARY:
            place = f'OUT: str = "{MADE}/{path.stem[:2]}"'
            cell["source"] = [line.replace('OUT: str = ""', place) for line in cell["source"]]
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def overview(folder: str | os.PathLike[str] = ".") -> list[NotebookProgress]:
    """How far each notebook with exercises is.

    Raises:
        ValueError: The folder is no course folder and lies in none.
    """
    if progress.find(Path(folder).expanduser()) is None:
        raise ValueError(f"{folder} is no course folder. Make one: ultralong course start FOLDER")
    kept = progress.load(Path(folder).expanduser())
    rows: dict[str, list[str]] = {}
    for task in exercises():
        rows.setdefault(task.notebook, []).append(task.name)
    titles = {path.stem[:2]: path.stem for path in sorted(source_folder().glob("[0-9][0-9]_*.ipynb"))}
    return [
        NotebookProgress(
            titles.get(number, number),
            sum(name in kept.solved for name in names),
            len(names),
            tuple(name for name in names if name not in kept.solved),
            sum(kept.tried.get(name, 0) for name in names),
        )
        for number, names in rows.items()
    ]

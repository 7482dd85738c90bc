"""Notebooks where nothing is installed yet (Colab, Binder, any Jupyter), from a public copy of the repository."""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

FOLDER = "elsewhere"  # of the site, for copies of the notebooks that install what they need first
EXTRAS = "notebooks,serve"
CELL = """# Where the course is not installed, as in Colab, this comes first: the repository, and what notebooks need.
import importlib.util, os, subprocess, sys

REPOSITORY, REVISION = {repository!r}, {revision!r}
if importlib.util.find_spec("ultralong") is None:
    if not os.path.isdir("ultralong-course"):
        subprocess.run(["git", "clone", "--quiet", "--", REPOSITORY, "ultralong-course"], check=True)
        subprocess.run(["git", "-C", "ultralong-course", "checkout", "--quiet", REVISION], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "./ultralong-course[{extras}]"], check=True)
    importlib.invalidate_caches()
if os.path.isdir("ultralong-course/notebooks"):
    os.chdir("ultralong-course/notebooks")  # what was recorded on GPUs lies there
"""
ADDRESS = re.compile(r"(https?|file)://[^\s'\"<>@\\?#]+")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")


@dataclass(frozen=True)
class Repository:
    """A copy of this repository that anybody can read.

    Attributes:
        address: Its URL, without user and password.
        revision: A branch, tag or commit.
        pages_branch: Branch on which the site's pages themselves are kept, from which Colab can open a notebook.

    Raises:
        ValueError: No such address or name.
    """

    address: str
    revision: str
    pages_branch: str | None = None

    def __post_init__(self) -> None:
        if not ADDRESS.fullmatch(self.address):
            raise ValueError(
                "repository must be an address that anybody can clone from, such as https://github.com/OWNER/NAME, "
                f"found {self.address!r}."
            )
        for name, value in (("revision", self.revision), ("pages_branch", self.pages_branch)):
            if value is not None and not REVISION.fullmatch(value):
                raise ValueError(f"{name} must be the name of a branch, tag or commit, found {value!r}.")
        if self.pages_branch is not None and self.on_github is None:
            raise ValueError("pages_branch is for a repository on github.com: Colab opens notebooks of no other.")

    @property
    def on_github(self) -> str | None:
        """OWNER/NAME, where it is one of github.com."""
        found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", self.address)
        return found[1] if found else None

    def cell(self) -> str:
        """The cell that comes first."""
        return CELL.format(repository=self.address, revision=self.revision, extras=EXTRAS)

    def binder(self, path: str) -> str:
        """Where Binder opens a file of the repository."""
        where = f"gh/{self.on_github}" if self.on_github else f"git/{quote(self.address, safe='')}"
        return f"https://mybinder.org/v2/{where}/{quote(self.revision, safe='')}?labpath={quote(path, safe='')}"

    def colab(self, path: str) -> str | None:
        """Where Colab opens a file of the pages; None where it can't."""
        if self.pages_branch is None:
            return None
        return f"https://colab.research.google.com/github/{self.on_github}/blob/{self.pages_branch}/{path}"


def write_copy(notebook: Path, folder: Path, repository: Repository) -> Path:
    """Write a notebook with the installing cell before its first one of code, without outputs.

    Args:
        notebook: The notebook.
        folder: Where the copy goes.
        repository: What it installs from.
    """
    content = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    first = next(index for index, cell in enumerate(content["cells"]) if cell["cell_type"] == "code")
    made: dict[str, Any] = {
        "cell_type": "code",
        "id": "install",
        "metadata": {},
        "outputs": [],
        "execution_count": None,
    }
    content["cells"].insert(first, made | {"source": repository.cell().splitlines(keepends=True)})
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / notebook.name
    target.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


def links(notebook: Path, repository: Repository) -> str:
    """The paragraph of a notebook's page that says where else it runs, as HTML."""
    path = f"{FOLDER}/{notebook.name}"
    ways = [("Binder", repository.binder(f"notebooks/{notebook.name}"))]
    if colab := repository.colab(path):
        ways.insert(0, ("Colab", colab))
    opened = " or ".join(f'<a href="{html.escape(address)}">{name}</a>' for name, address in ways)
    by_hand = "" if colab else " (in Colab: File, Upload notebook)"
    return (
        f'<p>Run it without a clone: open it in {opened}, or take <a href="{path}">this copy</a>, whose first cell '
        f"installs what it needs{by_hand}.</p>"
    )

"""Commands of the course: a folder to work in, how far it got, and the pages of a site."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from ultralong.cli.shared import quoted


def start(folder: Positional[Path], /, *, notebooks: tuple[str, ...] = ()) -> None:
    """Copy the notebooks into a folder of your own, where your answers are kept.

    Run it again after an update: new notebooks are added, yours are never overwritten.

    Examples:
      ultralong course start ~/ultralong-course
      ultralong course start work --notebooks 01 06

    Args:
        folder: Your folder; made where it is missing.
        notebooks: Numbers or names of notebooks; by default all.
    """
    from ultralong.course.workspace import start as copy

    copied = copy(folder, notebooks)
    print(f"{folder}: {len(copied)} notebooks copied" + (", the others were there already" if not copied else ""))
    print(f"Next: jupyter lab {quoted(folder)}    (then: ultralong course check {quoted(folder)})")


def check(folder: Positional[Path] = Path("."), /) -> None:
    """Show which exercises you have solved.

    Example: ultralong course check ~/ultralong-course

    Args:
        folder: Your course folder, or one inside it.
    """
    from ultralong.course.workspace import overview

    rows = overview(folder)
    width = max(len(row.notebook) for row in rows)
    for row in rows:
        bar = "#" * row.solved + "." * (row.exercises - row.solved)
        tries = "try" if row.wrong == 1 else "tries"
        print(f"{row.notebook:{width}}  {bar:8} {row.solved} of {row.exercises}, {row.wrong} wrong {tries}")
    left = [(name, row.notebook) for row in rows for name in row.open]
    print(f"Next: {left[0][0]}, in {left[0][1]}.ipynb" if left else "All exercises are solved.")


def site(
    folder: Positional[Path],
    /,
    *,
    repository: str | None = None,
    revision: str = "main",
    pages_branch: str | None = None,
) -> None:
    """Write the course as static pages: figures play without a kernel, nothing is loaded from elsewhere.

    With --repository each notebook's page links to Binder, and to a copy of the notebook whose first cell installs the
    course from there, for Colab or any Jupyter; without it no page names a place that is not known.

    Examples:
      ultralong course site pages
      ultralong course site pages --repository https://github.com/OWNER/NAME --pages-branch gh-pages

    Args:
        folder: Where the pages go.
        repository: Address of a public copy of the repository.
        revision: Its branch, tag or commit that notebooks install.
        pages_branch: Its branch that keeps these pages, from which Colab opens the copies (github.com only).
    """
    from ultralong.course.elsewhere import Repository
    from ultralong.course.site import build

    if repository is None and (pages_branch is not None or revision != "main"):
        raise ValueError("--revision and --pages-branch are of a repository: give --repository too.")
    public = None if repository is None else Repository(repository, revision, pages_branch)
    pages = build(folder, public)
    print(f"{len(pages)} pages. Open {pages[0]}")

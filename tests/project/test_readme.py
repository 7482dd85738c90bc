"""What the README says is there: its commands, options, links, pictures, tree and notebooks."""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from urllib.parse import unquote

import pytest
from test_env import EXTRAS, ROOT, tracked

from ultralong.bench.tables import filled

README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.MULTILINE))
BINARIES = {"make", "ultralong", "pip", "uv", "conda", "git", "cd", "torchrun", "python", "bash", "source"}


def command_lines() -> list[str]:
    blocks = [text.replace("\\\n", " ") for language, text in FENCES if language in ("bash", "sh", "console")]
    lines = [line.removeprefix("$ ").strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


COMMANDS = command_lines()


@cache
def help_of(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "ultralong", *words, "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def words_of(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    return words


def test_the_first_screen_is_one_sentence_one_picture_and_two_commands():
    screen = README[: README.index("\n## ")]
    assert "<picture>" in screen
    assert "prefers-color-scheme: dark" in screen
    assert re.search(r'<img [^>]*alt="[^"]{30,}"', screen)
    blocks = [text for _, text in re.findall(r"^```(\w*)\n(.*?)^```", screen, re.MULTILINE | re.DOTALL)]
    assert [words_of(line)[:2] for block in blocks for line in block.splitlines()] == [
        ["make", "demo"],
        ["make", "test"],
    ]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_exists(line):
    words = words_of(line)
    program = words[0].rsplit("/", maxsplit=1)[-1]
    assert program in BINARIES, f"{program} is not among the programs that the README may ask for"
    if program == "make":
        assert {word for word in words[1:] if "=" not in word} <= TARGETS
    if program == "ultralong" or words[1:3] == ["-m", "ultralong"]:
        arguments = words[1:] if program == "ultralong" else words[3:]
        name = next((arguments[:n] for n in (2, 1) if help_of(*arguments[:n]).returncode == 0), None)
        assert name is not None, f"ultralong {arguments[0]} is not a command: {help_of(arguments[0]).stderr}"
        text = help_of(*name).stdout
        for option in (word.split("=")[0] for word in arguments if word.startswith("--")):
            assert re.search(rf"{re.escape(option)}\b", text), f"ultralong {' '.join(name)} has no {option}"


def test_each_command_of_the_cli_is_in_the_readme():
    from ultralong.cli import COMMANDS as known

    # The whole list is what `ultralong --help` prints; the README leads to each group and each step.
    for name in {name if " " not in name else f"{name.split()[0]} " for name in known}:
        assert f"ultralong {name}" in README, f"the README does not mention `ultralong {name}`"


def test_links_and_pictures_resolve():
    targets = re.findall(r"\]\(([^)\s]+)\)", README) + re.findall(r'(?:src|srcset|href)="([^"]+)"', README)
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    local = [target for target in targets if not re.match(r"https?:", target)]
    assert local, "a README without a link to anything here helps nobody"
    for target in local:
        path, _, anchor = unquote(target).partition("#")
        if path:
            assert (ROOT / path).exists(), f"the README links to {path}, which is not there"
        else:
            assert anchor in headings, f"the README links to #{anchor}, which is not a heading"


def tree_paths() -> list[str]:
    """Paths of the tree block: two spaces a level, a name, and what it is for."""
    block = next(text for language, text in FENCES if language == "text" and "ultralong/" in text)
    paths, folders = [], []
    for line in block.splitlines():
        indent, entry = re.fullmatch(r"( *)(\S+).*", line).groups()
        folders = folders[: len(indent) // 2]
        paths.append("".join(folders) + entry)
        if entry.endswith("/"):
            folders.append(entry)
    return paths


def test_the_tree_lists_what_is_there_and_all_of_the_package():
    listed = tree_paths()
    for path in listed:
        assert (ROOT / path).exists(), f"the README's tree lists {path}, which is not there"
    for path in tracked("ultralong/*.py"):
        relative = path.relative_to(ROOT)
        if relative.name.startswith("__"):
            continue
        places = {str(relative), *(f"{parent}/" for parent in relative.parents if len(parent.parts) > 1)}
        assert places & set(listed), f"the README's tree leaves out {relative}"


def test_each_notebook_is_in_the_table():
    for path in tracked("notebooks/[0-9]*.py"):
        assert f"(notebooks/{path.stem}.ipynb)" in README, f"the README does not link to {path.stem}.ipynb"


def test_extras_that_are_named_exist():
    for names in re.findall(r"\[((?:\w+,?)+)\]['\"]", README):
        assert set(names.split(",")) <= set(EXTRAS)


def test_the_tables_are_what_was_recorded():
    """`ultralong bench tables` would change nothing."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- table attention -->" in text
    assert filled(text, ROOT / "notebooks" / "results") == text
    with pytest.raises(ValueError, match="no table 'speed'; there are attention"):
        filled("<!-- table speed -->\n<!-- end -->", ROOT)

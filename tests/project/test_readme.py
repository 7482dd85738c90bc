"""What the README says is there: its commands, options, links, pictures, tree and notebooks."""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from urllib.parse import unquote

import pytest
from command_server import served
from forked import forked_agents
from test_env import EXTRAS, ROOT, tracked

from ultralong.bench.tables import PAGES as PAGES_OF_RESULTS
from ultralong.bench.tables import TABLES, filled

README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
MAKEFILE = (ROOT / "Makefile").read_text()
PAGES = [path for path in tracked() if path.suffix == ".md" and path != ROOT / "README.md"]
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
    fences = re.findall(r"^```(\w*)\n(.*?)^```", screen, re.MULTILINE | re.DOTALL)
    assert [language for language, _ in fences] == ["bash", "python"]
    blocks = [text for language, text in fences if language == "bash"]
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
    results = ROOT / "notebooks" / "results"
    pages = [(results / name).read_text(encoding="utf-8") for name in PAGES_OF_RESULTS]
    text = "".join(pages)
    for name, (patterns, _) in TABLES.items():
        recorded = any(file for pattern in patterns for file in results.glob(pattern))
        assert not recorded or f"<!-- table {name} -->" in text, name
    assert filled(text, results) == text
    with pytest.raises(ValueError, match="no table 'speed'; there are attention"):
        filled("<!-- table speed -->\n<!-- end -->", ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_other_pages_link_to_what_is_there(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for target in targets:
        if not re.match(r"https?:|#", target):
            assert (page.parent / unquote(target).partition("#")[0]).exists(), f"{page} links to {target}"


def test_the_first_page_is_short_where_it_matters():
    sections = re.split(r"^## ", README, flags=re.MULTILINE)
    assert [section.splitlines()[0] for section in sections[1:6]] == [
        "What it does for you", "What was measured", "Install", "Layout", "Limits"
    ]  # fmt: skip
    measured = next(section for section in sections if section.startswith("What was measured"))
    assert sum(line.startswith("|") for line in measured.splitlines()) <= 12
    plain = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    for paragraph in re.split(r"\n\s*\n", plain):
        lines = paragraph.strip().splitlines()
        if lines and not lines[0].startswith(("|", "* ", "<", "#")):
            assert len(lines) <= 5, f"a paragraph of {len(lines)} lines: {lines[0]}"


@pytest.mark.slow
def test_the_blocks_run_in_order_on_the_miniature(tmp_path):
    """The first page's Python and its three blocks, as they stand, in a folder that has what a clone has."""
    for name in ("ultralong", "data_recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    section = README[README.index("## What it does for you") : README.index("## What was measured")]
    python = next(text for language, text in FENCES if language == "python")
    blocks = [
        text for language, text in re.findall(r"^```(\w*)\n(.*?)^```", section, re.M | re.S) if language == "bash"
    ]
    assert len(blocks) == 3
    programs = tmp_path / "bin"
    programs.mkdir()
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with forked_agents(), served(programs):
        for command in (
            [str(programs / "python"), "-c", python], *(["bash", "-euo", "pipefail", "-c", block] for block in blocks)
        ):  # fmt: skip
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
    for made in ("extended/config.json", "cpt/model/model.safetensors", "job/config.yaml", "eval/report.html"):
        assert (tmp_path / "runs" / "tiny" / made).exists(), made

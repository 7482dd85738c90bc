"""The house rules that a linter does not know: short files, short functions, plain text, nothing of one machine."""

import ast
import re
from pathlib import Path

import pytest
from test_env import ROOT, tracked

MOST_LINES_A_FILE = 380  # to be lowered again when the rooms are cleared
MOST_LINES_A_FUNCTION = 90  # likewise
PACKAGE = sorted((ROOT / "ultralong").rglob("*.py"))
SUFFIXES = {".py", ".md", ".toml", ".yml", ".yaml", ".txt", ".cff", ".ipynb", ".json", ""}
# In pieces, so that this file does not hold what it looks for.
UNFINISHED = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b")
MACHINE = re.compile(r"(?<![\w.])/(?:work|root|home/\w+)/\w|py" r"pi\.org|python" r"hosted|npm" r"js\.(?:org|com)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_a_module_is_short_and_plain(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES_A_FILE, "split it: a longer file is two rooms"
    assert text.isascii(), "ASCII only, so that every editor and terminal shows the same"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= MOST_LINES_A_FUNCTION, f"{node.name} has {lines} lines: it is two functions"


@pytest.mark.parametrize("path", [path for path in tracked() if path.suffix in SUFFIXES], ids=name)
def test_a_file_is_finished_and_of_no_machine(path):
    text = path.read_text(encoding="utf-8")
    for pattern in (UNFINISHED, MACHINE):
        found = pattern.search(text)
        assert found is None, f"{name(path)} holds {text[max(0, found.start() - 30) : found.end() + 30]!r}"


def test_the_top_level_is_what_it_is_said_to_be():
    allowed = {
        "notebooks",
        "ultralong",
        "environment.yml",
        "data_recipes",
        "tests",
        "README.md",
        "pyproject.toml",
        "constraints.txt",
        "Makefile",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        ".ci",
        ".gitignore",
        ".gitattributes",
    }
    assert {path.relative_to(ROOT).parts[0] for path in tracked()} <= allowed


def test_no_weights_but_the_miniature_and_no_large_files():
    for path in tracked():
        if path.suffix in {".safetensors", ".bin", ".pt", ".gguf"}:
            assert path.is_relative_to(ROOT / "ultralong" / "miniature"), f"{name(path)} is a model's weights"
            assert path.stat().st_size <= 16 * 2**20
        elif path.suffix != ".ipynb":
            assert path.stat().st_size <= 2**20, f"{name(path)} is {path.stat().st_size / 2**20:.1f} MiB"

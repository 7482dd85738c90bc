"""The house rules that a linter does not know: short files, short functions, plain text, nothing of one machine."""

import ast
import re
from pathlib import Path

import pytest
from structure import (
    LAYERS,
    MOST_MODULES_A_FOLDER,
    cycles,
    folder_sizes,
    imports,
    names_from_package,
    room,
    rooms_graph,
    summary,
    upward,
    upward_inside,
)
from test_env import ROOT, tracked

MOST_LINES_A_FILE = 300
MOST_LINES_A_FUNCTION = 60
# What does not hold yet. These lists may only shrink; an entry that is no longer needed is to be removed.
ARROWS_TO_REMOVE: set[tuple[str, str]] = set()
FOLDERS_TO_SHRINK: dict[str, int] = {}
FILES_TO_SHRINK: dict[str, int] = {}
FUNCTIONS_TO_SHRINK: dict[str, int] = {}
PACKAGE = sorted((ROOT / "ultralong").rglob("*.py"))
SUFFIXES = {".py", ".md", ".toml", ".yml", ".yaml", ".txt", ".cff", ".ipynb", ".json", ""}
# In pieces, so that this file does not hold what it looks for.
UNFINISHED = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b")
CONFLICT = re.compile(r"^(?:<{7}|>{7}) ", re.MULTILINE)
MACHINE = re.compile(r"(?<![\w.])/(?:work|root|home/\w+)/\w|py" r"pi\.org|python" r"hosted|npm" r"js\.(?:org|com)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_a_module_is_short_and_plain(path):
    text = path.read_text(encoding="utf-8")
    most = FILES_TO_SHRINK.get(name(path), MOST_LINES_A_FILE)
    assert len(text.splitlines()) <= most, "split it: a longer file is two rooms"
    assert text.isascii(), "ASCII only, so that every editor and terminal shows the same"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            most = FUNCTIONS_TO_SHRINK.get(f"{name(path)} {node.name}", MOST_LINES_A_FUNCTION)
            assert lines <= most, f"{node.name} has {lines} lines: it is two functions"


@pytest.mark.parametrize("path", [path for path in tracked() if path.suffix in SUFFIXES], ids=name)
def test_a_file_is_finished_and_of_no_machine(path):
    text = path.read_text(encoding="utf-8")
    for pattern in (UNFINISHED, CONFLICT, MACHINE):
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
        "CONTRIBUTING.md",
        "pyproject.toml",
        "setup.py",
        "constraints.txt",
        "Makefile",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        ".github",
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


@pytest.fixture(scope="module")
def graph():
    """The imports between the package's modules."""
    return imports(ROOT)


def test_imports_point_down_the_table_of_rooms(graph):
    wrong = {pair: found for pair, found in upward(graph).items() if pair not in ARROWS_TO_REMOVE}
    assert not wrong, f"these imports point up: {wrong}"


def test_imports_inside_a_room_point_down_too(graph):
    assert upward_inside(graph) == []
    made = {"ultralong.data.read.a": {"ultralong.data.rows.b"}, "ultralong.data.rows.b": {"ultralong.data.read.a"}}
    assert upward_inside(made) == [("ultralong.data.read.a", "ultralong.data.rows.b")]


def test_every_room_has_its_place_in_the_table(graph):
    assert {room(module) for module in graph} - {"ultralong"} <= set().union(*LAYERS)


def test_no_cycle_between_rooms_or_modules(graph):
    assert cycles(graph) == []
    assert cycles(rooms_graph(graph)) == []


def test_the_package_itself_is_no_way_round_the_table(graph):
    taken = {module: names - {"__version__"} for module, names in names_from_package(ROOT).items()}
    assert {module: names for module, names in taken.items() if names} == {}
    assert graph["ultralong"] == set(), "what ultralong/__init__.py offers is loaded on demand"


def test_each_test_module_has_a_name_of_its_own():
    """Folders of tests are no packages: pytest takes the second module of a name for the first, and runs neither."""
    names = [path.name for path in tracked("tests/**/*.py") if path.name != "conftest.py"]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_a_folder_is_small_enough_to_know():
    sizes = folder_sizes(ROOT)
    assert {n: size for n, size in sizes.items() if size > FOLDERS_TO_SHRINK.get(n, MOST_MODULES_A_FOLDER)} == {}


def _write(root: Path, files: dict[str, str]) -> Path:
    for file, text in files.items():
        path = root / "ultralong" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_measure_of_structure_finds_what_it_looks_for(tmp_path):
    root = _write(
        tmp_path,
        {
            "__init__.py": "",
            "utils/__init__.py": "",
            "utils/low.py": "def f():\n    from ultralong.cli.top import g\n    return g\n",
            "utils/types.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ultralong.cli.top\n",
            "cli/__init__.py": "from ultralong import extend, __version__\n",
            "cli/top.py": "import importlib\nimportlib.import_module('ultralong.utils.low')\n",
            "rope/__init__.py": "",
            "rope/a.py": "from . import b\n",
            "rope/b.py": "from .a import x\n",
            "data/__init__.py": "from ultralong.figures import draw\n",
            "figures/__init__.py": "",
        },
    )
    graph = imports(root)
    assert graph["ultralong.utils.low"] == {"ultralong.cli.top"}, "an import inside a function counts"
    assert graph["ultralong.utils.types"] == set(), "an import for types only does not"
    assert graph["ultralong.cli.top"] == {"ultralong.utils.low"}, "importlib counts"
    assert set(upward(graph)) == {("utils", "cli"), ("data", "figures")}
    assert cycles(rooms_graph(graph)) == [["cli", "utils"]]
    assert cycles(graph) == [["ultralong.cli.top", "ultralong.utils.low"], ["ultralong.rope.a", "ultralong.rope.b"]]
    assert names_from_package(root) == {"ultralong.cli": {"extend", "__version__"}}
    assert folder_sizes(root)["ultralong/rope"] == 2
    assert "upward arrows        2" in summary(root)

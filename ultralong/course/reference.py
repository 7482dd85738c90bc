"""The reference beside the course's pages: topic pages, every key of a training's settings, and the API by pdoc."""

from __future__ import annotations

import dataclasses
import os
import posixpath
import re
import warnings
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import ultralong
from ultralong.data.rows.short_contexts import LongCEConfig
from ultralong.training.adapters.config import LoRAConfig
from ultralong.training.config import DataSource, MemoryConfig, OptimizerConfig, ParallelConfig, TrainConfig
from ultralong.utils.extras import require
from ultralong.utils.files import write_text

PACKAGE = Path(ultralong.__file__).parent
# Page, title, source. The sources stand in their rooms, where a reader of the folder finds them.
TOPICS = (
    ("architecture", "Architecture", "README.md"),
    ("context-parallelism", "Context parallelism", "attention/README.md"),
    ("memory", "Memory and offloading", "training/README.md"),
    ("lora", "LoRA", "training/adapters/README.md"),
    ("watching", "Watching the ranks of a run", "training/watch/README.md"),
    ("tests", "Tests and capabilities", "evaluation/README.md"),
    ("studies", "A study of your own", "ablation/README.md"),
    ("trainers", "Hugging Face trainers", "training/huggingface/README.md"),
    ("formats", "File formats", "data/README.md"),
    ("server", "The server and its clients", "inference/README.md"),
    ("miniature", "The miniature", "miniature/model/README.md"),
)
CONFIG_PAGE = ("config", "Config keys")
API_PAGE = "api/ultralong.html"
GROUPS: tuple[tuple[str, type[Any]], ...] = (
    ("", TrainConfig),
    ("data[]", DataSource),
    ("optimizer", OptimizerConfig),
    ("parallel", ParallelConfig),
    ("memory", MemoryConfig),
    ("lora", LoRAConfig),
    ("long_ce", LongCEConfig),
)
# What a reader imports. The commands have --help, and the rest serves the pages and the tables of this project.
ROOMS = (
    "rope", "checkpoints", "data", "attention", "training", "inference", "evaluation", "planner", "search", "ablation",
    "launch", "api",
)  # fmt: skip
# Modules with a package that only GPU machines have.
NEEDS = {f"ultralong.inference.decode_step.{name}": "triton" for name in ("kernels", "fp8_split", "peer_merge")}
# What pdoc warns of and is meant, as regular expressions.
EXPECTED = (
    "The module specification",  # those it finds itself too: it would leave out a package with `__all__`
    f"Couldn't import ({'|'.join(map(re.escape, NEEDS))}):",  # it tries, though they are left out
    r"Cannot determine where .*\._is_param is taken from",  # an annotation of torch's Tensor, of which it has no source
)


def topics() -> Iterator[tuple[str, str, str]]:
    """Name, title and Markdown of each topic page, the keys of the settings last."""
    for name, title, source in TOPICS:
        text = (PACKAGE / source).read_text(encoding="utf-8")
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # a model card's metadata
        # Sources are not part of a site; the API's pages are, and hold what links to them would show.
        text = re.sub(r"\[([^\]]+)\]\([\w/]+\.py\)", r"\1", text)
        yield name, title, re.sub(r"\]\((\.\./[^)\s]+)\)", partial(_from_the_root, source), text)
    yield (*CONFIG_PAGE, config_keys())


def _from_the_root(source: str, link: re.Match[str]) -> str:
    """A link out of a topic's folder as a notebook would write it, which the site knows how to open."""
    return f"](../{posixpath.normpath(posixpath.join('ultralong', posixpath.dirname(source), link[1]))})"


def attributes(cls: type[Any]) -> dict[str, str]:
    """What the docstring of a dataclass says of each attribute, one line each."""
    section = (cls.__doc__ or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    for line in section.splitlines():
        if match := re.match(r" {8}(\w+): (.*)", line):
            name = match[1]
            found[name] = match[2]
        elif line.startswith(" " * 12) and found:
            found[name] += f" {line.strip()}"
        elif line.strip():
            break
    return found


def config_keys() -> str:
    """Every key of a training's settings as Markdown: type, default, meaning, and the name it had before."""
    parts = [
        "# Config keys",
        "The settings of a training run, in `config.yaml` or a preset. On the command line: "
        "`--set memory.layer_tile=32k`. A key that is misspelt, or a value of another type, is refused with its place.",
    ]
    for group, cls in GROUPS:
        former = {new: old for old, new in getattr(cls, "RENAMED", {}).items()}
        meant, hints = attributes(cls), get_type_hints(cls)
        nested = {name for name, _ in GROUPS if name}
        rows = []
        for field in dataclasses.fields(cls):
            if field.name in nested:
                continue
            old = f" Until 0.3: `{former[field.name]}`." if field.name in former else ""
            kind = _type(hints[field.name]).replace("|", "\\|")
            rows.append(f"| `{field.name}` | {kind} | {_default(field)} | {_cell(meant[field.name])}{old} |")
        head = f"## {group}" if group else "## The run"
        parts.append("\n".join([head, "", "| key | type | default | meaning |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _type(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(hint))
    text = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return re.sub(r"ultralong(\.\w+)+\.", "", text)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default}`"
    return "required"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def write_api(folder: str | os.PathLike[str]) -> list[Path]:
    """Write the API reference: a page a module, from the docstrings, with a search that works without a server.

    Args:
        folder: Where the pages go.

    Returns:
        The pages.

    Raises:
        ImportError: pdoc is missing.
    """
    pdoc = require("pdoc", extra="notebooks")
    render = require("pdoc.render", extra="notebooks")
    folder = Path(folder)
    render.configure(
        docformat="google",
        show_source=False,
        footer_text=f"ultralong {ultralong.__version__}",
        template_directory=Path(__file__).parent / "templates",
    )
    for name in documented_modules():
        _resolve(import_module(name))
    with warnings.catch_warnings():
        for text in EXPECTED:
            warnings.filterwarnings("ignore", message=text, category=UserWarning)
        left_out = [f"!{re.escape(name)}$" for name in _left_out()]
        pdoc.pdoc("ultralong", *documented_modules(), *left_out, output_directory=folder)
    pages = sorted(folder.rglob("*.html"))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        # Members that come from a private class are listed with links to it, and a private class has no place here.
        if (opened := re.sub(r'<a href="#_[^"]*">(.*?)</a>', r"\1", text)) != text:
            write_text(page, opened)
    return pages


def _resolve(module: ModuleType) -> None:
    """Put in place what pdoc does not find: names that a package loads when they are asked for, types in a NamedTuple.

    A NamedTuple's constructor says that it is of another module, where the names in its annotations mean nothing; so do
    annotations that a dataclass has from one of another module.
    """
    for name in getattr(module, "__all__", ()):
        getattr(module, name)
    for cls in vars(module).values():
        if not isinstance(cls, type) or cls.__module__ != module.__name__:
            continue
        if issubclass(cls, tuple):
            cls.__new__.__annotations__ = get_type_hints(cls)
        elif any(dataclasses.is_dataclass(base) and base.__module__ != cls.__module__ for base in cls.__mro__[1:]):
            hints = get_type_hints(cls)
            given = cls.__init__.__annotations__
            cls.__init__.__annotations__ = {name: hints.get(name, hint) for name, hint in given.items()}


def documented_modules() -> list[str]:
    """Every public module of the rooms that a reader imports and that can be imported here, packages included."""
    names = []
    for room in ROOMS:
        for path in sorted((PACKAGE / room).rglob("*.py")):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if not any(part.startswith("_") for part in parts):
                names.append(".".join(parts))
    left_out = _left_out()
    return [name for name in names if name not in left_out]


def _left_out() -> set[str]:
    """Modules that cannot be imported here, which is how pages are made."""
    return {name for name, package in NEEDS.items() if find_spec(package) is None}

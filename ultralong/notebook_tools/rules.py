"""Rules for the notebooks of this repository, as checks that name what is wrong.

Rules of the source: one typed parameters cell, links to its neighbours, a table of times, short cells, real checks.
Rules of the executed file: made from that source, no errors or warnings left in it, every figure readable without
scripts and without eyes, small enough for a repository, nothing of the machine that ran it.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ultralong.notebook_tools.run import WIDGET, read_source
from ultralong.notebook_tools.settings import Settings, sources
from ultralong.notebook_tools.values import stored

PLOTLY = "application/vnd.plotly.v1+json"
MOST_KILOBYTES = 300
MOST_LINES_A_CELL = 30
MOST_WORDS_WITHOUT_PICTURE = 6
LINK = re.compile(r"\]\(([^)\s]+)\)")
MACHINE_PATH = re.compile(r"(?<![\w.:/\-])/(?:home|root|Users|tmp|work|mnt|opt|var|usr)/[\w.\-]")
ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")


def violations(notebook: Any, source_path: Path, settings: Settings) -> list[str]:
    """Everything that is wrong with an executed notebook and its source, one sentence each.

    Args:
        notebook: The executed notebook.
        source_path: Its percent source.
        settings: Its entry of `ci.yml`.
    """
    source = read_source(source_path)
    return [
        *_source_rules(source, source_path),
        *_in_sync(notebook, source),
        *_output_rules(notebook),
        *_size(notebook),
        *_values(notebook, settings),
    ]


def _source_rules(source: Any, path: Path) -> Iterator[str]:
    text = "\n".join(cell.source for cell in source.cells if cell.cell_type == "markdown")
    headings = [line for line in text.splitlines() if line.startswith("# ")]
    if len(headings) != 1:
        yield f"has {len(headings)} titles (`# ...`); a notebook has one."
    if not re.search(r"at a glance", text, re.IGNORECASE) or not re.search(r"^\|.*(CPU|time)", text, re.MULTILINE):
        yield "has no 'At a glance' table with its times."
    if "What you should see" not in text:
        yield "never says 'What you should see'."
    yield from _links(text, path)
    yield from _parameters(source)
    code = [cell for cell in source.cells if cell.cell_type == "code"]
    checks = [cell for cell in code if "check" in cell.metadata.get("tags", [])]
    if not checks:
        yield "has no cell with the tag `check`."
    for cell in checks:
        if "assert" not in cell.source:
            yield f"has a check cell without an assert: {_first(cell)}"
    for cell in code:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        if len(lines) > MOST_LINES_A_CELL:
            yield f"has a cell of {len(lines)} lines (at most {MOST_LINES_A_CELL}): {_first(cell)}"
        if re.search(r"^\s*[!%]\s*(pip|conda|uv)\b", cell.source, re.MULTILINE) and "google.colab" not in cell.source:
            yield f"installs packages outside of a guarded Colab cell: {_first(cell)}"


def _links(text: str, path: Path) -> Iterator[str]:
    targets = {unquote(target.split("#")[0]) for target in LINK.findall(text) if not re.match(r"[a-z]+:|#", target)}
    for target in sorted(targets):
        # A notebook's own file is written after these checks, so a link to it stands on its source.
        there = path.parent / target
        if not there.exists() and not (there.suffix == ".ipynb" and there.with_suffix(".py").exists()):
            yield f"links to {target}, which does not exist."
    order = sources(path.parent)
    at = order.index(path) if path in order else [item.name for item in order].index(path.name)
    for word, index in (("previous", at - 1), ("next", at + 1)):
        if 0 <= index < len(order) and order[index].with_suffix(".ipynb").name not in targets:
            yield f"does not link to the {word} notebook, {order[index].stem}.ipynb."


def _parameters(source: Any) -> Iterator[str]:
    cells = [cell for cell in source.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        yield f"has {len(cells)} cells with the tag `parameters`; it needs exactly one."
        return
    text = cells[0].source
    commented = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    names = []
    for statement in ast.parse(text).body:
        line = ast.unparse(statement)
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value):
            yield f"has a line in its parameters cell that is not `NAME: type = value  # meaning`: {line}"
            continue
        names.append(statement.target.id)
        if not names[-1].isupper():
            yield f"has a parameter that is not in upper case: {names[-1]}"
        try:
            ast.literal_eval(statement.value)
        except ValueError:
            yield f"derives a parameter in the parameters cell, before injected values are known: {line}"
        if not commented & set(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)):
            yield f"has a parameter without a comment: {names[-1]}"
    if "INTERACTIVE" not in names:
        yield "has no parameter INTERACTIVE, so its sliders cannot be turned off."


def _in_sync(notebook: Any, source: Any) -> Iterator[str]:
    def content(book: Any) -> list[tuple[str, str, tuple[str, ...]]]:
        return [(cell.cell_type, cell.source, tuple(cell.metadata.get("tags", []))) for cell in book.cells]

    if content(notebook) != content(source):
        yield "is not what its percent source says: run `make notebooks`."
    for key in ("kernelspec", "language_info"):
        if notebook.metadata.get(key) != source.metadata[key]:
            yield f"has another {key} than the tooling writes: run `make notebooks`."
    if extra := set(notebook.metadata) - set(source.metadata):
        yield f"carries metadata that belongs to one session: {', '.join(sorted(extra))}."


def _output_rules(notebook: Any) -> Iterator[str]:
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        if cell.execution_count is None:
            yield f"has a cell that was not executed: {_first(cell)}"
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"holds an error, {output.ename}, from: {_first(cell)}"
            if output.output_type == "stream" and output.name == "stderr":
                yield f"holds a warning or a log on standard error, from: {_first(cell)}: {output.text.strip()[:200]}"
            yield from _bundle_rules(output.get("data", {}), _first(cell))
            text = output.get("text", "") + "".join(
                str(part) for kind, part in output.get("data", {}).items() if kind.startswith("text/")
            )
            if found := MACHINE_PATH.search(text) or ADDRESS.search(text):
                around = text[max(0, found.start() - 20) : found.end() + 40]
                yield f"shows something of the machine that ran it, from: {_first(cell)}: ...{around}"


def _bundle_rules(data: Any, where: str) -> Iterator[str]:
    if WIDGET in data:
        yield f"holds a widget, which is nothing without its kernel, from: {where}"
    if PLOTLY in data and "image/png" not in data:
        yield f"has a figure without a still picture (use ultralong.figures.show), from: {where}"
    if PLOTLY in data or "image/png" in data:
        alt = data.get("text/plain", "")
        if alt.startswith(("<", "Figure(")) or len(alt.split()) < MOST_WORDS_WITHOUT_PICTURE:
            yield f"has a figure without a sentence that says what it shows, from: {where}"


def _size(notebook: Any) -> Iterator[str]:
    import nbformat

    size = len(nbformat.writes(notebook).encode()) / 1000
    if size > MOST_KILOBYTES:
        yield f"is {size:.0f} kB; at most {MOST_KILOBYTES} kB, so that a page renders it and a clone stays small."


def _values(notebook: Any, settings: Settings) -> Iterator[str]:
    found = stored(notebook)
    for name, (lowest, highest) in settings.expect.items():
        if name not in found:
            yield f"did not store {name}, which ci.yml expects."
        elif not lowest <= found[name] <= highest:
            yield f"stored {name} = {found[name]}; ci.yml expects {lowest} to {highest}."


def _first(cell: Any) -> str:
    return repr(cell.source.strip().splitlines()[0][:80] if cell.source.strip() else "an empty cell")

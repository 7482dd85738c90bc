"""The course and its reference as static pages: figures that play without a kernel, folded solutions, MathML.

Every page stands alone beside one copy of plotly.js; nothing is loaded from elsewhere. Where scripts don't run, the
still picture of each figure is shown.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ultralong.course import elsewhere, reference
from ultralong.course.checks import solution_text
from ultralong.course.elsewhere import Repository
from ultralong.course.exercise import exercise
from ultralong.course.links import as_pages
from ultralong.course.workspace import source_folder
from ultralong.data.recipe.schema import RECIPES
from ultralong.utils.extras import require
from ultralong.utils.files import atomic_path, write_text

RESULTS = (
    ("results", "What was measured", "README.md"),
    ("models", "Real models", "real_models.md"),
    ("design", "Why it is built so", "design_measurements.md"),
)
RECIPES_PAGE = ("recipes", "Data recipes")
OTHER_PAGES = {
    "data_recipes/README.md": f"{RECIPES_PAGE[0]}.html",
    "notebooks/README.md": "index.html",
    **{f"notebooks/results/{file}": f"{name}.html" for name, _, file in RESULTS},
    **{f"ultralong/{source}": f"{name}.html" for name, _, source in reference.TOPICS},
}
MOST_COLUMNS = 4  # of a table on a narrow screen; the rows of a wider one are shown as blocks, a cell a line
EXERCISE = re.compile(r'^check\("(\d\d\.\w+)"', re.MULTILINE)
PLOTLY = "application/vnd.plotly.v1+json"
FENCE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$([^$\n]+?)\$(?!\w)", re.DOTALL)
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --page: #ffffff; --quiet: #59636e; --line: #d1d9e0; --code: #f6f8fa;
  --link: #0a58ca; --ok: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --page: #0d1117; --quiet: #9198a1; --line: #3d444d;
  --code: #161b22; --link: #6cb6ff; --ok: #57c26a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.6 system-ui, sans-serif; }
main, nav { max-width: 990px; margin: 0 auto; padding: 0 16px; } /* code of 118 characters is whole */
main > :is(p, ul, ol, h1, h2, h3) { max-width: 760px; }
nav { display: flex; justify-content: space-between; gap: 12px; padding: 14px 16px; flex-wrap: wrap; }
nav.menu { justify-content: flex-start; gap: 6px 18px; border-bottom: 1px solid var(--line); max-width: none; }
a { color: var(--link); }
h1, h2, h3 { line-height: 1.25; margin: 1.6em 0 0.6em; }
pre { background: var(--code); border: 1px solid var(--line); border-radius: 6px; padding: 10px 12px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, monospace; }
code { font-family: ui-monospace, monospace; background: var(--code); padding: 0 3px; border-radius: 4px;
  overflow-wrap: anywhere; }
pre code { padding: 0; background: none; }
pre.output { background: none; border-left: 3px solid var(--line); border-width: 0 0 0 3px; border-radius: 0;
  color: var(--quiet); white-space: pre-wrap; }
.table { overflow-x: auto; }
table { border-collapse: collapse; margin: 1em 0; }
thead th:empty { padding: 0; border: 0; }
td, th { border: 1px solid var(--line); padding: 4px 10px; text-align: left; vertical-align: top; }
.wide { margin: 1em 0; overflow-x: auto; }
/* A shadow at the side where more can be scrolled to: phones show no scroll bar. */
.wide, .table, pre:not(.output) { --back: var(--page);
  background: linear-gradient(to right, var(--back) 40%, transparent) 0 0 / 40px 100% no-repeat local,
    linear-gradient(to left, var(--back) 40%, transparent) 100% 0 / 40px 100% no-repeat local,
    linear-gradient(to right, #7f7f7f88, transparent) 0 0 / 12px 100% no-repeat scroll,
    linear-gradient(to left, #7f7f7f88, transparent) 100% 0 / 12px 100% no-repeat scroll var(--back); }
pre:not(.output) { --back: var(--code); }
@media (max-width: 600px) {
  .many thead { display: none; }
  .many :is(table, tbody, tr, td) { display: block; }
  .many tr { border-top: 2px solid var(--line); padding: 8px 0; }
  .many td { border: 0; padding: 1px 0; text-align: left !important; }
  .many td:empty { display: none; }
  .many td::before { content: attr(data-head) ": "; color: var(--quiet); }
  .many td:is(:first-child, [data-head=""])::before { content: none; }
  .many td:first-child { font-weight: 600; }
}
.figure { min-width: 600px; }
.figure.moving { min-width: 640px; } /* a narrow screen scrolls: below this labels would lie on each other */
.figure img, img { max-width: 100%; height: auto; }
noscript img { background: white; }
details { border: 1px solid var(--line); border-radius: 6px; padding: 6px 12px; margin: 1em 0; }
summary { cursor: pointer; color: var(--quiet); }
.parameters { border-left: 4px solid var(--link); padding-left: 10px; }
math[display="block"] { margin: 1em 0; overflow-x: auto; }
"""


def build(folder: str | os.PathLike[str], repository: Repository | None = None) -> list[Path]:
    """Write the course's pages.

    Args:
        folder: Where they go; pages of an earlier build are replaced.
        repository: A public copy: each notebook's page then says where it runs without a clone, and a copy of the
            notebook that installs from there first lies in `elsewhere.FOLDER`.

    Returns:
        The pages, the front page first.

    Raises:
        ValueError: No notebooks are found, or one has not been executed.
        ImportError: A package of the notebooks' extra is missing.
    """
    nbformat = require("nbformat", extra="notebooks")
    target, source = Path(folder).expanduser(), source_folder()
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / "plotly.min.js", require("plotly.offline", extra="notebooks").get_plotlyjs())
    front = source / "README.md"
    pages = [_write(target / "index.html", "The course", _markdown(front.read_text(encoding="utf-8")))]
    paths = sorted(source.glob("[0-9][0-9]_*.ipynb"))
    for index, path in enumerate(paths):
        notebook = nbformat.read(path, as_version=4)
        cells = [_cell(cell, number, path) for number, cell in enumerate(notebook.cells)]
        if repository is not None:
            elsewhere.write_copy(path, target / elsewhere.FOLDER, repository)
            cells.insert(1, elsewhere.links(path, repository))  # below the title's cell
        body = "\n".join(cells)
        around = _navigation(paths, index)
        title = next((line[2:] for cell in notebook.cells for line in cell.source.splitlines() if line[:2] == "# "), "")
        pages.append(_write(target / f"{path.stem}.html", title or path.stem, body, around))
    _copy(source / "pictures", "*.svg", target / "pictures")
    _copy(reference.PACKAGE, "architecture.svg", target)
    pages += [_write(target / f"{name}.html", title, _markdown(text)) for name, title, text in reference.topics()]
    for name, title, file in RESULTS:
        text = (source / "results" / file).read_text(encoding="utf-8")
        pages.append(_write(target / f"{name}.html", title, _markdown(text)))
    pages.append(_write(target / f"{RECIPES_PAGE[0]}.html", RECIPES_PAGE[1], _recipes()))
    _copy(source / "results", "*.json", target / "results")
    return pages + reference.write_api(target / "api")


def _copy(source: Path, pattern: str, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for path in sorted(source.glob(pattern)):
        with atomic_path(target / path.name) as temporary:
            temporary.write_bytes(path.read_bytes())


def _menu() -> str:
    known = [*((name, title) for name, title, _ in reference.TOPICS), reference.CONFIG_PAGE]
    known += [*((name, title) for name, title, _ in RESULTS), RECIPES_PAGE]
    links = [("index.html", "Course"), *((f"{name}.html", title) for name, title in known), (reference.API_PAGE, "API")]
    return '<nav class="menu">' + "".join(f'<a href="{page}">{title}</a>' for page, title in links) + "</nav>"


def _navigation(paths: list[Path], index: int) -> str:
    before = f'<a href="{paths[index - 1].stem}.html">&larr; {paths[index - 1].stem}</a>' if index else "<span></span>"
    after = (
        f'<a href="{paths[index + 1].stem}.html">{paths[index + 1].stem} &rarr;</a>' if index + 1 < len(paths) else ""
    )
    return f'<nav>{before}<a href="index.html">all notebooks</a>{after or "<span></span>"}</nav>'


def _write(path: Path, title: str, body: str, around: str = "") -> Path:
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n"
        '<script src="plotly.min.js"></script>\n</head>\n'
        f"<body>\n{_menu()}\n{around}\n<main>\n{body}\n</main>\n{around}\n</body>\n</html>\n"
    )
    write_text(path, page)
    return path


def _markdown(text: str) -> str:
    """Markdown with formulas as HTML; links to notebooks become links to pages."""
    mistune = require("mistune", extra="notebooks")
    parts = FENCE.split(text)
    text = "".join(part if index % 2 else MATH.sub(_formula, part) for index, part in enumerate(parts))
    render = mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "footnotes", "task_lists"])
    page = str(render(text))
    page = re.sub(r"<(h[2-6])>(.*?)</\1>", _heading, page, flags=re.DOTALL)
    page = re.sub(r'href="([0-9]{2}_\w+)\.ipynb"', r'href="\1.html"', page)
    page = re.sub(r'href="([a-z0-9_]+\.json)"', r'href="results/\1"', page)
    for name, _, file in RESULTS:
        page = re.sub(rf'href="(results/)?{file}(#[^"]*)?"', rf'href="{name}.html\2"', page)
    page = as_pages(page, set(reference.documented_modules()), OTHER_PAGES)
    # Names of files as links may break behind `_`: a table of them is else wider than a screen.
    page = re.sub(r">[\w.-]*_[\w.-]*</a>", lambda found: found[0].replace("_", "_<wbr>"), page)
    return re.sub(r"<table>.*?</table>", _table, page, flags=re.DOTALL)


def _heading(match: re.Match[str]) -> str:
    """A heading with the id that GitHub gives it, so that a link to a section opens there on both."""
    words = html.unescape(re.sub(r"<[^>]+>", "", match[2])).lower()
    place = re.sub(r"[^\w -]", "", words).replace(" ", "-")
    return f'<{match[1]} id="{place}">{match[2]}</{match[1]}>'


def _table(match: re.Match[str]) -> str:
    """A table that scrolls by itself; each cell of one with many columns has its column's name for narrow screens."""
    table = match[0].replace("\\|", "|")  # in code, where the Markdown of a table has to have it
    heads = [re.sub(r"<[^>]+>", "", head) for head in re.findall(r"<th(?:\s[^>]*)?>(.*?)</th>", table, re.DOTALL)]
    if len(heads) <= MOST_COLUMNS:
        return f'<div class="table">{table}</div>'

    def named(row: re.Match[str]) -> str:
        each = iter(heads)
        return re.sub(r"<td", lambda _: f'<td data-head="{next(each, "")}"', row[0])

    return f'<div class="table many">{re.sub(r"<tr>.*?</tr>", named, table, flags=re.DOTALL)}</div>'


def _recipes() -> str:
    """The recipes' page; their files stand beside it in the clone only."""
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    return _markdown(re.sub(r"\[([^\]]+)\]\([\w.-]+\.ya?ml\)", r"`\1`", text))


def _exercises(source: str) -> Iterator[str]:
    """Hints and a solution of each exercise that a cell checks, folded away."""
    for name in EXERCISE.findall(source):
        hints = "".join(f"<li>{html.escape(hint)}</li>" for hint in exercise(name).hints)
        yield f"<details><summary>Hints for {name}</summary><ol>{hints}</ol></details>"
        answer = f"<pre><code>{html.escape(solution_text(name))}</code></pre>"
        yield f"<details><summary>One solution of {name}</summary>{answer}</details>"


def _formula(match: re.Match[str]) -> str:
    converter = require("latex2mathml.converter", extra="notebooks")
    block = match.group(1) is not None
    return str(converter.convert(match.group(1) or match.group(2), display="block" if block else "inline"))


def _cell(cell: Any, number: int, path: Path) -> str:
    if cell.cell_type == "markdown":
        return _markdown(cell.source)
    if cell.execution_count is None:
        raise ValueError(f"{path.name} has a cell that was not executed. Run: make notebooks NAMES={path.stem}")
    tags = set(cell.metadata.get("tags", []))
    kind = "parameters" if "parameters" in tags else "code"
    code = f'<pre class="{kind}"><code>{html.escape(cell.source)}</code></pre>' if cell.source.strip() else ""
    if "hide-input" in tags or "solution" in tags:
        code = f"<details><summary>Show the code</summary>{code}</details>"
    return "\n".join([code, *_outputs(cell, f"f{number}"), *_exercises(cell.source)])


def _outputs(cell: Any, name: str) -> Iterator[str]:
    for index, output in enumerate(cell.outputs):
        data = output.get("data", {})
        if output.output_type == "stream":
            yield f'<pre class="output">{html.escape(output.text)}</pre>'
        elif PLOTLY in data:
            yield _figure(data, f"{name}-{index}")
        elif "text/html" in data:
            yield f'<div class="table">{data["text/html"]}</div>'
        elif "image/png" in data:
            yield _picture(data)
        elif "text/plain" in data:
            yield f'<pre class="output">{html.escape(data["text/plain"])}</pre>'


def _picture(data: Any) -> str:
    alt = html.escape(data.get("text/plain", ""), quote=True)
    return f'<img alt="{alt}" src="data:image/png;base64,{data["image/png"].strip()}">'


def _figure(data: Any, name: str) -> str:
    """An interactive figure with its still picture for readers without scripts, and its sentence for all."""
    # "</" would end the script element, wherever it stands in a string.
    figure = json.dumps(data[PLOTLY]).replace("<", "\\u003c")
    alt = html.escape(data.get("text/plain", ""), quote=True)
    kind = "figure moving" if data[PLOTLY]["layout"].get("sliders") else "figure"
    still = f"<noscript>{_picture(data)}</noscript>" if "image/png" in data else ""
    return (
        f'<div class="wide"><div class="{kind}" id="{name}" role="img" aria-label="{alt}"></div></div>{still}\n'
        f"<script>{{ const f = {figure}; f.config = {{responsive: true, displayModeBar: false}}; "
        f"Plotly.newPlot('{name}', f); }}</script>"
    )

"""The page of a report: parts in reading order, each left out when there is nothing to show."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import yaml

from ultralong import figures
from ultralong.evaluation.measures.intervals import wilson
from ultralong.evaluation.report.style import SCRIPT, STYLE
from ultralong.figures import tokens_label
from ultralong.utils.extras import require

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from ultralong.evaluation.report.report import ReportData

MOST_QUOTED = 12
PICTURE_WIDTH = 920


def render(data: ReportData, summary: Mapping[str, Any], *, interactive: bool) -> str:
    """The whole page as one string of HTML.

    Args:
        data: What to tell.
        summary: Needles found inside and beyond the old window, before and after.
        interactive: True adds plotly's script and each figure's data.
    """
    parts = [
        _header(data, summary),
        _needle(data, interactive),
        _perplexity(data, interactive),
        _training(data, interactive),
        _rows(data, interactive),
        _failures(data),
        _commands(data),
        _notes(data),
        _settings(data),
        _environment(data),
    ]
    return page(data.title, parts, interactive=interactive)


def page(title: str, parts: Iterable[str], *, interactive: bool) -> str:
    """A page of parts, with its style and nothing outside of it.

    Args:
        title: Title of the window.
        parts: HTML of each part; empty ones are left out.
        interactive: True adds plotly's script.
    """
    script = ""
    if interactive:
        library = require("plotly.offline", extra="notebooks").get_plotlyjs()
        # mtime=0: the same report gives the same bytes.
        packed = base64.b64encode(gzip.compress(library.encode(), mtime=0)).decode()
        script = f'<script type="text/plain" id="library">{packed}</script>\n<script>{SCRIPT}</script>\n'
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main>\n{script}</body>\n</html>\n"
    )


def figure_block(figure: Figure, alt: str, *, interactive: bool) -> str:
    """A figure as a picture that a script may bring to life.

    Args:
        figure: The figure.
        alt: What it shows, in a sentence; printed under it as well.
        interactive: True adds the figure's data for the script.
    """
    picture = base64.b64encode(figures.png_bytes(figure, width=PICTURE_WIDTH, scale=1.5)).decode()
    data = ""
    if interactive:
        # "</" inside a script would end it.
        content = json.dumps(json.loads(figure.to_json()), separators=(",", ":")).replace("</", "<\\/")
        data = f'<script type="application/json">{content}</script>'
    return (
        f'<figure><div class="plot"><img src="data:image/png;base64,{picture}" alt="{escape(alt)}" '
        f'width="{PICTURE_WIDTH}">{data}</div><figcaption>{escape(alt)}</figcaption></figure>'
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    """An HTML table that scrolls sideways by itself on a narrow screen; cells are escaped.

    Args:
        head: Titles of the columns.
        rows: Text of the cells.
        numbers: True aligns all but the first column to the right.
    """
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    kind = ' class="numbers"' if numbers else ""
    return (
        f'<div class="scroll" tabindex="0"><table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 4 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _share(count: Mapping[str, Any] | None) -> str:
    return "not measured" if count is None else f"{count['correct']} of {count['n']}"


def _interval(correct: int, n: int) -> str:
    low, high = wilson(correct, n)
    return f"{low:.0%} to {high:.0%}"


def _header(data: ReportData, summary: Mapping[str, Any]) -> str:
    before, after = summary["before_beyond"], summary["after_beyond"]
    tiles = [("window", f"{tokens_label(data.base_window)} \u2192 {tokens_label(data.target_window)}", "tokens")]
    if after is not None:
        tiles.append(
            (
                "needles found beyond the old window",
                f"{'' if before is None else format(before['share'], '.0%') + ' '}\u2192 {after['share']:.0%}",
                f"{_share(before)} \u2192 {_share(after)}",
            )
        )
    tiles.append(("time", duration(data.seconds), "the whole run"))
    shown = "".join(
        f'<div class="tile"><span class="label">{escape(label)}</span><span class="value">{escape(value)}'
        f'</span><span class="detail">{escape(detail)}</span></div>'
        for label, value, detail in tiles
    )
    facts = {"checkpoint": data.checkpoint, **data.facts}
    return (
        f'<header><h1>{escape(data.title)}</h1><div class="tiles">{shown}</div></header>'
        f"<section>{table(['what', 'value'], facts.items(), numbers=False)}</section>"
    )


def _needle(data: ReportData, interactive: bool) -> str:
    both = data.needle_before and data.needle_after
    cells = data.needle_after or data.needle_before
    if not cells:
        return ""
    if both:
        figure = figures.needle_before_after(data.needle_before, data.needle_after, base_window=data.base_window)
        alt = "Needles found by prompt length and depth, before and after; the line marks the old window."
    else:
        figure = figures.needle_heatmap(cells, base_window=data.base_window)
        alt = "Needles found by prompt length and depth; the line marks the old window."
    rows = []
    for length in sorted({cell["length"] for cell in (*data.needle_before, *data.needle_after)}):
        row = [f"{length:,}" + ("" if length <= data.base_window else " (beyond)")]
        for side in (data.needle_before, data.needle_after):
            chosen = [cell for cell in side if cell["length"] == length]
            n, correct = sum(cell["n"] for cell in chosen), sum(cell["correct"] for cell in chosen)
            row += [f"{correct} of {n}", _interval(correct, n)] if n else ["", ""]
        rows.append(row)
    columns = ["prompt and answer (tokens)", "before", "95% interval", "after", "95% interval"]
    return (
        f"<section><h2>Needle in a haystack</h2>{figure_block(figure, alt, interactive=interactive)}"
        f"<details><summary>Counts by length</summary>{table(columns, rows)}</details></section>"
    )


def _perplexity(data: ReportData, interactive: bool) -> str:
    if not data.perplexity:
        return ""
    figure = figures.perplexity_curve(data.perplexity, base_window=data.base_window)
    alt = "Perplexity by position in the document; bands are 95% bootstrap intervals over documents."
    rows = [
        [
            f"{name}, {item['start']:,} to {item['end']:,}",
            f"{item['perplexity']:.2f}",
            "" if item["low"] is None else f"{item['low']:.2f} to {item['high']:.2f}",
            f"{item['n']:,}",
        ]
        for name, bins in data.perplexity.items()
        for item in bins
    ]
    columns = ["model, positions", "perplexity", "95% interval", "tokens"]
    return (
        f"<section><h2>Perplexity by position</h2>{figure_block(figure, alt, interactive=interactive)}"
        f"<details><summary>Values</summary>{table(columns, rows)}</details></section>"
    )


def _training(data: ReportData, interactive: bool) -> str:
    if not data.losses:
        return ""
    figure = figures.loss_curve(data.losses)
    return (
        "<section><h2>Training</h2>"
        + figure_block(figure, "Training loss by step, one line a stage.", interactive=interactive)
        + "</section>"
    )


def _rows(data: ReportData, interactive: bool) -> str:
    if not data.packed_rows:
        return ""
    figure = figures.packed_row(data.packed_rows)
    alt = f"{len(data.packed_rows)} packed rows: each block is a document, or a part of one."
    return f"<section><h2>What it was trained on</h2>{figure_block(figure, alt, interactive=interactive)}</section>"


def _failures(data: ReportData) -> str:
    rows = [
        [f"{cell['length']:,} tokens, depth {cell['depth']:.0%}", str(wrong["expected"]), str(wrong["got"])]
        for cell in data.needle_after
        for wrong in cell.get("wrong", ())
    ]
    if not rows:
        return ""
    more = f"<p>{len(rows) - MOST_QUOTED} more are in report.json.</p>" if len(rows) > MOST_QUOTED else ""
    return (
        "<section><h2>What it got wrong</h2>"
        + table(["where", "hidden", "answered"], rows[:MOST_QUOTED], numbers=False)
        + f"{more}</section>"
    )


def _commands(data: ReportData) -> str:
    if not data.commands:
        return ""
    items = "".join(
        f"<p>{escape(what)}</p><pre><code>{escape(line)}</code></pre>" for line, what in data.commands.items()
    )
    return f"<section><h2>Go on from here</h2>{items}</section>"


def _notes(data: ReportData) -> str:
    if not data.notes:
        return ""
    return (
        "<section><h2>How to read this</h2><ul>"
        + "".join(f"<li>{escape(note)}</li>" for note in data.notes)
        + "</ul></section>"
    )


def _settings(data: ReportData) -> str:
    if not data.settings:
        return ""
    text = yaml.safe_dump(json.loads(json.dumps(data.settings, default=str)), sort_keys=False, allow_unicode=True)
    return (
        f"<section><details><summary>Every setting of the run</summary><pre><code>{escape(text)}</code></pre>"
        "</details></section>"
    )


def _environment(data: ReportData) -> str:
    return (
        "<section><h2>Where it ran</h2>"
        + table(["what", "value"], data.environment.items(), numbers=False)
        + "</section>"
    )

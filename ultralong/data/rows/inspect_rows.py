"""Look into a packed row: which documents, where one ends and the next begins, what is predicted there.

T tokens per row, N segments (documents or parts of one) in it.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ultralong.data.rows.packed_rows import IGNORE, PADDING, PackedRow, PackedRows
from ultralong.data.tokens.encoding import check_same_tokenizer
from ultralong.data.tokens.store import TokenStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLOURS = (36, 33)  # ANSI cyan and yellow by turns, as neighbours must differ and any number of documents may come
HTML_COLOURS = ("#D6EAF5", "#F9E3D2")
SEPARATOR_STYLE = "1;97;45"
REACH = 3  # tokens shown at either side of a boundary


@dataclass(frozen=True)
class Segment:
    """A document, or the part of one, in a row.

    Attributes:
        document: Its number in the token store (for chat, the conversation); -1 for padding.
        start: Its first token.
        end: One past its last token; the separator after it counts.
        head: Text of its first tokens.
        tail: Text of its last tokens without the separator; empty where `head` already holds everything.
        separator: Text of the separator that closes it; empty where none does.
        targets: How many of its inputs have a label.
        facts: Id, source and licence, where the token store is at hand.
    """

    document: int
    start: int
    end: int
    head: str
    tail: str
    separator: str
    targets: int
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """One line that says what it is."""
        if self.document == PADDING:
            return "padding"
        facts = f" {self.facts['id']} ({self.facts['license']})" if self.facts else ""
        return f"document {self.document}{facts}"


@dataclass(frozen=True)
class RowView:
    """A row as one looks at it.

    Attributes:
        row: Its number.
        length: T.
        segments: Its N segments in order.
        boundaries: For the first boundaries inside the row, (place, input, label, position) of the tokens around each;
            a label of "-" is none.
        checks: Counts over the whole row, see `check_row`.
    """

    row: int
    length: int
    segments: list[Segment]
    boundaries: list[list[tuple[int, str, str, int]]]
    checks: dict[str, int]


def check_row(row: PackedRow, between: list[int]) -> dict[str, int]:
    """Count what a row must fulfil, over all of its tokens.

    Args:
        row: The row.
        between: The separator's token ids.

    Returns:
        `tokens`, `segments`, `labels`, `labels_that_are_the_next_input` (of the first T - 1 places; the last label is
        the next row's first token), `masked_labels`, `boundaries` (those inside the row), `boundaries_with_separator`.
    """
    inside = row.boundaries[1:-1]
    inside = inside[row.document_ids[1:] != PADDING]
    kept = row.labels != IGNORE
    # The separator ends the segment before the boundary; one that the row's start cut in two is not counted.
    whole = [int(cut) for cut in inside if between and cut >= len(between)]
    found = sum(row.input_ids[cut - len(between) : cut].tolist() == between for cut in whole)
    return {
        "tokens": int(row.input_ids.size),
        "segments": int(row.document_ids.size),
        "labels": int(kept.sum()),
        "labels_that_are_the_next_input": int((row.labels[:-1] == row.input_ids[1:])[kept[:-1]].sum()),
        "masked_labels": int((~kept).sum()),
        "boundaries": int(inside.size),
        "boundaries_with_separator": int(found),
    }


def inspect_row(
    rows: PackedRows,
    tokenizer: PreTrainedTokenizerBase,
    index: int = 0,
    *,
    edge: int = 24,
    boundaries: int = 3,
    store: TokenStore | None = None,
) -> RowView:
    """One row, readable.

    Args:
        rows: The packed rows.
        tokenizer: What they were made with.
        index: Which row.
        edge: Tokens shown of each segment's head and tail.
        boundaries: For how many boundaries the tokens around are listed.
        store: The token store they were packed from, which knows the documents' names; by default `tokens/` in their
            folder, where recipes put it.

    Raises:
        ValueError: The tokenizer is another one, or there is no such row.
    """
    check_same_tokenizer(rows.manifest["tokenizer"], tokenizer, str(rows.folder))
    if not -len(rows) <= index < len(rows):
        raise ValueError(f"there is no row {index}: {rows.folder} holds {len(rows)}.")
    index %= len(rows)
    row = rows[index]
    between = list(rows.manifest.get("separators", {}).get("between", []))
    if store is None and (rows.folder / "tokens" / "manifest.json").exists():
        store = TokenStore(rows.folder / "tokens")
    bounds = list(zip(pairwise(row.boundaries.tolist()), row.document_ids.tolist(), strict=True))
    segments = [
        _segment(row, start, end, document, between, tokenizer, store, edge) for (start, end), document in bounds
    ]
    inside = row.boundaries[1:-1][:boundaries].tolist()
    around = [_around(row, cut, len(between), tokenizer) for cut in inside]
    return RowView(index, rows.length, segments, around, check_row(row, between))


def _segment(
    row: PackedRow,
    start: int,
    end: int,
    document: int,
    between: list[int],
    tokenizer: Any,
    store: TokenStore | None,
    edge: int,
) -> Segment:
    ids = row.input_ids[start:end]
    closed = bool(between) and ids[-len(between) :].tolist() == between
    text = ids[: ids.size - len(between)] if closed else ids
    shown = text if text.size <= 2 * edge else text[:edge]
    facts = store.describe(document) if store is not None and document != PADDING else {}
    return Segment(
        document,
        start,
        end,
        _text(tokenizer, shown),
        "" if text.size <= 2 * edge else _text(tokenizer, text[-edge:]),
        _text(tokenizer, between) if closed else "",
        int((row.labels[start:end] != IGNORE).sum()),
        facts,
    )


def _text(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    # Some tokenizers ask for spaces to be taken out before punctuation: not what stands there.
    return str(tokenizer.decode([int(token) for token in ids], clean_up_tokenization_spaces=False))


def _around(row: PackedRow, cut: int, width: int, tokenizer: Any) -> list[tuple[int, str, str, int]]:
    """The tokens around a boundary: `REACH` before the separator of `width` tokens, and as many after it."""
    places = range(max(0, cut - width - REACH), min(row.input_ids.size, cut + REACH))
    return [
        (
            place,
            _text(tokenizer, [row.input_ids[place]]),
            "-" if row.labels[place] == IGNORE else _text(tokenizer, [row.labels[place]]),
            int(row.position_ids[place]),
        )
        for place in places
    ]


def as_text(view: RowView, *, colour: bool = False, most: int) -> str:
    """A view for a terminal.

    Args:
        view: From `inspect_row`.
        colour: True paints documents in two colours by turns and the separator in a third (ANSI codes).
        most: Segments shown at either end of the row; those between are counted.
    """
    checks, segments = view.checks, _counted(view.segments)
    lines = [
        f"row {view.row}: {view.length:,} tokens, {segments}, {checks['labels']:,} labels "
        f"({checks['labels_that_are_the_next_input']:,} of them the next input, {checks['masked_labels']:,} "
        f"masked), {checks['boundaries_with_separator']:,} of {checks['boundaries']:,} boundaries with a separator"
    ]
    for number, segment in _shown(view.segments, most):
        if segment is None:
            lines.append(f"  ... {len(view.segments) - 2 * most:,} more segments ...")
            continue
        lines.append(
            f"[{segment.start:,} .. {segment.end:,}) {segment.name}: {segment.end - segment.start:,} tokens, "
            f"{segment.targets:,} labels"
        )
        if segment.document != PADDING:
            gap = _paint(" [...] ", "2", colour) if segment.tail else ""
            lines.append(
                "  "
                + _paint(repr(segment.head)[1:-1], str(COLOURS[number % 2]), colour)
                + gap
                + _paint(repr(segment.tail)[1:-1], str(COLOURS[number % 2]), colour)
                + _paint(segment.separator, SEPARATOR_STYLE, colour)
            )
    for boundary in view.boundaries:
        lines.append("around a boundary: place, input -> label, position")
        lines += [
            f"  {place:>9,}  {text!r} -> {label if label == '-' else repr(label)}  {position:,}"
            for place, text, label, position in boundary
        ]
    return "\n".join(lines)


def as_html(view: RowView, *, most: int) -> str:
    """A view for a notebook: a table with a line for each segment, as pages keep tables when they strip styles."""
    checks, segments = view.checks, _counted(view.segments)
    parts = [
        f"<p>Row {view.row}: {view.length:,} tokens, {segments}, {checks['labels']:,} labels, "
        f"{checks['boundaries_with_separator']:,} of {checks['boundaries']:,} boundaries with a separator.</p>",
        "<table><tr><th>tokens</th><th>document</th><th>text</th></tr>",
    ]
    for number, segment in _shown(view.segments, most):
        if segment is None:
            parts.append(f"<tr><td></td><td>{len(view.segments) - 2 * most:,} more</td><td></td></tr>")
            continue
        text = html.escape(segment.head) + (" [...] " + html.escape(segment.tail) if segment.tail else "")
        mark = f'<b style="background:#CC79A7">{html.escape(segment.separator)}</b>' if segment.separator else ""
        parts.append(
            f"<tr><td>{segment.start:,} - {segment.end:,}</td><td>{html.escape(segment.name)}</td>"
            f'<td style="text-align:left;background:{HTML_COLOURS[number % 2]};color:#222">{text}{mark}'
            "</td></tr>"
        )
    return "".join([*parts, "</table>"])


def _paint(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour and text else text


def _counted(segments: list[Segment]) -> str:
    return f"{len(segments):,} segment" + ("" if len(segments) == 1 else "s")


def _shown(segments: list[Segment], most: int) -> Iterator[tuple[int, Segment | None]]:
    """Numbers and segments at either end, `most` of each, and None in the place of those between."""
    for number, segment in enumerate(segments):
        if not most <= number < len(segments) - most:
            yield number, segment
        elif number == most:
            yield number, None

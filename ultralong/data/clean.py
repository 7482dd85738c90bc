"""Take what is not text out of a text: a publisher's notices, page headers and footers."""

from __future__ import annotations

import re
from collections.abc import Callable

GUTENBERG_START = re.compile(r"\*{3}\s*START OF (?:THE|THIS) PROJECT GUTENBERG[^\n]*\*{3}[^\n]*\n", re.IGNORECASE)
GUTENBERG_END = re.compile(r"\n[^\n]*\*{3}\s*END OF (?:THE|THIS) PROJECT GUTENBERG", re.IGNORECASE)
PAGE_FOOTER = re.compile(r"\[\s*page\s+[0-9ivxlc]+\s*\]\s*$|^\s*\[\s*page\s+[0-9ivxlc]+\s*\]", re.IGNORECASE)
RFC_HEADER = re.compile(r"\bRFC[ -]?\d+|\bRequest for Comments", re.IGNORECASE)
MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.? +(?:\d\d?,? +)?\d{4}"
HEADER_LINES = 3


def strip_gutenberg(text: str) -> str:
    """Project Gutenberg's licence and notices off both ends; a text without its marks is left as it is."""
    start = GUTENBERG_START.search(text)
    end = GUTENBERG_END.search(text, start.end() if start else 0)
    return text[start.end() if start else 0 : end.start() if end else len(text)].strip("\n") + "\n"


def strip_rfc(text: str) -> str:
    """Page furniture out of an RFC: the `[Page n]` footer, the form feed, the `RFC nnnn  Title  Month year` header.

    A paragraph that a page break cut in two is made whole: where the line before the break does not end a sentence and
    the line after it goes on in lower case, they follow each other; elsewhere one empty line takes the break's place.
    """
    out: list[str] = []
    lines = text.replace("\r", "").split("\n")
    place = 0
    while place < len(lines):
        line = lines[place]
        if PAGE_FOOTER.search(line) or line.startswith("\f"):
            place = _after_break(lines, place)
            _close_break(out, lines[place] if place < len(lines) else "")
        else:
            out.append(line.rstrip())
            place += 1
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(out)).strip("\n") + "\n"


def _after_break(lines: list[str], place: int) -> int:
    """The first line of text after a page break: past the footer, the form feed, empty lines and the next header."""
    if PAGE_FOOTER.search(lines[place]):
        place += 1
    while place < len(lines) and not lines[place].strip("\f \t"):
        place += 1
    header = place
    while header < len(lines) and lines[header].strip() and header - place <= HEADER_LINES:
        header += 1
    block = "\n".join(lines[place:header])
    # Newer headers hold number, title and date; the oldest only a title and, on a line of its own, the date.
    dated = re.search(MONTH, block) if RFC_HEADER.search(block) else re.search(rf"(?m)^\s*{MONTH}\s*$", block)
    if not dated or header - place > HEADER_LINES:
        if place < len(lines):
            lines[place] = lines[place].lstrip("\f")
        return place
    while header < len(lines) and not lines[header].strip():
        header += 1
    return header


def _close_break(out: list[str], following: str) -> None:
    while out and not out[-1]:
        out.pop()
    if out and (out[-1].endswith((".", ":", ";", "?", "!")) or not re.match(r"\s*[a-z]", following)):
        out.append("")


CLEANERS: dict[str, Callable[[str], str]] = {"gutenberg": strip_gutenberg, "rfc": strip_rfc}

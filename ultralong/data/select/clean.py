"""Take what is not text out of a text (a publisher's notices, page headers and footers, layout), and cut long ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from ultralong.data.read.documents import Document

GUTENBERG_START = re.compile(r"\*{3}\s*START OF (?:THE|THIS) PROJECT GUTENBERG[^\n]*\*{3}[^\n]*\n", re.IGNORECASE)
GUTENBERG_END = re.compile(r"\n[^\n]*\*{3}\s*END OF (?:THE|THIS) PROJECT GUTENBERG", re.IGNORECASE)
PAGE_MARK = re.compile(r"\f|\[\s*page\s+[0-9ivxlc]+\s*\]", re.IGNORECASE)
EMPTY_LINES = re.compile(r"(?:[ \t\f]*\n)*\f?(?:[ \t]*\n)*")
HEADER = re.compile(r"(?:[ \t]*[^\s][^\n]*\n){1,3}(?=[ \t\f]*\n|$)")
RFC_NUMBER = re.compile(r"\bRFC[ -]?\d+|\bRequest for Comments", re.IGNORECASE)
DATE = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.? +(?:\d\d?,? +)?\d{4}"
MONTH = re.compile(DATE)
LONE_MONTH = re.compile(rf"^[ \t]*{DATE}[ \t]*$", re.MULTILINE)
LOWER_CASE_NEXT = re.compile(r"[ \t]*[a-z]")


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
    text = text.replace("\r", "")
    out: list[str] = []
    place = 0
    for mark in PAGE_MARK.finditer(text):
        start = text.rfind("\n", 0, mark.start()) + 1
        end = text.find("\n", mark.end())
        end = len(text) if end < 0 else end
        amid = text[start : mark.start()].strip() and text[mark.end() : end].strip()
        if start < place or (amid and mark.group() != "\f"):
            continue
        before = text[place:start].rstrip()
        place = _after_break(text, mark.end() if mark.group() == "\f" else end)
        whole = before.endswith((".", ":", ";", "?", "!")) or not LOWER_CASE_NEXT.match(text, place)
        out += [before, "\n\n" if whole else "\n"]
    out.append(text[place:])
    return re.sub(r"\n{4,}", "\n\n\n", "".join(out)).strip("\n") + "\n"


def _after_break(text: str, place: int) -> int:
    """Where the text goes on after a page break: past form feed, empty lines and the next page's header."""
    place = _past_empty_lines(text, place)
    header = HEADER.match(text, place)
    if header is None:
        return place
    # Newer headers hold number, title and date; the oldest only a title and, on a line of its own, the date.
    dated = MONTH.search(header[0]) if RFC_NUMBER.search(header[0]) else LONE_MONTH.search(header[0])
    return _past_empty_lines(text, header.end()) if dated else place


def _past_empty_lines(text: str, place: int) -> int:
    found = EMPTY_LINES.match(text, place)
    return place if found is None else found.end()  # the pattern matches nothing too


def collapse_spaces(text: str) -> str:
    """Runs of blanks to one, runs of empty lines to one, and no blank at either end: for text whose layout is no part.

    Centred titles and indented verse in plain-text books cost a small vocabulary many tokens.
    """
    text = re.sub(r"[ \t]+", " ", text.replace("\r\n", "\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def cut(documents: Iterable[Document], limit: int | None) -> Iterator[Document]:
    """Cut documents of more than `limit` characters at the last line end before the limit; None cuts nothing."""
    for document in documents:
        if limit is None or len(document.text) <= limit:
            yield document
            continue
        start, number = 0, 1
        while start < len(document.text):
            end = line_end(document.text, start, min(start + limit, len(document.text)))
            yield replace(document, id=f"{document.id}@{number}", text=document.text[start:end])
            start, number = end, number + 1


def line_end(text: str, start: int, end: int) -> int:
    """The last line end in `start..end`, or `end` where the text ends there or holds none."""
    return end if end == len(text) else text.rfind("\n", start, end) + 1 or end


CLEANERS: dict[str, Callable[[str], str]] = {
    "gutenberg": strip_gutenberg,
    "rfc": strip_rfc,
    "spaces": collapse_spaces,
}

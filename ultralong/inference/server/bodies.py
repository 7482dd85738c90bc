"""Bodies of requests: from bytes to what is asked, at a cost that has a limit, while others are heard.

What C code does at one go holds all threads of this process, the event loop too, and each value of a JSON text takes
some fifty times its bytes. So values are counted before they are made, long texts are read in pieces, and large bodies
one after the other on a thread.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import re
from collections.abc import Mapping
from itertools import takewhile
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from ultralong.inference.server.tickets import Refused

SMALL = 2**16  # bytes that are read at once, which takes milliseconds
PIECE = 2**20  # bytes or characters that are read at once of a longer one
LONG = 16 * PIECE  # characters from which on texts are read in pieces
NUMBERS = 10_000  # beside token ids
OTHERS = 150_000  # names, texts, lists and objects; a message is five of them or more, and takes some 10 KiB
DIGITS = re.compile(rb"[0-9]{5000}")  # more than Python makes a number of
ESCAPE = 6  # characters of the longest one
SHOWN = 200  # characters of a name that is refused
JSON = re.compile(r"application/(.+\+)?json")
Asked = TypeVar("Asked", bound=BaseModel)


class Bodies:
    """Reads bodies.

    Args:
        tokens: Most tokens of a prompt, which may be given one by one.
    """

    def __init__(self, tokens: int) -> None:
        self._values, self._large = OTHERS + NUMBERS + tokens, asyncio.Lock()

    async def read(self, kind: type[Asked], request: Request) -> Asked:
        """What a request asks.

        Args:
            kind: Of the request.
            request: Its body comes as JSON.

        Raises:
            Refused: It is none, is not understood, or has too many values.
        """
        try:
            body = await request.body()
        except ClientDisconnect:
            raise Refused(499, "The client has gone.", "client_gone") from None
        said = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not JSON.fullmatch(said):  # as curl sends what it is told to post, or a form of another one's page
            raise _wrong("the request: JSON is needed, sent with the header Content-Type: application/json")
        if not body:
            raise _wrong("the request: its body is empty, and JSON is needed")
        if len(body) <= SMALL:
            return understood(kind, body, self._values)
        async with self._large:
            return await asyncio.to_thread(understood, kind, body, self._values)


def understood(kind: type[Asked], body: bytes, most: int) -> Asked:
    """What a body of up to `most` values asks.

    Raises:
        Refused: It is no JSON, is not understood, or has more values.
    """
    try:
        if (encoding := json.detect_encoding(body)) != "utf-8":
            body = body.decode(encoding, "surrogatepass").encode("utf-8", "surrogatepass")
        _check_size(body, most)
        given = _parsed(body)
    except json.JSONDecodeError as error:
        raise _wrong(f"the request is no JSON: {error.msg}, behind character {error.pos}") from None
    except (ValueError, RecursionError):
        raise _wrong("the request: its body can't be read as JSON in UTF-8") from None
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    place = _place(first)
    if first["type"] == "extra_forbidden":
        raise _wrong(f"{place}: this server does not support it. Leave it out.", place)
    raise _wrong(f"{place or 'the request'}: {first['msg'].removeprefix('Value error, ')}", place)


def _wrong(text: str, place: str | None = None) -> Refused:
    return Refused(400, text, "invalid_request", place or None)


def _check_size(body: bytes, most: int) -> None:
    """Refuse a body before its values are made, where they are too many.

    Raises:
        Refused: There are more than `most`, or too many that are no numbers.
        ValueError: A number has more digits than any.
    """
    values, others, inside, start = 1, 0, False, 0
    while start < len(body):
        piece = body[start : start + PIECE]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:  # the next byte belongs to the last one
            piece = body[start : start + PIECE + 1]
        start += len(piece)
        # Pairs first: the quote behind one ends a text, the quote behind a single backslash does not.
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b" ".join(parts[int(inside) :: 2])
        inside ^= len(parts) % 2 == 0
        others += outside.count(b"{") + outside.count(b"[") + len(parts) // 2
        values += outside.count(b",")
        if values > most or others > OTHERS:
            text = f"A request may have {most:,} values, and {OTHERS:,} names, texts, lists and objects."
            raise Refused(413, text, "request_too_large")
        if DIGITS.search(outside):
            raise ValueError("a number is too long")


def _parsed(body: bytes) -> Any:
    """The value that a JSON text in UTF-8 spells.

    Raises:
        ValueError: It spells none.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
    pieces = [decoder.decode(body[start : start + PIECE]) for start in range(0, len(body), PIECE)]
    text = "".join([*pieces, decoder.decode(b"", final=True)])
    if len(text) <= LONG:
        return json.loads(text)
    reader: Any = json.JSONDecoder()
    reader.parse_string = _text
    reader.scan_once = py_make_scanner(reader)
    return reader.decode(text)


def _text(source: str, start: int, strict: bool = True) -> tuple[str, int]:
    """The text that begins behind its quote at `start`, and where it ends, read in pieces.

    Raises:
        ValueError: It does not end, or has what none may have.
    """
    pieces: list[str] = []
    place, whole = start, json.JSONDecoder(strict=strict)
    while True:
        end = min(place + PIECE, len(source))
        last = source.rfind("\\", max(place, end - ESCAPE), end) if end < len(source) else -1
        if last >= 0:
            before = source[place:last]
            if (len(before) - len(before.rstrip("\\"))) % 2 == 0:
                end = last  # it begins an escape, which is not cut
        try:
            piece, read = whole.raw_decode(f'"{source[place:end]}"')
        except json.JSONDecodeError as error:  # what it says of a piece is said of the source
            at = start - 1 if "Unterminated" in error.msg else place + error.pos - 1
            raise json.JSONDecodeError(error.msg, source, at) from None
        if read < end - place + 2:
            return "".join([*pieces, piece]), place + read - 1
        if end == len(source):
            raise json.JSONDecodeError("Unterminated string starting at", source, start - 1)
        spelled = piece[-1] != source[end - 1]
        if spelled and "\ud800" <= piece[-1] <= "\udbff":  # half of a character whose other half may follow
            piece, end = piece[:-1], end - ESCAPE
        pieces.append(piece)
        place = end


def _place(error: Mapping[str, Any]) -> str:
    """Where in a request something is wrong, in the request's own words."""
    parts = [str(part)[:SHOWN] for part in error["loc"]]
    if error["type"] != "extra_forbidden":  # where several types are taken, pydantic adds which of them it tried
        parts = list(takewhile(lambda part: part.isidentifier() or part.isdigit(), parts))
    return ".".join(parts).encode("utf-8", "backslashreplace").decode()  # the name of a key may be no text

"""Compressed files as a stream of bytes that knows when it was cut short, and that never grows without bound.

Python's own readers differ in what they do with a truncated file: gzip raises and drops what it had buffered, zstandard
ends as if nothing were wrong. Here every kind goes through its decompressor object, which says whether a frame ended.
A file's first bytes say how it is compressed; its ending, in any case, only where they do not.
"""

from __future__ import annotations

import bz2
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ultralong.utils.extras import require
from ultralong.utils.text_formats import TwiceError, each_once

PIECE = 1 << 16
# A few bytes can stand for gigabytes. Decompressors that cannot be told to stop are fed so little at a time that what
# comes out stays below about 128 MiB.
ZSTD_PIECE = 1 << 12
ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` writes; the library's own limit is 2^27
LARGEST_PIECE = 1 << 24  # bytes given out at once by decompressors that can be told to stop


class DamagedFile(Exception):
    """The file is cut short or broken; everything before the break has been given out."""


class TooLarge(Exception):
    """A line or a file holds more bytes than are read into one record."""


def _zstd() -> Any:
    zstandard = require("zstandard", extra="data")
    return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()


DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gz": lambda: zlib.decompressobj(wbits=31),
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
    "zst": _zstd,
}
# Endings of compressed files, in lower case.
COMPRESSED = {
    ".gz": "gz",
    ".gzip": "gz",
    ".bz2": "bz2",
    ".bz": "bz2",
    ".xz": "xz",
    ".lzma": "xz",
    ".zst": "zst",
    ".zstd": "zst",
}
_MAGIC = {
    "gz": re.compile(rb"\x1f\x8b\x08"),
    "bz2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "zst": re.compile(rb"\x28\xb5\x2f\xfd"),
}


def compression(path: Path) -> str | None:
    """How a file is compressed: a key of `DECOMPRESSORS`, or None."""
    with open(path, "rb") as stream:
        head = stream.read(16)
    found = next((kind for kind, magic in _MAGIC.items() if magic.match(head)), None)
    return found or COMPRESSED.get(path.suffix.lower())


def pieces(path: Path) -> Iterator[bytes]:
    """A file's content in pieces, decompressed (gzip, bzip2, xz, zstandard; several frames in a row too).

    Raises:
        DamagedFile: The compressed data is broken or ends too early, after all that could be read.
    """
    kind = compression(path)
    with open(path, "rb") as stream:
        if kind is None:
            while piece := stream.read(PIECE):
                yield piece
            return
        make = DECOMPRESSORS[kind]
        decompressor, started = make(), False
        try:
            while piece := stream.read(ZSTD_PIECE if kind == "zst" else PIECE):
                while piece:
                    started = True
                    yield from _decompressed(decompressor, piece, kind)
                    piece = decompressor.unused_data if decompressor.eof else b""
                    if decompressor.eof:
                        decompressor, started = make(), False
        except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
            raise DamagedFile(str(error)) from error
        except Exception as error:
            if type(error).__name__ != "ZstdError":  # named here without importing a package that may be missing
                raise
            raise DamagedFile(str(error)) from error
    if started or path.stat().st_size == 0:
        raise DamagedFile("ends in the middle" if started else "has no content")


def _decompressed(decompressor: Any, piece: bytes, kind: str) -> Iterator[bytes]:
    """What a piece stands for; in parts where the decompressor can be told how much to give out."""
    if kind not in ("bz2", "xz"):
        yield decompressor.decompress(piece)
        return
    yield decompressor.decompress(piece, LARGEST_PIECE)
    while not decompressor.needs_input and not decompressor.eof:
        yield decompressor.decompress(b"", LARGEST_PIECE)


def lines(path: Path, most: int | None = None) -> Iterator[bytes | None]:
    """A file's lines without their ends, decompressed; the last one needs no line break.

    Args:
        path: The file.
        most: Bytes of the longest line; None stands in the place of a longer one, which is never held in memory whole.

    Raises:
        DamagedFile: As for `pieces`; a line cut by the break is not given out.
    """
    rest: list[bytes] = []
    size, dropped = 0, False
    for piece in pieces(path):
        *whole, last = piece.split(b"\n")
        for line in whole:
            dropped = dropped or (most is not None and size + len(line) > most)
            yield None if dropped else b"".join([*rest, line])
            rest, size, dropped = [], 0, False
        size += len(last)
        if dropped or (most is not None and size > most):
            rest, dropped = [], True
        else:
            rest.append(last)
    if dropped:
        yield None
    elif any(rest):
        yield b"".join(rest)


def content(path: Path, most: int) -> bytes:
    """A whole file, decompressed.

    Raises:
        DamagedFile: As for `pieces`.
        TooLarge: It holds more than `most` bytes.
    """
    found: list[bytes] = []
    size = 0
    for piece in pieces(path):
        size += len(piece)
        if size > most:
            raise TooLarge
        found.append(piece)
    return b"".join(found)


def parse_json(data: bytes) -> Any:
    """A JSON value; an integer of more digits than Python converts (4,300) becomes its digits as text.

    Raises:
        UnicodeDecodeError: The bytes are no UTF-8.
        ValueError: They are no JSON.
        TwiceError: A key of an object stands twice.
        RecursionError: They are nested too deeply.
    """
    if b"\0" in data[:4] or data.startswith((b"\xff\xfe", b"\xfe\xff")):  # Python would guess another encoding
        raise UnicodeDecodeError("utf-8", data[:4], 0, 1, "UTF-16 or UTF-32")
    try:
        return json.loads(data, object_pairs_hook=each_once)
    except (json.JSONDecodeError, UnicodeDecodeError, TwiceError):
        raise
    except ValueError:  # Python's limit of digits; looking at each number would slow down all other records
        return json.loads(data, parse_int=_integer, object_pairs_hook=each_once)


def _integer(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:
        return digits


def salvage_records(data: bytes) -> Iterator[Any]:
    """The whole records of a JSON list that was cut off, as a broken download leaves it, or of objects in a row."""
    text, decoder = data.decode("utf-8", "ignore").lstrip("\ufeff \t\r\n"), json.JSONDecoder(parse_int=_integer)
    if not text.startswith(("[", "{")):
        return
    place = 1 if text.startswith("[") else 0
    while place < len(text):
        if text[place] in " \t\r\n,":
            place += 1
            continue
        try:
            record, place = decoder.raw_decode(text, place)
        except (json.JSONDecodeError, RecursionError):
            return
        if isinstance(record, dict):
            yield record

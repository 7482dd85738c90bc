"""Compressed files as a stream of bytes that knows when it was cut short.

Python's own readers differ in what they do with a truncated file: gzip raises and drops what it had buffered, zstandard
ends as if nothing were wrong. Here every kind goes through its decompressor object, which says whether a frame ended.
"""

from __future__ import annotations

import bz2
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ultralong.utils.extras import require

PIECE = 1 << 16


class DamagedFile(Exception):
    """The file is cut short or broken; everything before the break has been given out."""


def _zstd() -> Any:
    return require("zstandard", extra="data").ZstdDecompressor().decompressobj()


DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".zst": _zstd,
}


def pieces(path: Path) -> Iterator[bytes]:
    """A file's content in pieces, decompressed by its ending (.gz, .bz2, .xz, .zst; several frames in a row too).

    Raises:
        DamagedFile: The compressed data is broken or ends too early, after all that could be read.
    """
    make = DECOMPRESSORS.get(path.suffix)
    with open(path, "rb") as stream:
        if make is None:
            while piece := stream.read(PIECE):
                yield piece
            return
        decompressor, started = make(), False
        try:
            while piece := stream.read(PIECE):
                while piece:
                    started = True
                    yield decompressor.decompress(piece)
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


def lines(path: Path) -> Iterator[bytes]:
    """A file's lines without their ends, decompressed; the last one needs no line break.

    Raises:
        DamagedFile: As for `pieces`; a line cut by the break is not given out.
    """
    rest: list[bytes] = []
    for piece in pieces(path):
        *whole, last = piece.split(b"\n")
        for line in whole:
            yield b"".join([*rest, line])
            rest.clear()
        rest.append(last)
    if any(rest):
        yield b"".join(rest)


def salvage_records(data: bytes) -> Iterator[Any]:
    """The whole records of a JSON list that was cut off, as a broken download leaves it."""
    text, decoder = data.decode("utf-8", "ignore").lstrip(), json.JSONDecoder()
    place = 1 if text.startswith("[") else len(text)
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

"""What a file is: by its ending, in any case, and by what it holds.

Names are no promise. JSON lines come as `part-00000`, `data.jsonl.1` or `data.txt`; were they read as text, JSON syntax
would be trained on. So a file that no ending calls anything else is text only when its beginning is not JSON, Parquet,
an archive or a document of another program.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from ultralong.data.read.compressed import COMPRESSED, DamagedFile, compression, parse_json, pieces
from ultralong.utils.files import LFS_POINTER

FileFormat = Literal["text", "jsonl", "json", "parquet"]
ENDINGS: dict[str, FileFormat] = {
    ".jsonl": "jsonl",
    ".jsonlines": "jsonl",
    ".ndjson": "jsonl",
    ".ldjson": "jsonl",
    ".jl": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
}
# Data of rows and columns: quotes, commas and numbers of rows would be trained on.
TABLES = {".csv": "CSV", ".tsv": "TSV"}
HEAD = 1 << 16  # bytes that are looked at
TAR_MARK = slice(257, 262)
FOREIGN = (
    (b"PK\x03\x04", "a zip archive (or a document in one)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a rar archive"),
    (b"\x04\x22\x4d\x18", "compressed with lz4"),
    (b"\x1f\x9d", "compressed with compress"),
    (b"\xff\x06\x00\x00sNaPpY", "compressed with snappy"),
    (b"%PDF-", "a PDF"),
    (b"WARC/", "a web archive (WARC)"),
    (LFS_POINTER, "a Git LFS pointer in the place of the file: run `git lfs pull`"),
    (b"ARROW1\0\0", "an Arrow file"),
    (b"Obj\x01", "an Avro file"),
    (b"ORC", "an ORC file"),
    (b"SQLite format 3\0", "an SQLite file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a document of an old office program"),
)
# An object with a key, or a list that begins with one. RFC 7464 puts a record separator before each object.
_OBJECT = re.compile(r'[\s\x1e]*(?:\[\s*)*\{\s*(?:\}|"(?:[^"\\]|\\.)*"\s*:)', re.DOTALL)


class ForeignFile(Exception):
    """The file is of a kind that is not read; the message says which."""


def file_format(path: Path, encoding: str = "utf-8") -> FileFormat:
    """How a file is read.

    Args:
        path: The file, perhaps compressed.
        encoding: Encoding of text files.

    Raises:
        ForeignFile: It is of a kind that is not read.
        OSError: It cannot be opened.
    """
    named = _named(path)
    head = _head(path)
    if head.startswith(LFS_POINTER):
        _refuse_foreign(head)
    if named == "parquet":
        return named
    if head.startswith(b"PAR1"):
        if compression(path) is not None:
            raise ForeignFile("Parquet that was compressed once more")
        return "parquet"
    if named is None:
        if (ending := _ending(path)) in TABLES:
            raise ForeignFile(f"a table ({TABLES[ending]}): make JSON lines of it, or read it with format: text")
        _refuse_foreign(head)
    elif head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:4]:
        raise ForeignFile("JSON in UTF-16 or UTF-32, and it must be in UTF-8")
    text = head.decode(encoding, "ignore").lstrip("\ufeff")
    if named is None and not _OBJECT.match(text):
        return "text"
    return _lines_or_whole(text, named)


def refused_in_a_text(path: Path) -> str | None:
    """Why a file is not joined into a text with others of its folder: the kind of data that it is, or None."""
    named = _named(path)
    if (ending := _ending(path)) in TABLES:
        return f"not a text file ({TABLES[ending]})"
    return None if named in (None, "json") else f"not a text file ({'JSON lines' if named == 'jsonl' else 'Parquet'})"


def _named(path: Path) -> FileFormat | None:
    """What the last ending says that is no compression; None where it says nothing."""
    return ENDINGS.get(_ending(path))


def _ending(path: Path) -> str:
    """The last ending that is no compression, in lower case; empty where there is none."""
    return ([""] + [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED])[-1]


def _head(path: Path) -> bytes:
    """The first bytes, decompressed; fewer where the file is damaged."""
    found = b""
    try:
        for piece in pieces(path):
            found += piece[:HEAD]
            if len(found) >= HEAD:
                break
    except DamagedFile:
        pass  # told when the file is read
    return found[:HEAD]


def _refuse_foreign(head: bytes) -> None:
    for mark, what in FOREIGN:
        if head.startswith(mark):
            raise ForeignFile(what)
    if head[TAR_MARK] == b"ustar":
        raise ForeignFile("a tar archive")


def _lines_or_whole(text: str, named: FileFormat | None) -> FileFormat:
    """Whether JSON has a value on each line, or is one value over several lines."""
    first, more, _ = text.lstrip("\x1e \t\r\n").partition("\n")
    first = first.strip()
    if not more:  # one line, or the beginning of one
        return named or ("json" if first.startswith("[") else "jsonl")
    try:
        value = parse_json(first.encode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        broken_over_lines = first in ("{", "[") or first.startswith("[") or (named is None and _opens(first))
        return "json" if broken_over_lines else (named or "jsonl")
    return "jsonl" if isinstance(value, dict) else (named or "json")


def _opens(line: str) -> bool:
    """Whether a line that is no JSON by itself is the beginning of a value that ends on a later line."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line)
    except (ValueError, RecursionError):
        return False
    return True

"""Documents from files: text, JSON lines, JSON, Parquet, folders of these, and Hugging Face datasets.

A file that is broken, or a record that is not what it should be, is counted in the report and left out; with `strict`
it is an error. What is asked for and does not exist at all (a path, a column) is always an error: that is a wrong
setting, not bad data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ultralong.data.read.compressed import DECOMPRESSORS, DamagedFile, lines, pieces, salvage_records
from ultralong.data.read.datasets import Dataset, dataset_rows
from ultralong.data.read.documents import Document, ReadReport, UniqueIds
from ultralong.data.read.messages import is_unicode
from ultralong.utils.extras import require

Format = Literal["auto", "text", "jsonl", "json", "parquet"]
FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
PARQUET_ROWS = 64


@dataclass(frozen=True)
class ReadSettings:
    """How files are read.

    Attributes:
        format: "auto" goes by the file's ending; what has none of the known ones is text.
        field: The field (JSON) or column (Parquet, datasets) that holds the text, or the messages of a conversation.
        id_field: The field that holds the id; None numbers the records of a file.
        encoding: Encoding of text files.
        join: "file" makes one document of each text file, "directory" one of all text files right in a directory.
        strict: True makes bad input an error.
    """

    format: Format = "auto"
    field: str = "text"
    id_field: str | None = None
    encoding: str = "utf-8"
    join: Literal["file", "directory"] = "file"
    strict: bool = False


class RecordReader:
    """Reads records out of files; what is wrong with one goes to the report, or is raised.

    Args:
        settings: How to read.
        report: Where skips are counted.
    """

    def __init__(self, settings: ReadSettings | None = None, report: ReadReport | None = None) -> None:
        self.settings = settings or ReadSettings()
        self.report = report if report is not None else ReadReport()
        self._whole = False  # whether records are given out whole
        self._unique = UniqueIds(self.report) if self.settings.id_field else None

    def documents(self, files: Iterable[tuple[str, Path]], source: str, license: str) -> Iterator[Document]:
        """Documents of files, in order.

        Args:
            files: (name, path) of each; the name becomes part of the id.
            source: The source's name, in front of every id.
            license: Its licence.

        Raises:
            ValueError: A column is missing; or, with `strict`, any bad input.
        """
        records = self._joined(files) if self.settings.join == "directory" else self._records(files)
        return self.checked(records, source, license)

    def checked(self, records: Iterable[tuple[str, Any]], source: str, license: str) -> Iterator[Document]:
        """Documents of (name, text) records; what is no text is counted and left out."""
        for name, value in records:
            where = f"{source}/{name}"
            if not isinstance(value, str):
                self.skip("text is not a string", where)
            elif not value.strip():
                self.skip("empty", where)
            elif "\0" in value:
                self.skip("binary", where)
            elif not is_unicode(value):
                self.skip("not valid Unicode", where)
            else:
                yield self.report.read(Document(self.unique(where), value, source, license))

    def rows(self, files: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, Any]]:
        """(name, whole record) of every record of JSON and Parquet files, for conversations and test sets."""
        self._whole = True
        yield from self._records(files)

    def dataset(self, dataset: Dataset, seed: int = 0, part: tuple[int, int] = (0, 1)) -> Iterator[tuple[str, Any]]:
        """(name, field) of every row of part i of n of a dataset; see `dataset_rows`.

        Raises:
            ValueError: There is no such dataset or split, or the column is missing.
        """
        for name, row in dataset_rows(dataset, seed, part):
            yield self._field(row, name, "column")

    def unique(self, where: str) -> str:
        """The id, or another one when a source that names its own has given it before.

        Raises:
            ValueError: It was given before, and the settings are strict.
        """
        name = where if self._unique is None else self._unique(where)
        if name != where and self.settings.strict:
            raise ValueError(f"{where}: repeated id. Correct it, or read without strict to keep both.")
        return name

    def skip(self, reason: str, where: str) -> None:
        """Count something left out.

        Raises:
            ValueError: The settings are strict.
        """
        if self.settings.strict:
            raise ValueError(f"{where}: {reason}. Correct it, or read without strict to leave it out.")
        self.report.skip(reason, where)

    def _records(self, files: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, Any]]:
        readers = {"text": self._text, "jsonl": self._jsonl, "json": self._json, "parquet": self._parquet}
        for name, path in files:
            yield from readers[self._format(path)](name, path)

    def _format(self, path: Path) -> str:
        if self.settings.format != "auto":
            return self.settings.format
        suffixes = [suffix for suffix in path.suffixes if suffix not in DECOMPRESSORS]
        return FORMATS.get(suffixes[-1], "text") if suffixes else "text"

    def _text(self, name: str, path: Path) -> Iterator[tuple[str, str]]:
        content = self._content(name, path)
        if content is not None:
            try:
                text = content.decode(self.settings.encoding).removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")  # BOM
                yield name, text.replace("\r\n", "\n")
            except UnicodeDecodeError:
                self.skip(f"not {self.settings.encoding.upper()}", name)

    def _content(self, name: str, path: Path) -> bytes | None:
        try:
            return b"".join(pieces(path))
        except DamagedFile as error:
            self.skip("truncated or damaged file", f"{name} ({error})")
            return None

    def _joined(self, files: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, str]]:
        """One text for all files of a directory; files of a directory must come one after the other."""
        directory = ""
        parts: list[str] = []
        for name, path in files:
            parent = name.rpartition("/")[0]
            if parent != directory and parts:
                yield directory or ".", "\n".join(parts)
                parts = []
            directory = parent
            parts += [text for _, text in self._text(name, path)]
        if parts:
            yield directory or ".", "\n".join(parts)

    def _jsonl(self, name: str, path: Path) -> Iterator[tuple[str, Any]]:
        number = 0
        try:
            for number, line in enumerate(lines(path), start=1):
                if line.strip():
                    yield from self._parsed(f"{name}:{number}", line)
        except DamagedFile as error:
            self.skip("truncated or damaged file", f"{name} after line {number} ({error})")

    def _json(self, name: str, path: Path) -> Iterator[tuple[str, Any]]:
        content = self._content(name, path)
        if content is not None:
            yield from self._parsed(name, content)

    def _parsed(self, name: str, data: bytes) -> Iterator[tuple[str, Any]]:
        """The record, or each record of a list."""
        try:
            value = json.loads(data)
        except UnicodeDecodeError:
            self.skip("not UTF-8", name)
            return
        except (json.JSONDecodeError, RecursionError):
            found = list(salvage_records(data))
            yield from self._checked_rows(name, found, many=True)
            self.skip("not JSON", f"{name} after record {len(found)}" if found else name)
            return
        many = isinstance(value, list)
        yield from self._checked_rows(name, value if many else [value], many)

    def _checked_rows(self, name: str, rows: list[Any], many: bool) -> Iterator[tuple[str, Any]]:
        for number, row in enumerate(rows, start=1):
            where = f"{name}:{number}" if many else name
            if not isinstance(row, dict):
                self.skip("not an object", where)
            elif self._whole:
                yield where, row
            elif self.settings.field not in row:
                self.skip(f"no field {self.settings.field!r}", where)
            else:
                yield self._field(row, where, "field")

    def _parquet(self, name: str, path: Path) -> Iterator[tuple[str, Any]]:
        parquet = require("pyarrow.parquet", extra="data")
        arrow = require("pyarrow", extra="data")
        wanted = None if self._whole else [self.settings.field, *filter(None, [self.settings.id_field])]
        number = 0
        try:
            with parquet.ParquetFile(path) as file:
                self._check_columns(file.schema_arrow.names, wanted or [], str(path))
                for batch in file.iter_batches(PARQUET_ROWS, columns=wanted):
                    for row in batch.to_pylist():
                        number += 1
                        where = f"{name}:{number}"
                        yield (where, row) if self._whole else self._field(row, where, "column")
        except (arrow.ArrowInvalid, OSError) as error:
            self.skip("truncated or damaged file", f"{name} after row {number} ({str(error).splitlines()[0]})")

    def _field(self, row: dict[str, Any], where: str, kind: str) -> tuple[str, Any]:
        """(id, text) of a record that has passed the check for its fields, or must pass it now."""
        settings = self.settings
        if kind == "column":
            self._check_columns(list(row), [settings.field], where)
        named = row.get(settings.id_field) if settings.id_field else None
        return (where if named is None else str(named)), row[settings.field]

    @staticmethod
    def _check_columns(found: list[str], wanted: list[str], where: str) -> None:
        missing = [name for name in wanted if name not in found]
        if missing:
            raise ValueError(f"{where} has no column {', '.join(map(repr, missing))}; it has {', '.join(found)}.")


def list_files(root: Path, include: tuple[str, ...] = ("*",), exclude: tuple[str, ...] = ()) -> list[tuple[str, Path]]:
    """(path below `root`, path) of every file below a folder, sorted, hidden ones left out; or of `root` if a file.

    Raises:
        ValueError: There is nothing there, or nothing that matches.
    """
    from ultralong.data.read.archives import matches

    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise ValueError(f"{root} does not exist. Correct the path.")
    found = []
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if path.is_file() and not path.is_symlink() and not hidden and matches(name, include, exclude):
            found.append((name, path))
    if not found:
        raise ValueError(f"{root} holds no file that matches {', '.join(include)}.")
    # By directory first, so that the files of one directory come one after the other.
    return sorted(found, key=lambda item: item[0].rpartition("/")[::2])

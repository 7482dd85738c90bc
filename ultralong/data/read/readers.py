"""Documents from files: text, JSON lines, JSON, Parquet, folders of these, and Hugging Face datasets.

A file that is broken, or a record that is not what it should be, is counted in the report and left out; with `strict`
it is an error. What is asked for and does not exist at all (a path, a column) is always an error: that is a wrong
setting, not bad data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ultralong.data.read.compressed import DamagedFile, TooLarge, content, lines, parse_json, salvage_records
from ultralong.data.read.datasets import Dataset, dataset_rows
from ultralong.data.read.detect import ForeignFile, file_format, refused_in_a_text
from ultralong.data.read.documents import Document, ReadReport, UniqueIds
from ultralong.data.read.listing import list_files, readable
from ultralong.data.read.messages import is_unicode
from ultralong.utils.extras import require
from ultralong.utils.text_formats import TwiceError

__all__ = ["ReadSettings", "RecordReader", "list_files"]

Format = Literal["auto", "text", "jsonl", "json", "parquet"]
PARQUET_ROWS = 64
BLANK = b" \t\r\n\x1e"  # with the separator of RFC 7464
JSON_FILES = 4  # a JSON file may be so many times the largest record: it holds many of them


@dataclass(frozen=True)
class ReadSettings:
    """How files are read.

    Attributes:
        format: "auto" goes by the file's ending and content; a file that nothing calls anything else is text.
        field: The field (JSON) or column (Parquet, datasets) that holds the text, or the messages of a conversation.
        id_field: The field that holds the id; None numbers the records of a file.
        encoding: Encoding of text files.
        join: "file" makes one document of each text file, "directory" one of all text files right in a directory.
        strict: True makes bad input an error.
        largest_record: Bytes of the longest text file or line, decompressed; a longer one is left out. A JSON file may
            have four times as many.
    """

    format: Format = "auto"
    field: str = "text"
    id_field: str | None = None
    encoding: str = "utf-8"
    join: Literal["file", "directory"] = "file"
    strict: bool = False
    largest_record: int = 1 << 28

    def __post_init__(self) -> None:
        if self.largest_record < 1:
            raise ValueError(f"largest_record must be at least 1 byte, found {self.largest_record}.")


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
            where = readable(f"{source}/{name}")
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
        for number, (name, row) in enumerate(dataset_rows(dataset, seed, part)):
            if number and self.settings.field not in row:  # of the first row it is a wrong setting
                self.skip(f"no field {self.settings.field!r}", name)
            else:
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
            try:
                asked = self.settings.format
                kind = file_format(path, self.settings.encoding) if asked == "auto" else asked
            except ForeignFile as error:
                self.skip("a kind of file that is not read", f"{name} ({error})")
            except OSError as error:
                self.skip("cannot be opened", f"{name} ({error.strerror})")
            else:
                yield from readers[kind](name, path)

    def _text(self, name: str, path: Path) -> Iterator[tuple[str, str]]:
        data = self._content(name, path, self.settings.largest_record)
        if data is not None:
            try:
                text = data.decode(self.settings.encoding).removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")  # BOM
                yield name, text.replace("\r\n", "\n")
            except UnicodeDecodeError:
                self.skip(f"not {self.settings.encoding.upper()}", name)

    def _content(self, name: str, path: Path, most: int) -> bytes | None:
        try:
            return content(path, most)
        except DamagedFile as error:
            self.skip("truncated or damaged file", f"{name} ({error})")
        except TooLarge:
            self.skip(f"more than {most:,} bytes (largest_record)", name)
        except OSError as error:
            self.skip("cannot be opened", f"{name} ({error.strerror})")
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
            if self.settings.format == "auto" and (refused := refused_in_a_text(path)) is not None:
                self.skip(refused, name)
                continue
            parts += [text for _, text in self._text(name, path)]
        if parts:
            yield directory or ".", "\n".join(parts)

    def _jsonl(self, name: str, path: Path) -> Iterator[tuple[str, Any]]:
        number, most = 0, self.settings.largest_record
        try:
            for number, line in enumerate(lines(path, most), start=1):
                if line is None:
                    self.skip(f"more than {most:,} bytes (largest_record)", f"{name}:{number}")
                elif line.strip(BLANK):
                    yield from self._parsed(f"{name}:{number}", line.lstrip(BLANK))
        except DamagedFile as error:
            self.skip("truncated or damaged file", f"{name} after line {number} ({error})")

    def _json(self, name: str, path: Path) -> Iterator[tuple[str, Any]]:
        data = self._content(name, path, JSON_FILES * self.settings.largest_record)
        if data is not None:
            yield from self._parsed(name, data)

    def _parsed(self, name: str, data: bytes) -> Iterator[tuple[str, Any]]:
        """The record, or each record of a list."""
        try:
            value = parse_json(data)
        except UnicodeDecodeError:
            self.skip("not UTF-8", name)
            return
        except TwiceError:
            self.skip("a key that stands twice", name)
            return
        except (ValueError, RecursionError):
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
                talk = "messages" in row or "conversations" in row
                self.skip("holds a conversation" if talk else f"no field {self.settings.field!r}", where)
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
                    for row in self._rows_of(batch):
                        number += 1
                        where = f"{name}:{number}"
                        if isinstance(row, Exception):
                            kind = "not UTF-8" if isinstance(row, UnicodeDecodeError) else "a value that cannot be read"
                            self.skip(kind, where)
                        else:
                            yield (where, row) if self._whole else self._field(row, where, "column")
        except (arrow.ArrowInvalid, OSError) as error:
            self.skip("truncated or damaged file", f"{name} after row {number} ({str(error).splitlines()[0]})")

    @staticmethod
    def _rows_of(batch: Any) -> list[Any]:
        """The rows of a batch; in the place of one that Python cannot hold, what went wrong."""
        try:
            return batch.to_pylist()
        except (ValueError, OverflowError):
            pass
        rows: list[Any] = []
        for number in range(batch.num_rows):
            try:
                rows += batch.slice(number, 1).to_pylist()
            except (ValueError, OverflowError) as error:  # bytes that are no UTF-8, a date beyond the calendar
                rows.append(error)
        return rows

    def _field(self, row: dict[str, Any], where: str, kind: str) -> tuple[str, Any]:
        """(id, text) of a record that has passed the check for its fields, or must pass it now."""
        field = self.settings.field
        if kind == "column":
            self._check_columns(list(row), [field], where)
        return self.id_of(row, where), row[field]

    def id_of(self, row: dict[str, Any], where: str) -> str:
        """A record's id: what its field for that holds, or else its place."""
        named = row.get(self.settings.id_field) if self.settings.id_field else None
        return where if named is None else str(named)

    @staticmethod
    def _check_columns(found: list[str], wanted: list[str], where: str) -> None:
        missing = [name for name in wanted if name not in found]
        if missing:
            raise ValueError(f"{where} has no column {', '.join(map(repr, missing))}; it has {', '.join(found)}.")

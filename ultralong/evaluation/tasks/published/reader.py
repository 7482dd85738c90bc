"""From rows of published sets to prompts: which row is sample k, what is asked, what counts as right.

The longest sets hold hundreds of megabytes, so a file is searched for line ends once and only the rows asked for are
read.
"""

from __future__ import annotations

import functools
import random
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralong.data.read.fetch import DEFAULT_CACHE
from ultralong.evaluation.tasks.published.catalogue import PublishedSet, catalogue
from ultralong.evaluation.tasks.task import DATA_OPTIONS, Draft, Setting
from ultralong.utils.files import atomic_path
from ultralong.utils.text_formats import json_value

LETTERS = "ABCD"
# Where the authors keep their data. LV-Eval's lies in archives behind a loading script, which `datasets` no longer
# runs, so files are fetched as they are.
HUBS = {"lveval": "Infinigence/LVEval", "infinitebench": "xinrongzhang2022/InfiniteBench"}


class Rows:
    """Records of a JSON-lines file.

    Args:
        path: The file.

    Raises:
        ValueError: It holds no lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts = []
        place = 0
        with open(path, "rb") as stream:
            for line in stream:
                if line.strip():
                    self._starts.append(place)
                place += len(line)
        if not self._starts:
            raise ValueError(f"{path} holds no rows: fetch it again.")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with open(self.path, "rb") as stream:
            stream.seek(self._starts[index])
            try:
                row = json_value(stream.readline())
            except ValueError as error:
                raise ValueError(f"{self.path}, row {index + 1}: not valid JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"{self.path}, row {index + 1}: not a record of fields.")
        return row


def find_file(benchmark: str, name: str, archive: str | None, given: Path | None) -> Path:
    """The file of one set.

    Args:
        benchmark: `lveval` or `infinitebench`.
        name: Name of the set with its level, such as `cmrc_mixup_16k`; the file is `NAME.jsonl`.
        archive: Name of the zip archive that holds it, where the authors publish it so.
        given: The file itself, or a folder that holds it or its archive at any depth; None asks the hub.

    Raises:
        ValueError: It is not there, or neither in the hub's cache nor to be fetched.
    """
    if given is None:
        fetched = from_hub(HUBS[benchmark], archive or f"{name}.jsonl", name)
        return fetched if archive is None else _unzipped(fetched, name)
    if given.is_file() and given.suffix != ".zip":
        return given
    folder = given.parent if given.is_file() else given
    if (found := min(folder.rglob(f"{name}.jsonl"), default=None)) is not None:
        return found
    if archive is not None and (found := min(folder.rglob(archive), default=None)) is not None:
        return _unzipped(found, name)
    wanted = f"{name}.jsonl" + ("" if archive is None else f" or {archive}")
    raise ValueError(f"{given} holds no {wanted}: put it there, from the hub's data set {HUBS[benchmark]}.")


def from_hub(hub: str, file: str, name: str) -> Path:
    """A file of a data set on the hub, from its cache where it is there.

    Args:
        hub: The data set.
        file: Its file.
        name: What the reader asked for.

    Raises:
        ValueError: It is neither in the cache nor to be fetched.
    """
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(hub, file, repo_type="dataset"))
    # The hub's own errors are sometimes OSError, sometimes ValueError.
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is published data that is neither on this machine nor to be fetched from the hub "
            f"({type(error).__name__}). Fetch {file} of the data set {hub} elsewhere, put it into a folder, and give "
            f"that by {DATA_OPTIONS}."
        ) from error


def _unzipped(archive: Path, name: str) -> Path:
    """One member of an archive, laid out in the cache."""
    try:
        with zipfile.ZipFile(archive) as opened:
            member = next((info for info in opened.infolist() if Path(info.filename).name == f"{name}.jsonl"), None)
            if member is None:
                raise ValueError(f"{archive} holds no {name}.jsonl.")
            target = DEFAULT_CACHE.expanduser() / "unpacked" / f"{name}-{member.CRC:08x}.jsonl"
            if not target.exists():
                with opened.open(member) as packed, atomic_path(target) as partial, open(partial, "wb") as stream:
                    shutil.copyfileobj(packed, stream)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is not a whole zip archive: fetch it again.") from error
    return target


@dataclass(frozen=True)
class PublishedReader:
    """Makes prompts of one set from its rows.

    Attributes:
        name: Name of the set with its level.
        benchmark: `lveval` or `infinitebench`.
        known: What the official code fixes for it.
        chat: Whether the prompt goes into a chat template.
        rows: The data.
    """

    name: str
    benchmark: str
    known: PublishedSet
    chat: bool
    rows: Rows

    @property
    def source(self) -> str:
        """What the text is."""
        return f"{HUBS[self.benchmark]}, {self.rows.path.name}"

    def __len__(self) -> int:
        return len(self.rows)

    def draft(self, seed: int, index: int) -> Draft:
        """Sample `index`: rows come in an order drawn from the seed, because neighbours are alike.

        LV-Eval's fact recall, for one, moves its fact through the text from the first row to the last.
        """
        number = draw_order(self.name, len(self.rows), seed)[index]
        row = self.rows[number]
        missing = [field for field in self._fields() if field not in row]
        if missing:
            raise ValueError(
                f"{self.rows.path}, row {number + 1} has no {' and no '.join(missing)}: it is not of "
                f"{HUBS[self.benchmark]}."
            )
        answers = row["answers" if self.benchmark == "lveval" else "answer"]
        if not all(isinstance(row[field], str) for field in ("context", "input")) or not isinstance(
            answers, str | list
        ):
            raise ValueError(f"{self.rows.path}, row {number + 1}: context and input must be texts, answers a list.")
        plain = self.known.plain if not self.chat and self.known.plain is not None else None
        words = {
            "context": row["context"],
            "input": row["input"],
            **dict(zip(LETTERS, row.get("options") or (), strict=False)),
        }
        message = fill(self.known.prompt if plain is None else plain, words)
        outputs, extra = self._expected(row, number)
        return Draft(message, "" if plain is None else self.known.cue, outputs, extra={"row": number, **extra})

    def _fields(self) -> tuple[str, ...]:
        if self.benchmark == "lveval":
            return ("context", "input", "answers")
        return ("context", "input", "answer", *(("options",) if "{A}" in self.known.prompt else ()))

    def _expected(self, row: Mapping[str, Any], number: int) -> tuple[tuple[str, ...], dict[str, Any]]:
        """References, and what else scoring needs."""
        if self.benchmark == "lveval":
            return tuple(row["answers"]), {"keywords": row.get("answer_keywords") or None}
        answers = [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"])
        if "{A}" not in self.known.prompt:
            return tuple(answers), {}
        options = list(row["options"])
        if len(answers) == 1 and answers[0] in options:
            answers.append(LETTERS[options.index(answers[0])])
        if len(answers) != 2 or answers[1] not in LETTERS:
            raise ValueError(f"{self.rows.path}, row {number + 1}: the answer {answers} is none of the options.")
        return tuple(answers), {}


@functools.lru_cache(maxsize=64)
def draw_order(name: str, count: int, seed: int) -> tuple[int, ...]:
    """The numbers of `count` rows in an order drawn from the seed."""
    order = list(range(count))
    random.Random(f"{name} {seed}").shuffle(order)
    return tuple(order)


def fill(template: str, words: Mapping[str, str]) -> str:
    """The template with its fields filled in, one pass from left to right: a book may hold braces of its own."""
    pieces = []
    rest = template
    while rest:
        places = [(rest.index(mark), mark, text) for field, text in words.items() if (mark := f"{{{field}}}") in rest]
        if not places:
            break
        place, mark, text = min(places)
        pieces += [rest[:place], text]
        rest = rest[place + len(mark) :]
    return "".join([*pieces, rest])


@functools.lru_cache(maxsize=8)
def _rows(path: Path) -> Rows:
    return Rows(path)


def prepare(benchmark: str, name: str, level: str | None, setting: Setting) -> PublishedReader:
    """The reader over the caller's files or the hub's.

    Args:
        benchmark: `lveval` or `infinitebench`.
        name: Name of the set.
        level: LV-Eval's length level, such as `16k`.
        setting: Names a file or folder in `questions`; None asks the hub.

    Raises:
        ValueError: The data is not there.
    """
    whole = name if level is None else f"{name}_{level}"
    path = find_file(benchmark, whole, None if level is None else f"{name}.zip", setting.questions)
    return PublishedReader(whole, benchmark, catalogue(benchmark)[name], setting.chat, _rows(path))

"""Files of your own questions, one JSON object a line: every line checked, each read when it is asked."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralong.evaluation.tasks.published.reader import Rows
from ultralong.evaluation.tasks.scoring import clean_answer
from ultralong.evaluation.tasks.task import Draft
from ultralong.utils.text_formats import json_value

MOST_TOLD = 10  # wrong lines named in one message
KEYS = ("question", "answer", "answers", "context", "context_file", "id", "category", "all")
KINDS = {str: "a text", int: "a number", float: "a number", bool: "true or false", list: "a list", type(None): "null"}


@dataclass(frozen=True)
class Questions:
    """A checked file: its rows, each question's id, and the digest over it and its files of contexts."""

    rows: Rows
    ids: tuple[str, ...]
    digest: str

    def draft(self, number: int, chat: bool) -> Draft:
        """The prompt of a row: its context, then its question; without a chat template a cue for the answer."""
        row = self.rows[number]
        context = row.get("context", "")
        if "context_file" in row:
            context = (self.rows.path.parent / row["context_file"]).read_text(encoding="utf-8")
        message = f"{context}\n\n{row['question']}" if context else row["question"]
        answers = tuple(clean_answer(text) for text in row.get("answers", [row.get("answer")]))
        kept = {"question": row["question"], "category": row.get("category"), "wants_all": row.get("all", False)}
        extra = {"row": number, "id": self.ids[number], **kept, "questions_sha256": self.digest}
        return Draft(message, "" if chat else "\n\nAnswer:", answers, extra=extra)


def read_questions(path: Path) -> Questions:
    """Check every line of a file.

    Args:
        path: JSON lines: `question`; `answers` or `answer`; and where wanted `context` or `context_file` (a path
            relative to this file), `id`, `category`, `all` (true: every one of `answers` is wanted).

    Raises:
        ValueError: There is no such file, it holds no lines, or some are wrong; the message names them by number.
    """
    if not path.is_file():
        raise ValueError(f"There is no file of questions {path}.")
    wrong: list[str] = []
    ids: dict[str, int] = {}
    digest = hashlib.sha256()
    contexts: list[bytes] = []
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            digest.update(line)
            if not line.strip():
                continue
            try:
                row = _checked(json_value(line))
                if "context_file" in row:
                    contexts.append(_context_digest(path.parent / row["context_file"]))
                name = str(row.get("id", number))
                if (first := ids.setdefault(name, number)) != number:
                    raise ValueError(f"the id {name!r} is line {first}'s too")
            except ValueError as error:
                # Only the JSON parser and the decoder of UTF-8 give errors of classes of their own.
                wrong.append(f"line {number}: {'' if type(error) is ValueError else 'not valid JSON, '}{error}")
    if wrong:
        more = f"; and {len(wrong) - MOST_TOLD} more" if len(wrong) > MOST_TOLD else ""
        raise ValueError(f"{path} cannot be asked. {'; '.join(wrong[:MOST_TOLD])}{more}.")
    if not ids:
        raise ValueError(f"{path} holds no questions.")
    for context in contexts:
        digest.update(context)
    return Questions(Rows(path), tuple(ids), digest.hexdigest())


def _checked(row: Any) -> dict[str, Any]:
    """A line's fields, each of its type."""
    if not isinstance(row, dict):
        raise ValueError(f"an object of fields is needed, found {_kind(row)}")
    for key in row:
        if key not in KEYS and (near := difflib.get_close_matches(key, KEYS, 1, 0.8)) and near[0] not in row:
            raise ValueError(f"there is no field {key}; did you mean {near[0]}?")
    if "question" not in row:
        raise ValueError("question is missing")
    for one, other in (("answer", "answers"), ("context", "context_file")):
        if one in row and other in row:
            raise ValueError(f"{one} and {other} are both there: keep one")
    for key in {"question", "answer", "context", "context_file", "category"} & row.keys():
        if not isinstance(row[key], str):
            raise ValueError(f"{key} must be a text, found {_kind(row[key])}")
    if not row["question"].strip():
        raise ValueError("question is empty")
    _check_answers(row)
    if "id" in row and (isinstance(row["id"], bool) or not isinstance(row["id"], str | int)):
        raise ValueError(f"id must be a text or a whole number, found {_kind(row['id'])}")
    if not isinstance(row.get("all", False), bool):
        raise ValueError(f"all must be true or false, found {_kind(row['all'])}")
    return row


def _check_answers(row: dict[str, Any]) -> None:
    answers = row.get("answers", [row["answer"]] if "answer" in row else None)
    if answers is None:
        raise ValueError("answer or answers is missing")
    wrong = [text for text in answers if not isinstance(text, str)] if isinstance(answers, list) else [answers]
    if wrong:
        raise ValueError(f"answers must be a list of texts, found {_kind(wrong[0])}")
    if not answers or not all(clean_answer(text) for text in answers):  # which would stand in every reply
        raise ValueError("an answer is empty" if answers else "answers is empty")


def _kind(value: Any) -> str:
    return KINDS.get(type(value), "an object") + ("" if isinstance(value, list | dict) else f" ({str(value)[:40]})")


def _context_digest(path: Path) -> bytes:
    try:
        found = path.read_bytes()
        found.decode("utf-8")
    except OSError as error:
        raise ValueError(f"context_file {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"context_file {path} is no text in UTF-8") from error
    return hashlib.sha256(found).digest()

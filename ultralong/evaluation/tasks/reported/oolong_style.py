"""OOLONG-style aggregation (Bertsch et al. 2025, arXiv 2511.02817): judge each entry, then count over all of them.

Each line is a dated entry of a user that names one thing. Its kind (fruit, tool, ...) is not written anywhere: a model
must know it for every line, and then count over the whole text. No part of the text can be left out.

| test | questions, in turn |
|---|---|
| `oolong_style_counting` | most and least common kind, which of two is more common, how many of a kind |
| `oolong_style_user` | a user's most common kind, who has most of a kind, how many of a kind a user has |
| `oolong_style_timeline` | a kind before and after a date, the month with most of a kind, how many in a month |

As OOLONG-synth (github.com/abertsch72/oolong): the three groups of questions, and the score: 1 for the exact answer,
and `0.75 ** |error|` for a number that is off. Our own: entries, things and wording; OOLONG's entries are published
data sets.
"""

from __future__ import annotations

import calendar
import datetime
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from ultralong.evaluation.tasks.task import Draft, Setting, Task

# fmt: off
KINDS = {
    "animal": ("badger", "camel", "donkey", "ferret", "goose", "hamster", "lizard", "otter", "rabbit", "turtle"),
    "clothing": ("apron", "bathrobe", "coat", "glove", "jacket", "scarf", "skirt", "sock", "sweater", "vest"),
    "fruit": ("apricot", "banana", "cherry", "fig", "grape", "lemon", "mango", "melon", "peach", "plum"),
    "instrument": ("bassoon", "cello", "clarinet", "drum", "flute", "guitar", "harp", "oboe", "piano", "trumpet"),
    "tool": ("axe", "chisel", "drill", "hammer", "pliers", "rake", "saw", "screwdriver", "shovel", "wrench"),
    "vehicle": ("ambulance", "bicycle", "bus", "canoe", "lorry", "motorbike", "sailboat", "taxi", "tractor", "tram"),
}
REMARKS = (
    "could not stop looking at the {thing}", "asked a neighbour about the {thing}", "paid far too much for the {thing}",
    "dreamt of the {thing} again", "took a picture of the {thing}", "wrote a note about the {thing}",
    "heard a story about the {thing}", "said goodbye to the {thing}",
)
# fmt: on
MONTHS = tuple(calendar.month_name[1:])
YEAR = 2021
DAYS = 365
USERS = 6
MOST_WEIGHT = 4  # kinds and users are up to so many times as common as others
TASK = (
    "Below is a diary of several users, one entry a line, with the date, the user's number and a remark. Every remark "
    "names one thing. A thing is of one of these kinds: {kinds}. The diary does not say which.\n\n{entries}\n\n"
    "Question: {question} Give the answer alone."
)
PREFIX = "\nAnswer:"
MORE, LESS, SAME = "more common", "less common", "same frequency"
ANSWER_TOKENS = 16
SHORT_ANSWER = 20  # characters; OOLONG's code looks for the three comparisons in longer ones only


@dataclass(frozen=True)
class Entry:
    """A line: `kind` is what the model must find out."""

    day: datetime.date
    user: str
    kind: str
    thing: str
    remark: str

    def __str__(self) -> str:
        return f"{self.day.isoformat()} | user {self.user} | {self.remark.format(thing=self.thing)}"


@dataclass(frozen=True)
class Question:
    """What is asked; `numeric` answers can be nearly right."""

    text: str
    answer: str
    numeric: bool = False


Asker = Callable[[random.Random, Sequence[Entry]], Question | None]


def _extreme(counts: Counter[str], least: bool = False) -> str | None:
    """The most or least common key; None where two share the place."""
    ordered = sorted(counts.items(), key=lambda item: item[1], reverse=not least)
    if not ordered or (len(ordered) > 1 and ordered[0][1] == ordered[1][1]):
        return None
    return ordered[0][0]


def _kind_counts(entries: Iterable[Entry]) -> Counter[str]:
    return Counter(entry.kind for entry in entries)


def _most_common(draw: random.Random, entries: Sequence[Entry], least: bool = False) -> Question | None:
    found = _extreme(_kind_counts(entries), least)
    word = "least" if least else "most"
    return None if found is None else Question(f"Which kind is {word} common in the diary?", found)


def _which_is_more(draw: random.Random, entries: Sequence[Entry]) -> Question | None:
    first, second = draw.sample(sorted(KINDS), 2)
    counts = _kind_counts(entries)
    answer = _compared(counts[first], counts[second])
    asked = f"Is the kind {first} more common, less common or of the same frequency as the kind {second}?"
    return Question(f"{asked} Answer '{MORE}', '{LESS}' or '{SAME}'.", answer)


def _compared(first: float, second: float) -> str:
    return MORE if first > second else LESS if first < second else SAME


def _how_many(draw: random.Random, entries: Sequence[Entry]) -> Question | None:
    kind = draw.choice(sorted(KINDS))
    answer = str(_kind_counts(entries)[kind])
    return Question(f"How many entries name a thing of the kind {kind}?", answer, numeric=True)


def _users_kind(draw: random.Random, entries: Sequence[Entry]) -> Question | None:
    user = draw.choice(sorted({entry.user for entry in entries}))
    found = _extreme(_kind_counts(entry for entry in entries if entry.user == user))
    asked = f"Which kind is most common among the entries of user {user}?"
    return None if found is None else Question(asked, found)


def _kinds_user(draw: random.Random, entries: Sequence[Entry]) -> Question | None:
    kind = draw.choice(sorted(KINDS))
    found = _extreme(Counter(entry.user for entry in entries if entry.kind == kind))
    asked = f"Which user has the most entries of the kind {kind}? Answer with the user's number."
    return None if found is None else Question(asked, found)


def _how_many_of_user(draw: random.Random, entries: Sequence[Entry]) -> Question | None:
    user, kind = draw.choice(sorted({entry.user for entry in entries})), draw.choice(sorted(KINDS))
    count = sum(entry.user == user and entry.kind == kind for entry in entries)
    return Question(f"How many entries of user {user} name a thing of the kind {kind}?", str(count), numeric=True)


def _before_and_after(draw: random.Random, entries: Sequence[Entry]) -> Question | None:
    kind, border = draw.choice(sorted(KINDS)), _day(draw.randint(DAYS // 4, 3 * DAYS // 4))
    counts = Counter(entry.day < border for entry in entries if entry.kind == kind)
    asked = f"Is the kind {kind} more common, less common or of the same frequency before {border.isoformat()} "
    return Question(
        f"{asked}as from that date on? Answer '{MORE}', '{LESS}' or '{SAME}'.", _compared(counts[True], counts[False])
    )


def _month_of_most(draw: random.Random, entries: Sequence[Entry]) -> Question | None:
    kind = draw.choice(sorted(KINDS))
    found = _extreme(Counter(MONTHS[entry.day.month - 1] for entry in entries if entry.kind == kind))
    return None if found is None else Question(f"In which month is the kind {kind} most common?", found)


def _how_many_in_month(draw: random.Random, entries: Sequence[Entry]) -> Question | None:
    month, kind = draw.randint(1, 12), draw.choice(sorted(KINDS))
    count = sum(entry.day.month == month and entry.kind == kind for entry in entries)
    asked = f"How many entries of {MONTHS[month - 1]} name a thing of the kind {kind}?"
    return Question(asked, str(count), numeric=True)


# The last of each group always has an answer.
ASKERS: dict[str, tuple[Asker, ...]] = {
    "counting": (_most_common, partial(_most_common, least=True), _which_is_more, _how_many),
    "user": (_users_kind, _kinds_user, _how_many_of_user),
    "timeline": (_before_and_after, _month_of_most, _how_many_in_month),
}


def _day(number: int) -> datetime.date:
    return datetime.date(YEAR, 1, 1) + datetime.timedelta(days=number)


@dataclass(frozen=True)
class DiaryBuilder:
    """Makes diaries; a unit of size is an entry.

    Attributes:
        group: `counting`, `user` or `timeline`.
    """

    group: str
    source: str = "generated entries"
    smallest: int = field(default=4 * len(KINDS))
    probe: int = 60

    def build(self, draw: random.Random, size: int, index: int) -> Draft:
        """A diary of `size` entries in the order of their dates; the questions are asked in turn."""
        users = [str(number) for number in draw.sample(range(10_000, 100_000), USERS)]
        weights = [[draw.randint(1, MOST_WEIGHT) for _ in group] for group in (KINDS, users)]
        kinds = draw.choices(sorted(KINDS), weights[0], k=size)
        writers = draw.choices(users, weights[1], k=size)
        days = sorted(draw.choices(range(DAYS), k=size))
        dates = [_day(number) for number in range(DAYS)]
        entries = [
            Entry(dates[day], user, kind, draw.choice(KINDS[kind]), draw.choice(REMARKS))
            for day, user, kind in zip(days, writers, kinds, strict=True)
        ]
        askers = ASKERS[self.group]
        turn = index % len(askers)
        question = next(asked for ask in (*askers[turn:], askers[-1]) if (asked := ask(draw, entries)) is not None)
        head, tail = TASK.replace("{kinds}", ", ".join(sorted(KINDS))).split("{entries}")
        return Draft(
            head + "\n".join(map(str, entries)) + tail.replace("{question}", question.text),
            PREFIX,
            (question.answer,),
            extra={"numeric": question.numeric},
        )


def exact_or_near(answer: str, references: Sequence[str], numeric: bool | None = None) -> float:
    """OOLONG's score: 1 for the exact answer; a number that is off by e is worth 0.75 to the power of e.

    The answer is what stands behind the last colon of the first line: the prompt ends in `Answer:`. Brackets and
    asterisks are dropped, and longer answers are searched for one of the three comparisons, as in the published code.

    Args:
        answer: What the model said.
        references: The right answer.
        numeric: Whether it is a number.
    """
    lines = answer.strip().splitlines() or [""]
    said = lines[0].split(":")[-1].translate(str.maketrans("", "", "*[]")).strip()
    if len(said) >= SHORT_ANSWER:
        said = next((words for words in (MORE, LESS, SAME) if words in said), said)
    if said == references[0]:
        return 1.0
    if not numeric:
        return 0.0
    try:
        return float(0.75 ** abs(int(said) - int(references[0])))
    except ValueError:
        return 0.0


def prepare(group: str, setting: Setting) -> DiaryBuilder:
    """The builder of one group of questions; nothing of the setting changes it."""
    return DiaryBuilder(group)


OOLONG_STYLE_TASKS = {
    name: Task(name, ANSWER_TOKENS, partial(prepare, group), exact_or_near, ("numeric",), capability="aggregation")
    for group in ASKERS
    for name in (f"oolong_style_{group}",)
}

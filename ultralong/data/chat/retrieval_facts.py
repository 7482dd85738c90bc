"""The facts and questions of conversations about long texts: what is told in the text, what is asked, what is right.

Names and values are invented, and no wording is that of a test in `ultralong.evaluation` (a test compares them).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from ultralong.data.select.retrieval import ENDINGS, HANDED, SEVERAL, THINGS, WORDINGS, Wording, invented

VOWELS, CONSONANTS = "aeiou", "bdfgklmnprstvw"
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
MORE = (
    Wording("The well at {key} is {value} spans deep.", "", "How many spans deep is the well at {key}?"),
    Wording("A letter to {key} needs stamp {value}.", "", "Which stamp does a letter to {key} need?"),
    Wording(
        "At the fair of {key} stall {value} sold out first.", "", "Which stall sold out first at the fair of {key}?"
    ),
    Wording("Wardens of {key} swear on a silver {value}.", "", "On what do wardens of {key} swear?", named=True),
    Wording("For the mast at {key} they felled oak {value}.", "", "Which oak did they fell for the mast at {key}?"),
)
SINGLE = (*WORDINGS, *MORE)
DEBT = Wording(
    "The debt of {key} stands at {value} crowns.",
    "{value} took over, unchanged, the debt of {before}.",
    "Which places have owed the debt of {value} crowns? Name each, the earliest debtor first.",
)
LOAD = Wording("A cart rolled through {key}, laden with one {value}.", "", "", named=True)


@dataclass(frozen=True)
class Asked:
    """A question, and what the text tells for it.

    Attributes:
        kind: Which of `KINDS`.
        question: The question, without how to answer it.
        bare: The answer alone.
        full: The answer in sentences.
        told: The sentences that answer it, in the order in which they must stand in the text.
        others: Sentences that are like them and answer something else; they stand anywhere.
    """

    kind: str
    question: str
    bare: str
    full: str
    told: tuple[str, ...]
    others: tuple[str, ...] = ()


@dataclass
class Names:
    """Invented names, none twice.

    Attributes:
        draw: Decides on them.
        seen: Those given so far.
    """

    draw: random.Random
    seen: set[str] = field(default_factory=set)

    def new(self) -> str:
        """A name."""
        attempt = 0
        while not self._add(name := invented(self.draw, attempt)):
            attempt += 1
        return name

    def near(self, name: str) -> str:
        """A name that differs from another by one letter or by its second word."""
        word, ending = name.split()
        while True:
            if self.draw.random() < 0.5:
                other = f"{word} {self.draw.choice(ENDINGS)}"
            else:
                place = self.draw.randrange(1, len(word))
                letters = VOWELS if word[place] in VOWELS else CONSONANTS
                other = f"{word[:place]}{self.draw.choice(letters)}{word[place + 1 :]} {ending}"
            if self._add(other):
                return other

    def _add(self, name: str) -> bool:
        if name in self.seen:
            return False
        self.seen.add(name)
        return True


@dataclass
class Facts:
    """Draws what one text tells and what is asked of it.

    Attributes:
        draw: Decides everything.
        wordings: Of its facts of one value.
        names: Of its places.
        values: Fewest and most of a key that has several.
        numbers: Those given so far.
    """

    draw: random.Random
    wordings: tuple[Wording, ...]
    names: Names
    values: tuple[int, int] = (2, 5)
    numbers: set[str] = field(default_factory=set)

    def ask(self, kind: str) -> Asked:
        """A question of one of `KINDS`."""
        return KINDS[kind](self)

    def single(self, key: str | None = None, wording: Wording | None = None) -> Asked:
        """A fact of one value."""
        key = self.names.new() if key is None else key
        wording = self.draw.choice(self.wordings) if wording is None else wording
        value = self.draw.choice(THINGS) if wording.named else self.number()
        fact = wording.fact.format(key=key, value=value)
        return Asked("single", wording.question.format(key=key), value, fact, (fact,))

    def number(self) -> str:
        """A number of three to seven digits, none twice."""
        while True:
            number = str(self.draw.randrange(10 ** self.draw.randint(2, 6), 10**7))
            if number not in self.numbers:
                self.numbers.add(number)
                return number

    def near(self) -> Asked:
        """A fact of one value, among facts about places of almost the same name."""
        wording, key = self.draw.choice(self.wordings), self.names.new()
        asked = self.single(key, wording)
        others = (self.single(self.names.near(key), wording).full for _ in range(self.draw.randint(4, 16)))
        return Asked("near", asked.question, asked.bare, asked.full, asked.told, tuple(others))

    def joint(self) -> Asked:
        """Two to four facts of one value, asked for at once: half the time in the same words."""
        wording = self.draw.choice(self.wordings) if self.draw.random() < 0.5 else None
        parts = [self.single(wording=wording) for _ in range(self.draw.randint(2, 4))]
        question = f"{NUMBERS[len(parts)].capitalize()} things at once. {' '.join(part.question for part in parts)}"
        told = [part.full for part in parts]
        return Asked("joint", question, ", ".join(part.bare for part in parts), " ".join(told), self._mixed(told))

    def several(self) -> Asked:
        """Several values of one key."""
        key, values = self.names.new(), self._numbers(self.draw.randint(*self.values))
        told = tuple(SEVERAL.fact.format(key=key, value=value) for value in values)
        full = f"The boats that are moored at {key} have the sails {listed(values)}."
        return Asked("several", SEVERAL.question.format(key=key), ", ".join(values), full, told)

    def chained(self) -> Asked:
        """Places that hand one thing on: where it is at last, or all of them."""
        if self.draw.random() < 0.5:
            return self._debt()
        key, places = self.names.new(), [self.names.new() for _ in range(self.draw.randint(3, 5))]
        told = [HANDED.fact.format(key=key, value=places[0])]
        told += [HANDED.again.format(key=key, before=a, value=b) for a, b in pairwise(places)]
        if self.draw.random() < 0.5:
            full = f"The seal of {key} lies with the clerk of {places[-1]}."
            return Asked("chained", HANDED.question.format(key=key), places[-1], full, tuple(told))
        question = f"Through whose clerks' hands did the seal of {key} go? Name their places in order."
        full = f"The seal of {key} went through the hands of the clerks of {listed(places)}."
        return Asked("chained", question, ", ".join(places), full, tuple(told))

    def _debt(self) -> Asked:
        sums = self._numbers(2)
        chains = [[self.names.new() for _ in range(self.draw.randint(2, 5))] for _ in sums]
        told, others = (
            (
                DEBT.fact.format(key=chain[0], value=value),
                *(DEBT.again.format(before=a, value=b) for a, b in pairwise(chain)),
            )
            for chain, value in zip(chains, sums, strict=True)
        )
        full = f"The debt of {sums[0]} crowns has been owed by {listed(chains[0])}."
        return Asked("chained", DEBT.question.format(value=sums[0]), ", ".join(chains[0]), full, told, others)

    def counted(self) -> Asked:
        """What has to be counted over the whole text: how many, or which most often."""
        key = self.names.new()
        if self.draw.random() < 0.3:
            values = self._numbers(self.draw.randint(3, 9))
            told = tuple(SEVERAL.fact.format(key=key, value=value) for value in values)
            full = f"{NUMBERS[len(values)].capitalize()} boats are moored at {key}."
            return Asked("counted", f"How many boats are moored at {key}?", str(len(values)), full, told)
        things = self.draw.sample(THINGS, 4)
        times = sorted(self.draw.sample(range(1, 13), 4), reverse=True)
        loads = [thing for thing, count in zip(things, times, strict=True) for _ in range(count)]
        told = self._mixed([LOAD.fact.format(key=key, value=thing) for thing in loads])
        if self.draw.random() < 0.5:
            question = f"With what were carts that rolled through {key} laden most often?"
            full = f"No load rolled through {key} as often as the {things[0]}."
            return Asked("counted", question, things[0], full, told)
        question = f"Which three loads rolled through {key} most often? Begin with the commonest."
        full = f"The loads that rolled through {key} most often are {listed(things[:3])}."
        return Asked("counted", question, ", ".join(things[:3]), full, told)

    def _numbers(self, count: int) -> list[str]:
        return [self.number() for _ in range(count)]

    def _mixed(self, sentences: list[str]) -> tuple[str, ...]:
        return tuple(self.draw.sample(sentences, len(sentences)))


KINDS: dict[str, Callable[[Facts], Asked]] = {
    "single": Facts.single,
    "near": Facts.near,
    "joint": Facts.joint,
    "several": Facts.several,
    "chained": Facts.chained,
    "counted": Facts.counted,
}


def numbered(items: list[str]) -> str:
    """Items as a numbered list, one a line."""
    return "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1))


def listed(items: list[str]) -> str:
    """Items as a sentence has them: "A, B and C"."""
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else items[0]

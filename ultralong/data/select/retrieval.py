"""Documents that give practice in finding: invented facts inside real texts, told again or asked for much later.

Plain continued pretraining lowers perplexity and can still lose retrieval: hardly any token of a book depends on one
sentence 50,000 tokens earlier. OLMo 3 and others therefore mix in retrieval-like documents. Each piece of a text gets
facts at random lines ("The ledger of Tolmer Reach closes on folio 48213."). Some are told again further on, the others
are asked for, with their answers, further on or at the end, so that every distance inside the piece occurs.

The wording is other than that of any test in `ultralong.evaluation` (a test compares the two), and keys are invented
names: what improves on a test was not learned from its sentences.
"""

from __future__ import annotations

import hashlib
import random
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import itemgetter

from ultralong.data.read.documents import Document
from ultralong.data.select.clean import line_end

_SYLLABLES = "bal cor dun fen gar hol kel lam mor nar oss pel quin ral sten tol ul ver wick yar"
_ENDINGS = "Bridge Court Dale Field Gate Grove Heath Hill Lane Mill Moor Quay Reach Row Yard"
_THINGS = "anchor barrel candle drum engine flute globe hammer kettle lantern mirror organ plough rope"
SYLLABLES, ENDINGS, THINGS = _SYLLABLES.split(), _ENDINGS.split(), _THINGS.split()
Asked = tuple[str, str]  # a question and its answer
LONGER_AFTER = 20  # attempts at a name that is not taken yet
FAR = 0.01  # of a text's size: a line end so far before it is not taken


@dataclass(frozen=True)
class Wording:
    """One way to tell a fact and to come back to it; `{key}` and `{value}` are filled in.

    Attributes:
        fact: The sentence that holds the fact.
        again: The same told later, or the next step of a chain; empty where it is only asked for.
        question: The question; its answer is the value alone.
        named: Whether the value is a thing rather than a number.
    """

    fact: str
    again: str
    question: str
    named: bool = False


WORDINGS = (
    Wording(
        "The ledger of {key} closes on folio {value}.",
        "Whoever opened the ledger of {key} would have found that it closes on folio {value}.",
        "On which folio does the ledger of {key} close?",
    ),
    Wording(
        "Parcels for {key} go into locker {value}.",
        "As was said, parcels for {key} go into locker {value}.",
        "Into which locker do parcels for {key} go?",
    ),
    Wording(
        "In the tower of {key} hangs a bell that was cast under licence {value}.",
        "The bell in the tower of {key}, to come back to it, was cast under licence {value}.",
        "Under which licence was the bell in the tower of {key} cast?",
    ),
    Wording(
        "The people of {key} carry a painted {value} on their banner.",
        "It was a painted {value}, let us recall, that the people of {key} carry on their banner.",
        "What do the people of {key} carry on their banner?",
        named=True,
    ),
    Wording(
        "Trains to {key} depart with engine number {value}.",
        "Engine number {value} is the one with which trains to {key} depart.",
        "With which engine number do trains to {key} depart?",
    ),
)
SEVERAL = Wording(
    "A boat with sail {value} is moored at {key}.",
    "",
    "Which sails have the boats that are moored at {key}? Name each.",
)
HANDED = Wording(
    "The seal of {key} was handed to the clerk of {value}.",
    "From {before} the seal of {key} went on to the clerk of {value}.",
    "Where does the seal of {key} lie at last?",
)


@dataclass(frozen=True)
class Retrieval:
    """How a source's documents become practice in finding.

    Attributes:
        shortest: Characters of the shortest piece.
        longest: Characters of the longest piece. Lengths are drawn between the two, evenly by their logarithm; with
            four characters a token, 4 x the row's length fills a row.
        spacing: One fact for about this many characters.
        keep: Share of the pieces that is taken, from all over each document.
        asked: Share of the facts of one value that are asked for; the others are told again further on.
        inside: Share of the questions that stand at a random line behind their facts, the rest stands at the end. A
            packed row may end inside a piece, and cuts the questions at its end off from what they ask for.
        several: Share of the keys that have several values, all asked for in one question.
        values: Fewest and most values of such a key.
        chained: Share of the keys whose value leads to another key, two to four in a chain.
        reach: Most characters of the text between a fact and what comes back to it, drawn evenly from 0. None draws two
            lines of the piece: short distances are then the most frequent, and hardly any is as long as the piece.
        draw: Another number gives other pieces and facts of the same texts, so that a recipe can take them several
            times and no fact twice.
    """

    shortest: int = 8_000
    longest: int = 240_000
    spacing: int = 2_000
    keep: float = 1.0
    asked: float = 0.7
    inside: float = 0.5
    several: float = 0.15
    chained: float = 0.1
    reach: int | None = None
    draw: int = 0
    values: tuple[int, int] = (2, 4)

    def __post_init__(self) -> None:
        if not 1_000 <= self.shortest <= self.longest:
            raise ValueError(
                f"retrieval: shortest must be 1,000 characters or more and no more than longest, found "
                f"{self.shortest} and {self.longest}."
            )
        if not 200 <= self.spacing <= self.shortest:
            raise ValueError(f"retrieval: spacing must lie in 200..shortest ({self.shortest}), found {self.spacing}.")
        if not 2 <= self.values[0] <= self.values[1]:
            raise ValueError(f"retrieval: values must rise from 2 or more, found {self.values}.")
        if self.reach is not None and self.reach < 1:
            raise ValueError(f"retrieval: reach must be 1 character or more, found {self.reach}.")
        for key in ("keep", "asked", "inside", "several", "chained"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"retrieval: {key} is a share and must lie in 0..1, found {getattr(self, key)}.")
        if self.several + self.chained > 1:
            raise ValueError(
                f"retrieval: several and chained must not exceed 1 together, found {self.several} and {self.chained}."
            )

    def documents(self, texts: Iterable[Document], seed: int) -> Iterator[Document]:
        """Cut each text into pieces of random lengths and put facts and questions into each.

        A piece depends on the seed, its document's id and text alone. A last piece of less than `shortest` characters
        is left out.

        Args:
            texts: The documents.
            seed: The recipe's.
        """
        kind = f"{seed}.{self.draw}" if self.draw else f"{seed}"
        for document in texts:
            draw = random.Random(hashlib.sha256(f"retrieval {kind} {document.id}".encode()).digest())
            start, number = 0, 1
            while len(document.text) - start >= self.shortest:
                wanted = int(self.shortest * (self.longest / self.shortest) ** draw.random())
                end = line_end(document.text, start, min(start + wanted, len(document.text)))
                if draw.random() < self.keep:
                    piece = self.with_facts(document.text[start:end], draw)
                    yield replace(document, id=f"{document.id}?{number}", text=piece)
                start, number = end, number + 1

    def with_facts(self, text: str, draw: random.Random) -> str:
        """One piece of text with its facts told, told again, and asked for.

        Args:
            text: The piece.
            draw: Decides everything.
        """
        told: list[list[str]] = []
        at_end: list[Asked] = []
        for sentences, question in self._facts(max(1, len(text) // self.spacing), draw):
            told.append(sentences)
            if question is not None and draw.random() < self.inside:
                sentences.append("\n".join(question))
            elif question is not None:
                at_end.append(question)
        places = _line_starts(text)
        inserted: list[tuple[int, str]] = []
        for sentences in told:
            # In the order they are told: what comes back to a fact stands behind it.
            inserted += zip(self._places(places, len(sentences), draw), sentences, strict=True)
        told_text, rest = insert(text, inserted, "\n")
        draw.shuffle(at_end)
        return told_text + rest.rstrip() + _exam(at_end, draw) + "\n"

    def _places(self, starts: Sequence[int], count: int, draw: random.Random) -> list[int]:
        """Where the `count` sentences of a fact stand, in order, of the places where a line starts."""
        if self.reach is None:
            return sorted(draw.choice(starts) for _ in range(count))
        span = draw.uniform(0, min(self.reach, starts[-1]))
        first = draw.uniform(0, starts[-1] - span)
        between = [draw.uniform(first, first + span) for _ in range(count - 2)]
        wanted = sorted([first, *between, first + span][:count])
        return [starts[min(bisect_left(starts, place), len(starts) - 1)] for place in wanted]

    def _facts(self, count: int, draw: random.Random) -> list[tuple[list[str], Asked | None]]:
        """About `count` facts: the sentences of each in the order in which they must stand, and its question."""
        made: list[tuple[list[str], Asked | None]] = []
        names = _names(draw)
        while sum(len(sentences) for sentences, _ in made) < count:
            kind, key = draw.random(), next(names)
            if kind < self.several:
                values = [str(value) for value in draw.sample(range(100, 10_000), draw.randint(*self.values))]
                sentences = [SEVERAL.fact.format(key=key, value=value) for value in values]
                made.append((sentences, (SEVERAL.question.format(key=key), ", ".join(values))))
            elif kind < self.several + self.chained:
                chain = [key, *(next(names) for _ in range(draw.randint(2, 4)))]
                steps = [HANDED.fact.format(key=key, value=chain[1])]
                steps += [HANDED.again.format(key=key, before=a, value=b) for a, b in pairwise(chain[1:])]
                made.append((steps, (HANDED.question.format(key=key), f"With the clerk of {chain[-1]}")))
            else:
                made.append(self._single(draw.choice(WORDINGS), key, bool(made), draw))
        return made

    def _single(
        self, wording: Wording, key: str, may_be_told: bool, draw: random.Random
    ) -> tuple[list[str], Asked | None]:
        """A fact of one value: asked for, or told again where another is asked for already."""
        value = draw.choice(THINGS) if wording.named else str(draw.randrange(10 ** draw.randint(2, 6), 10**7))
        fact = wording.fact.format(key=key, value=value)
        if may_be_told and draw.random() >= self.asked:
            return [fact, wording.again.format(key=key, value=value)], None
        return [fact], (wording.question.format(key=key), value)


def _names(draw: random.Random) -> Iterator[str]:
    """Invented names, none twice."""
    seen: set[str] = set()
    attempt = 0
    while True:
        if (name := invented(draw, attempt)) not in seen:
            seen.add(name)
            yield name
            attempt = 0
        else:
            attempt += 1


def invented(draw: random.Random, attempt: int) -> str:
    """An invented name; a longer one after many attempts.

    There are 126,000 of two and three syllables, which a text of four million tokens may use up.
    """
    syllables = draw.randint(2, 3) + attempt // LONGER_AFTER
    word = "".join(draw.choice(SYLLABLES) for _ in range(syllables)).capitalize()
    return f"{word} {draw.choice(ENDINGS)}"


def _exam(questions: list[Asked], draw: random.Random) -> str:
    """Questions and answers in one of three layouts; nothing where there are none."""
    layout = draw.randrange(3)
    if not questions:
        return ""
    if layout == 0:
        return "\n\n" + "\n\n".join(f"Q: {question}\nA: {answer}" for question, answer in questions)
    if layout == 1:
        numbered = (f"{n}. {question} {answer}." for n, (question, answer) in enumerate(questions, 1))
        return "\n\nQuestions on these pages, with their answers.\n\n" + "\n".join(numbered)
    return "\n\n" + "\n".join(f'"{question}"\n"{answer}."' for question, answer in questions)


def insert(text: str, sentences: Iterable[tuple[int, str]], behind: str) -> tuple[str, str]:
    """A text with sentences at their places, `behind` each of them, up to the last one; and what is left of the text.

    Sentences of one place stand in the order given.
    """
    parts, last = [], 0
    for place, sentence in sorted(sentences, key=itemgetter(0)):
        parts += [text[last:place], sentence, behind]
        last = place
    return "".join(parts), text[last:]


def _line_starts(text: str) -> list[int]:
    """Where a sentence of its own may be put: behind each line break, and at the start where there is none."""
    return [match.end() for match in re.finditer("\n", text)] or [0]


def cut_near(text: str, size: int, above: int = 0) -> int:
    """Where to cut off about `size` characters: at the last line end before, or a space, and there where both are far.

    Paragraphs or whole books may be on one line each. A line end or a space at `above` or before it is not taken.
    """
    size = min(size, len(text))
    if size < len(text):
        for end in (text.rfind(mark, 0, size) + 1 for mark in "\n "):
            if above < end and size - end <= FAR * size:
                return end
    return size

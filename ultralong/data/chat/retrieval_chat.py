"""Conversations about long texts: facts stand at every depth of a text that fills the window, and are then asked for.

The raw documents of `ultralong.data.select.retrieval` have a loss on every token, nearly all of which are the text's
own. A conversation has a loss on its answers alone, and asks in the chat format, as a model is asked when it is used.
Each holds pieces of books, one after another, and 8 to 24 questions with answers: about one value, several of one key,
one among keys that are almost the same, several keys at once, chains, counts, and a sentence of the text to be copied.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ultralong.data.chat.retrieval_facts import KINDS, SINGLE, Asked, Facts, Names, numbered
from ultralong.data.chat.size_search import SizeSearch
from ultralong.data.read.conversations import Conversation
from ultralong.data.read.documents import Document
from ultralong.data.read.messages import Message
from ultralong.data.select.retrieval import cut_near, insert

CHARACTERS = 4  # a token, nominally: how many facts a text gets does not depend on where it is cut
CLOSE, LEAST, TRIES = 0.001, 0.95, 12  # the text is cut elsewhere until a conversation is so close below its tokens
ENOUGH = 6  # characters a token that are read before a conversation is made
OPENINGS = (
    "Many pages follow. I have some questions about them.",
    "Please go through these pages with care; I want to know a few things afterwards.",
    "Here are some pages from several books, with notes between the lines.",
    "",
)
AHEAD = ("This is what I want to find out first: {question}", "Keep this in mind while you read. {question}")
BEHIND = ("That is all of it. {question}", "{question}", "Now to my question. {question}")
ALONE = ("Leave out everything but the answer.", "Only the answer, please.", "No sentence, just the answer.")
WHOLE = ("Answer in a sentence.", "Please answer with a whole sentence.", "")
COPY = (
    'In the text stands: "{cue}" Copy the sentence that comes right behind it, word for word.',
    'How does the text go on directly after "{cue}"? Quote the next sentence exactly.',
)
# A full stop behind a title or an initial ends no sentence.
END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])[.!?][\"']?\s+(?=[\"']?[A-Z])")
WORDS, LONGEST = (6, 40), 640  # of a sentence to be copied and of the one before it; characters: data has no words


@dataclass(frozen=True)
class RetrievalChat:
    """How a source's documents become conversations about long texts.

    Attributes:
        tokens: Of a conversation, template included; what fills the row is as long as the row.
        questions: Fewest and most of a conversation.
        spacing: Fewest and most characters for each fact; drawn for each conversation, evenly by their logarithm. Facts
            that are not asked for are there to be mistaken for those that are.
        near: Share of the questions about a key that stands among 4 to 16 keys of almost the same name.
        joint: Share that asks for two to four keys at once.
        several: Share about a key with several values.
        values: Fewest and most values of such a key.
        numbered: Share of their answers that are numbered lists, one value a line.
        chained: Share about chains of two to five places.
        counted: Share about what has to be counted over the whole text.
        copied: Share that asks to copy the sentence that follows another one; less where the text has hardly any.
        ahead: Share of the conversations whose first question stands in front of the text too.
        flowing: Share of the conversations whose text has no line breaks inside paragraphs; facts then stand between
            sentences, else between lines.
        bare: Share of the questions that want the answer alone, the others want a sentence.
        count: So many conversations; where the texts are used up, from the same texts cut elsewhere and with other
            facts. None takes each text once.
    """

    tokens: int
    questions: tuple[int, int] = (8, 24)
    spacing: tuple[int, int] = (150, 3000)
    near: float = 0.2
    joint: float = 0.15
    several: float = 0.15
    chained: float = 0.15
    counted: float = 0.1
    copied: float = 0.1
    ahead: float = 0.5
    flowing: float = 0.5
    bare: float = 0.5
    count: int | None = None
    values: tuple[int, int] = (2, 5)
    numbered: float = 0.0

    def __post_init__(self) -> None:
        least, most = self.questions
        if not 1 <= least <= most:
            raise ValueError(f"retrieval_chat: questions must rise from 1 or more, found {self.questions}.")
        if self.count is not None and self.count < 1:
            raise ValueError(f"retrieval_chat: count must be 1 or more, found {self.count}.")
        if not 100 <= self.spacing[0] <= self.spacing[1]:
            raise ValueError(f"retrieval_chat: spacing must rise from 100 characters or more, found {self.spacing}.")
        if not 2 <= self.values[0] <= self.values[1]:
            raise ValueError(f"retrieval_chat: values must rise from 2 or more, found {self.values}.")
        # A question with its answer and what the text tells for it takes some 100 tokens, one that counts 400.
        if self.tokens < 400 * most:
            raise ValueError(
                f"retrieval_chat: tokens must be 400 for each of up to {most} questions, which is {400 * most:,}, "
                f"or more, found {self.tokens:,}."
            )
        for key in (*self._shares(), "ahead", "flowing", "bare", "numbered"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"retrieval_chat: {key} is a share and must lie in 0..1, found {getattr(self, key)}.")
        if (total := sum(self._shares().values())) > 1 + 1e-9:
            raise ValueError(
                f"retrieval_chat: {', '.join(self._shares())} must not exceed 1 together, found {total:g}."
            )

    def _shares(self) -> dict[str, float]:
        return {key: getattr(self, key) for key in (*(kind for kind in KINDS if kind != "single"), "copied")}

    def conversations(
        self,
        read: Callable[[], Iterable[Document]],
        seed: int,
        measure: Callable[[list[Message]], int],
        name: str,
        category: str,
    ) -> Iterator[Conversation]:
        """Join the texts, cut them into pieces that fill `tokens`, and put facts into and questions behind each.

        What is left at the end and fills no conversation is left out.

        Args:
            read: Gives the documents, from the first, each time it is called.
            seed: The recipe's.
            measure: Tokens of a conversation.
            name: Of the source; in front of each conversation's id.
            category: Of the conversations.

        Raises:
            ValueError: A conversation cannot be made as long as it shall be, or all texts fill none.
        """
        made = 0
        for turn in itertools.count():
            before = made
            for messages, license in self._turn(read, f"retrieval chat {seed} {name} {turn}", turn, measure):
                made += 1
                yield Conversation(f"{name}/{made}", messages, name, license, category)
                if made == self.count:
                    return
            if made == before:
                raise ValueError(f"retrieval_chat: the texts of {name} do not fill {self.tokens:,} tokens.")
            if self.count is None:
                return

    def _turn(
        self, read: Callable[[], Iterable[Document]], key: str, turn: int, measure: Callable[[list[Message]], int]
    ) -> Iterator[tuple[list[Message], str]]:
        """As `_once`. Another turn does not cut the texts where the one before did, if they are long enough for it."""
        made = False
        for skip in (int(_draw(key).random() * self.tokens * CHARACTERS), 0) if turn else (0,):
            for talk in self._once(read(), key, skip, measure):
                made = True
                yield talk
            if made:
                return

    def _once(
        self, texts: Iterable[Document], key: str, skip: int, measure: Callable[[list[Message]], int]
    ) -> Iterator[tuple[list[Message], str]]:
        """Conversations that take each text once, but for what is skipped, and the licence of what they end with."""
        number, left, license = 0, "", ""
        for document in itertools.chain(texts, [None]):
            if document is not None:
                left, license = f"{left}\n\n{document.text}" if left else document.text, document.license
                left, skip = left[skip:], max(0, skip - len(left))
            while len(left) > (0 if document is None else ENOUGH * self.tokens):
                made = self._fitted(left, f"{key} {number + 1}", measure)
                if made is None:
                    break
                number, left = number + 1, left[made[1] :].lstrip()
                yield made[0], license

    def _fitted(self, text: str, key: str, measure: Callable[[list[Message]], int]) -> tuple[list[Message], int] | None:
        """The conversation about as much of the text's beginning as makes it `tokens` long, and how much that is.

        None where the whole text is too short.
        """
        best: tuple[int, list[Message], int] | None = None
        size, search = self.tokens * 3, SizeSearch(self.tokens * (1 - CLOSE / 2), 1 / CHARACTERS)
        for _ in range(TRIES):
            size = cut_near(text, size, search.low)
            messages = self.conversation(text[:size], _draw(key))
            length = measure(messages)
            if length <= self.tokens and (best is None or length > best[0]):
                best = length, messages, size
            if best is not None and best[0] >= self.tokens * (1 - CLOSE):
                return best[1], best[2]
            if size == len(text) and length < self.tokens:
                return None
            size = search.after(size, length)
        if best is None or best[0] < LEAST * self.tokens:
            raise ValueError(
                f"retrieval_chat: no text makes a conversation of {self.tokens:,} tokens; facts at {self.spacing[0]} "
                f"characters from each other, or up to {self.values[1]} values of a key, may leave no room for it."
            )
        return best[1], best[2]

    def conversation(self, text: str, draw: random.Random) -> list[Message]:
        """One text with its facts and questions.

        Args:
            text: The piece.
            draw: Decides everything; pieces that differ a little in length get the same facts.
        """
        wordings = tuple(draw.sample(SINGLE, draw.randint(2, len(SINGLE))))
        facts = Facts(draw, wordings, Names(draw), self.values)
        shares = self._shares()
        kinds = draw.choices(
            [*shares, "single"], [*shares.values(), max(0.0, 1 - sum(shares.values()))], k=draw.randint(*self.questions)
        )
        flowing = draw.random() < self.flowing
        text = re.sub(r"(?<!\n)\n(?!\n)", " ", text) if flowing else text
        # Draws of its own: what is told must not depend on where the text is cut.
        copies = _copies(text, kinds.count("copied"), random.Random(draw.random()))
        asked = [facts.ask(kind) for kind in kinds if kind != "copied"]
        told = [list(one.told) for one in asked] + [[other] for one in asked for other in one.others]
        spacing = self.spacing[0] * (self.spacing[1] / self.spacing[0]) ** draw.random()
        missing = int(self.tokens * CHARACTERS / spacing) - sum(map(len, told))
        told += [[facts.single().full] for _ in range(missing)]
        # Last, as the draws above must stay as they are where another cut has another number of copies.
        asked += (instead := [facts.single() for _ in range(len(kinds) - len(asked) - len(copies))])
        told += [list(one.told) for one in instead]
        depths = [sorted(draw.random() for _ in group) for group in told]
        text = _with_facts(text, flowing, told, depths, [span for span, _ in copies])
        questions = [*asked, *(copy for _, copy in copies)]
        draw.shuffle(questions)
        return self._turns(text.strip(), questions, draw)

    def _turns(self, text: str, questions: Sequence[Asked], draw: random.Random) -> list[Message]:
        """Questions and answers, the first of them with the text."""
        messages: list[Message] = []
        for number, one in enumerate(questions):
            bare = one.kind != "copied" and draw.random() < self.bare
            how = "" if one.kind == "copied" else draw.choice(ALONE if bare else WHOLE)
            answer = one.bare if bare else one.full
            # No draw at the default, so that rows of recipes without it stay the same.
            if one.kind == "several" and self.numbered and draw.random() < self.numbered:
                how, answer = "", numbered(one.bare.split(", "))
            question = f"{one.question} {how}".rstrip()
            if number == 0:
                before = [draw.choice(OPENINGS)]
                before += [draw.choice(AHEAD).format(question=one.question)] if draw.random() < self.ahead else []
                question = draw.choice(BEHIND).format(question=question)
                question = "\n\n".join(part for part in (*before, text, question) if part)
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        return messages


def _draw(key: str) -> random.Random:
    return random.Random(hashlib.sha256(key.encode()).digest())


def _copies(text: str, count: int, draw: random.Random) -> list[tuple[tuple[int, int], Asked]]:
    """Sentences to copy, and where they and those before them stand; fewer where the text has not so many."""
    ends = [match.end() for match in END.finditer(text)]
    plain = " ".join(text.split()) if count else ""
    found: list[tuple[tuple[int, int], Asked]] = []
    for _ in range(count if len(ends) > 2 else 0):
        for place in (int(draw.random() * (len(ends) - 2)) for _ in range(50)):
            start, middle, end = ends[place : place + 3]
            cue, answer = (" ".join(text[a:b].split()) for a, b in ((start, middle), (middle, end)))
            fits = all(WORDS[0] <= len(p.split()) <= WORDS[1] and len(p) <= LONGEST for p in (cue, answer))
            free = all(end <= a or b <= start for (a, b), _ in found)
            if fits and free and "\n\n" not in text[start:end].rstrip() and plain.count(cue) == 1:
                found.append(((start, end), Asked("copied", draw.choice(COPY).format(cue=cue), "", answer, ())))
                break
    return found


def _with_facts(
    text: str,
    flowing: bool,
    told: Sequence[Sequence[str]],
    depths: Sequence[Sequence[float]],
    kept: Sequence[tuple[int, int]],
) -> str:
    """The text with each sentence at its depth, between lines or sentences, and none inside the spans that are kept."""
    starts = [match.end() for match in (END if flowing else re.compile("\n")).finditer(text)] or [0]
    starts = [place for place in starts if not any(a < place < b for a, b in kept)] or [0]
    behind = " " if flowing else "\n"
    inserted: list[tuple[int, str]] = []
    for sentences, wanted in zip(told, depths, strict=True):
        for sentence, depth in zip(sentences, wanted, strict=True):
            place = min(bisect_left(starts, math.floor(depth * len(text))), len(starts) - 1)
            inserted.append((starts[place], sentence))
    return "".join(insert(text, inserted, behind))

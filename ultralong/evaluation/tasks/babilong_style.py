"""BABILong-style questions: chained facts as in bAbI (Weston et al. 2015), hidden in a long text as in BABILong (2024).

A few people walk about, carry things and hand them on; the sentences that say so stand in order among a text that has
nothing to do with them. Finding one sentence is not enough: the answer follows from the last one that counts, or from
two or three together. Names, places and grammar are our own, so that no model has seen these stories; scores do not
compare with BABILong's.

| test | asks | facts needed |
|---|---|---|
| `babilong_style_qa1` | where a person is | 1, the last of several |
| `babilong_style_qa2` | where a thing is that somebody carries | 2 |
| `babilong_style_qa3` | where a thing was before it came to a place | 3 |
| `babilong_style_qa4` | which place lies two steps in a direction | 2, each told from either end |
| `babilong_style_qa5` | who gave a thing to the one who gave it on | 2 |
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from ultralong.evaluation.tasks.task import Draft, Setting, Task
from ultralong.evaluation.tasks.texts import Essays, running_text

# fmt: off
PEOPLE = (
    "Alarik", "Berenike", "Cosima", "Dietmar", "Eulalia", "Fiorella", "Gunnhild", "Hartmut", "Isolde", "Jorunn",
    "Kasimir", "Leontine", "Mechthild", "Norbert", "Ottilie", "Philippa", "Quirin", "Roswitha", "Sieglinde",
    "Thaddeus", "Ulrike", "Valerian", "Wendelin", "Xaver",
)
PLACES = (
    "boathouse", "granary", "lighthouse", "orchard", "quarry", "sawmill", "smithy", "stable", "tannery", "vineyard",
    "watchtower", "windmill",
)
THINGS = (
    "anvil", "bellows", "candlestick", "compass", "goblet", "lantern", "sextant", "spyglass", "tambourine", "thimble",
)
# fmt: on
WALKS = (
    "{person} walked to the {place}.",
    "{person} went over to the {place}.",
    "{person} hurried to the {place}.",
    "{person} made the way to the {place}.",
)
TAKES = ("{person} picked up the {thing}.", "{person} took the {thing}.")
GIVES = ("{giver} gave the {thing} to {taker}.", "{giver} handed the {thing} to {taker}.")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
TASK = (
    "A few sentences about people, things and places are scattered through the text below, in the order in which "
    "everything happened. The rest of the text has nothing to do with them.\n\n{context}\n\nQuestion: {question} "
    "Answer with one word."
)
PREFIX = " Answer:"
WALKS_TOLD = 8


@dataclass
class Story:
    """Sentences in order, the question about them, and its answer.

    Attributes:
        lines: All facts.
        question: What is asked.
        answer: One word.
        needed: Indices of the facts that the answer rests on.
        kind: The words an answer is one of: `people` or `places`.
        named: Those of them that the question itself holds.
    """

    lines: list[str]
    question: str = ""
    answer: str = ""
    needed: tuple[int, ...] = ()
    kind: str = "places"
    named: tuple[str, ...] = ()

    def tell(self, line: str) -> int:
        """Add a fact; returns its index."""
        self.lines.append(line)
        return len(self.lines) - 1


def _walk(draw: random.Random, person: str, place: str) -> str:
    return draw.choice(WALKS).format(person=person, place=place)


def where_is_a_person(draw: random.Random, people: Sequence[str]) -> Story:
    """qa1: the last of a person's walks tells."""
    story, cast = Story([]), draw.sample(people, 4)
    last: dict[str, tuple[str, int]] = {}
    for step in range(WALKS_TOLD):
        person = cast[step % 4] if step < 4 else draw.choice(cast)
        place = draw.choice([place for place in PLACES if place != last.get(person, ("",))[0]])
        last[person] = (place, story.tell(_walk(draw, person, place)))
    person = draw.choice(cast)
    story.question = f"Where is {person}?"
    story.answer, needed = last[person]
    story.needed = (needed,)
    return story


def where_is_a_thing(draw: random.Random, people: Sequence[str]) -> Story:
    """qa2: who took it, and where that one went last."""
    story, cast = Story([]), draw.sample(people, 3)
    things = draw.sample(THINGS, 3)
    taken: dict[str, int] = {}
    last: dict[str, tuple[str, int]] = {}
    for person, thing in zip(cast, things, strict=True):
        story.tell(_walk(draw, person, draw.choice(PLACES)))
        taken[person] = story.tell(draw.choice(TAKES).format(person=person, thing=thing))
    order = [person for person in cast for _ in range(2)]
    draw.shuffle(order)
    for person in order:
        place = draw.choice([place for place in PLACES if place != last.get(person, ("",))[0]])
        last[person] = (place, story.tell(_walk(draw, person, place)))
    person, thing = draw.choice(list(zip(cast, things, strict=True)))
    story.question = f"Where is the {thing}?"
    story.answer, walked = last[person]
    story.needed = (taken[person], walked)
    return story


def where_was_a_thing(draw: random.Random, people: Sequence[str]) -> Story:
    """qa3: who took it, where that one went, and where just before."""
    story, cast = Story([]), draw.sample(people, 2)
    things = draw.sample(THINGS, 2)
    taken: dict[str, int] = {}
    walks: dict[str, list[tuple[str, int]]] = {person: [] for person in cast}
    for person, thing in zip(cast, things, strict=True):
        taken[person] = story.tell(draw.choice(TAKES).format(person=person, thing=thing))
    routes = {person: draw.sample(PLACES, 4) for person in cast}  # no place twice: "before" has one meaning
    order = [person for person in cast for _ in range(4)]
    draw.shuffle(order)
    for person in order:
        place = routes[person][len(walks[person])]
        walks[person].append((place, story.tell(_walk(draw, person, place))))
    person, thing = draw.choice(list(zip(cast, things, strict=True)))
    step = draw.randint(1, 3)
    (story.answer, earlier), (place, later) = walks[person][step - 1 : step + 1]
    story.question = f"Where was the {thing} just before it came to the {place}?"
    story.needed = (taken[person], earlier, later)
    story.named = (place,)
    return story


def what_lies_two_steps_away(draw: random.Random, people: Sequence[str]) -> Story:
    """qa4: two neighbours in a row of places, each told from one end or the other."""
    story, row = Story([]), draw.sample(PLACES, 6)
    direction = draw.choice(sorted(OPPOSITE))
    pairs = list(pairwise(row))  # the later place lies in the direction of the earlier one's front
    told: dict[int, int] = {}
    for number in draw.sample(range(len(pairs)), len(pairs)):
        near, far = pairs[number]
        first, second, way = (far, near, direction) if draw.random() < 0.5 else (near, far, OPPOSITE[direction])
        told[number] = story.tell(f"The {first} lies directly {way} of the {second}.")
    start = draw.randint(0, 3)
    story.question = f"Which place lies two steps {direction} of the {row[start]}?"
    story.answer = row[start + 2]
    story.needed = tuple(sorted((told[start], told[start + 1])))
    story.named = (row[start],)
    return story


def who_gave_it_first(draw: random.Random, people: Sequence[str]) -> Story:
    """qa5: two handings-on of one thing, told among those of another."""
    story, cast = Story([]), draw.sample(people, 5)
    things = draw.sample(THINGS, 2)
    chains = {thing: draw.sample(cast, 5) for thing in things}
    told: dict[str, list[int]] = {thing: [] for thing in things}
    order = [thing for thing in things for _ in range(4)]
    draw.shuffle(order)
    for thing in order:
        step = len(told[thing])
        giver, taker = chains[thing][step : step + 2]
        told[thing].append(story.tell(draw.choice(GIVES).format(giver=giver, thing=thing, taker=taker)))
    thing, step = draw.choice(things), draw.randint(0, 2)
    giver, _, taker = chains[thing][step : step + 3]
    story.question = f"Who gave the {thing} to the one who gave it to {taker}?"
    story.answer, story.kind, story.named = giver, "people", (taker,)
    story.needed = tuple(told[thing][step : step + 2])
    return story


STORIES: dict[str, Callable[[random.Random, Sequence[str]], Story]] = {
    "babilong_style_qa1": where_is_a_person,
    "babilong_style_qa2": where_is_a_thing,
    "babilong_style_qa3": where_was_a_thing,
    "babilong_style_qa4": what_lies_two_steps_away,
    "babilong_style_qa5": who_gave_it_first,
}


@dataclass(frozen=True)
class PeopleInText:
    """What builders share that hide people in running text.

    Attributes:
        text: The running text.
        people: Names that the text does not hold.
    """

    text: Essays
    people: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "people", self.text.without(PEOPLE))

    @property
    def source(self) -> str:
        """What the text is."""
        return self.text.name


@dataclass(frozen=True)
class StoryBuilder(PeopleInText):
    """Scatters a story over running text; a unit of size is a word of that text.

    Attributes:
        story: Makes the story.
    """

    story: Callable[[random.Random, Sequence[str]], Story]
    smallest: int = 120
    probe: int = 2000

    def build(self, draw: random.Random, size: int, index: int) -> Draft:
        """Facts stand at even random places, in their order."""
        story = self.story(draw, self.people)
        sentences = self.text.sentences(size)
        cuts = sorted(draw.randint(0, len(sentences)) for _ in story.lines)
        parts: list[str] = []
        starts: list[int] = []
        length = 0
        for begin, end, line in zip([0, *cuts], cuts, story.lines, strict=False):
            before = "".join(f"{sentence} " for sentence in sentences[begin:end])
            starts.append(length + len(before))
            parts += [before, f"{line} "]
            length = starts[-1] + len(line) + 1
        context = "".join([*parts, " ".join(sentences[cuts[-1] :])]).rstrip()
        offset = TASK.index("{context}")
        message = TASK.replace("{question}", story.question).replace("{context}", context)
        return Draft(
            message,
            PREFIX,
            (story.answer,),
            tuple(offset + starts[place] for place in story.needed),
            extra={"kind": story.kind, "named": list(story.named)},
        )


def only_named(
    answer: str, references: Sequence[str], kind: str | None = None, named: Sequence[str] | None = None
) -> float:
    """Whether the first sentence of the answer names the reference and no other person or place.

    Words that stand in the question may be repeated. BABILong judges in the same way.

    Args:
        answer: What the model said.
        references: The right word.
        kind: What it is one of, `people` or `places`.
        named: Words of that kind in the question.
    """
    first = re.split(r"[.\n]", answer.strip(), maxsplit=1)[0].lower()
    words = {word.lower() for word in (PEOPLE if kind == "people" else PLACES)}
    said = words & set(re.findall(r"\w+", first))
    return float(said - {word.lower() for word in named or ()} == {references[0].lower()})


def prepare(name: str, setting: Setting) -> StoryBuilder:
    """The builder of one test, over the caller's documents or the essays."""
    text = running_text(setting.haystack)
    return StoryBuilder(text, STORIES[name])


BABILONG_STYLE_TASKS = {
    name: Task(
        name,
        16,
        partial(prepare, name),
        only_named,
        ("kind", "named"),
        former_name=name.replace("babilong_style", "facts"),
        capability="retrieval" if name.endswith("qa1") else "multi-hop",
    )
    for name in STORIES
}

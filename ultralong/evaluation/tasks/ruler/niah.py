"""RULER's eight needle tests: one generator, eight settings.

The order of draws is NVIDIA's, so that the same seed and size give the same bytes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from ultralong.evaluation.tasks.haystack import NOISE_LINE
from ultralong.evaluation.tasks.task import Draft, Setting
from ultralong.evaluation.tasks.texts import Essays, draw_uuid, running_text, word_pairs

TASK = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the "
    "provided text?"
)
PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
SHUFFLE_SEED = 42  # of every inner shuffle in NVIDIA's code, whatever the sample
DEPTHS = tuple(round(100 * step / 39) for step in range(40))  # per cent; 40 even steps, as np.linspace(0, 100, 40)


@dataclass(frozen=True)
class NiahKind:
    """One of the eight.

    Attributes:
        haystack: `noise` (one line repeated), `essay` (running text) or `needle` (needles that are not asked for).
        keys: Kind of the keys: `words` or `uuids`.
        values: Kind of the values: `numbers` or `uuids`.
        key_count: Keys hidden.
        value_count: Values of each key.
        query_count: Keys asked for.
    """

    haystack: str
    keys: str
    values: str
    key_count: int = 1
    value_count: int = 1
    query_count: int = 1


@dataclass(frozen=True)
class NiahBuilder:
    """Makes prompts of one kind; a unit of size is a line of noise, a needle, or a word of running text."""

    kind: NiahKind
    text: Essays | None = None
    smallest: int = field(init=False)
    probe: int = field(init=False)
    source: str = field(init=False)

    def __post_init__(self) -> None:
        essay = self.kind.haystack == "essay"
        object.__setattr__(self, "smallest", 100 if essay else self.kind.key_count * self.kind.value_count)
        object.__setattr__(self, "probe", 2000 if essay else 50)
        names = {"noise": "repeated noise", "needle": "needles"}
        text = "" if self.text is None else self.text.name
        object.__setattr__(self, "source", names.get(self.kind.haystack, text))

    def build(self, draw: random.Random, size: int, index: int) -> Draft:
        """A prompt of `size` units."""
        kind = self.kind
        keys: list[str] = []
        values: list[list[str]] = []
        for _ in range(kind.key_count):
            keys.append(_draw_new(draw, kind.keys, keys))
            values.append([])
            for _ in range(kind.value_count):
                taken = [value for group in values for value in group]
                values[-1].append(_draw_new(draw, kind.values, taken))
        needles = [
            NEEDLE.format(kind=kind.values, key=key, value=value)
            for key, group in zip(keys, values, strict=True)
            for value in group
        ]
        random.Random(SHUFFLE_SEED).shuffle(needles)
        context = self._context(draw, size, needles, keys)
        asked = draw.sample(range(kind.key_count), kind.query_count)
        task, prefix, shown = _wording(kind)
        names = [keys[place] for place in asked]
        query = ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0]
        message = task.format(kind=shown, context=context, query=query)
        golds = [
            NEEDLE.format(kind=kind.values, key=keys[place], value=value) for place in asked for value in values[place]
        ]
        return Draft(
            message,
            prefix.format(kind=shown, query=query),
            tuple(value for place in asked for value in values[place]),
            tuple(message.index(gold) for gold in golds),
        )

    def _context(self, draw: random.Random, size: int, needles: list[str], keys: list[str]) -> str:
        if self.text is not None:
            return _in_text(self.text, draw, size, needles)
        if self.kind.haystack == "noise":
            lines = [NOISE_LINE] * size
        else:
            lines = []
            for _ in range(size):
                key = _draw_new(draw, self.kind.keys, keys)
                lines.append(NEEDLE.format(kind=self.kind.values, key=key, value=_draw(draw, self.kind.values)))
        places = sorted(draw.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)


def _in_text(text: Essays, draw: random.Random, size: int, needles: list[str]) -> str:
    sentences = text.sentences(size)
    cuts = sorted(int(len(sentences) * (depth / 100)) for depth in draw.sample(DEPTHS, len(needles)))
    parts: list[str] = []
    for start, end, needle in zip([0, *cuts], cuts, needles, strict=False):
        parts += [" ".join(sentences[start:end]), needle]
    return " ".join([*parts, " ".join(sentences[cuts[-1] :])])


def prepare(kind: NiahKind, setting: Setting) -> NiahBuilder:
    """The builder of one kind, with the caller's running text in place of the essays when there is one."""
    if kind.haystack != "essay":
        return NiahBuilder(kind)
    return NiahBuilder(kind, running_text(setting.haystack))


def _draw(draw: random.Random, kind: str) -> str:
    if kind == "numbers":
        return str(draw.randint(10**6, 10**7 - 1))
    if kind == "words":
        return draw.choice(word_pairs())
    return draw_uuid(draw)


def _draw_new(draw: random.Random, kind: str, taken: list[str]) -> str:
    """One that is not taken: two needles with one key would have two right answers, or none."""
    value = _draw(draw, kind)
    while value in taken:
        value = _draw(draw, kind)
    return value


def _wording(kind: NiahKind) -> tuple[str, str, str]:
    """Task and answer prefix, in the singular where one value is asked for, and the kind as both name it."""
    if kind.query_count * kind.value_count > 1:
        return TASK, PREFIX, kind.values
    task, prefix = (text.replace("Some", "A").replace("are all", "is").replace("are", "is") for text in (TASK, PREFIX))
    return task, prefix, kind.values[:-1]

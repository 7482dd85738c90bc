"""RULER's variable tracking: five names passed on through assignments scattered over noise."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from itertools import pairwise

from ultralong.evaluation.tasks.haystack import NOISE_LINE
from ultralong.evaluation.tasks.task import Draft, Setting

TASK = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: "
    "Find all variables that are assigned the value {query} in the text above."
)
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned "
    "the value {query}, they are: "
)
HOPS = 4
EXAMPLE_LINES = 10  # about 500 tokens with the words around, as NVIDIA's worked example


@dataclass(frozen=True)
class TrackingBuilder:
    """Makes prompts with one worked example; a unit of size is a line of noise."""

    source: str = "repeated noise"
    smallest: int = HOPS + 2
    probe: int = 50

    def build(self, draw: random.Random, size: int, index: int) -> Draft:
        """A prompt of `size` lines of noise."""
        example, example_prefix, example_names, _ = _chain(draw, EXAMPLE_LINES, letters=3)
        task, prefix, names, lines = _chain(draw, size, letters=5)
        message = f"{example}{example_prefix} {' '.join(example_names)}\n\n{task}"
        start = len(message) - len(task)
        return Draft(message, prefix, tuple(names), tuple(start + task.index(line) for line in lines))


def prepare(setting: Setting) -> TrackingBuilder:
    """The builder; nothing depends on the setting."""
    return TrackingBuilder()


def _chain(draw: random.Random, size: int, letters: int) -> tuple[str, str, list[str], list[str]]:
    """Task, answer prefix, names and assignment lines of one chain among `size` lines of noise."""
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(draw.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = draw.randrange(10000, 99999)
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {later} = VAR {earlier} " for earlier, later in pairwise(names)]
    lines = [NOISE_LINE] * size
    # Sorted places keep the order of the chain; each insertion moves the next place by one.
    for shift, (place, line) in enumerate(zip(sorted(draw.sample(range(size), len(chain))), chain, strict=True)):
        lines.insert(place + shift, line)
    context = "\n".join(lines).replace(". \n", ".\n")
    return (TASK.format(context=context, query=value), PREFIX.format(count=len(names), query=value), names, chain)

"""The needle test as samples in text form, beside the ids that `needle_grid` runs."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ultralong.evaluation.measures.needle import NeedleFormat
from ultralong.evaluation.tasks.haystack import NOISE_LINE
from ultralong.evaluation.tasks.scoring import first_integer
from ultralong.evaluation.tasks.task import Draft, Setting, Task
from ultralong.evaluation.tasks.texts import Essays

GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class NeedleBuilder:
    """One number in running text; a unit of size is a word."""

    text: Essays
    form: NeedleFormat
    smallest: int = 20
    probe: int = 2000

    @property
    def source(self) -> str:
        """What the text is."""
        return self.text.name

    def build(self, draw: random.Random, size: int, index: int) -> Draft:
        """Depths follow the golden ratio, so that any number of samples in a row covers them evenly."""
        form, depth = self.form, index * GOLDEN % 1.0
        key = draw.choice(form.keys)
        value = str(draw.randrange(10 ** (form.digits - 1), 10**form.digits))
        sentences = self.text.sentences(size)
        cut = round(depth * len(sentences))
        needle = form.needle.replace("{key}", key).replace("{value}", value)
        context = " ".join([*sentences[:cut], needle, *sentences[cut:]])
        message = form.prompt.replace("{key}", key).replace("{context}", context)
        return Draft(message, form.answer_prefix.replace("{key}", key), (value,), (message.index(needle),), depth)


def prepare(setting: Setting) -> NeedleBuilder:
    """The builder, over the caller's documents or repeated noise."""
    text = (
        Essays([NOISE_LINE], "repeated noise")
        if setting.haystack is None
        else Essays(setting.haystack, "documents given")
    )
    return NeedleBuilder(text, NeedleFormat())


NEEDLE_TASK = Task("needle", 16, prepare, first_integer)

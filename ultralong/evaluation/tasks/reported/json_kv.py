"""HELMET's `json_kv` (Yen et al. 2024, arXiv 2410.02694; after Liu et al. 2023): one value of a long JSON object.

As published: pairs of UUIDs, two worked examples from the same object behind it, the pair asked for at one of six even
depths, 100 tokens to answer in, and substring exact match after SQuAD's normalisation. InfiniteBench's key-value
retrieval differs: no examples, 500 depths, and the value must be a word of its own. The wording is our own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ultralong.evaluation.tasks.published.scores import english_words
from ultralong.evaluation.tasks.task import Draft, Setting, Task
from ultralong.evaluation.tasks.texts import draw_uuid

TASK = "{pairs}\n\nThe JSON object above maps keys to values. Give the value of the last key.\n\n{examples}Key: {key}"
PREFIX = "\nCorresponding value:"
DEPTHS = 6
SHOTS = 2
ANSWER_TOKENS = 100


@dataclass(frozen=True)
class ObjectBuilder:
    """Makes JSON objects; a unit of size is a pair."""

    source: str = "UUID pairs"
    smallest: int = SHOTS + 2
    probe: int = 30

    def build(self, draw: random.Random, size: int, index: int) -> Draft:
        """An object of `size` pairs; the depths of the pair asked for are taken in turn."""
        pairs = {draw_uuid(draw): draw_uuid(draw) for _ in range(size)}
        keys = list(pairs)
        place = index % DEPTHS * (size - 1) // (DEPTHS - 1)
        shown = draw.sample([other for other in range(size) if other != place], SHOTS)
        examples = "".join(f"Key: {keys[other]}{PREFIX} {pairs[keys[other]]}\n\n" for other in shown)
        lines = ",\n ".join(f'"{key}": "{value}"' for key, value in pairs.items())
        message = TASK.replace("{examples}", examples).replace("{key}", keys[place]).replace("{pairs}", f"{{{lines}}}")
        return Draft(
            message,
            PREFIX,
            (pairs[keys[place]],),
            (message.index(f'"{keys[place]}"'),),
            place / (size - 1),
        )


def substring_exact_match(answer: str, references: Sequence[str]) -> float:
    """HELMET's score of recall: whether a reference, normalised, is part of the answer, normalised.

    Normalising takes away letter case, punctuation, articles and extra white space, as SQuAD does.
    """
    said = " ".join(english_words(answer))
    return float(any(" ".join(english_words(reference)) in said for reference in references))


def prepare(setting: Setting) -> ObjectBuilder:
    """The builder; nothing of the setting changes it."""
    return ObjectBuilder()


JSON_KV_TASK = Task("json_kv", ANSWER_TOKENS, prepare, substring_exact_match, capability="retrieval")

"""Conversations kept apart, so that SFT can be measured on answers that the model never saw.

The choice hangs on the seed and each conversation's id alone. What shares 13 words in a row with one that is kept apart
(the rule of `overlap`) is left out of training too: in synthetic sets the same passage is asked about many times.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ultralong.data.read.conversations import Conversation
from ultralong.data.select.length_rule import uniform
from ultralong.data.select.overlap import NgramIndex

WORDS, SHORTEST = 13, 8


@dataclass(frozen=True)
class HoldOut:
    """Conversations in two parts.

    Attributes:
        training: Those to train on, in the order of reading.
        heldout: Those kept apart, in the order of reading.
        overlapping: How many are in neither, because they share words with one kept apart.
    """

    training: list[Conversation]
    heldout: list[Conversation]
    overlapping: int


def hold_out(conversations: Iterable[Conversation], count: int, seed: int = 0) -> HoldOut:
    """Keep conversations apart.

    Args:
        conversations: All of them.
        count: How many are kept apart.
        seed: With an id, decides on it.

    Raises:
        ValueError: There are not more conversations than `count`, or none is left to train on.
    """
    talks = list(conversations)
    if not 1 <= count < len(talks):
        raise ValueError(
            f"{count} conversations cannot be held out of {len(talks)}: keep apart at least one, and "
            "fewer than there are."
        )
    ranked = sorted(range(len(talks)), key=lambda place: (uniform(seed, f"held out {talks[place].id}"), place))
    apart = set(ranked[:count])
    heldout = [talk for place, talk in enumerate(talks) if place in apart]
    grams = NgramIndex(
        (
            ("heldout", f"{talk.id}#{turn}", message["content"])
            for talk in heldout
            for turn, message in enumerate(talk.messages)
        ),
        WORDS,
        SHORTEST,
    )
    rest = [talk for place, talk in enumerate(talks) if place not in apart]
    training = [talk for talk in rest if not any(grams.hits(message["content"]) for message in talk.messages)]
    if not training:
        raise ValueError(
            f"All {len(rest)} conversations share {WORDS} words in a row with one of the {count} held "
            "out: nothing is left to train on."
        )
    return HoldOut(training, heldout, len(rest) - len(training))

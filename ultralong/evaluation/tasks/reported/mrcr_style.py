"""Multi-round co-reference, as MRCR (Vodrahalli et al. 2024, arXiv 2409.12640; huggingface.co/datasets/openai/mrcr).

A long conversation holds 2, 4 or 8 requests in the same words, each with another answer, among many that differ in form
or topic. The model is to repeat the answer to the i-th of them, behind a random string of ten characters.

As OpenAI's: the number of needles, the string in front, and the score: 0 unless the answer begins with the string, else
`difflib.SequenceMatcher`'s ratio of the rest to the reference. Our own: all texts (a small grammar; needles and the
rest come from the same one), and the conversation as a transcript in one message, so that it fits any chat template.
Scores do not compare with those of the published conversations.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import partial

from ultralong.evaluation.tasks.task import Draft, Setting, Task

# fmt: off
FORMS = (
    "anecdote", "blog post", "diary entry", "fable", "letter", "news report", "poem", "postcard", "proverb", "riddle",
    "short story", "song", "speech", "toast",
)
TOPICS = (
    "beekeepers", "bridges", "candles", "canals", "carpets", "clocks", "comets", "ferries", "glaciers", "hedgehogs",
    "islands", "kites", "lanterns", "lighthouses", "maps", "meadows", "mirrors", "moths", "owls", "pottery", "rivers",
    "shepherds", "snowfall", "telescopes", "trains", "umbrellas", "violins", "volcanoes", "windmills", "woodpeckers",
)
QUALITIES = (
    "amber", "ancient", "bashful", "brittle", "careful", "cheerful", "crooked", "distant", "dusty", "eager", "faded",
    "gentle", "golden", "hollow", "humble", "idle", "jagged", "lonely", "mellow", "narrow", "patient", "polished",
    "quiet", "restless", "rusty", "silver", "sleepy", "stubborn", "tangled", "tender", "velvet", "weary", "wooden",
)
THINGS = (
    "anchor", "attic", "balcony", "bell", "bucket", "cellar", "chimney", "cradle", "doorway", "engine", "feather",
    "fence", "garden", "harbour", "kettle", "ladder", "market", "needle", "orchard", "path", "pebble", "pillow",
    "quilt", "roof", "saddle", "stairway", "station", "table", "tower", "valley", "wagon", "window",
)
DEEDS = (
    "borrowed", "carried", "circled", "counted", "crossed", "drew", "followed", "forgot", "found", "greeted", "guarded",
    "hid", "lifted", "lost", "measured", "mended", "moved", "named", "opened", "painted", "praised", "remembered",
    "repaired", "sketched", "sold", "traded", "visited", "washed", "watched", "wrapped",
)
# fmt: on
SENTENCES = (
    "The {quality} {thing} {deed} the {other} {end} before noon.",
    "Nobody who knew {topic} {deed} a {quality} {thing} near the {end}.",
    "Somebody {deed} the {thing}, and the {quality} {other} stayed by the {end}.",
    "Between the {thing} and the {other}, {topic} {deed} one {quality} {end}.",
    "All winter {topic} {deed} the {quality} {thing} behind the {end}.",
    "It was a {quality} {thing} that {deed} the {other} on the {end}.",
    "Of {topic} we know that they {deed} the {thing} for a {quality} {end}.",
    "When the {quality} {other} came, the {thing} {deed} the {end} twice.",
)
FEWEST_SENTENCES, MOST_SENTENCES = 3, 5
ASK = "Write a {form} about {topic}."
TASK = (
    "Here is a conversation between a user and an assistant. After it you will be asked to repeat one message of the "
    "assistant word for word.\n\n{turns}The conversation is over. Counting from 1 in the order of the conversation, "
    "take the assistant's {form} about {topic} number {number}. Write {mark} and directly behind it, without a space, "
    "that message, and nothing else."
)
CUE = "\n\nAssistant:"
MARK_LETTERS = string.ascii_letters + string.digits
MARK_LENGTH = 10
SPARE_TOKENS = 8


@dataclass(frozen=True)
class ConversationBuilder:
    """Makes conversations; a unit of size is a request with its answer.

    Attributes:
        needles: Requests in the same words.
        setting: Its tokenizer counts what the answer takes.
    """

    needles: int
    setting: Setting
    source: str = "sentences of a small grammar"
    smallest: int = field(init=False)
    probe: int = 20

    def __post_init__(self) -> None:
        object.__setattr__(self, "smallest", self.needles + 2)

    def build(self, draw: random.Random, size: int, index: int) -> Draft:
        """A conversation of `size` requests; the needles are asked for in turn."""
        pairs = [(form, topic) for form in FORMS for topic in TOPICS]
        wanted = pairs.pop(draw.randrange(len(pairs)))
        places = sorted(draw.sample(range(size), self.needles))
        answers: dict[str, None] = {}
        while len(answers) < self.needles:
            answers[_text(draw, wanted[1])] = None
        hidden = dict(zip(places, answers, strict=True))
        number = index % self.needles
        mark = "".join(draw.choices(MARK_LETTERS, k=MARK_LENGTH))
        turns: list[str] = []
        before, gold = 0, TASK.index("{turns}")
        for place in range(size):
            form, topic = wanted if place in hidden else draw.choice(pairs)
            asked = f"User: {ASK.format(form=form, topic=topic)}{CUE} "
            turns.append(f"{asked}{hidden[place] if place in hidden else _text(draw, topic)}\n\n")
            if place == places[number]:
                gold += before + len(asked)
            before += len(turns[-1])
        head, tail = TASK.split("{turns}")
        tail = tail.format(form=wanted[0], topic=wanted[1], number=number + 1, mark=mark)
        answer = mark + hidden[places[number]]
        tokens = len(self.setting.tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"])
        return Draft(
            head + "".join(turns) + tail,
            "" if self.setting.chat else CUE,
            (answer,),
            (gold,),
            max_new_tokens=tokens + SPARE_TOKENS,
            extra={"mark": mark, "needles": self.needles, "number": number + 1},
        )


def _text(draw: random.Random, topic: str) -> str:
    """An assistant's message on a topic: three to five sentences."""
    sentences = []
    for _ in range(draw.randint(FEWEST_SENTENCES, MOST_SENTENCES)):
        thing, other, end = draw.sample(THINGS, 3)
        sentences.append(
            draw.choice(SENTENCES).format(
                topic=topic, quality=draw.choice(QUALITIES), deed=draw.choice(DEEDS), thing=thing, other=other, end=end
            )
        )
    return " ".join(sentences)


def marked_ratio(answer: str, references: Sequence[str], mark: str | None = None) -> float:
    """MRCR's score: how alike answer and reference are behind the random string; 0 without it in front.

    White space before the string is not counted against a model: the prompt of a base model ends in a colon.

    Args:
        answer: What the model said.
        references: The right message, with the random string in front.
        mark: The random string.
    """
    said = answer.lstrip()
    if not mark or not said.startswith(mark):
        return 0.0
    return SequenceMatcher(None, said.removeprefix(mark), references[0].removeprefix(mark)).ratio()


MRCR_STYLE_TASKS = {
    name: Task(name, 0, partial(ConversationBuilder, needles), marked_ratio, ("mark",), capability="co-reference")
    for needles in (2, 4, 8)
    for name in (f"mrcr_style_{needles}needles",)
}

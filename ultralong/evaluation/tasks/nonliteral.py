"""A needle that shares no word with its question, in the manner of NoLiMa (Modarressi et al. 2025, arXiv 2502.05167).

Asked "Who has been to Egypt?", a model must notice that somebody ate dates in the shadow of the Sphinx. Searching for
the question's words finds nothing; what is tested is attention by meaning. Needles, questions and names are our own, so
scores do not compare with NoLiMa's. Tests assert that needle and question share no content word.

`nonliteral_world` needs to know where something stands or comes from; `nonliteral_sense` needs everyday reason.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ultralong.evaluation.tasks.babilong_style import PEOPLE, PeopleInText
from ultralong.evaluation.tasks.needle import GOLDEN
from ultralong.evaluation.tasks.task import Draft, Setting, Task
from ultralong.evaluation.tasks.texts import running_text

# (what the text says, what the question asks): {name} is the answer.
WORLD = (
    ("Years later {name} still spoke of eating dates in the shadow of the Sphinx.", "has been to Egypt"),
    ("{name} had a balcony with a view of the Sagrada Familia.", "has lived in Spain"),
    ("Every morning {name} jogged past the Brandenburg Gate.", "has lived in Germany"),
    ("{name} proposed marriage halfway up the Eiffel Tower.", "has been to France"),
    ("From the hotel window {name} could see the sails of the Sydney Opera House.", "has been to Australia"),
    ("{name} lost a camera on the steps of the Taj Mahal.", "has been to India"),
    ("It was raining when {name} climbed to Machu Picchu.", "has been to Peru"),
    ("{name} spent an afternoon sketching the Colosseum.", "has been to Italy"),
    ("{name} fed pigeons below the domes of Saint Basil's on Red Square.", "has been to Russia"),
    ("{name} woke up early to see the sun rise behind Mount Fuji.", "has been to Japan"),
    ("A guard at Buckingham Palace would not smile at {name}.", "has been to England"),
    ("{name} rode the cable car up to the statue of Christ the Redeemer.", "has been to Brazil"),
    ("{name} counted the columns of the Parthenon twice.", "has been to Greece"),
    ("{name} was caught in a sandstorm on the road to Petra.", "has been to Jordan"),
    ("At sunset {name} stood alone on a tower of the Forbidden City.", "has been to China"),
    ("{name} got lost between the temples of Angkor Wat.", "has been to Cambodia"),
)
SENSE = (
    ("{name} has not touched meat, eggs, cheese or honey since childhood.", "is a vegan"),
    ("A single glass of milk keeps {name} in bed with cramps for a day.", "is lactose intolerant"),
    ("{name} reads with the fingertips, line by line.", "is blind"),
    ("People must face {name} when they speak, so that their lips can be watched.", "is deaf"),
    ("Before each meal {name} measures the blood's sugar and sets a syringe.", "has diabetes"),
    ("Nothing gets {name} out of the ground floor since the lift broke, for wheels do not take stairs.", "cannot walk"),
    ("{name} drills, fills and pulls from nine to five, and tells the children to brush.", "works as a dentist"),
    ("When the alarm rings {name} slides down a pole and pulls on a heavy helmet.", "works as a firefighter"),
    ("{name} rises at two in the night so that the rolls are warm when the shop opens.", "works as a baker"),
    ("All night {name} writes down how the stars have moved.", "is an astronomer"),
    ("{name} announces to three hundred passengers that the descent has begun.", "flies planes for a living"),
    ("Cats make {name} sneeze until the eyes are swollen shut.", "has an allergy"),
    ("{name} crosses every bridge with closed eyes and lives on the lowest floor there was.", "fears heights"),
    ("Green apples and red ones look just alike to {name}.", "is colourblind"),
    ("The twins call {name} every Sunday to tell how their own babies are doing.", "has grandchildren"),
    ("{name} owns eleven hives behind the house and a veil by the door.", "is a beekeeper"),
)
TABLES = {"nonliteral_world": WORLD, "nonliteral_sense": SENSE}
TASK = (
    "Here is a long text. Afterwards comes a question about somebody in it.\n\n{context}\n\nQuestion: Who {asked}? "
    "Give only the name."
)
PREFIX = " Answer:"


@dataclass(frozen=True)
class NonliteralBuilder(PeopleInText):
    """One person in running text; a unit of size is a word.

    Attributes:
        table: Needles and questions.
    """

    table: Sequence[tuple[str, str]]
    smallest: int = 20
    probe: int = 2000

    def build(self, draw: random.Random, size: int, index: int) -> Draft:
        """Depths follow the golden ratio, so that any number of samples in a row covers them evenly."""
        depth = index * GOLDEN % 1.0
        needle, asked = draw.choice(self.table)
        name = draw.choice(self.people)
        sentences = self.text.sentences(size)
        cut = round(depth * len(sentences))
        hidden = needle.format(name=name)
        context = " ".join([*sentences[:cut], hidden, *sentences[cut:]])
        message = TASK.replace("{asked}", asked).replace("{context}", context)
        return Draft(message, PREFIX, (name,), (message.index(hidden),), depth)


def name_alone(answer: str, references: Sequence[str]) -> float:
    """Whether the answer's first line holds the name, and no other of the names that could have been hidden."""
    words = set(re.findall(r"\w+", answer.strip().split("\n")[0].lower()))
    return float(words & {person.lower() for person in PEOPLE} == {references[0].lower()})


def prepare(name: str, setting: Setting) -> NonliteralBuilder:
    """The builder of one test, over the caller's documents or the essays."""
    text = running_text(setting.haystack)
    return NonliteralBuilder(text, TABLES[name])


NONLITERAL_TASKS = {name: Task(name, 16, partial(prepare, name), name_alone) for name in TABLES}

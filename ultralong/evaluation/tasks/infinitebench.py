"""InfiniteBench's six synthetic tests (Zhang et al. 2024, arXiv 2402.13718), at any length.

Structure and wording are the official ones: the set for chat models (`gpt4`) with a chat template, the set for base
models (`yarn_mistral`) without, whose cues go into the answer prefix. Published sizes are those of 128K tokens; here
they follow the length. The official generators of code run, math find and math calc are not public: these follow the
paper and the published samples in structure, not in bytes.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import partial

from ultralong.evaluation.tasks.haystack import NOISE_LINE
from ultralong.evaluation.tasks.scoring import correct_prefix, first_integer, first_number, last_integer, whole_word
from ultralong.evaluation.tasks.task import Draft, Setting, Task
from ultralong.evaluation.tasks.texts import draw_uuid

PLACES = 59  # where the published passkeys stand: 0, 90, ..., 5220 of 5220 lines
KEY_PLACES = 500
CALLS = (2, 4, 6, 8, 10)  # functions that call each other in a row
HIDDEN = {
    "passkey": (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there.\n\n{context}\n\nWhat is the pass key?",
        "The pass key is {key}. Remember it. {key} is the pass key.\n",
        "\n\nThe pass key is",
    ),
    "number_string": (
        "There is an important info hidden inside a lot of irrelevant text. Find it. I will quiz you about the "
        "important information there.\n\n{context}\n\nWhat is the sequence of digits?",
        "The sequence of digits is {key}. Remember it. {key} is the sequence of digits.\n",
        "\n\nThe sequence of digits is",
    ),
}
# The set for base models words the passkey's task a little differently.
PLAIN_TASKS = {
    "passkey": (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about the important information.\n\n{context}\n\nWhat is the pass key?"
    )
}
ASKED = ("largest", "second largest", "third largest", "smallest", "second smallest", "third smallest", "median")


@dataclass(frozen=True)
class HiddenBuilder:
    """A number in repeated noise (passkey, number string); a unit of size is a line of noise."""

    kind: str
    chat: bool
    source: str = "repeated noise"
    smallest: int = 1
    probe: int = 50

    def build(self, draw: random.Random, size: int, index: int) -> Draft:
        """The number is at one of 59 evenly spaced places, in turn."""
        task, needle, cue = HIDDEN[self.kind]
        task = task if self.chat else PLAIN_TASKS.get(self.kind, task)
        digits = [str(draw.randint(0, 9)) for _ in range(5)]
        if self.kind == "number_string":
            for step in range(5):
                place = draw.randint(0, 5 + step - 1)
                digits.insert(place, digits[place])
        key = "".join(digits)
        depth = index % PLACES / (PLACES - 1)
        before = round(depth * size)
        line = f"{NOISE_LINE}\n"
        hidden = needle.replace("{key}", key)
        message = task.replace("{context}", line * before + hidden + line * (size - before))
        return Draft(message, "" if self.chat else cue, (key,), (message.index(hidden),), depth)


@dataclass(frozen=True)
class PairsBuilder:
    """Key-value retrieval from a JSON object of UUIDs; a unit of size is a pair."""

    source: str = "UUID pairs"
    smallest: int = 2
    probe: int = 30

    def build(self, draw: random.Random, size: int, index: int) -> Draft:
        """The pair asked for moves through the object with the sample's number, from the first to the last."""
        pairs = {draw_uuid(draw): draw_uuid(draw) for _ in range(size)}
        place = index % KEY_PLACES * size // KEY_PLACES
        key, value = list(pairs.items())[place]
        message = (
            "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
            f'{json.dumps(pairs)}\n\n\nKey: "{key}"\nThe value associated with the specified key is: '
        )
        return Draft(message, "", (value,), (message.index(f'"{key}"'),), place / max(size - 1, 1))


@dataclass(frozen=True)
class CodeBuilder:
    """Functions that call each other; a unit of size is a function."""

    chat: bool
    source: str = "generated functions"
    smallest: int = max(CALLS)
    probe: int = 40

    def build(self, draw: random.Random, size: int, index: int) -> Draft:
        """2, 4, 6, 8 or 10 functions in a row, in turn, each adding a constant to what the next returns."""
        levels = CALLS[index % len(CALLS)]
        width = size // levels
        numbers = draw.sample(range(1, 2 * size + 1), width * levels)
        groups = [numbers[level * width : (level + 1) * width] for level in range(levels)]
        steps: dict[int, tuple[int | None, int]] = {}
        for level, group in enumerate(groups):
            for number in group:
                callee = draw.choice(groups[level + 1]) if level + 1 < levels else None
                steps[number] = (callee, draw.randint(-12, 17))
        code = "\n\n".join(_function(number, *steps[number]) for number in sorted(steps))
        start, argument = draw.choice(groups[0]), draw.randint(-10, 10)
        chain, value = [], argument
        following: int | None = start
        while following is not None:
            chain.append(f"def func_{following}(x):")
            following, addend = steps[following]
            value += addend
        name, call = f"func_{start}", f"func_{start}({argument})"
        context = f"\nHere is the content of functions_module.py:\n\n{code}"
        if self.chat:
            message = (
                f"Following is a set of Python functions. There is a function called named {name}.\n\n"
                f"{context}\n\nPlease give me the exact number of the return value of {call}. Be concise. Your "
                "response must end with the final returned value."
            )
            cue = ""
        else:
            message = (
                f"There is a function called {name} in the following Python code.\n\n{context}\n\nPlease "
                f"compute the exact value of {call}."
            )
            cue = f" The value of {call} is"
        return Draft(message, cue, (str(value),), tuple(message.index(line) for line in chain))


def _function(number: int, callee: int | None, addend: int) -> str:
    inner = "x" if callee is None else f"func_{callee}(x)"
    tail = "" if addend == 0 else f" {'+' if addend > 0 else '-'} {abs(addend)}"
    return f"def func_{number}(x):\n    return {inner}{tail}"


@dataclass(frozen=True)
class FindBuilder:
    """One number asked of a long list; a unit of size is a number."""

    source: str = "numbers"
    smallest: int = 40
    probe: int = 400

    def build(self, draw: random.Random, size: int, index: int) -> Draft:
        """Largest, second, third, smallest, second, third, median, in turn; ranks are of different values."""
        asked = ASKED[index % len(ASKED)]
        low = draw.randint(0, 19) if "smallest" in asked else 0
        high = draw.randint(79, 99) if "largest" in asked else 99
        numbers = [draw.randint(low, high) for _ in range(size)]
        values = sorted(set(numbers), reverse="largest" in asked)
        if asked == "median":
            ordered = sorted(numbers)
            twice = ordered[(size - 1) // 2] + ordered[size // 2]
            answer = str(twice // 2) if twice % 2 == 0 else str(twice / 2)
        else:
            answer = str(values[{"second": 1, "third": 2}.get(asked.split()[0], 0)])
        message = (
            f"What is the {asked} number in the following list?\n\n{numbers}\n\nYou should answer with only one "
            f"number, no other words. The {asked} number of the list is: "
        )
        return Draft(message, "", (answer,))


@dataclass(frozen=True)
class CalcBuilder:
    """All intermediate values of a long sum; a unit of size is a number. The answer is as long as the question."""

    setting: Setting
    source: str = "numbers"
    smallest: int = 3
    probe: int = 100

    def build(self, draw: random.Random, size: int, index: int) -> Draft:
        """Plus and minus equally often, every value between 0 and 99; the answer starts with the first number."""
        value = draw.randint(0, 99)
        terms, values = [str(value)], [value]
        for _ in range(size - 1):
            plus = draw.random() < 0.5
            step = draw.randint(0, 99 - value if plus else value)
            value += step if plus else -step
            terms.append(f"{'+' if plus else '-'} {step}")
            values.append(value)
        expression = " ".join(terms)
        if self.setting.chat:
            message = f"Compute the intermediate values in the following long expression.\n\n{expression}"
        else:
            message = (
                "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: "
                "[1, 4, 8]\n\nExpression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: "
                f"{expression}"
            )
        answer = self.setting.tokenizer(str(values), add_special_tokens=False, verbose=False)["input_ids"]
        return Draft(
            message,
            "" if self.setting.chat else "\nValues:",
            tuple(str(value) for value in values),
            max_new_tokens=len(answer),
        )


INFINITEBENCH_TASKS = {
    task.name: task
    for task in (
        Task("infinitebench_passkey", 6, lambda setting: HiddenBuilder("passkey", setting.chat), first_integer),
        Task(
            "infinitebench_number_string",
            12,
            lambda setting: HiddenBuilder("number_string", setting.chat),
            first_integer,
        ),
        Task("infinitebench_kv_retrieval", 50, lambda setting: PairsBuilder(), whole_word),
        Task(
            "infinitebench_code_run", 5, lambda setting: CodeBuilder(setting.chat), last_integer, capability="multi-hop"
        ),
        Task("infinitebench_math_find", 3, lambda setting: FindBuilder(), first_number, capability="aggregation"),
        Task("infinitebench_math_calc", 0, partial(CalcBuilder), correct_prefix, capability="reasoning"),
    )
}

"""Short names for many tests at once, and which family a test's score is averaged in."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from ultralong.evaluation.tasks.babilong_style import BABILONG_STYLE_TASKS
from ultralong.evaluation.tasks.infinitebench import INFINITEBENCH_TASKS
from ultralong.evaluation.tasks.nonliteral import NONLITERAL_TASKS
from ultralong.evaluation.tasks.own import own_task as own
from ultralong.evaluation.tasks.published import INFINITEBENCH_PUBLISHED, LEVELS, LONGBENCH_TASKS, LVEVAL_TASKS
from ultralong.evaluation.tasks.reported import (
    GRAPHWALKS_TASKS,
    JSON_KV_TASK,
    MRCR_STYLE_TASKS,
    OOLONG_STYLE_TASKS,
    REPORTED_TASKS,
)
from ultralong.evaluation.tasks.ruler import RULER_TASKS
from ultralong.evaluation.tasks.samples import find_task

# Measured by other means than samples and answers: a grid, losses, lm-eval.
SPECIAL = ("needle", "perplexity", "longppl", "loss", "lm_eval")
RENAMED_GROUPS = {"facts": "babilong_style", "standard": "lm_eval"}  # as version 0.3 called them
GROUPS: dict[str, tuple[str, ...]] = {
    "ruler": tuple(RULER_TASKS),
    "niah": tuple(name for name in RULER_TASKS if name.startswith("niah")),
    "infinitebench": (*INFINITEBENCH_TASKS, *INFINITEBENCH_PUBLISHED),
    "infinitebench_synthetic": tuple(INFINITEBENCH_TASKS),
    "infinitebench_published": tuple(INFINITEBENCH_PUBLISHED),
    "babilong_style": tuple(BABILONG_STYLE_TASKS),
    "nonliteral": tuple(NONLITERAL_TASKS),
    "reported": tuple(REPORTED_TASKS),
    "graphwalks": tuple(GRAPHWALKS_TASKS),
    "mrcr_style": tuple(MRCR_STYLE_TASKS),
    "oolong_style": tuple(OOLONG_STYLE_TASKS),
    "longbench": tuple(LONGBENCH_TASKS),
    "lveval": tuple(LVEVAL_TASKS),
    **{f"lveval_{level}": tuple(name for name in LVEVAL_TASKS if name.endswith(f"_{level}")) for level in LEVELS},
}
FAMILIES = {
    **dict.fromkeys(RULER_TASKS, "RULER"),
    **dict.fromkeys(GROUPS["infinitebench"], "InfiniteBench"),
    **dict.fromkeys(BABILONG_STYLE_TASKS, "BABILong-style"),
    **dict.fromkeys(NONLITERAL_TASKS, "non-literal needle"),
    **dict.fromkeys(GRAPHWALKS_TASKS, "GraphWalks"),
    JSON_KV_TASK.name: "json_kv (HELMET)",
    **dict.fromkeys(MRCR_STYLE_TASKS, "MRCR-style"),
    **dict.fromkeys(OOLONG_STYLE_TASKS, "OOLONG-style"),
    **{name: "LongBench v2" if name == "longbench_v2" else "LongBench Pro" for name in LONGBENCH_TASKS},
    **{name: f"LV-Eval {name.rsplit('_', 1)[1]}" for name in LVEVAL_TASKS},
}
# The names under which people keep the published files.
QUESTION_FILES = {
    "ruler_qa_squad": ("dev-v2.0.json", "squad_dev-v2.0.json", "dev-v1.1.json", "squaddev_v1.1.json"),
    "ruler_qa_hotpot": ("hotpot_dev_distractor_v1.json",),
}


def expand(words: Iterable[str]) -> list[str]:
    """Names of tests for names of tests and groups, each once, in order; files of questions with their digest.

    Args:
        words: Names, groups, or several joined by commas.

    Raises:
        ValueError: None at all, one that is neither, or a file with wrong lines.
    """
    names: list[str] = []
    for given in (part.strip() for text in words for part in text.split(",")):
        word = RENAMED_GROUPS.get(given, given)
        if word != given:
            warnings.warn(f"{given} is called {word} now; the old name will go.", stacklevel=2)
        if word in GROUPS:
            names += GROUPS[word]
        elif word in SPECIAL:
            names.append(word)
        elif own.is_file(word):
            names.append(own.pinned(word))
        elif own.is_own(word):
            raise ValueError(
                f"{word} is a test of a file: name the file, such as folder/{word[len(own.PREFIX) :]}.jsonl."
            )
        elif word:
            try:
                names.append(find_task(word).name)
            except ValueError as error:
                raise ValueError(f"{error} Groups: {', '.join((*GROUPS, *SPECIAL))}.") from error
    if not names:
        raise ValueError(f"No test was named. Groups: {', '.join((*GROUPS, *SPECIAL))}.")
    own.files_of(names)  # no two of one name
    return list(dict.fromkeys(names))


def find_questions(task: str, data: Path | None) -> Path | None:
    """Where the published questions of a test lie, for `make_samples`.

    Args:
        task: Name of the test.
        data: Folder of published data at any depth, or `package`; None leaves it to the test.

    Raises:
        ValueError: There is no such folder, or it does not hold what the test asks.
    """
    if task not in QUESTION_FILES and not re.match("lveval_|infinitebench_|longbench_", task):
        return None
    if data is None or data == Path("package"):
        return data if task == "ruler_qa_squad" else None
    if not data.exists():
        raise ValueError(f"There is no folder {data} of published data.")
    if task not in QUESTION_FILES:
        return data
    for name in QUESTION_FILES[task]:
        if (found := min(data.rglob(name), default=None)) is not None:
            return found
    raise ValueError(f"{data} holds none of {', '.join(QUESTION_FILES[task])}, which {task} asks from.")

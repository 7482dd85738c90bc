"""The thirteen tests by lm-eval's names, each with its answer budget and score."""

from __future__ import annotations

from functools import partial

from ultralong.evaluation.tasks.ruler import counting, niah, questions, tracking
from ultralong.evaluation.tasks.ruler.niah import NiahKind
from ultralong.evaluation.tasks.scoring import match_all, match_part
from ultralong.evaluation.tasks.task import Task

NIAH = {
    "niah_single_1": NiahKind("noise", "words", "numbers"),
    "niah_single_2": NiahKind("essay", "words", "numbers"),
    "niah_single_3": NiahKind("essay", "words", "uuids"),
    "niah_multikey_1": NiahKind("essay", "words", "numbers", key_count=4),
    "niah_multikey_2": NiahKind("needle", "words", "numbers"),
    "niah_multikey_3": NiahKind("needle", "uuids", "uuids"),
    "niah_multivalue": NiahKind("essay", "words", "numbers", value_count=4),
    "niah_multiquery": NiahKind("essay", "words", "numbers", key_count=4, query_count=4),
}
RULER_TASKS = {
    task.name: task
    for task in (
        *(Task(name, 128, partial(niah.prepare, kind), match_all) for name, kind in NIAH.items()),
        Task("ruler_vt", 30, tracking.prepare, match_all),
        Task("ruler_cwe", 120, counting.prepare_common, match_all),
        Task("ruler_fwe", 50, counting.prepare_coded, match_all),
        Task("ruler_qa_squad", 32, partial(questions.prepare, "squad"), match_part),
        Task("ruler_qa_hotpot", 32, partial(questions.prepare, "hotpot"), match_part),
    )
}

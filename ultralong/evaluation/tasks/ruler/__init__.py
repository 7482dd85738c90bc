"""RULER's thirteen tests (Hsieh et al. 2024, arXiv 2404.06654), without a ceiling on length.

Wording, structure and scores are NVIDIA's; names are lm-eval's. What differs, so that every length works and every
sample can be made alone:

* the size of a prompt is found by arithmetic instead of growing it step by step, and fills at least 97% of the limit;
* sentences are split by a rule of our own, because NLTK's model does not come with a package;
* a haystack starts again when it runs out, as in NVIDIA's current code (lm-eval's stops growing);
* in the question tasks, documents that hold the answer are never repeated, and their depth is drawn again for every
  sample (NVIDIA's fixed shuffle puts all of them at one depth);
* worked examples stand in the user's turn, also with a chat template.
"""

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
        Task("ruler_vt", 30, tracking.prepare, match_all, capability="multi-hop"),
        Task("ruler_cwe", 120, counting.prepare_common, match_all, capability="aggregation"),
        Task("ruler_fwe", 50, counting.prepare_coded, match_all, capability="aggregation"),
        Task("ruler_qa_squad", 32, partial(questions.prepare, "squad"), match_part, capability="question answering"),
        Task("ruler_qa_hotpot", 32, partial(questions.prepare, "hotpot"), match_part, capability="question answering"),
    )
}

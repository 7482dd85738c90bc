"""Tests that are reported beside RULER in 2026, generated here at any length.

Graphs, keys and values, co-reference in a conversation, aggregation over a diary. Structure, answer form and score are
those published; the wording and every text are our own, so scores compare between models here and not with published
tables. Each module names its source.
"""

from __future__ import annotations

from ultralong.evaluation.tasks.reported.graphwalks import GRAPHWALKS_TASKS
from ultralong.evaluation.tasks.reported.json_kv import JSON_KV_TASK
from ultralong.evaluation.tasks.reported.mrcr_style import MRCR_STYLE_TASKS
from ultralong.evaluation.tasks.reported.oolong_style import OOLONG_STYLE_TASKS
from ultralong.evaluation.tasks.task import Task

REPORTED_TASKS: dict[str, Task] = {
    **GRAPHWALKS_TASKS,
    JSON_KV_TASK.name: JSON_KV_TASK,
    **MRCR_STYLE_TASKS,
    **OOLONG_STYLE_TASKS,
}

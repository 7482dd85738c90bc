"""The plan of packed rows against what an H200 measured."""

import pytest
from test_env import ROOT

from ultralong.bench.results import read_rows
from ultralong.bench.training.case import RowCount, TrainingCase
from ultralong.bench.training.measure import train_config
from ultralong.bench.training.work import prepare_training
from ultralong.planner import plan
from ultralong.training.config import MemoryConfig
from ultralong.utils import settings

ROWS = read_rows(ROOT / "notebooks/results/packed_h200.json")


@pytest.mark.parametrize("row", ROWS, ids=[row["kernel"] for row in ROWS])
def test_packed_rows_are_planned_within_5_percent(tmp_path, row):
    """At 1,536 a matrix product runs at less than between its neighbours, and documents on cuDNN side by side."""
    memory = settings.from_mapping(MemoryConfig, row["memory"])
    case = TrainingCase(
        f"Qwen/{row['model']}",
        row["tokens"],
        sharded=True,
        kernel=row["kernel"],
        documents=row["documents"],
        memory=memory,
    )
    made = prepare_training(tmp_path, case.model, None, [case.tokens], False, case.edges)
    said = plan(train_config(case, made, tmp_path / "run", (RowCount(case.tokens, 1),)), 1, machine="h200").to_dict()
    assert said["planned_seconds_per_step"] == pytest.approx(row["seconds_per_step"], rel=0.05)
    assert said["planned_seconds_per_step"] == pytest.approx(row["plan_now"]["seconds_per_step"], rel=0.005)
    assert said["planned_peak_gpu_gib"] == pytest.approx(row["peak_gpu_gib"], rel=0.01)

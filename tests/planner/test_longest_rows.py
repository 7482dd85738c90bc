"""The longest row that fits a GPU: no longer one does, by a plan of that length itself."""

import pytest

from ultralong.bench.compare import case_name
from ultralong.bench.results import read_rows
from ultralong.bench.training.longest_rows import bench_longest, longest_table, run_of
from ultralong.planner import autotune, plan
from ultralong.planner.autotune import autotune_memory, longest_row
from ultralong.planner.growth import Growth
from ultralong.planner.machine import load_machine
from ultralong.planner.memory import gpu_total
from ultralong.planner.planner import planned_workload
from ultralong.training.config import MemoryConfig
from ultralong.utils.settings import from_mapping
from ultralong.utils.units import GIB

MODEL = "HuggingFaceTB/SmolLM2-135M"
CARDS = (0.5, 8.0, 16.0)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("longest") / "rows.json"
    bench_longest([MODEL], CARDS, 8.0, path)
    return path


def test_the_longest_row_fits_and_a_longer_one_does_not(monkeypatch):
    monkeypatch.setattr(autotune, "EVERY", (4,))
    workload = planned_workload(run_of(MODEL, False, 3), 1, load_machine("h200"), 65536)
    found = longest_row(workload, 6.0 * GIB, None, step=65536)
    assert found.tokens > 65536
    assert gpu_total(found) <= 6.0 * GIB
    assert not any(found.placed[1:]), "nothing is offloaded without host memory"
    longer = Growth(workload).at(found.tokens + 65536)
    assert gpu_total(longer.with_memory(autotune_memory(longer, 6.0 * GIB, None))) > 6.0 * GIB
    assert longest_row(workload, 0.5 * GIB, None) is None


@pytest.mark.soak
def test_recorded_rows_are_what_a_plan_of_them_says(recorded):
    whole = {row["gpu_memory_gib"]: row for row in read_rows(recorded) if not row["trained"].startswith("LoRA")}
    assert whole[0.5]["planned_tokens"] == 0
    assert whole[16.0]["planned_tokens"] > 1.5 * whole[8.0]["planned_tokens"] > 0
    row = whole[8.0]
    assert row["planned_total_gpu_gib"] <= 8.0
    assert row["planned_host_gib"] <= 8.0
    config = run_of(MODEL, False, 3)
    config = type(config)(**{**vars(config), "memory": from_mapping(MemoryConfig, row["memory"])})
    found = plan(config, 1, tokens=row["planned_tokens"], gpu_memory=8.0, host_memory=64.0).to_dict()
    assert found["planned_total_gpu_gib"] == pytest.approx(row["planned_total_gpu_gib"], rel=0.03), "read off a line"
    workload = planned_workload(run_of(MODEL, False, 3), 1, load_machine("h200"), 65536)
    few = longest_row(workload, row["planned_total_gpu_gib"] * GIB * 1.001, 8.0 * GIB)
    assert few.tokens == row["planned_tokens"]
    assert longest_row(workload, row["planned_total_gpu_gib"] * GIB * 0.995, 8.0 * GIB).tokens < few.tokens


@pytest.mark.soak
def test_cases_differ_and_stand_in_a_table(recorded):
    rows = read_rows(recorded)
    assert len({case_name(row) for row in rows}) == len(rows) == 6
    lines = longest_table([{"rows": rows}])
    assert lines[0] == "| model | trained | 0.5 GiB | 8 GiB | 16 GiB |"
    assert lines[2].startswith("| SmolLM2-135M | all, AdamW in 8 bits | none | ")
    assert [line.count("|") for line in lines] == [6] * 4

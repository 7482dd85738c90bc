"""Faults and hostile inputs: the recorded table, and in soak every trial again on the present code."""

import subprocess
import sys
from pathlib import Path

import pytest

from ultralong.bench.checkpoints.tables import faults_table
from ultralong.utils.files import read_json

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "notebooks" / "results" / "faults.json"


def test_no_recorded_fault_is_there_now():
    rows = read_json(RECORDED)["rows"]
    assert {row["after"] for row in rows} == {"holds"}
    assert {row["kind"] for row in rows} >= {"H", "I"}
    lines = faults_table([{"rows": rows}])
    assert len(lines) == len(rows) + 2
    assert all(line.count("|") == 5 for line in lines)


@pytest.mark.soak
def test_every_trial_holds(tmp_path):
    """About four minutes: each trial's command is forked from one process that has imported the library."""
    words = [sys.executable, "-m", "tests.support.fault_trials", sys.executable, "--json", str(tmp_path / "out.json")]
    subprocess.run(words, cwd=ROOT, check=True)
    found = {row["input"]: row["after_seen"] for row in read_json(tmp_path / "out.json")["rows"]}
    faults = [row["input"] for row in read_json(tmp_path / "out.json")["rows"] if row["after"] == "fault"]
    assert not faults, [found[name] for name in faults]

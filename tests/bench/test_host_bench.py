"""Everything asked of a host of several GPUs: the steps are commands that exist, and what is done is not done again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ultralong import cli
from ultralong.bench import host
from ultralong.bench.attention import measure as measuring
from ultralong.bench.host import bench_host, summary
from ultralong.bench.host_options import HostBench, commands
from ultralong.bench.tables import host_table
from ultralong.bench.training import measure as training
from ultralong.bench.training import tables


def test_eight_gpus_are_asked_for_everything(monkeypatch, tmp_path):
    asked = []
    row = {"seconds_per_step": 1.0}
    monkeypatch.setattr(measuring, "bench_attention", lambda options, path: asked.append(options) or [])
    monkeypatch.setattr(training, "measure_training", lambda case, machine, folder: asked.append(case) or row)
    monkeypatch.setattr(tables, "measured_line", str)
    steps = commands(HostBench(8, tmp_path))
    assert list(steps) == ["train_1m", "train_4m", "attention_8", "attention_4", "attention_2"]
    for words in steps.values():
        cli.main([*words, "--json", str(tmp_path / "rows.json")])
    one, four, *attention = asked
    assert (one.tokens, one.gpus, one.sharded, one.fit, one.state_precision) == (2**20, 8, True, True, "float32")
    assert (four.tokens, four.state_precision) == (2**22, "8bit")
    assert [options.ranks for options in attention] == [8, 4, 2]
    assert [options.meshes for options in attention] == [("2x4", "4x2"), ("2x2",), ()]
    assert all(options.documents and options.kernels == ("flash4", "cudnn") for options in attention)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"gpus": 3}, "power of two"),
        ({"gpus": 1}, "power of two"),
        ({"gpus": 4, "minutes": 0}, "minutes"),
        ({"gpus": 4, "only": ("train_8m",)}, "There is no step train_8m"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, wrong, said):
    with pytest.raises(ValueError, match=said):
        HostBench(**{"out": tmp_path, **wrong})


def test_a_step_that_fails_is_recorded_and_tried_again(monkeypatch, tmp_path, capfd):
    wanted = HostBench(2, tmp_path, rehearse=True)
    broken, ran = {"train_4m"}, []

    def fake(words, **options):
        name = Path(words[-1]).stem.removeprefix("rehearsal_2_")
        ran.append(name)
        assert not Path(words[-1]).exists(), "rows of a try that failed would stay"
        row = {"seconds_per_step": 2.0, "planned_seconds_per_step": 1.0, "tokens_per_second_per_gpu": 5.0, "tflops": 1}
        failed = name in broken
        noted = {"note": "ModuleNotFoundError: torchao"} if len(ran) == 4 else row
        Path(words[-1]).write_text(json.dumps({"rows": [noted]}))
        return host.subprocess.CompletedProcess(words, int(failed), "", "out of memory" if failed else "")

    monkeypatch.setattr(host.subprocess, "run", fake)
    records = bench_host(wanted)
    assert [record["done"] for record in records] == [True, False, True]
    lines = summary(records, tmp_path)
    assert lines[0] == "train_1m: 2.0 s a step (planned 1.0), 5 tokens/s per GPU"
    assert lines[1].endswith("out of memory")
    broken.clear()
    noted = bench_host(wanted)[1]
    assert (noted["done"], noted["said"].strip()) == (False, "ModuleNotFoundError: torchao")
    assert all(record["done"] for record in bench_host(wanted))
    assert ran == ["train_1m", "train_4m", "attention_2", "train_4m", "train_4m"]
    kept = json.loads((tmp_path / "rehearsal_2.json").read_text())
    assert kept["settings"]["gpus"] == 2
    assert len(kept["steps"]) == 3
    assert "train_4m: ultralong bench train" in capfd.readouterr().err


def test_a_step_beyond_its_time_is_ended(monkeypatch, tmp_path):
    endless = ["-c", "import time; print('began', flush=True); time.sleep(60)"]
    monkeypatch.setattr(host, "commands", lambda wanted: {"slow": endless})
    real = host.subprocess.run
    monkeypatch.setattr(host.subprocess, "run", lambda words, **options: real([words[0], *endless], **options))
    (record,) = bench_host(HostBench(2, tmp_path, minutes=0.02))
    assert not record["done"]
    assert record["said"].endswith("ended after 0.02 minutes")
    assert record["seconds"] < 30


def test_the_table_has_a_line_for_each_scheme():
    row = {"name": "hybrid-ring 2x4", "kernel": "flash4", "tokens": 131072, "packed": True, "ranks": 8}
    recorded = {
        "rows": [
            {**row, "tflops": 512.4, "of_one": 0.8123},
            {**row, "tflops": None},
            {**row, "ranks": 1, "tflops": 9.0},
        ]
    }
    assert host_table([]) == []
    assert host_table([recorded])[2:] == ["| 8 | 131,072 | packed | flash-attn 4 | hybrid-ring 2x4 | 512 | 81.2% |"]


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rehearsal_runs_every_step_on_this_machine(tmp_path, ranks):
    records = bench_host(HostBench(ranks, tmp_path, rehearse=True))
    records = [record for record in records if "torchao" not in record.get("said", "")]  # where it is not installed
    assert len(records) >= 2
    assert all(record["done"] for record in records), records
    for record in records:
        rows = json.loads((tmp_path / record["file"]).read_text())["rows"]
        assert all("seconds_per_step" in row or row["tflops"] or "heads" in row["note"] for row in rows)

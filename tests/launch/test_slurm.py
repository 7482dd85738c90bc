"""The rendered job in a real Slurm of two hosts: it starts, goes back into the queue, resumes, and ends."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import train_over
from safetensors.torch import load_file
from slurm_cluster import installed, slurm_cluster
from tiny_run import make_run

from ultralong.launch import launch
from ultralong.training.config import ParallelConfig, TrainConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not installed(), reason="needs slurm-wlm and munge, and to be root"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    # The path of munge's socket has to be short.
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "c") as environment:
        yield environment


class Job:
    """A submitted run and what Slurm says of it."""

    def __init__(self, folder: Path, environment: dict[str, str], run: TrainConfig) -> None:
        self.folder, self.out = folder, folder / run.out
        launch(run, 2, 1, "slurm", folder / "scripts")
        self.environment = environment | {
            "PARTITION": "gpu", "TIME_LIMIT": "1:00:00", "PYTHON": sys.executable, "WORKDIR": str(folder),
            "NCCL_SOCKET_IFNAME": "lo", "LOCAL_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "RESTART_DELAY": "1",
        }  # fmt: skip
        said = self.command(str(folder / "scripts" / "submit.sh"), "--parsable")
        self.number = said.strip().splitlines()[-1]

    def command(self, *words: str) -> str:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def state(self) -> str:
        return self.command("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={self.number}").strip()

    def log(self) -> str:
        path = self.folder / "scripts" / "logs" / f"slurm-{self.number}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def steps(self) -> int:
        path = self.out / "log.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wait(self, condition, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{self.state()}\n{self.log()}"
            time.sleep(0.2)


def test_a_job_is_requeued_before_its_end_and_resumes_to_the_bit(
    tmp_path, tiny_model, tiny_tokenizer, cluster, monkeypatch
):
    run = make_run(
        tmp_path, tiny_model, tiny_tokenizer, steps=80, save_every=80,
        parallel=ParallelConfig(context_parallel_size=2),
    )  # fmt: skip
    job = Job(tmp_path, cluster, run)
    job.wait(lambda: job.steps() >= 8)  # far from a step that is saved without being asked
    job.command("scancel", "--batch", "--signal=USR1", job.number)
    job.wait(lambda: "back into the queue, to resume from ./run/checkpoints/step-" in job.log(), 60)
    job.wait(lambda: job.state() == "COMPLETED")
    monkeypatch.chdir(tmp_path)
    assert_as_if_left_alone(job, run)


def assert_as_if_left_alone(job: Job, run: TrainConfig) -> None:
    """Every step is in the log, in order, and the weights are those of a run that nothing stopped; from its folder."""
    records = [json.loads(line) for line in (job.out / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, run.steps + 1))
    train_over(replace(run, out="left-alone"), 2)
    weights, expected = (load_file(Path(out, "model", "model.safetensors")) for out in (job.out, "left-alone"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_job_that_the_site_requeues_loses_no_step(tmp_path, tiny_model, tiny_tokenizer, cluster, monkeypatch):
    """As an administrator does it, or a preemption: no signal comes before."""
    run = make_run(
        tmp_path, tiny_model, tiny_tokenizer, steps=40, save_every=40,
        parallel=ParallelConfig(context_parallel_size=2),
    )  # fmt: skip
    job = Job(tmp_path, cluster, run)
    job.wait(lambda: job.steps() >= 8)
    seen = job.steps()
    job.command("scontrol", "requeue", job.number)
    job.wait(lambda: any((job.out / "checkpoints").glob("step-*/state.json")), 60)
    (saved,) = (job.out / "checkpoints").glob("step-*")
    assert int(saved.name.removeprefix("step-")) >= seen
    job.wait(lambda: job.state() == "COMPLETED", 600)  # Slurm holds a job back after that for two minutes
    monkeypatch.chdir(tmp_path)
    assert_as_if_left_alone(job, run)


def test_a_job_without_a_checkpoint_is_not_requeued_for_ever(tmp_path, tiny_model, tiny_tokenizer, cluster):
    run = make_run(
        tmp_path, tiny_model, tiny_tokenizer, steps=5000, save_every=5000,
        parallel=ParallelConfig(context_parallel_size=2),
    )  # fmt: skip
    job = Job(tmp_path, cluster | {"ATTEMPTS": "1"}, run)
    for start in range(2):
        job.wait(lambda at=start: job.log().count("allocator of GPU memory") == 2 * (at + 1))
        job.command("scancel", "--batch", "--signal=USR1", job.number)
        if start == 0:
            job.wait(lambda: "back into the queue, to resume from the start" in job.log(), 60)
    job.wait(lambda: job.state() == "FAILED", 60)
    assert "2 allocations in a row left no new checkpoint: not requeued." in job.log()


def test_a_cancelled_job_stays_cancelled(tmp_path, tiny_model, tiny_tokenizer, cluster):
    run = make_run(
        tmp_path, tiny_model, tiny_tokenizer, steps=5000, save_every=5000,
        parallel=ParallelConfig(context_parallel_size=2),
    )  # fmt: skip
    job = Job(tmp_path, cluster, run)
    job.wait(lambda: job.steps() >= 6)
    job.command("scancel", job.number)
    job.wait(lambda: job.state() == "CANCELLED", 60)
    job.wait(lambda: (job.out / "checkpoints" / f"step-{job.steps():07d}").exists(), 30)  # its last step, saved
    time.sleep(3)
    assert job.state() == "CANCELLED"
    assert "back into the queue" not in job.log()

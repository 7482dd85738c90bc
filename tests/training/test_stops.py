"""Runs that are stopped from outside, folders that are in use, and resuming what is finished."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import train_over
from kill_trials import kill_trials
from safetensors.torch import load_file
from tiny_run import make_run
from torch import equal

from ultralong.cli import main
from ultralong.training import loop, save_pace
from ultralong.training.config import DataSource, ParallelConfig
from ultralong.training.loop import train
from ultralong.training.preflight import preflight
from ultralong.training.run_folder import RunFolder
from ultralong.training.save_pace import SavePace
from ultralong.utils import settings
from ultralong.utils.files import is_locked, locked, read_json, read_jsonl, write_json


@pytest.fixture
def run(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_run(tmp_path, tiny_model, tiny_tokenizer, save_every=2)


def processes_of(mark: str) -> list[int]:
    """Live processes whose command line holds a mark."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile
            continue
        if entry.name.isdigit() and any(mark.encode() in word for word in words):
            found.append(int(entry.name))
    return found


def wait_for(condition, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="the system's word for the death of a parent is Linux's")
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.soak), signal.SIGKILL]
)
def test_ranks_end_with_the_command_that_started_them(run, tmp_path, number):
    """However it ends; and the folder is free for the run's resumption at once."""
    if signal.getsignal(number) is signal.SIG_IGN:  # under nohup, which the command would inherit
        signal.signal(number, signal.SIG_DFL)
    name = f"long-{os.getpid()}-{int(number)}"  # what the ranks' command lines are known by
    settings.save(replace(run, steps=100_000, save_every=0, out=name), f"{name}.yaml")
    log = Path(name, "log.jsonl")
    words = [sys.executable, "-m", "ultralong", "train", f"{name}.yaml", "--processes", "2", "--quiet"]
    # The command gives its ranks a copy of the settings in the folder for temporary files.
    scratch = tmp_path / f"scratch-{name}"
    scratch.mkdir()
    command = subprocess.Popen(words, env={**os.environ, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"})
    wait_for(lambda: log.exists() and len(log.read_bytes()) > 0, 120)
    assert len(processes_of(f"scratch-{name}")) >= 3  # an agent and two ranks
    assert is_locked(name)
    command.send_signal(number)
    code = command.wait(60)
    assert code == (-9 if number == signal.SIGKILL else 128 + number)
    wait_for(lambda: not processes_of(f"scratch-{name}"), 40)
    wait_for(lambda: not is_locked(name), 20)
    length = log.stat().st_size
    if number != signal.SIGKILL:  # the last step that was made is saved
        (saved,) = Path(name, "checkpoints").iterdir()
        assert saved.name == f"step-{read_jsonl(log)[-1]['step']:07d}"
    time.sleep(0.5)
    assert log.stat().st_size == length


def asked_in(monkeypatch, name: str, number: int, at: int) -> None:
    """Send this process a signal, twice, when the loop comes to a function for the given time."""
    holder, attribute = {"step": (loop, "training_step"), "save": (loop.checkpoint, "save")}[name]
    real, calls = getattr(holder, attribute), []

    def asked(*given):
        calls.append(given)
        if len(calls) == at:
            signal.raise_signal(number)
            signal.raise_signal(number)
        return real(*given)

    monkeypatch.setattr(holder, attribute, asked)


@pytest.mark.parametrize(
    ("number", "moment", "at", "saved"),
    [
        (signal.SIGTERM, "step", 2, "step-0000002"),
        (signal.SIGUSR1, "save", 1, "step-0000003"),  # saved every 3 steps: no other step is made after it
    ],
)
def test_a_run_that_is_asked_to_stop_saves_first(run, number, moment, at, saved, monkeypatch, capsys):
    """The step is finished and saved, and the resumed run ends as one that was left alone."""
    run = replace(run, save_every=3, steps=4, async_checkpoints=moment == "save")
    train(replace(run, out="alone", async_checkpoints=False), quiet=True)
    with monkeypatch.context() as patch:
        asked_in(patch, moment, number, at)
        with pytest.raises(SystemExit) as left:
            train(run, quiet=True)
    assert left.value.code == 128 + number
    assert signal.getsignal(number) is signal.SIG_DFL
    assert [path.name for path in Path("run/checkpoints").iterdir()] == [saved]
    assert read_json("run/stopped.json") == {
        "state": "interrupted", "reason": f"stopped by {number.name}", "processes": 1, "hosts": 1
    }  # fmt: skip
    said = f"note: stopped by {number.name} after step {saved[-1]}, which is saved in run/checkpoints/{saved}."
    assert said in capsys.readouterr().err
    train(run, quiet=True, resume=True)
    for name, x in load_file("alone/model/model.safetensors").items():
        assert equal(x, load_file("run/model/model.safetensors")[name])
    logs = [[(r["step"], r["loss"]) for r in read_jsonl(f"{out}/log.jsonl")] for out in ("alone", "run")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("moment", ["step", "save"])
def test_a_run_that_is_asked_to_stop_in_its_last_step_ends_as_it_would_have(run, moment, monkeypatch):
    asked_in(monkeypatch, moment, signal.SIGTERM, {"step": 2, "save": 1}[moment])
    assert train(replace(run, steps=2), quiet=True).steps == 2
    assert Path("run/result.json").exists()
    assert not Path("run/stopped.json").exists()


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="finds its ranks in /proc")
def test_a_rank_that_waits_in_vain_is_killed_by_its_agent(run):
    """It noted the signal and can't come to look; torchrun's SIGKILL follows 30 seconds after it."""
    settings.save(replace(run, steps=100_000, save_every=0), "run.yaml")
    words = ["-m", "ultralong.launch.agent", str(os.getpid()), "2", "train", f"{Path.cwd()}/run.yaml", "--quiet"]
    agent = subprocess.Popen([sys.executable, *words], env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for(lambda: Path("run/log.jsonl").exists(), 120)
    ranks = sorted(pid for pid in processes_of(f"{Path.cwd()}/run.yaml") if pid != agent.pid)
    os.kill(ranks[0], signal.SIGSTOP)  # alive, and in no collective: the other one waits for it
    time.sleep(1)
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(60) == 128 + signal.SIGTERM
    wait_for(lambda: not processes_of(f"{Path.cwd()}/run.yaml"), 20)


@pytest.mark.soak
def test_one_rank_that_is_asked_to_stop_stops_all_after_a_checkpoint(run, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    settings.save(replace(run, steps=100_000, save_every=0), "run.yaml")
    words = ["-m", "ultralong.launch.agent", str(os.getpid()), "2", "train", f"{Path.cwd()}/run.yaml", "--quiet"]
    agent = subprocess.Popen(
        [sys.executable, *words], env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": f"{temporary}"}
    )
    wait_for(lambda: Path("run/log.jsonl").exists(), 120)
    ranks = [pid for pid in processes_of(f"{Path.cwd()}/run.yaml") if pid != agent.pid]
    os.kill(max(ranks), signal.SIGTERM)
    assert agent.wait(60) == 128 + signal.SIGTERM
    assert not [path for path in temporary.iterdir() if not path.name.startswith("torchinductor")], (
        "its own cache stays"
    )
    (saved,) = Path("run/checkpoints").iterdir()
    assert int(saved.name.removeprefix("step-")) == read_jsonl("run/log.jsonl")[-1]["step"]


def test_a_rank_ends_when_its_agent_is_killed(run, tmp_path):
    settings.save(replace(run, steps=100_000, save_every=0), "run.yaml")
    words = ["-m", "ultralong.launch.agent", str(os.getpid()), "2", "train", f"{Path.cwd()}/run.yaml", "--quiet"]
    agent = subprocess.Popen(
        [sys.executable, *words], env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": f"{tmp_path}"}
    )
    wait_for(lambda: Path("run/log.jsonl").exists(), 120)
    agent.kill()
    agent.wait()
    wait_for(lambda: not processes_of(f"{Path.cwd()}/run.yaml"), 20)
    wait_for(lambda: not is_locked("run"), 20)
    assert read_jsonl("run/log.jsonl")[0]["step"] == 1, "what was logged before is still there"


def hold(folder: str, ready, done) -> None:
    with locked(folder):
        ready.set()
        done.wait(60)


@pytest.mark.parametrize("resume", [False, True])
def test_two_trainings_in_one_folder_are_refused(run, resume):
    """A first start and a resumption; what the other has written stays."""
    if resume:
        train(replace(run, save_every=1), quiet=True)
        Path("run/result.json").unlink()
    fork = multiprocessing.get_context("fork")
    ready, done = fork.Event(), fork.Event()
    other = fork.Process(target=hold, args=("run", ready, done), daemon=True)
    other.start()
    assert ready.wait(30)
    before = sorted(path.name for path in Path("run").iterdir())
    try:
        with pytest.raises(ValueError, match="Another process is training in run now"):
            train(run, resume=resume, quiet=True)
        (folder,) = (finding for finding in preflight(run, 1, resume=True) if finding.name == "folder")
        assert not folder.good
    finally:
        done.set()
        other.join()
    assert sorted(path.name for path in Path("run").iterdir()) == before
    assert len(train(run, resume=resume, quiet=True).model) > 0
    assert [record["step"] for record in read_jsonl("run/log.jsonl")] == [1, 2, 3, 4]


def test_two_trainings_that_start_at_one_moment_are_one(run):
    """Both pass their checks; the lock lets one of them write."""
    fork = multiprocessing.get_context("fork")
    codes = fork.Queue()

    def start() -> None:
        try:
            train(replace(run, steps=30), quiet=True)
            codes.put("done")
        except ValueError as refused:
            codes.put(str(refused))

    both = [fork.Process(target=start) for _ in range(2)]
    for one in both:
        one.start()
    found = [codes.get(timeout=120) for _ in both]
    assert found.count("done") == 1
    (refused,) = (said for said in found if said != "done")
    # Whether it met the other at its checks, at the lock, or behind it.
    said = ("Another process is training in run", "Another process is writing to run", "run holds a run already")
    assert any(words in refused for words in said), refused
    assert [record["step"] for record in read_jsonl("run/log.jsonl")] == list(range(1, 31))


@pytest.mark.parametrize("start", ["library", "command", pytest.param("processes", marks=pytest.mark.soak)])
def test_resuming_a_finished_run_says_so_and_changes_nothing(run, capfd, start):
    result = train(run, quiet=True)
    settings.save(run, "run.yaml")
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*") if path.is_file()}
    capfd.readouterr()
    if start == "library":
        again = train(run, resume=True, quiet=True)
        assert (again.model, again.steps, again.tokens, again.loss) == (
            result.model, result.steps, result.tokens, result.loss,
        )  # fmt: skip
    else:
        main(["train", "run.yaml", "--resume", "--quiet", *(["--processes", "2"] if start == "processes" else [])])
    said = capfd.readouterr()
    assert said.err.count("run is finished: its 4 steps are done and the model is in run/model.") == 1
    assert start == "library" or f"loss {result.loss:.4f}" in said.out
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("place", ["no folder", "an empty folder", "a run without a checkpoint"])
def test_resuming_nothing_says_that_the_run_starts(run, place, capfd):
    """A slip in `out` would otherwise be a run that starts anew without a word."""
    if place == "an empty folder":
        Path(run.out).mkdir()
    if place == "a run without a checkpoint":
        settings.save(run, Path(run.out, "config.yaml"))
    train(run, resume=True, quiet=True)
    assert capfd.readouterr().err.count("holds no checkpoint to resume from: the run starts at its first step") == 1


@pytest.mark.parametrize("lost", ["result.json", "model/config.json", "a result of another shape"])
def test_a_run_that_lost_its_end_makes_it_again(run, lost):
    """From the last checkpoint; the loss is the one that the whole run had."""
    run = replace(run, steps=20, save_every=10)
    first = train(run, quiet=True)
    weights = load_file("run/model/model.safetensors")
    if lost.startswith("a result"):
        write_json("run/result.json", ["steps", 4])
    else:
        Path("run", lost).unlink()
    again = train(run, resume=True, quiet=True)
    assert again.loss == pytest.approx(first.loss, abs=1e-6)
    assert read_json("run/result.json")["steps"] == 20
    made = load_file("run/model/model.safetensors")
    assert all(equal(made[name], weights[name]) for name in weights)


@pytest.mark.parametrize("target", ["a folder with files", "nothing", "a file"])
def test_a_link_in_the_place_of_the_model_is_replaced_and_not_followed(run, target):
    """Resumed after the link was put there, the run ends well and leaves alone what the link points to."""
    train(run, quiet=True)
    weights = load_file("run/model/model.safetensors")
    Path("run/model").rename("moved")
    kept = Path("elsewhere")
    if target == "a folder with files":
        kept.mkdir()
        (kept / "thesis.txt").write_text("mine")
    elif target == "a file":
        kept.write_text("mine")
    Path("run/model").symlink_to(kept.absolute())
    train(run, resume=True, quiet=True)
    assert not Path("run/model").is_symlink()
    made = load_file("run/model/model.safetensors")
    assert all(equal(made[name], weights[name]) for name in weights)
    if target == "a folder with files":
        assert (kept / "thesis.txt").read_text() == "mine"
    elif target == "a file":
        assert kept.read_text() == "mine"


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("checkpoints/step-0000002/state.json", "[1, 2]", "state.json lacks the step or the number of processes"),
        ("checkpoints/step-0000002/state.json", '{"step": "2", "processes": "1"}', "state.json lacks the step"),
        ("checkpoints/step-0000002/state.json", "7", "state.json lacks the step"),
        ("log.jsonl", "[1]\n", "line 1: an object is needed, found list"),
        ("log.jsonl", '{"step": 1, "loss": "low"}\n', "line 1 is no record of a step"),
        ("log.jsonl", '{"tokens": 5}\n', "line 1 is no record of a step"),
        ("config.yaml", "- 1\n", "must hold a mapping"),
        ("config.yaml", "model: [}\n", "is not valid YAML"),
    ],
)
def test_a_run_folder_of_the_wrong_shape_is_one_line(run, file, text, said, capsys):
    train(replace(run, steps=2), quiet=True)
    Path("run/result.json").unlink()
    settings.save(replace(run, steps=2), "run.yaml")
    Path("run", file).write_text(text)
    with pytest.raises(SystemExit) as left:
        main(["train", "run.yaml", "--resume", "--quiet"])
    told = capsys.readouterr().err
    assert left.value.code == 1
    assert said in told
    assert "Traceback" not in told


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="a child's end with its parent is Linux's")
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(run, tmp_path):
    """A few of the trials that `tests/support/kill_trials.py` makes as many of as asked for."""
    there = replace(
        run, steps=24, save_every=4, model=str(tmp_path / "model"), data=(DataSource(str(tmp_path / "rows")),)
    )
    found = kill_trials(there, tmp_path, kills=2, seed=3)
    assert found["differences"] == []
    assert found["survivors"] == 0
    assert found["counts"]["killed"] >= 1


@pytest.mark.parametrize(
    ("seconds", "changes", "said"),
    [
        (860.0, {"save_every": 25}, "a step takes 860 s, and a run that is told to stop has 240 s"),
        (860.0, {"save_every": 25}, "Up to the last 25 steps would be lost"),
        (860.0, {"save_every": 0}, "Up to all steps would be lost"),
        (860.0, {"save_every": "auto"}, "So each step is saved, unless saves would take more than 5% of the time"),
        (860.0, {"save_every": 1, "async_checkpoints": True}, ""),
        (100.0, {"save_every": 25}, ""),
        (100.0, {"save_every": "auto"}, ""),
    ],
)
def test_a_step_that_is_longer_than_a_stop_waits_is_told(run, seconds, changes, said, monkeypatch, capsys):
    as_if_torchrun_waited(240, seconds, monkeypatch)
    train(replace(run, **changes, steps=3), quiet=True)
    told = capsys.readouterr().err
    assert said in told
    assert told.count("a step takes") == bool(said)


def as_if_torchrun_waited(patience: int, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run under torchrun that gives its ranks so long to end, with steps of so many seconds by its clock."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(patience))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr("torch.__version__", "2.13.0")
    real = loop.training_step
    monkeypatch.setattr(loop, "time", Clock(seconds))
    monkeypatch.setattr(loop, "training_step", lambda *given: (real(*given), loop.time.tick())[0])


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("seconds", "saved"), [(860.0, range(1, 25)), (100.0, range(2, 25, 2))])
def test_auto_saves_each_step_that_a_stop_would_kill(run, seconds, saved, background, monkeypatch):
    run = replace(run, steps=24, save_every="auto", keep=24, async_checkpoints=background)
    with monkeypatch.context() as patch:
        as_if_torchrun_waited(240, seconds, patch)
        train(run, quiet=True)
    assert [step for step, _ in RunFolder(Path("run")).checkpoints()] == list(saved)


def test_a_run_killed_in_a_long_step_loses_this_step_alone(run, monkeypatch):
    """Nothing of the step under way is there, all before it is; at most `keep` checkpoints and the next are on disk."""
    run = replace(run, steps=8, save_every="auto", keep=1, async_checkpoints=True)
    train(replace(run, out="alone", async_checkpoints=False), quiet=True)
    with monkeypatch.context() as patch:
        as_if_torchrun_waited(240, 860.0, patch)
        real = loop.training_step

        def killed(state, step):
            assert len(RunFolder(Path("run")).checkpoints()) <= 2
            if step == 5:
                raise KeyboardInterrupt
            return real(state, step)

        patch.setattr(loop, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(run, quiet=True)
    assert [step for step, _ in RunFolder(Path("run")).checkpoints()] == [5]
    train(run, resume=True, quiet=True)
    weights, expected = (load_file(f"{out}/model/model.safetensors") for out in ("run", "alone"))
    assert all(equal(weights[name], expected[name]) for name in expected)
    assert [record["step"] for record in read_jsonl("run/log.jsonl")] == list(range(1, 9))


@pytest.mark.parametrize("background", [False, True])
def test_two_processes_save_the_same_steps(run, background, monkeypatch):
    """Every process asks by its own clock; in each step one of them takes too long for a stop, and both save."""
    slow = range(3, 20, 4)
    real = save_pace.SavePace.due

    def as_seen(self, step, seconds):
        mine = step in slow and self._processes.accelerator.process_index == step // 4 % 2
        return real(self, step, 860.0 if mine else 1.0)

    monkeypatch.setattr(save_pace, "patience", lambda: 240.0)
    monkeypatch.setattr(save_pace.SavePace, "due", as_seen)
    parallel = ParallelConfig(context_parallel_size=2)
    run = replace(run, steps=100, save_every="auto", keep=100, async_checkpoints=background, parallel=parallel)
    train_over(run, 2)
    saved = [step for step, _ in RunFolder(Path("run")).checkpoints()]
    assert saved == sorted({*slow, *range(5, 101, 5)})


def test_long_steps_are_not_saved_where_saves_take_too_much(run, monkeypatch):
    """A save of 80 s, steps of 300 s: after the first one, each sixth step, 1,800 s and more of training."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "240")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr("torch.__version__", "2.13.0")
    pace = SavePace(replace(run, steps=1000, save_every="auto"), SimpleNamespace(largest=lambda *numbers: [*numbers]))
    saved = []
    for step in range(1, 20):
        if pace.due(step, 300.0):
            saved.append(step)
            pace.saved(80.0)
    assert saved == [1, 7, 13, 19]
    other = SavePace(replace(run, steps=1000, save_every="auto"), SimpleNamespace(largest=lambda *_: [300.0, 0.0]))
    assert other.due(1, 3.0), "another process took so long"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    alone = SavePace(replace(run, steps=1000, save_every="auto"), SimpleNamespace())
    assert [step for step in range(1, 201) if alone.due(step, 300.0)] == [50, 100, 150, 200], "nobody kills it"


class Clock:
    """`time` of a module, in which a step takes some seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._now = seconds, 0.0

    def perf_counter(self) -> float:
        return self._now

    def tick(self) -> None:
        self._now += self._seconds

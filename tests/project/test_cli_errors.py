"""How commands end: one line or a traceback, said once by several processes, which end with who started them."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from forked import forked_agents, forked_command
from tiny_run import make_run

from ultralong import cli, miniature
from ultralong.cli.errors import guarded
from ultralong.cli.make import demo
from ultralong.cli.shared import resumable
from ultralong.evaluation.tasks.samples import RENAMED
from ultralong.training.config import ParallelConfig
from ultralong.utils import processes, settings
from ultralong.utils.processes import ChildFailed, WorkerKilled, without_collections

FORMER = next(iter(RENAMED))  # a test by the name that version 0.3 gave it


DRAWING = ("plotly", "matplotlib", "PIL")
# A new interpreter that imports what takes seconds, and forks one process without each of these packages.
WITHOUT = f"""
import gc, os, sys
gc.disable()
import ultralong.evaluation.runs.run, ultralong.inference.load, transformers.models.llama.modeling_llama
from ultralong.cli import main
assert not {{"plotly", "matplotlib"}} & set(sys.modules)  # PIL is imported by transformers
folder, *words = sys.argv[1:]
gc.freeze()
for package in {DRAWING}:
    if not os.fork():
        sys.argv[1:] = [*words, os.path.join(folder, package)]
        sys.modules |= dict.fromkeys([package, *(name for name in sys.modules if name.startswith(package + "."))])
        os.dup2(os.open(os.path.join(folder, package + ".txt"), os.O_WRONLY | os.O_CREAT), 2)
        try:
            main()
        finally:
            sys.stderr.flush()
            os._exit(0)  # an interpreter's end takes apart all that is imported
    os.wait()
"""


@pytest.fixture(scope="module")
def told_without(tmp_path_factory):
    """What a command says on standard error, by the package that it lacks."""
    folder = tmp_path_factory.mktemp("without")
    words = ["eval", "run", FORMER, "miniature", "--lengths", "8", "1024", "--device", "cpu", "--out"]
    done = subprocess.run([sys.executable, "-c", WITHOUT, folder, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {package: (folder / f"{package}.txt").read_text().splitlines() for package in DRAWING}


@pytest.mark.parametrize("package", DRAWING)
def test_warnings_of_this_package_are_a_line_each_without_a_line_of_source(told_without, package):
    """What draws figures is missing, a test by its former name, and lengths beyond the window: all before a run."""
    told = [line for line in told_without[package] if "Loading weights" not in line]
    said = [
        f"The report will hold tables and no figures: {package} is needed",
        f"The test {FORMER} is called {RENAMED[FORMER]} now",
        "1,024 tokens are beyond the model's window of 512 and are left out",
    ]
    for text in said:
        assert sum(line.startswith(f"ultralong eval run: warning: {text}") for line in told) == 1, told
    assert not [line for line in told if "UserWarning" in line or "warn(" in line]


def _import(command: bool) -> None:
    processes._keeps_imports = command
    before = gc.get_freeze_count()
    with without_collections():
        made = [[] for _ in range(10)]
    assert (gc.get_freeze_count() >= before + len(made)) == command
    assert gc.isenabled()


@pytest.mark.parametrize("command", [True, False])
def test_only_a_process_that_is_a_commands_keeps_its_imports_out_of_collections(command):
    child = multiprocessing.get_context("fork").Process(target=_import, args=(command,))
    child.start()
    child.join()
    assert child.exitcode == 0


@pytest.mark.parametrize("kind", [UserWarning, DeprecationWarning, RuntimeWarning])
def test_warnings_of_other_packages_keep_their_place(kind):
    usual, made = warnings.formatwarning, []
    guarded("eval run", lambda: made.append(warnings.formatwarning(kind("of torch"), kind, torch.__file__, 1)))
    assert made == [usual(kind("of torch"), kind, torch.__file__, 1)]
    assert warnings.formatwarning is usual


def test_an_error_is_one_line_and_exit_code_1(tmp_path):
    done = forked_command("extend", miniature.path(), "--to", 100, "--out", tmp_path / "x")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("ultralong extend: error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()
    assert forked_command("extend", miniature.path()).returncode == 2
    whole = forked_command("extend", miniature.path(), "--to", 100, "--out", tmp_path / "x", "--traceback")
    assert whole.returncode == 1
    assert "Traceback (most recent call last)" in whole.stderr
    assert "ValueError: " in whole.stderr.splitlines()[-1]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), ChildFailed("stopped", 143)])
def test_a_demo_that_was_stopped_says_how_it_resumes(monkeypatch, capsys, tmp_path, error):
    """Its training says --resume, which the demo needs not and has not."""

    def stopped(*_):
        raise error

    monkeypatch.setattr("ultralong.demo.run", stopped)
    with pytest.raises(type(error)):
        demo(out=tmp_path / "demo")
    assert f"the same command again resumes it in {tmp_path / 'demo'}" in capsys.readouterr().err


def failed_save(cause):
    """What torch raises where a rank's part of a save failed; it is no Exception."""
    return dcp.CheckpointException("write", {0: (cause, None)})


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), WorkerKilled(), ChildFailed("stopped", 143), failed_save(KeyboardInterrupt())]
)
def test_what_was_stopped_or_killed_says_how_it_resumes_and_an_error_does_not(capsys, error):
    with pytest.raises(type(error)), resumable("runs/eval"):
        raise error
    assert capsys.readouterr().err == "note: the same command again resumes it in runs/eval where it stopped.\n"
    for wrong in (ValueError("wrong"), failed_save(ValueError("wrong"))):
        with pytest.raises(type(wrong), match="wrong"), resumable("runs/eval"):
            raise wrong
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("cause", "code", "told"), [(KeyboardInterrupt(), 130, "stopped."), (RuntimeError("a disk"), 1, "failed:\n")]
)
def test_a_save_of_torch_that_fails_or_is_stopped_ends_as_any_other_work(capsys, cause, code, told):
    def work():
        raise failed_save(cause)

    with pytest.raises(SystemExit) as left:
        guarded("ablate", work)
    said = capsys.readouterr().err
    assert left.value.code == code
    assert said.startswith(f"ultralong ablate: {told}")
    assert ("a disk" in said) == (code == 1)


def test_what_transformers_says_of_every_scaling_is_left_out_and_nothing_else(caplog):
    """Its loggers hand nothing on while a command runs under pytest, so the loggers themselves are asked."""
    logger = logging.getLogger("transformers.modeling_rope_utils")
    said = ["The explicitly set RoPE scaling factor (4.0) does not match", "`rope_parameters`'s factor must be a float"]

    def work():
        shown.extend(text for text in said if logger.filter(record(text)))

    def record(text):
        return logging.LogRecord(logger.name, logging.WARNING, __file__, 1, text, (), None)

    shown = []
    guarded("extend", work)
    assert shown == said[1:]
    assert all(logger.filter(record(text)) for text in said), "it ends with the command"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b"), "error: a b"),
        (FloatingPointError("the loss is nan"), "error: the loss is nan"),
        (ImportError("datasets is needed: pip install"), "error: datasets is needed: pip install"),
        (FileNotFoundError(2, "No such file or directory", "rows/x"), "error: rows/x: No such file or directory."),
        (OSError(28, "No space left on device"), "error: a file: No space left on device."),
        (OSError("no model of that name\nreally"), "error: no model of that name really"),
        (
            MemoryError("Unable to allocate 7 PiB"),
            "error: there is not enough memory for it (Unable to allocate 7 PiB). Ask for less.",
        ),
        (RuntimeError("CUDA error: an illegal memory access"), None),
        (ModuleNotFoundError("No module named 'torch.x'", name="torch.x"), None),
        (ConnectionResetError(104, "Connection reset by peer"), None),
        (KeyError("weight"), None),
        (AssertionError(), None),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("rank", [None, "3"])
def test_one_line_for_what_can_be_mended_and_a_traceback_for_the_rest(error, line, whole, rank, capsys, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "8")
    else:
        monkeypatch.delenv("RANK", raising=False)

    def work():
        raise error

    with pytest.raises(SystemExit) as left:
        guarded("train", work, whole)
    told = capsys.readouterr().err
    assert left.value.code == 1
    if line is not None and not whole:
        assert told == f"ultralong train: {line}\n"
        return
    place = f" on rank 3 of 8, host {socket.gethostname()}:" if rank else ":"
    assert told.startswith(f"ultralong train: failed{place}\nTraceback (most recent call last):\n")
    assert f"\n{type(error).__name__}" in told or f".{type(error).__name__}" in told


@pytest.mark.parametrize("made", [ModuleNotFoundError, RuntimeError, ValueError])
@pytest.mark.parametrize("said", [True, False])
def test_ctrl_c_that_a_library_makes_an_error_of_its_own(made, said, capsys):
    """As transformers does while it imports a model."""

    def work():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as stop:
            if said:
                raise made("Could not import module") from stop
            raise made("Could not import module")  # noqa: B904

    with pytest.raises(SystemExit) as left:
        guarded("plan", work)
    assert (left.value.code, capsys.readouterr().err) == (130, "ultralong plan: stopped.\n")
    with pytest.raises(SystemExit) as left:
        guarded("plan", work, whole=True)
    told = capsys.readouterr().err
    assert left.value.code == 130
    assert told.startswith("Traceback (most recent call last):\n")
    assert told.endswith(f"{made.__name__}: Could not import module\nultralong plan: stopped.\n")


def test_workers_hear_no_ctrl_c():
    """A terminal sends it to all processes: workers that import then would print where they were."""
    script = (
        "import os, signal\nfrom ultralong.utils.processes import WorkerPool\n"
        "if __name__ == '__main__':\n"
        "    pool = WorkerPool(2)\n    found = [pool.submit(abs, -n) for n in range(8)]\n"
        "    pids = list(pool._processes)\n    [os.kill(pid, signal.SIGINT) for pid in pids * 3]\n"
        "    print(len(pids), sum(one.result() for one in found), signal.pthread_sigmask(signal.SIG_BLOCK, ()))\n"
        "    pool.shutdown()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("2 28 set()\n", "")


def test_ctrl_c_and_failed_children_keep_their_exit_codes(capsys):
    def stop():
        raise KeyboardInterrupt

    def fail():
        raise ChildFailed("its own message is above", 7)

    for work, code, told in ((stop, 130, "ultralong train: stopped.\n"), (fail, 7, "")):
        with pytest.raises(SystemExit) as left:
            guarded("train", work)
        assert (left.value.code, capsys.readouterr().err) == (code, told)


@pytest.mark.parametrize("how", ["--processes", pytest.param("torchrun", marks=pytest.mark.soak)])
def test_a_run_of_several_processes_says_its_error_once(tmp_path, tiny_model, tiny_tokenizer, how):
    two = ParallelConfig(context_parallel_size=2)
    config = make_run(tmp_path, tiny_model, tiny_tokenizer, parallel=two, length=128)
    settings.save(config, tmp_path / "run.yaml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if how == "--processes":
        with forked_agents():
            done = forked_command("train", "run.yaml", "--processes", 2, "--quiet", cwd=tmp_path, env=environment)
    else:
        words = [
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "ultralong",
            "train",
            "run.yaml",
        ]
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr.count("ultralong train: error: ") == 1
    if how == "--processes":
        assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr.split("ultralong train: error: ")[1].split("\n")[0]


@pytest.mark.soak  # tests/training/test_stops.py asks for more of the same
def test_ranks_end_with_the_command_that_started_them(tmp_path, tiny_model, tiny_tokenizer):
    config = make_run(
        tmp_path, tiny_model, tiny_tokenizer, steps=5000, parallel=ParallelConfig(context_parallel_size=2)
    )
    settings.save(config, tmp_path / "run.yaml")
    command = [sys.executable, "-m", "ultralong", "train", "run.yaml", "--processes", "2", "--quiet"]
    log = tmp_path / "run" / "log.jsonl"
    with open(tmp_path / "said", "wb") as out:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=out)

    def wait_for(condition, seconds):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (tmp_path / "said").read_text()
            time.sleep(0.1)

    try:
        wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 2, 120)
    finally:
        process.kill()
        process.wait()

    def still():
        before = log.read_text()
        time.sleep(2)
        return log.read_text() == before

    wait_for(still, 60)


def test_a_closed_output_is_no_traceback(monkeypatch):
    """Python has None for what was closed by who started it (`ultralong ... >&-`)."""
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    sys.stdout.close()
    sys.stderr.close()

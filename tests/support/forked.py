"""Training over several processes, and commands, in forked processes: they start at once, as everything is imported.

What only a fresh interpreter or torchrun does (start, environment, messages, exit codes) is proved by tests of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn

import torch
from accelerate.state import AcceleratorState

from ultralong import cli
from ultralong.launch import agent, local
from ultralong.planner.traces import child
from ultralong.training.config import TrainConfig
from ultralong.training.loop import train
from ultralong.training.sharing import Decide
from ultralong.utils import template_child, template_renderer
from ultralong.utils.local_ranks import run_ranks


def train_over(config: TrainConfig, processes: int, resume: bool = False, decide: Decide | None = None) -> None:
    """Run `train(config)` in `processes` processes of one gloo group; `decide` as in `train`.

    Raises:
        RankFailed: A process raised; the message holds its traceback.
    """
    run_ranks(_rank, processes, config, resume, decide)


def _rank(rank: int, world: int, config: TrainConfig, resume: bool, decide: Decide | None) -> None:
    # What torchrun would have set, which accelerate reads to find its place.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    AcceleratorState._reset_state(reset_partial_state=True)  # what a Trainer has left in this test's process
    train(config, resume=resume, quiet=True, decide=decide)


@contextmanager
def forked_agents() -> Iterator[None]:
    """While this is open, `launch_local` forks its agent, which imports nothing then, as it forks its ranks."""
    real = local.subprocess
    local.subprocess = SimpleNamespace(**vars(real) | {"Popen": ForkedAgent})
    try:
        yield
    finally:
        local.subprocess = real


class ForkedAgent:
    """What `launch_local` uses of a `subprocess.Popen`."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str], start_new_session: bool, stdout: int) -> None:
        assert tuple(words[:3]) == (sys.executable, "-m", "ultralong.launch.agent")
        assert (start_new_session, stdout) == (True, subprocess.DEVNULL)
        self._process = multiprocessing.get_context("fork").Process(target=self._main, args=(words[3:], env))
        self._process.start()

    @staticmethod
    def _main(words: list[str], env: Mapping[str, str]) -> None:
        os.setsid()
        streams = [os.open(os.devnull, os.O_RDWR), os.open(os.devnull, os.O_WRONLY), os.dup(2)]
        run_and_exit(lambda: agent.main(words), None, env, streams)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("the agent", timeout or 0.0)
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


START_PLANNER = child.start


@contextmanager
def forked_planner() -> Iterator[None]:
    """While this is open, the planner's other process is forked."""
    child.start = _start_planner
    try:
        yield
    finally:
        child.stop()
        child.start = START_PLANNER


def _start_planner() -> Any:
    if multiprocessing.current_process().daemon:  # which may start a program, but fork nothing
        return START_PLANNER()
    if not child._running or child._running[0].poll() is not None:
        child._running[:] = [ForkedPlanner()]
    return child._running[0]


class ForkedPlanner:
    """What `ultralong.planner.traces.child` uses of a `subprocess.Popen`."""

    def __init__(self) -> None:
        asked, self.stdin = self._pipe()
        answered = self._pipe()
        self.stdout = answered[0]
        ours = (self.stdin, self.stdout)
        self._process = multiprocessing.get_context("fork").Process(
            target=self._serve, args=(asked, answered[1], ours), daemon=True
        )
        self._process.start()
        asked.close()
        answered[1].close()

    @staticmethod
    def _pipe() -> tuple[IO[str], IO[str]]:
        reader, writer = os.pipe()
        return os.fdopen(reader, "r"), os.fdopen(writer, "w")

    @staticmethod
    def _serve(asked: IO[str], answers: IO[str], ours: tuple[IO[str], ...]) -> None:
        for stream in ours:  # the questions end when the last one who can write them has closed them
            stream.close()
        os.dup2(asked.fileno(), 0)
        os.dup2(answers.fileno(), 1)
        sys.stdin = os.fdopen(0, closefd=False)
        child.main()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("the planner's process", timeout or 0.0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


@contextmanager
def forked_renderer() -> Iterator[None]:
    """While this is open, the process that renders chat templates is forked."""
    with _renderers(SimpleNamespace(**vars(subprocess) | {"Popen": ForkedRenderer})):
        yield


@contextmanager
def fresh_renderer() -> Iterator[None]:
    """While this is open, it is an interpreter of its own, as elsewhere."""
    with _renderers(subprocess):
        yield


@contextmanager
def _renderers(module: Any) -> Iterator[None]:
    before = template_renderer.subprocess
    template_renderer._renderer.stop()
    template_renderer.subprocess = module
    try:
        yield
    finally:
        template_renderer._renderer.stop()
        template_renderer.subprocess = before


class ForkedRenderer:
    """What `ultralong.utils.template_renderer` uses of a `subprocess.Popen`; daemonic processes may start it too."""

    def __init__(self, words: Sequence[str], stdin: int, stdout: int, env: Mapping[str, str]) -> None:
        assert tuple(words) == (sys.executable, template_child.__file__)
        asked, question = os.pipe()
        answers, answer = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            try:
                os.dup2(asked, 0)
                os.dup2(answer, 1)
                os.closerange(3, 4096)  # or it would keep itself, and what others wait for, open
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                sys.stdin, sys.stdout = os.fdopen(0, "r", closefd=False), os.fdopen(1, "w", closefd=False)
                template_child.main()
            finally:
                os._exit(0)
        os.close(asked)
        os.close(answer)
        self.stdin, self.stdout = os.fdopen(question, "wb"), os.fdopen(answers, "rb")

    def poll(self) -> int | None:
        return self._look(os.WNOHANG)

    def wait(self) -> int | None:
        return self._look(0)

    def _look(self, how: int) -> int | None:
        if self.returncode is None:
            try:
                ended, status = os.waitpid(self.pid, how)
            except ChildProcessError:  # a parent's
                return None
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def __exit__(self, *_: object) -> None:
        try:
            self.stdin.close()
        finally:
            self.stdout.close()
            self.wait()


def forked_command(
    *words: object, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `ultralong WORDS` in a process of its own; returns what `subprocess.run` would."""
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder, "out"), Path(folder, "err")
        child = start_command(*words, cwd=cwd, env=env, streams=streams)
        child.join()
        return subprocess.CompletedProcess(words, child.exitcode, *(path.read_text() for path in streams))


def start_command(
    *words: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, streams: Sequence[Path]
) -> multiprocessing.process.BaseProcess:
    """Start `ultralong WORDS` in a process of its own that writes its output and its errors to two files."""
    child = multiprocessing.get_context("fork").Process(target=_main, args=([*map(str, words)], cwd, env, *streams))
    child.start()
    return child


def _main(words: list[str], cwd: Path | None, env: Mapping[str, str] | None, out: Path, err: Path) -> None:
    streams = [os.open(path, os.O_WRONLY | os.O_CREAT) for path in (out, err)]
    run_and_exit(lambda: cli.main(words), cwd, env, [os.open(os.devnull, os.O_RDONLY), *streams])


def run_and_exit(
    work: Callable[[], int | None], cwd: Path | None, env: Mapping[str, str] | None, streams: Sequence[int]
) -> NoReturn:
    """Do the work in a process that was forked, with these descriptors as its streams, and end as a program does."""
    multiprocessing.current_process()._config["daemon"] = False  # a program may start processes
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, closefd=False) for n, mode in enumerate("rww"))
    if cwd is not None:
        os.chdir(cwd)
    # The parent's thread pool is not the child's. torch makes a new one at the first call, which two threads at once,
    # as when transformers loads weights, may find half made.
    torch.set_num_threads(1)
    code = 0
    try:
        code = work() or 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # noqa: BLE001 - what the interpreter would print
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

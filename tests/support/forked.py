"""Training over several processes, and commands, in forked processes: they start at once, as everything is imported.

What only a fresh interpreter or torchrun does (start, environment, messages, exit codes) is proved by tests of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from ultralong import cli
from ultralong.training.config import TrainConfig
from ultralong.training.loop import train
from ultralong.utils.local_ranks import run_ranks


def train_over(config: TrainConfig, processes: int, resume: bool = False) -> None:
    """Run `train(config)` in `processes` processes of one gloo group.

    Raises:
        RankFailed: A process raised; the message holds its traceback.
    """
    run_ranks(_rank, processes, config, resume)


def _rank(rank: int, world: int, config: TrainConfig, resume: bool) -> None:
    # What torchrun would have set, which accelerate reads to find its place.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    train(config, resume=resume, quiet=True)


def forked_command(
    *words: object, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `ultralong WORDS` in a process of its own; returns what `subprocess.run` would."""
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder, "out"), Path(folder, "err")
        child = multiprocessing.get_context("fork").Process(target=_main, args=([*map(str, words)], cwd, env, *streams))
        child.start()
        child.join()
        return subprocess.CompletedProcess(words, child.exitcode, *(path.read_text() for path in streams))


def _main(words: list[str], cwd: Path | None, env: Mapping[str, str] | None, out: Path, err: Path) -> None:
    streams = [os.open(path, os.O_WRONLY | os.O_CREAT) for path in (out, err)]
    run_and_exit(words, cwd, env, [os.open(os.devnull, os.O_RDONLY), *streams])


def run_and_exit(words: list[str], cwd: Path | None, env: Mapping[str, str] | None, streams: Sequence[int]) -> NoReturn:
    """Become the command `ultralong WORDS`, in a process that was forked; its streams are these descriptors."""
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
        cli.main(words)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # noqa: BLE001 - what the interpreter would print
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

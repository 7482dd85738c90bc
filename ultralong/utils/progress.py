"""One progress bar for the whole project, so that long steps look the same and logs stay readable; and a stopwatch.

Bars of transformers are drawn as ours while `library_bars` is open.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm
from tqdm.std import tqdm as every_tqdm

SECONDS_BETWEEN_LINES_IN_A_LOG = 15.0

_hidden: list[None] = []  # one for each `hidden_bars` that is open, of the whole process: its threads draw bars too


def _take_own_lock() -> None:
    """Give every kind of bar a lock of this process, which has just been forked.

    tqdm's lock is one for a process and all its forks, and each bar takes it, a quiet one too. A fork that is killed
    with it in hand (a rank, as the host runs out of memory) would leave all the others waiting for ever, and so would a
    thread that had it while this process was forked, which has no such thread.
    """
    lock = threading.RLock()
    kinds: list[Any] = [every_tqdm]
    for kind in kinds:
        if kind is every_tqdm or "_lock" in vars(kind):  # of tqdm and of other packages: others inherit
            kind.set_lock(lock)
        kinds += kind.__subclasses__()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_take_own_lock)


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: float | None = None,
    desc: str = "",
    unit: str = "it",
    quiet: bool = False,
    delay: float = 0.0,
    **options: Any,
) -> tqdm:
    """A tqdm bar on standard error.

    On a terminal it redraws a few times a second; in a log file or a CI job it prints a line every 15 s, and none for
    what takes less, so that a long run shows life without flooding the log.

    Args:
        iterable: What to walk over, or None to call `.update()` by hand.
        total: Number of steps where the iterable has no length.
        desc: What is being done, shown in front.
        unit: What one step is.
        quiet: True draws nothing.
        delay: Seconds before the bar appears on a terminal or in a notebook.
        **options: Passed on to tqdm.
    """
    in_notebook = _in_notebook()
    interactive = sys.stderr.isatty() or in_notebook
    options.setdefault("leave", interactive and not in_notebook)
    return tqdm(
        iterable,
        total=total,
        desc=desc,
        unit=unit,
        disable=quiet or bool(_hidden),
        mininterval=0.2 if interactive else SECONDS_BETWEEN_LINES_IN_A_LOG,
        delay=delay if interactive else SECONDS_BETWEEN_LINES_IN_A_LOG,
        dynamic_ncols=interactive,
        **options,
    )


def _in_notebook() -> bool:
    """Whether a notebook's kernel runs this; that its modules are imported does not say so."""
    kernel = sys.modules.get("ipykernel.zmqshell")
    return kernel is not None and isinstance(sys.modules["IPython"].get_ipython(), kernel.ZMQInteractiveShell)


@contextmanager
def hidden_bars(hidden: bool = True) -> Iterator[None]:
    """No bar at all meanwhile, in any thread of this process; nothing changes where `hidden` is False."""
    own = [None] * hidden
    _hidden.extend(own)
    try:
        yield
    finally:
        del _hidden[: len(own)]


@contextmanager
def library_bars() -> Iterator[None]:
    """Draw what transformers shows meanwhile (loading and saving weights) as our bars, of the first process alone."""
    import torch.distributed as dist
    from transformers.utils import logging

    def ours(factory: Callable[..., Any], given: tuple[Any, ...], options: dict[str, Any]) -> tqdm:
        return progress(*given, **options | {"desc": str(options.get("desc") or "").lower(), "leave": False})

    with hidden_bars(dist.is_initialized() and dist.get_rank() > 0):
        before = logging.set_tqdm_hook(ours)
        try:
            yield
        finally:
            logging.set_tqdm_hook(before)


class Stopwatch:
    """Wall and CPU seconds of named stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = round(time.perf_counter() - wall, 3)
        self.cpu_seconds[name] = round(time.process_time() - cpu, 3)

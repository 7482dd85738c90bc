"""Saving beside the training: states are copied to the host, and a thread writes the copy while steps go on.

Shards are written and hashed there, and what completes a checkpoint (its record of hashes, the rename) is done there
too. Processes agree over a gloo group of their own: the training's is in use by its steps.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from ultralong.checkpoints.saving.host_copy import HostCopies, same_gpu
from ultralong.checkpoints.saving.shards import ShardWriter, WrittenFile


class BackgroundSaver:
    """Writes one checkpoint at a time in the background.

    The copies on the host are kept from one save to the next: parameters and optimizer states of this process, once,
    pinned where there is a GPU.

    Attributes:
        write_seconds: That the last complete write took, from its copy on.
        plan_seconds: Of these, until the processes had agreed who writes what.
        shard_seconds: Of these, until the shards of all processes were on disk.
        files: What this process wrote then, by file name.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """Make one on each process.

        Args:
            group: A gloo group of all processes; None where nothing is distributed.
        """
        self._group, self._copies = group, HostCopies()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=same_gpu())
        self._pending: Future[None] | None = None
        self.write_seconds = self.plan_seconds = self.shard_seconds = 0.0
        self.files: dict[str, WrittenFile] = {}

    def start(self, state: Mapping[str, Any], writer: ShardWriter, complete: Callable[[Together], None]) -> None:
        """Copy a state to the host and begin to write it; all processes call it. The state may change when it returns.

        Args:
            state: As torch's distributed checkpoint takes it.
            writer: Of an empty folder, the same for all.
            complete: Called in the background when all shards are written, with a function that does a piece of work
                on every process and raises everywhere where it failed anywhere.

        Raises:
            BaseException: The write before this one failed.
        """
        self.wait()
        copy = self._copies.copy(state)
        copied = time.perf_counter()

        def write() -> None:
            dcp.save(copy, storage_writer=writer, process_group=self._group, no_dist=self._alone)
            self.plan_seconds, self.files = writer.began - copied, writer.files
            self.shard_seconds = time.perf_counter() - copied
            complete(partial(together, group=self._group))
            self.write_seconds = time.perf_counter() - copied

        self._pending = self._thread.submit(write)

    def reserve(self, state: Mapping[str, Any]) -> None:
        """Make the memory for copies of states like this one, which the first copy would make.

        Raises:
            MemoryError: The host has no more memory to lock.
        """
        self._copies.reserve(state)

    def copy(self, state: Mapping[str, Any]) -> None:
        """Copy a state to the host as `start` does, and write nothing: to time the copy alone.

        Raises:
            BaseException: The write before this one failed.
        """
        self.wait()
        self._copies.copy(state)

    @property
    def failed(self) -> bool:
        """Whether the last write has ended with an error by now, which `wait` raises."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    @property
    def writing(self) -> bool:
        """Whether a write is under way."""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            BaseException: Writing failed on this process or on another one. It is raised once.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the end of the write, whether it fails or not, and free the copies."""
        with suppress(Exception, dcp.CheckpointException):  # torch's is no Exception
            self.wait()
        self._thread.shutdown()
        self._copies.close()

    @property
    def _alone(self) -> bool:
        return self._group is None or dist.get_world_size(self._group) == 1


Together = Callable[[Callable[[], None]], None]


def together(work: Callable[[], None], group: dist.ProcessGroup | None = None) -> None:
    """Do a piece of work on every process, and raise on all of them where it failed on one; all processes call it.

    Args:
        work: Without collectives in it.
        group: The processes; by default all, or this one alone where nothing is distributed.

    Raises:
        Exception: The work failed here, or on another process: its OSError, or its words as a RuntimeError.
    """
    error: Exception | None = None
    try:
        work()
    except Exception as found:  # noqa: BLE001 - raised below, when all know of it
        error = found
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        told: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(told, None if error is None else _plain(error), group=group)
        error = error or next((other for other in told if other is not None), None)
    if error is not None:
        raise error


@contextmanager
def background_saver(wanted: bool, timeout: timedelta) -> Iterator[BackgroundSaver | None]:
    """A saver for the time of a training, or None; all processes enter together.

    When the block ends with an error, the write that is under way is completed first if it can be.

    Args:
        wanted: Whether to make one.
        timeout: How long a process waits for the others.
    """
    if not wanted:
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
    saver = BackgroundSaver(group)
    with warnings.catch_warnings():
        # One process saves alone, which torch warns about in the thread and which is meant.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            yield saver
        finally:
            saver.close()


def _plain(error: Exception) -> Exception:
    """An error that can be sent to another process."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename)
    return RuntimeError(f"{type(error).__name__} on another process: {error}")

"""Several ranks on one machine, from a test, a notebook cell or a script: `run_ranks(work, world)`.

On a machine without a GPU the ranks are forked. Where CUDA is in play a forked process can't use it, so the ranks are
spawned; a function of a notebook cell, which they can't import, then travels by value, for which cloudpickle is needed.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist

from ultralong.utils.processes import end_with_parent, start_method

GRACE = 3.0  # seconds that ranks get to report after the first failure, or after their collectives have timed out


class RankFailed(RuntimeError):
    """A rank raised an error, died, or did not end in time; the message holds its traceback."""


def free_port() -> int:
    """A TCP port on this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def nccl_options() -> Any:
    """Options of a process group whose transfers start while a kernel fills the GPU, instead of after it."""
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    return options


def run_ranks(
    work: Callable[..., Any], world: int, *arguments: Any, device: str = "cpu", timeout: float = 120.0
) -> list[Any]:
    """Run `work(rank, world, *arguments)` in `world` processes that form a torch.distributed group.

    Args:
        work: The function; its result travels back pickled (CPU tensors are fine).
        world: Number of processes.
        *arguments: The same for every rank.
        device: "cpu" (gloo) or "cuda" (NCCL, rank i on GPU i).
        timeout: Seconds for everything, and for any one collective. Nobody hangs longer than a moment more.

    Returns:
        The results in rank order.

    Raises:
        RankFailed: A rank raised, died or was not done in time. The others are ended.
        ValueError: More ranks than GPUs, or a function of a notebook cell where ranks are spawned and cloudpickle is
            missing.
    """
    if device == "cuda" and world > torch.cuda.device_count():
        raise ValueError(f"{world} ranks need {world} GPUs, found {torch.cuda.device_count()}")
    method = start_method()
    context: Any = multiprocessing.get_context(method)
    if method == "spawn" and not hasattr(sys.modules["__main__"], "__file__"):
        work, arguments = _ByValue(work, arguments), ()
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(
            target=_rank,
            args=(os.getpid(), work, rank, world, port, device, timeout, results, arguments),
            daemon=True,
        )
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        found = _collect(processes, results, world, timeout)
        for process in processes:
            process.join(GRACE)  # they part at a barrier: to the others one that is ended there has died
        return found
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join(GRACE)
            if process.is_alive():
                process.kill()
                process.join()
        results.close()


class _ByValue:
    """A function and its arguments, pickled by value where they are a notebook's own: no process can import those."""

    def __init__(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            import cloudpickle
        except ImportError:
            raise ValueError(
                "On a machine with a GPU, a function of a notebook cell runs on several ranks with cloudpickle only: "
                "pip install cloudpickle, or put the function into a module and import it."
            ) from None
        self.pickled: bytes = cloudpickle.dumps((work, arguments))

    def __call__(self, rank: int, world: int) -> Any:
        work, arguments = pickle.loads(self.pickled)  # noqa: S301 - of the process that started this one
        return work(rank, world, *arguments)


def _rank(
    parent: int,
    work: Callable[..., Any],
    rank: int,
    world: int,
    port: int,
    device: str,
    timeout: float,
    results: Any,
    arguments: tuple[Any, ...],
) -> None:
    """What each process runs."""
    end_with_parent(parent)
    torch.set_num_threads(1)
    failed = False
    value: bytes | str
    try:
        if device == "cuda":
            torch.cuda.set_device(rank)
        own = torch.device("cuda", rank) if device == "cuda" else None
        dist.init_process_group(
            "nccl" if own else "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
            device_id=own,
            pg_options=nccl_options() if own else None,
        )
        # As plain bytes: the queue itself would send a tensor as a handle, which dies with this process.
        value = pickle.dumps(work(rank, world, *arguments))
    except BaseException:  # noqa: BLE001 - whatever it is, the parent must hear of it
        failed, value = True, traceback.format_exc()
    results.put((rank, failed, value))
    results.close()
    results.join_thread()
    if dist.is_initialized() and not failed:
        dist.barrier()
        dist.destroy_process_group()


def _collect(processes: list[Any], results: Any, world: int, timeout: float) -> list[Any]:
    """Wait for every rank's result; stop at the first failure, after a moment for the others to report theirs."""
    deadline = time.monotonic() + timeout + GRACE
    done: dict[int, Any] = {}
    errors: dict[int, str] = {}
    while len(done) + len(errors) < world:
        try:
            rank, failed, value = results.get(timeout=0.05)
            if not failed:
                done[rank] = pickle.loads(value)  # noqa: S301 - written by our own child
            else:
                errors[rank] = value
                deadline = min(deadline, time.monotonic() + GRACE)
            continue
        except queue.Empty:
            pass
        missing = [r for r in range(world) if r not in done and r not in errors]
        dead = [r for r in missing if processes[r].exitcode is not None]
        if dead and results.empty():
            errors |= {r: f"process ended with exit code {processes[r].exitcode} and no result" for r in dead}
            deadline = min(deadline, time.monotonic() + GRACE)
        elif time.monotonic() > deadline:
            errors |= dict.fromkeys(missing, "did not finish in time")
        else:
            wait([processes[r].sentinel for r in missing], timeout=0.01)
    if errors:
        text = "\n".join(f"--- rank {rank} ---\n{message}" for rank, message in sorted(errors.items()))
        raise RankFailed(f"{len(errors)} of {world} ranks failed:\n{text}")
    return [done[rank] for rank in range(world)]

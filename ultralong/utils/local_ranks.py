"""Several ranks on one machine, from a test, a notebook cell or a script: `run_ranks(work, world)`.

On a machine without a GPU the ranks are forked. Where CUDA is in play a forked process can't use it, so the ranks are
spawned; a function of a notebook cell, which they can't import, then travels by value, for which cloudpickle is needed.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ultralong.utils.processes import (
    Killed,
    end_with_parent,
    leave_stops_to_first,
    start_method,
    stops_passed_on,
)

HEAD = 8  # bytes before an answer that say how many it has
KILLED = (-signal.SIGKILL, -signal.SIGTERM)  # exit codes
GRACE = 3.0  # seconds that ranks get to report after the first failure, or after their collectives have timed out


class RankFailed(RuntimeError):
    """A rank raised an error, died, or did not end in time; the message holds its traceback."""


class RankKilled(RankFailed, Killed):
    """A rank was killed from outside; the message is one line, and its cause is what every rank said."""


@contextmanager
def held_port() -> Iterator[int]:
    """A TCP port of this machine to listen on while this is open; the system gives it to nobody who asks for any port.

    A port that is only free now is another process's by chance when it is used, seconds later: all who ask for any get
    one of the same few thousand.
    """
    with socket.socket() as holder:
        # Bound, and not listening: a server that asks for this very port with SO_REUSEADDR gets it, as torch's store.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


def free_port() -> int:
    """A TCP port on this machine that nobody listens on now; see `held_port`."""
    with held_port() as port:
        return port


def nccl_options() -> Any:
    """Options of a process group whose transfers start while a kernel fills the GPU, instead of after it."""
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    return options


def run_ranks(
    work: Callable[..., Any],
    world: int,
    *arguments: Any,
    device: str = "cpu",
    timeout: float = 120.0,
    first_stops: bool = False,
) -> list[Any]:
    """Run `work(rank, world, *arguments)` in `world` processes that form a torch.distributed group.

    Args:
        work: The function; its result travels back pickled (CPU tensors are fine).
        world: Number of processes.
        *arguments: The same for every rank.
        device: "cpu" (gloo) or "cuda" (NCCL, rank i on GPU i).
        timeout: Seconds for everything, and for any one collective. Nobody hangs longer than a moment more.
        first_stops: SIGTERM and Ctrl-C are rank 0's, which ends in its own time and has the others end; this process
            waits for all of them, and then does as the signal asks. False ends all ranks at once.

    Returns:
        The results in rank order.

    Raises:
        RankFailed: A rank raised, died or was not done in time. The others are ended.
        RankKilled: One was killed, as the system does where memory runs out.
        ValueError: More ranks than GPUs, or a function of a notebook cell where ranks are spawned and cloudpickle is
            missing.
    """
    if device == "cuda" and world > torch.cuda.device_count():
        raise ValueError(f"{world} ranks need {world} GPUs, found {torch.cuda.device_count()}")
    method = start_method()
    context: Any = multiprocessing.get_context(method)
    if method == "spawn" and not hasattr(sys.modules["__main__"], "__file__"):
        work, arguments = _ByValue(work, arguments), ()
    processes: list[Any] = []
    answers: list[_Answer] = []
    came: list[int] = []
    try:
        with held_port() as port:
            for rank in range(world):
                answers.append(_Answer(context))
                where = (os.getpid(), rank, world, port, device, timeout, answers[rank].writer, first_stops)
                processes.append(context.Process(target=_rank, args=(work, arguments, *where), daemon=True))
                processes[rank].start()
                answers[rank].writer.close()  # or the ranks that follow would hold it too
            with stops_passed_on(processes[0], came) if first_stops else nullcontext():
                found = _collect(processes, answers, timeout)
        for process in processes:
            process.join(GRACE)  # they part at a barrier: to the others one that is ended there has died
        return found
    finally:
        _end(processes)
        for answer in answers:
            answer.reader.close()
        if came:
            signal.raise_signal(came[-1])


def _end(processes: list[Any]) -> None:
    """End those that are there, all within one moment: they may ignore SIGTERM, see `leave_stops_to_first`."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    until = time.monotonic() + GRACE
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


class _Answer:
    """What one rank sends at its end, through a pipe of its own, read as it comes.

    Ranks that share a queue share its lock: one that is killed within its answer, as the host runs out of memory, would
    leave the others waiting for that, and this process for the rest.
    """

    def __init__(self, context: Any) -> None:
        self.reader, self.writer = context.Pipe(duplex=False)
        os.set_blocking(self.reader.fileno(), False)
        self._read, self.ended = bytearray(), False

    def whole(self) -> bytes | None:
        """The answer, where all of it is there."""
        try:
            while not self.ended:
                piece = os.read(self.reader.fileno(), 1 << 20)
                self._read += piece
                self.ended = not piece
        except BlockingIOError:
            pass
        size = int.from_bytes(self._read[:HEAD], "little")
        return bytes(self._read[HEAD:]) if len(self._read) == HEAD + size > HEAD else None


def _send(writer: Any, answer: bytes) -> None:
    rest = memoryview(len(answer).to_bytes(HEAD, "little") + answer)
    while rest:
        rest = rest[os.write(writer.fileno(), rest) :]
    writer.close()


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
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    parent: int,
    rank: int,
    world: int,
    port: int,
    device: str,
    timeout: float,
    writer: Any,
    first_stops: bool,
) -> None:
    """What each process runs."""
    end_with_parent(parent)
    if first_stops:
        # A terminal reaches the parent alone then, which passes a Ctrl-C on and knows a second one for what it is.
        os.setpgid(0, 0)
        leave_stops_to_first(rank)
    torch.set_num_threads(1)
    failed = False
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
        # As plain bytes: multiprocessing would send a tensor as a handle, which dies with this process.
        answer = pickle.dumps((failed, work(rank, world, *arguments)))
    except BaseException:  # noqa: BLE001 - whatever it is, the parent must hear of it
        failed = True
        answer = pickle.dumps((failed, traceback.format_exc()))
    _send(writer, answer)
    if dist.is_initialized() and not failed:
        dist.barrier()
        dist.destroy_process_group()


def _collect(processes: list[Any], answers: list[_Answer], timeout: float) -> list[Any]:
    """Wait for every rank's result; stop at the first failure, after a moment for the others to report theirs."""
    deadline = time.monotonic() + timeout + GRACE
    done: dict[int, Any] = {}
    errors: dict[int, str] = {}
    gone: set[int] = set()  # by themselves
    missing = [*range(len(processes))]
    while missing:
        known = len(errors)
        ended = [rank for rank in missing if processes[rank].exitcode is not None]  # all they sent can be read now
        for rank in missing:
            if (answer := answers[rank].whole()) is not None:
                failed, value = pickle.loads(answer)  # noqa: S301 - written by our own child
                (errors if failed else done)[rank] = value
            elif rank in ended:
                gone.add(rank)
                errors[rank] = f"process ended with exit code {processes[rank].exitcode} and no result"
        missing = [rank for rank in missing if rank not in done and rank not in errors]
        if len(errors) > known:
            deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            errors |= dict.fromkeys(missing, "did not finish in time")
            break
        open_pipes = [answers[rank].reader for rank in missing if not answers[rank].ended]
        wait([*open_pipes, *(processes[rank].sentinel for rank in missing)], timeout=0.05)
    if errors:
        _fail(processes, errors, gone)
    return [done[rank] for rank in range(len(processes))]


def _fail(processes: list[Any], errors: dict[int, str], gone: set[int]) -> NoReturn:
    """Raise what ranks failed by: where one of those that are gone was killed, that."""
    text = "\n".join(f"--- rank {rank} ---\n{message}" for rank, message in sorted(errors.items()))
    failed = RankFailed(f"{len(errors)} of {len(processes)} ranks failed:\n{text}")
    killed = next((rank for rank in sorted(gone) if processes[rank].exitcode in KILLED), None)
    if killed is None:
        raise failed
    # What the others say is of the connection that broke.
    one = processes[killed]
    raise RankKilled(
        f"rank {killed} of {len(processes)} was killed (process {one.pid}, {signal.Signals(-one.exitcode).name}), "
        "often because the host ran out of memory. Run the same again, and ask for less if it was the memory."
    ) from failed

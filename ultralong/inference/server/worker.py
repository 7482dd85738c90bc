"""One thread that answers requests in the order in which they came, and can leave one at any time.

The model has one KV cache, so one prompt is read or answered at a time; what its beginning shares with the one before
is not read again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ultralong.inference.decoding import Sampling
from ultralong.inference.engines import RunnerEngine
from ultralong.inference.runner import Interrupted
from ultralong.inference.server.metrics import Metrics
from ultralong.inference.server.text_stream import TextStream

FAREWELL = 1.0  # seconds in which the last answer goes out
LOG = logging.getLogger("ultralong.serve")


class Refused(Exception):
    """A request that is not taken. `status` is HTTP's, `code` OpenAI's name of the error."""

    def __init__(self, status: int, message: str, code: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.parameter = status, code, parameter


@dataclass(frozen=True)
class Job:
    """What is asked of the model.

    Attributes:
        prompt: Token ids.
        max_new_tokens: Most tokens of the answer.
        sampling: How tokens are chosen.
        stop: Strings that end the answer.
        route: Which route it came by, for the metrics.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    route: str = "completions"


class Piece(NamedTuple):
    """A part of an answer: text, and at the end why it ended and what it took; or an error."""

    text: str = ""
    finish_reason: str | None = None
    new_tokens: int = 0
    reused: int = 0
    error: Refused | None = None


@dataclass(eq=False)
class Ticket:
    """A job that waits or is answered; its pieces arrive in the event loop that made it."""

    job: Job
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece] = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    since: float = field(default_factory=time.perf_counter)

    def put(self, piece: Piece) -> None:
        """Hand a piece over to the event loop; from any thread."""
        try:
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
        except RuntimeError:  # the loop has ended, and with it whoever waited
            self.cancelled.set()


class Worker:
    """Answers jobs on a thread of its own.

    Args:
        engine: Answers; used by this thread alone from `start` on.
        limit: Most tokens of a prompt and its answer.
        waiting: Jobs that may wait.
        metrics: Counts.
    """

    def __init__(self, engine: RunnerEngine, limit: int, waiting: int, metrics: Metrics) -> None:
        self.engine, self.limit, self.metrics = engine, limit, metrics
        self._queue: queue.Queue[Ticket | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._run, name="ultralong-serve", daemon=True)
        self._stopping = threading.Event()
        metrics.watch(self._queue.qsize)

    @property
    def alive(self) -> bool:
        """Whether jobs are still answered."""
        return self._thread.is_alive() and not self._stopping.is_set()

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self, timeout: float = 30.0) -> None:
        """Answer nothing more: the job at work is left at its next token or chunk, those that wait are told."""
        self._stopping.set()
        with contextlib.suppress(queue.Full):  # the thread does not wait for jobs then
            self._queue.put_nowait(None)
        self._thread.join(timeout)

    def submit(self, job: Job) -> Ticket:
        """Put a job behind those that wait; called in an event loop.

        Raises:
            Refused: It is too long, too many wait, or the server is stopping.
        """
        total = len(job.prompt) + job.max_new_tokens
        if not job.prompt:
            raise Refused(400, "The prompt has no tokens.", "invalid_prompt")
        if total > self.limit:
            raise Refused(
                400,
                f"The prompt has {len(job.prompt):,} tokens and the answer may have {job.max_new_tokens:,}: together "
                f"{total:,}, and this server takes {self.limit:,}. Shorten the prompt or lower max_tokens.",
                "context_length_exceeded",
            )
        if not self.alive:
            raise Refused(503, "The server is stopping.", "server_stopping")
        ticket = Ticket(job, asyncio.get_running_loop())
        try:
            self._queue.put_nowait(ticket)
        except queue.Full:
            raise Refused(429, f"{self._queue.maxsize} requests wait already. Try again later.", "queue_full") from None
        return ticket

    def _run(self) -> None:
        if self.engine.model.device.type == "cuda":
            torch.cuda.set_device(self.engine.model.device)
        while not self._stopping.is_set():
            ticket = self._queue.get()
            if ticket is not None:
                self._serve(ticket)
        while not self._queue.empty():
            if (left := self._queue.get_nowait()) is not None:
                left.put(Piece(error=Refused(503, "The server is stopping.", "server_stopping")))

    def _serve(self, ticket: Ticket) -> None:
        outcome = "error"
        try:
            outcome = "cancelled" if ticket.cancelled.is_set() else self._answer(ticket)
        except Interrupted:
            outcome = "cancelled"
        except torch.OutOfMemoryError:
            LOG.exception("out of memory")
            text = f"The memory did not hold a prompt of {len(ticket.job.prompt):,} tokens: ask for less."
            ticket.put(Piece(error=Refused(503, text, "out_of_memory")))
            self._end_if_shared()
            self.engine.release()
        except ValueError as error:  # what the runner refuses about this prompt
            ticket.put(Piece(error=Refused(400, str(error), "invalid_request")))
        except Exception:
            LOG.exception("a request failed")
            ticket.put(Piece(error=Refused(500, "The server failed on this request; see its log.", "server_error")))
            self._end_if_shared()
        if outcome == "cancelled" and self._stopping.is_set():
            ticket.put(Piece(error=Refused(503, "The server is stopping.", "server_stopping")))
        self.metrics.requests.labels(ticket.job.route, outcome).inc()

    def _end_if_shared(self) -> None:
        """End the process where others share its prompts: they wait in a collective that this one has left."""
        if self.engine.ranks > 1:
            LOG.critical("the processes of this server stand at different places, which nothing mends: it ends")
            time.sleep(FAREWELL)
            os._exit(1)

    def _answer(self, ticket: Ticket) -> str:
        """Answer a job, piece by piece; how it ended."""
        job, text = ticket.job, TextStream(self.engine.tokenizer, ticket.job.stop)
        self.engine.interrupted = lambda: ticket.cancelled.is_set() or self._stopping.is_set()
        count, reason, began = 0, None, time.perf_counter()
        steps = iter(self.engine.stream(job.prompt, job.max_new_tokens, sampling=job.sampling))
        try:
            for (token,), (ended,) in steps:
                if count == 0:
                    self.metrics.first_token.observe(time.perf_counter() - ticket.since)
                count += token is not None
                piece = text.push(token) if token is not None else ""
                reason = "stop" if text.stopped else ended
                if piece and not reason:
                    ticket.put(Piece(piece))
                if reason:
                    ticket.put(Piece(piece + text.finish(), reason, count, self.engine.reused))
                    break
                if self.engine.interrupted():
                    break
        finally:
            _close(steps)
            self.metrics.count(len(job.prompt), self.engine.reused, count, time.perf_counter() - began)
        return reason or "cancelled"


def _close(steps: Iterator[object]) -> None:
    """Leave the decoding loop, so that other ranks leave it too."""
    close = getattr(steps, "close", None)
    if close is not None:
        close()

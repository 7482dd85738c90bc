"""One thread that takes requests in the order in which they came, and can leave one at any time.

A long prompt is read and answered alone, in a KV cache of its own; what its beginning shares with the one before is not
read again. Short requests are answered together (`short_batch`), also with one that was begun alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from itertools import islice, takewhile

import torch

from ultralong.inference.continuous import ContinuousBatch
from ultralong.inference.decoding import NotANumber, Sampler
from ultralong.inference.engines import RunnerEngine
from ultralong.inference.runner import Interrupted
from ultralong.inference.server.metrics import Metrics
from ultralong.inference.server.short_batch import BatchRow, ShortBatch
from ultralong.inference.server.tickets import Answering, Job, Piece, Refused, Ticket

FAREWELL = 1.0  # seconds in which the last answer goes out
LOG = logging.getLogger("ultralong.serve")


class Worker:
    """Answers jobs on a thread of its own.

    Args:
        engine: Answers; used by this thread alone from `start` on.
        limit: Most tokens of a prompt and its answer.
        waiting: Jobs that may wait.
        metrics: Counts.
        batch: Answers short jobs together; None answers each alone.
    """

    def __init__(
        self, engine: RunnerEngine, limit: int, waiting: int, metrics: Metrics, batch: ContinuousBatch | None = None
    ) -> None:
        self.engine, self.limit, self.metrics = engine, limit, metrics
        engine.most = limit
        self._batch, self._next = batch, deque[Ticket]()  # taken from the queue, and not begun
        self._queue: queue.Queue[Ticket | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._run, name="ultralong-serve", daemon=True)
        self._stopping = threading.Event()
        self._alone, self._group = 0, None if batch is None else ShortBatch(batch, engine, metrics, self._stopping)
        metrics.watch(
            lambda: self._queue.qsize() + len(self._next),
            lambda: max(self._alone, 0 if self._group is None else self._group.running),
        )

    @property
    def alive(self) -> bool:
        """Whether jobs are still answered."""
        return self._thread.is_alive() and not self._stopping.is_set()

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self, timeout: float = 30.0) -> None:
        """Answer nothing more, see `refuse`, and wait for the thread."""
        self.refuse()
        self._thread.join(timeout)
        if self._thread.is_alive() and self.engine.ranks > 1:
            os._exit(1)  # all ranks are in a chunk still: none would hear that they are to end

    def refuse(self) -> None:
        """Answer nothing more: the job at work is left at its next token or chunk, those that wait are told."""
        self._stopping.set()
        with contextlib.suppress(queue.Full):  # the thread does not wait for jobs then
            self._queue.put_nowait(None)

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
            ticket = self._next.popleft() if self._next else self._queue.get()
            if ticket is None:
                continue
            self._next.appendleft(ticket)
            if self._group is not None and len(self._short(2)) == 2:
                self._serve_together(self._group)
            else:
                self._alone = 1
                begun = self._serve(self._next.popleft())
                if self._group is not None and begun is not None:
                    self._serve_together(self._group, begun)
                self._alone = 0
        while self._next or not self._queue.empty():
            if (left := self._next.popleft() if self._next else self._queue.get_nowait()) is not None:
                left.put(Piece(error=Refused(503, "The server is stopping.", "server_stopping")))

    def _short(self, most: int) -> list[Ticket]:
        """Up to so many of those that come next, as long as they are short; they stay where they are."""
        while len(self._next) < most and not self._queue.empty():
            if (ticket := self._queue.get_nowait()) is not None:
                self._next.append(ticket)
        fits = self._batch.capacity if self._batch is not None else 0
        short = takewhile(lambda ticket: ticket.job.tokens <= fits, self._next)
        return list(islice(short, most))

    def _serve_together(self, group: ShortBatch, begun: BatchRow | None = None) -> None:
        """Answer short jobs together, and those that come meanwhile unless a long one is before them.

        Args:
            group: Answers.
            begun: An answer that the engine has begun.
        """

        def take(most: int) -> list[Ticket]:
            tickets = self._short(most)
            for _ in tickets:
                self._next.popleft()
            return tickets

        try:
            if begun is not None:
                group.adopt(begun)
            group.serve(take)
        except Exception as error:
            LOG.exception("a batch of requests failed")
            memory = isinstance(error, torch.OutOfMemoryError)
            text = "The memory did not hold these requests." if memory else "The server failed; see its log."
            group.fail(Refused(503 if memory else 500, text, "out_of_memory" if memory else "server_error"))
            group.release()
            if memory:
                self.engine.release()  # the prompt that it keeps may be long

    def _serve(self, ticket: Ticket) -> BatchRow | None:
        """Answer a job alone; what there is of it where others come that it can be answered with."""
        outcome = "error"
        try:
            found = "cancelled" if ticket.cancelled.is_set() else self._answer(ticket)
            if isinstance(found, BatchRow):
                return found
            outcome = found
        except Interrupted:
            outcome = "cancelled"
        except torch.OutOfMemoryError:
            LOG.exception("out of memory")
            text = f"The memory did not hold a prompt of {len(ticket.job.prompt):,} tokens: ask for less."
            ticket.put(Piece(error=Refused(503, text, "out_of_memory")))
            self._end_if_shared()
            self.engine.release()
        except NotANumber as error:  # the model's fault, not the prompt's
            ticket.put(Piece(error=Refused(500, str(error), "server_error")))
        except ValueError as error:  # what the runner refuses about this prompt
            ticket.put(Piece(error=Refused(400, str(error), "invalid_request")))
        except Exception:
            LOG.exception("a request failed")
            ticket.put(Piece(error=Refused(500, "The server failed on this request; see its log.", "server_error")))
            self._end_if_shared()
        if outcome == "cancelled" and self._stopping.is_set():
            ticket.put(Piece(error=Refused(503, "The server is stopping.", "server_stopping")))
        self.metrics.requests.labels(ticket.job.route, outcome).inc()
        return None

    def _end_if_shared(self) -> None:
        """End the process where others share its prompts: they wait in a collective that this one has left."""
        if self.engine.ranks > 1:
            LOG.critical("the processes of this server stand at different places, which nothing mends: it ends")
            time.sleep(FAREWELL)
            os._exit(1)

    def _answer(self, ticket: Ticket) -> str | BatchRow:
        """Answer a job, piece by piece; how it ended, or what there is of it where others come that can join it."""
        job, answering = ticket.job, Answering(ticket, self.engine.tokenizer, self.metrics)
        self.engine.interrupted = lambda: ticket.cancelled.is_set() or self._stopping.is_set()
        reason, begun, began, sampler = None, None, time.perf_counter(), Sampler(job.sampling)
        steps = iter(self.engine.stream(job.prompt, job.max_new_tokens, sampling=sampler))
        try:
            for (token,), (ended,) in steps:
                answering.reused = self.engine.reused
                reason = answering.take(token, ended)
                if reason or self.engine.interrupted():
                    break
                if self._joined(job):
                    assert token is not None, "the answer goes on"
                    begun = BatchRow(answering, sampler, token)
                    break
        finally:
            _close(steps)
            self.metrics.count(0, 0, 0, time.perf_counter() - began)
            if begun is None:
                self.metrics.count(len(job.prompt), self.engine.reused, answering.count, 0.0)
        return begun or reason or "cancelled"

    def _joined(self, job: Job) -> bool:
        """Whether others come next that a job can be answered with."""
        batch = self._batch
        if batch is None or job.tokens > batch.capacity or self.engine.store is None:
            return False
        return bool(self._short(1))


def _close(steps: Iterator[object]) -> None:
    """Leave the decoding loop, so that other ranks leave it too."""
    close = getattr(steps, "close", None)
    if close is not None:
        close()

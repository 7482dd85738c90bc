"""Short requests answered together, each as it would be alone; one that comes meanwhile joins, one that ends leaves.

One that comes alone is answered by the engine, which keeps prompts. Where another comes, the engine's keys and values
are copied to a row once, and what the row reads is copied back at its end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ultralong.inference.continuous import ContinuousBatch
from ultralong.inference.decoding import NotANumber, Sampler
from ultralong.inference.engines import RunnerEngine
from ultralong.inference.server.metrics import Metrics
from ultralong.inference.server.tickets import Answering, Piece, Refused, Ticket


@dataclass(eq=False)
class BatchRow:
    """One request in a row of the batch."""

    answering: Answering
    sampler: Sampler
    token: int = -1  # to be read next
    read: list[int] | None = None  # where the engine had begun the answer: tokens that the batch has read since


class ShortBatch:
    """Answers tickets in the rows of a continuous batch.

    Args:
        batch: The rows; all are free.
        engine: Whose tokenizer and stop tokens count.
        metrics: Counts.
        stopping: Set when the server stops.
    """

    def __init__(
        self, batch: ContinuousBatch, engine: RunnerEngine, metrics: Metrics, stopping: threading.Event
    ) -> None:
        self._batch, self._engine, self._metrics, self._stopping = batch, engine, metrics, stopping
        self._rows: dict[int, BatchRow] = {}

    @property
    def running(self) -> int:
        """Requests that have a row; any thread may ask."""
        return len(self._rows)

    def release(self) -> None:
        """Free what the batch holds."""
        self._batch.release()

    def serve(self, take: Callable[[int], list[Ticket]]) -> None:
        """Answer until no row is taken.

        Args:
            take: Gives up to so many tickets that fit into a row, and none where another kind is next.
        """
        while True:
            began = time.perf_counter()
            free = self._batch.free
            self._begin(dict(zip(free, [] if self._stopping.is_set() else take(len(free)), strict=False)))
            for row, each in list(self._rows.items()):
                if each.answering.ticket.cancelled.is_set() or self._stopping.is_set():
                    self._end(row, "cancelled")
            if not self._rows:
                return
            logits = self._batch.step({row: each.token for row, each in self._rows.items()})
            for each in self._rows.values():
                if each.read is not None:
                    each.read.append(each.token)
            self._choose(logits)
            self._metrics.count(0, 0, 0, time.perf_counter() - began)
            if not self._rows:
                return  # one that has come now may be alone

    def adopt(self, row: BatchRow) -> None:
        """Go on with an answer that the engine has begun, and which is its last; all rows are free."""
        store = self._engine.store
        assert store is not None, "the engine's answers can be joined"
        row.read, self._rows[0] = [], row
        self._batch.adopt(0, store)

    def fail(self, error: Refused) -> None:
        """Tell all that are being answered."""
        for row, each in list(self._rows.items()):
            each.answering.ticket.put(Piece(error=error))
            self._end(row, "error")

    def _begin(self, tickets: dict[int, Ticket]) -> None:
        """Read prompts and choose their first tokens."""
        for row, ticket in tickets.items():
            answering = Answering(ticket, self._engine.tokenizer, self._metrics)
            self._rows[row] = BatchRow(answering, Sampler(ticket.job.sampling))
        left = [row for row, ticket in tickets.items() if ticket.cancelled.is_set()]
        for row in left:
            self._end(row, "cancelled")
        if prompts := {row: ticket.job.prompt for row, ticket in tickets.items() if row not in left}:
            self._choose(dict(zip(prompts, self._batch.begin(prompts), strict=True)))

    def _choose(self, logits: dict[int, Tensor]) -> None:
        """Choose each row's next token from logits (V,), and end those that end with it."""
        stacked = torch.stack(list(logits.values()))
        found = torch.stack([stacked.argmax(-1), stacked.isnan().any(-1)]).tolist()  # one wait for the GPU
        for (row, scores), likely, broken in zip(logits.items(), *found, strict=True):
            each = self._rows[row]
            if broken:
                each.answering.ticket.put(Piece(error=Refused(500, str(NotANumber()), "server_error")))
                self._end(row, "error")
                continue
            job = each.answering.ticket.job
            each.token = likely if job.sampling.temperature == 0 else int(each.sampler(scores[None]))
            if each.token in self._engine.stop:
                reason = each.answering.take(None, "stop")
            else:
                last = each.answering.count + 1 == job.max_new_tokens
                reason = each.answering.take(each.token, "length" if last else None)
            if reason:
                self._end(row, reason)

    def _end(self, row: int, outcome: str) -> None:
        """Free a row, and count its request."""
        each = self._rows.pop(row)
        answering, store = each.answering, self._engine.store
        if each.read is not None and store is not None and outcome != "error":  # so that the next turn need not read it
            self._batch.give_back(row, store)
            self._engine.extend(each.read)
        self._batch.end(row)
        if outcome == "cancelled" and self._stopping.is_set():
            answering.ticket.put(Piece(error=Refused(503, "The server is stopping.", "server_stopping")))
        self._metrics.requests.labels(answering.ticket.job.route, outcome).inc()
        self._metrics.count(len(answering.ticket.job.prompt), answering.reused, answering.count, 0.0)

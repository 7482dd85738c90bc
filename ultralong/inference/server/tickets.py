"""What is asked of the model and what comes back: jobs, the tickets they wait with, and the pieces of an answer."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ultralong.inference.decoding import Sampling
from ultralong.inference.server.metrics import Metrics
from ultralong.inference.server.text_stream import TextStream


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

    @property
    def tokens(self) -> int:
        """Most tokens of the prompt and its answer."""
        return len(self.prompt) + self.max_new_tokens


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


class Answering:
    """An answer under way: takes its tokens, hands its text over.

    Args:
        ticket: Whose answer it is.
        tokenizer: Of the model.
        metrics: Where the time of its first token is counted.

    Attributes:
        count: Tokens so far.
        reused: Tokens of the prompt that had been read before.
    """

    reused = 0

    def __init__(self, ticket: Ticket, tokenizer: PreTrainedTokenizerBase, metrics: Metrics) -> None:
        self.ticket, self.count, self._metrics = ticket, 0, metrics
        self._text, self._first = TextStream(tokenizer, ticket.job.stop), True

    def take(self, token: int | None, ended: str | None) -> str | None:
        """Take a token; why the answer ends with it, None where it goes on.

        Args:
            token: None where a stop token came.
            ended: Why the decoding ends, if it does.
        """
        if self._first:
            self._metrics.first_token.observe(time.perf_counter() - self.ticket.since)
            self._first = False
        self.count += token is not None
        piece = self._text.push(token) if token is not None else ""
        reason = "stop" if self._text.stopped else ended
        if reason:
            self.ticket.put(Piece(piece + self._text.finish(), reason, self.count, self.reused))
        elif piece:
            self.ticket.put(Piece(piece))
        return reason

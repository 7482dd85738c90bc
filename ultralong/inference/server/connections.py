"""Connections to the server: how long each may be silent, how many there are, and how they end when it stops.

Then answers have some time to end, and those that are at work or wait after it are told.
"""

from __future__ import annotations

import asyncio
import resource
import signal
import socket
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ultralong.inference.server.worker import Worker

SECONDS = 30.0  # for a request's first line and headers
READ = 16384  # bytes that are taken at once: sent in chunks of one byte, asyncio's 256 KiB keep all others for a second
MOST_FILES = 65536  # that are asked of the system; a connection is one
FAREWELL = 3  # seconds in which refusals go out


def claim_files() -> tuple[int, int]:
    """Let this process open as many files as it may.

    Returns:
        The most connections to hold: half of those files, as others wait to be accepted and the model needs some; and
        how many may wait, which asyncio accepts at once.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    files = MOST_FILES if soft == resource.RLIM_INFINITY else soft
    return files // 2, max(1, min(128, files // 16))


class Connection(H11Protocol):
    """uvicorn's connection, which ends where a client sends its headers a byte at a time to keep the socket.

    Attributes:
        most: Connections; one more takes the place of the one that has been silent for the longest time.
    """

    most = MOST_FILES

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        if hasattr(transport, "max_size"):  # asyncio's own
            transport.max_size = READ
        self._waits_since = self.loop.time()
        self._timer = self.loop.call_later(SECONDS, self._look)
        if len(self.connections) > self.most:  # where files run out, nobody is answered, and each try is logged
            silent = [each for each in self.connections if isinstance(each, Connection) and each.silent]
            min(silent, key=lambda each: each._waits_since).transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or was left."""
        self._timer.cancel()  # it holds the connection
        super().connection_lost(exc)

    @property
    def silent(self) -> bool:
        """Whether no request is being answered, and the connection is open."""
        return not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete)

    def on_response_complete(self) -> None:
        """A request was answered, and the next one may come."""
        self._waits_since = self.loop.time()
        super().on_response_complete()

    def _look(self) -> None:
        """Close it where no request has come since; look again later otherwise."""
        if self.transport.is_closing():
            return
        left = SECONDS - (self.loop.time() - self._waits_since)
        if self.silent and left <= 0:
            self.transport.close()
        else:
            self._timer = self.loop.call_later(max(left, 0.0) or SECONDS, self._look)


class Server(uvicorn.Server):
    """uvicorn's server, which refuses what it can't answer any more before it closes connections.

    Args:
        config: uvicorn's.
        worker: Answers.
        grace: Seconds that answers have from the signal on.
    """

    def __init__(self, config: uvicorn.Config, worker: Worker, grace: int) -> None:
        config.timeout_graceful_shutdown = grace + FAREWELL
        super().__init__(config)
        self._worker, self._grace = worker, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop. A second Ctrl-C stops at once, but where several processes answer their command sees to that.

        What is sent to all processes of a service comes here twice: by itself, and from the command.
        """
        super().handle_exit(signal.SIGTERM if self._worker.engine.ranks > 1 else sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, wait, refuse, close."""
        telling = asyncio.create_task(self._refuse_later())
        try:
            await super().shutdown(sockets)
        finally:
            telling.cancel()

    async def _refuse_later(self) -> None:
        await asyncio.sleep(self._grace)
        self._worker.refuse()

"""How the server stops: answers have some time to end, then those that are at work or wait are told."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from ultralong.inference.server.worker import Worker

FAREWELL = 3  # seconds in which refusals go out


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

"""Connections to the server, which have some time to say what they want and are closed then."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 30.0  # for a request's first line and headers


class Connection(H11Protocol):
    """uvicorn's connection, which ends where a client sends its headers a byte at a time to keep the socket."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        self._waits_since = self.loop.time()
        self.loop.call_later(SECONDS, self._look)

    def on_response_complete(self) -> None:
        """A request was answered, and the next one may come."""
        self._waits_since = self.loop.time()
        super().on_response_complete()

    def _look(self) -> None:
        """Close it where no request has come since; look again later otherwise."""
        if self.transport.is_closing():
            return
        answering = self.cycle is not None and not self.cycle.response_complete
        left = SECONDS - (self.loop.time() - self._waits_since)
        if not answering and left <= 0:
            self.transport.close()
        else:
            self.loop.call_later(max(left, 0.0) or SECONDS, self._look)

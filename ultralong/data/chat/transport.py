"""One HTTP request that the server can neither stretch nor swell: its whole time and its size have a limit.

urllib's own time-out is for each read: a server that sends a byte now and then, of the headers even, keeps a request
open for ever.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import urllib.request
from functools import partial
from typing import Any


class TooLong(Exception):
    """An answer has more bytes than are read."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect."""

    def redirect_request(self, *arguments: Any) -> None:
        """A redirect would carry the key to another host, so it is an error like any other."""


class Watch:
    """Cuts the connection of one request when its time is over, wherever the server keeps it waiting."""

    def __init__(self, seconds: float) -> None:
        self.over = False
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> Watch:
        self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()

    def connection(self, kind: type[http.client.HTTPConnection], host: str, **options: Any) -> Any:
        """A connection that this watches."""
        made = kind(host, **options)
        connect = made.connect

        def watched() -> None:
            connect()
            self._socket = made.sock  # urllib takes it away from the connection once an answer begins
            if self.over:  # the time ran out while names were looked up or the connection was made
                made.close()
                raise TimeoutError("cut by the deadline")

        made.connect = watched  # type: ignore[method-assign]
        return made

    def _cut(self) -> None:
        self.over = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # not TLS's own, which would wait for the server


class WatchedRequest(urllib.request.Request):
    """A request with what watches over its time."""

    watch: Watch


class WatchedHttp(urllib.request.HTTPHandler):
    """Opens connections that a `Watch` can cut."""

    def http_open(self, req: Any) -> Any:
        """Open the request."""
        return self.do_open(partial(req.watch.connection, http.client.HTTPConnection), req)


class WatchedHttps(urllib.request.HTTPSHandler):
    """The same over TLS."""

    def https_open(self, req: Any) -> Any:
        """Open the request."""
        return self.do_open(partial(req.watch.connection, http.client.HTTPSConnection), req)


def read_body(response: Any, watch: Watch, most: int) -> bytes:
    """The body of an answer; reading ends once it has more than `most` bytes.

    Raises:
        ConnectionError: The watch has cut the connection; what came so far may look whole.
    """
    content = b""
    while len(content) <= most and (piece := response.read1(1 << 16)):
        content += piece
    if watch.over:
        raise ConnectionError("cut by the deadline")
    return content

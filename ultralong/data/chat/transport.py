"""One HTTP request that the server can neither stretch nor swell: its whole time and its size have a limit.

urllib's own time-out is for each read: a server that sends a byte now and then, of the headers even, keeps a request
open for ever. A lookup of the server's name has no time-out at all.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from ultralong.utils.words import check_variable


def is_this_machine(host: str) -> bool:
    """Whether a host name or address means this machine by its form alone; no name is looked up."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def check_address(url: str, key_variable: str | None) -> None:
    """Refuse an address that is none, that holds a key, or to which a key would travel in the clear.

    Args:
        url: Of an endpoint, up to and with its version.
        key_variable: Name of the variable that holds the key, where one is sent.

    Raises:
        ValueError: One line without the key.
    """
    check_variable(key_variable)
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # which is looked at only now
    except ValueError as error:
        raise ValueError(f"url must be like http://localhost:8000/v1 ({error}).") from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("url: a key does not belong into the address; name a variable with key_variable.")
    if parts.scheme not in ("http", "https") or not host or not url.isprintable() or " " in url:
        raise ValueError(f"url must be like http://localhost:8000/v1, found {url.rpartition('@')[2]!r}.")
    if key_variable and parts.scheme == "http" and not is_this_machine(host):
        raise ValueError(f"url: a key would travel to {host} in the clear. Use https.")


def read_key(variable: str | None) -> str | None:
    """The key that an environment variable holds; None where no variable is named.

    Raises:
        ValueError: The variable is not set, or holds what no key is; the message does not hold it.
    """
    check_variable(variable)
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"the environment variable {variable} holds no key. Set it, or leave it out.")
    if not (key.isascii() and key.isprintable()):  # HTTP clients would refuse it in words that hold the key
        raise ValueError(
            f"the environment variable {variable} holds a line break, or another character that no key has. "
            "Set it anew."
        )
    return key


def answer_hooks(seconds: float, most: int) -> dict[str, list[Any]]:
    """Event hooks of an httpx client that bound each answer; its own time-out is for each read alone.

    Args:
        seconds: For a whole answer.
        most: Bytes of it.

    Returns:
        What `httpx.Client` takes as `event_hooks`. A bound that is passed raises a ValueError while the answer is read,
        and so does a compressed answer, of which a few bytes could fill the memory.
    """

    def begin(request: Any) -> None:
        request.extensions = {**request.extensions, "begun": time.monotonic()}

    def bound(response: Any) -> None:
        if (coding := response.headers.get("content-encoding", "identity")) != "identity":
            raise ValueError(f"a compressed answer ({coding[:20]}), which was not asked for")
        whole, begun = response.stream, response.request.extensions["begun"]

        def pieces() -> Iterator[bytes]:
            size = 0
            for piece in whole:
                size += len(piece)
                if size > most or time.monotonic() - begun > seconds:
                    raise ValueError(f"an answer of more than {most:,} bytes, or {seconds:,.0f} s")
                yield piece

        # httpx asks for a stream of its own class, and the package brings the version that it uses.
        kind = next(base for base in type(whole).__mro__ if base.__name__ == "SyncByteStream")
        does = {"__iter__": lambda _: pieces(), "close": lambda _: whole.close()}
        response.stream = type("Bounded", (kind,), does)()

    return {"request": [begin], "response": [bound]}


class TooLong(Exception):
    """An answer has more bytes than are read."""


class LookupTooLong(OSError):
    """A server's name was not looked up in time: nothing was sent."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect."""

    def redirect_request(self, *arguments: Any) -> None:
        """A redirect would carry the key to another host, so it is an error like any other."""


class _Lookup:
    """The addresses of one name, looked up in a thread of its own, as nothing can interrupt the system's lookup."""

    running: dict[tuple[str, int], _Lookup] = {}  # noqa: RUF012 - one of a name at a time, however many wait for it
    lock = threading.Lock()

    def __init__(self, host: str, port: int) -> None:
        self.name, self.done = (host, port), threading.Event()
        self.found: list[Any] = []
        self.error: OSError | None = None
        threading.Thread(target=self._look, daemon=True, name=f"lookup of {host}").start()

    def _look(self) -> None:
        try:
            self.found = socket.getaddrinfo(*self.name, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            self.error = error if isinstance(error, OSError) else OSError(str(error))
        finally:
            with self.lock:
                self.running.pop(self.name, None)
            self.done.set()


def addresses(host: str, port: int, seconds: float) -> list[Any]:
    """What `socket.getaddrinfo` finds, in bounded time.

    Raises:
        LookupTooLong: It takes longer.
        OSError: There is no such name.
    """
    with _Lookup.lock:
        lookup = _Lookup.running.get((host, port))
        if lookup is None:
            lookup = _Lookup.running[host, port] = _Lookup(host, port)
    if not lookup.done.wait(max(0.0, seconds)):
        raise LookupTooLong(f"the address of {host} was not found within {seconds:.3g} s")
    if lookup.error is not None:
        raise lookup.error
    return lookup.found


class Watch:
    """Cuts the connection of one request when its time is over, wherever it is kept waiting."""

    def __init__(self, seconds: float) -> None:
        self.over = False
        self.until = time.monotonic() + seconds
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> Watch:
        self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()
        if self._socket is not None:
            self._socket.close()

    def connection(self, kind: type[http.client.HTTPConnection], host: str, **options: Any) -> Any:
        """An HTTP connection whose lookups and sockets this watches."""
        made: Any = kind(host, **options)
        made._create_connection = self._connect
        return made

    def _connect(self, address: tuple[str, int], timeout: Any, source: tuple[str, int] | None = None) -> socket.socket:
        """`socket.create_connection` within the time that is left, the lookup of the name included."""
        patience = timeout if isinstance(timeout, int | float) else float("inf")
        error: OSError = OSError(f"{address[0]} has no address")
        for family, kind, protocol, _, place in addresses(*address, min(patience, self.until - time.monotonic())):
            made = socket.socket(family, kind, protocol)
            try:
                made.settimeout(max(1e-3, min(patience, self.until - time.monotonic())))
                if source is not None:
                    made.bind(source)
                made.connect(place)
                made.settimeout(None if patience == float("inf") else patience)
                # A second handle: TLS and urllib take the first one away.
                self._socket = made.dup()
                if self.over:
                    raise TimeoutError("cut by the deadline")
            except OSError as failed:
                made.close()
                error = failed
            else:
                return made
        raise error

    def _cut(self) -> None:
        self.over = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


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

"""What a request must pass before its body is read to the end: the key, for whom it is, and limits of size and time."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ultralong.data.chat.transport import is_this_machine
from ultralong.inference.server.tickets import Refused

BODY_SECONDS = 120.0  # for the whole of a request's body
SMALL_BODY = 2**20  # bytes that are always taken
LARGEST_BODIES = 8  # whose bytes are held at the same time
OPEN_ROUTES = ("/health",)  # for whoever watches the process, without a key
KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


def error_body(error: Refused) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = KINDS.get(error.status, "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.parameter, "code": error.code}}


def _is_meant(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a request is addressed to this machine, and a page that sent it, if one did, comes from there too."""
    try:
        hosts = [urlsplit(f"//{headers.get(b'host', b'localhost').decode('latin-1')}").hostname]
        if b"origin" in headers:
            hosts.append(urlsplit(headers[b"origin"].decode("latin-1")).hostname)
    except ValueError:
        return False
    return all(host is not None and is_this_machine(host) for host in hosts)


class Gate:
    """Refuses requests without the key, those of other people's web pages, and bodies that are too large or too slow.

    Args:
        app: What follows.
        key: The key; None asks for none, and takes only what is addressed to this machine: a browser sends requests of
            any page to a name that its owner lets point here.
        most: Bytes of the largest body.
    """

    def __init__(self, app: ASGIApp, key: str | None, most: int) -> None:
        self._app, self._key, self._most = app, key, most
        self._held = 0  # bytes of all bodies whose requests are under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        given = given.strip() if scheme.lower() == b"bearer" else b""  # a scheme's letters may be small
        if self._key and scope["path"] not in OPEN_ROUTES and not hmac.compare_digest(given, self._key.encode()):
            await self._refuse(
                Refused(401, "The API key is missing or wrong.", "invalid_api_key"), scope, receive, send
            )
            return
        if not self._key and not _is_meant(headers):
            text = "Without a key this server answers requests to this machine's own name alone (--key-variable)."
            await self._refuse(Refused(403, text, "other_host"), scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._most:
            await self._refuse(self._too_large(), scope, receive, send)
            return
        read, whole, until = 0, False, time.monotonic() + BODY_SECONDS
        refused: Refused | None = None

        async def counted() -> Message:
            nonlocal read, whole, refused
            try:  # what follows the body is the client's end, which may take any time
                message = await asyncio.wait_for(receive(), None if whole else until - time.monotonic())
            except TimeoutError:
                refused = Refused(408, f"A request's body has {BODY_SECONDS:g} s to come.", "request_timeout")
                raise refused from None
            whole = whole or not message.get("more_body", False)
            new = len(message.get("body", b""))
            read, self._held = read + new, self._held + new
            refused = self._over(read)
            if refused is not None:
                raise refused
            return message

        async def answered(message: Message) -> None:
            if refused is None:  # otherwise what the routes make of it, as they know no reason
                await send(message)

        try:
            await self._app(scope, counted, answered)
        finally:
            self._held -= read
        if refused is not None:
            await self._refuse(refused, scope, receive, send)

    def _over(self, read: int) -> Refused | None:
        """Why no more is read of a body, of which so many bytes have come."""
        if read > self._most:  # a body sent in pieces says no length
            return self._too_large()
        if read > SMALL_BODY and self._held > LARGEST_BODIES * self._most:
            return Refused(503, "Too many large requests are under way. Try again later.", "server_busy")
        return None

    def _too_large(self) -> Refused:
        return Refused(413, f"A request may have {self._most:,} bytes (--body-mib).", "request_too_large")

    async def _refuse(self, error: Refused, scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse(error_body(error), error.status)(scope, receive, send)

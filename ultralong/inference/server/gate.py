"""What a request must pass before its body is read to the end: the key, and the limit of its size."""

from __future__ import annotations

import hmac
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ultralong.inference.server.tickets import Refused

OPEN_ROUTES = ("/health",)  # for whoever watches the process, without a key
KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


def error_body(error: Refused) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = KINDS.get(error.status, "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.parameter, "code": error.code}}


class Gate:
    """Refuses requests without the key and bodies that are too large.

    Args:
        app: What follows.
        key: The key; None asks for none.
        most: Bytes of the largest body.
    """

    def __init__(self, app: ASGIApp, key: str | None, most: int) -> None:
        self._app, self._key, self._most = app, key, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ").strip()
        if self._key and scope["path"] not in OPEN_ROUTES and not hmac.compare_digest(given, self._key.encode()):
            await self._refuse(
                Refused(401, "The API key is missing or wrong.", "invalid_api_key"), scope, receive, send
            )
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._most:
            await self._refuse(self._too_large(), scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:  # a body sent in pieces says no length
                raise self._too_large()
            return message

        await self._app(scope, counted, send)

    def _too_large(self) -> Refused:
        return Refused(413, f"A request may have {self._most:,} bytes (--body-mib).", "request_too_large")

    async def _refuse(self, error: Refused, scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse(error_body(error), error.status)(scope, receive, send)

"""The routes: OpenAI's chat, completions and models, health, and metrics for Prometheus."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from ultralong.inference.server.bodies import Bodies
from ultralong.inference.server.description import Health, Model, ModelList, answers, describe, facts
from ultralong.inference.server.gate import Gate, error_body
from ultralong.inference.server.replies import Reply
from ultralong.inference.server.requests import ChatRequest, CompletionRequest
from ultralong.inference.server.tickets import Piece, Refused, Ticket
from ultralong.inference.server.worker import Worker

ASK_AGAIN = 0.5  # seconds after which a client that waits is looked for, and whether the server stops
QUIET = 15.0  # most seconds without a byte in a stream: a proxy ends what is silent for a minute, or less
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would keep the pieces back


def make_app(worker: Worker, name: str, *, key: str | None, answer_tokens: int, body_bytes: int) -> FastAPI:
    """The web application.

    Args:
        worker: Answers.
        name: The model's name.
        key: What requests must carry as a bearer token; None asks for nothing.
        answer_tokens: Most tokens of an answer, where a request does not say.
        body_bytes: Largest request.
    """
    app = FastAPI(title="ultralong", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(Gate, key=key, most=body_bytes)
    # A tokenizer's settings change while it encodes, so it can't be shared with the worker's thread, nor used twice.
    tokenizer, encoding = copy.deepcopy(worker.engine.tokenizer), asyncio.Lock()
    _add_refusals(app, worker)
    bodies = Bodies(worker.limit)

    async def respond(body: ChatRequest | CompletionRequest, request: Request, route: str) -> Response:
        if body.model != name:
            raise _other_model(name, body.model)
        async with encoding:  # long texts take seconds; others are heard
            prompt = await asyncio.to_thread(body.prompt, tokenizer, worker.limit)
        most = body.most or max(1, min(answer_tokens, worker.limit - len(prompt)))
        ticket, reply = worker.submit(body.job(prompt, most, route)), Reply(name, route, len(prompt))
        client = Waiting(ticket, request, worker)
        if not body.stream:
            return JSONResponse(reply.whole(*await client.whole()))
        first = await client.next(QUIET)
        if first is not None and first.error is not None:  # as long as nothing was sent, an error can have its status
            raise first.error
        events = _events(client, first, reply, body.with_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)

    @app.post("/v1/chat/completions", **answers("chat/completions"))
    async def chat(request: Request) -> Response:
        return await respond(await bodies.read(ChatRequest, request), request, "chat/completions")

    @app.post("/v1/completions", **answers("completions"))
    async def completions(request: Request) -> Response:
        return await respond(await bodies.read(CompletionRequest, request), request, "completions")

    _add_facts(app, worker, name)
    describe(app, name, with_key=key is not None)
    return app


def _add_facts(app: FastAPI, worker: Worker, name: str) -> None:
    """What is served, and how it is."""
    started = int(time.time())

    @app.get("/v1/models", **facts(ModelList))
    async def models() -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": started, "owned_by": "ultralong"}
        return {"object": "list", "data": [{**model, "max_model_len": worker.limit}]}

    @app.get("/v1/models/{model_id:path}", **facts(Model, 404))
    async def model(model_id: str) -> JSONResponse:
        found = [each for each in (await models())["data"] if each["id"] == model_id]
        return JSONResponse(found[0]) if found else JSONResponse(error_body(_other_model(name, model_id)), 404)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", **facts(Health, 503))
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok" if worker.alive else "stopping"}, 200 if worker.alive else 503)

    @app.get("/metrics", **facts(None))
    async def metrics() -> Response:
        return Response(worker.metrics.page(), media_type=worker.metrics.content_type)


def _other_model(name: str, asked: str) -> Refused:
    return Refused(404, f"This server has the model {name!r}, not {asked[:200]!r}.", "model_not_found", "model")


def _add_refusals(app: FastAPI, worker: Worker) -> None:
    """What is refused, in the form of OpenAI's errors, whoever refuses it."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        worker.metrics.requests.labels(request.url.path.rpartition("/v1/")[2], "refused").inc()
        return JSONResponse(error_body(error), error.status)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        text = str(error.detail)
        if error.status_code in (404, 405):
            routes = [route for route in app.routes if isinstance(route, APIRoute)]
            known = ", ".join(
                f"{method} {route.path_format}"
                for route in routes
                for method in sorted((route.methods or set()) - {"HEAD"})
            )
            text = f"{request.method} {request.url.path[:200]} is not served here. These are: {known}."
        body = error_body(Refused(error.status_code, text, "invalid_request"))
        return JSONResponse(body, error.status_code, error.headers)


class Waiting:
    """A client that waits for the pieces of its answer.

    Args:
        ticket: Where the pieces arrive; it is given up where the client has gone.
        request: The client's.
        worker: Answers.
    """

    def __init__(self, ticket: Ticket, request: Request, worker: Worker) -> None:
        self.ticket, self._request, self._worker = ticket, request, worker

    async def next(self, seconds: float = math.inf, *, watched: bool = True) -> Piece | None:
        """The next piece, or None where none comes for so many seconds.

        Args:
            seconds: How long to wait.
            watched: Whether to look for the client; whoever sends the pieces looks for it too.

        Raises:
            Refused: The client has gone.
        """
        until = time.monotonic() + seconds
        try:
            while True:
                try:
                    left = max(0.0, min(ASK_AGAIN, until - time.monotonic()))
                    return await asyncio.wait_for(self.ticket.pieces.get(), left)
                except TimeoutError:
                    if watched:
                        await self._look()
                    # The worker's own refusal comes only when its chunk is done.
                    if not self._worker.alive and self.ticket.pieces.empty():
                        return Piece(error=Refused(503, "The server is stopping.", "server_stopping"))
                    if time.monotonic() >= until:
                        return None
        except BaseException:
            self.ticket.cancelled.set()
            raise

    async def whole(self) -> tuple[str, Piece]:
        """The whole text, and the last piece.

        Raises:
            Refused: The client has gone, or there is no answer.
        """
        text, looked = "", time.monotonic()
        while True:
            piece = await self.next()
            assert piece is not None, "there is no limit"
            if time.monotonic() - looked > ASK_AGAIN:  # pieces that come fast leave no time to look in `next`
                looked = time.monotonic()
                await self._look()
            if piece.error is not None:
                raise piece.error
            text += piece.text
            if piece.finish_reason is not None:
                return text, piece

    async def _look(self) -> None:
        if await self._request.is_disconnected():
            self.ticket.cancelled.set()
            raise Refused(499, "The client has gone.", "client_gone")


async def _events(client: Waiting, first: Piece | None, reply: Reply, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events of an answer. When the client leaves, this generator is closed and the job given up."""
    try:
        piece = first
        yield _event(reply.opening())
        while True:
            if piece is None:
                yield ": the prompt waits or is being read\n\n"  # a comment, which clients skip
            elif piece.error is not None:
                yield _event(error_body(piece.error))
                return
            elif piece.text or piece.finish_reason:
                yield _event(reply.chunk(piece))
                if piece.finish_reason:
                    break
            piece = await client.next(QUIET, watched=False)
        if with_usage:
            yield _event(reply.usage_chunk(piece))
        yield "data: [DONE]\n\n"
    finally:
        client.ticket.cancelled.set()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

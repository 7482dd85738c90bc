"""The routes: OpenAI's chat, completions and models, health, and metrics for Prometheus."""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import AsyncIterator, Mapping
from itertools import takewhile
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from ultralong.inference.server.gate import Gate, error_body
from ultralong.inference.server.replies import Reply
from ultralong.inference.server.requests import ChatRequest, CompletionRequest
from ultralong.inference.server.tickets import Piece, Refused, Ticket
from ultralong.inference.server.worker import Worker

ASK_AGAIN = 0.5  # seconds after which a client that waits for a whole answer is looked for


def make_app(worker: Worker, name: str, *, key: str | None, answer_tokens: int, body_bytes: int) -> FastAPI:
    """The web application.

    Args:
        worker: Answers.
        name: The model's name.
        key: What requests must carry as a bearer token; None asks for nothing.
        answer_tokens: Most tokens of an answer, where a request does not say.
        body_bytes: Largest request.
    """
    app = FastAPI(title="ultralong", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, key=key, most=body_bytes)
    started = int(time.time())
    # A tokenizer's settings change while it encodes, so it can't be shared with the worker's thread, nor used twice.
    tokenizer, encoding = copy.deepcopy(worker.engine.tokenizer), asyncio.Lock()
    _add_refusals(app, worker)

    async def respond(body: ChatRequest | CompletionRequest, request: Request, route: str) -> Response:
        if body.model != name:
            raise _other_model(name, body.model)
        async with encoding:  # long texts take seconds; others are heard
            prompt = await asyncio.to_thread(body.prompt, tokenizer, worker.limit)
        most = body.most or max(1, min(answer_tokens, worker.limit - len(prompt)))
        ticket, reply = worker.submit(body.job(prompt, most, route)), Reply(name, route, len(prompt))
        if not body.stream:
            return JSONResponse(reply.whole(*await _whole(ticket, request)))
        first = await _next(ticket, request)
        if first.error is not None:  # as long as nothing was sent, an error can have its status
            raise first.error
        events = _events(ticket, first, reply, body.with_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await respond(body, request, "chat/completions")

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await respond(body, request, "completions")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": started, "owned_by": "ultralong"}
        return {"object": "list", "data": [{**model, "max_model_len": worker.limit}]}

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> JSONResponse:
        found = [each for each in (await models())["data"] if each["id"] == model_id]
        return JSONResponse(found[0]) if found else JSONResponse(error_body(_other_model(name, model_id)), 404)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok" if worker.alive else "stopping"}, 200 if worker.alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(worker.metrics.page(), media_type=worker.metrics.content_type)

    return app


def _other_model(name: str, asked: str) -> Refused:
    return Refused(404, f"This server has the model {name!r}, not {asked!r}.", "model_not_found", "model")


def _add_refusals(app: FastAPI, worker: Worker) -> None:
    """What is refused, in the form of OpenAI's errors, whoever refuses it."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        worker.metrics.requests.labels(request.url.path.rpartition("/v1/")[2], "refused").inc()
        return JSONResponse(error_body(error), error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = _place(first)
        text = f"{place or 'the request'}: {first['msg'].removeprefix('Value error, ')}"
        if first["type"] == "extra_forbidden":
            text = f"{place}: this server does not support it. Leave it out."
        if first["type"] == "json_invalid":
            text = f"the request is no JSON: {first['ctx']['error']}, behind character {first['loc'][-1]}"
        if not place and "json" not in request.headers.get("content-type", ""):  # as curl sends what it is told to post
            text = "the request: JSON is needed, sent with the header Content-Type: application/json"
        return await refused(request, Refused(400, text, "invalid_request", place or None))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        text = str(error.detail)
        if error.status_code in (404, 405):
            routes = [route for route in app.routes if isinstance(route, APIRoute)]
            known = ", ".join(
                f"{method} {route.path_format}" for route in routes for method in sorted(route.methods or ())
            )
            text = f"{request.method} {request.url.path[:200]} is not served here. These are: {known}."
        return JSONResponse(error_body(Refused(error.status_code, text, "invalid_request")), error.status_code)


def _place(error: Mapping[str, Any]) -> str:
    """Where in a request something is wrong, in the request's own words."""
    parts = [str(part) for part in error["loc"] if part != "body"]
    if error["type"] == "json_invalid":
        return ""
    if error["type"] != "extra_forbidden":  # where several types are taken, pydantic adds which of them it tried
        parts = list(takewhile(lambda part: part.isidentifier() or part.isdigit(), parts))
    return ".".join(parts).encode("utf-8", "backslashreplace").decode()  # the name of a key may be no text


async def _next(ticket: Ticket, request: Request) -> Piece:
    """The next piece; the job is given up where the client has gone."""
    try:
        while True:
            try:
                return await asyncio.wait_for(ticket.pieces.get(), ASK_AGAIN)
            except TimeoutError:
                if await request.is_disconnected():
                    raise Refused(499, "The client has gone.", "client_gone") from None
    except BaseException:
        ticket.cancelled.set()
        raise


async def _whole(ticket: Ticket, request: Request) -> tuple[str, Piece]:
    """The whole text, and the last piece."""
    text, looked = "", time.monotonic()
    while True:
        piece = await _next(ticket, request)
        if time.monotonic() - looked > ASK_AGAIN:  # pieces that come fast leave no time to look in `_next`
            looked = time.monotonic()
            if await request.is_disconnected():
                ticket.cancelled.set()
                raise Refused(499, "The client has gone.", "client_gone")
        if piece.error is not None:
            raise piece.error
        text += piece.text
        if piece.finish_reason is not None:
            return text, piece


async def _events(ticket: Ticket, first: Piece, reply: Reply, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events of an answer. When the client leaves, this generator is closed and the job given up."""
    try:
        piece: Piece = first
        yield _event(reply.opening())
        while True:
            if piece.error is not None:
                yield _event(error_body(piece.error))
                return
            if piece.text or piece.finish_reason:
                yield _event(reply.chunk(piece))
            if piece.finish_reason:
                break
            piece = await ticket.pieces.get()
        if with_usage:
            yield _event(reply.usage_chunk(piece))
        yield "data: [DONE]\n\n"
    finally:
        ticket.cancelled.set()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

"""The server's description in OpenAPI's form: what is answered by which status, for programs that make clients."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ultralong.inference.server.requests import ChatRequest, CompletionRequest

PATH = "/openapi.json"
SCHEMAS = "#/components/schemas/"
REQUESTS = (ChatRequest, CompletionRequest)
# By status, those of the gate and of every route included.
REFUSALS = {
    400: "The request is not understood, asks for what is not served, or has too many tokens.",
    401: "The key is missing or wrong.",
    403: "Without a key: the request is not addressed to this machine, or comes from another one's web page.",
    404: "There is no such model.",
    408: "The request's body did not come in time.",
    413: "The request is too large.",
    429: "Too many requests wait.",
    500: "The server failed on this request.",
    503: "The memory did not hold the request, too many large ones are under way, or the server is stopping.",
}


class Fault(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str


class Error(BaseModel):
    """A refusal in OpenAI's form. In a stream that has begun it comes as an event."""

    error: Fault


class Cached(BaseModel):
    """Tokens of the prompt that had been read before."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Cached


class _Choice(BaseModel):
    index: Literal[0]
    logprobs: None
    finish_reason: Literal["stop", "length"]


class Said(BaseModel):
    """The turn that was written."""

    role: Literal["assistant"]
    content: str


class ChatChoice(_Choice):
    """The one answer."""

    message: Said


class TextChoice(_Choice):
    """The one answer."""

    text: str


class _Answer(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage


class ChatAnswer(_Answer):
    """A whole answer of `/v1/chat/completions`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextAnswer(_Answer):
    """A whole answer of `/v1/completions`."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class Model(BaseModel):
    """The model that is served; `max_model_len` tokens hold a prompt and its answer."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """All models that are served: one."""

    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """Whether requests are answered."""

    status: Literal["ok", "stopping"]


def _refused(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": Error, "description": REFUSALS[code]} for code in codes}


def answers(route: str) -> dict[str, Any]:
    """What FastAPI is told about a route that answers prompts: "chat/completions" or "completions"."""
    answer: dict[str, Any] = {
        "model": ChatAnswer if route.startswith("chat") else TextAnswer,
        "description": "The answer; with `stream`, server-sent events, a chunk each, and `data: [DONE]` at the end.",
        "content": {"text/event-stream": {}},
    }
    asked = {"$ref": f"{SCHEMAS}{'Chat' if route.startswith('chat') else 'Completion'}Request"}
    body = {"required": True, "content": {"application/json": {"schema": asked}}}
    return {"responses": {200: answer, **_refused(*REFUSALS)}, "openapi_extra": {"requestBody": body}}


def facts(model: type[BaseModel] | None, other: int | None = None) -> dict[str, Any]:
    """What FastAPI is told about a route that tells facts.

    Args:
        model: Of its answer; None for text.
        other: Status that the route itself may have besides 200.
    """
    found: dict[int | str, dict[str, Any]] = {200: {"description": "Found."}, **_refused(401, 403)}
    if model is None:
        found[200]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    else:
        found[200]["model"] = model
    if other == 404:
        found |= _refused(404)
    elif other is not None:
        found[other] = {"model": model, "description": "The server is stopping."}
    return {"responses": found}


def describe(app: FastAPI, name: str, *, with_key: bool) -> None:
    """Serve the description of the routes that an application has by now.

    Args:
        app: The application.
        name: The only model, which requests must name.
        with_key: Whether requests must carry a key.
    """
    page = get_openapi(title=app.title, version="1", openapi_version="3.1.0", routes=app.routes)
    for operations in page["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # which FastAPI adds: what is wrong has status 400 here
            if not with_key:
                operation["responses"].pop("401", None)
    schemas = page["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    kinds: list[tuple[type[BaseModel], Literal["validation"]]] = [(kind, "validation") for kind in REQUESTS]
    schemas |= models_json_schema(kinds, ref_template=SCHEMAS + "{model}")[1]["$defs"]
    for kind in REQUESTS:
        schemas[kind.__name__]["properties"]["model"]["const"] = name
    if with_key:
        page["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        page["security"] = [{"key": []}]
        page["paths"]["/health"]["get"]["security"] = []

    @app.get(PATH, include_in_schema=False)
    async def description() -> dict[str, Any]:
        return page

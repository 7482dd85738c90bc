"""Answers in the shapes of OpenAI's protocol."""

from __future__ import annotations

import time
import uuid
from typing import Any

from ultralong.inference.server.tickets import Piece


class Reply:
    """The answer to one request, whole or in chunks.

    Args:
        model: The model's name.
        route: "chat/completions" or "completions".
        prompt_tokens: Tokens of the prompt.
    """

    def __init__(self, model: str, route: str, prompt_tokens: int) -> None:
        self._chat, self._prompt_tokens = route.startswith("chat"), prompt_tokens
        identity = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": identity, "created": int(time.time()), "model": model}

    def whole(self, text: str, last: Piece) -> dict[str, Any]:
        """The whole answer in one object."""
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": last.finish_reason}
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": [choice], "usage": self._usage(last)}

    def opening(self) -> dict[str, Any]:
        """The first chunk, without text."""
        said: dict[str, Any] = {"delta": {"role": "assistant", "content": ""}} if self._chat else {"text": ""}
        return self._chunk([{"index": 0, **said, "logprobs": None, "finish_reason": None}])

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A chunk with a piece of the text; the last one says why the answer ended."""
        said: dict[str, Any] = {"text": piece.text}
        if self._chat:
            said = {"delta": {"content": piece.text} if piece.text else {}}
        return self._chunk([{"index": 0, **said, "logprobs": None, "finish_reason": piece.finish_reason}])

    def usage_chunk(self, last: Piece) -> dict[str, Any]:
        """The chunk after the last one, where usage was asked for."""
        return {**self._chunk([]), "usage": self._usage(last)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices}

    def _usage(self, last: Piece) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": last.new_tokens,
            "total_tokens": self._prompt_tokens + last.new_tokens,
            "prompt_tokens_details": {"cached_tokens": last.reused},
        }

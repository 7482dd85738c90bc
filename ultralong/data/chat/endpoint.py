"""A chat endpoint that speaks OpenAI's protocol: one request, its retries, and what it cost.

`POST URL/chat/completions` with model and messages, as OpenAI, vLLM, SGLang, llama.cpp and most hosts understand it.
Nothing but the standard library is needed. The key is read from an environment variable that the user names, goes into
the request's header and nowhere else.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from ultralong.data.chat.transport import (
    LookupTooLong,
    NoRedirect,
    TooLong,
    Watch,
    WatchedHttp,
    WatchedHttps,
    WatchedRequest,
    check_address,
    is_this_machine,
    read_body,
    read_key,
)
from ultralong.data.read.messages import is_unicode
from ultralong.utils.text_formats import json_value
from ultralong.utils.words import COVER

AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
SHOWN = 200  # characters of a server's answer in an error message
LARGEST_ANSWER = 1 << 24  # bytes


@dataclass(frozen=True)
class Endpoint:
    """Where requests go and how often they are tried.

    Attributes:
        url: The endpoint's URL with its version, such as `http://localhost:8000/v1`.
        model: The model's name at the endpoint.
        key_variable: Environment variable that holds the key; without it no key is sent.
        temperature: 0 asks for the likeliest answer.
        max_tokens: Most tokens of an answer.
        options: More fields of the request, such as `{"top_p": 0.9}`.
        timeout: Seconds to wait for the server to say anything.
        deadline: Seconds for a whole request, also where its answer arrives in many pieces.
        retries: How often a request is repeated after 429, 5xx, a time-out, a lost connection or an unreadable answer.
        backoff: Seconds before the first repetition; doubled for each further one, with up to half taken off at random
            so that many requests do not come back at once. A server's Retry-After goes first.
        longest_backoff: Seconds that are waited at most.
    """

    url: str
    model: str
    key_variable: str | None = None
    temperature: float = 0.0
    max_tokens: int = 2048
    options: dict[str, Any] = field(default_factory=dict)
    timeout: float = 120.0
    deadline: float = 900.0
    retries: int = 6
    backoff: float = 1.0
    longest_backoff: float = 60.0

    def __post_init__(self) -> None:
        check_address(self.url, self.key_variable)
        if (
            self.max_tokens < 1
            or self.retries < 0
            or min(self.timeout, self.deadline, self.backoff, self.longest_backoff) <= 0
        ):
            raise ValueError("max_tokens, timeout, deadline and backoff must be positive, retries 0 or more.")

    def key(self) -> str | None:
        """The key, from the environment.

        Raises:
            ValueError: The variable is not set.
        """
        return read_key(self.key_variable)


@dataclass(frozen=True)
class Completion:
    """What came back.

    Attributes:
        text: The answer.
        prompt_tokens: As the server counted; None where it did not say.
        answer_tokens: The same for the answer.
        perhaps_billed: Earlier requests for it whose work the server may have done although no answer came.
    """

    text: str
    prompt_tokens: int | None
    answer_tokens: int | None
    perhaps_billed: int = 0


class RequestFailed(Exception):
    """No answer: refused, or every repetition failed.

    Attributes:
        perhaps_billed: Requests whose work the server may have done although no answer came.
    """

    def __init__(self, reason: str, perhaps_billed: int = 0) -> None:
        super().__init__(reason)
        self.perhaps_billed = perhaps_billed


class RequestStopped(Exception):
    """The run is being stopped; the request was not made."""


class _Again(Exception):
    def __init__(self, reason: str, wait: float | None = None, billed: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.billed = wait, billed


class Client:
    """Asks an endpoint; safe to use from several threads.

    Args:
        endpoint: Where.
        stop: Set to give up waiting.
        on_retry: Called with what went wrong before each repetition.
    """

    def __init__(
        self, endpoint: Endpoint, stop: threading.Event | None = None, on_retry: Callable[[str], None] | None = None
    ) -> None:
        self.endpoint, self.stop = endpoint, stop or threading.Event()
        self._key = endpoint.key()
        self._on_retry = on_retry or (lambda reason: None)
        # A proxy of the environment would be handed key and texts that are meant for this machine.
        local = is_this_machine(urlsplit(endpoint.url).hostname or "")
        handlers = [urllib.request.ProxyHandler({})] if local else []
        self._open = urllib.request.build_opener(NoRedirect, WatchedHttp, WatchedHttps, *handlers).open

    def ask(self, messages: list[dict[str, str]], allow: Callable[[], bool] = lambda: True) -> Completion:
        """One answer.

        Args:
            messages: The conversation.
            allow: Asked before a repetition that will be paid for a second time; False gives up.

        Raises:
            RequestFailed: There is none.
            RequestStopped: `stop` was set.
        """
        endpoint, billed = self.endpoint, 0
        body = json.dumps(
            {
                "model": endpoint.model,
                "messages": messages,
                "temperature": endpoint.temperature,
                "max_tokens": endpoint.max_tokens,
                **endpoint.options,
            }
        ).encode()
        for attempt in range(endpoint.retries + 1):
            if self.stop.is_set():
                raise RequestStopped
            try:
                text, usage = self._once(body)
                return Completion(text, usage.get("prompt_tokens"), usage.get("completion_tokens"), billed)
            except RequestFailed as error:
                raise RequestFailed(str(error), billed + error.perhaps_billed) from None
            except _Again as error:
                billed += error.billed
                reason, wait, paid = self._hidden(str(error)), error.wait, error.billed
            if attempt < endpoint.retries:
                if paid and not allow():
                    raise RequestFailed(f"{reason}, and the budget allows no repetition", billed)
                self._on_retry(reason)
                backoff = endpoint.backoff * 2**attempt * random.uniform(0.5, 1.0)
                self.stop.wait(min(max(wait or 0.0, backoff), endpoint.longest_backoff))
        raise RequestFailed(f"{reason}, after {endpoint.retries + 1} requests", billed)

    def _once(self, body: bytes) -> tuple[str, dict[str, Any]]:
        request = WatchedRequest(f"{self.endpoint.url.rstrip('/')}/chat/completions", body, method="POST")
        request.add_header("Content-Type", "application/json")
        if self._key is not None:
            # Unredirected headers stay out of anything that prints a request's headers.
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        with Watch(self.endpoint.deadline) as watch:
            request.watch = watch
            try:
                return _parse(self._content(request, watch))
            except TooLong:
                raise RequestFailed(f"an answer of more than {LARGEST_ANSWER:,} bytes", 1) from None
            except TimeoutError:
                raise _Again(f"no answer in {self.endpoint.timeout:g} s", billed=True) from None
            except urllib.error.URLError as error:
                sent = not isinstance(error.reason, LookupTooLong)
                late = sent and (watch.over or isinstance(error.reason, TimeoutError))
                reason = self._late() if watch.over and sent else f"no connection: {error.reason}"
                raise _Again(reason, billed=late) from None
            except (http.client.HTTPException, OSError, ValueError) as error:
                reason = self._late() if watch.over else f"connection lost: {type(error).__name__}"
                raise _Again(reason, billed=True) from None

    def _late(self) -> str:
        return f"no whole answer in {self.endpoint.deadline:g} s"

    def _content(self, request: WatchedRequest, watch: Watch) -> bytes:
        """The body of the answer, in pieces, so that neither its size nor its pace is the server's choice."""
        try:
            with self._open(request, timeout=self.endpoint.timeout) as response:
                content = read_body(response, watch, LARGEST_ANSWER)
            if len(content) > LARGEST_ANSWER:
                raise TooLong
            # A server that repeats the key would put it into a data set.
            return content if self._key is None else content.replace(self._key.encode(), COVER.encode())
        except urllib.error.HTTPError as error:
            with error:
                said = self._hidden(read_body(error, watch, 1 << 12)[: 1 << 12].decode("utf-8", "replace"))[:SHOWN]
            if error.code in AGAIN:
                raise _Again(f"HTTP {error.code}: {said}", _retry_after(error.headers)) from None
            raise RequestFailed(f"HTTP {error.code}: {said}") from None

    def _hidden(self, text: str) -> str:
        return text if self._key is None else text.replace(self._key, COVER)


def _parse(content: bytes) -> tuple[str, dict[str, Any]]:
    """Text and usage of a completion."""
    try:
        value = json_value(content)
        choice = value["choices"][0]
        text = choice["message"]["content"]
        usage = value.get("usage") or {}
        usage = usage if isinstance(usage, dict) else {}
        ended = choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise _Again(f"unreadable answer: {content[:SHOWN]!r}", billed=True) from None
    if ended == "length":
        raise RequestFailed("the answer was cut at max_tokens", 1)
    if not isinstance(text, str) or not text.strip():
        raise _Again("empty answer", billed=True)
    if not is_unicode(text):
        raise _Again("an answer that is not valid Unicode", billed=True)
    return text, {key: count for key, count in usage.items() if type(count) is int and count >= 0}


def _retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait: a number, or a date."""
    value = headers.get("Retry-After") if headers is not None else None
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(value)
        return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, IndexError, OverflowError):  # no date, or one beyond the calendar
        return None

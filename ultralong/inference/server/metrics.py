"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from ultralong.utils.extras import require

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


class Metrics:
    """Counters, and the page that Prometheus reads.

    Attributes:
        requests: Requests that ended, by route and outcome (stop, length, cancelled, error, refused).
        first_token: Seconds from a request's arrival to its first token.

    Raises:
        ImportError: prometheus-client is missing.
    """

    def __init__(self) -> None:
        client = require("prometheus_client", extra="serve")
        self.registry = client.CollectorRegistry()
        self._page = client.generate_latest
        self.content_type: str = client.CONTENT_TYPE_LATEST
        named = {"registry": self.registry, "namespace": "ultralong"}
        self.requests = client.Counter("requests", "Requests that ended.", ["route", "outcome"], **named)
        self.first_token = client.Histogram(
            "first_token_seconds", "Seconds from a request to its first token.", buckets=SECONDS, **named
        )
        self._prompt = client.Counter("prompt_tokens", "Tokens of prompts.", **named)
        self._reused = client.Counter("reused_tokens", "Tokens of prompts that were not read again.", **named)
        self._new = client.Counter("new_tokens", "Tokens of answers.", **named)
        self._busy = client.Counter("busy_seconds", "Seconds of reading and answering.", **named)
        self._waiting = client.Gauge("waiting_requests", "Requests that wait.", **named)
        self._running = client.Gauge("running_requests", "Requests that are being read or answered.", **named)

    def watch(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Take the numbers of waiting requests and of those at work from functions."""
        self._waiting.set_function(waiting)
        self._running.set_function(running)

    def count(self, prompt: int, reused: int, new: int, seconds: float) -> None:
        """Count the tokens and seconds of one request."""
        self._prompt.inc(prompt)
        self._reused.inc(reused)
        self._new.inc(new)
        self._busy.inc(seconds)

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        return bytes(self._page(self.registry))

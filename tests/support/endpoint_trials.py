"""Answers that no endpoint should give, tried on a version of the library through its command line."""

from __future__ import annotations

import json
import time
from http.server import BaseHTTPRequestHandler

from tests.support.trial_version import Server, Version, last, trial

COMMAND = "data refine RECIPE --url URL"


def _refined(version: Version, name: str, odd: object, *options: str, memory: int = 0) -> tuple[bool, str]:
    """Refine three conversations of which the first gets an odd answer: a fault where the others get none."""
    asked: list[int] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        asked.append(1)
        if len(asked) == 1:
            if isinstance(odd, bytes):
                _send(request, odd)
            else:
                odd(request)  # type: ignore[operator]
        else:
            _send(request, _completion())

    with Server(answer) as server:
        words = ("data", "refine", "chat.yaml", "--url", server.url, "--model", "m", "--retries", "0", "--out", name)
        options = options or ("--timeout", "5")
        printed = version.command(*words, "--concurrency", "1", *options, memory_limit=memory)
    file = version.base / name / "refined.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = sum(line.get("status") == "refined" for line in lines)
    return done < 2 or not printed.endswith("exit 0"), f"{done} of 3 refined: {last(printed)}"


def _completion(**more: object) -> bytes:
    return json.dumps({"choices": [{"message": {"content": "Yes."}, "finish_reason": "stop"}], **more}).encode()


def _send(request: BaseHTTPRequestHandler, body: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


@trial("H", "an endpoint whose body stalls", COMMAND)
def stalls(version: Version) -> tuple[bool, str]:
    def stall(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "9999")
        request.end_headers()
        request.wfile.flush()
        time.sleep(30)

    return _refined(version, "stalled", stall)


@trial("H", "an endpoint whose body ends early", COMMAND)
def resets(version: Version) -> tuple[bool, str]:
    def reset(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "9999")
        request.end_headers()
        request.wfile.write(b"{")
        request.close_connection = True

    return _refined(version, "reset", reset)


@trial("H", "an endpoint that answers half of a surrogate pair", COMMAND)
def surrogate(version: Version) -> tuple[bool, str]:
    return _refined(version, "half", b'{"choices": [{"message": {"content": "half \\ud800 a pair"}}]}')


@trial("H", "an endpoint that counts negative tokens", f"{COMMAND} --budget-tokens 1200")
def negative(version: Version) -> tuple[bool, str]:
    """The conversations are more than the budget holds: a count below zero would refill it."""
    with Server(_completion(usage={"prompt_tokens": -(10**6), "completion_tokens": -5})) as server:
        words = ("data", "refine", "chat.yaml", "--url", server.url, "--model", "m", "--retries", "0", "--out", "owed")
        printed = version.command(*words, "--budget-tokens", "1200", "--max-tokens", "500", "--concurrency", "1")
    report = version.base / "owed" / "report.json"
    told = json.loads(report.read_text()) if report.exists() else {}
    used = next((told[key] for key in ("prompt_tokens", "tokens", "used") if isinstance(told.get(key), int)), 0)
    return used < 0 or len(server.seen) > 2 or not printed.endswith("exit 0"), (
        f"{len(server.seen)} of 3 conversations asked, {used:,} tokens counted: {last(printed)}"
    )


@trial("H", "an endpoint whose usage is a list", COMMAND)
def listed(version: Version) -> tuple[bool, str]:
    return _refined(version, "listed", _completion(usage=[1, 2]))


@trial("H", "an endpoint that names a day beyond the calendar", f"{COMMAND} --retries 1")
def calendar(version: Version) -> tuple[bool, str]:
    def later(request: BaseHTTPRequestHandler) -> None:
        request.send_response(503)
        request.send_header("Retry-After", f"Fri, 31 Dec {9:9<30} 23:59:59 GMT")
        request.send_header("Content-Length", "0")
        request.end_headers()

    return _refined(version, "later", later, "--timeout", "5", "--retries", "1")


@trial("H", "an endpoint that sends 3 GB", f"{COMMAND}, in 2 GiB of memory")
def huge(version: Version) -> tuple[bool, str]:
    def endless(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(3 << 30))
        request.end_headers()
        for _ in range(3 << 10):
            request.wfile.write(b" " * (1 << 20))

    return _refined(version, "huge", endless, "--timeout", "100", memory=2 << 30)

"""An endpoint can neither swell an answer nor send it for ever, nor put the key into what is kept of it."""

from __future__ import annotations

import gzip
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ultralong.inference import openai_engine
from ultralong.inference.openai_engine import OpenAIEngine

pytest.importorskip("openai")
KEY = "sk-0123456789abcdef"
SAID = json.dumps({"id": "1", "object": "text_completion", "choices": [{"text": f"It is {KEY}.", "index": 0,
                   "finish_reason": "stop"}]}).encode()  # fmt: skip


@pytest.fixture
def endpoint(tiny_tokenizer, monkeypatch):
    """An engine of an endpoint that answers as it is told to: a function that writes, and headers."""
    told = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            told["asked"] = {name.lower(): value for name, value in self.headers.items()}
            self.send_response(200)
            for name, value in {"Content-Type": "application/json", "Connection": "close", **told["headers"]}.items():
                self.send_header(name, value)
            self.end_headers()
            told["write"](self.wfile)
            self.close_connection = True

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("A_KEY", KEY)
    monkeypatch.setattr(openai_engine, "RETRIES", 0)
    monkeypatch.setattr(openai_engine, "LARGEST_ANSWER", 1 << 16)
    monkeypatch.setattr(openai_engine, "SECONDS", 1.0)

    def ask(write, **headers):
        told.update(write=write, headers=headers)
        engine = OpenAIEngine(f"http://127.0.0.1:{server.server_port}/v1", tiny_tokenizer, "m", "A_KEY")
        return engine.answer([[1, 2]], [4])[0], told["asked"]

    yield ask
    server.shutdown()
    server.server_close()


def test_an_answer_that_repeats_the_key(endpoint):
    answer, asked = endpoint(lambda out: out.write(SAID))
    assert answer.text == "It is ***."
    assert asked["accept-encoding"] == "identity"
    assert asked["authorization"] == f"Bearer {KEY}"


def _large(out):
    out.write(SAID[:-1])
    for _ in range(64):
        out.write(b" " * 4096)
    out.write(b"}")


def _dripping(out):
    for _ in range(100):
        out.write(b" ")
        out.flush()
        time.sleep(0.05)
    out.write(SAID)


@pytest.mark.parametrize("write", [_large, _dripping])
def test_an_answer_that_swells_or_does_not_end(endpoint, write):
    with pytest.raises(ValueError, match="an answer of more than 65,536 bytes, or 1 s"):
        endpoint(lambda out: write(out))


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br"])
def test_a_compressed_answer_is_refused_unread(endpoint, coding):
    bomb = gzip.compress(b" " * (64 << 20))
    with pytest.raises(ValueError, match=rf"a compressed answer \({coding}\), which was not asked for"):
        endpoint(lambda out: out.write(bomb), **{"Content-Encoding": coding})

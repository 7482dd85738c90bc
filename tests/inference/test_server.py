"""The server, asked by OpenAI's own client over a real socket: answers as the engine gives them, and refusals."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import openai
import pytest
import torch
import torch.distributed as dist
from serve_load import Load

from ultralong import miniature, needle
from ultralong.evaluation.measures.needle import needle_grid
from ultralong.evaluation.runs.run import run
from ultralong.evaluation.runs.settings import RunSettings
from ultralong.inference import engines, sharded_generation
from ultralong.inference.decode_step import plain
from ultralong.inference.decode_step.step import DecodeStep
from ultralong.inference.engines import LocalEngine
from ultralong.inference.load import load_model_and_tokenizer
from ultralong.inference.openai_engine import OpenAIEngine
from ultralong.inference.runner import Interrupted
from ultralong.inference.server import app, worker
from ultralong.inference.server.serve import serve
from ultralong.inference.server.settings import ServeSettings
from ultralong.inference.server.text_stream import TextStream
from ultralong.inference.sharded_engine import ShardedEngine
from ultralong.utils.files import read_jsonl
from ultralong.utils.local_ranks import run_ranks

MODEL = miniature.path()
TALK = [{"role": "user", "content": "Where is the key?"}]


class Running:
    """A server on a thread, and a client of it."""

    def __init__(self, **settings) -> None:
        self.server, self._known = None, threading.Event()
        wanted = ServeSettings(str(MODEL), port=0, device="cpu", **settings)
        self._thread = threading.Thread(target=serve, args=(wanted, self._took), daemon=True)
        self._thread.start()
        assert self._known.wait(120)
        while not self.server.started:
            time.sleep(0.02)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def _took(self, server) -> None:
        self.server = server
        self._known.set()

    def client(self, key: str = "none", **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, **options)

    def get(self, path: str, **headers) -> tuple[int, str]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as line:
            line.request("GET", path, headers=headers)
            answer = line.getresponse()
            return answer.status, answer.read().decode()

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def running():
    found = Running(name="mini", chunk=64, queue=300, answer_tokens=12)
    yield found
    found.stop()


@pytest.fixture(scope="module")
def engine():
    return LocalEngine(*load_model_and_tokenizer(MODEL, "cpu"), chunk=64)


def expected(engine, prompt, budget):
    (answer,) = engine.answer([prompt], [budget])
    return answer


def test_a_completion_is_the_engines_answer(running, engine):
    text = "The number of harbour-lane is 48213. The number of harbour-lane is"
    ids = engine.tokenizer(text)["input_ids"]
    answer = expected(engine, ids, 8)
    for prompt in (text, ids):
        found = running.client().completions.create(model="mini", prompt=prompt, max_tokens=8, temperature=0)
        assert found.choices[0].text == answer.text
        assert found.choices[0].finish_reason == answer.finish_reason
        assert found.usage.prompt_tokens == len(ids)
        assert found.usage.completion_tokens == len(answer.tokens)
        assert found.usage.total_tokens == len(ids) + len(answer.tokens)


def test_a_server_on_one_gpu_decodes_by_the_fused_step(engine, monkeypatch):
    """The choice, and its answers: on a CPU, by the step's operations in torch."""
    made, make = [], sharded_generation.fast_step
    monkeypatch.setattr(engines, "is_fast", lambda model: True)

    def step(model, cache, group, way):
        assert make(model, cache, group, way) is None, "there is none for a CPU"
        made.append(DecodeStep(model, cache, group, plain))
        return made[-1]

    monkeypatch.setattr(sharded_generation, "fast_step", step)
    served = Running(name="mini", chunk=64)
    try:
        for prompt in ([7, 8, 9], [7, 8, 9, 10], [9] * 200):
            found = served.client().completions.create(model="mini", prompt=prompt, max_tokens=6, temperature=0)
            assert found.choices[0].text == expected(engine, prompt, 6).text
    finally:
        served.stop()
    assert [each.checked for each in made] == [True]


def test_a_chat_follows_the_template_whole_and_streamed(running, engine):
    ids = engine.tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    answer = expected(engine, ids, 12)
    asked = {"model": "mini", "messages": TALK, "temperature": 0}
    whole = running.client().chat.completions.create(**asked)
    assert whole.choices[0].message.content == answer.text
    assert whole.usage.prompt_tokens == len(ids)
    chunks = list(
        running.client().chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == answer.finish_reason
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == len(answer.tokens)
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == len(ids) - 1, "the same prompt is read once"


def test_a_seed_repeats_a_sampled_answer_and_another_gives_another(running):
    def say(seed: int) -> str:
        asked = {"model": "mini", "prompt": "Once", "max_tokens": 24, "temperature": 1.5, "seed": seed}
        return running.client().completions.create(**asked).choices[0].text

    assert say(1) == say(1)
    assert len({say(seed) for seed in range(4)}) > 1


def test_a_stop_string_ends_the_answer_and_is_not_in_it(running, engine):
    prompt = engine.tokenizer("Once upon a time")["input_ids"]
    text = expected(engine, prompt, 24).text
    stop = text[5:9]
    asked = {"model": "mini", "prompt": prompt, "max_tokens": 24, "temperature": 0, "stop": [stop, "never said"]}
    whole = running.client().completions.create(**asked)
    streamed = "".join(c.choices[0].text for c in running.client().completions.create(**asked, stream=True))
    assert whole.choices[0].text == streamed == text[: text.index(stop)]
    assert whole.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "other"}, openai.NotFoundError, "'mini'"),
        ({"prompt": "word " * 3000}, openai.BadRequestError, "this server takes 512"),
        ({"prompt": ""}, openai.BadRequestError, "no tokens"),
        ({"prompt": [3, 10**9]}, openai.BadRequestError, "no token 1000000000"),
        ({"prompt": ["a", "b"]}, openai.BadRequestError, "One prompt"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"n": 2}, openai.BadRequestError, "n:"),
        ({"logprobs": 3}, openai.BadRequestError, "logprobs"),
        ({"presence_penalty": 1.0}, openai.BadRequestError, "presence_penalty"),
        ({"stop": [""]}, openai.BadRequestError, "stop"),
        ({"extra_body": {"guided_json": {}}}, openai.BadRequestError, "guided_json: this server does not support it"),
    ],
)
def test_what_is_not_served_is_refused_by_name(running, change, error, words):
    with pytest.raises(error, match=words):
        running.client().completions.create(**{"model": "mini", "prompt": "Once", "max_tokens": 4, **change})
    assert running.client().completions.create(model="mini", prompt="Once", max_tokens=2).usage.completion_tokens >= 0


def test_tools_and_pictures_are_refused(running):
    with pytest.raises(openai.BadRequestError, match="tools"):
        running.client().chat.completions.create(model="mini", messages=TALK, tools=[{"type": "function"}])
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    with pytest.raises(openai.BadRequestError, match="messages"):
        running.client().chat.completions.create(model="mini", messages=picture)


def test_models_health_and_metrics(running):
    with running.client() as client:
        client.completions.create(model="mini", prompt="The tide", max_tokens=2)
        (model,) = client.models.list().data
    assert model.id == "mini"
    assert running.get("/health") == (200, '{"status":"ok"}')
    status, page = running.get("/metrics")
    counts = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert status == 200
    assert float(counts["ultralong_new_tokens_total"]) > 0
    assert float(counts["ultralong_waiting_requests"]) == 0


def test_a_request_at_work_is_counted_as_running(running):
    def at_work():
        page = running.get("/metrics")[1]
        (count,) = (line for line in page.splitlines() if line.startswith("ultralong_running_requests "))
        return float(count.split()[1])

    assert at_work() == 0
    with running.client().completions.create(model="mini", prompt="The tide", max_tokens=300, stream=True) as answer:
        next(iter(answer))
        assert at_work() == 1
    until = time.monotonic() + 20
    while at_work():
        assert time.monotonic() < until, "a request that was left still counts"
        time.sleep(0.05)


def resident() -> float:
    """MiB of memory that this process, and so the server in it, has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def test_an_evaluation_asks_it(running, tmp_path, monkeypatch):
    wanted = RunSettings(str(MODEL), ("infinitebench_passkey",), (384,), samples=2)
    run(wanted, tmp_path / "own", device="cpu", draw=False, quiet=True)
    url = f"http://127.0.0.1:{running.port}/v1"
    asked = replace(wanted, engine="openai", endpoint=url)
    run(asked, tmp_path / "asked", draw=False, quiet=True)
    own, other = (read_jsonl(tmp_path / folder / "infinitebench_passkey-384.jsonl") for folder in ("own", "asked"))
    assert [record["prediction"] for record in own] == [record["prediction"] for record in other]
    assert {record["engine"] for record in other} == {f"openai {url}"}
    assert own[0].keys() == other[0].keys()
    # What is answered is not asked again.
    monkeypatch.setattr(OpenAIEngine, "answer", lambda *arguments, **options: pytest.fail("asked again"))
    run(asked, tmp_path / "asked", draw=False, quiet=True)


def test_a_needle_map_asks_it(running, tmp_path):
    """The outcome of each cell is that of the model opened here, which decodes too."""
    url = f"http://127.0.0.1:{running.port}/v1"
    asked = {"lengths": [256, 400], "depths": [0.5], "samples": 2}
    result = needle("miniature", **asked, engine="openai", endpoint=url, out=tmp_path)
    cells = read_jsonl(tmp_path / "needle.jsonl")
    own = needle_grid(*load_model_and_tokenizer(MODEL, "cpu"), [256, 400], [0.5], 2, 0, method="generate")
    assert [(cell["length"], cell["correct"], cell["missed"]) for cell in cells] == [
        (cell["length"], cell["correct"], cell["missed"]) for cell in own
    ]
    assert result["settings"]["engine"] == "openai"


def test_what_an_endpoint_cannot_do_is_refused_by_name(running, engine, monkeypatch):
    with pytest.raises(ValueError, match="forward pass, which openai does not give"):
        RunSettings("model", ("perplexity", "ruler"), rows="rows", engine="openai", endpoint="http://x/v1")
    with pytest.raises(ValueError, match="belong together"):
        RunSettings("model", ("ruler",), engine="openai")
    with pytest.raises(ValueError, match="leave --gpus"):
        RunSettings("model", ("ruler",), engine="openai", endpoint="http://x/v1", gpus=2)
    url = f"http://127.0.0.1:{running.port}/v1"
    monkeypatch.setenv("NO_KEY", " ")
    with pytest.raises(ValueError, match="NO_KEY holds no key"):
        OpenAIEngine(url, engine.tokenizer, key_variable="NO_KEY")
    asked = OpenAIEngine(url, engine.tokenizer)
    with pytest.raises(ValueError, match="own stop tokens"):
        asked.answer([[5]], [1], stop=[3])
    with pytest.raises(ValueError, match=r"gave no answer to 600 tokens.*Shorten the prompt"):
        asked.answer([[5] * 600], [8])
    with socket.create_server(("127.0.0.1", 0)) as closed:
        free = closed.getsockname()[1]
    monkeypatch.setattr("ultralong.inference.openai_engine.RETRIES", 0)
    with pytest.raises(ValueError, match="can't be asked for its models"):
        OpenAIEngine(f"http://127.0.0.1:{free}/v1", engine.tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("requests", [32, pytest.param(200, marks=pytest.mark.soak)])
def test_many_requests_of_mixed_lengths_with_cancels_and_killed_clients(running, engine, requests):
    """No answer is lost or mixed up, whatever the others do."""
    before, load = resident(), Load(engine, running.port)
    load.run(requests)
    assert load.ended == {
        "whole": requests // 2,
        **dict.fromkeys(("streamed", "left", "killed", "too long"), requests // 8),
    }
    assert running.get("/health")[0] == 200
    assert resident() - before < 100, "MiB; what is kept is one cache and one prompt"


def test_a_key_a_full_queue_and_a_large_body(monkeypatch):
    monkeypatch.setenv("MINI_KEY", "secret")
    served = Running(name="mini", key_variable="MINI_KEY", queue=1, body_mib=1, answer_tokens=100)
    try:
        with pytest.raises(openai.AuthenticationError):
            served.client("wrong").models.list()
        assert served.get("/metrics")[0] == 401
        assert served.get("/health")[0] == 200
        assert served.get("/v1/models", authorization="bearer secret")[0] == 200
        assert served.get("/v1/models", authorization="Basic secret")[0] == 401
        client = served.client("secret")
        with pytest.raises(openai.APIStatusError, match="1,048,576 bytes") as found:
            client.completions.create(model="mini", prompt="x" * 2**20, max_tokens=1)
        assert found.value.status_code == 413

        async def crowd() -> list[object]:
            base = f"http://127.0.0.1:{served.port}/v1"
            async with openai.AsyncOpenAI(base_url=base, api_key="secret", max_retries=0) as asked:
                one = {"model": "mini", "prompt": "Once", "temperature": 1.9, "seed": 3}
                return await asyncio.gather(
                    *(asked.completions.create(**one) for _ in range(6)), return_exceptions=True
                )

        found = asyncio.run(crowd())
        assert any(isinstance(one, openai.RateLimitError) for one in found)
        assert any(isinstance(one, openai.types.Completion) for one in found)
    finally:
        served.stop()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"host": "0.0.0.0"}, "--key-variable"),
        ({"kv": "int4"}, "auto or fp8"),
        ({"queue": 0}, "queue must be 1"),
        ({"grace": -1}, "grace must be 0"),
        ({"port": 70000}, "port must be"),
    ],
)
def test_settings_that_can_not_be_served(settings, words):
    with pytest.raises(ValueError, match=words):
        ServeSettings("model", **settings)


def test_a_missing_key_and_a_window_that_is_too_small_are_told_first(monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(ValueError, match="NO_KEY holds no key"):
        serve(ServeSettings(str(MODEL), key_variable="NO_KEY"))
    monkeypatch.setattr(
        "ultralong.inference.server.serve.with_model", lambda *_, **__: pytest.fail("the model was opened")
    )
    for model in (str(MODEL), "miniature"):
        with pytest.raises(ValueError, match="the model's window is 512"):
            serve(ServeSettings(model, port=0, max_tokens=1024, device="cpu"))


def test_a_taken_port_is_told_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ValueError, match="Give another --port"):
        serve(ServeSettings("no such model", port=taken.getsockname()[1]))


def test_a_prompt_is_left_between_its_chunks_and_what_was_read_is_kept(engine):
    prompt, asked = [7, 8, 9] * 100, []
    engine.interrupted = lambda: len(asked) == 2 or asked.append(1)
    with pytest.raises(Interrupted, match="token 192 of 300"):
        engine.answer([prompt], [4])
    engine.interrupted = bool
    answer = expected(engine, prompt, 4)
    assert answer.reused == 192
    assert answer.tokens == expected(LocalEngine(engine.model, engine.tokenizer), prompt, 4).tokens


def leave_and_ask(rank: int, world: int) -> tuple | None:
    """One rank's part: the first one leaves a prompt after a chunk, then asks for it whole."""
    model, tokenizer = load_model_and_tokenizer(MODEL, "cpu")
    engine = ShardedEngine(model, tokenizer, dist.group.WORLD, chunk=64, quiet=True)
    if rank:
        return engine.follow()
    prompt = [7, 8, 9] * 100
    engine.interrupted = lambda: True
    with pytest.raises(Interrupted):
        engine.answer([prompt], [4])
    engine.interrupted = bool
    (answer,) = engine.answer([prompt], [4])
    engine.close()
    return answer.tokens, answer.reused


def slow(monkeypatch, seconds: float) -> None:
    """Prompts take some time to be read, as long ones do."""
    stream = LocalEngine.stream

    def waits(self, *arguments, **options):
        time.sleep(seconds)
        return stream(self, *arguments, **options)

    monkeypatch.setattr(LocalEngine, "stream", waits)


def test_a_stream_is_never_silent_for_long(running, engine, monkeypatch):
    """A million tokens are read in minutes, and proxies end what is silent for one."""
    slow(monkeypatch, 0.6)
    monkeypatch.setattr(app, "QUIET", 0.1)
    body = {"model": "mini", "prompt": [7, 8, 9], "max_tokens": 4, "temperature": 0, "stream": True}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)) as line:
        line.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = line.getresponse()
        said = answer.read().decode()
    assert answer.getheader("X-Accel-Buffering") == "no"
    assert said.count("\n\n: the prompt waits or is being read\n\n") >= 2
    chunks = list(running.client().completions.create(**body))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected(engine, [7, 8, 9], 4).text


def test_who_waits_is_told_that_the_server_stops(monkeypatch):
    """Their connections were closed without a word."""
    slow(monkeypatch, 1.5)
    monkeypatch.setattr(app, "QUIET", 0.1)
    served = Running(name="mini", grace=0, batch=1)

    async def crowd() -> list[object]:
        base = f"http://127.0.0.1:{served.port}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as client:

            async def streamed():
                stream = await client.completions.create(model="mini", prompt="Once", stream=True)
                return [chunk async for chunk in stream]

            asked = [client.completions.create(model="mini", prompt="Once") for _ in range(2)]
            tasks = [asyncio.ensure_future(each) for each in (*asked, streamed())]
            await asyncio.sleep(0.5)
            served.server.should_exit = True
            return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(crowd())
    served.stop()
    assert all(isinstance(one, openai.APIError) and "server is stopping" in str(one) for one in found), found
    assert [getattr(one, "status_code", None) for one in found] == [503, 503, None]  # a stream had begun


def test_an_answer_may_end_while_the_server_stops(monkeypatch):
    slow(monkeypatch, 1.0)
    served = Running(name="mini", grace=20)
    threading.Timer(0.5, lambda: setattr(served.server, "should_exit", True)).start()
    assert served.client().completions.create(model="mini", prompt="Once", max_tokens=2).usage.completion_tokens
    served.stop()


def test_two_ranks_leave_a_prompt_together(engine):
    tokens, reused = run_ranks(leave_and_ask, 2)[0]
    assert tokens == expected(engine, [7, 8, 9] * 100, 4).tokens
    assert reused > 0


@pytest.mark.slow
def test_the_command_serves_with_two_processes_and_ends_when_told(engine, tmp_path):
    command = [sys.executable, "-m", "ultralong", "serve", str(MODEL), "--gpus", "2", "--device", "cpu", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        line = process.stdout.readline()
        found = re.search(r"Serving miniature at (http://127.0.0.1:\d+/v1)", line)
        client = openai.OpenAI(base_url=found[1], api_key="none", max_retries=0)
        answer = client.completions.create(model="miniature", prompt=[7, 8, 9] * 20, max_tokens=6, temperature=0)
        assert answer.choices[0].text == expected(engine, [7, 8, 9] * 20, 6).text
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < deadline, "a rank goes on without its parent"
            time.sleep(0.1)


@pytest.mark.parametrize("text", ["plain words, and more", "naïve café 😀 日本語 ", "  two  spaces\n\n\tand tabs "])
def test_pieces_of_text_are_the_whole_text(engine, text):
    tokens = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(engine.tokenizer)
    pieces = [*(stream.push(token) for token in tokens), stream.finish()]
    assert "".join(pieces) == engine.tokenizer.decode(tokens, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("stop", "left"), [(["and"], "one, two, "), (["two, a", "x"], "one, "), (["threes"], None), (["e"], "on")]
)
def test_a_stop_string_over_several_tokens(engine, stop, left):
    text = "one, two, and three"
    stream = TextStream(engine.tokenizer, stop)
    said = "".join(stream.push(token) for token in engine.tokenizer(text, add_special_tokens=False)["input_ids"])
    said += stream.finish()
    assert said == (text if left is None else left)
    assert stream.stopped == (left is not None)


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_a_request_that_fails_leaves_the_server_standing(running, engine, monkeypatch, kind):
    """On one process; where several share a prompt they stand at different places then, and the server ends."""
    ended = []
    monkeypatch.setattr(worker.os, "_exit", ended.append)
    monkeypatch.setattr(worker, "FAREWELL", 0.0)
    stream = LocalEngine.stream

    def fail(*args, **kwargs):
        raise kind("for a test")

    for ranks, exits in ((1, []), (2, [1])):
        monkeypatch.setattr(LocalEngine, "ranks", ranks)
        monkeypatch.setattr(LocalEngine, "stream", fail)
        with pytest.raises(openai.InternalServerError):
            running.client().completions.create(model="mini", prompt="Once", max_tokens=2)
        monkeypatch.setattr(LocalEngine, "stream", stream)
        answer = running.client().completions.create(model="mini", prompt=[7, 8, 9], max_tokens=4, temperature=0)
        assert answer.choices[0].text == expected(engine, [7, 8, 9], 4).text
        assert ended == exits

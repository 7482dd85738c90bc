"""Refinement against a server on loopback that refuses, stalls, breaks off and talks nonsense."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ultralong.cli import main
from ultralong.data.chat.budget import Budget
from ultralong.data.chat.endpoint import Endpoint
from ultralong.data.chat.refine import INSTRUCTION, RefineSettings, prompt, refine
from ultralong.data.read.conversations import Conversation
from ultralong.data.recipe.texts import read_conversations
from ultralong.utils.files import read_json, read_jsonl

KEY = "sk-this-is-secret"


class Server(ThreadingHTTPServer):
    """Answers `Refined: <draft>`; a question such as `[429 429]` names what happens to its first requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen, self.headers, self.most, self.now = Counter(), [], 0, 0
        self.lock, self.delay, self.usage = threading.Lock(), 0.0, True
        self.done = threading.Event()  # lets go of the requests that stall

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = request["messages"][1]["content"]
        question = re.search(r"\[user\]\n(.*?)\n\nThe draft", asked, re.DOTALL)[1].split("[user]\n")[-1]
        script = re.search(r"\[([^]]*)\]", question)
        with server.lock:
            number = server.seen[question]
            server.seen[question] += 1
            server.headers.append(dict(self.headers))
            server.now += 1
            server.most = max(server.most, server.now)
        steps = script[1].split() if script else []
        self.act(steps[number] if number < len(steps) else "ok", asked)

    def act(self, step, asked):
        if step == "slow":
            self.server.done.wait(30)  # far beyond any client's patience, whatever else the machine does
        if step == "cut":
            self.leave()
            self.close_connection = True
            return
        if step.isdigit():
            self.answer(
                int(step),
                f"no, {self.headers.get('Authorization', 'nobody')}".encode(),
                {"Retry-After": "0.01"} if step == "429" else {},
            )
            return
        time.sleep(self.server.delay)
        if step in ("junk", "empty", "shape"):
            body = {
                "junk": b"<html>",
                "shape": b'{"choices": []}',
                "empty": b'{"choices": [{"message": {"content": " "}}]}',
            }[step]
            self.answer(200, body)
            return
        draft = asked.split("The draft of the answer:\n\n")[1]
        value = {
            "choices": [
                {"message": {"content": f"Refined: {draft}"}, "finish_reason": "length" if step == "length" else "stop"}
            ]
        }
        if self.server.usage:
            value["usage"] = {"prompt_tokens": 40, "completion_tokens": 10, "total_tokens": 50}
        self.answer(200, json.dumps(value).encode())

    def leave(self):
        """Counted out before a byte of the answer is sent: the client's next request can come right after the last."""
        with self.server.lock:
            self.server.now -= 1

    def answer(self, code, body, headers=()):
        self.leave()
        with contextlib.suppress(ConnectionError):  # the client did not wait
            self.send_response(code)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.done.set()
    running.shutdown()
    thread.join()
    running.server_close()


def talk(name, question="Where?", answers=("There.",)):
    messages = [{"role": "system", "content": "Be brief."}]
    for number, answer in enumerate(answers):
        messages += [
            {"role": "user", "content": f"{question} {name}.{number}"},
            {"role": "assistant", "content": answer},
        ]
    return Conversation(name, messages, "s", "MIT", "math")


def settings(server, **changes):
    endpoint = {"timeout": 5.0, "backoff": 0.01, "retries": 3, "max_tokens": 30}
    more = {key: changes.pop(key) for key in list(changes) if key in (*endpoint, "key_variable")}
    return RefineSettings(Endpoint(server.url, "m", **{**endpoint, **more}), **changes)


def test_each_refinement_stands_beside_its_original(server, tmp_path):
    server.delay = 0.05
    talks = [talk(f"t{n}") for n in range(20)]
    report = refine(talks, tmp_path, settings(server, concurrency=4), quiet=True)
    records = read_jsonl(tmp_path / "refined.jsonl")
    assert [record["id"] for record in records] == [t.id for t in talks]
    for record, original in zip(records, talks, strict=True):
        assert record["original"] == original.messages
        assert record["messages"] == [*original.messages[:-1], {"role": "assistant", "content": "Refined: There."}]
        assert (record["status"], record["license"], record["category"]) == ("refined", "MIT", "math")
        assert record["usage"] == {"prompt_tokens": 40, "answer_tokens": 10}
    assert (report.refined, report.failed, report.prompt_tokens, report.answer_tokens) == (20, 0, 800, 200)
    assert 2 <= server.most <= 4
    refine(talks, tmp_path, settings(server, concurrency=4), quiet=True)
    assert sum(server.seen.values()) == 20, "what is done is not asked again"


@pytest.mark.parametrize(
    ("script", "tries", "status", "reason"),
    [
        ("429 429", 3, "refined", None),
        ("500 503", 3, "refined", None),
        ("cut", 2, "refined", None),
        ("junk shape empty", 4, "refined", None),
        ("slow", 2, "refined", None),
        ("500 500 500 500", 4, "failed", "HTTP 500: no, nobody, after 4 requests"),
        ("400", 1, "failed", "HTTP 400: no, nobody"),
        ("401", 1, "failed", "HTTP 401"),
        ("302", 1, "failed", "HTTP 302"),
        ("length", 1, "failed", "cut at max_tokens"),
    ],
)
def test_what_goes_wrong_is_repeated_or_recorded(server, tmp_path, script, tries, status, reason):
    talks = [talk("a", f"Where [{script}]?"), talk("b")]
    report = refine(talks, tmp_path, settings(server, timeout=1.0 if "slow" in script else 5.0), quiet=True)
    first, second = read_jsonl(tmp_path / "refined.jsonl")
    assert first["status"] == status
    assert second["status"] == "refined", "one's failure is not another's"
    assert first["original"] == talks[0].messages
    assert server.seen[f"Where [{script}]? a.0"] == tries
    assert report.retries == tries - 1
    if reason is not None:
        assert reason in first["error"]
        assert first["messages"] == talks[0].messages
        assert report.reasons == {first["error"]: 1}
        refine(talks, tmp_path, settings(server, timeout=1.0), quiet=True)
        again = read_jsonl(tmp_path / "refined.jsonl")
        assert again[0]["status"] == "refined", "a failure is tried again by the next run"
        assert again[1] == second


def test_backoff_doubles_and_a_server_may_ask_for_more(server, tmp_path):
    started = time.perf_counter()
    refine([talk("a", "Where [500 500 500]?")], tmp_path, settings(server, backoff=0.1), quiet=True)
    assert time.perf_counter() - started >= 0.35, "half of 0.1 + 0.2 + 0.4 s at least"


def test_all_turns_build_on_the_refined_ones(server, tmp_path):
    refine([talk("a", answers=("One.", "Two."))], tmp_path, settings(server, turns="all"), quiet=True)
    (record,) = read_jsonl(tmp_path / "refined.jsonl")
    assert [m["content"] for m in record["messages"] if m["role"] == "assistant"] == ["Refined: One.", "Refined: Two."]
    assert [m["content"] for m in record["original"] if m["role"] == "assistant"] == ["One.", "Two."]
    sent = prompt(INSTRUCTION, record["messages"])[1]["content"]
    assert "Refined: One." in sent
    assert record["usage"] == {"prompt_tokens": 80, "answer_tokens": 20}


@pytest.mark.parametrize(
    "limit", [{"budget_tokens": 3000}, {"budget_money": 0.3, "prompt_price": 100.0, "answer_price": 100.0}]
)
def test_a_budget_is_never_exceeded_and_lasts_over_runs(server, tmp_path, limit):
    talks = [talk(f"t{n}") for n in range(80)]
    report = refine(talks, tmp_path, settings(server, concurrency=8, **limit), quiet=True)
    used = report.prompt_tokens + report.answer_tokens
    assert 0 < used == 50 * report.refined <= 3000
    assert report.refined + report.left == 80
    assert report.left > 0
    asked = sum(server.seen.values())
    again = refine(talks, tmp_path, settings(server, concurrency=1, **limit), quiet=True)
    assert again.prompt_tokens + again.answer_tokens <= 3000
    assert again.refined - report.refined == sum(server.seen.values()) - asked
    done = refine(talks, tmp_path, settings(server), quiet=True)
    assert (done.refined, done.left, sum(server.seen.values())) == (80, 0, 80)


def test_what_may_have_been_billed_counts(server, tmp_path):
    server.usage = False
    report = refine([talk("a", "Where [slow]?")], tmp_path, settings(server, timeout=1.0), quiet=True)
    most = sum(len(m["content"].encode()) + 16 for m in prompt(INSTRUCTION, talk("a", "Where [slow]?").messages))
    assert (report.prompt_tokens, report.answer_tokens) == (2 * most, 60), "a time-out and an answer without a count"
    tight = settings(server, timeout=1.0, budget_tokens=most + 31)
    assert refine([talk("b", "Where [slow]?")], tmp_path / "b", tight, quiet=True).reasons == {
        "no answer in 1 s, and the budget allows no repetition": 1
    }


def test_many_threads_cannot_overdraw():
    budget = Budget(1000)
    granted = []

    def take():
        for _ in range(200):
            if budget.reserve(7, 3):
                granted.append(1)
                budget.settle((7, 3), (4, 3))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.tokens == 7 * len(granted) <= 1000
    assert len(granted) < 8 * 200


def test_the_key_goes_into_the_header_and_nowhere_else(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MY_KEY", KEY)
    talks = [talk("a", "Where [429]?"), talk("b", "Where [400]?")]
    refine(talks, tmp_path, settings(server, key_variable="MY_KEY"), quiet=True)
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    everything = "".join([*written, *capfd.readouterr()])
    assert KEY not in everything
    assert "Bearer ***" in everything
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ValueError, match="MY_KEY holds no key"):
        refine(talks, tmp_path, settings(server, key_variable="MY_KEY"), quiet=True)


def recipe(tmp_path, count):
    lines = [json.dumps({"id": f"t{n}", "question": f"Where? {n}", "answer": "There."}) for n in range(count)]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    (tmp_path / "mine.yaml").write_text(
        json.dumps(
            {
                "name": "mine",
                "description": "d",
                "kind": "chat",
                "sources": [{"name": "a", "license": "MIT", "path": "talks.jsonl", "read": {"id_field": "id"}}],
            }
        )
    )
    return tmp_path / "mine.yaml"


def test_killed_and_resumed_by_command(server, tmp_path):
    server.delay = 0.1
    path = recipe(tmp_path, 30)
    command = [
        sys.executable,
        "-m",
        "ultralong",
        "data",
        "refine",
        str(path),
        "--url",
        server.url,
        "--model",
        "m",
        "--out",
        str(tmp_path / "out"),
        "--concurrency",
        "2",
        "--quiet",
    ]
    log = tmp_path / "out" / "refined.jsonl"
    process = subprocess.Popen(command, env={**os.environ, "no_proxy": "*"})
    while not (log.exists() and log.read_bytes().count(b"\n") >= 6):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(log, "a") as stream:
        stream.write('{"id": "a/t2')  # a line that the kill cut off
    done = {record["id"] for record in read_jsonl(log)}
    before = dict(server.seen)
    server.delay = 0.0
    main([*command[3:], "--json", str(tmp_path / "report.json")])
    assert read_json(tmp_path / "report.json")["refined"] == 30
    records = read_jsonl(log)
    assert [record["id"] for record in records] == [f"a/t{n}" for n in range(30)]
    for n in range(30):
        if f"a/t{n}" in done:
            assert server.seen[f"Where? {n}"] == before[f"Where? {n}"] == 1, "what was finished is not paid for twice"
    assert sum(count > 1 for count in server.seen.values()) <= 2, "only what was under way is asked again"
    (tmp_path / "read.yaml").write_text(
        json.dumps(
            {
                "name": "read",
                "description": "d",
                "kind": "chat",
                "sources": [
                    {"name": "a", "license": "MIT", "path": "out/refined.jsonl", "read": {"field": "messages"}}
                ],
            }
        )
    )
    assert all(talk.messages[-1]["content"] == "Refined: There." for talk in read_conversations(tmp_path / "read.yaml"))


def test_another_question_is_another_folder(server, tmp_path):
    refine([talk("a")], tmp_path, settings(server), quiet=True)
    with pytest.raises(ValueError, match="made with other settings"):
        refine([talk("a")], tmp_path, settings(server, instruction="Be rude."), quiet=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"url": "localhost:8000"}, "must be like"),
        ({"url": "https://me:secret@host/v1"}, "does not belong"),
        ({"url": "http://example.org/v1", "key_variable": "K"}, "in the clear"),
        ({"retries": -1}, "retries"),
        ({"timeout": 0}, "positive"),
    ],
)
def test_nonsense_endpoints_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Endpoint(**{"url": "http://localhost/v1", "model": "m", **wrong})


@pytest.mark.parametrize(("wrong", "message"), [({"concurrency": 0}, "concurrency"), ({"budget_money": 1.0}, "price")])
def test_nonsense_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        RefineSettings(Endpoint("http://localhost/v1", "m"), **wrong)

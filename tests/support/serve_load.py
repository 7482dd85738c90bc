"""A server under load by OpenAI's own client: `python tests/support/serve_load.py OUT.json --requests 200 --rounds 3`.

Of every eight requests, five ask for a whole answer, one of them streamed; one leaves after the first piece of its
stream, one sends its request and is gone, and one has a prompt beyond the model's window. Every answer is compared with
the engine's own for that prompt. Run as a program it serves the miniature in a process of its own, whose memory is
read before the first round and after each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from urllib.request import urlopen

import openai

from ultralong import miniature
from ultralong.bench.results import write_rows
from ultralong.inference.engines import LocalEngine
from ultralong.inference.load import load_model_and_tokenizer

NEW, WINDOW = 8, 512
KINDS = {4: "streamed", 5: "left", 6: "killed", 7: "too long"}


class Load:
    """Requests of mixed lengths to one server.

    Args:
        engine: Whose answers are the right ones.
        port: Of the server at this machine.
        seed: Of prompts and of the moments at which requests begin.

    Attributes:
        ended: Requests by kind, of those that ended as they should.
        seconds: Of each whole answer.
    """

    def __init__(self, engine: LocalEngine, port: int, seed: int = 0) -> None:
        self.port, self._draw = port, random.Random(seed)
        words = Path(__file__).read_text().split()
        texts = [" ".join(self._draw.choices(words, k=self._draw.randint(1, 90))) for _ in range(25)]
        self.prompts = [engine.tokenizer(text)["input_ids"][: WINDOW - NEW] for text in texts]
        self.answers = [engine.answer([prompt], [NEW])[0].text for prompt in self.prompts]
        self.ended: Counter[str] = Counter()
        self.seconds: list[float] = []

    def run(self, requests: int) -> None:
        """Send so many requests within two seconds, and wait for all of them.

        Raises:
            AssertionError: An answer is not the engine's.
        """
        asyncio.run(self._run(requests))

    async def _run(self, requests: int) -> None:
        base = f"http://127.0.0.1:{self.port}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0, timeout=400) as client:
            await asyncio.gather(*(self._ask(client, number) for number in range(requests)))

    async def _ask(self, client: openai.AsyncOpenAI, number: int) -> None:
        kind, place = KINDS.get(number % 8, "whole"), number % len(self.prompts)
        asked = {"model": "mini", "prompt": self.prompts[place], "max_tokens": NEW, "temperature": 0}
        await asyncio.sleep(self._draw.random() * 2)
        begin = time.perf_counter()
        match kind:
            case "left":
                async with await client.completions.create(**asked, stream=True) as stream:
                    async for _ in stream:
                        break
            case "killed":
                body = json.dumps({**asked, "stream": True}).encode()
                _, line = await asyncio.open_connection("127.0.0.1", self.port)
                line.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
                line.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
                await line.drain()
                line.transport.abort()
            case "too long":
                try:
                    await client.completions.create(**{**asked, "prompt": [5] * 600})
                except openai.BadRequestError:
                    pass
                else:
                    raise AssertionError("a prompt beyond the window was answered")
            case "streamed":
                stream = await client.completions.create(**asked, stream=True)
                text = "".join([chunk.choices[0].text async for chunk in stream])
                assert text == self.answers[place], f"request {number}: {text!r}"
            case _:
                text = (await client.completions.create(**asked)).choices[0].text
                assert text == self.answers[place], f"request {number}: {text!r}"
        if kind in ("whole", "streamed"):
            self.seconds.append(time.perf_counter() - begin)
        self.ended[kind] += 1


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    (line,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return round(int(line) / 1024, 1)


def peak_mib(pid: int) -> float:
    """Largest resident memory that a process has had."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(line) / 1024


def main() -> None:
    """Serve, load, and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    wanted = parser.parse_args()
    engine = LocalEngine(*load_model_and_tokenizer(miniature.path(), "cpu"), chunk=64)
    command = [sys.executable, "-m", "ultralong", "serve", str(miniature.path()), "--port", "0", "--name", "mini"]
    command += ["--device", "cpu", "--chunk", "64", "--queue", str(wanted.requests)]
    with (
        tempfile.NamedTemporaryFile(mode="w+") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as server,
    ):
        try:
            while not (said := re.search(r"http://127\.0\.0\.1:(\d+)", Path(log.name).read_text())):
                assert server.poll() is None, Path(log.name).read_text()
                time.sleep(0.1)
            load = Load(engine, int(said[1]))
            load.run(16)  # what is made once
            memory = [resident_mib(server.pid)]
            warm, load.seconds, begin = sum(load.ended.values()), [], time.perf_counter()
            for _ in range(wanted.rounds):
                load.run(wanted.requests)
                memory.append(resident_mib(server.pid))
            took = time.perf_counter() - begin
            with urlopen(f"http://127.0.0.1:{load.port}/health") as answer:
                healthy = answer.status == 200
        finally:
            server.terminate()
    row = {
        "requests": wanted.requests,
        "rounds": wanted.rounds,
        "prompt_tokens": [min(map(len, load.prompts)), max(map(len, load.prompts))],
        "new_tokens": NEW,
        "seconds": round(took, 1),
        "warm_requests": warm,
        "ended_as_they_should": dict(load.ended),
        "wrong_answers": 0,  # one would have ended this program
        "seconds_of_an_answer": {
            "median": round(median(load.seconds), 3),
            "percentile_95": round(quantiles(load.seconds, n=20)[-1], 3),
            "longest": round(max(load.seconds), 3),
        },
        "server_memory_mib": memory,
        "healthy_after": healthy,
        "openai": version("openai"),
    }
    write_rows(wanted.out, [row])
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()

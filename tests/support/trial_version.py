"""A version of the library whose command line is tried with faults and hostile inputs, and the register of trials."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ultralong.bench.results import write_rows

SECONDS = 150  # of a command that ends by itself, on a machine that does much else
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
ANSWER = json.dumps({"choices": [{"message": {"content": "Yes."}, "finish_reason": "stop"}]}).encode()
DEEP = "[" * 100_000 + "]" * 100_000


# A process of the version that has imported what takes seconds, and forks for each command.
WARM = """
import json, os, resource, signal, sys, traceback
import torch, transformers, accelerate, torch.distributed.checkpoint, transformers.models.llama
from ultralong.cli import main
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    ask = json.loads(line)
    number = os.fork()
    if number:
        print(number, flush=True)
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    for stream, place in ((0, os.devnull), (1, ask["output"]), (2, ask["output"])):
        os.dup2(os.open(place, os.O_RDWR | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(ask["env"])
    if ask["limit"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (ask["limit"], ask["limit"]))
    if ask["memory"]:
        resource.setrlimit(resource.RLIMIT_DATA, (ask["memory"], ask["memory"]))
    sys.argv, sys.stdout, code = ["ultralong", *ask["words"]], open(1, "w", closefd=False), 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()
        with open(ask["output"] + ".code", "w") as file:
            file.write(str(code))
    finally:
        os._exit(0)
"""


@dataclass
class Version:
    """One version: its interpreter, and a folder with a model, rows and a run of its own."""

    python: str
    base: Path
    count: int = 0

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            [self.python, "-c", WARM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.base,
            env=environment(None),
        )

    @property
    def name(self) -> str:
        """Its number and, in a clone, its commit."""
        script = "import ultralong; print(ultralong.__version__, ultralong.__path__[0])"
        words = [self.python, "-c", script]
        number, _, folder = subprocess.check_output(words, cwd=self.base, text=True).strip().partition(" ")
        words = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
        return f"{number} ({commit})" if commit else number

    def command(
        self, *words: object, env: dict[str, str] | None = None, file_limit: int = 0, memory_limit: int = 0
    ) -> str:
        """What a command printed, with `exit N` at its end; `exit late` where it did not end."""
        number, output = self._run(words, env, file_limit, memory_limit)
        code, end = Path(f"{output}.code"), time.monotonic() + SECONDS
        while time.monotonic() < end and _lives(number):
            time.sleep(0.05)
        if _lives(number):
            os.killpg(number, signal.SIGKILL)
            return f"{output.read_text(errors='replace')}\nexit late"
        return f"{output.read_text(errors='replace')}\nexit {code.read_text() if code.exists() else 'killed'}"

    def start(self, *words: object) -> int:
        """A command that is not waited for: its process id."""
        return self._run(words, None)[0]

    def _run(
        self, words: tuple[object, ...], env: dict[str, str] | None, file_limit: int = 0, memory_limit: int = 0
    ) -> tuple[int, Path]:
        self.count += 1
        output = self.base / f"output-{self.count}"
        ask = {"words": list(map(str, words)), "env": env or {}, "output": str(output)}
        ask |= {"limit": file_limit, "memory": memory_limit}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(ask) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), output

    def prepare(self) -> None:
        """Model, texts, conversations, rows and a run of four steps."""
        torch.manual_seed(0)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<|start|>", "<|end|>")])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
        tokenizer.chat_template = TEMPLATE
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=512, **shape)
        LlamaForCausalLM(config).save_pretrained(self.base / "model")
        tokenizer.save_pretrained(self.base / "model")
        (self.base / "texts").mkdir()
        for n in range(12):
            (self.base / "texts" / f"{n}.txt").write_text(f"Entry {n}: the tide came in and no ship had passed. " * 12)
        talks = [{"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"{n}."}]}
                 for n in range(3)]  # fmt: skip
        (self.base / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
        self.recipe("docs.yaml", "texts")
        self.recipe("chat.yaml", "talks.jsonl", "kind: chat\npacking: {max_tokens: 128}\n")
        print(self.command(*self.pack("docs.yaml", "rows"))[-200:])
        (self.base / "run.yaml").write_text(
            f"model: {self.base}/model\nout: {self.base}/run\ndata: [{{rows: {self.base}/rows}}]\nsteps: 4\n"
            "rows_per_step: 2\ndtype: float32\nsave_every: 2\n"
        )
        print(self.command("train", "run.yaml")[-200:])

    def recipe(self, name: str, path: str, more: str = "") -> None:
        """Write a recipe of one source."""
        (self.base / name).write_text(
            f"name: r\ndescription: d\n{more}sources:\n- {{name: s, license: CC0-1.0, path: {path}}}\n"
        )

    def pack(self, recipe: str, out: str, model: str = "model") -> tuple[str, ...]:
        """The command that packs a recipe."""
        return ("pack", recipe, "--tokenizer", model, "--length", "256", "--out", out)

    def again(self) -> Path:
        """The run without its result, so that it is resumed from its last checkpoint; returns that checkpoint."""
        shutil.rmtree(self.base / "run" / "model", ignore_errors=True)
        (self.base / "run" / "result.json").unlink(missing_ok=True)
        return max((self.base / "run" / "checkpoints").glob("step-*"))

    def copy(self, name: str) -> Path:
        """A copy of the model that may be broken."""
        return Path(shutil.copytree(self.base / "model", self.base / name))


def environment(changes: dict[str, str] | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""} | (changes or {})


def _lives(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def session(number: int) -> list[int]:
    """Processes that live in a session, which a command's process leads."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state, _, _, own, *_ = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            found += [int(entry)] if int(own) == number and state not in "ZX" else []
    return found


def last(printed: str) -> str:
    lines = [line for line in re.split(r"[\r\n]+", printed) if line.strip()]
    return lines[-2][-160:] if len(lines) > 1 else lines[-1]


Trial = Callable[[Version], tuple[bool, str]]
TRIALS: dict[str, tuple[str, str, Trial]] = {}  # name: (kind, command, trial)


def trial(kind: str, name: str, command: str) -> Callable[[Trial], Trial]:
    """Register a trial: it returns whether the fault was there, and what was seen."""

    def register(work: Trial) -> Trial:
        TRIALS[name] = (kind, command, work)
        return work

    return register


def told(version: Version, *words: object, **options: Any) -> tuple[bool, str]:
    """A fault where the command prints a traceback, succeeds, or never ends; none where it is one line."""
    printed = version.command(*words, **options)
    return "Traceback" in printed or not printed.endswith("exit 1"), last(printed)


def wait(until: Callable[[], bool], seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:
        time.sleep(0.2)


class Server:
    """An HTTP server on this machine that gives every request one body, or does one thing, and counts the requests."""

    def __init__(self, answer: bytes | Callable[[BaseHTTPRequestHandler], None]) -> None:
        self.seen: list[dict[str, str]] = []
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                seen.append(dict(self.headers))
                with contextlib.suppress(OSError):  # a client that has gone
                    if isinstance(answer, bytes):
                        self.send_response(200)
                        self.send_header("Content-Length", str(len(answer)))
                        self.end_headers()
                        self.wfile.write(answer)
                    else:
                        answer(self)

            do_GET = do_CONNECT = do_POST

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Server:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def main() -> None:
    """Try every registered trial on one or two versions and record what came of it, beside what the file holds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("after")
    parser.add_argument("before", nargs="?")
    parser.add_argument("--only", nargs="*", default=[], help="trials whose name holds one of these")
    parser.add_argument("--json", type=Path, required=True)
    wanted = parser.parse_args()
    kept = json.loads(wanted.json.read_text())["rows"] if wanted.json.exists() else []
    rows: dict[str, dict[str, Any]] = {row["input"]: row for row in kept if row["input"] in TRIALS}
    for when, python in (("before", wanted.before), ("after", wanted.after)):
        if python is None:
            continue
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:  # what outlives it may write on
            version = Version(python, Path(scratch))
            version.prepare()
            for name, (kind, command, work) in TRIALS.items():
                if wanted.only and not any(text in name for text in wanted.only):
                    continue
                fault, seen = work(version)
                seen = seen.replace(scratch, "FOLDER")
                row = rows.setdefault(name, {})
                row |= {"kind": kind, "input": name, "command": command}
                row |= {when: "fault" if fault else "holds", f"{when}_seen": seen, f"{when}_version": version.name}
                print(f"{when}: {'FAULT' if fault else 'holds'}  {name}: {seen}", flush=True)
                write_rows(wanted.json, [rows[each] for each in TRIALS if each in rows])

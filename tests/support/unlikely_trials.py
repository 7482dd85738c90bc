"""What people do and disks do that no one plans for: empty words, moved folders, cut files, keys in wrong places."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from tests.support.trial_version import Server, Version, last, session, told, trial, wait

SECRET = "hidden-4711"
KEY = "sk-0123456789abcdef0123"


def _lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def _started(version: Version, name: str, *options: str) -> tuple[int, Path]:
    """A training that is in its steps: its process, and its folder."""
    out = version.base / name
    process = version.start("train", "run.yaml", "--set", f"out={out}", "steps=20000", *options)
    wait(lambda: _lines(out / "log.jsonl") > 3 or not session(process), 90)
    return process, out


def _ended(version: Version, process: int, seconds: float) -> str:
    """What a command that was started printed, once it has ended; it is killed when it does not."""
    output = version.base / f"output-{version.count}"
    wait(lambda: not session(process), seconds)
    late = session(process)
    for each in late:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    code = Path(f"{output}.code")
    ending = "late" if late else code.read_text() if code.exists() else "by a signal"
    return f"{output.read_text(errors='replace')}\nexit {ending}"


@trial("H", "rows that are cut while a training reads them", "train CONFIG")
def cut_rows(version: Version) -> tuple[bool, str]:
    shutil.copytree(version.base / "rows", version.base / "cut-rows")
    process, _ = _started(version, "cut-run", f"data=[{{rows: {version.base}/cut-rows}}]")
    os.truncate(version.base / "cut-rows" / "rows-00000.npy", 200)
    printed = _ended(version, process, 60)
    ending = printed.rpartition("\n")[2]
    return not printed.endswith("exit 1"), f"{ending}: {last(printed)}"


@trial("H", "a run whose rows were packed again from another text", "train run/config.yaml --resume")
def other_rows(version: Version) -> tuple[bool, str]:
    rows, kept = version.base / "rows", version.base / "rows-kept"
    version.again()
    (version.base / "others").mkdir()
    (version.base / "others" / "a.txt").write_text("Another log, of which nobody spoke. " * 400)
    version.recipe("others.yaml", "others")
    rows.rename(kept)
    version.command(*version.pack("others.yaml", "rows"))
    newest = max((version.base / "run" / "checkpoints").glob("step-*"))
    shutil.move(newest, version.base / "newest")  # so that there is a step to go
    try:
        return told(version, "train", "run.yaml", "--resume")
    finally:
        shutil.rmtree(rows)
        kept.rename(rows)
        shutil.rmtree(newest, ignore_errors=True)
        shutil.move(version.base / "newest", newest)


@trial("H", "a run's folder that is moved while it trains", "train CONFIG")
def moved(version: Version) -> tuple[bool, str]:
    process, out = _started(version, "moving")
    out.rename(version.base / "moved")
    time.sleep(3)
    begun = _lines(out / "log.jsonl")
    printed = _ended(version, process, 0 if begun else 60)
    return bool(begun), f"a second log with {begun} steps is begun" if begun else last(printed)


@trial("H", "Ctrl-C twice in data build --workers 2", "kill -INT, twice, of data build --workers 2")
def twice(version: Version) -> tuple[bool, str]:
    texts = version.base / "lengthy"
    texts.mkdir()
    for n in range(100):
        (texts / f"{n}.txt").write_text(f"Entry {n}: the tide came in and no ship had passed. " * 3000)
    version.recipe("lengthy.yaml", "lengthy")
    words = ("data", "build", "lengthy.yaml", "--tokenizer", "model", "--length", "256", "--workers", "2")
    process = version.start(*words, "--out", "lengthy-rows")
    wait(lambda: len(session(process)) >= 3, 60)
    time.sleep(1)  # the workers import
    for _ in range(2):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGINT)
        time.sleep(0.3)
    printed = _ended(version, process, 30)
    shown = printed.count("Traceback")
    return bool(shown) or not printed.endswith("exit 130"), f"{shown} tracebacks: {last(printed)}"


@trial("H", "an empty --out, of a variable that is not set", 'pack RECIPE --out ""')
def empty_word(version: Version) -> tuple[bool, str]:
    printed = version.command(*version.pack("docs.yaml", ""))
    here = (version.base / "manifest.json").exists()
    return here, f"{'rows are written into the current folder' if here else 'nothing is written'}: {last(printed)}"


@trial("H", "a record with a key that stands twice", "pack RECIPE")
def key_twice(version: Version) -> tuple[bool, str]:
    text = "The tide came in and no ship had passed. " * 30
    (version.base / "twice.jsonl").write_text(f'{{"text": "{text}"}}\n{{"text": "{text}", "text": "{text[::-1]}"}}\n')
    version.recipe("twice.yaml", "twice.jsonl")
    printed = version.command(*version.pack("twice.yaml", "twice-rows"))
    return "1 skipped" not in printed, last(printed)


@trial("H", "010 steps, which YAML 1.1 takes for 8", "train CONFIG --set steps=010")
def octal(version: Version) -> tuple[bool, str]:
    return told(version, "train", "run.yaml", "--set", f"out={version.base}/octal", "steps=010")


@trial("H", "rows of 999,999,999,999,999 tokens", "pack RECIPE --length 999999999999999")
def longest(version: Version) -> tuple[bool, str]:
    words = ("pack", "docs.yaml", "--tokenizer", "model", "--length", "999999999999999", "--out", "longest")
    return told(version, *words)


@trial("H", "a device that this machine has not", "eval perplexity MODEL --rows ROWS --device xpu")
def device(version: Version) -> tuple[bool, str]:
    return told(version, "eval", "perplexity", "model", "--rows", "rows", "--device", "xpu")


def _tokenizer(version: Version, name: str, **changes: object) -> Path:
    file = version.copy(name) / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file


@trial("H", "a tokenizer that gives one id to two letters", "pack RECIPE")
def shared_id(version: Version) -> tuple[bool, str]:
    model = json.loads((version.base / "model" / "tokenizer.json").read_text())["model"]
    model["vocab"]["a"] = model["vocab"]["b"]
    _tokenizer(version, "shared", model=model)
    return told(version, *version.pack("docs.yaml", "shared-rows", "shared"))


@trial("I", "a tokenizer whose normaliser doubles a letter 60 times", "pack RECIPE, in 4 GiB of memory")
def doubling(version: Version) -> tuple[bool, str]:
    double = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
    _tokenizer(version, "doubling", normalizer={"type": "Sequence", "normalizers": [double] * 60})
    printed = version.command(*version.pack("docs.yaml", "doubling-rows", "doubling"), memory_limit=4 << 30)
    return not printed.endswith("exit 1"), f"{printed.rpartition(chr(10))[2]}: {last(printed)}"


@trial("I", "a tokenizer whose pattern is given up", "pack RECIPE")
def given_up(version: Version) -> tuple[bool, str]:
    split = {"type": "Split", "pattern": {"Regex": r"(([a-z ])+.)+[A-Z]([a-z])+\z|(x+x+)+y"}, "behavior": "Isolated"}
    steps = [{**split, "invert": False}, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False}]  # fmt: skip
    _tokenizer(version, "given-up", pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    return told(version, *version.pack("docs.yaml", "given-up-rows", "given-up"))


@trial("I", "a tokenizer.json of 2 GiB", "extend MODEL --to 4096, in 5 GiB of memory")
def huge_tokenizer(version: Version) -> tuple[bool, str]:
    os.truncate(_tokenizer(version, "swollen-tokenizer"), 2 << 30)
    words = ("extend", "swollen-tokenizer", "--to", "4096", "--out", "swollen-tokenizer-out")
    found = told(version, *words, memory_limit=5 << 30)
    for name in ("swollen-tokenizer", "swollen-tokenizer-out"):
        shutil.rmtree(version.base / name, ignore_errors=True)
    return found


@trial("H", "a config that holds a NaN", "extend MODEL --to 4096")
def nan_config(version: Version) -> tuple[bool, str]:
    file = version.copy("nan-config") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": float("nan")}))
    return told(version, "extend", "nan-config", "--to", "4096", "--out", "nan-config-out")


@trial("H", "two processes that make one file of samples", "eval make TEST --out FILE, and the same beside it")
def made_twice(version: Version) -> tuple[bool, str]:
    words = ("eval", "make", "niah_single_1", "--length", "2000", "--samples", "200", "--tokenizer", "model")
    both = [version.start(*words, "--out", "made.jsonl") for _ in range(2)]
    printed = _ended(version, both[1], 90)
    wait(lambda: not session(both[0]), 90)
    lines = _lines(version.base / "made.jsonl")
    return lines != 200, f"{lines} samples of 200: {last(printed)}"


@trial("I", "a password in the address of a model", "extend https://user:password@HOST/MODEL --to 4096")
def in_address(version: Version) -> tuple[bool, str]:
    printed = version.command("extend", f"https://user:{SECRET}@localhost/a/b", "--to", "4096", "--out", "addressed")
    shown = SECRET in printed
    return shown, "the password is shown" if shown else last(printed)


@trial("I", "the key in the place of its variable's name", "data refine RECIPE --key-variable KEY")
def key_as_name(version: Version) -> tuple[bool, str]:
    words = ("data", "refine", "chat.yaml", "--url", "http://127.0.0.1:9/v1", "--model", "m", "--out", "misplaced")
    printed = version.command(*words, "--key-variable", KEY)
    shown = KEY in printed
    return shown, "the key is shown" if shown else last(printed)


@trial("I", "an endpoint that repeats the key in its answers", "data refine RECIPE --key-variable KEY")
def repeated(version: Version) -> tuple[bool, str]:
    def repeat(request: BaseHTTPRequestHandler) -> None:
        said = {"content": f"Yes, {request.headers.get('Authorization')}."}
        body = json.dumps({"choices": [{"message": said, "finish_reason": "stop"}]}).encode()
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    with Server(repeat) as server:
        words = ("data", "refine", "chat.yaml", "--url", server.url, "--model", "m", "--retries", "0", "--out", "told")
        printed = version.command(*words, "--key-variable", "MY_KEY", env={"MY_KEY": KEY})
    file = version.base / "told" / "refined.jsonl"
    kept = file.exists() and KEY in file.read_text()
    return kept, f"the key is {'in' if kept else 'not in'} refined.jsonl: {last(printed)}"

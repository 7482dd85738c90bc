"""Speed, memory and bytes from documents to rows on this machine, and resuming after a SIGKILL half-way.

    ultralong bench data debian-docs --source rfc --tokenizer llama3 --tokens 50000000 --work /tmp/bench \
        --json pack.json

Every measured run is a process of its own, so that its CPU seconds and peak memory are its own. The bare tokenizer,
which encodes the same batches from memory and throws the result away, is timed before and after, since a shared machine
changes from minute to minute; CPU seconds (user and system, all threads) are what such a machine compares fairly.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ultralong import __version__
from ultralong.data.read.readers import RecordReader, list_files
from ultralong.data.recipe.build import pack_recipe
from ultralong.data.recipe.schema import load_recipe
from ultralong.data.recipe.texts import read_documents
from ultralong.data.tokens.encoding import load_tokenizer
from ultralong.data.tokens.tokenize import batched
from ultralong.utils.files import atomic_path, read_json, sha256, write_json
from ultralong.utils.progress import progress

BATCH_CHARACTERS = 1 << 20
SECONDS_BETWEEN_LOOKS = 0.02


def bench(
    recipe: str,
    tokenizer: Path,
    work: Path,
    *,
    tokens: int,
    length: int,
    source: str | None,
    cache: Path | None,
) -> dict[str, Any]:
    """Run every measurement.

    Args:
        recipe: Where the documents come from.
        tokenizer: Folder of the tokenizer.
        work: Folder to work in; a few bytes per character of the corpus.
        tokens: Size of the corpus in tokens, about, at the recipe's estimate of characters per token.
        length: Tokens per row.
        source: Use only this source of the recipe.
        cache: Where fetched packages are kept.

    Returns:
        The measurements as JSON values.

    Raises:
        ValueError: The recipe has no such source, or the interrupted run ended in other bytes than the whole one.
    """
    work.mkdir(parents=True, exist_ok=True)
    corpus = _write_corpus(recipe, source, tokens, work, cache)
    small = _write_corpus(recipe, source, tokens // 4, work, cache)
    settings = {"tokenizer": str(tokenizer.resolve()), "length": length}
    bare = [_child(work, {**settings, "corpus": corpus, "task": "bare"})]
    quarter = _child(work, {**settings, "corpus": small, "task": "pack", "out": str(work / "quarter")})
    whole = _child(work, {**settings, "corpus": corpus, "task": "pack", "out": str(work / "whole")})
    bare.append(_child(work, {**settings, "corpus": corpus, "task": "bare"}))
    cut = _interrupted(work, {**settings, "corpus": corpus, "task": "pack", "out": str(work / "cut")}, work / "whole")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": _machine(),
        "versions": _versions(),
        "recipe": recipe,
        "source": source,
        **_summary(whole, quarter, bare, cut),
    }


def _summary(
    whole: dict[str, Any], quarter: dict[str, Any], bare: list[dict[str, Any]], cut: dict[str, Any]
) -> dict[str, Any]:
    report = whole["report"]
    seconds = sum(run["encode_seconds"] for run in bare) / len(bare)
    cpu = sum(run["encode_cpu_seconds"] for run in bare) / len(bare)
    tokens = report["counts"]["document_tokens"]
    return {
        "length": report["length"],
        "rows": report["rows"],
        "documents": report["counts"]["documents"],
        "document_tokens": tokens,
        "characters": sum(s["characters"] for s in report["sources"].values()),
        "seconds": report["seconds"],
        "cpu_seconds": report["cpu_seconds"],
        "bytes": report["bytes"],
        "peak_memory_bytes": whole["peak_memory_bytes"],
        "of_it_before_reading_bytes": whole["memory_before_bytes"],
        "tokens_per_second": round(tokens / report["seconds"]["tokenise"]),
        "quarter_of_the_corpus": {
            "document_tokens": quarter["report"]["counts"]["document_tokens"],
            "peak_memory_bytes": quarter["peak_memory_bytes"],
        },
        "bare_tokenizer": {
            "seconds": [round(run["encode_seconds"], 2) for run in bare],
            "cpu_seconds": [round(run["encode_cpu_seconds"], 2) for run in bare],
            "tokens_per_second": round(tokens / seconds),
        },
        "throughput_of_bare": round(seconds / report["seconds"]["tokenise"], 3),
        "throughput_of_bare_by_cpu_seconds": round(cpu / report["cpu_seconds"]["tokenise"], 3),
        "interrupted": cut,
        "tokenizer": report["tokenizer"],
    }


def _write_corpus(recipe: str, source: str | None, tokens: int, work: Path, cache: Path | None) -> str:
    """The recipe's documents as one JSON-lines file; the runs then read what a user's own corpus looks like."""
    target = work / f"corpus-{tokens}.jsonl"
    if target.exists():
        return str(target)
    loaded = load_recipe(recipe)
    chosen = tuple(replace(s, budget=tokens) for s in loaded.sources if source in (None, s.name))
    if not chosen:
        raise ValueError(
            f"recipe {recipe} has no source {source!r}; it has {', '.join(s.name for s in loaded.sources)}."
        )
    limited = replace(loaded, sources=chosen, length_rule=None)
    with atomic_path(target) as partial, open(partial, "w", encoding="utf-8") as out:
        for document in progress(read_documents(limited, cache=cache), desc="read", unit="doc"):
            out.write(json.dumps({"text": document.text, "id": document.id}, ensure_ascii=False) + "\n")
    return str(target)


def _start(work: Path, job: dict[str, Any]) -> tuple[subprocess.Popen[bytes], Path]:
    result = work / "result.json"
    result.unlink(missing_ok=True)
    write_json(work / "job.json", {**job, "result": str(result)})
    return subprocess.Popen([sys.executable, "-m", "ultralong.bench.data", str(work / "job.json")]), result


def _child(work: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a process of its own; its result and its peak memory."""
    process, result = _start(work, job)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise ValueError(f"the job {job['task']} ended with exit code {process.returncode}; its message is above.")
    return {**read_json(result), "peak_memory_bytes": usage.ru_maxrss * 1024}


def _interrupted(work: Path, job: dict[str, Any], whole: Path) -> dict[str, Any]:
    """Kill the run half-way through tokenising, again half-way through packing, let it finish, compare all bytes."""
    out = Path(job["out"])
    kills = []
    for stage, folder in (("tokenise", "tokens"), ("pack", ".")):
        pattern = "tokens-*.json" if stage == "tokenise" else "rows-*.json"
        half = max(1, len(list((whole / folder).glob(pattern))) // 2)

        def reached(folder: str = folder, pattern: str = pattern, half: int = half) -> bool:
            return len(list((out / folder).glob(pattern))) >= half

        kills.append({"during": stage, **_kill_when(work, job, reached), "whole_shards_left": half})
    last = _child(work, job)
    expected, found = _hashes(whole), _hashes(out)
    if expected != found:
        differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        raise ValueError(f"the interrupted run ended in other bytes: {', '.join(differing)}.")
    return {
        "kills": kills,
        "identical_files": len(found),
        "sha256_of_their_sha256": hashlib.sha256(json.dumps(found).encode()).hexdigest(),
        "last_seconds": last["report"]["seconds"],
    }


def _kill_when(work: Path, job: dict[str, Any], reached: Callable[[], bool]) -> dict[str, Any]:
    started = time.perf_counter()
    process, _ = _start(work, job)
    while not reached():
        if process.poll() is not None:
            raise ValueError("the run ended before it could be killed; use a larger corpus.")
        time.sleep(SECONDS_BETWEEN_LOOKS)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return {"after_seconds": round(time.perf_counter() - started, 1), "signal": "SIGKILL"}


def _hashes(folder: Path) -> dict[str, str]:
    """Every file but the report, which holds seconds and the folder's name, and the lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (".lock", "report.json"))
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def _run_job(path: Path) -> None:
    """What a measured process does."""
    job = read_json(path)
    tokenizer = load_tokenizer(job["tokenizer"])
    # Linux counts ru_maxrss in KiB.
    result: dict[str, Any] = {"memory_before_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if job["task"] == "bare":
        result |= _bare(tokenizer, Path(job["corpus"]))
    else:
        result["report"] = pack_recipe(job["corpus"], tokenizer, job["length"], job["out"]).to_dict()
    write_json(job["result"], result)


def _bare(tokenizer: Any, corpus: Path) -> dict[str, float]:
    """Encode all texts, in the same batches, from memory; reading them is not timed, nothing is kept."""
    core = tokenizer.backend_tokenizer
    seconds = cpu = 0.0
    documents = RecordReader().documents(list_files(corpus), "bare", "")
    for batch in progress(batched(documents, BATCH_CHARACTERS), desc="bare tokenizer", unit="batch"):
        texts = [document.text for document in batch]
        started, used = time.perf_counter(), time.process_time()
        core.encode_batch_fast(texts, add_special_tokens=False)
        seconds += time.perf_counter() - started
        cpu += time.process_time() - used
    return {"encode_seconds": seconds, "encode_cpu_seconds": cpu}


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "load_average_at_the_end": round(os.getloadavg()[0], 1),
    }


def _versions() -> dict[str, str]:
    names = ("tokenizers", "transformers", "numpy")
    return {"ultralong": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}


if __name__ == "__main__":
    _run_job(Path(sys.argv[1]))  # one measured run, started by `_start`

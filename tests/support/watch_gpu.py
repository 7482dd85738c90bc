"""Two ranks of which one sleeps: `python tests/support/watch_gpu.py OUT.json --layers 4 --tokens 64k`.

Rank 1 sleeps before it reads the rows of three steps in the middle, and for ever before the last one. What the run says
of it is checked: who is named and when, who waits, how the hang ends, and whom its report blames. The model has random
weights. With two GPUs the ranks use them; otherwise they are processes of the CPU, for which `--layers 2 --tokens 256`
of a small model does. Exit code 1 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ultralong.bench.training.case import RowCount, TrainingCase
from ultralong.bench.training.measure import train_config
from ultralong.bench.training.work import prepare_training, warmed_up
from ultralong.training import step as steps
from ultralong.training.config import MemoryConfig, TrainConfig
from ultralong.training.parallel import connect
from ultralong.utils import settings
from ultralong.utils.environment import machine_facts
from ultralong.utils.files import append_jsonl, read_json, read_jsonl, write_json
from ultralong.utils.local_ranks import free_port
from ultralong.utils.units import parse_tokens

SLOW, HANGS = (4, 5, 6), 8  # steps, counted from 1


def work(folder: Path, short: str, slept: float, seconds: float) -> None:
    """What each rank runs, with its place in the environment."""
    config = settings.load(TrainConfig, folder / "config.yaml")
    with connect(config) as processes:
        run = warmed_up(config, processes, short)
        if processes.accelerator.process_index == 1:
            _sleep_before_reading(slept)
        run.folder.path.mkdir(exist_ok=True)
        with run.watch.over(run.folder.path, seconds):
            for number in range(HANGS):
                begin = time.perf_counter()
                record = steps.training_step(run, number)
                record["seconds"] = round(time.perf_counter() - begin, 4)
                record |= run.watch.report(number + 1, record["seconds"])
                if processes.is_main:
                    append_jsonl(folder / "log.jsonl", {"step": number + 1, **record})


def _sleep_before_reading(slept: float) -> None:
    real = steps._step_batches

    def reads(run: Any, number: int) -> Any:
        if number + 1 in SLOW:
            time.sleep(slept)
        if number + 1 == HANGS:
            threading.Event().wait(600)
        return real(run, number)

    steps._step_batches = reads


def started(folder: Path, short: str, wanted: argparse.Namespace) -> tuple[list[int], list[str]]:
    """Run both ranks to their end; exit codes and standard errors."""
    place = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ""}
    place |= {"MASTER_PORT": str(free_port()), "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    command = [sys.executable, __file__, str(folder / "unused.json"), "--rank-of", str(folder), "--short", short]
    command += ["--slept", str(wanted.slept), "--hang-seconds", str(wanted.hang_seconds)]
    texts = [open(folder / f"stderr-{rank}", "w+", encoding="utf-8") for rank in (0, 1)]  # noqa: SIM115 - closed below
    ranks = [
        subprocess.Popen(command, env=place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=texts[rank])
        for rank in (0, 1)
    ]
    try:
        codes = [rank.wait(timeout=wanted.limit) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        for text in texts:
            text.close()
    return codes, [(folder / f"stderr-{rank}").read_text(encoding="utf-8") for rank in (0, 1)]


def judged(log: list[dict[str, Any]], said: list[str], codes: list[int], slept: float) -> dict[str, bool]:
    """The checks, by what they say."""
    at = {record["step"]: record for record in log}
    plain = median(at[number]["seconds"] for number in (2, 3, 7))
    named = [line for line in "\n".join(said).splitlines() if "is slow" in line]
    report = [line for line in "\n".join(said).splitlines() if line.startswith("  rank ")]
    blamed = [line for line in report if line.endswith("<- the others wait for it")]
    waited = [at[number]["ranks"]["waiting_seconds"][0] for number in SLOW]
    return {
        "rank 1 is the slowest in each slow step": all(at[number]["slowest_rank"] == 1 for number in SLOW),
        "rank 0 waited about as long as rank 1 slept": all(0.7 * slept < wait < slept + plain for wait in waited),
        "rank 1 named by the second slow step": len(named) == 1 and f"step {SLOW[1]}: rank 1 " in named[0],
        "none named in steps alike": all(f"step {number}:" not in line for line in named for number in (2, 3, 7)),
        "both ended with code 1": codes == [1, 1],
        "the report blames rank 1, and it alone": len(blamed) == 1 and blamed[0].startswith("  rank 1 "),
    }


def main() -> None:
    """Run, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="meta-llama/Llama-3.1-8B")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=parse_tokens, default=65536)
    parser.add_argument("--slept", type=float, default=2.0)
    parser.add_argument("--hang-seconds", type=float, default=10.0)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for everything")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--short", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.rank_of is not None:
        work(wanted.rank_of, wanted.short, wanted.slept, wanted.hang_seconds)
        return
    begin = time.perf_counter()
    gpus = torch.cuda.device_count() > 1
    memory = MemoryConfig(activation_checkpointing=True)
    case = TrainingCase(
        wanted.model, wanted.tokens, layers=wanted.layers, gpus=2, sharded=True, steps=HANGS, memory=memory
    )
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        paths = prepare_training(folder, case.model, case.layers, [case.tokens])
        settings.save(train_config(case, paths, folder, (RowCount(case.tokens, 1),)), folder / "config.yaml")
        codes, said = started(folder, paths["short"], wanted)
        if not (folder / "log.jsonl").exists():
            sys.exit("\n".join(said))
        log = read_jsonl(folder / "log.jsonl")
        records = sorted((folder / "run").glob("hang-*/rank-*.json"))
        traces = {path.name: path.stat().st_size for path in (folder / "run").glob("hang-*/nccl-trace-*")}
        positions = [read_json(path) for path in records]
        said = [text.replace(str(folder), "FOLDER") for text in said]
    checks = judged(log, said, codes, wanted.slept)
    facts = machine_facts()
    write_json(
        wanted.out,
        {
            "model": case.name,
            "tokens": case.tokens,
            "gpus": 2 if gpus else 0,
            "sharded": True,
            "date": facts["date"],
            "packages": facts["packages"],
            "device": facts["device"],
            "slept_seconds": wanted.slept,
            "steps": log,
            "named": [line for line in "\n".join(said).splitlines() if "is slow" in line],
            "exit_codes": codes,
            "hang_report": [text[text.index("the run makes no") :] for text in said if "the run makes no" in text],
            "hang_positions": positions,
            "nccl_trace_bytes": traces,
            "checks": checks,
            "seconds_of_plain_steps": [record["seconds"] for record in log if record["step"] in (2, 3, 7)],
            "seconds": round(time.perf_counter() - begin, 1),
        },
    )
    print(json.dumps(checks, indent=1))
    if not all(checks.values()):
        print("\n".join(text[-3000:] for text in said))
        sys.exit(1)


if __name__ == "__main__":
    main()

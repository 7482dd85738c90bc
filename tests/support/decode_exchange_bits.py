"""Whether the ways of joining attention give equal bits: `python -m tests.support.decode_exchange_bits OUT.json`.

Two ranks, Llama-3.1-8B's shape with random weights; `--small` is two layers of a small model on two CPU processes. For
each cache and prompt, `direct` is the reference; a way `again` says whether it repeats itself. Every way decodes
the reference's tokens (logits compared bit by bit) and then answers alone, greedily and drawn with a seed, waiting for
each token and ahead of it (tokens compared). A row is written as soon as it is there. Recorded in
notebooks/results/decode_exchange_bits.json.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.bench.timing import make_model, random_ids
from ultralong.inference.decode_step.step import DecodeStep
from ultralong.inference.decoding import Sampler, Sampling, collect, decode
from ultralong.inference.sharded_generation import ShardedRunner
from ultralong.planner.shapes import model_config
from ultralong.utils.environment import machine_facts
from ultralong.utils.files import write_json
from ultralong.utils.local_ranks import run_ranks

KV = ("bf16", "fp8")


def begin(model: Any, kv: str, way: str, ids: Tensor, filled: bool, steps: int) -> tuple[ShardedRunner, Tensor]:
    """A runner that has read `ids` (1, T), or holds random numbers in their place, and its logits."""
    runner = ShardedRunner(model, None, dist.group.WORLD, kv="auto" if kv == "bf16" else kv, exchange=way, quiet=True)
    if not ids.is_cuda:
        runner.chunk = 32
    if filled:
        runner.prefill_random(ids, steps + 2)
        logits = torch.zeros(1, model.config.vocab_size, device=ids.device)
    else:
        logits = runner.prefill(ids, [steps + 2])
    if not ids.is_cuda:
        runner.step = DecodeStep(model, runner.cache, dist.group.WORLD, exchange=way)
    assert runner.step is not None
    return runner, logits


def answer(started: tuple[ShardedRunner, Tensor], steps: int, sampling: Sampling, ahead: bool = False) -> list[int]:
    """The tokens of one answer; the runner's cache is released."""
    runner, logits = started
    runner.ahead = ahead
    (found,) = collect(decode(runner, logits, [steps], (), Sampler(sampling)), 1)
    runner.release()
    return list(found.tokens)


def bits(x: Tensor) -> Tensor:
    """The same bits as whole numbers, so that a comparison is one of bits."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def row_of(found: Tensor, reference: Tensor, world: int) -> dict[str, Any]:
    """How logits (N, V) differ from the reference's, and whether all ranks have the same."""
    peers = [torch.empty_like(found) for _ in range(world)]
    dist.all_gather(peers, found.contiguous())
    differ = (bits(found) != bits(reference)).any(1)
    return {
        "ranks_equal": all(torch.equal(bits(peers[0]), bits(x)) for x in peers),
        "steps_that_differ": int(differ.sum()),
        "first_that_differs": int(differ.nonzero()[0]) if differ.any() else None,
        "largest_difference": float((found.float() - reference.float()).abs().max()),
        "spread": float(reference.float().std()),
        "likeliest_that_differ": int((found.argmax(-1) != reference.argmax(-1)).sum()),
    }


@torch.inference_mode()
def compare(rank: int, world: int, device: str, out: Path, ways: list[str], only_filled: bool) -> None:
    """One rank's part."""
    small = device == "cpu"
    steps = 8 if small else 40
    config = model_config("HuggingFaceTB/SmolLM2-135M" if small else "meta-llama/Llama-3.1-8B")
    if small:
        config.num_hidden_layers = 2
    model = make_model(config, device)
    model.generation_config.eos_token_id = None
    samplings = {"greedy": Sampling(), "drawn": Sampling(temperature=1.0, top_p=0.9, seed=7)}
    rows: list[dict[str, Any]] = []
    prompts = [(300, True), (200, False)] if small else [(131072, True), (8192, False)]
    for (tokens, filled), kv in product(prompts[:1] if only_filled else prompts, KV):
        ids, reference = random_ids(model, 1, tokens), None
        case = model, kv
        said = {kind: answer(begin(*case, "direct", ids, filled, steps), steps, how) for kind, how in samplings.items()}
        for name in ["direct", *ways]:
            start, way = time.perf_counter(), name.split()[0]
            runner, _ = begin(*case, way, ids, filled, steps)
            given = torch.tensor(said["drawn"], device=ids.device)
            found = torch.cat([runner.decode(token[None]).clone() for token in given])  # (N, V)
            failed, took = runner.step is None, runner.step.exchange if runner.step else None  # which way `auto` took
            runner.release()
            reference = found if reference is None else reference
            row = {"tokens": tokens, "prompt": "random cache" if filled else "read", "kv": kv, "exchange": name}
            row |= {"steps": steps, **row_of(found, reference, world), "fused_step_failed": failed, "took": took}
            for (kind, how), ahead in product(samplings.items(), (False, True)):
                again = answer(begin(*case, way, ids, filled, steps), steps, how, ahead)
                row[f"{kind}_{'ahead_' if ahead else ''}equal"] = again == said[kind]
            rows.append(row | {"seconds": round(time.perf_counter() - start, 2)})
            if rank == 0:
                print(json.dumps(rows[-1]), flush=True)
                write_json(out, {"machine": machine_facts(), "rows": rows})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file")
    parser.add_argument("--small", action="store_true", help="two layers of a small model, on two CPU processes")
    parser.add_argument("--ways", nargs="+", help="compared with direct; one twice is `NAME again` the second time")
    parser.add_argument("--only-filled", action="store_true", help="behind random numbers, not behind a prompt too")
    asked = parser.parse_args()
    device = "cpu" if asked.small else "cuda"
    ways = asked.ways or ["direct", "gather", *([] if asked.small else ["symmetric", "symmetric"])]
    names = [way + " again" * (way in ["direct", *ways][: number + 1]) for number, way in enumerate(ways)]
    run_ranks(compare, 2, device, asked.out, names, asked.only_filled, device=device, timeout=600)


if __name__ == "__main__":
    main()

"""Commands that measure this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from ultralong.cli.options import Group, takes
from ultralong.cli.shared import File, Json, is_main
from ultralong.utils.units import Tokens

if TYPE_CHECKING:
    from ultralong.bench.attention.options import AttentionBench
    from ultralong.bench.decode_options import DecodeBench
    from ultralong.bench.host_options import HostBench
    from ultralong.bench.prefill_options import PrefillBench
    from ultralong.bench.serving.options import ServeBench
    from ultralong.bench.training.case import TrainingCase


@takes(wanted=Group("ultralong.bench.attention.options:AttentionBench"))
def attention(wanted: AttentionBench, *, json: Json = None) -> None:
    """Time every attention kernel, scheme and peer here, in one table beside one GPU.

    Runs in as many processes as there are GPUs, or in torchrun's. Without a GPU sizes are cut down first.

    Example: ultralong bench attention --lengths 128k 512k --kernels auto cudnn --json attention.json

    Args:
        wanted: What to measure.
        json: Write machine, options and results as JSON to this file, after every case.
    """
    import logging

    from ultralong.bench.attention.measure import bench_attention
    from ultralong.bench.attention.report import table

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results = bench_attention(wanted, json)
    if is_main():
        print(table(results))


@takes(wanted=Group("ultralong.bench.prefill_options:PrefillBench", positional=("model",)))
def prefill(wanted: PrefillBench, *, json: Json = None) -> None:
    """Time reading a long prompt here: seconds, memory, share of the attention kernel's rate.

    The model has the shape asked for and random weights. Prints one line of JSON for each length.

    Example: ultralong bench prefill meta-llama/Llama-3.1-8B --lengths 256k --gpus 2 --json prefill.json

    Args:
        wanted: What to measure.
        json: Write machine, options and rows as JSON to this file, after every length.
    """
    from ultralong.bench.prefill import bench_prefill

    bench_prefill(wanted, json)


@takes(wanted=Group("ultralong.bench.decode_options:DecodeBench", positional=("model",)))
def decode(wanted: DecodeBench, *, json: Json = None) -> None:
    """Time decoding here, single, batched and sharded, bf16 and fp8, beside transformers' generate.

    The model has the shape asked for and random weights. Prints one line of JSON for each way.

    Example: ultralong bench decode meta-llama/Llama-3.1-8B --lengths 2k 32k --batch 16 --json decode.json

    Args:
        wanted: What to measure.
        json: Write machine, options and rows as JSON to this file, after every row.
    """
    from ultralong.bench.decode import bench_decode

    bench_decode(wanted, json)


@takes(wanted=Group("ultralong.bench.serving.options:ServeBench", positional=("model",)))
def serve(wanted: ServeBench, *, json: Json = None) -> None:
    """Time one long prompt through the server here, asked by OpenAI's client: first token, tokens after.

    The model has the shape asked for and random weights. Prints one line of JSON.

    Example: ultralong bench serve meta-llama/Llama-3.1-8B --tokens 1m --gpus 2 --json serve.json

    Args:
        wanted: What to measure.
        json: Write machine, options and the row as JSON to this file.
    """
    from ultralong.bench.serving.measure import bench_serve

    bench_serve(wanted, json)


@takes(
    case=Group(
        "ultralong.bench.training.case:TrainingCase",
        positional=("model",),
        given={"tokens": 1},
        left_out=("memory", "sharing"),
    )
)
def train(
    case: TrainingCase,
    *,
    lengths: tuple[Tokens, ...] = (131072,),
    memory: tuple[str, ...] = ("activation_checkpointing=true",),
    sharing: tuple[Literal["dynamic", "fixed"], ...] = ("dynamic", "fixed"),
    peers: bool = False,
    only: tuple[str, ...] = (),
    peer_limit: float | None = None,
    machine: str = "h200",
    folder: Path | None = None,
    json: Json = None,
) -> None:
    """Time training steps here, with random weights, beside what the plan says of them.

    Examples:
      ultralong bench train meta-llama/Llama-3.2-1B --lengths 32k 128k --json rows.json
      ultralong bench train --lengths 1m --gpus 2 --sharded --state-precision 8bit --kernel flash4 --head-chunks 8
        --steps 1 --fit --memory layer_tile=32768 loss_tile=8192 --host-memory 108
      ultralong bench train --lengths 256k --sharded --lora-rank 8 --lora-whole --memory layer_tile=32768
      ultralong bench train meta-llama/Llama-3.2-1B --lengths 240k --sharded --state-precision 8bit --kernel flash --fit
        --gpu-memory 24 --host-memory 64 --capped
      ultralong bench train meta-llama/Llama-3.2-1B --mix 8k:38 128k:1 256k:1 --gpus 2 --sharded
      ultralong bench train --lengths 256k --gpus 2 --peers --only deepspeed-alst-offload --steps 1 --peer-limit 600

    Args:
        case: What to train.
        lengths: Tokens of the rows, one case each; with --mix they are not used.
        memory: Settings of the memory plan.
        sharing: With --mix: each row by as many GPUs as it needs (dynamic), every row by all of them (fixed), or one
            after the other.
        peers: Measure other projects as well, each as its guide sets it up (two GPUs or more, whole rows); what is not
            installed, runs out of memory or refuses is recorded with its message.
        only: With --peers: what to measure, of ours, torch-cp-flash, torch-cp-cudnn, trl-sft-cp, deepspeed-alst,
            deepspeed-alst-offload, deepspeed-alst-offload-all, torchtitan-cp; by default all.
        peer_limit: With --peers: seconds after which a peer is stopped, at each length.
        machine: Rates that the plan uses: h200, h100, a100, or a file of ultralong bench rates.
        folder: Keep models and rows here for the next measurement.
        json: Append the rows to this JSON file, each as it is measured.
    """
    import tempfile
    from dataclasses import replace

    from ultralong.bench.results import append_row
    from ultralong.bench.training.measure import measure_training
    from ultralong.bench.training.peers.measure import OURS, measure_peer, wanted_peers
    from ultralong.bench.training.tables import measured_line
    from ultralong.training.config import MemoryConfig
    from ultralong.utils import settings

    plan = settings.from_mapping(
        MemoryConfig, settings.override({"activation_checkpointing": True}, memory, MemoryConfig), "--memory"
    )
    names: tuple[str, ...] = (OURS,)
    if peers:
        if case.gpus < 2 or case.mix or case.edges(1):
            raise ValueError("--peers measures whole rows on two GPUs or more: leave out --mix and documents.")
        if case.capped:
            raise ValueError("--capped holds ultralong's processes alone: leave it out beside --peers.")
        names = wanted_peers(only)
    elif only or peer_limit is not None:
        raise ValueError("--only and --peer-limit go with --peers.")
    with tempfile.TemporaryDirectory() as made:
        place = folder or Path(made)
        for change in [{"sharing": way} for way in sharing] if case.mix else [{"tokens": n} for n in lengths]:
            one = replace(case, memory=plan, **dict[str, Any](change))
            for name in names:
                row = (
                    measure_training(one, machine, place)
                    if name == OURS
                    else measure_peer(name, one, place, peer_limit)
                )
                if json is not None:
                    append_row(json, row)
                print(measured_line(row), flush=True)
    if json is not None:
        print(f"{json}: rows appended. Tables of recorded results: ultralong bench tables", file=sys.stderr)


def compare(
    before: Positional[File], after: Positional[File], /, *, tolerance: float = 0.03, json: Json = None
) -> None:
    """Compare two result files of the same measurement; exits with 1 where a value got worse.

    Rows belong together when all that describes their case is the same; rows of other hardware are named only.

    Examples:
      ultralong bench compare before.json after.json
      ultralong bench compare notebooks/results after.json --json changes.json

    Args:
        before: JSON file that another bench command wrote, or a folder of such files.
        after: The same, measured later.
        tolerance: Share by which a value may get worse: 0.03 is 3%.
        json: Write every value before and after, their ratio, and what was not compared as JSON to this file.
    """
    from ultralong.bench.compare import compare_measured
    from ultralong.bench.results import read_measured
    from ultralong.utils.files import write_json

    found = compare_measured(read_measured(before), read_measured(after), tolerance)
    print(found)
    if json is not None:
        write_json(json, found.to_dict())
    if found.regressions:
        sys.exit(1)


def rates(*, lengths: tuple[Tokens, ...] = (), only: tuple[str, ...] = (), json: Json = None) -> None:
    """Measure the rates that ultralong plan uses: products, memory, attention, links.

    Example: ultralong bench rates --json here.json   and then: ultralong plan CONFIG --machine here.json

    Args:
        lengths: Row lengths for attention; by default 8k to 512k on a GPU.
        only: Names of the rates to measure, such as attention link; by default all.
        json: Write the rates as JSON to this file; with --only, the others in it stay.
    """
    from ultralong.bench.rates import measure_rates

    for name, rows in measure_rates(lengths, only, json).items():
        for row in rows:
            values = (
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
            print(name, ", ".join(values))


@takes(wanted=Group("ultralong.bench.host_options:HostBench"))
def host(wanted: HostBench) -> None:
    """Measure a host of several GPUs in one go: training at 1M and 4M tokens, attention.

    The model is Llama-3.1-8B's shape; attention runs over all GPUs and over fewer, hybrids of two levels included. Each
    step is a command of its own with a limit of time, and writes its JSON as it goes. A step that fails is
    recorded, and the next one starts; the same command leaves out what is done.

    Examples:
      ultralong bench host --gpus 8 --out notebooks/results --host-memory 60
      ultralong bench host --gpus 4 --out rehearsal --rehearse

    Args:
        wanted: What to measure.
    """
    from ultralong.bench.host import bench_host, summary

    print("\n".join(summary(bench_host(wanted), wanted.out.expanduser())))


def error_curve(*, ranks: tuple[int, ...] = (1, 2, 4, 8, 16), tokens: Tokens = 512, json: Json = None) -> None:
    """Measure the error of each attention scheme against exact attention, by number of ranks.

    Example: ultralong bench error-curve --ranks 1 2 4 --json error.json

    Args:
        ranks: Numbers of ranks, each a process on this machine's CPU.
        tokens: Length of the row.
        json: Write the points as JSON to this file.
    """
    from dataclasses import asdict

    from ultralong.bench.attention.error_curve import error_curve, table
    from ultralong.bench.results import write_rows

    points = error_curve(ranks, tokens=tokens)
    if json is not None:
        write_rows(json, [asdict(point) for point in points], tokens=tokens)
    print(table(points))

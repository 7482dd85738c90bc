"""The processes of a training case: `python -m ultralong.bench.training.work FOLDER SHORT [WORDS]`.

The words are profile, one-row-passes, warm=N and cap=GIB (`work`). The models have random weights and rows of random
letters; how long a step takes depends on neither.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from torch.autograd import DeviceType
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ultralong.attention.kernels import flash_attn_4_hooks
from ultralong.bench.attention.measure import documents as spread_documents
from ultralong.bench.timing import cut_config
from ultralong.bench.training.mix import SHORT, OneRowPasses, conversations
from ultralong.data.read.documents import Document
from ultralong.data.rows.packing import PackSettings, pack
from ultralong.data.tokens.tokenize import tokenize_corpus
from ultralong.miniature.tokenizer import train_tokenizer
from ultralong.training.adapters.lora import add_adapters
from ultralong.training.batches import RowOrder
from ultralong.training.config import TrainConfig
from ultralong.training.parallel import Processes, connect
from ultralong.training.run_folder import RunFolder
from ultralong.training.step import Run, build_run, reserve_host_memory, training_step
from ultralong.utils import settings
from ultralong.utils.files import append_jsonl, write_json
from ultralong.utils.processes import start_method
from ultralong.utils.units import GIB

WARM = 2048  # tokens of the row that is trained on first
WARM_DOCUMENTS = 4  # that it holds where the run's rows hold documents: kernels have calls of their own for them
WINDOW = 2**24  # of the made models: no row is too long


def prepare_training(
    folder: Path,
    model: str,
    layers: int | None,
    lengths: Sequence[int],
    mixed: bool = False,
    edges: Callable[[int], tuple[int, ...]] = lambda tokens: (),
) -> dict[str, str]:
    """Write a model's config and tokenizer, and rows of random letters, unless they are there.

    Args:
        folder: Where.
        model: A model folder, a hub id, or a shape that the planner knows.
        layers: Decoder layers to keep; None keeps all.
        lengths: Tokens of a row, of each kind of rows.
        mixed: The short ones hold conversations (`ultralong.bench.training.mix`).
        edges: Where documents that don't see each other begin in a row of so many tokens, and its end; nothing of a
            whole row.

    Returns:
        The paths of `model`, of rows by their length, and of `short` ones.
    """
    name = f"{Path(model).name}-{layers or 'all'}"
    chats = {length: mixed and length <= SHORT for length in lengths}
    cuts = {"short": spread_documents(WARM, WARM_DOCUMENTS) if edges(WARM) else ()}
    cuts |= {str(length): edges(length) for length in lengths}
    made = {"model": folder / name}
    for key, length in (("short", WARM), *((str(length), length) for length in lengths)):
        kind = "chats" if key != "short" and chats[length] else "rows"
        made[key] = folder / (f"{kind}-{length}" + (f"-of-{_name_of(cuts[key])}" if cuts[key] else ""))
    with ProcessPoolExecutor(1, mp_context=get_context(start_method())) as other:
        # Not in this process, whose own memory on the GPU would then be counted as the trainer's.
        if not (made["model"] / "config.json").exists():
            other.submit(_make_model, made["model"], model, layers).result()
        for key, length in (("short", WARM), *((str(length), length) for length in lengths)):
            if not (made[key] / "manifest.json").exists():
                rows = (made[key], made["model"], length, key != "short" and chats[length], cuts[key])
                other.submit(_make_rows, *rows).result()
    return {key: str(path) for key, path in made.items()}


def _name_of(edges: tuple[int, ...]) -> str:
    """Their number, and a hash of where they are: a kept folder may hold other documents, as many."""
    return f"{len(edges) - 1}-{zlib.crc32(str(edges).encode()):08x}"


def _make_model(folder: Path, model: str, layers: int | None) -> None:
    config, _ = cut_config(model, layers)
    config.max_position_embeddings = WINDOW
    train_tokenizer(["a b c"], WINDOW).save_pretrained(folder)
    config.save_pretrained(folder)


def _make_rows(folder: Path, model: Path, length: int, chats: bool, edges: tuple[int, ...]) -> None:
    """Two rows: as good as many, and quicker to make. A byte is a token, as the tokenizer has no merges."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, size=2 * length + 16, dtype=np.uint8)
    letters[::64] = ord("\n")  # words of a length that tokenizers are made for
    cuts = [*edges[1:], *(length + edge for edge in edges[1:])]
    noise = [
        Document(f"noise-{number}", part.tobytes().decode("ascii"), "synthetic", "CC0-1.0")
        for number, part in enumerate(np.split(letters, cuts))
    ]
    texts = conversations(2 * length + 16) if chats else noise
    store = tokenize_corpus(texts, tokenizer, folder.with_name(f"{folder.name}-tokens"), quiet=True)
    settings = PackSettings(length=length, mask_documents=chats or bool(edges))
    if edges:  # as they are: each row has the same
        settings = replace(settings, join="none", shuffle=False)
    pack(store, tokenizer, folder, settings, quiet=True)


def random_model(
    folder: str, device: torch.device, attention: str = "ultralong", dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """A model of a folder's config with random weights, the same in every process, made where it will be used."""
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=dtype, attn_implementation=attention
        ).train()


def warmed_up(
    config: TrainConfig, processes: Processes, short: str, one_row_passes: bool = False, warm_steps: int = 0
) -> Run:
    """A run of random weights that has trained on a short row twice, then on its own rows; all processes call it."""
    set_seed(config.seed)
    mixed = config.parallel.dynamic
    order = (OneRowPasses if one_row_passes else RowOrder).of_run(config)
    warm_data = (replace(config.data[0], rows=short),)
    warm = RowOrder(warm_data, config.seed, config.global_batch_size, mixed=mixed)
    dtype = torch.float32 if config.parallel.fsdp_shard_degree is None else torch.bfloat16  # as the trainer loads it
    model = random_model(config.model, processes.accelerator.device, dtype=dtype)
    model = add_adapters(model, config.lora).train() if config.lora.on else model
    run = build_run(config, processes, RunFolder(Path(config.out)), order, model)
    reserve_host_memory(run)
    training_step(replace(run, order=warm), 0)
    with flash_attn_4_hooks.tiles_everywhere():  # a long row's kernels, compiled here and not in what is timed
        training_step(replace(run, order=warm), 0)
    # Packs have kernels of their own, and segments of the allocator for each of their sizes.
    for step in range(max(warm_steps, int(mixed))):
        training_step(run, step % config.steps)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the warm-up left cached would count as the run's reserved memory
        torch.cuda.reset_peak_memory_stats()
    return run


def hold_to(gib: float) -> None:
    """Let this process take no more of its GPU than a card of so many GiB has; beyond it torch is out of memory.

    What the driver holds for the process (the context, kernels, libraries) is taken off, as it is on a smaller card. It
    grows as kernels are loaded, so this is called again once they are.

    Raises:
        ValueError: There is no GPU, or none as large.
    """
    total = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0
    if gib * GIB > total:
        raise ValueError(f"this process can't be held to {gib:g} GiB of a GPU: there are {total / GIB:.1f}.")
    torch.cuda.set_per_process_memory_fraction((gib * GIB - _context_bytes()) / total)


def _context_bytes() -> int:
    """Whatever the driver counts and the allocator does not: the context, the kernels and the libraries."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def work(
    folder: Path,
    short: str,
    profile: bool = False,
    one_row_passes: bool = False,
    warm_steps: int = 0,
    cap: float | None = None,
) -> None:
    """Train as `folder/config.yaml` says, on a short row first; write the log and this process's peaks in bytes.

    With `warm_steps`, so many steps over the run's own rows come before the measured ones.
    With `one_row_passes` rows of several lengths are read one by one, as with a fixed degree of context parallelism.
    With `cap`, all of it takes no more GiB of the GPU (`hold_to`).
    With `profile`, one more step follows, and the first process writes the time of its kernels (`kernels.json`).
    """
    config = settings.load(TrainConfig, folder / "config.yaml")
    with connect(config) as processes:
        if cap is not None:
            hold_to(cap)
        run = warmed_up(config, processes, short, one_row_passes, warm_steps)
        if cap is not None:
            hold_to(cap)
        for step in range(config.steps):
            processes.barrier()
            begin = time.perf_counter()
            record = training_step(run, step)  # ends with numbers read back, so the device is done
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = round(time.perf_counter() - begin, 4)
            _leave_peaks(folder, run.memory.host_bytes)
            if processes.is_main:  # last: a step in the log has its peaks beside it
                append_jsonl(folder / "log.jsonl", {**record, "seconds": seconds})
        if profile:
            _leave_kernels(folder, run, config.steps - 1)


def _leave_kernels(folder: Path, run: Run, step: int) -> None:
    """One more step under torch's profiler; seconds by kernel (by operation, without a GPU), the most first.

    Of a GPU also the seconds in which it ran nothing: profiled, and the kernels of all streams laid over each other.
    """
    on_gpu = torch.cuda.is_available()
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    run.processes.barrier()
    begin = time.perf_counter()
    with torch.profiler.profile(activities=[kind]) as found:
        training_step(run, step)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    if not run.processes.is_main:
        return
    took = [
        (each.key, each.count, each.self_device_time_total if on_gpu else each.self_cpu_time_total)
        for each in found.key_averages()
    ]
    kernels = [
        {"name": name[:200], "calls": calls, "seconds": round(microseconds / 1e6, 6)}
        for name, calls, microseconds in sorted(took, key=lambda each: -each[2])
        if microseconds > 0
    ]
    ran = [each.time_range for each in found.events() if each.device_type == DeviceType.CUDA]
    idle = {"idle_seconds": seconds - covered((each.start, each.end) for each in ran) / 1e6} if on_gpu else {}
    write_json(folder / "kernels.json", {"profiled_seconds": seconds, **idle, "kernels": kernels})


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of what intervals cover together."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _leave_peaks(folder: Path, pinned: int) -> None:
    peaks = {"peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "pinned_host_gib": pinned}
    if torch.cuda.is_available():
        peaks |= {
            "peak_gpu_gib": torch.cuda.max_memory_allocated(),
            "reserved_gpu_gib": torch.cuda.max_memory_reserved(),
            "context_gpu_gib": _context_bytes(),
        }
    write_json(folder / f"rank-{os.environ.get('RANK', '0')}.json", peaks)


if __name__ == "__main__":
    values = dict(word.split("=") for word in sys.argv[3:] if "=" in word)
    work(
        Path(sys.argv[1]),
        sys.argv[2],
        "profile" in sys.argv[3:],
        "one-row-passes" in sys.argv[3:],
        int(values.get("warm", 0)),
        float(values["cap"]) if "cap" in values else None,
    )

"""Commands that measure the work on data and SFT and what checkpoints cost, and the tables of recorded measurements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from ultralong.cli.options import Group, takes
from ultralong.cli.shared import Json, leave
from ultralong.utils.units import Tokens

if TYPE_CHECKING:
    from ultralong.bench.training.case import TrainingCase


def data(
    recipe: Positional[str],
    /,
    *,
    tokenizer: Path,
    work: Path,
    tokens: Tokens = 50_000_000,
    length: Tokens = 131072,
    source: str | None = None,
    cache: Path | None = None,
    json: Json = None,
) -> None:
    """Time the way from documents to rows: seconds, memory, bytes, and a run killed half-way.

    Example: ultralong bench data debian-docs --source rfc --tokenizer llama3 --tokens 50m --work bench --json pack.json

    Args:
        recipe: A recipe's name, or its YAML file.
        tokenizer: Folder of the tokenizer.
        work: Folder to work in.
        tokens: Size of the corpus, about.
        length: Tokens of a row.
        source: Use only this source of the recipe.
        cache: Where fetched packages are kept.
        json: Write the measurements as JSON to this file.
    """
    from json import dumps

    from ultralong.bench.data import bench

    result = bench(recipe, tokenizer, work, tokens=tokens, length=length, source=source, cache=cache)
    leave(json, result)
    print(dumps(result, indent=2))


def samples(
    tokenizer: Positional[str],
    /,
    *,
    json: Path,
    tasks: tuple[str, ...] = (),
    lengths: tuple[Tokens, ...] = (4096, 32768, 131072, 1048576),
    data: str | None = None,
) -> None:
    """Time making one sample of each test, at each length: seconds and memory of one core.

    Example: ultralong bench samples model --lengths 128k 1m --json samples.json

    Args:
        tokenizer: Folder or hub id.
        json: Write machine and rows as JSON to this file, test by test.
        tasks: Tests; by default all that are generated.
        lengths: Tokens of a sample.
        data: Folder of published questions, or package.
    """
    from ultralong.bench.samples import measure_samples

    for row in measure_samples(tokenizer, json, tasks, lengths, data):
        print(", ".join(f"{key} {value}" for key, value in row.items()))


def sft_prepare(
    *,
    base: Path,
    out: Path,
    settings: str = "sft-smollm2",
    set: tuple[str, ...] = (),
    heldout: int = 400,
    limit: Tokens | None = None,
) -> None:
    """Make the rows of bench sft, where a package registry can be reached.

    Example: ultralong bench sft-prepare --base smollm2 --out rows

    Args:
        base: Folder of the model to extend; its tokenizer and config are read.
        out: Folder to write the rows into.
        settings: Name of the demo's settings, or a YAML file.
        set: Changes of the settings.
        heldout: Conversations kept apart.
        limit: Tokens of each source of documents at most; by default all.
    """
    from ultralong.bench.sft.rows import prepare_rows
    from ultralong.demo import load

    facts = prepare_rows(load(settings, set), base, out, heldout=heldout, limit=limit)
    print(f"{out}: {facts['documents']['rows']} rows of documents, {facts['conversations']}")


def sft_convert(file: Positional[Path], out: Positional[Path], /) -> None:
    """Convert SmolLM2 from its 4-bit GGUF file, for bench sft where there is no hub.

    Example: ultralong bench sft-convert SmolLM2.gguf smollm2

    Args:
        file: The GGUF file.
        out: Folder to write the model into.
    """
    from ultralong.demo.models import smollm2_of

    print(smollm2_of(file, out))


def sft(
    *,
    base: Path,
    rows: Path,
    out: Path,
    settings: str = "sft-smollm2",
    set: tuple[str, ...] = (),
    json: Json = None,
) -> None:
    """Measure SFT after an extension: answers kept apart, needles, perplexity, before and after.

    Example: ultralong bench sft --base smollm2 --rows rows --out runs/sft --json sft.json

    Args:
        base: Folder of the model to extend.
        rows: Folder that bench sft-prepare wrote.
        out: Folder of every stage; an interrupted run resumes there.
        settings: Name of the demo's settings, or a YAML file.
        set: Changes of the settings.
        json: Write what was measured as JSON to this file.
    """
    from ultralong.bench.sft.measure import run, table
    from ultralong.bench.sft.rows import PreparedDemo
    from ultralong.demo import load

    result = run(PreparedDemo(load(settings, set), out, start=base, prepared=rows))
    leave(json, result)
    print("\n".join(table(result)))


def readers(
    *,
    pythons: tuple[Path, ...] = (),
    kinds: tuple[str, ...] = (),
    vllm: Path | None = None,
    sglang: Path | None = None,
    json: Json = None,
) -> None:
    """Open checkpoints of every kind in several versions of transformers, beside what check says.

    make readers makes the interpreters, in build/readers. Exits with 1 where a program reads something wrong, or does
    not open it, and check had not said so.

    Example: ultralong bench readers --pythons build/readers/*/bin/python --json readers.json

    Args:
        pythons: Interpreters with other versions of transformers.
        kinds: Kinds of checkpoints; by default all.
        vllm: Interpreter with vLLM, asked for the table that it computes; needs no GPU.
        sglang: The same of SGLang.
        json: Write machine and rows as JSON to this file.
    """
    import sys

    from ultralong.bench.checkpoints.readers import bench_readers, unnamed
    from ultralong.bench.checkpoints.tables import readers_table

    rows = bench_readers(pythons, kinds, vllm=vllm, sglang=sglang, json=json)
    print("\n".join(readers_table([{"rows": rows}])))
    for row in (wrong := unnamed(rows)):
        print(f"{row['kind']}, {row['program']} {row['version']}: {row['read']}, and check says right", file=sys.stderr)
    if wrong:
        sys.exit(1)


def configs(*, types: tuple[str, ...] = (), json: Json = None) -> None:
    """Extend a config of every causal language model that transformers knows, and open it again.

    A table of results: the model class computes the table that is meant, or extend refuses it in one line. All types
    take half an hour of one core. Exits with 1 where one crashed or computes another table.

    Example: ultralong bench configs --types llama qwen3 --json configs.json

    Args:
        types: Architectures, such as llama; by default all.
        json: Write machine and rows as JSON to this file, after every architecture.
    """
    import sys

    from ultralong.bench.checkpoints.config_sweep import bench_configs
    from ultralong.bench.checkpoints.tables import configs_table

    rows = bench_configs(types, json)
    print("\n".join(configs_table([{"rows": rows}])))
    if any({"crash", "different"} & set(row["counts"]) for row in rows):
        sys.exit(1)


def longest(
    models: Positional[tuple[str, ...]] = ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B"),
    /,
    *,
    gpu_memory: tuple[float, ...] = (24, 40, 48, 80),
    host_memory: float = 64,
    json: Json = None,
) -> None:
    """Plan the longest row that fits one GPU of each size, everything trained and LoRA only; nothing is run.

    Example: ultralong bench longest meta-llama/Llama-3.2-1B --gpu-memory 24 80 --json longest.json

    Args:
        models: Model folders, hub ids, or shapes that the planner knows.
        gpu_memory: GiB of a GPU.
        host_memory: GiB of host memory for the process.
        json: Write the planned rows as JSON to this file, after every model.
    """
    from ultralong.bench.training.longest_rows import bench_longest, longest_table

    rows = bench_longest(models, gpu_memory, host_memory, json)
    print("\n".join(longest_table([{"rows": rows}])))


def tables(files: Positional[tuple[Path, ...]] = (), /) -> None:
    """Write the tables in Markdown files again from the recorded measurements, in a clone.

    Example: ultralong bench tables notebooks/results/README.md

    Args:
        files: Markdown files with table marks; by default the pages of notebooks/results.
    """
    from ultralong.bench.tables import rewrite

    print(f"{', '.join(map(str, rewrite(files)))}: written")


@takes(
    case=Group(
        "ultralong.bench.training.case:TrainingCase",
        positional=("model",),
        left_out=(
            "memory",
            "sharing",
            "mix",
            "profile",
            "degree",
            "max_tokens_per_rank",
            "fit",
            "gpu_memory",
            "host_memory",
        ),
    )
)
def saves(
    case: TrainingCase,
    *,
    memory: tuple[str, ...] = ("activation_checkpointing=true",),
    saves: int = 2,
    seconds: float | None = None,
    other_step: float | None = None,
    folder: Path | None = None,
    json: Json = None,
) -> None:
    """Time what saving checkpoints costs a training run, in the background and waited for.

    The seconds of a save don't depend on the rows: measure the whole model on short ones, and give --other-step.

    Examples:
      ultralong bench saves meta-llama/Llama-3.2-1B --tokens 32k --folder /scratch/bench --json saves.json
      ultralong bench saves --tokens 64k --gpus 2 --sharded --state-precision 8bit --kernel flash4
        --other-step 860 --seconds 190 --folder /scratch/bench

    Args:
        case: What to train.
        memory: Settings of the memory plan.
        saves: Background checkpoints, after a first one.
        seconds: Begin no save that would end later than so many seconds from the start; the first is always made.
        other_step: Seconds of another step over the same states, of longer rows for example, whose share is wanted.
        folder: Write checkpoints here, one at a time, and keep model and rows for the next measurement.
        json: Append the row to this JSON file, from the first save on.
    """
    from dataclasses import replace

    from ultralong.bench.training.saves import bench_saves
    from ultralong.training.config import MemoryConfig
    from ultralong.utils import settings

    said = settings.override({"activation_checkpointing": True}, memory, MemoryConfig)
    plan = settings.from_mapping(MemoryConfig, said, "--memory")
    bench_saves(replace(case, memory=plan), saves, folder, seconds, other_step, json)

"""Commands on what is finished: what other programs read, files compared, checkpoints averaged, a model served."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ultralong.cli.options import Group, takes
from ultralong.cli.shared import Json, leave, quoted
from ultralong.utils.hub import find_checkpoint

if TYPE_CHECKING:
    from ultralong.checkpoints.check import Readings
    from ultralong.checkpoints.merge import MergeReport
    from ultralong.data.verify import Verification
    from ultralong.inference.server.settings import ServeSettings


@takes(work=Group("ultralong.api.verdicts:check", positional=("model",)))
def check(work: partial[Readings], *, json: Json = None) -> None:
    """Say what other programs and versions will read from a checkpoint, and what they get wrong.

    transformers 4.46, 4.51, 4.57 and the installed one, vLLM, SGLang, llama.cpp: the RoPE that each computes, right or
    not, its window, the type it computes in, whether the tokenizer opens, and what to type. Nothing is loaded.

    Example: ultralong check llama-1m

    Args:
        work: The function, with the checkpoint.
        json: Write the readings as JSON to this file.
    """
    found = work()
    leave(json, found.to_dict())
    print(found)


@takes(work=Group("ultralong.api.verdicts:verify", positional=("folder",)))
def verify(work: partial[Verification], *, json: Json = None) -> None:
    """Compare a folder's files with the sizes and hashes recorded in it.

    Rows and token stores by their manifest, a run's checkpoints by their state.json, models by the headers of their
    weights, their index and, in the hub's cache, their hash. A line for each file that is missing, cut or changed, and
    exit code 1. `ultralong data verify` and `ultralong runs verify` are the same command.

    Examples:
      ultralong verify rows
      ultralong verify runs/cpt
      ultralong data verify rows
      ultralong runs verify runs/cpt

    Args:
        work: The function, with the folder.
        json: Write what was compared as JSON to this file.
    """
    found = work()
    leave(json, found.to_dict())
    print(found)
    if found.faults:
        print("\n".join(found.faults), file=sys.stderr)
        sys.exit(1)


@takes(work=Group("ultralong.api.make:merge", positional=("models",)))
def merge(work: partial[MergeReport], *, json: Json = None) -> None:
    """Average checkpoints of one model, or merge a LoRA adapter into its base.

    Tensors are averaged one at a time in float32 and written in the type of the first model, whose config and tokenizer
    go along: the last checkpoints of a run, or a trained model and its start. Another architecture, shape or tokenizer
    is refused. An adapter's folder is merged into the model that it was trained on; name that model before it if it is
    elsewhere now.

    Examples:
      ultralong merge runs/cpt/model extended --weights 0.9 0.1 --out merged
      ultralong merge runs/cpt/checkpoints/step-0000080 runs/cpt/checkpoints/step-0000100 --out merged
      ultralong merge runs/lora/adapter --out merged

    Args:
        work: The function, with the checkpoints.
        json: Write the report as JSON to this file.
    """
    report, out = work(), work.keywords["out"]
    leave(json, report.to_dict())
    print("\n".join([*report.notes, str(report)]))
    print(f"Measure it like any model: ultralong eval needle {quoted(out)}")


@takes(wanted=Group("ultralong.inference.server.settings:ServeSettings", positional=("model",)))
def serve(wanted: ServeSettings) -> None:
    """Serve a model through OpenAI's protocol, with prompts as long as its window or the memory allows.

    Chat and completions, streamed or whole, with usage, stop strings, seeds, greedy and sampled answers; health at
    /health, metrics for Prometheus at /metrics. Short requests are answered together. A long prompt is answered alone,
    and others wait; what it shares with the long one before is not read again. --gpus reads it on several GPUs.

    Examples:
      ultralong serve runs/cpt/model
      ultralong serve llama-1m --gpus 8 --kv fp8 --host 0.0.0.0 --key-variable SERVE_KEY

    Args:
        wanted: What is served, and where.
    """
    from ultralong.inference.server.serve import serve as run

    run(replace(wanted, model=find_checkpoint(wanted.model)))

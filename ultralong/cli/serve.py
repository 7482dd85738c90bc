"""The command that serves a model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ultralong.cli.options import Group, takes
from ultralong.utils.hub import find_checkpoint

if TYPE_CHECKING:
    from ultralong.inference.server.settings import ServeSettings


@takes(wanted=Group("ultralong.inference.server.settings:ServeSettings", positional=("model",)))
def serve(wanted: ServeSettings) -> None:
    """Serve a model through OpenAI's protocol, with prompts as long as its window or the memory allows.

    Chat and completions, streamed or whole, with usage, stop strings, seeds, greedy and sampled answers; health at
    /health, metrics for Prometheus at /metrics. One prompt is answered at a time, and others wait; what it shares with
    the one before is not read again. --gpus reads one prompt on several GPUs together.

    Examples:
      ultralong serve runs/cpt/model
      ultralong serve llama-1m --gpus 8 --kv fp8 --host 0.0.0.0 --key-variable SERVE_KEY

    Args:
        wanted: What is served, and where.
    """
    from ultralong.inference.server.serve import serve as run

    run(replace(wanted, model=find_checkpoint(wanted.model)))

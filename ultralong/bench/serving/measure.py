"""One long prompt through the server on this machine: `ultralong bench serve MODEL --tokens 1m --gpus 2 --json FILE`.

The model has the shape asked for and random weights, made where they stay; ids are random, and every token has a text
of its own. Everything else is `ultralong serve`: the processes that share a prompt, the queue, the web framework, a
port of this machine. OpenAI's client asks from a process of its own (`client`): a short prompt with which kernels are
compiled and chosen, then the long one, streamed and greedy, then the long one with 16 tokens more, whose beginning is
kept. Seconds to the first token are the client's, from the request on.

Useful work and the kernel's own rate are counted as by `ultralong bench prefill`: `of_kernel` is the work over the
seconds to the first token, per GPU, over the rate of the attention kernel alone at this length in the same processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ultralong.bench.prefill import RULE, kernel_rate, prefill_flops
from ultralong.bench.results import write_rows
from ultralong.bench.serving.client import FOLLOWING, WARM_ANSWER
from ultralong.bench.serving.options import ServeBench
from ultralong.bench.timing import clear, cut_config, make_model, over_gpus
from ultralong.inference.server.serve import CHUNK as SINGLE_CHUNK
from ultralong.inference.server.serve import Serving
from ultralong.inference.server.settings import ServeSettings
from ultralong.inference.sharded_engine import work_together
from ultralong.inference.sharded_generation import CHUNK
from ultralong.planner.shapes import Shape, model_config, shape_of
from ultralong.utils.extras import require
from ultralong.utils.units import GIB

NAME = "bench"
BEYOND = 1024  # tokens of the short prompt beyond its first pass


def bench_serve(options: ServeBench, path: Path | None = None) -> dict[str, Any]:
    """Serve a model and ask it.

    Args:
        options: What to measure.
        path: JSON file for the row.

    Returns:
        The row; see `_row`.

    Raises:
        ValueError: No such model, or fewer GPUs than asked for.
        ImportError: A package of the extras `serve` or `openai` is missing.
        RuntimeError: The asking program failed.
        ultralong.utils.local_ranks.RankFailed: A process failed, such as by running out of memory.
    """
    for module, extra in (("fastapi", "serve"), ("uvicorn", "serve"), ("openai", "openai")):
        require(module, extra=extra)
    model_config(options.model)  # says what is wrong here, not in another process
    row = over_gpus(_serve, options.gpus, options)
    if isinstance(row, Exception):
        raise row
    print(json.dumps(row), flush=True)
    if path is not None:
        write_rows(path, [row], options=asdict(options), flop_rule=RULE)
    return dict(row)


def _serve(rank: int, world: int, device: str, options: ServeBench) -> Any:
    """One process's part; the first one's row, or the error by which a user's mistake is told."""
    config, about = cut_config(options.model, options.layers)
    chunk = options.chunk or (SINGLE_CHUNK if world == 1 and options.kv == "bf16" else CHUNK * world)
    warm = min(options.tokens, chunk + BEYOND)
    config.max_position_embeddings = max(options.tokens + FOLLOWING + options.new_tokens, warm + WARM_ANSWER)
    model, shape = make_model(config, device), shape_of(config)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = model.config.eos_token_id = None  # every answer has its whole length
    rate = kernel_rate("auto", options.tokens, shape, world, model)
    if rank == 0:
        print(f"The attention kernel alone: {rate / 1e12:.4g} TF/s per GPU.", file=sys.stderr, flush=True)
    asking = _Asking(options, warm, chunk)
    kv = "fp8" if options.kv == "fp8" else "auto"
    vocabulary = model.config.get_text_config().vocab_size
    said = work_together(asking, model, word_tokenizer(vocabulary), rank, world, kv=kv, chunk=chunk, quiet=True)
    if rank or isinstance(said, Exception):
        return said
    return {**about, **_row(options, shape, chunk, said, rate)}


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words t0, t1 and so on: every id has a text, and no token waits for the next."""
    words = {f"t{number}": number for number in range(vocabulary)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="t0")))


class _Asking:
    """What the first process does with the open model: serve it, have it asked, and stop."""

    def __init__(self, options: ServeBench, warm: int, chunk: int) -> None:
        self._options, self._warm, self._chunk = options, warm, chunk
        self._asked: dict[str, Any] = {}
        self._done: subprocess.CompletedProcess[str] | None = None

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, engine: Any) -> dict[str, Any]:
        options = self._options
        kv = "fp8" if options.kv == "fp8" else "auto"
        settings = ServeSettings(NAME, port=0, name=NAME, gpus=options.gpus, kv=kv, chunk=self._chunk)
        self._asked = {"model": NAME, "vocabulary": model.config.get_text_config().vocab_size}
        self._asked |= {"warm": self._warm, "tokens": options.tokens, "new_tokens": options.new_tokens}
        clear(model.device)
        Serving(settings, self._begin)(model, tokenizer, engine)
        done = self._done
        if done is None or done.returncode:
            how = "did not start" if done is None else f"ended with exit code {done.returncode}"
            raise RuntimeError(f"the asking program {how}; what it said stands above")
        peak = torch.cuda.max_memory_allocated() / GIB if model.device.type == "cuda" else 0.0
        return {**json.loads(done.stdout), "peak_gib": round(peak, 2)}

    def _begin(self, server: Any) -> None:
        threading.Thread(target=self._ask, args=(server,), name="asking", daemon=True).start()

    def _ask(self, server: Any) -> None:
        try:
            while not server.started and not server.should_exit:
                time.sleep(0.02)
            if not server.started:
                return
            self._asked["port"] = server.servers[0].sockets[0].getsockname()[1]  # the one that it took
            command = [sys.executable, "-m", "ultralong.bench.serving.client"]
            self._done = subprocess.run(
                command, input=json.dumps(self._asked), stdout=subprocess.PIPE, text=True, check=False
            )
        finally:
            server.should_exit = True


def _row(options: ServeBench, shape: Shape, chunk: int, said: dict[str, Any], rate: float) -> dict[str, Any]:
    """What the prompt took as the client saw it; rates in TF/s per GPU, memory of the first GPU."""
    asked, again = said["asked"], said["again_with_the_prompt_kept"]
    attended, multiplied = prefill_flops(shape, options.tokens)
    achieved = (attended + multiplied) / options.gpus / asked["seconds_to_first_token"]
    return {
        "tokens": options.tokens,
        "gpus": options.gpus,
        "kv": options.kv,
        "chunk": chunk,
        "new_tokens": asked["new_tokens"],
        "seconds_to_first_token": round(asked["seconds_to_first_token"], 3),
        "tokens_per_second_after": round(asked["tokens_per_second_after"], 2),
        "tflops": round(achieved / 1e12, 6),
        "kernel_tflops": round(rate / 1e12, 6),
        "of_kernel": round(achieved / rate, 4),
        "again_cached_tokens": again["cached_tokens"],
        "again_seconds_to_first_token": round(again["seconds_to_first_token"], 3),
        "again_tokens_per_second_after": round(again["tokens_per_second_after"], 2),
        "peak_gib": said["peak_gib"],
    }

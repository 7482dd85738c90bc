"""One model on several GPUs, or with an fp8 cache, behind the engines' interface.

The first rank makes samples, asks and writes; the others wait for what it is asked and read with it. So everything but
reading is written for one process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ultralong.attention.collectives import Group
from ultralong.inference.decoding import GREEDY, Sampler, Sampling, Step
from ultralong.inference.engines import Engine, RunnerEngine
from ultralong.inference.generate import check_budgets, stream
from ultralong.inference.load import load_model_and_tokenizer
from ultralong.inference.runner import Interrupted
from ultralong.inference.sharded_generation import ShardedRunner
from ultralong.utils.local_ranks import nccl_options, run_ranks
from ultralong.utils.processes import leave_stops_to_first
from ultralong.utils.progress import hidden_bars

WEEK = 7 * 24 * 3600.0  # seconds that other ranks wait for the first one's next question
Work = Callable[[PreTrainedModel, PreTrainedTokenizerBase, Engine | None], Any]


@dataclass(frozen=True)
class Question:
    """What the first rank tells the others to read; without a prompt, to give the cache's memory back."""

    prompt: tuple[int, ...] = ()
    max_new_tokens: int = 0
    capacity: int | None = None
    sampling: Sampling | Sampler = GREEDY
    stop: frozenset[int] = frozenset()


class ShardedEngine(RunnerEngine):
    """Answers by a `ShardedRunner`, whose cache is sharded over the ranks of a group.

    Args:
        model: The whole model, on every rank.
        tokenizer: Its tokenizer.
        group: The ranks; None is this one alone.
        kv: Type of keys and values: `auto` or `fp8`.
        chunk: Tokens of one prefill pass; None takes 65,536 a rank.
        quiet: True draws no progress bars of single prompts.
        exchange: How ranks join their attention of a new token, see `ShardedRunner`.

    Raises:
        ValueError: As for `ShardedRunner`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        group: Group | None = None,
        *,
        kv: str = "auto",
        chunk: int | None = None,
        quiet: bool = False,
        exchange: str = "auto",
    ) -> None:
        super().__init__(model, tokenizer)
        self.group, self.ranks = group, 1 if group is None else dist.get_world_size(group)
        self._runner = ShardedRunner(model, None, group, kv=kv, chunk=chunk, quiet=quiet, exchange=exchange)
        self.name = (
            "transformers"
            + (f", {self.ranks} processes" if self.ranks > 1 else "")
            + (", 8-bit keys and values" if kv == "fp8" else "")
        )

    def stream(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        capacity: int | None = None,
        sampling: Sampling | Sampler = GREEDY,
        stop: Collection[int] | None = None,
    ) -> Iterator[Step]:
        """See `StreamingEngine`; on the first rank only, one prompt at a time."""
        self._runner.capacity = capacity
        self._runner.check(len(prompt), check_budgets(max_new_tokens, 1)[0])  # here, where nobody waits for it yet
        kept = self.stop if stop is None else frozenset(stop)
        return self._ask(Question(tuple(prompt), max_new_tokens, capacity, sampling, kept))

    def _ask(self, question: Question) -> Iterator[Step]:
        """Told when the first step is taken, so that an iterator nobody starts leaves nobody waiting."""
        self._tell(question)
        yield from self._steps(question)

    def follow(self) -> None:
        """What the other ranks do: read what the first one is asked, until it closes."""
        while (question := self._tell(None)) is not None:
            if question.prompt:
                with suppress(Interrupted):  # the first rank tells its caller
                    for _ in self._steps(question):
                        pass
            else:
                self._runner.release()

    def release(self) -> None:
        """See `Engine`; on the first rank only."""
        self._tell(Question())
        self._runner.release()

    def close(self) -> None:
        """Let the other ranks go; on the first one only."""
        self._tell(None)

    def _tell(self, question: Question | None) -> Question | None:
        """The first rank's question, on every rank."""
        told = [question]
        if self.group is not None:
            dist.broadcast_object_list(told, dist.get_global_rank(self.group, 0), group=self.group)
        return told[0]

    def _steps(self, question: Question) -> Iterator[Step]:
        self._runner.capacity = question.capacity
        return stream(
            self._runner,
            [question.prompt],
            question.max_new_tokens,
            sampling=question.sampling,
            stop=question.stop,
        )


def with_model(
    work: Work,
    model: str,
    *,
    gpus: int = 1,
    kv: str = "auto",
    chunk: int | None = None,
    device: str = "auto",
    quiet: bool = False,
    exchange: str = "auto",
    first_stops: bool = False,
) -> Any:
    """Open a model on one or several GPUs and let `work(model, tokenizer, engine)` ask it.

    Under torchrun its processes are used; otherwise they are started here. On a CPU, asked for by name, they are
    processes without GPUs.

    Args:
        work: What to do on the first process; the engine is None where the plain one serves. It must be importable.
        model: Folder or hub id.
        gpus: GPUs that share a prompt.
        kv: Type of keys and values: `auto` or `fp8`.
        chunk: Tokens of one prefill pass.
        device: `auto`, `cpu` or `cuda`.
        quiet: True draws no progress bars.
        exchange: How ranks join their attention of a new token, see `ShardedRunner`.
        first_stops: Several processes are stopped by the first one, as `work` does when it is told to, see `run_ranks`.

    Returns:
        What `work` returns; None on torchrun's other processes.

    Raises:
        ValueError: Fewer GPUs than asked for, no such checkpoint, a model that cannot be read so, or what `work`
            raises.
        ImportError: What `work` raises.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu" if gpus == 1 else "cuda"
    if gpus < 1 or (device == "cuda" and gpus > torch.cuda.device_count()):
        raise ValueError(
            f"gpus is {gpus}, and this machine has {torch.cuda.device_count()}: give --gpus what it has, or "
            "--device cpu to try it out with processes."
        )
    arguments = (work, model, kv, chunk, device, quiet, exchange)
    if dist.is_torchelastic_launched():
        found = _in_torchrun(gpus, arguments, device, first_stops)
    elif gpus == 1:
        found = _open_and_work(0, 1, *arguments)
    else:
        found = run_ranks(_open_and_work, gpus, *arguments, device=device, timeout=WEEK, first_stops=first_stops)[0]
    if isinstance(found, ValueError | ImportError):
        raise found
    return found


def _in_torchrun(gpus: int, arguments: tuple[Any, ...], device: str, first_stops: bool) -> Any:
    if device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        timeout=timedelta(seconds=WEEK),
        pg_options=nccl_options() if device == "cuda" else None,
    )
    if first_stops:
        leave_stops_to_first(dist.get_rank())
    try:
        if dist.get_world_size() != gpus:
            return ValueError(
                f"torchrun started {dist.get_world_size()} processes and --gpus says {gpus}: give both the same number."
            )
        return _open_and_work(dist.get_rank(), gpus, *arguments)
    finally:
        dist.destroy_process_group()


def _open_and_work(
    rank: int,
    world: int,
    work: Work,
    model: str,
    kv: str,
    chunk: int | None,
    device: str,
    quiet: bool,
    exchange: str,
) -> Any:
    """One rank's part. What a user did wrong is returned, not raised."""
    try:
        where = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
        with hidden_bars(quiet):
            loaded, tokenizer = load_model_and_tokenizer(model, where)
    except (ValueError, ImportError) as error:
        return error
    return work_together(work, loaded, tokenizer, rank, world, kv=kv, chunk=chunk, quiet=quiet, exchange=exchange)


def work_together(
    work: Work,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rank: int,
    world: int,
    *,
    kv: str = "auto",
    chunk: int | None = None,
    quiet: bool = False,
    exchange: str = "auto",
) -> Any:
    """Let `work(model, tokenizer, engine)` ask an open model on the first process; the others read along until it ends.

    Args:
        work: What to do; the engine is None where one process with a cache of the model's type needs no other.
        model: The whole model, on every process.
        tokenizer: Its tokenizer.
        rank: This process.
        world: Number of processes; several are torch.distributed's group.
        kv: Type of keys and values: `auto` or `fp8`.
        chunk: Tokens of one prefill pass.
        quiet: True draws no progress bars.
        exchange: How ranks join their attention of a new token, see `ShardedRunner`.

    Returns:
        What `work` returns, or the ValueError or ImportError by which it, or opening the engine, told a user's mistake;
        None on the other processes.
    """
    group = dist.group.WORLD if world > 1 else None
    engine = None
    try:
        if group is not None or kv != "auto":
            engine = ShardedEngine(model, tokenizer, group, kv=kv, chunk=chunk, quiet=quiet, exchange=exchange)
    except ValueError as error:
        return error
    if engine is not None and rank:
        return engine.follow()
    try:
        return work(model, tokenizer, engine)
    except (ValueError, ImportError) as error:
        return error
    finally:
        if engine is not None:
            engine.close()

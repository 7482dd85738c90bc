"""Checkpoints of a run: complete or absent, resumed bit for bit, and the plain Hugging Face folder at the end.

A checkpoint is a folder `checkpoints/step-NNNNNNN`: torch's distributed checkpoint (trained parameters and optimizer
states), every process's random state, and `state.json`. It is written under another name and renamed when all of it is
on disk, so a folder of that name is always complete. The data position is the step itself (see `batches`).
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import state_dict as of_torch
from torch.distributed.checkpoint.state_dict import StateDictOptions

from ultralong.checkpoints.distributed import (
    StatePlanner,
    StateReader,
    changed_file,
    damage_behind,
    first_cause,
    hash_own_files,
    record_hashes,
)
from ultralong.checkpoints.saving.background import BackgroundSaver, Together, together
from ultralong.checkpoints.saving.shards import ShardWriter
from ultralong.training.adapters.lora import has_frozen, without_frozen
from ultralong.training.memory.states_8bit import plain_tensor_states
from ultralong.training.parallel import Processes
from ultralong.training.run_folder import RunFolder, process_counts
from ultralong.utils.files import atomic_path, read_json

ADVICE = "Remove that folder and run again with --resume: the checkpoint before it is used."


def save(
    folder: RunFolder,
    processes: Processes,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    keep: int,
    background: BackgroundSaver | None = None,
    rows: Sequence[str] | None = None,
) -> None:
    """Write the checkpoint of `step`; all processes call it. Older ones beyond `keep` are removed afterwards.

    Args:
        folder: The run's.
        processes: The run's.
        model: The model, wrapped as it is trained.
        optimizer: Its optimizer.
        step: Steps that were made.
        keep: Checkpoints that stay.
        background: Returns when the states are copied, and writes the copy; what fails then, its `wait` raises.
        rows: What the rows are, source by source (`RowOrder.content`), which a resumed run is compared with.

    Raises:
        OSError: The disk of a process is full or not writable; on all of them. Nothing half-written is left under a
            checkpoint's name.
    """
    final = folder.checkpoint(step)
    partial = final.parent / "unfinished"
    if background is not None:
        background.wait()  # for the checkpoint before, which is written under the same name
    main, rank = processes.is_main, processes.accelerator.process_index
    together(lambda: _emptied(partial) if main else None)
    content, writer = states_to_save(model, optimizer), ShardWriter(partial)
    random = _random_state()

    def own_files() -> None:
        with atomic_path(partial / f"random-{rank}.safetensors") as temporary:  # by itself its owner's alone
            save_file(random, temporary)
        hash_own_files(partial, rank, {name: file.sha256 for name, file in writer.files.items()})

    def publish() -> None:
        if main:
            state = {"step": step, **process_counts(processes.accelerator.num_processes)}
            record_hashes(partial, state if rows is None else {**state, "rows": [*rows]})
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            for _, old in folder.checkpoints()[:-keep]:
                shutil.rmtree(old)

    def complete(on_all: Together) -> None:
        on_all(own_files)
        on_all(publish)

    if background is not None:
        background.start(content, writer, complete)
        return
    with _without_warning():
        dcp.save(content, storage_writer=writer, no_dist=processes.accelerator.num_processes == 1)
    complete(together)


def _emptied(folder: Path) -> None:
    """Make a folder, without what a save that was cut left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def states_to_save(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds of a model, wrapped as it is trained, and of its optimizer; all processes call it."""
    parameters, states = of_torch.get_state_dict(model, optimizer)
    return {"model": without_frozen(parameters, model), "optimizer": plain_tensor_states(states)}


def restore(path: Path, processes: Processes, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint into model, optimizer and random state; all processes call it.

    Returns:
        The step it was saved after.

    Raises:
        ValueError: A file of it is missing, truncated or corrupt; the message names the folder and what to do. Every
            other error, such as running out of memory or losing a connection, is raised as it is.
    """
    if (damage := _changed(path, processes)) is not None:
        raise ValueError(f"{path} is damaged: {damage}. {ADVICE}")
    try:
        return _load(path, processes, model, optimizer)
    except (Exception, dcp.CheckpointException) as error:  # torch's is no Exception
        cause = first_cause(error, processes.accelerator.process_index)
        if (damage := damage_behind(path, cause)) is not None:
            raise ValueError(f"{path} is damaged: {damage}. {ADVICE}") from cause
        if cause is error:
            raise
        raise cause from error  # whose text has the tracebacks of the ranks that failed


def _changed(path: Path, processes: Processes) -> str | None:
    """A file of a checkpoint that is not what was written; each process reads its share, and all get one answer."""
    own = changed_file(path, processes.accelerator.process_index, processes.accelerator.num_processes)
    if processes.accelerator.num_processes == 1:
        return own
    answers: list[str | None] = [None] * processes.accelerator.num_processes
    dist.all_gather_object(answers, own)
    return next((found for found in answers if found is not None), None)


def _load(path: Path, processes: Processes, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    state = read_json(path / "state.json")
    # The config's, which a run keeps; a checkpoint has them by parameter, and other versions grouped some otherwise.
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    parameters, states = of_torch.get_state_dict(model, optimizer)
    loaded = {"model": without_frozen(parameters, model), "optimizer": plain_tensor_states(states)}
    reader = StateReader(path)
    reader.read_metadata()  # torch would log a traceback, and a second one, before it raises
    with _without_warning():
        alone = processes.accelerator.num_processes == 1
        dcp.load(loaded, storage_reader=reader, planner=StatePlanner(), no_dist=alone)
    if any(".codes" in name for values in loaded["optimizer"]["state"].values() for name in values):
        loaded["optimizer"] = states  # whose 8-bit states were loaded in place
    strict = StateDictOptions(strict=not has_frozen(model))
    both = {"model_state_dict": loaded["model"], "optim_state_dict": loaded["optimizer"]}
    of_torch.set_state_dict(model, optimizer, **both, options=strict)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    # Resumed on another number of processes, the random state of the first serves the new ones: training itself
    # draws no numbers unless the model has dropout.
    rank = processes.accelerator.process_index
    _restore_random_state(load_file(path / f"random-{rank if rank < state['processes'] else 0}.safetensors"))
    return int(state["step"])


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's parameters and buffers in full, the frozen ones left out, for the main process; all call it.

    A tensor with two names (a tied head) comes under its first name only, so that it is written once.
    """
    once = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    found = of_torch.get_model_state_dict(model, options=options)
    return {name: x.detach() for name, x in found.items() if name in once and isinstance(x, torch.Tensor)}


@contextmanager
def _without_warning() -> Iterator[None]:
    """One process saves alone, which torch warns about and which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])

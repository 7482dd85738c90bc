"""What a training run is: one frozen dataclass, the same for continued pretraining and SFT, CPU and cluster.

A preset is a YAML file of these (see `ultralong/presets/`); every run writes the one it resolved to `config.yaml` in
its output folder, and that file alone repeats it.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

PRESETS = Path(__file__).parents[1] / "presets"


@dataclass(frozen=True)
class DataSource:
    """A folder of packed rows and how often it is drawn from.

    Attributes:
        rows: Folder written by `ultralong pack` (see `ultralong.data.PackedRows`).
        weight: Share of the rows drawn, relative to the other sources'.
    """

    rows: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight must be above 0, found {self.weight}.")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. Learning rate and betas of the recipe's continued pretraining are the defaults.

    Attributes:
        lr: Peak learning rate. The paper uses 3e-5 for continued pretraining and 5e-6 for SFT.
        betas: As in AdamW.
        eps: As in AdamW.
        weight_decay: Applied to matrices only, not to norms and biases.
        warmup_steps: Steps of linear warm-up from lr / warmup_steps.
        schedule: What follows the warm-up: constant, or a linear or cosine fall to `final_ratio` x lr at the last step.
        final_ratio: See `schedule`.
        clip_norm: Largest global gradient norm; 0 switches clipping off.
        states: How AdamW's two states are held: float32, or 8bit in blocks of 256 with a scale each (torchao, after
            arXiv 2110.02861), a quarter of the memory.
    """

    lr: float = 3e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_ratio: float = 0.1
    clip_norm: float = 1.0
    states: Literal["float32", "8bit"] = "float32"

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, found {self.lr}.")
        if self.warmup_steps < 0 or self.clip_norm < 0 or not 0 <= self.final_ratio <= 1:
            raise ValueError("warmup_steps and clip_norm must be 0 or more and final_ratio in 0..1.")

    def factor(self, step: int, steps: int) -> float:
        """Learning rate of step `step` (from 0) of `steps`, as a share of `lr`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        done = (step - self.warmup_steps) / max(1, steps - 1 - self.warmup_steps)
        fall = 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.final_ratio + (1 - self.final_ratio) * max(0.0, fall)


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes of a run share the work: groups of `sequence` processes share a row, groups work side by side.

    Attributes:
        sequence: Processes that share one row (sequence parallelism); the processes of a run must be a multiple.
        shard: Processes that share the parameters, their gradients and the optimizer's states (FSDP2), whatever rows
            they work on; the processes of a run must be a multiple, and each further set of `shard` is a replica. 1
            is allowed: nothing is shared then, but parameters are computed with in `dtype` as FSDP2 does. None: every
            process has everything.
        reshard: Give a layer's gathered parameters up after its forward pass and gather them again for the backward
            pass; false keeps them in between.
        scheme: Attention scheme, see `ultralong.attention`; auto chooses and says why.
        kernel: Attention kernel; auto takes the fastest that is present and right for the shape.
        stages: Head chunks of the scheme: more make its buffers smaller and cost a little; None is one.
        timeout_minutes: A rank that waits longer than this for the others stops the run with a message.
    """

    sequence: int = 1
    shard: int | None = None
    reshard: bool = True
    scheme: str = "auto"
    kernel: str = "auto"
    stages: int | None = None
    timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        if self.sequence < 1 or (self.shard is not None and self.shard < 1) or not self.timeout_minutes > 0:
            raise ValueError(f"sequence and shard must be 1 or more and timeout_minutes above 0, found {self}.")


@dataclass(frozen=True)
class MemoryConfig:
    """What bounds the memory of one step.

    Attributes:
        checkpoint_layers: Recompute each layer's inside in the backward pass instead of keeping it.
        loss_tile: Tokens whose logits exist at a time; the full (T, vocabulary) matrix never does.
        layer_tile: Tokens that all of a checkpointed layer but its attention works on at a time, in both passes, with
            the layer's backward pass written out (`ultralong.training.layers`: Llama, Mistral, Qwen2 and Qwen3); 0
            leaves the layers to transformers.
        attention_kept: Checkpointed layers, from the last one down, whose attention result stays on the device, so that
            it is not computed again; -1 is all.
        attention_host: Layers before those whose attention result waits in host memory; -1 is all the others.
        inputs_host: Kept inputs, from the first layer's up, that wait in host memory; -1 is all.
        inputs_every: The input of every so-manieth layer is kept; those between are made again from it and the layers'
            attention results. More than 1 needs `layer_tile`.
    """

    checkpoint_layers: bool = False
    loss_tile: int = 2048
    layer_tile: int = 0
    attention_kept: int = 0
    attention_host: int = 0
    inputs_host: int = 0
    inputs_every: int = 1

    def __post_init__(self) -> None:
        if self.loss_tile < 1 or self.layer_tile < 0 or self.inputs_every < 1:
            raise ValueError(f"loss_tile and inputs_every must be 1 or more and layer_tile 0 or more, found {self}.")
        planned = ("layer_tile", "attention_kept", "attention_host", "inputs_host")
        if not self.checkpoint_layers and any(getattr(self, name) for name in planned):
            raise ValueError(f"{', '.join(planned)} say what stays of a checkpointed layer: set "
                             "memory.checkpoint_layers to true (without it everything stays on the device).")
        if self.inputs_every > 1 and not self.layer_tile:
            raise ValueError(f"memory.inputs_every is {self.inputs_every}, which needs layers whose backward pass is "
                             "written out: set memory.layer_tile, to 32768 for example.")
        for name in ("attention_kept", "attention_host", "inputs_host"):
            if getattr(self, name) < -1:
                raise ValueError(f"{name} must be -1 (all layers) or more, found {getattr(self, name)}.")


def layers_meant(asked: int, layers: int) -> int:
    """What a number of layers in `MemoryConfig` means for a model: -1 is all, and more than there are is all too."""
    return layers if asked < 0 else min(asked, layers)


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: Folder (or hub id) of the checkpoint to start from, its window already extended (`ultralong extend`).
        out: Folder of the run: `config.yaml`, `log.jsonl`, `checkpoints/`, and at the end the model in `model/`.
        data: Where rows come from.
        steps: Optimizer steps.
        rows_per_step: Rows of one optimizer step over all processes.
        rows_at_once: Rows that one process (or one group of sequence-parallel processes) works on at a time.
        seed: Order of the rows, and the random state.
        dtype: Type of the parameters that the forward pass computes in. float32 computes in float32; bfloat16 keeps
            float32 master parameters and computes under autocast.
        compile: Compile the model with torch.compile (single process).
        save_every: Steps between checkpoints; 0 keeps only the last.
        keep: Newest checkpoints kept on disk.
        optimizer: See `OptimizerConfig`.
        parallel: See `ParallelConfig`.
        memory: See `MemoryConfig`.
        largest_jump: A step whose loss is this many nats above the mean of up to 32 steps before it stops the run
            before it updates anything; 0 never does.
        trackers: accelerate's trackers to report to besides `log.jsonl`, such as tensorboard or wandb.
        position_buckets: The log has the loss of this many equal stretches of the row, so that a lesson learnt only
            near its start shows.
    """

    model: str
    out: str
    data: tuple[DataSource, ...]
    steps: int
    rows_per_step: int = 1
    rows_at_once: int = 1
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    compile: bool = False
    save_every: int = 0
    keep: int = 2
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    largest_jump: float = 3.0
    trackers: tuple[str, ...] = ()
    position_buckets: int = 8

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data must name at least one folder of packed rows.")
        for name in ("steps", "rows_per_step", "rows_at_once", "keep", "position_buckets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, found {getattr(self, name)}.")
        if self.rows_per_step % self.rows_at_once:
            raise ValueError(
                f"rows_per_step ({self.rows_per_step}) must be a multiple of rows_at_once ({self.rows_at_once})."
            )


def preset(name: str | os.PathLike[str]) -> Path:
    """The settings file of a preset's name, or the file that `name` is the path of.

    Raises:
        ValueError: There is neither.
    """
    if Path(name).is_file():
        return Path(name)
    if (found := PRESETS / f"{name}.yaml").is_file():
        return found
    known = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
    raise ValueError(f"{name!r} is neither a settings file nor a preset. Presets: {known}.")

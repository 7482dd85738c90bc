"""What a training run is: one frozen dataclass, the same for continued pretraining and SFT, CPU and cluster.

A preset is a YAML file of these (see `ultralong/presets/`); every run writes the one it resolved to `config.yaml` in
its output folder, and that file alone repeats it.
"""

from __future__ import annotations

import difflib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from ultralong.data.rows.short_contexts import LongCEConfig
from ultralong.training.adapters.config import LoRAConfig
from ultralong.training.parallel_config import ParallelConfig
from ultralong.utils.units import SEEDS, Tokens, check_length
from ultralong.utils.words import expand_home

# Compiled attention is transformers' own: it takes a jump of the positions for another text's start, and knows no
# anchor. Short contexts are of other shapes, and have no anchor before them.
CLASHES = {"compile": ("skip_positions_to", "long_ce", "anchor", "lora"), "anchor": ("long_ce", "skip_positions_to")}
PRESETS = Path(__file__).parents[1] / "presets"
# Both of AdamW's states of a parameter; in 8 bits each has a float32 scale for 256 of them.
STATE_BYTES = {"float32": 8.0, "8bit": 2 * (1 + 4 / 256)}


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
        expand_home(self, "rows")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be a number above 0, found {self.weight}.")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. Learning rate and betas of the recipe's continued pretraining are the defaults.

    Attributes:
        lr: Peak learning rate. The paper uses 3e-5 for continued pretraining and 5e-6 for SFT.
        betas: Decay rates of AdamW's first and second moments.
        eps: Term that AdamW adds to its denominator.
        weight_decay: Applied to matrices only, not to norms and biases.
        warmup_steps: Steps of linear warm-up from lr / warmup_steps.
        schedule: What follows the warm-up: constant, or a linear or cosine fall to `final_ratio` x lr at the last step.
        final_ratio: See `schedule`.
        clip_norm: Largest global gradient norm; 0 switches clipping off.
        state_precision: Precision of AdamW's two states: float32, or 8bit in blocks of 256 with a scale each (torchao,
            after arXiv 2110.02861), a quarter of the memory.
    """

    RENAMED: ClassVar[dict[str, str]] = {"states": "state_precision"}

    lr: float = 3e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_ratio: float = 0.1
    clip_norm: float = 1.0
    state_precision: Literal["float32", "8bit"] = "float32"

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be above 0, found {self.lr}.")
        if not all(0 <= beta < 1 for beta in self.betas) or not 0 < self.eps < 1 or not 0 <= self.weight_decay < 1e3:
            raise ValueError(f"betas must be in 0..1, eps above 0 and weight_decay 0 or more, found {self}.")
        if self.warmup_steps < 0 or not self.clip_norm >= 0 or not 0 <= self.final_ratio <= 1:
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
class MemoryConfig:
    """What bounds the memory of one step.

    Attributes:
        activation_checkpointing: Recompute each layer's activations in the backward pass instead of keeping them.
        loss_tile: Tile size of the head and loss, in tokens: logits exist for one tile at a time, never for a row.
        layer_tile: Tile size of a checkpointed layer's projections and feed-forward, in tokens, in both passes; uses
            decoder layers with a custom backward pass, of the families in `ultralong.training.memory.layers`. 0 leaves
            the layers to transformers.
        attention_outputs_on_gpu: Number of checkpointed layers, counted from the last, whose attention output stays on
            the GPU, so that attention is not recomputed there; -1 is all.
        attention_outputs_offloaded: Number of layers before those whose attention output is offloaded to host memory;
            -1 is all the others.
        layer_inputs_offloaded: Number of checkpointed layer inputs, counted from the first layer, that are offloaded to
            host memory; -1 is all.
        checkpoint_every: The input of every N-th layer is kept as a checkpoint; the inputs between are recomputed from
            it and the layers' attention outputs. More than 1 needs `layer_tile`.
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "checkpoint_layers": "activation_checkpointing",
        "attention_kept": "attention_outputs_on_gpu",
        "attention_host": "attention_outputs_offloaded",
        "inputs_host": "layer_inputs_offloaded",
        "inputs_every": "checkpoint_every",
    }

    activation_checkpointing: bool = False
    loss_tile: Tokens = 2048
    layer_tile: Tokens = 0
    attention_outputs_on_gpu: int = 0
    attention_outputs_offloaded: int = 0
    layer_inputs_offloaded: int = 0
    checkpoint_every: int = 1

    def __post_init__(self) -> None:
        if self.loss_tile < 1 or self.layer_tile < 0 or self.checkpoint_every < 1:
            raise ValueError(
                f"loss_tile and checkpoint_every must be 1 or more and layer_tile 0 or more, found {self}."
            )
        planned = ("layer_tile", "attention_outputs_on_gpu", "attention_outputs_offloaded", "layer_inputs_offloaded")
        if not self.activation_checkpointing and any(getattr(self, name) for name in planned):
            raise ValueError(
                f"{', '.join(planned)} say what is stored of a checkpointed layer: set memory.activation_checkpointing "
                "to true (without it everything stays on the device)."
            )
        if self.checkpoint_every > 1 and not self.layer_tile:
            raise ValueError(
                f"memory.checkpoint_every is {self.checkpoint_every}, which needs the decoder layers with a custom "
                "backward pass: set memory.layer_tile, to 32768 for example."
            )
        for name in planned[1:]:
            if getattr(self, name) < -1:
                raise ValueError(f"{name} must be -1 (all layers) or more, found {getattr(self, name)}.")


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: Folder (or hub id) of the checkpoint to start from, its window already extended (`ultralong extend`).
        out: Folder of the run: `config.yaml`, `log.jsonl`, `checkpoints/`, and at the end the model in `model/`.
        data: Where rows come from.
        steps: Optimizer steps.
        global_batch_size: Rows of one optimizer step over all processes.
        micro_batch_size: Rows of one forward and backward pass of a process (or of a context-parallel group).
        seed: Order of the rows, and the random state.
        dtype: Type of the parameters that the forward pass computes in. float32 computes in float32; bfloat16 keeps
            float32 master parameters and computes under autocast.
        compile: Compile the model with torch.compile (single process).
        save_every: Steps between checkpoints; 0 keeps only the last. auto: a twentieth of the steps, and each step
            that is longer than a stop waits (see `ultralong.training.save_pace`).
        keep: Newest checkpoints kept on disk.
        async_checkpoints: Write checkpoints from a copy in host memory, held over the run, while training goes on.
        optimizer: See `OptimizerConfig`.
        parallel: See `ParallelConfig`.
        memory: See `MemoryConfig`.
        lora: Adapters that are trained in place of the model's parameters, see `LoRAConfig`; off by default.
        loss_spike_threshold: A loss so far (nats) above the mean of the last 32 stops the run before its update; 0: no.
        trackers: Get the log's numbers too: accelerate's, such as wandb; prometheus writes `metrics.prom`.
        position_buckets: The log has the loss of this many equal stretches of the row, which shows a loss that
            falls only near its start.
        skip_rows: Rows at the start of the order that are left out, as a run before with this seed has trained on them:
            one that trains its model further then reads what that one has not.
        skip_positions_to: Skipped positions (PoSE, arXiv 2309.10400): each row is cut in two, and its second chunk
            stands at a later position, drawn for each row, below this one; so short rows train the distances of a
            longer window. None trains at the rows' own positions.
        long_ce: Weights of the targets, see `LongCEConfig`; off by default.
        anchor: Rows with a document mask get one shared first token, the model's BOS, that all of their documents see
            (AnchorAttention, arXiv 2411.13476).
        base_model: Hub id of the model that `model` was extended from, or `miniature`. `ultralong plan` takes its shape
            where `model` is no folder yet; training does not read it.
        length: Tokens of a row. `ultralong plan` takes it where no rows are packed yet; training refuses rows of
            another length. None accepts rows of any length.
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "rows_per_step": "global_batch_size",
        "rows_at_once": "micro_batch_size",
        "largest_jump": "loss_spike_threshold",
    }

    model: str
    out: str
    data: tuple[DataSource, ...]
    steps: int
    global_batch_size: int = 1
    micro_batch_size: int = 1
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    compile: bool = False
    save_every: int | Literal["auto"] = 0
    keep: int = 2
    async_checkpoints: bool = False
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    loss_spike_threshold: float = 3.0
    trackers: tuple[str, ...] = ()
    position_buckets: int = 8
    skip_rows: int = 0
    skip_positions_to: Tokens | None = None
    long_ce: LongCEConfig = field(default_factory=LongCEConfig)
    anchor: bool = False
    base_model: str | None = None
    length: Tokens | None = None

    def __post_init__(self) -> None:
        expand_home(self, "model", "out")  # where no shell has seen them, as in a file or after --set
        if not self.data:
            raise ValueError("data must name at least one folder of packed rows.")
        check_length("length", self.length or 1)
        for name in ("steps", "global_batch_size", "micro_batch_size", "keep", "position_buckets", "length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, found {value}.")
        for name in ("save_every", "seed", "skip_rows", "loss_spike_threshold"):
            if (value := getattr(self, name)) != "auto" and not 0 <= value < SEEDS:
                raise ValueError(f"{name} must be 0 or more and below 2**32, found {value}.")
        on = {"compile": self.compile, "anchor": self.anchor, "long_ce": self.long_ce.weight_cap, "lora": self.lora.on}
        on["skip_positions_to"] = self.skip_positions_to is not None
        for one, others in CLASHES.items():
            if on[one] and (clash := " and ".join(name for name in others if on[name])):
                raise ValueError(f"{one} and {clash} don't go together: switch one of them off.")
        if (rows := self.global_batch_size) % (micro := self.micro_batch_size):
            raise ValueError(f"global_batch_size ({rows}) must be a multiple of micro_batch_size ({micro}).")


def preset(name: str | os.PathLike[str], demos: bool = False) -> Path:
    """The settings file of a preset's name, or the file that `name` is the path of.

    Raises:
        ValueError: There is neither, or it is a demo's and `demos` is off.
    """
    if (path := Path(name).expanduser()).is_file():
        return path
    known = sorted(path.stem for path in PRESETS.glob("*.yaml") if demos or not path.stem.startswith("demo-"))
    if str(name).startswith("demo-") and not demos:
        raise ValueError(
            f"{str(name)!r} is what `ultralong demo --model {str(name).removeprefix('demo-')}` does, not one training "
            f"run. Presets: {', '.join(known)}."
        )
    if (found := PRESETS / f"{name}.yaml").is_file():
        return found
    hint = "".join(f"Did you mean {near!r}? " for near in difflib.get_close_matches(str(name), known, n=1))
    raise ValueError(f"{str(name)!r} is neither a settings file nor a preset. {hint}Presets: {', '.join(known)}.")

"""What is measured on a host of several GPUs, as commands of `ultralong bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MODEL = "meta-llama/Llama-3.1-8B"


@dataclass(frozen=True)
class HostBench:
    """What to measure on one host.

    Attributes:
        gpus: GPUs of the host; they share every row.
        out: Folder of the results.
        host_memory: GiB of host memory for each process.
        rehearse: The same commands in CPU processes, cut down in size: they show that the steps run.
        minutes: Most minutes of one step.
        only: Names of steps to run now; all when empty.
    """

    gpus: int
    out: Path
    host_memory: float = 32.0
    rehearse: bool = False
    minutes: float = 20.0
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.gpus < 2 or self.gpus & (self.gpus - 1):
            raise ValueError(f"gpus must be a power of two from 2 on, found {self.gpus}.")
        if self.minutes <= 0 or self.host_memory <= 0:
            raise ValueError(f"minutes and host_memory must be above 0, found {self.minutes} and {self.host_memory}.")
        unknown = [name for name in self.only if name not in commands(self)]
        if unknown:
            raise ValueError(f"There is no step {', '.join(unknown)}; there are {', '.join(commands(self))}.")


def commands(wanted: HostBench) -> dict[str, list[str]]:
    """Words behind `ultralong` of each step, by its name, in order.

    Args:
        wanted: What to measure.
    """
    training = ["bench", "train", "HuggingFaceTB/SmolLM2-135M" if wanted.rehearse else MODEL]
    training += ["--gpus", str(wanted.gpus), "--sharded", "--steps", "1"]
    if wanted.rehearse:
        # Attention's schemes and FSDP as on GPUs, in sizes that a CPU has done in a minute.
        lengths, training = ("512", "1024"), [*training, "--layers", "2"]
        training += ["--memory", "activation_checkpointing=true", "layer_tile=256", "loss_tile=128"]
        attention = ("512", "1024")
    else:
        lengths, attention = ("1048576", "4194304"), ("131072", "524288")
        training += ["--kernel", "flash4", "--fit", "--host-memory", f"{wanted.host_memory:g}"]
        training += ["--memory", "layer_tile=32768", "loss_tile=8192"]
    steps = {
        "train_1m": [*training, "--lengths", lengths[0]],
        "train_4m": [*training, "--lengths", lengths[1], "--state-precision", "8bit"],
    }
    ranks = wanted.gpus
    while ranks > 1:
        meshes = [f"{outer}x{ranks // outer}" for outer in (2, 4, 8) if outer < ranks]
        words = ["bench", "attention", "--ranks", str(ranks), "--lengths", *attention]
        words += ["--kernels", *(["auto"] if wanted.rehearse else ["flash4", "cudnn"])]
        words += ["--latency-length", "0", *(["--meshes", *meshes] if meshes else [])]
        steps[f"attention_{ranks}"] = words
        ranks //= 2
    return steps

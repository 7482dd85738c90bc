"""Functions of a training run: its config, its plan, the run, its scripts for a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ultralong.api.names import Changes, Named, StrPath, Words, as_overrides
from ultralong.utils.processes import without_collections
from ultralong.utils.units import Tokens

if TYPE_CHECKING:
    from pathlib import Path

    from ultralong.planner import Machine, Plan
    from ultralong.training import TrainResult
    from ultralong.training.config import TrainConfig
    from ultralong.training.sharing import SharingDecision


def load_config(config: TrainConfig | StrPath, changes: Changes = ()) -> TrainConfig:
    """Read a training config: a preset's name or a YAML file, with changes.

    >>> config = load_config("tiny-cpu", {"model": "long", "optimizer.lr": 1e-4, "length": 1024})
    >>> print(config.model, config.optimizer.lr, config.steps)
    long 0.0001 40

    Args:
        config: Name of a preset, YAML file, or a config to change.
        changes: New values by key, with dots for groups; or texts, such as "optimizer.lr=1e-5".

    Raises:
        ValueError: There is no such config, a key is unknown, or a value is of the wrong type.
    """
    from ultralong.training.config import TrainConfig, preset
    from ultralong.utils import settings

    wanted = as_overrides(changes)
    if not isinstance(config, TrainConfig):
        file = preset(config)
        try:
            return settings.load(TrainConfig, file, wanted)
        except settings.UnknownKey as error:
            raise ValueError(f"{error}{_other_kind(file)}") from error
    return settings.from_mapping(TrainConfig, settings.override(settings.to_mapping(config), wanted, TrainConfig))


def _other_kind(file: Path) -> str:
    """What a file is that is no training config, and which command takes it."""
    from ultralong.utils.text_formats import read_yaml

    found = read_yaml(file.read_text(encoding="utf-8"), settings=True)
    if "arms" in found:
        return f" It is a study: ultralong ablate {file} --dry-run plans the runs of all its arms."
    return f" It is a data recipe: ultralong pack {file} makes rows of it." if "sources" in found else ""


def plan(
    config: Annotated[TrainConfig | StrPath, Words(str)],
    gpus: int | None = None,
    changes: Changes = (),
    *,
    machine: Annotated[Machine | str, Words(str)] = "h200",
    tokens: Tokens | None = None,
    gpu_memory: float | None = None,
    host_memory: float | None = None,
    price: float | None = None,
    fit: bool = False,
) -> Plan:
    """Estimate memory, seconds, GPU-hours and cost of a training run before it starts. Needs no GPU.

    >>> made = plan("tiny-cpu", 1, {"model": "long", "parallel.context_parallel_size": 1}, tokens=1024)
    >>> made.fits
    True

    Args:
        config: Name of a preset, a YAML file, or a model. A model is planned as a run whose GPUs all share one row and
            the parameters.
        gpus: GPUs of the run; by default as many as share one row or the parameters, whichever is more.
        changes: Changes of the config, with dots for groups, such as parallel.context_parallel_size=8.
        machine: The GPU: h200, h100, a100, or a file that ultralong bench rates made on yours.
        tokens: Tokens of a row; by default those of the packed rows, or where there are none yet the config's length,
            or the model's window.
        gpu_memory: GiB of one GPU; by default the machine's.
        host_memory: GiB of host memory for one process.
        price: Price of one GPU-hour, in any currency.
        fit: Choose what is kept on the GPU, offloaded to the host and recomputed, and say what was chosen.

    Returns:
        The plan; `print` shows it as a table.

    Raises:
        ValueError: The model cannot be found, or the number of GPUs does not fit the config.
    """
    with without_collections():
        from ultralong.planner import is_model, run_of_model
        from ultralong.planner import plan as run

    asked = run_of_model(str(config), gpus or 1) if is_model(config) else config
    return run(
        load_config(asked, changes),
        gpus,
        machine=machine,
        tokens=tokens,
        gpu_memory=gpu_memory,
        host_memory=host_memory,
        price=price,
        fit=fit,
    )


def train(
    config: Annotated[TrainConfig | StrPath, Words(str)],
    changes: Changes = (),
    *,
    resume: bool = False,
    processes: int | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Train on packed rows: continued pretraining, or SFT (see `sft`).

    >>> settings = {"model": "long", "data": [{"rows": "rows"}], "out": "run", "length": 1024, "steps": 2}
    >>> result = train("tiny-cpu", settings | {"parallel.context_parallel_size": 1}, quiet=True)
    >>> print(result.model, result.steps, result.tokens)
    run/model 2 2048

    Args:
        config: Name of a preset, or a YAML file.
        changes: Changes of the config, with dots for groups, such as optimizer.lr=1e-5.
        resume: Resume from the newest checkpoint of the run's folder.
        processes: Start this many processes on this machine; without it the run uses this one, or torchrun's.
        quiet: No progress bar.

    Returns:
        The trained model's folder, steps, tokens, loss (nats per target) and seconds.

    Raises:
        ValueError: Settings that do not fit the rows, the model or the processes; or a run's folder in use.
        RuntimeError: A run of several processes failed; its own message is on standard error.
        FloatingPointError: The loss or the gradient became NaN or infinite.
    """
    return _train(load_config(config, changes), "train", resume, processes, quiet)


def sft(
    config: Annotated[TrainConfig | StrPath, Words(str)],
    changes: Changes = (),
    *,
    resume: bool = False,
    processes: int | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Train on the answers of conversations (supervised fine-tuning). Rows of documents are refused.

    >>> report = pack("talks.yaml", "run/model", length=256, out="chat", quiet=True)
    >>> settings = {"model": "run/model", "data": [{"rows": "chat"}], "out": "sft", "steps": 1, "length": 256}
    >>> sft("smollm2-135m-sft", settings | {"dtype": "float32"}, quiet=True).model
    'sft/model'

    Args:
        config: Name of a preset, or a YAML file.
        changes: Changes of the config, with dots for groups, such as optimizer.lr=1e-5.
        resume: Resume from the newest checkpoint of the run's folder.
        processes: Start this many processes on this machine; without it the run uses this one, or torchrun's.
        quiet: No progress bar.

    Returns:
        As `train`.

    Raises:
        ValueError: As in `train`; and rows that were not packed from conversations.
    """
    return _train(load_config(config, changes), "sft", resume, processes, quiet)


def render_launch(
    config: Annotated[TrainConfig | StrPath, Words(str)],
    nodes: int,
    gpus_per_node: int,
    out: StrPath,
    scheduler: Literal["torchrun", "slurm", "accelerate", "skypilot", "trainjob", "jobset"] = "torchrun",
    changes: Changes = (),
    overwrite: bool = False,
    site: Annotated[Sequence[str], Words(tuple[str, ...])] = (),
) -> list[Path]:
    """Write the scripts that start a run on several hosts and resume it after a host was lost.

    >>> files = render_launch("llama31-8b-4m", nodes=4, gpus_per_node=8, out="scripts", scheduler="slurm")
    >>> print(files[0].name)
    submit.sh

    Args:
        config: Name of a preset, or a YAML file.
        nodes: Hosts.
        gpus_per_node: GPUs of a host, one process each.
        out: Folder for the scripts.
        scheduler: What starts the processes.
        changes: Changes of the config, with dots for groups, such as parallel.context_parallel_size=8.
        overwrite: Replace scripts that are there.
        site: Facts of the site for a manifest, as NAME=VALUE; an error names those that are missing.

    Returns:
        The files; the first is the one to start.

    Raises:
        ValueError: The scheduler is unknown, the processes do not fit the config, or facts of the site are missing;
            the message names all of them.
    """
    from ultralong.launch import launch
    from ultralong.launch.manifests import named_values

    wanted = load_config(config, changes)
    return launch(wanted, nodes, gpus_per_node, scheduler, out, overwrite, named_values(site))


def ablate(
    study: Named,
    out: StrPath | None = None,
    changes: Changes = (),
    *,
    arms: Annotated[Sequence[str], Words(tuple[str, ...])] = (),
    dry_run: bool = False,
    machine: str = "h200",
    gpus: int | None = None,
    price: float | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Compare ways to extend a model: arms that differ from one base, on the same samples. A stopped call is resumed.

    >>> ablate("miniature", dry_run=True)["runs"][0]["arm"]
    'base'

    Args:
        study: Name of a study that ships, or a YAML file.
        out: Folder of the study; needed unless it is only priced. With `dry_run` what is done there costs nothing.
        changes: Changes of the study, with dots for groups, such as base.training.steps=10.
        arms: Arms to run now, beside the base; by default all.
        dry_run: Only say what the training will take, by ultralong plan.
        machine: With `dry_run`: the GPU, as ultralong plan takes it.
        gpus: With `dry_run`: GPUs of each run; by default as many as share one row.
        price: With `dry_run`: price of one GPU-hour, in any currency.
        device: Where evaluation runs: `auto`, `cpu` or `cuda`.
        quiet: No progress bars.

    Returns:
        The content of `results.json`: paired differences with 95% intervals by outcome and arm, and verdicts; with
        `dry_run` what `ultralong.ablation.price` returns.

    Raises:
        ValueError: The study is wrong; nothing was started then.
    """
    from ultralong import ablation

    wanted = ablation.load_study(study, as_overrides(changes))
    if dry_run:
        return ablation.price(wanted, machine=machine, gpus=gpus, cost=price, out=out)
    if out is None:
        raise ValueError("out is needed, the folder that the study is kept in (or dry_run, to price it).")
    return ablation.ablate(wanted, out, only=arms, device=device, quiet=quiet)


def _train(config: TrainConfig, command: str, resume: bool, processes: int | None, quiet: bool) -> TrainResult:
    answers = command == "sft"
    if processes is None:
        with without_collections():
            from ultralong.training.loop import train as run
        return run(config, resume, quiet, answers, partial(_decide, resume=resume, answers=answers))
    import tempfile
    from pathlib import Path

    from ultralong.launch.local import launch_local
    from ultralong.training import TrainResult
    from ultralong.utils import settings
    from ultralong.utils.files import read_json

    with tempfile.TemporaryDirectory() as scratch:
        settings.save(config, Path(scratch) / "config.yaml")
        launch_local(Path(scratch) / "config.yaml", processes, resume, quiet, command)
    result = read_json(Path(config.out) / "result.json")
    loss = float("nan") if result["loss"] is None else result["loss"]
    return TrainResult(result["model"], result["steps"], result["tokens"], loss, result["seconds"])


def _decide(config: TrainConfig, processes: int, resume: bool, answers: bool) -> SharingDecision:
    """How the rows of a run that starts here are shared, by the planner; on the run's main process."""
    import os

    from ultralong.planner import decide_sharing
    from ultralong.planner.machine import machine_here
    from ultralong.planner.traces import child

    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))  # torchrun's
    try:
        return decide_sharing(config, processes, machine=machine_here(), host_gpus=here, resume=resume, answers=answers)
    finally:
        child.stop()  # its memory is the run's from here on

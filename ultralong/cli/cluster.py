"""Commands for runs larger than this machine: what they take, and the scripts that start them."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from ultralong.cli.options import Group, takes
from ultralong.cli.shared import Json, leave, quoted

if TYPE_CHECKING:
    from ultralong.launch.rehearse import Rehearsal
    from ultralong.planner import Plan
    from ultralong.training.config import TrainConfig


@takes(work=Group("ultralong.api.runs:plan", positional=("config",), names={"changes": "set"}))
def plan(work: partial[Plan], *, json: Json = None) -> None:
    """Estimate memory, time, GPU-hours and cost of a run before anything starts.

    Each line says whether it rests on measured rates or is estimated. Needs no GPU and reads no weights. Where a run
    does not fit, the plan says what to change, with the figure that would result, and exits with 1. Where the config
    leaves to the planner how rows are shared (auto), the plan says what it chose and why.

    Examples:
      ultralong plan run.yaml --gpus 8 --gpu-memory 80 --price 2.5
      ultralong plan Qwen/Qwen3-30B-A3B --tokens 131072 --gpus 8
      ultralong plan meta-llama/Llama-3.1-8B --tokens 256k --gpu-memory 80 --set lora.rank=8 --fit

    Args:
        work: The function, with the run and the machine.
        json: Write the plan as JSON to this file.
    """
    made = work()
    leave(json, made.to_dict())
    print(made)
    if not made.fits:
        sys.exit(1)


def _tell_sharing(config: TrainConfig, nodes: int, gpus_per_node: int) -> None:
    """Say how rows will be shared, where the config leaves that to the run's start."""
    if not config.parallel.undecided:
        return
    from ultralong.planner import decide_sharing

    try:
        found = decide_sharing(config, nodes * gpus_per_node, host_gpus=gpus_per_node, planned=True)
        said = f"Planned from here: {found.reason}"
    except ValueError as error:
        said = f"It can't be planned from here: {error}"
    print(f"How rows are shared (auto) is decided when the run starts. {said}")


@takes(
    work=Group("ultralong.api.runs:render_launch", positional=("config",), names={"changes": "set"}),
)
def launch(work: partial[list[Path]], *, json: Json = None) -> None:
    r"""Write what starts a run on several hosts and resumes it: scripts or manifests.

    What the run needs is in the scripts; what the site has (interpreter, network, account) are required variables at
    their top. Each script takes --dry-run, which checks config, mesh, memory and files without a GPU.

    Scripts are for torchrun, Slurm and accelerate. A manifest starts the same script in a container on each host: a
    SkyPilot task, Kubeflow Trainer's TrainJob or a JobSet, with a Containerfile for the image, which installs the
    optional packages that the config asks for. It takes the site's facts from --site; an error names those that are
    missing.

    Examples:
      ultralong launch run.yaml --nodes 4 --gpus-per-node 8 --scheduler slurm --out scripts
      ultralong launch run.yaml --nodes 4 --gpus-per-node 8 --scheduler jobset --out scripts \
          --site image=ultralong:1 namespace=lab volume=data workdir=/data interface=eth0

    Args:
        work: The function, with the run and the hosts.
        json: Write the list of files as JSON to this file.
    """
    from ultralong.api import load_config
    from ultralong.launch.manifests import HOW
    from ultralong.training.save_pace import steps_between

    asked, out, scheduler = work.keywords, work.keywords["out"], work.keywords["scheduler"]
    files = work()
    leave(json, {"files": [str(file) for file in files]})
    if not load_config(asked["config"], asked["changes"]).save_every:
        every = steps_between(load_config(out / "config.yaml"))
        print(
            f"A checkpoint every {f'{every} steps' if every > 1 else 'step'}, and after each step that is longer than "
            "a stop waits (save_every: auto), so that a stop loses no more; --set save_every=N for another number."
        )
    _tell_sharing(load_config(out / "config.yaml"), asked["nodes"], asked["gpus_per_node"])
    wrote = f"Wrote {', '.join(file.name for file in files)} to {out}."
    if scheduler in HOW:
        print(f"{wrote} Next: build the image (the head of {out / 'Containerfile'} says how). Then, in {out}:")
        print(f"  {HOW[scheduler].removeprefix('In this folder: ')}")
    else:
        print(f"{wrote} Next: read the variables at the top of {files[0]}, then {quoted(files[0])} --dry-run")


@takes(
    work=Group(
        "ultralong.api.hosts:rehearse", positional=("config",), names={"changes": "set"}, defaults={"config": None}
    )
)
def rehearse(work: partial[Rehearsal], *, json: Json = None) -> None:
    """Simulate hosts on this machine: start the exported scripts, kill one host, and see the run resume.

    Without a config a tiny run is made and used. A config of yours must be small enough to run here, with one
    process for each host.

    Examples:
      ultralong launch rehearse --out rehearsal
      ultralong launch rehearse run.yaml --out rehearsal --lose 0

    Args:
        work: The function, with the run and the hosts.
        json: Write what was found as JSON to this file.
    """
    from ultralong.api import load_config

    found, out = work(), work.keywords["out"]
    leave(json, found.to_dict())
    run = load_config(out / "scripts" / "config.yaml").out
    print(
        f"Host {found.lost} was lost after step {found.before[-1]['step']}; the run resumed from step {found.saved}. "
        f"Steps computed again: {found.repeated}. Each of the {found.steps} steps is in {out / run / 'log.jsonl'} once."
    )


def runs(folder: Positional[Path] = Path("."), /, *, json: Json = None) -> None:
    """List training runs: how far each is, how fast, and what stopped it.

    Reads the runs' own folders and writes nothing, so it works beside running ones, on any host that sees the files.
    A run is running, finished, failed (with its error) or interrupted (told to stop, or killed). The newest of those
    that can be resumed is named with the command for it, on as many processes as it was on.

    Examples:
      ultralong runs
      ultralong runs /data/runs --json runs.json

    Args:
        folder: A run's folder, or one that holds such folders at any depth; by default the current one.
        json: Write the list as JSON to this file.
    """
    from ultralong.launch.runs import find_runs, resume_command, started_on, table

    found = find_runs(folder)
    leave(json, {"runs": [run.to_dict() for run in found]})
    if not found:
        print(
            f"No run in {folder.resolve()}. A run's folder is what its config calls `out`, and holds config.yaml and "
            "log.jsonl."
        )
        return
    print(table(found))
    waiting = [run for run in found if run.state in ("failed", "interrupted")]
    if waiting:
        folder = Path(waiting[0].folder)
        hosts = started_on(folder)[1]
        many = f", on {hosts} hosts, by the scripts that started it (ultralong launch); on one" if hosts > 1 else ""
        print(f"To resume one{many}: {resume_command(folder)}")

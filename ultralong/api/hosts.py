"""A launch rehearsed: several hosts simulated on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from ultralong.api.names import Changes, StrPath, Words
from ultralong.api.runs import load_config
from ultralong.utils.processes import without_collections

if TYPE_CHECKING:
    from ultralong.launch.rehearse import Rehearsal
    from ultralong.training.config import TrainConfig


def rehearse(
    config: Annotated[TrainConfig | StrPath | None, Words(str | None)],
    out: StrPath,
    *,
    hosts: int = 2,
    lose: int = 1,
    at_step: int = 0,
    changes: Changes = (),
) -> Rehearsal:
    """Simulate hosts on this machine: start the exported scripts, kill one host, and see the run resume.

    Args:
        config: Name of a preset, or a YAML file; its relative paths are relative to `out`. By default a tiny run.
        out: Folder for the scripts, the hosts' logs and the run.
        hosts: Hosts to simulate, one process each.
        lose: The host that is killed.
        at_step: Kill it when this step is logged; by default just after the first checkpoint.
        changes: Changes of the config, with dots for groups, such as save_every=10.

    Returns:
        What was found: see `ultralong.launch.rehearse.Rehearsal`. What happens is printed.

    Raises:
        ValueError: No such host, fewer than two, a step too late to lose anything, or a folder that holds a run.
        RuntimeError: The run did not come back, or its log has a gap.
    """
    from pathlib import Path

    with without_collections():
        from ultralong.launch.rehearse import rehearse as play
        from ultralong.launch.sample import sample_run
    from ultralong.utils import settings

    if config is None:
        config = Path(out) / "sample.yaml"
        settings.save(sample_run(Path(out)), config)
    return play(load_config(config, changes), out, hosts=hosts, lose=lose, at_step=at_step, say=print)

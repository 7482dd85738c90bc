"""One resolved config rendered to the files that start it: torchrun, Slurm, accelerate, SkyPilot, Kubernetes.

Values of the run are written into the scripts, quoted; facts of the site (interpreter, network, account) are required
variables on top of them and are never guessed. Manifests of clusters that start containers (`manifests`) wrap the same
script, and take such facts as options. Below its values every script consists of the files in `pieces/`, which
are plain bash and say why each setting is there. A script takes `--dry-run`, which checks without a GPU (`check`).

What is named here is loaded when it is first asked for: the agent that starts a host's ranks needs none of it, and so
begins seconds sooner.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ultralong.launch.dry_run import check as check
    from ultralong.launch.render import SCHEDULERS as SCHEDULERS
    from ultralong.launch.render import launch as launch
    from ultralong.training.preflight import Finding as Finding

_WHERE = {
    "SCHEDULERS": "ultralong.launch.render",
    "Finding": "ultralong.training.preflight",
    "check": "ultralong.launch.dry_run",
    "launch": "ultralong.launch.render",
}
__all__ = ["SCHEDULERS", "Finding", "check", "launch"]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value

"""One resolved config rendered to the files that start it: torchrun, Slurm, accelerate, SkyPilot, Kubernetes.

Values of the run are written into the scripts, quoted; facts of the site (interpreter, network, account) are required
variables on top of them and are never guessed. Manifests of clusters that start containers (`manifests`) wrap the same
script, and take such facts as options. Below its values every script consists of the files in `pieces/`, which
are plain bash and say why each setting is there. A script takes `--dry-run`, which checks without a GPU (`check`).
"""

from ultralong.launch.check import check
from ultralong.launch.render import SCHEDULERS, launch
from ultralong.training.preflight import Finding

__all__ = ["SCHEDULERS", "Finding", "check", "launch"]

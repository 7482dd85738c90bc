"""One resolved config rendered to the scripts that start it: torchrun, Slurm, accelerate.

Values of the run are written into the scripts, quoted; facts of the site (interpreter, network, account) are required
variables on top of them and are never guessed. Below its values every script consists of the files in `pieces/`, which
are plain bash and say why each setting is there. A script takes `--dry-run`, which checks without a GPU (`check`).
"""

from ultralong.launch.check import check
from ultralong.launch.render import SCHEDULERS, launch
from ultralong.training.preflight import Finding

__all__ = ["SCHEDULERS", "Finding", "check", "launch"]

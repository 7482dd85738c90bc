"""A Slurm of two hosts on this machine, with the real programs: munged, slurmctld and a slurmd for each host."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
# Names that the machine itself resolves to its loopback addresses: a job asks for the address of its first host.
HOSTS = ("127.1", "127.2")
SETTINGS = """
ClusterName=test
SlurmctldHost={name}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
GresTypes=gpu
ReturnToService=2
KillWait=30
MpiDefault=none
MinJobAge=600
NodeName={hosts[0]} NodeHostname={name} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=500 Gres=gpu:1
NodeName={hosts[1]} NodeHostname={name} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=500 Gres=gpu:1
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def installed() -> bool:
    """Whether Debian's slurm-wlm and munge, or their like, are here and can be started by this user."""
    return all(shutil.which(name, path=PATH) for name in PROGRAMS) and os.getuid() == 0


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start the cluster; yields the environment in which Slurm's commands reach it."""
    ports = _free_ports(3)
    (folder / "state").mkdir(parents=True)
    settings = SETTINGS.format(
        name=socket.gethostname(), ports=ports, folder=folder, user=getpass.getuser(), hosts=HOSTS
    )
    (folder / "slurm.conf").write_text(settings)
    (folder / "gres.conf").write_text("\n".join(f"NodeName={host} Name=gpu File=/dev/null" for host in HOSTS) + "\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    commands = [
        ["munged", "--foreground", "--force", *(f"--{key}={folder / name}" for key, name in MUNGE.items())],
        ["slurmctld", "-D", "-i"],
        *(["slurmd", "-D", "-N", host] for host in HOSTS),
    ]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}-{len(started)}.out", "wb") as log:
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(0.5)
        end = time.monotonic() + 60
        while _states(environment) != ["idle", "idle"]:
            if time.monotonic() > end:
                logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(folder.glob("*.log")))
                raise AssertionError(f"Slurm did not come up:\n{logs}")
            time.sleep(0.3)
        yield environment
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(30)


MUNGE = {
    "key-file": "munge.key",
    "socket": "munge.sock",
    "pid-file": "munge.pid",
    "log-file": "munge.log",
    "seed-file": "munge.seed",
}


def _states(environment: dict[str, str]) -> list[str]:
    command = ["sinfo", "--noheader", "--Node", "--format=%t"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.split()


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()

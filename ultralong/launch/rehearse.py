"""A rehearsal of a launch: every host played by an agent of this machine, one of them killed and started again.

What runs is the exported script itself, with the facts of this machine as the facts of the site. A host that loses
power is played by killing every process of its session at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ultralong.launch.render import launch, saving
from ultralong.training.config import TrainConfig
from ultralong.training.save_pace import steps_between
from ultralong.utils.local_ranks import held_port

POLL = 0.05  # seconds between two looks at the run's log


@dataclass(frozen=True)
class Event:
    """Something that happened to a host.

    Attributes:
        seconds: Since the first host was started.
        host: Its number.
        what: started, lost, started again, or finished.
    """

    seconds: float
    host: int
    what: str


@dataclass
class Rehearsal:
    """What a rehearsal found.

    Attributes:
        steps: Steps of the run.
        lost: Number of the host that was killed.
        before: Records of the run's log when the host was lost.
        after: Records at the end.
        saved: Step of the newest checkpoint when the host was lost.
        events: What happened, in order.
        seconds: The whole rehearsal.
        logs: What every host said, by its number.
    """

    steps: int
    lost: int
    before: list[dict[str, Any]] = field(default_factory=list)
    after: list[dict[str, Any]] = field(default_factory=list)
    saved: int = 0
    events: list[Event] = field(default_factory=list)
    seconds: float = 0.0
    logs: list[str] = field(default_factory=list)

    @property
    def repeated(self) -> int:
        """Steps that were computed a second time, as no checkpoint held them."""
        return self.before[-1]["step"] - self.saved

    def to_dict(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return asdict(self) | {"repeated": self.repeated}


def rehearse(
    config: TrainConfig,
    folder: str | os.PathLike[str],
    *,
    hosts: int = 2,
    lose: int = 1,
    at_step: int = 0,
    timeout: float = 900.0,
    say: Callable[[str], None] | None = None,
) -> Rehearsal:
    """Start a run on hosts that this machine plays, kill one in the middle, start it again, and wait for the end.

    Args:
        config: The run: small enough for one process a host on this machine. Relative paths are relative to `folder`.
        folder: Where the scripts go (`scripts`), what the hosts say (`host-0.log` and so on), and the run.
        hosts: Hosts, one process each.
        lose: The host that is killed.
        at_step: Kill it when this step is logged; 0 takes one after the first checkpoint.
        timeout: Seconds for the whole.
        say: Told what happens.

    Returns:
        What was found. The run is whole: every step once in its log.

    Raises:
        ValueError: No such host, fewer than two, a step too late to lose anything, a folder that holds a run, or a run
            that cannot start there.
        RuntimeError: The run did not come back, or its log has a gap; the message says where the hosts' logs are.
    """
    place, config = Path(folder).resolve(), saving(config)
    first = steps_between(config)
    at_step = at_step or first + 1
    if hosts < 2 or not 0 <= lose < hosts:
        raise ValueError(f"A rehearsal needs two hosts or more, and one of them to lose; found {hosts} and {lose}.")
    if not first <= at_step < config.steps:
        raise ValueError(
            f"The host would be lost at step {at_step}: choose one from {first} (the first checkpoint) to "
            f"{config.steps - 1}."
        )
    if _log(place, config).exists():
        raise ValueError(f"{place / config.out} holds a run already. Choose another folder.")
    launch(config, hosts, 1, "torchrun", place / "scripts")
    with held_port() as port:  # as host 0 takes it seconds from now, and again where it is the one that is lost
        stage = _Hosts(place, port, time.monotonic(), say or (lambda text: None))
        found = Rehearsal(config.steps, lose, events=stage.events)
        stage.check()
        try:
            _lose(stage, config, found, hosts, at_step, timeout)
        finally:
            stage.end()
    found.after, found.seconds = _records(place, config), round(time.monotonic() - stage.begun, 1)
    found.logs = [(place / f"host-{host}.log").read_text(errors="replace") for host in range(hosts)]
    codes = [process.returncode for _, process in sorted(stage.processes.items())]
    if any(codes) or [record["step"] for record in found.after] != list(range(1, config.steps + 1)):
        raise RuntimeError(
            f"The run did not come back whole: exit codes {codes}, {len(found.after)} of {config.steps} steps logged. "
            f"Read {place / 'host-0.log'} and its neighbours."
        )
    return found


def _lose(stage: _Hosts, config: TrainConfig, found: Rehearsal, hosts: int, at_step: int, timeout: float) -> None:
    """Start every host, kill one at a step and start it again, and wait until all have ended."""
    for host in range(hosts):
        stage.start(host, "started")
    stage.wait(lambda: _last_step(stage.folder, config) >= at_step, timeout)
    stage.kill(found.lost)
    found.before, found.saved = _records(stage.folder, config), _newest(stage.folder, config)
    if found.before[-1]["step"] >= config.steps:
        raise RuntimeError(f"The run ended before host {found.lost} was lost: give it more than {config.steps} steps.")
    stage.start(found.lost, "started again")
    stage.wait(stage.all_ended, timeout)


@dataclass
class _Hosts:
    """The played hosts and what happened to them."""

    folder: Path
    port: int
    begun: float
    say: Callable[[str], None]
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def note(self, host: int, what: str) -> None:
        event = Event(round(time.monotonic() - self.begun, 2), host, what)
        self.events.append(event)
        self.say(f"{event.seconds:6.1f} s  host {host} {what}")

    def facts(self, host: int) -> dict[str, str]:
        """This machine's facts, as the exported script asks for those of a site."""
        return {
            "PATH": os.environ.get("PATH", ""), "HOME": str(self.folder), "PYTHON": sys.executable,
            "WORKDIR": str(self.folder), "NODE_RANK": str(host), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port), "LOCAL_ADDR": "127.0.0.1", "NCCL_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1", "RESTART_DELAY": "1",
        }  # fmt: skip

    def check(self) -> None:
        """Refuse a run that cannot start: hosts would try it some times each, minutes in all, before they say so.

        Raises:
            ValueError: What the exported script's --dry-run found.
        """
        command = [str(self.folder / "scripts" / "run.sh"), "--dry-run"]
        done = subprocess.run(command, env=self.facts(0), capture_output=True, text=True, check=False)
        if done.returncode:
            lines = (done.stdout + done.stderr).splitlines()
            wrong = [line.removeprefix("WRONG ") for line in lines if line.startswith("WRONG ")] or lines[-1:]
            raise ValueError(
                f"The run cannot start in {self.folder}, to which the config's paths are relative. {' '.join(wrong)}"
            )

    def start(self, host: int, what: str) -> None:
        """Start the exported script as one host, at the head of a session of its own."""
        with open(self.folder / f"host-{host}.log", "ab") as log:
            self.processes[host] = subprocess.Popen(
                [self.folder / "scripts" / "run.sh"],
                env=self.facts(host),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.note(host, what)

    def kill(self, host: int, what: str = "lost") -> None:
        """What a host that loses power does: every process of it is gone at once."""
        process = self.processes[host]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # at once; then what left the group and is in the session still
        listed = subprocess.run(["ps", "-e", "-o", "pid=,sess="], capture_output=True, text=True, check=True).stdout
        for pid, session in (line.split() for line in listed.splitlines()):
            if int(session) == process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        process.wait()
        self.note(host, what)

    def wait(self, condition: Callable[[], bool], timeout: float) -> None:
        while not condition():
            if time.monotonic() - self.begun > timeout:
                raise RuntimeError(f"Waited {timeout:.0f} s for the run. Read {self.folder / 'host-0.log'}.")
            if self.processes and all(process.poll() not in (None, 0) for process in self.processes.values()):
                raise RuntimeError(f"All hosts stopped. Read {self.folder / 'host-0.log'} and its neighbours.")
            time.sleep(POLL)

    def all_ended(self) -> bool:
        """Whether all hosts ended; notes each the first time it is seen."""
        done = {event.host for event in self.events if event.what == "finished"}
        for host, process in self.processes.items():
            if process.poll() is not None and host not in done:
                self.note(host, "finished")
        return all(process.poll() is not None for process in self.processes.values())

    def end(self) -> None:
        """Leave no process behind."""
        for host, process in self.processes.items():
            if process.poll() is None:
                self.kill(host, "stopped")


def _log(place: Path, config: TrainConfig) -> Path:
    return place / config.out / "log.jsonl"


def _records(place: Path, config: TrainConfig) -> list[dict[str, Any]]:
    path = _log(place, config)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # the last line may be half written
            break
    return found


def _last_step(place: Path, config: TrainConfig) -> int:
    records = _records(place, config)
    return int(records[-1]["step"]) if records else 0


def _newest(place: Path, config: TrainConfig) -> int:
    steps = [int(path.name.partition("-")[2]) for path in (place / config.out / "checkpoints").glob("step-*[0-9]")]
    return max(steps, default=0)

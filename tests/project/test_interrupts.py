"""Ctrl-C at any time of a command, its imports included: exit code 130, one line, no traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PLAN = ("plan", "llama31-8b-1m-2gpu")
ROOT = Path(__file__).parents[2]
# Imported one after the other: by the command line, by the command, by what it calls.
MOMENTS = (
    "yaml",
    "ultralong.utils.files",
    "tyro",
    "ultralong.cli.table",
    "numpy",
    "torch._C",
    "torch.nn",
    "transformers",
)
WAYS = {
    "module": ("-m", "ultralong"),
    "program": ("-c", "from {0} import {1}; {1}()"),  # what pip makes of [project.scripts]
}


def program() -> tuple[str, str]:
    """Module and function of the console script."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"]["ultralong"].partition(":")
    return module, function


def interrupted(moment: str, *words: str, way: str = "module", ignored: bool = False) -> tuple[int, list[str]]:
    """Exit code and standard error of a command that gets a Ctrl-C as soon as it has imported a module."""
    start = [word.format(*program()) for word in WAYS[way]]
    command = [sys.executable, "-X", "importtime", *start, *words]
    kind = signal.SIG_IGN if ignored else signal.SIG_DFL  # whatever started the tests
    said, sent = [], False
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, kind),
    ) as process:
        for line in process.stderr:
            if not line.startswith("import time:"):
                said.append(line.rstrip())
            elif not sent and line.rpartition("|")[2].strip() == moment:
                process.send_signal(signal.SIGINT)
                sent = True
    assert sent, f"{moment} was not imported: {said}"
    return process.returncode, said


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_while_a_command_is_imported(moment):
    code, said = interrupted(moment, *PLAN)
    assert said in (["ultralong: stopped."], ["ultralong plan: stopped."])
    assert code == 130


def test_the_program_is_the_module():
    assert interrupted("yaml", *PLAN, way="program") == (130, ["ultralong: stopped."])


def test_an_ignored_ctrl_c_stays_ignored():
    """Of a command in the background, or under nohup."""
    assert interrupted("yaml", "--version", ignored=True) == (0, [])


WORK = """
import sys
import signal
from ultralong.cli.errors import guarded
signal.signal(signal.SIGINT, signal.default_int_handler)
def work():
    {work}
guarded("plan", work, own=True)
"""
LOST = """try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        pass
    raise ImportError('no X')"""


@pytest.mark.parametrize(
    "work", ["exec('raise KeyboardInterrupt')", LOST], ids=["through an exec", "lost by an import"]
)
def test_wherever_it_comes_the_exit_code_is_the_same(work):
    done = subprocess.run([sys.executable, "-c", WORK.format(work=work)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "ultralong plan: stopped.\n")

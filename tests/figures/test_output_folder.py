"""A notebook's folder: kept where `OUT` names it, and otherwise gone with the kernel, however the kernel ends."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jupyter_client
import papermill
import pytest

from tests.support.leftovers import LONGEST, left_at_last, left_in
from ultralong.notebook_tools import output_folder
from ultralong.notebook_tools.output import PREFIX
from ultralong.notebook_tools.run import execute, parameter_names

MAKES = """\
from ultralong.notebook_tools import output_folder
folder = output_folder(OUT)
(folder / "deep").mkdir(exist_ok=True)
(folder / "deep" / "weights.bin").write_bytes(bytes(1 << 20))
"""
SOURCE = f"""\
# %% tags=["parameters"]
OUT: str = ""  # folder for what is made
INTERACTIVE: bool = True  # read by the rules

# %%
{MAKES}
# %%
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The temporary folder of every process that a test starts."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def gone(folder: Path) -> bool:
    """Whether a folder is removed within the time that a removal without the kernel may take."""
    until = time.monotonic() + LONGEST
    while folder.exists() and time.monotonic() < until:
        time.sleep(0.05)
    return not folder.exists()


@pytest.fixture
def kernel(temporary):
    """A kernel in which `OUT` is empty and a folder was made: its manager, its client, the folder."""
    manager, client = jupyter_client.manager.start_new_kernel(kernel_name="python3", startup_timeout=LONGEST)
    try:
        run(client, 'OUT = ""\n' + MAKES)
        (made,) = temporary.glob(f"{PREFIX}*")
        yield manager, client, made
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def run(client, code: str) -> None:
    """Run one cell to its end."""
    assert client.execute_interactive(code, timeout=LONGEST, output_hook=lambda _: None)["content"]["status"] == "ok"


def test_a_run_under_papermill_leaves_nothing(temporary, tmp_path):
    """The cell says where the files are; in a notebook that is kept the name, new in each run, is not told."""
    path = tmp_path / "01_one.py"
    path.write_text(SOURCE + 'assert (folder / "deep" / "weights.bin").exists()\n')
    assert parameter_names(path) == ["OUT", "INTERACTIVE"]
    notebook = execute(path, {}, timeout=LONGEST, keep=tmp_path / "as_it_ran.ipynb")
    assert left_at_last(temporary) == []
    said = notebook.cells[1].outputs[0].text
    assert said == (
        "Files go to a temporary folder, which is removed when the kernel ends; name a folder in OUT to keep them.\n"
    )
    assert re.search(rf"Files go to {temporary}/{PREFIX}\w+, which", (tmp_path / "as_it_ran.ipynb").read_text())


def test_a_cell_that_raises_leaves_nothing(temporary, tmp_path):
    path = tmp_path / "01_one.py"
    path.write_text(SOURCE + 'raise ValueError("lost")\n')
    with pytest.raises(papermill.PapermillExecutionError, match="lost"):
        execute(path, {}, timeout=LONGEST)
    assert left_at_last(temporary) == []


def test_a_kernel_that_is_shut_down_takes_its_folder_along(kernel, temporary):
    manager, client, made = kernel
    assert (made / "deep" / "weights.bin").exists()
    client.stop_channels()
    manager.shutdown_kernel()
    assert left_at_last(temporary) == []


def test_a_cell_that_is_run_again_replaces_its_folder(kernel, temporary):
    _, client, made = kernel
    run(client, MAKES)
    (second,) = temporary.glob(f"{PREFIX}*")
    assert second != made
    run(client, f'folder = output_folder("{temporary / "mine"}")')
    assert left_in(temporary) == ["mine"]


def test_an_interrupted_cell_keeps_the_folder_until_the_end(kernel, temporary):
    """Jupyter's interrupt goes to the kernel's whole group of processes."""
    manager, client, _ = kernel
    client.execute("import time; print('asleep'); time.sleep(600)", stop_on_error=False)
    # What the cell itself says: an interrupt before it has begun is the kernel's, and the cell never ends.
    while client.get_iopub_msg(timeout=LONGEST)["msg_type"] != "stream":
        pass
    manager.interrupt_kernel()
    assert client.get_shell_msg(timeout=LONGEST)["content"]["ename"] == "KeyboardInterrupt"
    run(client, 'assert (folder / "deep" / "weights.bin").exists()')
    client.stop_channels()
    manager.shutdown_kernel()
    assert left_at_last(temporary) == []


def test_a_killed_kernel_takes_its_folder_along_once_its_forks_have_ended(kernel):
    """As when the host runs out of memory, or when a kernel is shut down in the middle of a long cell."""
    _, client, made = kernel
    run(
        client,
        "import multiprocessing, os, signal, time\n"
        "fork = multiprocessing.get_context('fork').Process(target=time.sleep, args=(600,))\n"
        "fork.start()\n"
        "(folder / 'ids').write_text(f'{os.getpid()} {fork.pid}')",
    )
    parent, fork = map(int, (made / "ids").read_text().split())
    os.kill(parent, signal.SIGKILL)
    time.sleep(1)
    assert made.exists(), "a fork of the kernel may still write there"
    os.kill(fork, signal.SIGKILL)
    assert gone(made)


def test_a_named_folder_is_kept_and_said(tmp_path, temporary, capsys):
    """Also where it is not there yet; a second notebook may use it."""
    place = tmp_path / "made" / "02"
    program = f"from ultralong.notebook_tools import output_folder; (output_folder({str(place)!r}) / 'a').touch()"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (place / "a").exists()
    assert output_folder(str(place)) == place
    assert capsys.readouterr().out == f"Files go to {place}.\n"
    with pytest.raises(ValueError, match="a is a file, and a folder is needed there"):
        output_folder(str(place / "a"))
    assert left_at_last(temporary) == []

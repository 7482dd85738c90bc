"""Progress bars in a log, of other libraries, and in processes that were forked: one that is killed stops no other."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import IPython
import pytest
from ipykernel.zmqshell import ZMQInteractiveShell
from IPython.core.interactiveshell import InteractiveShell
from tqdm.auto import tqdm
from transformers.utils import logging

from ultralong.utils import progress as module
from ultralong.utils.progress import hidden_bars, library_bars, progress

FORK = multiprocessing.get_context("fork")
SECONDS = 6  # for what takes none, and without the lock of its own would take for ever


class Kept(tqdm):
    """A bar of another package, which took a lock for itself."""

    _lock = tqdm.get_lock()


def draw(done, kind=progress):
    for _ in kind(range(3), disable=True) if kind is Kept else kind(range(3), quiet=True):
        pass
    done.set()


def killed_while_it_draws(kind):
    kind.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind", [tqdm, Kept])
def test_a_process_that_is_killed_while_it_draws_leaves_the_others_free(kind):
    killed = FORK.Process(target=killed_while_it_draws, args=(kind,))
    killed.start()
    killed.join(SECONDS)
    assert killed.exitcode == -signal.SIGKILL
    done = threading.Event()
    threading.Thread(target=draw, args=(done, progress if kind is tqdm else Kept), daemon=True).start()
    assert done.wait(SECONDS), "this process waits for the one that was killed"


@pytest.mark.parametrize("kind", [tqdm, Kept])
def test_a_process_forked_while_a_thread_draws_draws_too(kind):
    taken, may_leave, done = threading.Event(), threading.Event(), FORK.Event()

    def hold():
        with kind.get_lock():
            taken.set()
            may_leave.wait()

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    taken.wait()
    forked = FORK.Process(target=draw, args=(done, progress if kind is tqdm else Kept), daemon=True)
    forked.start()
    try:
        assert done.wait(SECONDS), "the forked process waits for a thread that it does not have"
    finally:
        forked.kill()
        forked.join()
        may_leave.set()
        thread.join()


def drawn(capsys, kind):
    for _ in kind(range(3), desc="Loading weights"):
        pass
    return capsys.readouterr().err


def test_a_log_gets_no_bar_of_what_takes_a_moment(capsys, monkeypatch):
    assert drawn(capsys, progress) == ""
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES_IN_A_LOG", 0.0)
    assert "3/3" in drawn(capsys, progress)


def test_bars_of_transformers_are_ours_and_hidden_where_ours_are(capsys, monkeypatch):
    assert "Loading weights: 100%" in drawn(capsys, logging.tqdm), "by itself it draws in a log too"
    with library_bars():
        assert drawn(capsys, logging.tqdm) == ""
        monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES_IN_A_LOG", 0.0)
        assert "loading weights: 100%" in drawn(capsys, logging.tqdm)
        with hidden_bars(False):
            assert drawn(capsys, logging.tqdm)
        with hidden_bars():
            assert drawn(capsys, logging.tqdm) == drawn(capsys, progress) == ""
    assert "Loading weights: 100%" in drawn(capsys, logging.tqdm)


def test_a_bar_made_in_a_thread_is_hidden_too():
    def disabled():
        with progress() as bar:
            return bar.disable

    with ThreadPoolExecutor(1) as thread:
        with hidden_bars(), hidden_bars(False), hidden_bars():
            assert thread.submit(disabled).result()
        with hidden_bars():
            with hidden_bars():
                pass
            assert thread.submit(disabled).result()
        assert not thread.submit(disabled).result()


@pytest.mark.parametrize(("shell", "notebook"), [(None, False), (InteractiveShell, False), (ZMQInteractiveShell, True)])
def test_a_notebook_is_told_by_the_kernel_that_runs_it(monkeypatch, shell, notebook):
    """Not by ipykernel's modules, which this test has imported, nor by IPython, which has a terminal too."""
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell and object.__new__(shell))
    with progress() as bar:
        assert (bar.delay == 0.0) == notebook

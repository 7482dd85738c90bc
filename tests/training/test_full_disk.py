"""A full disk ends a run with one line that says so, whatever the library that met it makes of it."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys

import pytest
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_run import make_run
from torch import equal

from ultralong.cli.errors import mendable
from ultralong.training.loop import train
from ultralong.training.watch.full_disk import full_disk_named
from ultralong.utils import settings
from ultralong.utils.files import FULL, locked, write_json, write_text

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from ultralong.cli import main
main(["train", "run.yaml", "--quiet", *sys.argv[1:]])
"""


def test_a_run_that_cannot_write_says_so_and_resumes(tmp_path, tiny_model, tiny_tokenizer, monkeypatch, python):
    """No file may grow beyond a limit, as at the end of a disk: the first checkpoint is what does not fit."""
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path, tiny_model, tiny_tokenizer, save_every=1)
    settings.save(run, "run.yaml")
    words = [python, "-c", LIMITED.format(limit=200_000)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    said = ended.stderr.splitlines()[-1]
    assert said.startswith("ultralong train: error: run: ")
    assert "free some space, or set `keep` lower, then run again with --resume" in said
    assert not list((tmp_path / "run").rglob("*.partial"))
    train(run, resume=True, quiet=True)
    whole = make_run(tmp_path, tiny_model, tiny_tokenizer, save_every=1, out="whole")
    train(whole, quiet=True)
    first, second = (load_file(f"{out}/model/model.safetensors") for out in ("run", "whole"))
    assert all(equal(first[name], second[name]) for name in second)


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    error.__context__ = cause
    return error


NO_SPACE = OSError(errno.ENOSPC, "No space left on device", "file")


@pytest.mark.parametrize(
    "error",
    [
        NO_SPACE,
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        raised(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), NO_SPACE),
        raised(ValueError("while writing"), raised(RuntimeError("stream"), NO_SPACE)),
        dcp.CheckpointException("failed", {1: (raised(RuntimeError("pos"), NO_SPACE), None)}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_found_behind_what_was_made_of_it(tmp_path, error):
    with pytest.raises(OSError, match=r"(No space left|quota exceeded).*; do this") as caught, \
            full_disk_named(tmp_path, "do this"):  # fmt: skip
        raise error
    assert mendable(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("error", [SafetensorError("I/O error"), RuntimeError("failed"), KeyboardInterrupt()], ids=repr)
def test_another_error_is_raised_as_it_is(tmp_path, error):
    with pytest.raises(type(error)) as caught, full_disk_named(tmp_path / "not there", "do this"):
        raise error
    assert caught.value is error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", sorted(FULL))
@pytest.mark.parametrize("write", [lambda path: write_text(path, "x"), lambda path: write_json(path, {})])
def test_a_full_disk_has_a_place_whoever_writes(tmp_path, monkeypatch, number, write):
    """A failed write knows no name: `a file: No space left on device` helps nobody."""

    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=re.escape(str(tmp_path / "out"))), locked(tmp_path / "out"):
        full()
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"file\.json"):
        write(tmp_path / "file.json")
    assert not (tmp_path / "file.json").exists()


def test_an_error_without_its_reason_is_asked_of_the_disk(tmp_path):
    """safetensors tells a full disk in its own words; a file that cannot be written shows it."""
    script = f"""
import resource
from safetensors import SafetensorError
from ultralong.training.watch.full_disk import full_disk_named
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with full_disk_named({str(tmp_path)!r}, "do this"):
        raise SafetensorError("I/O error")
except OSError as error:
    print(error.errno, error.filename)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said == f"{errno.EFBIG} {tmp_path}\n"
    assert not list(tmp_path.iterdir())
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000

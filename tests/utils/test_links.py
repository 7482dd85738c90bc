"""Links at the names under which something is written: what they point to is somebody's file, and stays as it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ultralong import miniature
from ultralong.checkpoints.extend import extend
from ultralong.utils.files import append_jsonl, file_lock, locked, write_json


@pytest.fixture
def precious(tmp_path) -> Path:
    """A folder of somebody else with a file in it."""
    folder = tmp_path / "precious"
    (folder / "more").mkdir(parents=True)
    (folder / "key").write_text("mine")
    return folder


@pytest.mark.parametrize("there", [True, False])
def test_a_log_is_not_appended_to_through_a_link(tmp_path, precious, there):
    target = precious / ("key" if there else "new")
    (tmp_path / "log.jsonl").symlink_to(target)
    with pytest.raises(ValueError, match=r"log\.jsonl is a link"):
        append_jsonl(tmp_path / "log.jsonl", {"step": 1})
    assert {path.name for path in precious.iterdir()} == {"key", "more"}
    assert (precious / "key").read_text() == "mine"


def test_a_whole_file_replaces_the_link_and_not_what_it_points_to(tmp_path, precious):
    (tmp_path / "report.json").symlink_to(precious / "key")
    write_json(tmp_path / "report.json", {})
    assert not (tmp_path / "report.json").is_symlink()
    assert (precious / "key").read_text() == "mine"


@pytest.mark.parametrize("hold", [locked, lambda folder: file_lock(folder / ".lock", "busy")])
def test_a_lock_is_not_opened_through_a_link(tmp_path, precious, hold):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(precious / "key")
    with pytest.raises(ValueError, match=r"\.lock is a link"), hold(tmp_path / "run"):
        pass
    assert (precious / "key").read_text() == "mine"


def test_a_checkpoints_unfinished_folder_is_not_cleared_through_a_link(tmp_path, precious):
    """The name beside the target is known to whoever may write there, and everything in it is removed."""
    (tmp_path / ".out.partial").symlink_to(precious)
    with pytest.raises(ValueError, match=r"\.out\.partial is a link"):
        extend(miniature.path(), 1024, tmp_path / "out", quiet=True)
    assert (precious / "key").read_text() == "mine"
    assert (tmp_path / ".out.partial").is_symlink()
    assert not (tmp_path / "out").exists()


def test_a_link_inside_an_unfinished_folder_is_removed_and_not_followed(tmp_path, precious):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model").symlink_to(precious)
    (tmp_path / ".out.partial" / "config.json").symlink_to(precious / "key")
    extend(miniature.path(), 1024, tmp_path / "out", quiet=True)
    assert (precious / "key").read_text() == "mine"
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert not os.path.lexists(tmp_path / ".out.partial")

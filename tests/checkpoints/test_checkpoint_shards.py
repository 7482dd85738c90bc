"""Shards of a checkpoint: what torch's own reader finds in them, their hashes, and a write that fails."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, filesystem

from ultralong.checkpoints.saving import shards
from ultralong.utils.files import sha256
from ultralong.utils.units import GIB


@pytest.fixture
def state(monkeypatch):
    """Tensors of several types and sizes, a part of a larger one, one without elements, and numbers."""
    monkeypatch.setattr(shards, "SMALLEST_FILE", 1 << 14)
    monkeypatch.setattr(shards, "MOST_FILES", 3)
    monkeypatch.setattr(shards.os, "sched_getaffinity", lambda _: range(16))
    torch.manual_seed(0)
    whole = torch.randn(300, 70)
    return {
        "a": whole,
        "part": torch.randn(64, 96)[10:20, ::3],
        "codes": torch.randint(0, 255, (40_000,), dtype=torch.uint8),
        "bf16": torch.randn(5000).bfloat16(),
        "none": torch.empty(0, 4),
        "step": torch.tensor(7.0),
        "numbers": {"lr": 0.1, "betas": (0.9, 0.99), "name": "x"},
    }


def saved(state, folder):
    writer = shards.ShardWriter(folder)
    dcp.save(state, storage_writer=writer, no_dist=True)
    return writer


def loaded(state, folder):
    empty = {name: torch.zeros_like(x) if isinstance(x, torch.Tensor) else None for name, x in state.items()}
    empty["numbers"] = dict.fromkeys(state["numbers"])
    dcp.load(empty, storage_reader=FileSystemReader(folder), no_dist=True)
    return empty


def test_torch_reads_what_was_written_into_several_files(state, tmp_path):
    writer = saved(state, tmp_path)
    assert sorted(writer.files) == ["__0_0.distcp", "__0_1.distcp", "__0_2.distcp"]
    assert {file.name for file in tmp_path.iterdir()} == {*writer.files, ".metadata"}
    found = loaded(state, tmp_path)
    assert found["numbers"] == state["numbers"]
    assert all(torch.equal(found[name], x) for name, x in state.items() if name != "numbers")


@pytest.mark.parametrize("piece", [1000, shards.PIECE])
def test_a_file_has_the_hash_and_the_size_that_were_told(state, tmp_path, piece, monkeypatch):
    monkeypatch.setattr(shards, "PIECE", piece)
    for name, facts in saved(state, tmp_path).files.items():
        assert (facts.sha256, facts.bytes) == (sha256(tmp_path / name), (tmp_path / name).stat().st_size)
        assert facts.hash_seconds + facts.write_seconds + facts.sync_seconds <= facts.seconds


def test_the_files_are_of_the_kind_that_torch_writes(state, tmp_path):
    """One process, one file: the same entries of the same bytes, in another order."""
    (tmp_path / "own").mkdir()
    state = {"a": state["a"], "codes": state["codes"]}
    (tmp_path / "torch").mkdir()
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "torch"), no_dist=True)
    saved(state, tmp_path / "own")
    entries = []
    for place in (tmp_path / "own", tmp_path / "torch"):
        read = FileSystemReader(place).read_metadata().storage_data
        parts = {
            index.fqn: (place / item.relative_path).read_bytes()[item.offset : item.offset + item.length]
            for index, item in read.items()
        }
        entries.append(parts)
    assert entries[0] == entries[1]


@pytest.mark.parametrize("which", [0, 2])
def test_a_file_that_cannot_be_written_fails_the_save(state, tmp_path, which, monkeypatch):
    """Also one of those that other threads write, whose entries would be missing without a word."""
    write = shards.HashedStream.write

    def full(self, data):
        if self._file.raw.name.name == f"__0_{which}.distcp":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(shards.HashedStream, "write", full)
    with pytest.raises(dcp.CheckpointException) as caught:
        saved(state, tmp_path)
    assert not (tmp_path / ".metadata").exists()
    causes, error = [], caught.value.failures[0][0]
    while error is not None:
        causes.append(error)
        error = error.__cause__ or error.__context__
    assert errno.ENOSPC in [getattr(cause, "errno", None) for cause in causes]


def test_the_disk_is_given_work_while_a_file_is_written(state, tmp_path, monkeypatch):
    synced: list[int] = []
    monkeypatch.setattr(shards, "UNSYNCED", 20_000)
    monkeypatch.setattr(shards, "PIECE", 10_000)
    sync = shards.HashedStream._sync

    def noted(self):
        sync(self)
        synced.append(os.fstat(self._file.fileno()).st_size)

    monkeypatch.setattr(shards.HashedStream, "_sync", noted)
    files = saved(state, tmp_path).files
    sizes = sorted(file.bytes for file in files.values())
    assert set(sizes) < set(synced)  # at each file's end
    assert len(synced) >= sum(size // 30_000 for size in sizes) + len(files)  # and on its way


def test_a_gpu_that_trains_is_not_waited_for(state, tmp_path, monkeypatch):
    """torch's writer synchronises with the GPU's stream for tensors that lie on the host, if there is a GPU."""

    def waits(*given, **more):
        raise AssertionError("the stream is waited for")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", waits)
    with pytest.raises(dcp.CheckpointException, match="the stream is waited for"):
        dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "torch"), no_dist=True)
    saved(state, tmp_path / "own")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_copies_are_written_while_the_gpu_is_busy(state, tmp_path):
    saved(state, tmp_path / "warm")
    torch.cuda._sleep(int(2e10))  # cycles: ten seconds of the training's stream
    busy = torch.cuda.Event()
    busy.record()
    saved(state, tmp_path / "beside")
    assert not busy.query()
    torch.cuda.synchronize()
    assert loaded(state, tmp_path / "beside")["numbers"] == state["numbers"]


def item(size: int | None) -> SimpleNamespace:
    data = size and SimpleNamespace(
        chunk=SimpleNamespace(sizes=torch.Size([size // 4])), properties=SimpleNamespace(dtype=torch.float32)
    )
    return SimpleNamespace(tensor_data=data)


def test_files_are_of_about_one_size_and_no_more_than_are_worth_it():
    sizes = [GIB, *[GIB // 4] * 9, *[4096] * 100]
    files = shards.share_out([item(size) for size in sizes] + [item(None)], most=4)
    filled = [sum(shards._bytes(each) for each in file) for file in files]
    assert sum(filled) == sum(sizes)
    assert max(filled) - min(filled) <= GIB // 4 + 400 * 1024
    assert len(shards.share_out([item(4096), item(None)], most=4)) == 1
    assert len(shards.share_out([item(4 * shards.SMALLEST_FILE)] * 2, most=1)) == 1
    assert shards.share_out([]) == []


def test_processes_of_one_host_share_its_cores(monkeypatch):
    many = [item(shards.SMALLEST_FILE)] * 16
    monkeypatch.setattr(shards.os, "sched_getaffinity", lambda _: range(6))
    assert len(shards.share_out(many)) == shards.MOST_FILES
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert len(shards.share_out(many)) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert len(shards.share_out(many)) == 1

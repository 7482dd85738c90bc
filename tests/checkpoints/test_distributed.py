"""A run's checkpoint that was changed, or that somebody else wrote: refused, and no code of it runs."""

from __future__ import annotations

import functools
import os
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ultralong.checkpoints.distributed import StatePlanner, StateReader, changed_file, hash_own_files, recorded_files
from ultralong.training import checkpoint
from ultralong.utils.files import read_json, sha256, write_json
from ultralong.utils.local_ranks import run_ranks

ALONE = SimpleNamespace(
    accelerator=SimpleNamespace(num_processes=1, process_index=0), is_main=True, barrier=lambda: None
)


def network():
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(64)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def saved(tmp_path):
    folder = checkpoint.RunFolder(tmp_path / "run")
    checkpoint.save(folder, ALONE, *network(), 1, 2)
    return folder.checkpoint(1)


def flip(pattern: str, place: float):
    def change(folder: Path) -> None:
        victim = next(folder.glob(pattern))
        content = bytearray(victim.read_bytes())
        content[int(len(content) * place)] ^= 0x40
        victim.write_bytes(content)

    return change


def shorten(folder: Path) -> None:
    victim = next(folder.glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1])


def test_what_was_saved_is_loaded(saved):
    model, optimizer = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = optimizer.state[model.weight]["exp_avg"].clone()
    with torch.no_grad():
        model.weight.zero_()
    optimizer.state[model.weight]["exp_avg"].zero_()
    assert checkpoint.restore(saved, ALONE, model, optimizer) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], moments)
    assert sorted(recorded_files(saved)) == [".metadata", "__0_0.distcp", "random-0.safetensors"]
    assert not list(saved.glob("hashes-*"))


@pytest.mark.parametrize(
    "change",
    [
        flip("*.distcp", 0.3),
        flip("*.distcp", 0.9),
        flip(".metadata", 0.5),
        flip("random-0.safetensors", 0.9),
        shorten,
        lambda folder: next(folder.glob("random-*")).unlink(),
    ],
)
def test_a_changed_file_is_refused_and_nothing_is_loaded(saved, change):
    change(saved)
    model, optimizer = network()
    before = model.weight.clone()
    with pytest.raises(ValueError, match=r"step-0000001 is damaged: .*Remove that folder"):
        checkpoint.restore(saved, ALONE, model, optimizer)
    assert torch.equal(model.weight, before)


def test_a_checkpoint_without_hashes_is_loaded(saved):
    """As versions before 0.4 wrote it."""
    state = read_json(saved / "state.json")
    del state["files"]
    write_json(saved / "state.json", state)
    flip("*.distcp", 0.9)(saved)  # which nobody can tell
    assert changed_file(saved) is None
    assert checkpoint.restore(saved, ALONE, *network()) == 1


@pytest.mark.parametrize("files", [[], "x", {"../state.json": {"bytes": 1, "sha256": ""}}, {"a": {}}, {"a": 1}])
def test_a_record_of_the_wrong_shape_is_none(saved, files):
    write_json(saved / "state.json", read_json(saved / "state.json") | {"files": files})
    assert changed_file(saved) is None


@pytest.mark.parametrize("wrong", [{"step": 0}, {"step": True}, {"step": -1}, {"step": 10**30}, {"processes": 0}])
def test_a_state_that_is_not_of_its_folder_is_refused(saved, wrong):
    """It would be resumed from the wrong step, without a word."""
    write_json(saved / "state.json", read_json(saved / "state.json") | wrong)
    with pytest.raises(ValueError, match=r"step-0000001 is damaged: state\.json (is of|lacks)"):
        checkpoint.restore(saved, ALONE, *network())


def _shares(rank: int, world: int, folder: Path) -> str | None:
    processes = SimpleNamespace(accelerator=SimpleNamespace(num_processes=world, process_index=rank))
    return checkpoint._changed(folder, processes)


def test_all_processes_hear_of_a_changed_file(saved):
    flip("random-0.safetensors", 0.9)(saved)
    answers = run_ranks(_shares, 2, saved)
    assert answers == ["random-0.safetensors is not what was written (its hash differs)"] * 2


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.system, (f"touch {self.place}",)


class Call(Command):
    """Calls what pickle is not told by name."""

    def __reduce__(self):
        return functools.partial(os.mkdir, str(self.place)), ()


class Builtin(Command):
    """Needs no module but the builtins."""

    def __reduce__(self):
        return eval, (f"open({str(self.place)!r}, 'w')",)


@pytest.mark.parametrize("kind", [Command, Call, Builtin])
@pytest.mark.parametrize("hashes", [True, False])
def test_metadata_that_would_run_code_is_refused(saved, tmp_path, kind, hashes):
    (saved / ".metadata").write_bytes(pickle.dumps(kind(tmp_path / "ran")))
    state = read_json(saved / "state.json")
    if not hashes:
        del state["files"]
    else:  # whoever writes the pickle can write its hash too
        file = saved / ".metadata"
        state["files"][".metadata"] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_json(saved / "state.json", state)
    with pytest.raises(ValueError, match="which no checkpoint needs"):
        checkpoint.restore(saved, ALONE, *network())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", [Command, Call, Builtin])
def test_an_entry_that_would_run_code_is_refused(tmp_path, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"lr": kind(tmp_path / "ran")}, checkpoint_id=tmp_path / "saved", no_dist=True)
        with pytest.raises(dcp.CheckpointException, match="UnpicklingError"):
            dcp.load({"lr": 0.0}, storage_reader=StateReader(tmp_path / "saved"), planner=StatePlanner(), no_dist=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b"])
def test_metadata_that_names_files_elsewhere_is_refused(saved, name):
    metadata = StateReader(saved).read_metadata()
    for item in metadata.storage_data.values():
        item.relative_path = name
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(pickle.UnpicklingError, match="outside its folder"):
        StateReader(saved).read_metadata()


def test_metadata_of_another_kind_is_refused(saved):
    (saved / ".metadata").write_bytes(pickle.dumps({"planned": [1, 2]}))
    with pytest.raises(pickle.UnpicklingError, match="holds a dict"):
        StateReader(saved).read_metadata()


def test_what_another_process_is_writing_beside_it_is_no_part_of_a_checkpoint(tmp_path):
    """The notes of the others come and go while a process looks at the folder."""
    kept = (".metadata", "__0_0.distcp", "random-0.safetensors")
    for name in (*kept, "__1_0.distcp", "random-1.safetensors", "hashes-1.json", ".hashes-1.json.4ba42b.partial"):
        (tmp_path / name).write_bytes(name.encode())
    hash_own_files(tmp_path, 0)
    assert set(read_json(tmp_path / "hashes-0.json")) == set(kept)
    hash_own_files(tmp_path, 1)
    assert set(read_json(tmp_path / "hashes-1.json")) == {"__1_0.distcp", "random-1.safetensors"}

"""Copies of a state in host memory: equal, into the same memory, locked and given back where there is a GPU."""

from __future__ import annotations

import errno
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from ultralong.checkpoints.saving import host_copy
from ultralong.checkpoints.saving.host_copy import HostCopies
from ultralong.training.memory.offload import HostBufferPool
from ultralong.utils.local_ranks import run_ranks


@pytest.fixture
def copies():
    made = HostCopies()
    yield made
    made.close()


def a_state() -> dict:
    torch.manual_seed(0)
    tied = torch.randn(50, 8)
    return {
        "model": {"embed": tied, "head": tied, "half": torch.randn(33).bfloat16(), "none": torch.empty(0, 3)},
        "optimizer": {
            "state": {"embed": {"step": torch.tensor(3.0), "codes": torch.randint(0, 255, (700,), dtype=torch.uint8)}},
            "groups": [
                {"lr": torch.tensor(0.1), "betas": (0.9, 0.99), "names": ["embed"]},
                {"flags": torch.ones(3) > 0},
            ],
        },
        "part": torch.randn(20, 30)[4:9, ::2],
    }


def flat(value, name: str = "") -> dict:
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: x for at, each in pairs for key, x in flat(each, f"{name}.{at}").items()}
    return {name: value}


def test_a_copy_is_equal_and_does_not_change_with_the_state(copies):
    state, expected = a_state(), flat(a_state())
    copied = flat(copies.copy(state))
    for x in flat(state).values():
        if isinstance(x, torch.Tensor):
            x.zero_()
    assert copied.keys() == expected.keys()
    for name, x in expected.items():
        if isinstance(x, torch.Tensor):
            assert (copied[name].dtype, copied[name].shape) == (x.dtype, x.shape)
            assert torch.equal(copied[name], x)
            assert copied[name].untyped_storage().size() == x.nbytes  # written as it is, without another copy
        else:
            assert copied[name] == x
    assert copied[".optimizer.groups.0.names.0"] == "embed"


def test_a_named_tuple_stays_one(copies):
    Pair = namedtuple("Pair", "first second")
    state = {"pair": Pair(torch.ones(2), 3)}
    found = copies.copy(state)["pair"]
    assert type(found) is Pair
    assert (found.first.tolist(), found.second) == ([1.0, 1.0], 3)
    assert found.first.data_ptr() != state["pair"].first.data_ptr()


def test_copies_are_made_into_the_same_memory_and_a_tied_tensor_once(copies):
    state = a_state()
    first = {name: x.data_ptr() for name, x in flat(copies.copy(state)).items() if isinstance(x, torch.Tensor)}
    state["model"]["embed"].add_(1)
    again = flat(copies.copy(state))
    assert first == {name: x.data_ptr() for name, x in again.items() if isinstance(x, torch.Tensor)}
    assert first[".model.embed"] == first[".model.head"] != state["model"]["embed"].data_ptr()
    assert torch.equal(again[".model.head"], state["model"]["head"])


@pytest.mark.parametrize("other", [False, True])
def test_memory_that_was_reserved_is_used_by_states_of_its_sizes(copies, other, monkeypatch):
    made, memory = [], host_copy._Memory
    monkeypatch.setattr(host_copy, "_Memory", lambda *given: made.append(given[0]) or memory(*given))
    state = a_state()
    copies.reserve(state)
    copies.reserve(state)
    if other:
        state["more"] = torch.randn(9)
    found = copies.copy(state)
    assert len(made) == 1 + other
    assert all(torch.equal(found["part"], copies.copy(state)["part"]) for _ in range(2))
    assert len(made) == 1 + other


def _of_shards(rank: int, world: int) -> list:
    mesh = init_device_mesh("cpu", (world,))
    whole = torch.arange(40.0).view(10, 4)
    state = {"x": DTensor.from_local(whole.chunk(world)[rank].clone(), mesh, [Shard(0)])}
    saver = HostCopies()
    copied = saver.copy(state)["x"]
    state["x"].to_local().zero_()
    found = [copied.placements == (Shard(0),), copied.to_local().shape, copied.full_tensor().equal(whole)]
    saver.close()
    return found


def test_a_sharded_tensor_stays_one():
    assert run_ranks(_of_shards, 2) == [[True, torch.Size([5, 4]), True]] * 2


def test_blocks_hold_every_tensor_once_and_whole(monkeypatch):
    monkeypatch.setattr(host_copy, "BLOCK", 4096)
    sizes = [100, 0, 3000, 512, 9000, 1, 4096, 4096]
    blocks = host_copy._blocks(sizes)
    assert {number: size for block in blocks for number, size in block.items()} == {
        number: size for number, size in enumerate(sizes) if size
    }
    assert [sorted(block) for block in blocks] == [[0, 2, 3], [4], [5], [6], [7]]


class Cuda:
    """What is asked of CUDA, where registering block number `fails` is refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: int | None = None) -> None:
        self.locked: dict[int, int] = {}
        self.fails, self.asked, self.devices = fails, 0, []
        for name, value in {
            "is_available": lambda: True,
            "current_device": lambda: 1,
            "set_device": self.devices.append,
            "synchronize": lambda: None,
            "cudart": lambda: SimpleNamespace(cudaHostRegister=self.lock, cudaHostUnregister=self.unlock),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def lock(self, address: int, size: int, flags: int) -> int:
        self.asked += 1
        if self.asked == self.fails:
            return 2
        self.locked[address] = size
        return 0

    def unlock(self, address: int) -> int:
        return 0 if self.locked.pop(address, None) else 1


def test_memory_is_locked_once_and_given_back(monkeypatch):
    monkeypatch.setattr(host_copy, "BLOCK", 2048)
    cuda, copies = Cuda(monkeypatch), HostCopies()
    state = a_state()
    places = [x for x in flat(copies.copy(state)).values() if isinstance(x, torch.Tensor) and x.numel()]
    copies.copy(state)
    assert cuda.asked == len(cuda.locked) == 3
    for x in places:
        start = x.data_ptr()
        assert any(begin <= start and start + x.nbytes <= begin + size for begin, size in cuda.locked.items())
    copies.close()
    assert cuda.locked == {}


def test_what_is_left_after_an_error_can_be_given_back(monkeypatch):
    monkeypatch.setattr(host_copy, "BLOCK", 2048)
    cuda, copies = Cuda(monkeypatch), HostCopies()
    copies.copy(a_state())
    kept = cuda.locked.pop(list(cuda.locked)[1])  # CUDA refuses the second of three
    with pytest.raises(RuntimeError, match="could not give back a locked block"):
        copies.close()
    cuda.locked[copies._memory._locked[-1]] = kept
    copies.close()
    assert cuda.locked == {}


def test_pinned_buffers_left_after_an_error_can_be_given_back(monkeypatch):
    cuda, pool = Cuda(monkeypatch), HostBufferPool()
    for size in (3, 4, 5):
        pool.reserve((1, size, 2), torch.float32, torch.device("cuda"))
    second = list(cuda.locked)[1]
    kept = cuda.locked.pop(second)
    with pytest.raises(RuntimeError, match="could not give back a pinned buffer"):
        pool.release()
    cuda.locked[second] = kept
    pool.release()
    assert (cuda.locked, pool.bytes) == ({}, 0)


def test_memory_that_cannot_be_locked_is_told_and_the_rest_given_back(monkeypatch):
    monkeypatch.setattr(host_copy, "BLOCK", 2048)
    cuda, copies = Cuda(monkeypatch, fails=2), HostCopies()
    with pytest.raises(MemoryError, match=r"could not lock .* set async_checkpoints to false, or offload less"):
        copies.copy(a_state())
    assert cuda.asked == 2
    assert cuda.locked == {}
    copies.close()


def test_memory_that_the_system_does_not_give_is_told(monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(host_copy.mmap, "mmap", refused)
    with pytest.raises(MemoryError, match=r"0\.0 GiB a process: set async_checkpoints to false"):
        HostCopies().reserve(a_state())


def test_a_thread_begins_with_the_gpu_of_this_one(monkeypatch):
    """By itself it would begin with the first GPU, and take memory there from the process that trains on it."""
    assert host_copy.same_gpu()() is None  # without a GPU
    cuda = Cuda(monkeypatch)
    with ThreadPoolExecutor(1, initializer=host_copy.same_gpu()) as thread:
        thread.submit(int).result()
    assert cuda.devices == [1]

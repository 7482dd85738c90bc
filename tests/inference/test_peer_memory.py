"""Memory that ranks read from each other: all of them have it, or all send instead, and none waits for a lost cause.

Two CPU processes stand for two GPUs: files that both map are the memory, and gloo's barrier is the one of the GPUs.
"""

import ctypes
import logging
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from test_decode_step import CONFIGS, make

from ultralong.inference.decode_step import peer_memory, plain
from ultralong.inference.decode_step.step import DecodeStep
from ultralong.inference.sharded_generation import ShardedRunner
from ultralong.utils.local_ranks import RankFailed, run_ranks


class Mapped:
    """What `torch.distributed._symmetric_memory` does, for CPU processes; `fault` is where rank 1 fails."""

    def __init__(self, folder, rank, fault=None):
        self.folder, self.rank, self.fault, self.made = folder, rank, fault, 0

    def fails(self, where):
        if self.fault == where and self.rank == 1:
            raise RuntimeError(f"no {where} here\nand a trace")

    def open(self, rank, elements):
        return torch.from_file(f"{self.folder}/{self.made}-{rank}", shared=True, size=elements, dtype=torch.float32)

    def empty(self, elements, dtype, device):
        self.fails("empty")
        assert dtype == torch.float32
        self.made += 1
        return self.open(self.rank, elements)

    def rendezvous(self, own, group):
        self.fails("rendezvous")
        assert os.environ[peer_memory.NO_MULTICAST] == "1"
        store = dist.distributed_c10d._get_process_group_store(group)
        store.set(f"{self.made}-{self.rank}", "here")
        store.wait([f"{self.made}-{peer}" for peer in range(2)])  # torch waits in the group's store too
        peers = [own if peer == self.rank else self.open(peer, own.numel()) for peer in range(2)]
        if self.fault == "reading" and self.rank == 1:
            peers[0] = torch.zeros_like(own)
        return SimpleNamespace(get_buffer=lambda peer, *_: peers[peer], barrier=dist.barrier, peers=peers)


class Operations:
    """`plain`, and what reads the memory of several ranks by its addresses."""

    attend, add_norm, silu_times = (staticmethod(getattr(plain, x)) for x in ("attend", "add_norm", "silu_times"))
    rotate_and_store, merge_gathered = staticmethod(plain.rotate_and_store), staticmethod(plain.merge_gathered)

    @staticmethod
    def merge_at(pointers, start, shape, dtype):
        count = shape.numel() + shape[:-1].numel()
        parts = [(ctypes.c_float * count).from_address(at + 4 * start) for at in pointers.tolist()]
        return plain.merge_gathered(torch.stack([torch.tensor(part) for part in parts]), shape, dtype)


def as_if_on_gpus(folder, rank, fault=None):
    """Let this process share memory; whatever is changed ends with it."""
    memory = Mapped(folder, rank, fault)
    peer_memory._torch, peer_memory.SECONDS = lambda: memory, 1 if fault == "rendezvous" else 60
    peer_memory._here = lambda device: peer_memory.Place("host", f"GPU {rank}")
    peer_memory._check = lambda places, rank, device: memory.fails("check")
    return memory


def begin(way, rows=1, model=None):
    """Runners of the model's own code and of the step, behind a prompt (B, 21), and its last tokens."""
    model, group = model or make(CONFIGS["qwen3"]), dist.group.WORLD
    own, fused = (ShardedRunner(model, 60, group, chunk=8, fused=False, quiet=True) for _ in range(2))
    ids = torch.randint(0, 64, (rows, 21), generator=torch.Generator().manual_seed(1))
    for runner in (own, fused):
        runner.prefill(ids, [30] * rows)
    fused.step = DecodeStep(model, fused.cache, group, Operations, exchange=way)
    return own, fused, ids


def apart(own, fused, ids, steps=4):
    """How far steps are from the model's own, and the tokens they choose."""
    token, worst, said = ids[:, -1], 0.0, []
    for _ in range(steps):
        expected, found = own.decode(token), fused.decode(token)
        worst = max(worst, float((found - expected).abs().max()))
        token = found.argmax(-1)
        said += token.tolist()
    return worst, said


@torch.inference_mode()
def decode_with(rank, world, folder, way, fault):
    """What two ranks do where rank 1 has a fault."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("ultralong.inference.decode_step.exchange")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    memory = as_if_on_gpus(folder, rank, fault)
    store = dist.distributed_c10d._get_process_group_store(dist.group.WORLD)
    before = store.timeout, os.environ.get(peer_memory.NO_MULTICAST)
    try:
        runners = begin(way)
    except ValueError as error:
        return str(error)
    chosen, found = runners[1].step.exchange, apart(*runners)
    again = begin(way)[1].step.exchange
    assert (store.timeout, os.environ.get(peer_memory.NO_MULTICAST)) == before
    return chosen, found, memory.made, again, messages


def test_ranks_that_can_share_memory_read_it(tmp_path):
    direct = run_ranks(decode_with, 2, str(tmp_path), "direct", None)
    found = run_ranks(decode_with, 2, str(tmp_path), "auto", None)
    for (way, (worst, said), made, again, _), (_, (_, expected), *_) in zip(found, direct, strict=True):
        assert (way, again, made) == ("symmetric", "symmetric", 2)
        assert worst < 1e-4
        assert said == expected
    assert [len(messages) for *_, messages in found] == [2, 0], "the first rank says it, for each of two runners"
    assert "exchange symmetric" in found[0][-1][0]


@pytest.mark.parametrize(
    ("fault", "said", "made"),
    [
        ("check", "rank 1: no check here", [0, 0]),
        ("empty", "rank 1: no empty here", [1, 0]),
        ("rendezvous", "timeout after 1000ms", [1, 1]),  # rank 0 waited for rank 1; nobody tries again
        ("reading", "rank 1: what is read from rank 0 is not what it wrote", [1, 1]),
    ],
)
def test_a_rank_that_cannot_makes_all_send(tmp_path, fault, said, made):
    _, (_, expected), *_ = run_ranks(decode_with, 2, str(tmp_path), "direct", None)[0]
    found = run_ranks(decode_with, 2, str(tmp_path), "auto", fault)
    for way, (worst, tokens), _, again, _ in found:
        assert (way, again) == ("direct", "direct")
        assert worst < 1e-4
        assert tokens == expected
    assert [rank[2] for rank in found] == made
    message, second = found[0][-1]
    assert message.startswith("decoding steps send attention to each GPU (exchange direct): rank")
    assert said in message
    assert ("it failed before" in second) == (fault != "check"), "torch is asked once"


@pytest.mark.parametrize("fault", ["check", "rendezvous"])
def test_a_way_asked_for_by_name_is_refused_by_all(tmp_path, fault):
    first, second = run_ranks(decode_with, 2, str(tmp_path), "symmetric", fault)
    assert first == second
    assert first.startswith("exchange: symmetric can't be set up (rank ")


@torch.inference_mode()
def decode_batches(rank, world, folder):
    """Elements of a layer, and how often memory was made, behind prompts and batches of one runner's step."""
    memory, found = as_if_on_gpus(folder, rank), []
    own, fused, _ = begin("auto")
    for rows in (1, 1, 2, 1, 2):
        ids = torch.randint(0, 64, (rows, 21), generator=torch.Generator().manual_seed(rows))
        for runner in (own, fused):
            runner.release()
            runner.prefill(ids, [30] * rows)
        found.append((apart(own, fused, ids)[0], fused.step._exchange._width, memory.made))
    return found


def test_memory_is_made_once_and_again_for_more_sequences(tmp_path):
    for found in run_ranks(decode_batches, 2, str(tmp_path)):
        assert max(worst for worst, *_ in found) < 1e-4
        assert [rest for _, *rest in found] == [[36, 1], [36, 1], [72, 2], [72, 2], [72, 2]]


@torch.inference_mode()
def grow_in_vain(rank, world, folder):
    """What a way asked for by name says when memory for two sequences can't be had, and to one sequence after it."""
    memory, said = as_if_on_gpus(folder, rank), []
    _, fused, _ = begin("symmetric")
    memory.fault = "empty"
    for rows in (2, 1):
        ids = torch.randint(0, 64, (rows, 21), generator=torch.Generator().manual_seed(rows))
        fused.release()
        fused.prefill(ids, [30] * rows)
        try:
            fused.decode(ids[:, -1])
        except ValueError as error:
            said.append(str(error))
    return said


def test_memory_that_cannot_grow_is_refused_by_all_and_stays_refused(tmp_path):
    first, second = run_ranks(grow_in_vain, 2, str(tmp_path))
    assert first == second
    assert ["exchange: symmetric can't be set up" in said for said in first] == [True, True]
    assert "it failed before: rank 1: no empty here" in first[1]


@torch.inference_mode()
def lose_one(rank, world, folder):
    as_if_on_gpus(folder, rank)
    _, fused, ids = begin("auto")
    assert fused.step.exchange == "symmetric"
    for step in range(30):
        if step == 10 and rank == 1:
            os._exit(3)
        fused.decode(ids[:, step % 21])


def test_a_process_that_is_lost_ends_the_others(tmp_path):
    with pytest.raises(RankFailed, match="exit code 3"):
        run_ranks(lose_one, 2, str(tmp_path))


def on_cpus(rank, world):
    _, fused, _ = begin("auto")
    return fused.step.exchange


def test_cpu_ranks_and_single_ones_are_as_before(tmp_path):
    from ultralong.inference.kv_cache import KvCache

    model = make(CONFIGS["llama"])
    assert DecodeStep(model, KvCache(8), None).exchange == ""
    assert run_ranks(on_cpus, 2) == ["direct", "direct"], "their operations are shared, their memory is not"


def test_what_ranks_object_to(monkeypatch):
    gpus = [SimpleNamespace(uuid=f"gpu{number}") for number in range(2)]
    reads, atomics = {"reads": True}, {"atomic": True}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpus[number])
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, peer: reads["reads"])
    monkeypatch.setattr(peer_memory, "_has_atomics", lambda own, peer: (own, peer) == (1, 0) and atomics["atomic"])
    place, device = peer_memory.Place, torch.device("cuda", 1)
    good = [place("a", "gpu0"), place("a", "gpu1")]
    peer_memory._check(good, 1, device)
    for places, said in (
        ([place("b", "gpu0"), good[1]], "several hosts"),
        ([good[1], good[1]], "several ranks have one GPU"),
        ([place("a", "gpu7"), good[1]], "rank 0 is not visible"),
    ):
        with pytest.raises(ValueError, match=said):
            peer_memory._check(places, 1, device)
    atomics["atomic"] = False
    with pytest.raises(ValueError, match="no atomic operations in the memory of rank 0"):
        peer_memory._check(good, 1, device)
    reads["reads"] = False
    with pytest.raises(ValueError, match="can't read the memory of rank 0"):
        peer_memory._check(good, 1, device)
    with pytest.raises(ValueError, match="NVIDIA's GPUs only"):
        peer_memory._here(torch.device("cpu"))

"""Memory that the GPUs of one host read from each other (torch's symmetric memory), agreed on by all of its ranks.

P ranks.

torch's set-up waits in every rank for every other: where it fails on one, the others would wait. So ranks compare where
they are before anything is allocated, and tell each other after every step whether it went well; a failure anywhere is
`Unavailable` everywhere. Peers' addresses and signal pads are all that is used. Multicast over NVLink is left off: some
GPUs and drivers refuse it in the set-up or wait in it without end, and nothing here needs it.
"""

from __future__ import annotations

import ctypes
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ultralong.attention.collectives import Group

SECONDS = 60  # that ranks wait for each other within torch's set-up; it takes well below one
NATIVE_ATOMICS = 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED of CUDA's driver API
NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"  # read by torch whenever memory is set up

_failed: list[str] = []  # torch counts set-ups in each process: after a failure ranks may count differently, for good
T = TypeVar("T")


class Unavailable(ValueError):
    """Some rank can't share memory; raised on all of them."""


class Place(NamedTuple):
    """Where a rank runs: its host and container, and its GPU's UUID."""

    host: str
    gpu: str


class PeerMemory:
    """Memory of the same shape on every rank, which all can read.

    Args:
        own: This rank's, in float32.
        handle: What torch's set-up of it returned.
        peers: (P,) every rank's, as this GPU sees it.

    Attributes:
        own: See above.
        pointers: (P,) addresses of every rank's, on the GPU.
    """

    def __init__(self, own: Tensor, handle: Any, peers: list[Tensor]) -> None:
        self.own, self._handle = own, handle  # the peers' stays mapped as long as the handle is there
        self.pointers = torch.tensor([peer.data_ptr() for peer in peers], device=own.device)

    def barrier(self) -> None:
        """What each rank wrote before it can be read by all behind it, in the current stream."""
        self._handle.barrier()


def share(elements: int, device: torch.device, group: Group) -> PeerMemory:
    """Zeros (elements,) in float32 on every rank; called by all ranks together, outside of a CUDA graph.

    Raises:
        Unavailable: Ranks are on several hosts, their GPUs can't write each other's memory, or the set-up failed.
    """
    objection = _failed[0] if _failed else None
    _agree(objection, group)
    place = _attempt(lambda: _here(device), group)
    places: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(places, place, group=group)
    _attempt(lambda: _check(places, dist.get_rank(group), device), group)
    try:
        with _without_multicast():
            own = _attempt(lambda: _torch().empty(elements, dtype=torch.float32, device=device), group)
            return _set_up(own, group)
    except Unavailable as error:
        _failed.append(f"it failed before: {error}")
        raise


def _set_up(own: Tensor, group: Group) -> PeerMemory:
    """Map everyone's memory, and see that what another rank wrote is what is read here."""
    rank, ranks = dist.get_rank(group), range(dist.get_world_size(group))
    with _bounded(group):
        handle = _attempt(lambda: _torch().rendezvous(own, group), group)
    peers: list[Tensor] = _attempt(lambda: [handle.get_buffer(peer, own.shape, own.dtype) for peer in ranks], group)
    _attempt(lambda: own.fill_(rank + 1).sum().item(), group)  # the host waits for it
    _attempt(lambda: _compare(peers), group)
    _attempt(lambda: own.zero_().sum().item(), group)
    return PeerMemory(own, handle, peers)


def _compare(peers: list[Tensor]) -> None:
    wrong = [rank for rank, peer in enumerate(peers) if not bool((peer == rank + 1).all())]
    if wrong:
        raise ValueError(f"what is read from rank {wrong[0]} is not what it wrote")


def _agree(objection: str | None, group: Group) -> None:
    """Raise `Unavailable` on every rank if one has an objection."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, objection, group=group)
    said = [f"rank {rank}: {text}" for rank, text in enumerate(found) if text]
    if said:
        raise Unavailable(said[0])


def _attempt(work: Callable[[], T], group: Group) -> T:
    """A step that may fail on some ranks; they agree behind it."""
    result: list[T] = []
    objection = None
    try:
        result.append(work())
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
        objection = str(error).split("\n", 1)[0] or type(error).__name__
    _agree(objection, group)
    return result[0]


def _torch() -> Any:
    from torch.distributed import _symmetric_memory

    return _symmetric_memory


def _here(device: torch.device) -> Place:
    if device.type != "cuda" or torch.version.hip is not None:
        raise ValueError("memory is shared by NVIDIA's GPUs only")
    # Handles go through a Unix socket in the folder for temporary files: ranks must see the same processes and files.
    facts = [socket.gethostname(), tempfile.gettempdir()]
    with suppress(OSError):  # some sandboxes have not all of these; what is there tells more
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    for kind in ("pid", "mnt"):
        with suppress(OSError):
            facts.append(os.readlink(f"/proc/self/ns/{kind}"))
    return Place(" ".join(facts), str(torch.cuda.get_device_properties(device).uuid))


def _check(places: list[Place], rank: int, device: torch.device) -> None:
    """Object to ranks that can't share memory."""
    if len({place.host for place in places}) > 1:
        raise ValueError("the ranks are on several hosts or in several containers")
    if len({place.gpu for place in places}) < len(places):
        raise ValueError("several ranks have one GPU")
    seen = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    for peer, place in enumerate(places):
        if place.gpu not in seen:
            raise ValueError(f"the GPU of rank {peer} is not visible (CUDA_VISIBLE_DEVICES)")
        if peer != rank and not torch.cuda.can_device_access_peer(device, seen[place.gpu]):
            raise ValueError(f"its GPU can't read the memory of rank {peer}'s")
        if peer != rank and not _has_atomics(seen[places[rank].gpu], seen[place.gpu]):
            raise ValueError(f"its GPU has no atomic operations in the memory of rank {peer}'s")


def _has_atomics(own: int, peer: int) -> bool:
    """Whether a GPU's atomic operations in another's memory are atomic, which barriers need; not all links do it."""
    driver, found = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    devices = ctypes.c_int(), ctypes.c_int()
    codes = [driver.cuDeviceGet(ctypes.byref(x), number) for x, number in zip(devices, (own, peer), strict=True)]
    codes.append(driver.cuDeviceGetP2PAttribute(ctypes.byref(found), NATIVE_ATOMICS, *devices))
    if any(codes):
        raise OSError(f"CUDA's driver does not say what its GPU can do in another's memory (errors {codes})")
    return bool(found.value)


@contextmanager
def _bounded(group: Group) -> Iterator[None]:
    """For a while, let ranks wait for each other in the group's store no longer than SECONDS.

    The group's own timeout can be a week: that of a server's ranks, which wait for its next question.
    """
    store: Any = dist.distributed_c10d._get_process_group_store(group)
    before = store.timeout
    store.set_timeout(timedelta(seconds=SECONDS))
    try:
        yield
    finally:
        store.set_timeout(before)


@contextmanager
def _without_multicast() -> Iterator[None]:
    """For a while, tell torch to make no multicast objects: the environment is the one way to say it."""
    before = os.environ.get(NO_MULTICAST)
    os.environ[NO_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[NO_MULTICAST]
        else:
            os.environ[NO_MULTICAST] = before

"""A state's copy in host memory: memory that is taken once and kept, page-locked where there is a GPU.

Locking 22 GiB takes each of two processes 11 s on a host with H200s, and a copy into them 0.6 s. The memory is made
after the first step, which has made the optimizer's states: a save that a scheduler's signal asks for has no 11 s to
lose, and a host that is too small ends the run before hours have gone. Training waits meanwhile: made beside a step, by
four threads, it took 37 s, in which the step stood still.
"""

from __future__ import annotations

import copy
import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ultralong.utils.units import GIB

BLOCK = 1 << 30  # bytes of memory that are locked at a time
ALIGNED = 512  # bytes; tensors of any type begin there


class HostCopies:
    """Copies states of one kind to the host, each into the memory of the one before."""

    def __init__(self) -> None:
        """Take no memory yet."""
        self._memory: _Memory | None = None

    def reserve(self, state: Mapping[str, Any]) -> None:
        """Make the memory for states like this one, unless it is there.

        Raises:
            MemoryError: The host has no more memory to lock.
        """
        self._memory_for(_distinct(state).values())

    @torch.no_grad()
    def copy(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state's copy, complete when this returns and good until the next one.

        Args:
            state: Nested dicts, lists and tuples of tensors and other values; DTensors may lie anywhere.

        Returns:
            The same with this process's shards on the host.

        Raises:
            MemoryError: The host has no more memory to lock.
        """
        found = _distinct(state)
        memory = self._memory_for(found.values())
        on_host = {
            key: place.view(x.dtype).view(x.shape).copy_(x, non_blocking=x.is_cuda)
            for (key, x), place in zip(found.items(), memory.places, strict=True)
        }
        if torch.cuda.is_available():
            torch.cuda.synchronize()

        def copied(x: Tensor) -> Tensor:
            local = on_host[_key(_local(x))]
            # Not `from_local`, which would bring the shard to the devices of the mesh.
            return DTensor(local, x._spec, requires_grad=False) if isinstance(x, DTensor) else local

        whole: dict[str, Any] = _with_tensors(state, copied)
        return whole

    def close(self) -> None:
        """Free the memory; copies are gone."""
        if self._memory is not None:
            self._memory.free()
        self._memory = None

    def _memory_for(self, tensors: Iterable[Tensor]) -> _Memory:
        sizes = tuple(x.nbytes for x in tensors)
        if self._memory is None or self._memory.sizes != sizes:
            self.close()
            self._memory = _Memory(sizes)
        return self._memory


def same_gpu() -> Callable[[], None]:
    """For a new thread to begin with: the GPU of this one. It would begin with the first, and take memory there."""
    if not torch.cuda.is_available():
        return lambda: None
    number = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(number)


class _Memory:
    """Places for tensors of given sizes in host memory.

    Args:
        sizes: Bytes of each.

    Attributes:
        places: For each size a tensor of bytes with a storage of its own, as an archive holds whole storages.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes, self.places = tuple(sizes), [torch.empty(0, dtype=torch.uint8)] * len(sizes)
        self._locked: list[int] = []
        try:
            for block in _blocks(sizes):
                self._make(block)
        except OSError as error:  # the system gives no more
            self.free()
            raise MemoryError(self._too_little(f"the system gives no more memory ({error.strerror})")) from error
        except BaseException:
            self.free()
            raise

    def free(self) -> None:
        """Unlock and free it."""
        while self._locked:
            if failed := int(torch.cuda.cudart().cudaHostUnregister(self._locked[-1])):
                raise RuntimeError(f"CUDA could not give back a locked block of host memory (error {failed})")
            self._locked.pop()  # each by itself: after an error those that are gone are not given back again
        self.places.clear()

    def _make(self, block: Mapping[int, int]) -> None:
        size = sum(map(_aligned, block.values()))
        memory = _anonymous(size)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        whole.zero_()  # brings the pages in, by all threads; a copy, or locking them, would do it one by one
        if torch.cuda.is_available():
            if failed := int(torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), size, 0)):
                raise MemoryError(
                    self._too_little(f"CUDA could not lock {size / GIB:.1f} GiB of host memory more (error {failed})")
                )
            self._locked.append(whole.data_ptr())
        start = 0
        for number, length in block.items():
            self.places[number] = torch.frombuffer(memory, dtype=torch.uint8, count=length, offset=start)
            start += _aligned(length)

    def _too_little(self, what: str) -> str:
        return (
            f"{what} for checkpoints in the background, which need {sum(self.sizes) / GIB:.1f} GiB a process: set "
            "async_checkpoints to false, or offload less; `ultralong plan --host-memory GIB --fit` counts both"
        )


def _anonymous(size: int) -> mmap.mmap:
    """Memory of no file, which goes back to the system when its last tensor is gone."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _blocks(sizes: Sequence[int]) -> list[dict[int, int]]:
    """Tensors by the block of memory that they lie in: number and bytes of each; tensors without elements in none."""
    blocks: list[dict[int, int]] = []
    room = 0
    for number, size in enumerate(sizes):
        if size and (not blocks or _aligned(size) > room):
            blocks.append({})
            room = BLOCK
        if size:
            blocks[-1][number] = size
            room -= _aligned(size)
    return blocks


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _distinct(state: Mapping[str, Any]) -> dict[tuple[Any, ...], Tensor]:
    """This process's tensors of a state in their order; one that has two names (a tied head) once."""
    found: dict[tuple[Any, ...], Tensor] = {}

    def note(x: Tensor) -> Tensor:
        local = _local(x)
        found.setdefault(_key(local), local)
        return x

    _with_tensors(state, note)
    return found


def _local(x: Tensor) -> Tensor:
    return (x.to_local() if isinstance(x, DTensor) else x).detach()


def _key(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.device, x.dtype, x.shape, x.stride()


def _with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A nested value with its tensors changed and all else copied."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _with_tensors(each, change) for name, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named one takes its values one by one
        return type(value)(*(_with_tensors(each, change) for each in value))
    if isinstance(value, list | tuple):
        return type(value)(_with_tensors(each, change) for each in value)
    return copy.deepcopy(value)

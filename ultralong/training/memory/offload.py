"""Offloading of tensors to pinned host memory and back, on a stream of its own, overlapped with computation."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor


class HostBufferPool:
    """A pool of host buffers by shape and dtype; pinned where there is a GPU.

    A tensor (1, T, ...) may lie in the first T of a longer buffer, as packs of rows differ in their tokens. Buffers are
    plain tensors that are registered with CUDA: torch's own pinned memory comes in powers of two, and stays taken when
    it is free.

    Attributes:
        bytes: Memory taken now.
    """

    def __init__(self) -> None:
        self._free: defaultdict[tuple[object, ...], list[Tensor]] = defaultdict(list)
        self._lent: dict[int, Tensor] = {}  # buffers of which a part is in use, by address
        self._registered: list[int] = []
        self.bytes = 0

    def reserve(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """Make one more buffer. Pinning takes about two seconds for 4 GiB, so it is done before the first step.

        Raises:
            MemoryError: The host has no more memory to pin.
        """
        buffer = torch.empty(shape, dtype=dtype, device="cpu")
        if device.type == "cuda":
            buffer.zero_()  # by all threads; registering would bring the pages in one by one
        size = buffer.numel() * buffer.element_size()
        if device.type == "cuda":
            failed = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0))
            if failed:
                raise MemoryError(
                    f"CUDA could not pin {size / 2**30:.1f} GiB of host memory beyond the "
                    f"{self.bytes / 2**30:.1f} GiB pinned so far (error {failed}): lower "
                    "memory.attention_outputs_offloaded or memory.layer_inputs_offloaded; `ultralong plan "
                    "--host-memory GIB --fit` chooses them."
                )
            self._registered.append(buffer.data_ptr())
        self.bytes += size
        self.recycle(buffer)

    def acquire(self, like: Tensor) -> Tensor:
        """A buffer of a tensor's shape and type, with any content."""
        free = self._free[_kind(like)]
        fitting = [number for number, buffer in enumerate(free) if len(buffer[0]) >= len(like[0])]
        if not fitting:
            self.reserve(like.shape, like.dtype, like.device)
            fitting = [len(free) - 1]
        buffer = free.pop(min(fitting, key=lambda number: (len(free[number][0]), -number)))
        if buffer.shape == like.shape:
            return buffer
        self._lent[buffer.data_ptr()] = buffer
        return buffer.narrow(1, 0, len(like[0]))

    def recycle(self, buffer: Tensor) -> None:
        """Let a buffer be used again."""
        buffer = self._lent.pop(buffer.data_ptr(), buffer)
        self._free[_kind(buffer)].append(buffer)

    def release(self) -> None:
        """Give all buffers back to the system; none may be in use.

        Raises:
            RuntimeError: CUDA refuses one.
        """
        while self._registered:
            if failed := int(torch.cuda.cudart().cudaHostUnregister(self._registered[-1])):
                raise RuntimeError(f"CUDA could not give back a pinned buffer of host memory (error {failed})")
            self._registered.pop()  # each by itself: after an error those that are gone are not given back again
        self._free.clear()
        self.bytes = 0


def _kind(x: Tensor) -> tuple[object, ...]:
    """What a buffer must have in common with a tensor of dtype and shape (B, T, ...); all of it where B is not 1."""
    shape = x.shape if x.shape[0] != 1 else (1, *x.shape[2:])
    return (*shape, x.dtype)


@dataclass
class OffloadedTensor:
    """A tensor in host memory, on its way there or on its way back."""

    host: Tensor
    device: torch.device
    copied_out: torch.cuda.Event | None  # the copy to the host has ended; None on a CPU
    on_device: Tensor | None = None  # once it has been asked for
    copied_back: torch.cuda.Event | None = None


class Offloader:
    """Offloads tensors to host memory and brings them back, overlapped with computation.

    Attributes:
        pool: The host buffers.
    """

    def __init__(self) -> None:
        self.pool = HostBufferPool()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def offload(self, x: Tensor) -> OffloadedTensor:
        """Start copying a tensor to host memory; its device memory is free once nothing else holds it."""
        x = x.detach()
        host = self.pool.acquire(x)
        if not x.is_cuda:
            host.copy_(x)
            return OffloadedTensor(host, x.device, None)
        stream = self._stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            host.copy_(x, non_blocking=True)
            x.record_stream(stream)
        return OffloadedTensor(host, x.device, stream.record_event())

    def prefetch(self, offloaded: OffloadedTensor) -> None:
        """Start bringing a tensor back, if that has not begun."""
        if offloaded.on_device is not None:
            return
        if offloaded.device.type != "cuda":
            offloaded.on_device = offloaded.host.clone()
            return
        stream = self._stream(offloaded.device)
        assert offloaded.copied_out is not None
        stream.wait_event(offloaded.copied_out)
        offloaded.on_device = torch.empty(offloaded.host.shape, dtype=offloaded.host.dtype, device=offloaded.device)
        stream.wait_stream(
            torch.cuda.current_stream(offloaded.device)
        )  # whoever had this memory before is done with it
        with torch.cuda.stream(stream):
            offloaded.on_device.copy_(offloaded.host, non_blocking=True)
        offloaded.copied_back = stream.record_event()

    def get(self, offloaded: OffloadedTensor) -> Tensor:
        """The tensor on its device, ordered before what the current stream does next; the host keeps it as well."""
        self.prefetch(offloaded)
        x, offloaded.on_device = offloaded.on_device, None
        assert x is not None
        if offloaded.copied_back is not None:
            torch.cuda.current_stream(offloaded.device).wait_event(offloaded.copied_back)
            offloaded.copied_back.synchronize()  # the host buffer may be written again from here on
        return x

    def pop(self, offloaded: OffloadedTensor) -> Tensor:
        """`get`, after which the host buffer is free for others."""
        x = self.get(offloaded)
        self.pool.recycle(offloaded.host)
        return x

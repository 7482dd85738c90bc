"""Counts what a computation allocates, reads, writes, multiplies and sends, while it runs, on any tensors.

On fake tensors, which have shapes and no storage, a step of any size is traced in seconds on a laptop, through the
model's and the trainer's own code.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ultralong.planner.traces.shape_tensors import ShapeTensor

# Namespaces of operations that do work: torch's, and those of this library that are one pass over memory.
OURS = ("aten", "ultralong")
# Operations that touch no element, beside views: making memory, and another form of a tensor that shares its memory.
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh")
# Operations that write their result without reading what they are given to know its size, or to write into.
WRITES_ONLY = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "fill_", "zero_")

# Elementwise operations beside those that torch tags so, and those tagged so that copy, at the memory's speed.
ELEMENTWISE, COPIES = ("masked_fill_",), ("clone",)
READS_TWICE = ("rms_norm_backward", "_fused_rms_norm_backward")  # once for the input's gradient, once for the weight's

GROUPED = torch.ops.aten._grouped_mm  # products of experts, which torch's own registry does not count


class Tracker(TorchDispatchMode):
    """Follows the storages that are alive and adds up the work.

    Attributes:
        live: Bytes of the storages made inside the mode and not freed yet.
        peak: Most bytes alive at once since the mode began or `peak` was last set.
        moment: Name of the part of the computation that runs now; set it as parts begin.
        peaks: Most bytes alive at once in each of those parts.
        multiplied: FLOP of matrix products.
        moved: Bytes that all other operations read and write, together.
        strided: Elements of elementwise operations on tensors of different layouts, as with a mask of one value a row
            or half of a matrix's columns: a GPU computes an address for each element of each, and reads them singly.
        strided_moved: Bytes of `moved` that those operations read and write.
        operations: Operations that do work, which on a GPU are kernels to start.
        sent: Bytes sent to other processes.
        received: Bytes received from them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.multiplied = self.moved = self.operations = self.sent = self.received = 0
        self.strided = self.strided_moved = 0
        self.moment = ""
        self.peaks: defaultdict[str, int] = defaultdict(int)
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count it."""
        kwargs = kwargs or {}
        grouped = func._overloadpacket is GROUPED and isinstance(args[0], ShapeTensor)
        result = _grouped_result(*args, **kwargs) if grouped else func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        given = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in outputs:  # a view of what was made outside of the mode, such as a weight, is nothing new
            if tensor.untyped_storage()._cdata not in given:
                self._follow(tensor)
        self._count(func, inputs, outputs, args, kwargs, result)
        return result

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or not size:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peaks[self.moment] = max(self.peaks[self.moment], self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def _count(
        self, func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor], args: Any, kwargs: Any, result: Any
    ) -> None:
        packet = func._overloadpacket
        if func.namespace == "c10d":
            self._count_transfer(packet.__name__, args)
        if func.namespace not in OURS or func.is_view or packet.__name__ in FREE:
            return
        self.operations += 1
        if packet is GROUPED:
            self.multiplied += _grouped_flops(args[0], args[1], result)
            return
        if packet in flop_registry:
            args = _all_heads(args) if "scaled_dot_product" in packet.__name__ else args
            self.multiplied += flop_registry[packet](*args, **kwargs, out_val=result)
            return
        if packet.__name__ in WRITES_ONLY:
            inputs = []
        elif packet.__name__ == "copy_":
            inputs = inputs[1:]
        moved = sum(_size(tensor) for tensor in (*inputs, *outputs))
        if packet.__name__ in READS_TWICE:
            moved += _size(inputs[0]) + _size(inputs[1])
        self.moved += moved
        if _elementwise(func) and not _alike([*inputs, *outputs]):
            self.strided += max(tensor.numel() for tensor in outputs)
            self.strided_moved += moved
        if packet.__name__ == "masked_fill":  # a copy, which is then filled in place
            self.operations += 1
            self.moved += 2 * _size(outputs[0])

    def _count_transfer(self, name: str, args: Any) -> None:
        if name == "send":
            self.sent += sum(map(_size, args[0]))
        elif name == "recv_":
            self.received += sum(map(_size, args[0]))
        elif name == "alltoall_base_":
            ranks = dist.ProcessGroup.unbox(args[2]).size()
            self.sent += _size(args[1]) * (ranks - 1) // ranks
            self.received += _size(args[0]) * (ranks - 1) // ranks
        else:
            raise NotImplementedError(f"the planner does not know what {name} sends")


def _elementwise(func: Any) -> bool:
    name = func._overloadpacket.__name__
    return name in ELEMENTWISE or (torch.Tag.pointwise in func.tags and name not in COPIES)


def _alike(tensors: list[torch.Tensor]) -> bool:
    """Whether all lie in memory in one order without gaps, so that an operation may take many elements at a time."""
    layouts = {tuple((n, step) for n, step in zip(x.shape, x.stride(), strict=True) if n > 1) for x in tensors}
    if len(layouts) > 1:
        return False
    expected = 1
    for step, size in sorted((step, size) for layout in layouts for size, step in layout):
        if step != expected:
            return False
        expected *= size
    return True


def _grouped_result(left: torch.Tensor, right: torch.Tensor, offs: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """What the product allocates; torch's own shape function knows bfloat16 only, its kernels on a CPU any type."""
    groups = () if right.dim() == 3 else (offs.shape[0],)
    return left.new_empty((*groups, left.shape[0], right.shape[-1]))


def _grouped_flops(left: torch.Tensor, right: torch.Tensor, result: torch.Tensor) -> int:
    """FLOP of one product for each group: rows dealt to matrices, or two tall matrices cut into groups of rows.

    Every row of `left`, or column where the result has a matrix for each group, is in one group only, so it does not
    matter how the rows are dealt out.
    """
    if right.dim() == 3:  # (S, K) rows with (G, K, N)
        return 2 * left.shape[0] * left.shape[1] * result.shape[1]
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]  # (K, S) with (S, N): the matrices' gradient


def _all_heads(args: Any) -> tuple[Any, ...]:
    """Arguments of attention with as many kv heads as query heads, which is what is multiplied.

    PyTorch's count before 2.12 asserts that there are as many; a kernel for grouped queries is given fewer.
    """
    heads = max(arg.shape[1] for arg in args if isinstance(arg, torch.Tensor) and arg.dim() == 4)
    return tuple(
        torch.empty((arg.shape[0], heads, *arg.shape[2:]), device="meta", dtype=arg.dtype)
        if isinstance(arg, torch.Tensor) and arg.dim() == 4 and arg.shape[1] < heads
        else arg
        for arg in args
    )


def _size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements; one that is spread over a dimension without being copied counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()

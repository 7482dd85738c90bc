"""Tensors with a shape and no memory, which say that they are on a CPU: what a training step is traced on.

A meta tensor alone would not do: autocast and the trainer's own code look at the device. torch's `FakeTensorMode` gives
the same traces; it checks more, and took most of a plan's time: a step is traced three times as fast here, attention
five times.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

META, CPU = torch.device("meta"), torch.device("cpu")
ITEM = torch.ops.aten._local_scalar_dense.default


class ShapeTensor(Tensor):
    """A meta tensor that says it is on a CPU.

    Attributes:
        meta: The meta tensor; its views share its storage.
    """

    meta: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's subclasses do

    @staticmethod
    def __new__(cls: type[ShapeTensor], meta: Tensor) -> ShapeTensor:
        """Wrap a meta tensor."""
        self = Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=CPU,
        )
        self.meta = meta
        return self

    def untyped_storage(self) -> torch.UntypedStorage:
        """The meta tensor's: the same one for all views of a tensor."""
        return self.meta.untyped_storage()

    def data_ptr(self) -> int:
        """Zero, as of every meta tensor; so all are aligned."""
        return 0

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch says that it is a function of the class
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """One operation outside of a `ShapeMode`."""
        return _run(func, args, kwargs or {})


class ShapeMode(TorchDispatchMode):
    """While it is open, tensors are made without memory and operations compute shapes only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation, new tensors among them."""
        return _run(func, args, kwargs or {})


@contextmanager
def real_tensors() -> Iterator[None]:
    """Tensors as they are outside, while this is open inside a `ShapeMode`."""
    with _disable_current_modes():
        yield


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    if func is ITEM and args[0].dtype == torch.bool:
        # transformers asks whether each row's positions run on from one to the next, and holds them if they don't.
        return True
    given: dict[int, Tensor] = {}
    key = _key(func, args, kwargs)
    if key in _results:
        return _like(_results[key])
    args = _unwrapped(args, given)
    kwargs = {name: _unwrapped(value, given) for name, value in kwargs.items()}
    if (not given or kwargs.get("device") is not None) and _is_told_a_device(func):
        kwargs["device"] = META
    result = func(*args, **kwargs)
    if key is not None and (made := _layout(result, given)) is not None:
        if len(_results) >= MOST_RESULTS:
            _results.clear()
        _results[key] = made
    return _wrapped(result, given)


# What an operation makes of tensors of such shapes: torch works it out in Python each time, which took a third of a
# plan's time, and the layers of a model ask for the same over and over. A plan has some hundred.
_results: dict[Any, Any] = {}
MOST_RESULTS = 1 << 14


class _Layout(NamedTuple):
    """All that there is to a tensor without memory."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _key(func: Any, args: Any, kwargs: Any) -> Any:
    """What decides on the result of an operation; None where it is not worth keeping, or more than shapes decides."""
    if not _makes_new_tensors(func):
        return None
    try:
        key = (func, _described(args), _described(tuple(kwargs.items())))
        hash(key)
    except TypeError:
        return None
    return key


@cache
def _makes_new_tensors(func: Any) -> bool:
    """Whether an operation of torch's own takes tensors and by its schema neither writes to them nor shares memory."""
    schema = func._schema
    named = (*schema.arguments, *schema.returns)
    takes = any("Tensor" in str(argument.type) for argument in schema.arguments)
    return func.namespace == "aten" and takes and not any(each.alias_info for each in named)


def _described(value: Any) -> Any:
    """A value as part of a key: a shape tensor's layout, and numbers with their type, which decides on the result's."""
    if isinstance(value, ShapeTensor):
        return _Layout(value.shape, value.stride(), value.dtype)
    if isinstance(value, Tensor):
        raise TypeError("a real tensor may count as a number")
    if isinstance(value, tuple | list):
        return tuple(_described(each) for each in value)
    return type(value), value


def _layout(result: Any, given: dict[int, Tensor]) -> Any:
    """A result's layouts, where it is of new tensors that fill their memory from its start; else None."""
    if isinstance(result, tuple | list):
        layouts = [_layout(each, given) for each in result]
        return None if None in layouts or not layouts else layouts
    if not isinstance(result, Tensor) or result.storage_offset():
        return None
    storage = result.untyped_storage()
    if any(storage._cdata == value.untyped_storage()._cdata for value in given.values()):
        return None  # as of `_unsafe_view`
    layout = _Layout(result.shape, result.stride(), result.dtype)
    return layout if _empty(layout).untyped_storage().nbytes() == storage.nbytes() else None


def _empty(layout: _Layout) -> Tensor:
    return torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=META)


def _like(kept: Any) -> Any:
    return ShapeTensor(_empty(kept)) if isinstance(kept, _Layout) else tuple(_like(each) for each in kept)


@cache
def _is_told_a_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _unwrapped(value: Any, given: dict[int, Tensor]) -> Any:
    """A value with meta tensors in place of the others, which are entered into `given` under the meta tensors' ids."""
    if isinstance(value, Tensor):
        inner = value.meta if isinstance(value, ShapeTensor) else value.to(META)
        given[id(inner)] = value
        return inner
    if isinstance(value, tuple | list):
        return type(value)(_unwrapped(each, given) for each in value)
    return value


def _wrapped(value: Any, given: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        known = given.get(id(value))  # an operation in place returns what it was given
        return ShapeTensor(value) if known is None else known
    if isinstance(value, tuple | list):
        return type(value)(_wrapped(each, given) for each in value)
    return value

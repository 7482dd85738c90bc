"""Elementwise functions as one kernel on a GPU, by torch's compiler, and never without a look at what it made."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)
FEW = 32  # tokens that a compiled function is tried on


class OnePass:
    """An elementwise function that is one pass over memory on a GPU, where torch compiles it into one kernel.

    The kernel is made at the first call, for any sizes, and set beside the function itself on a few tokens. Where it
    can't be made or gives something else, a warning says so and the function runs operation by operation, as it does
    without a GPU.

    Args:
        function: Of tensors (B, t, ...) that have their tokens in the second dimension, without gradients.
        compiled: The same in words that compile better; `function` itself if None.
    """

    def __init__(self, function: Callable[..., Any], compiled: Callable[..., Any] | None = None) -> None:
        self._function, self._compiled = function, compiled or function
        self._fast: Callable[..., Any] | None = None

    def __call__(self, *tensors: Tensor) -> Any:
        """The function's result."""
        if not tensors[0].is_cuda:
            return self._function(*tensors)
        with torch.no_grad():
            if self._fast is None:
                self._fast = self.prepared(*(x[:, :FEW].contiguous() for x in tensors))
            return self._fast(*tensors)

    def prepared(self, *tensors: Tensor, **options: Any) -> Callable[..., Any]:
        """What to call from now on: the compiled function, if it agrees with the plain one on these tensors."""
        name, compiled = self._function.__name__, torch.compile(self._compiled, dynamic=True, fullgraph=True, **options)
        right = self._function(*tensors)
        try:
            found = compiled(*tensors)
        except (RuntimeError, ImportError, OSError) as error:  # the compiler's own are RuntimeErrors
            log.warning("%s could not be compiled, which costs some memory traffic: %s: %s", name, type(error).__name__,
                        str(error).split("\n", 1)[0])
            return self._function
        if _agree(found, right):
            return compiled
        log.warning("%s compiled gives other results than operation by operation and is left out", name)
        return self._function


def _agree(found: Any, right: Any) -> bool:
    """Whether results are alike but for the last bits of intermediate roundings."""
    if isinstance(right, tuple):
        return all(map(_agree, found, right))
    tolerance = 4 * torch.finfo(right.dtype).eps
    return torch.allclose(found, right, rtol=tolerance, atol=tolerance * float(right.abs().max()))

"""torch.compile checked against eager: functions of independent rows as one fused kernel on a GPU.

Legend: N rows (tokens), S sizes of a row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)
FEW = 1024  # rows that a compiled function is compared on


class CheckedCompile:
    """A function of independent rows, compiled by torch into one kernel on a GPU and checked against eager.

    A kernel is made at the first call with rows of a size, for any number of rows: the sizes of a row are constants in
    it, as divisions by sizes that are not known would take longer than the memory. It is compared with the eager
    function on a few rows. Where it can't be made or gives something else, a warning says so and the function runs
    operation by operation, as it does without a GPU.

    Args:
        function: Of tensors (N, S) and, after those, of constants; without gradients. It may write into its arguments.
        compiled: The same written so that it compiles better, and without in-place writes; `function` itself if None.
    """

    def __init__(self, function: Callable[..., Any], compiled: Callable[..., Any] | None = None) -> None:
        self._function, self._compiled = function, compiled or function
        self._fast: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        if not arguments[0].is_cuda or len(arguments[0]) < 2:  # the compiler makes a kernel of its own for one row
            return self._function(*arguments)
        with torch.no_grad():
            arguments = tuple(x.contiguous() if isinstance(x, Tensor) else x for x in arguments)
            key = tuple((x.shape[1:], x.dtype, x.device) if isinstance(x, Tensor) else x for x in arguments)
            if key not in self._fast:
                self._fast[key] = self.compile_checked(*(x[:FEW] if isinstance(x, Tensor) else x for x in arguments))
            return self._fast[key](*arguments)

    def compile_checked(self, *arguments: Any, backend: str = "inductor") -> Callable[..., Any]:
        """Compile, and compare with eager on these arguments: the compiled function if they agree, else eager."""
        name = self._function.__name__
        function = self._named(f"{name}_{len(self._fast)}")
        compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
        few = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
        for x in few:
            if isinstance(x, Tensor):
                torch._dynamo.mark_dynamic(x, 0)
        try:
            found = compiled(*few)
        except torch.OutOfMemoryError:  # no fault of the compiler's, and a RuntimeError too
            raise
        except (RuntimeError, ImportError, OSError) as error:  # the compiler's own are RuntimeErrors
            log.warning(
                "%s could not be compiled, which costs some memory traffic: %s: %s",
                name,
                type(error).__name__,
                str(error).split("\n", 1)[0],
            )
            return self._function
        if _agree(found, self._function(*few)):
            return compiled
        log.warning("%s compiled gives other results than operation by operation and is left out", name)
        return self._function

    def _named(self, name: str) -> FunctionType:
        """The function to compile under another name: torch counts and limits what it compiles of one function."""
        function = self._compiled
        return FunctionType(
            function.__code__.replace(co_name=name),
            function.__globals__,
            name,
            function.__defaults__,
            function.__closure__,
        )


def _agree(found: Any, right: Any) -> bool:
    """Whether results are alike but for the last bits of intermediate roundings."""
    if isinstance(right, tuple):
        return all(map(_agree, found, right))
    tolerance = 4 * torch.finfo(right.dtype).eps
    return torch.allclose(found, right, rtol=tolerance, atol=tolerance * float(right.abs().max()), equal_nan=True)

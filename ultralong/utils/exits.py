"""Errors that were told already, where they happened."""

from __future__ import annotations


class ChildFailed(RuntimeError):
    """Processes that this one started failed; their message went to standard error. `code` is their exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code

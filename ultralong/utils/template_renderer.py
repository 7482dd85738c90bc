"""Chat templates rendered in a process of their own, where time and memory have a limit that holds.

A template is a program that comes with somebody's checkpoint. Jinja's sandbox keeps it from files and attributes, not
from `'a' * 10**10` or `range(10**9)|list`, which no thread can interrupt. The process is started once and stays, also
when a template has ended what rendered it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from ultralong.utils.processes import answer_of

CHILD = Path(__file__).with_name("template_child.py")
START = 120.0  # seconds for imports, also on a busy machine
LONGEST = 10.0  # seconds that a template may take
SLOWEST = 1_000_000  # and for each so many characters of the conversation, one more
LARGEST = 2**30  # bytes that its process may grow by meanwhile
BYTES = 100  # and for each character of the conversation
CHARACTERS = 2**22  # that it may write
TIMES = 8  # and for each character of the conversation


class _Renderer:
    """The process, once in each process that asks; requests come one after another."""

    def __init__(self) -> None:
        self.lock, self.pid = threading.Lock(), os.getpid()
        self.child: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer; `{"ended": code}` when the process ended instead of giving one."""
        line = json.dumps(request).encode("ascii") + b"\n"
        with self.lock:
            child = self._running()
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                child.stdin.write(line)
                child.stdin.flush()
                answer = answer_of(child, request["seconds"] + START)
            except BrokenPipeError:
                answer = b""
            except BaseException:  # a Ctrl-C between question and answer: the answer would be taken for the next one
                self.stop()
                raise
            with contextlib.suppress(ValueError):  # none, or one that was cut
                found: dict[str, Any] = json.loads(answer)
                return found
            self.stop()
            return {"ended": child.returncode}

    def _running(self) -> subprocess.Popen[bytes]:
        if self.child is None or self.child.poll() is not None:
            self.stop()
            # One thread: what a numeric library's threads reserve would count as its memory.
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self.child = subprocess.Popen(
                [sys.executable, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
        return self.child

    def stop(self) -> None:
        """End the process."""
        if self.child is not None and self.pid == os.getpid():
            self.child.kill()
            with contextlib.suppress(BrokenPipeError):
                self.child.__exit__(None, None, None)  # closes its pipes and waits
            self.child = None


_renderer = _Renderer()
_inherited: list[_Renderer] = []  # of a parent that forked: theirs to use and to end


def _own() -> _Renderer:
    global _renderer
    if _renderer.pid != os.getpid():
        _inherited.append(_renderer)
        _renderer = _Renderer()
    return _renderer


@atexit.register
def _stop() -> None:
    _renderer.stop()


def render_template(template: str, messages: list[dict[str, Any]], **options: Any) -> tuple[str, list[tuple[int, int]]]:
    """A conversation under a template, as transformers renders it.

    Args:
        template: The template's text.
        messages: The conversation; plain values.
        **options: As for transformers' `render_jinja_template`: `add_generation_prompt`, `return_assistant_tokens_mask`
            and variables of the template; plain values.

    Returns:
        The text, and where generation marks begin and end in it, if they were asked for.

    Raises:
        jinja2.TemplateError: The template refuses the conversation, or is wrong.
        ValueError: It takes too long, too much memory, or writes too much.
    """
    from jinja2 import TemplateError

    size = sum(len(str(value)) for message in messages for value in message.values())
    limits = {
        "seconds": LONGEST + size / SLOWEST,
        "memory": LARGEST + size * BYTES,
        "characters": CHARACTERS + size * TIMES,
    }
    kept = [{key: value for key, value in message.items() if value is not None} for message in messages]
    options = {"chat_template": template, **options}
    answer = _own().ask({"messages": kept, "options": options, **limits})
    if "text" in answer:
        return answer["text"], [(begin, end) for begin, end in answer["marks"]]
    if "refused" in answer:
        raise TemplateError(answer["refused"])
    if "large" in answer:
        raise ValueError(f"the chat template writes {answer['large']:,} characters for a conversation of {size:,}.")
    if "memory" in answer or answer["ended"] == -signal.SIGKILL:  # the kernel's own limit
        raise ValueError(f"the chat template takes more than {limits['memory'] / 2**30:.4g} GiB of memory.")
    if answer["ended"] == -signal.SIGALRM:
        raise ValueError(f"the chat template did not end within {limits['seconds']:.4g} s.")
    raise ValueError(f"the chat template ended the process that renders it (exit code {answer['ended']}).")

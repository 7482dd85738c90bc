"""The process that renders chat templates, which come with other people's checkpoints: see `utils.template_renderer`.

Started by its path, it imports nothing of this package. A line of JSON asks, a line of JSON answers. For each request
the kernel limits its memory and, by a timer whose signal nothing here handles, its time: one single operation that runs
on in C, such as `'a' * 10**10`, ends too. What answers is a fork of what has imported all, so that the next one is
there at once when a template has ended it.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose names are no top-level modules

import json
import os
import resource
import signal
from typing import Any, cast


def _own_bytes() -> int:
    """Address space of this process before a template runs."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _limit_memory(most: int | None) -> None:
    """Let this process have so many bytes of address space; None is as many as it likes."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = resource.RLIM_INFINITY if most is None else most
    if hard != resource.RLIM_INFINITY:
        wanted = hard if wanted == resource.RLIM_INFINITY else min(hard, wanted)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


def _answer(request: dict[str, Any], own: int | None) -> dict[str, Any]:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    signal.setitimer(signal.ITIMER_REAL, request["seconds"])
    try:
        if own is not None:
            _limit_memory(own + request["memory"])
        # Annotated as a text, it gives lists for lists.
        texts, marks = cast(Any, render_jinja_template)(conversations=[request["messages"]], **request["options"])
        text = texts[0]
        if len(text) > request["characters"]:
            return {"large": len(text)}
        return {"text": text, "marks": marks[0] if marks else []}
    except MemoryError:
        return {"memory": True}
    except TemplateError as error:
        return {"refused": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever a template's own code raises is told to who asked
        return {"refused": f"{type(error).__name__}: {error}"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if own is not None:
            _limit_memory(None)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode("ascii") + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    """Answer until who asks is gone."""
    import jinja2.sandbox  # noqa: F401 - loaded before its memory is limited
    import transformers.utils.chat_template_utils  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for who asks
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # who asks may ignore it, or handle it and have forked this process
    own = _own_bytes() if sys.platform == "linux" else None
    while (child := os.fork()) != 0:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return
        _say({"ended": code})
    for line in sys.stdin.buffer:
        _say(_answer(json.loads(line), own))


if __name__ == "__main__":
    main()

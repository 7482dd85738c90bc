"""The whole recipe in miniature, on real input: each stage is a method, so that a notebook can walk through them.

A stage leaves its result in the demo's folder and is not done again when it is there, so an interrupted demo goes on.
What the page shows comes from the extension: no training sample of any stage hides a needle farther away than the old
window. Continued pretraining sees long plain text, SFT sees conversations and questions that fit into the old window.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ultralong.demo.page import report
from ultralong.demo.settings import DemoConfig, DemoStage, load
from ultralong.demo.stages import Demo
from ultralong.utils.files import locked

__all__ = ["Demo", "DemoConfig", "DemoStage", "load", "report", "run"]


def run(config: DemoConfig, out: Path, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """All stages in order, then the report.

    Args:
        config: What to do.
        out: Folder of everything that is made; a finished demo there is made anew, an interrupted one goes on.
        say: Told before each stage what comes; printed to standard error by default.

    Returns:
        The content of `report.json`.

    Raises:
        ValueError: `out` holds a demo with other settings, or another process is at it.
    """
    say = say or (lambda text: print(f"\n== {text}", file=sys.stderr, flush=True))
    with locked(out):
        demo = Demo(config, out)
        for title, stage in demo.stages():
            say(title)
            stage()
        say("the report")
        return report(demo)

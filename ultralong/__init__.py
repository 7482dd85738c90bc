"""ultralong: extend a language model's context window from 128K to 4M tokens, and see each step.

The functions below are the public API; `ultralong.api` documents them, and each is the whole of one step:

    >>> from ultralong import extend
    >>> print(extend("miniature", to=1024, out="long", quiet=True).new_window)
    1024

They are loaded when they are first asked for, so that `import ultralong` stays instant; torch is imported when one is
called. Behind them stands one package a step: `ultralong.checkpoints` (a longer window), `ultralong.data` (documents,
tokens, packed rows), `ultralong.attention` (context parallelism), `ultralong.training`, `ultralong.inference`,
`ultralong.evaluation`, `ultralong.planner` and `ultralong.launch`. README.md in this folder draws them.
"""

from typing import TYPE_CHECKING

__version__ = "0.4.0"

if TYPE_CHECKING:
    from ultralong.api import ablate as ablate
    from ultralong.api import check as check
    from ultralong.api import evaluate as evaluate
    from ultralong.api import extend as extend
    from ultralong.api import load_config as load_config
    from ultralong.api import make_attention_context as make_attention_context
    from ultralong.api import merge as merge
    from ultralong.api import needle as needle
    from ultralong.api import pack as pack
    from ultralong.api import perplexity as perplexity
    from ultralong.api import plan as plan
    from ultralong.api import render_launch as render_launch
    from ultralong.api import sft as sft
    from ultralong.api import train as train
    from ultralong.api import verify as verify

_PUBLIC = (
    "ablate",
    "check",
    "evaluate",
    "extend",
    "load_config",
    "make_attention_context",
    "merge",
    "needle",
    "pack",
    "perplexity",
    "plan",
    "render_launch",
    "sft",
    "train",
    "verify",
)
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.api"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})

"""The public API: one function a step, from a checkpoint with a short window to one that was measured at a long one.

    from ultralong import extend, check, pack, plan, train, sft, verify, needle, perplexity, evaluate, render_launch

Every function takes paths and plain values, and returns what the command of the same name reports. The examples in the
docstrings run in this order in one folder, on the model that ships with the package ("miniature", a window of 512
tokens, seconds on a CPU); `texts` there is a folder of documents, `talks.yaml` a recipe of conversations.

These modules import nothing heavy: torch and transformers are imported when a function is called.
"""

from ultralong.api.make import extend, make_attention_context, merge, pack
from ultralong.api.measure import evaluate, needle, perplexity
from ultralong.api.runs import ablate, load_config, plan, render_launch, sft, train
from ultralong.api.verdicts import check, verify

__all__ = [  # noqa: RUF022 - in the order of the steps
    "extend",
    "check",
    "pack",
    "load_config",
    "plan",
    "train",
    "sft",
    "merge",
    "verify",
    "needle",
    "perplexity",
    "evaluate",
    "render_launch",
    "make_attention_context",
    "ablate",
]

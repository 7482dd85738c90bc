"""Sequence-parallel attention: exact, aware of packed documents, for unmodified transformers models.

`import ultralong.attention` registers `attn_implementation="ultralong"` in transformers; `make_attention_context`
decides how one row's attention is distributed; the model is then called with this rank's tokens and
`attention_context=`.
"""

from ultralong.attention.choose import SCHEMES, make_attention_context
from ultralong.attention.collectives import PeerLost
from ultralong.attention.context import AttentionContext
from ultralong.attention.kernels import KERNELS, available_kernels, get_kernel
from ultralong.attention.protocol import AttentionContextLike, AttentionOutputStore
from ultralong.attention.register import NAME
from ultralong.attention.register import register as _register

__all__ = [
    "KERNELS",
    "NAME",
    "SCHEMES",
    "AttentionContext",
    "AttentionContextLike",
    "AttentionOutputStore",
    "PeerLost",
    "available_kernels",
    "get_kernel",
    "make_attention_context",
]

_register()

"""Sequence-parallel attention of other projects, where installed, on the same tensors in the same process group.

Legend: B batch, T tokens a rank holds, H query heads, K kv heads, D head size.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from ultralong.bench.attention.flash2_stand_in import NAME, stand_in, zigzag_module

Attend = Callable[..., Tensor]
PEERS = ("torch-cp-flash", "torch-cp-cudnn", "ring-flash-attn-zigzag")
_TORCH_CP = "torch.distributed.tensor.experimental"


class PeerMissing(RuntimeError):
    """A peer is not installed, or cannot run here."""


@contextmanager
def peer(name: str, tokens: int) -> Iterator[tuple[Attend, str]]:
    """A peer's attention of (B, T, H, D) and (B, T, K, D) tensors in the zigzag layout, and the kernel that it runs on.

    Args:
        name: One of `PEERS`.
        tokens: Length of the whole row.

    Raises:
        PeerMissing: It cannot run here; says why.
    """
    if not torch.cuda.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        raise PeerMissing("peers are measured on two CUDA GPUs or more")
    if name == "ring-flash-attn-zigzag":
        yield _ring_flash_attn()
        return
    backend = SDPBackend.FLASH_ATTENTION if name.endswith("flash") else SDPBackend.CUDNN_ATTENTION
    try:
        context_parallel = importlib.import_module(_TORCH_CP).context_parallel
    except (ImportError, AttributeError) as error:
        raise PeerMissing(f"torch {torch.__version__} has no {_TORCH_CP}.context_parallel") from error
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    row = torch.empty(tokens, device="cuda")  # it learns the length, hence its zigzag balance, from a buffer
    with sdpa_kernel(backend), context_parallel(mesh, buffers=[row], buffer_seq_dims=[0]):
        yield _through_sdpa, f"torch's {'flash' if name.endswith('flash') else 'cuDNN'}"


def _through_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of torch under its context parallelism; kv heads are repeated, since its ring takes as many as q's."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _ring_flash_attn() -> tuple[Attend, str]:
    """ring-flash-attn's zigzag ring on flash-attn 2, or on the same kernels of torch where that is not installed."""
    try:
        own = importlib.util.find_spec(NAME) is not None
    except ModuleNotFoundError:
        own = False
    try:
        with nullcontext() if own else stand_in():
            zigzag = zigzag_module().zigzag_ring_flash_attn_func
    except ImportError as error:
        raise PeerMissing(f"{error.name or error} is not installed (pip install --no-deps ring-flash-attn)") from error
    kernel = "flash-attn 2" if own else "torch's flash-attn 2"
    return lambda q, k, v: zigzag(q, k, v, causal=True, group=dist.group.WORLD), kernel

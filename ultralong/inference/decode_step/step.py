"""A decoding step of a Llama, Mistral, Qwen2 or Qwen3 by fused operations, replayed as one CUDA graph.

B sequences, H query heads, K kv heads, D head size, P ranks, d hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ultralong.attention.collectives import Group
from ultralong.attention.lse_merge import accumulation_dtype
from ultralong.inference.decode_step import plain
from ultralong.inference.decode_step.exchange import Exchange, make_exchange
from ultralong.inference.kv_cache import KvCache, has_plain_layers
from ultralong.rope.tables import RopeTables

KNOWN = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SILU = ("SiLU", "SiLUActivation")
HEAD_SIZES = (64, 128, 256)
APART = 0.2  # of the logits' spread: bfloat16's rounding is about 0.04 for 32 layers of random weights

log = logging.getLogger(__name__)


def unsupported_reason(model: PreTrainedModel) -> str | None:
    """Why a model's steps are not computed here; None where they are."""
    if type(model).__name__ not in KNOWN:
        return f"its architecture, {type(model).__name__}, is not one of {', '.join(KNOWN)}"
    linears = [module for name, module in model.named_modules() if name.endswith(("_proj", "lm_head"))]
    if any(type(module) is not nn.Linear for module in linears):
        return "its projections are not all plain linear layers"
    if len({parameter.dtype for parameter in model.parameters()}) != 1:
        return "its parameters have several types"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "its modules have hooks"
    layers: Any = model.model.layers
    if any(type(layer.mlp.act_fn).__name__ not in SILU for layer in layers):
        return "its feed-forward is not SwiGLU"
    if not has_plain_layers(model):
        return "its layers have sliding windows"
    if not RopeTables(model).same(1, 2**40):
        return "its RoPE follows the length of the text"
    return None


def is_fast(model: PreTrainedModel) -> bool:
    """Whether model, device and packages allow the step by Triton kernels."""
    if model.device.type != "cuda" or model.dtype not in (torch.bfloat16, torch.float16):
        return False
    if importlib.util.find_spec("triton") is None or unsupported_reason(model) is not None:
        return False
    return model.model.layers[0].self_attn.head_dim in HEAD_SIZES


def fast_step(model: PreTrainedModel, cache: KvCache, group: Group | None, exchange: str = "auto") -> DecodeStep | None:
    """The step by Triton kernels, where model, device and packages allow it; exchange as in `make_exchange`."""
    if not is_fast(model):
        return None
    from ultralong.inference.decode_step import kernels

    step = DecodeStep(model, cache, group, kernels, exchange)
    torch.cuda.empty_cache()  # of matrices that are joined now, which would not count as free
    return step


class DecodeStep:
    """Computes the logits behind one more token of each sequence.

    The projections of queries, keys and values become views of one matrix, as those of gate and up: no memory is
    taken, and the model computes what it did.

    Args:
        model: One of `KNOWN`.
        cache: This rank's part of the KV cache, with buffers.
        group: The ranks that share the sequence; None is this one alone.
        operations: `kernels` or `plain`.
        exchange: How ranks join their attention, see `make_exchange`.

    Attributes:
        checked: Whether a step was compared with the model's own code.

    Raises:
        ValueError: As for `make_exchange`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KvCache,
        group: Group | None,
        operations: ModuleType = plain,
        exchange: str = "auto",
    ) -> None:
        self.model, self.cache, self._do = model, cache, operations
        self._exchange: Exchange | None = None
        self._layers = [_Weights(layer) for layer in model.model.layers]
        if group is not None:
            config = model.config.get_text_config()
            part = model.model.layers[0].self_attn.o_proj.in_features + config.num_attention_heads  # H D + H
            self._exchange = make_exchange(exchange, group, len(self._layers), operations, part, model.device)
        self._place = torch.zeros(3, dtype=torch.long, device=model.device)
        self._ids = torch.zeros(1, dtype=torch.long, device=model.device)  # (B,)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)
        self.checked = False
        self._generation = -1  # of the cache's buffers that the graph, or its first step, was made for

    @property
    def exchange(self) -> str:
        """How ranks join their attention, what `auto` chose; empty where there is one rank."""
        return "" if self._exchange is None else self._exchange.way

    @torch.inference_mode()
    def __call__(self, ids: Tensor, position: int, held: int, mine: bool) -> Tensor:
        """Logits (B, V).

        Args:
            ids: (B,) the new token of each sequence.
            position: Its position.
            held: Tokens that this rank held before.
            mine: Whether the new one is held here.

        Raises:
            ValueError: The cache is full.
        """
        self.cache.check_room(held + mine)
        if len(ids) != len(self._ids) or self._generation != self.cache.generation:
            self._graph, self._ids = None, torch.empty_like(ids)
        self._ids.copy_(ids)
        # From memory that is not pinned the few bytes are taken at once, so nothing waits.
        self._place.copy_(torch.tensor([position, held, mine]), non_blocking=True)
        if self._graph is not None:
            self._graph.replay()
            return self._logits.clone()
        if self._generation != self.cache.generation or not ids.is_cuda:
            logits = self._forward()  # kernels are compiled, and collectives set up, outside of a graph
            self._generation = self.cache.generation  # only now: the next step would be captured, whatever failed here
            return logits
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._logits = self._forward()
        self._graph = graph
        graph.replay()
        return self._logits.clone()

    def agrees(self, expected: Tensor, ids: Tensor, position: int, held: int, mine: bool) -> bool:
        """Compute a step that the model's own code has computed; whether logits (B, V) are alike but for rounding.

        Where they are not, or a kernel can't be compiled, a warning says so.
        """
        try:
            found = self(ids, position, held, mine).float()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ImportError, OSError) as error:  # what a compiler raises
            log.warning("decoding by the model's own code, which is slow: %s", str(error).split("\n", 1)[0])
            return False
        apart = float((found - expected.float()).abs().mean() / expected.float().std())
        self.checked = apart < APART
        if not self.checked:
            log.warning("decoding by the model's own code, which is slow: the fused step is %.2g apart from it", apart)
        return self.checked

    def _forward(self) -> Tensor:
        do, decoder = self._do, self.model.model
        x: Tensor = decoder.embed_tokens(self._ids)  # (B, d)
        cos, sin = (y[0, 0] for y in decoder.rotary_emb(x[:, None], self._place[None, :1]))
        delta: Tensor | None = None
        for index, layer in enumerate(self._layers):
            x, y = do.add_norm(x, delta, layer.norm.weight, layer.norm.variance_epsilon)
            qkv = functional.linear(y, layer.qkv, layer.qkv_bias)
            q = do.rotate_and_store(qkv, cos, sin, layer.head_norms, self._place, self.cache.layers[index])
            out = self._attend(q, index, layer.scale)  # (B, H D)
            x, y = do.add_norm(x, layer.output(out), layer.second_norm.weight, layer.second_norm.variance_epsilon)
            delta = layer.down(do.silu_times(functional.linear(y, layer.gate_up, layer.gate_up_bias)))
        norm: Any = decoder.norm
        head: Any = self.model.lm_head
        logits: Tensor = head(do.add_norm(x, delta, norm.weight, norm.variance_epsilon)[1])
        return logits

    def _attend(self, q: Tensor, index: int, scale: float) -> Tensor:
        buffers, exchange = self.cache.layers[index], self._exchange
        if exchange is None:
            out, _ = self._do.attend(q, buffers, self._place, scale)
            return out.to(q.dtype).flatten(1)
        into = exchange.place(index, q.shape, accumulation_dtype(q.dtype), q.device)
        self._do.attend(q, buffers, self._place, scale, into)
        return exchange.joined(q.dtype).flatten(1)


class _Weights:
    """What a step reads of one layer."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm, self.second_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv, self.qkv_bias = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self.gate_up, self.gate_up_bias = _joined([mlp.gate_proj, mlp.up_proj])
        self.output, self.down, self.scale = attention.o_proj, mlp.down_proj, attention.scaling
        self.head_norms: tuple[Tensor, Tensor, float] | None = None
        if hasattr(attention, "q_norm"):
            q_norm, k_norm = attention.q_norm, attention.k_norm
            self.head_norms = q_norm.weight, k_norm.weight, q_norm.variance_epsilon


def _joined(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of linear layers of one input as one, of which theirs become views."""
    weight = torch.cat([linear.weight.data for linear in linears])
    start = 0
    for linear in linears:
        linear.weight.data = weight[start : start + linear.out_features]
        start += linear.out_features
    if linears[0].bias is None:
        return weight, None
    return weight, torch.cat([linear.bias.data for linear in linears])

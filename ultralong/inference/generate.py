"""Generate answers with any runner, and read prompts whose logits or hidden states are wanted.

B batch, T prompt tokens, K tokens kept, d hidden size, V vocabulary.

At a million tokens three things of a plain forward pass do not fit: the (T, V) logits, the MLP's activations for all T
at once, and a KV cache that is copied whenever it grows. Chunks bound the first two; the cache is allocated once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ultralong.attention.register import state_layers
from ultralong.inference.decoding import GREEDY, Generated, Sampler, Sampling, Step, collect, decode, sampler_of
from ultralong.inference.kv_cache import make_cache
from ultralong.inference.local_runner import model_logits
from ultralong.inference.runner import Prompts, Runner
from ultralong.inference.stop_tokens import end_tokens
from ultralong.rope.tables import RopeTables


def check_budgets(max_new_tokens: int | Sequence[int], prompts: int) -> list[int]:
    """Most tokens to add to each of so many prompts.

    Raises:
        ValueError: No prompt, other numbers of prompts and budgets, or a budget below 1.
    """
    budgets = [max_new_tokens] * prompts if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if min(budgets, default=0) < 1 or len(budgets) != prompts:
        raise ValueError(
            f"There must be at least one prompt and max_new_tokens must be at least 1 for each, got {max_new_tokens} "
            f"for {prompts} prompts."
        )
    return budgets


def stream(
    runner: Runner,
    prompts: Prompts,
    max_new_tokens: int | Sequence[int],
    *,
    sampling: Sampling | Sampler = GREEDY,
    stop: Collection[int] | None = None,
) -> Iterator[Step]:
    """Answer prompts step by step: one more token of each with every step.

    Args:
        runner: Reads them. Every rank calls this with the same arguments and takes every step.
        prompts: Token ids, no padding; of one length where the runner reads one length.
        max_new_tokens: Most tokens to add, to all or to each.
        sampling: How tokens are chosen, or what chooses them.
        stop: Ids that end an answer; None takes the model's own.

    Raises:
        ValueError: `max_new_tokens` below 1, or what the runner refuses.
    """
    budgets = check_budgets(max_new_tokens, len(prompts))
    stop = end_tokens(runner.model) if stop is None else stop
    return decode(runner, runner.prefill(prompts, budgets), budgets, stop, sampler_of(sampling))


def generate(
    runner: Runner,
    prompts: Prompts,
    max_new_tokens: int | Sequence[int],
    *,
    sampling: Sampling = GREEDY,
    stop: Collection[int] | None = None,
) -> list[Generated]:
    """Answer prompts, greedily unless told otherwise.

    Greedy answers equal `model.generate(do_sample=False)`, with memory bounded as said on top. Arguments and errors are
    those of `stream`.

    Returns:
        For each prompt its new tokens, and why they ended.
    """
    steps = stream(runner, prompts, max_new_tokens, sampling=sampling, stop=stop)
    return collect(steps, len(prompts))


@torch.inference_mode()
def prefill(model: PreTrainedModel, input_ids: Tensor, *, keep: int = 1, chunk: int | None = None) -> Tensor:
    """Run a prompt through a model and return the logits of its last `keep` positions.

    Args:
        model: A causal language model in eval mode.
        input_ids: (B, T) token ids, no padding.
        keep: How many of the last positions to return logits for.
        chunk: Tokens of one pass; None takes all at once. With chunks the result equals a single pass up to rounding.

    Returns:
        (B, keep, V) logits.

    Raises:
        ValueError: An empty prompt, or `keep` or `chunk` that do not fit it.
    """
    tokens = input_ids.shape[1]
    if not 1 <= keep <= tokens:
        raise ValueError(f"Logits of {keep} positions were asked for from a prompt of {tokens} tokens.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"A prefill chunk must hold at least one token, got {chunk}.")
    cache: Cache | None = None if chunk is None or chunk >= tokens else make_cache(model, tokens)
    chunk, done = tokens if chunk is None else chunk, 0
    with RopeTables(model).at(tokens):
        # The last pass must hold all positions that are kept.
        while tokens - done > max(chunk, keep):
            step = min(chunk, tokens - done - keep)
            model_logits(model, input_ids[:, done : done + step], cache, 1)
            done += step
        return model_logits(model, input_ids[:, done:], cache, keep)


def hidden_states(
    decoder: nn.Module, model: PreTrainedModel, input_ids: Tensor, *, chunk: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Run a text through the layers below the head, chunk by chunk.

    Args:
        decoder: The model below its head.
        model: The whole model, for which a cache is made.
        input_ids: (B, T) token ids, no padding.
        chunk: Tokens of one pass; None takes all at once, and so does a model with layers that carry a state (see
            `LocalRunner`).

    Yields:
        The places of a chunk in the text, and its hidden states (B, t, d).
    """
    tokens = input_ids.shape[1]
    step = tokens if chunk is None or state_layers(model) else min(chunk, tokens)
    cache, rope = make_cache(model, tokens) if step < tokens else None, RopeTables(model)
    for start in range(0, tokens, step):
        part = slice(start, min(start + step, tokens))
        ids = input_ids[:, part].to(model.device)
        with rope.at(tokens):
            out = decoder(input_ids=ids, use_cache=cache is not None, past_key_values=cache)
        yield part, out.last_hidden_state

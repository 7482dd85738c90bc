"""On a GPU: layers with their backward passes written out are as exact as transformers' own, in bfloat16."""

import copy
import logging
import statistics

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ultralong.attention import make_attention_context
from ultralong.training.config import MemoryConfig
from ultralong.training.loss import LanguageModelLoss
from ultralong.training.memory import fused_ops, logits
from ultralong.training.memory.activation_memory import ActivationMemory
from ultralong.training.memory.fused_ops import rms_norm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
TOKENS = 6000


def test_torchs_fused_norm_is_as_exact_as_transformers():
    torch.manual_seed(0)
    norm = LlamaRMSNorm(4096).to("cuda", torch.bfloat16)
    torch.nn.init.normal_(norm.weight, 1.0, 0.2)
    x, dy = (torch.randn(1, 4096, 4096, device="cuda").bfloat16() for _ in range(2))
    leaf, weight = x.double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    y = functional.rms_norm(leaf, (4096,), weight, norm.variance_epsilon)
    exact, found = [y, *torch.autograd.grad(y, [leaf, weight], dy.double())], []
    for way in (norm, lambda x: rms_norm(norm, x)):
        leaf = x.clone().requires_grad_()
        y = way(leaf)
        found.append([y, *torch.autograd.grad(y, [leaf, norm.weight], dy)])
    for theirs, ours, right in zip(*found, exact, strict=True):
        assert (ours - right).norm() <= 1.05 * (theirs - right).norm() + 1e-6 * right.norm()


def rows(count, *sizes, dtype=torch.bfloat16):
    return [torch.randn(count, *size, device="cuda").to(dtype) for size in sizes]


ONE_PASS = {
    "turn": (fused_ops._rotary_compiled, lambda: rows(9001, (32, 128), (128,), (128,))),
    "gate": (fused_ops._swiglu_compiled, lambda: rows(9001, (14336,), (14336,))),
    "gate, back": (fused_ops._swiglu_backward_compiled, lambda: rows(9001, (14336,), (14336,), (14336,))),
    "normalise": (logits.normalise, lambda: rows(2050, (128256,), dtype=torch.float32)),
    "normalise a padded head's": (
        logits.normalise,
        lambda: [functional.pad(*rows(2050, (100278,), dtype=torch.float32), (0, 2), value=-torch.inf)],
    ),
    "loss, back": (
        logits.by_logits,
        lambda: [
            *rows(2050, (128256,), dtype=torch.float32),
            torch.full((2050, 1), 12.0, device="cuda"),
            torch.randint(128256, (2050, 1), device="cuda"),
            torch.bfloat16,
        ],
    ),
}


@pytest.mark.parametrize("name", ONE_PASS)
def test_what_runs_in_one_pass_is_compiled_and_rounds_no_worse(name, caplog):
    way, made = ONE_PASS[name]
    arguments = made()
    wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    exact = way._function(*wide[:-1], torch.float64) if name == "loss, back" else way._function(*wide)
    with caplog.at_level(logging.WARNING, "ultralong"):
        found = way(*arguments)
    assert not [record for record in caplog.records if record.name.startswith("ultralong")]
    assert way._function not in way._fast.values()
    usual = way._function(*arguments)
    results = (found, usual, exact) if isinstance(found, tuple) else ((found,), (usual,), (exact,))
    for ours, theirs, right in zip(*results, strict=True):
        assert (ours - right).norm() <= 1.02 * (theirs - right).norm() + 1e-6 * right.norm()


def gradients(model, memory):
    ids = torch.randint(0, 512, (1, TOKENS), generator=torch.Generator().manual_seed(3)).cuda()
    context = make_attention_context(TOKENS, heads=8, kv_heads=2, store=memory.attention_store if memory else None)
    total, _ = LanguageModelLoss(model, 1024)(
        input_ids=ids,
        labels=ids.roll(-1, 1),
        attention_context=context,
        position_ids=torch.arange(TOKENS, device="cuda")[None],
    )
    total.backward()
    return {name: p.grad.double() for name, p in model.named_parameters()}


def test_written_layers_round_no_worse_than_transformers():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    exact = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="ultralong").cuda()
    theirs = copy.deepcopy(exact).bfloat16()
    ours = copy.deepcopy(theirs)
    for parameter, narrow in zip(exact.parameters(), theirs.parameters(), strict=True):
        parameter.data.copy_(narrow)
    plan = {
        "attention_outputs_on_gpu": 2,
        "attention_outputs_offloaded": 3,
        "checkpoint_every": 3,
        "layer_inputs_offloaded": 1,
    }
    memory = ActivationMemory(ours, MemoryConfig(activation_checkpointing=True, layer_tile=2048, **plan))
    right, usual, found = gradients(exact, None), gradients(theirs, None), gradients(ours, memory)
    ratios = {name: float((found[name] - grad).norm() / (usual[name] - grad).norm()) for name, grad in right.items()}
    assert max(ratios.values()) <= 1.3, "two ways to round differ by chance"
    assert statistics.geometric_mean(ratios.values()) <= 1.1

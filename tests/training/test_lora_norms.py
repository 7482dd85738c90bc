"""Norms that LoRA trains as well run by the operation that a full training's norms run by."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from families import TILED, family_model
from test_families import PLANS, one_pass
from torch.utils._python_dispatch import TorchDispatchMode

from ultralong.training.adapters.config import LoRAConfig
from ultralong.training.adapters.lora import add_adapters
from ultralong.training.memory import fused_ops
from ultralong.training.memory.fused_ops import rms_norm

LORA = LoRAConfig(rank=3, targets=("q_proj", "v_proj", "o_proj"), train_norms=True)
HELD = ".modules_to_save.default"


class Norms(TorchDispatchMode):
    """Counts the fused norm's two operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.name()).startswith("ultralong::rms_norm"):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", TILED)
def test_norms_of_adapters_are_fused_as_those_of_the_model(family):
    """Adapters start with a product of zero: losses and gradients are those of the model."""
    found = []
    for adapted in (False, True):
        model = family_model(family).float()
        model = add_adapters(model, LORA) if adapted else model
        with Norms() as norms:
            found.append((*one_pass(model, PLANS["tiles"]), norms.calls))
    (loss, gradients, calls), (adapters_loss, adapters_gradients, adapters_calls) = found
    assert adapters_calls == calls
    # Gemma's norms have a weight beside one, which no fused operation of ours knows.
    assert set(calls) == (set() if family == "Gemma3" else {"ultralong::rms_norm", "ultralong::rms_norm_backward"})
    assert adapters_loss == pytest.approx(loss, rel=1e-6)
    trained = {name.replace(HELD, ""): grad for name, grad in adapters_gradients.items() if HELD in name}
    assert len(trained) >= 5
    for name, grad in trained.items():
        assert (grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm(), name


@pytest.mark.parametrize("family", TILED)
def test_what_the_fused_norm_takes_computes_what_it_does(family):
    """Each norm of each family, by its own forward pass."""
    model = family_model(family).float()
    norms = {name: module for name, module in model.named_modules() if "norm" in name.rpartition(".")[2]}
    assert len(norms) >= 5
    for name, norm in norms.items():
        x = torch.randn(3, 7, norm.weight.numel())
        torch.testing.assert_close(
            rms_norm(norm, x), norm(x), rtol=1e-5, atol=1e-6, msg=lambda said, n=name: f"{n}: {said}"
        )


def test_the_norm_in_use_is_the_one_that_computes():
    """Of peft's copies the active one, and the original where adapters are switched off."""
    model = add_adapters(family_model("Qwen3").float(), LORA)
    norm = model.model.layers[0].input_layernorm
    torch.nn.init.normal_(norm.modules_to_save["default"].weight)
    x = torch.randn(2, 5, norm.weight.numel())
    for enabled in (True, False):
        norm.enable_adapters(enabled)
        kept = norm.modules_to_save["default"] if enabled else norm.original_module
        assert fused_ops._in_use(norm) is kept
        torch.testing.assert_close(rms_norm(norm, x), norm(x), rtol=1e-5, atol=1e-6)
    norm.enable_adapters(True)
    norm.set_adapter([])
    assert fused_ops._in_use(norm) is norm.original_module
    torch.testing.assert_close(rms_norm(norm, x), norm(x), rtol=1e-5, atol=1e-6)
    norm.forward = lambda x: x + 1
    assert torch.equal(rms_norm(norm, x), x + 1)

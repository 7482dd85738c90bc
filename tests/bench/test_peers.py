"""Peers: ring-flash-attn on the stand-in for flash-attn 2, and what is left behind of it."""

import importlib.util
import sys

import pytest
import torch
from attention_yardstick import plain_attention, random_qkv, relative, visible
from test_kernel_calls import STAND_INS
from transformers import LlamaConfig

from ultralong.bench.attention import flash2_stand_in
from ultralong.bench.attention.flash2_stand_in import NAME
from ultralong.bench.attention.peers import PeerMissing, _ring_flash_attn
from ultralong.bench.tables import attention_table
from ultralong.bench.training.measure import TrainingCase
from ultralong.bench.training.peers import measure_peer
from ultralong.bench.training.work import random_model

ZIGZAG = """
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward
from .utils import scale

def zigzag_ring_flash_attn_func(q, k, v, causal, group):
    return _flash_attn_forward(q, k, v, 0.0, scale, causal, -1, -1, 0.0, None, False)[0]
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with ring-flash-attn's names, whose own adapter can't be imported."""
    folder = tmp_path / "ring_flash_attn"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('transformers has changed')")
    (folder / "zigzag_ring_flash_attn.py").write_text(ZIGZAG)
    (folder / "utils.py").write_text("scale = 0.4")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(flash2_stand_in, "_aten", STAND_INS["torch"])
    yield
    for name in [name for name in sys.modules if name.startswith("ring_flash_attn")]:
        del sys.modules[name]


def test_the_zigzag_ring_runs_on_torchs_kernels_and_nothing_stays_behind(package):
    q, k, v, _ = random_qkv(0, 1, 12, 12, 4, 2, 8)
    attend, kernel = _ring_flash_attn()
    assert kernel == "torch's flash-attn 2"
    expected, _ = plain_attention(q, k, v, visible(12, 12), scale=0.4)
    assert relative(attend(q, k, v), expected) <= 1e-12
    assert not {"flash_attn", NAME, "ring_flash_attn"} & set(sys.modules)


def test_the_stand_ins_gradients_are_attentions(package):
    q, k, v, dout = random_qkv(0, 2, 12, 12, 4, 2, 8)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected, _ = plain_attention(*leaves, visible(12, 12), scale=0.4)
    expected.backward(dout)
    options = (0.0, 0.4, True, -1, -1, 0.0, None)
    out, lse, *_ = flash2_stand_in._flash_attn_forward(q, k, v, *options, False)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    flash2_stand_in._flash_attn_backward(dout, q, k, v, out, lse, *grads, *options, False)
    assert max(relative(grad, leaf.grad) for grad, leaf in zip(grads, leaves)) <= 1e-12
    with pytest.raises(ValueError, match=r"'softcap': 5.0\}: install flash-attn 2"):
        flash2_stand_in._flash_attn_forward(q, k, v, 0.0, 0.4, True, -1, -1, 5.0, None, False)


def test_a_peer_that_is_not_there_is_named():
    with pytest.raises(PeerMissing, match="ring_flash_attn is not installed"):
        _ring_flash_attn()


def test_peers_stand_in_the_column_of_their_scheme():
    results = [
        {"name": name, "kernel": "torch's flash-attn 2", "tokens": 4096, "packed": False, "tflops": 5.2}
        for name in ("torch-cp-cudnn", "ring-flash-attn-zigzag")
    ]
    assert attention_table([{"options": {"lengths": [4096]}, "results": results}])[2:] == [
        "| 4,096 | whole | torch context_parallel, cuDNN | | | 5 | |",
        "| 4,096 | whole | ring-flash-attn on torch's flash-attn 2 | | | | 5 |",
    ]


def test_deepspeeds_training_runs_or_says_what_is_missing(tmp_path, monkeypatch):
    """Two processes on a CPU; with DeepSpeed installed its losses are those of one process."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ).save_pretrained(tmp_path / "model")
    row = measure_peer("deepspeed-alst", TrainingCase(str(tmp_path / "model"), 256, None, gpus=2), tmp_path)
    assert (row["peer"], row["tokens"], row["gpus"]) == ("deepspeed-alst", 256, 2)
    if importlib.util.find_spec("deepspeed") is None:
        assert "deepspeed" in row["note"]
        return
    model = random_model(str(tmp_path / "model"), torch.device("cpu"), "eager", torch.float32)
    ids = torch.randint(0, 256, (1, 256), generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy(model(ids).logits[0], ids.roll(-1, 1)[0])
    assert row["losses"][0] == pytest.approx(loss.item(), rel=2e-3), "in bfloat16"

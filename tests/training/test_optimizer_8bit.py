"""AdamW's states in 8 bits (torchao): they train as float32 states do, and a checkpoint of them loads on any mesh.

torchao is no part of the development extra; with it on the path (pip install 'ultralong[optim]') these run.
"""

import importlib.util
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_parallel import assert_same_curves, run
from test_train import config, curve, made, weights  # noqa: F401 - fixtures
from torch import nn
from torch._inductor import config as inductor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ultralong.launch.local import launch_local
from ultralong.training.config import OptimizerConfig, ParallelConfig
from ultralong.training.loop import train
from ultralong.training.memory.states_8bit import adamw_8bit, check_even_shards, plain_tensor_states
from ultralong.training.model import make_optimizer
from ultralong.training.run_folder import RunFolder
from ultralong.utils import settings
from ultralong.utils.local_ranks import run_ranks

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed: pip install 'ultralong[optim]'"
)


@pytest.fixture
def narrow(config, monkeypatch):  # noqa: F811
    """The tiny run with 8-bit states; without the compiler, which would take longer than the run."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    torch.compiler.set_stance("force_eager")
    yield replace(config, optimizer=replace(config.optimizer, state_precision="8bit"))
    torch.compiler.set_stance("default")


@needs_torchao
@pytest.mark.slow
def test_eight_bits_train_as_float32_does(narrow, tmp_path):
    wide = replace(
        narrow, optimizer=replace(narrow.optimizer, state_precision="float32"), out=str(tmp_path / "wide"), steps=20
    )
    train(wide, quiet=True)
    train(replace(narrow, steps=20), quiet=True)
    assert curve(narrow) == pytest.approx(curve(wide), rel=0.01)
    assert curve(narrow) != curve(wide)


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_a_cut_run_with_eight_bit_states_resumes_to_the_bit(narrow, tmp_path, background):
    narrow = replace(narrow, async_checkpoints=background)
    train(narrow, quiet=True)
    cut = replace(narrow, out=str(tmp_path / "cut"))
    shutil.copytree(narrow.out, cut.out, ignore=shutil.ignore_patterns("model", "result.json", "step-0000006"))
    train(cut, resume=True, quiet=True)
    assert curve(cut) == curve(narrow)
    for name, tensor in weights(narrow).items():
        assert torch.equal(tensor, weights(cut)[name]), name


@needs_torchao
@pytest.mark.slow
def test_eight_bit_states_go_on_on_another_mesh(narrow, made, make_tiny_model, tiny_tokenizer, tmp_path):  # noqa: F811
    """Saved by two processes that share the parameters, loaded by four; the shares stay large enough for 8 bits."""
    model = make_tiny_model(vocab_size=len(tiny_tokenizer), max_position_embeddings=128, intermediate_size=256)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    two = run(
        replace(narrow, model=str(tmp_path / "model")),
        tmp_path,
        2,
        parallel=ParallelConfig(context_parallel_size=2, fsdp_shard_degree=2),
    )
    four = replace(
        two, out=str(tmp_path / "four"), parallel=ParallelConfig(context_parallel_size=2, fsdp_shard_degree=4)
    )
    shutil.copytree(two.out, four.out, ignore=shutil.ignore_patterns("model", "result.json", "step-0000006"))
    assert [step for step, _ in RunFolder(tmp_path / "four").checkpoints()] == [3]
    settings.save(four, tmp_path / "four.yaml")
    launch_local(tmp_path / "four.yaml", processes=4, resume=True, quiet=True)
    assert_same_curves(four, two, 6)


@needs_torchao
def test_plain_tensors_are_the_states_themselves(narrow):
    model = nn.Linear(256, 64, bias=True)
    optimizer = make_optimizer(model, narrow.optimizer)
    model(torch.randn(4, 256)).square().sum().backward()
    optimizer.step()
    named = dict(zip(("weight", "bias"), (optimizer.state[p] for p in (model.weight, model.bias)), strict=True))
    split = plain_tensor_states({"state": named, "param_groups": []})["state"]
    assert {"exp_avg.codes", "exp_avg.scale", "exp_avg_sq.codes", "exp_avg_sq.scale", "step"} == set(split["weight"])
    assert set(split["bias"]) == {"exp_avg", "exp_avg_sq", "step"}, "vectors keep float32"
    split["weight"]["exp_avg.scale"].zero_()
    assert named["weight"]["exp_avg"].dequantize().abs().max() == 0


def test_no_kernel_of_an_update_is_timed(monkeypatch):
    """To time one, torch's compiler may copy the largest matrix to the host's memory, three times in float32."""

    class Base(torch.optim.SGD):
        timed: list[bool]

        def _new_buffer(self, p, signed):
            return p

        def step(self, closure=None):
            self.timed.append(inductor.triton.autotune_pointwise)
            return super().step(closure)

    monkeypatch.setitem(sys.modules, "torchao.optim", SimpleNamespace(AdamW8bit=Base))
    monkeypatch.setattr(inductor.triton, "autotune_pointwise", True)
    parameter = nn.Parameter(torch.ones(4))
    optimizer = adamw_8bit()([parameter], lr=0.5)
    optimizer.timed = []
    parameter.grad = torch.ones(4)
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
    assert (optimizer.timed, inductor.triton.autotune_pointwise) == ([False], True)
    assert parameter.tolist() == [0.5] * 4


def test_a_missing_torchao_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ImportError, match=r"ultralong\[optim\]"):
        make_optimizer(nn.Linear(4, 4), OptimizerConfig(state_precision="8bit"))


def test_uneven_shares_are_refused():
    """Rows that do not divide over the processes would cut blocks apart."""
    run_ranks(_check_rows, 2, 101)
    assert run_ranks(_check_rows, 2, 102) == ["fits", "fits"]


def _check_rows(rank, world, rows):
    mesh = init_device_mesh("cpu", (world,))
    parameter = nn.Parameter(distribute_tensor(torch.zeros(rows, 128), mesh, [Shard(0)]))
    if rows % world == 0:
        check_even_shards([parameter])
        return "fits"
    with pytest.raises(ValueError, match=r"shape \(101, 128\) over 2 processes"):
        check_even_shards([parameter])
    return None

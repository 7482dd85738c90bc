"""Peers: ring-flash-attn on the stand-in for flash-attn 2, and what is left behind of it."""

import importlib.metadata
import importlib.util
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_yardstick import plain_attention, random_qkv, relative, visible
from test_kernel_calls import STAND_INS
from transformers import LlamaConfig, Qwen2Config

from ultralong.bench.attention import flash2_stand_in
from ultralong.bench.attention.flash2_stand_in import NAME
from ultralong.bench.attention.peers import PeerMissing, _ring_flash_attn
from ultralong.bench.tables import attention_table, training_table
from ultralong.bench.training.case import TrainingCase
from ultralong.bench.training.peers import measure as peers
from ultralong.bench.training.peers.alst import engine_settings
from ultralong.bench.training.peers.measure import OURS, PEERS, measure_peer, rows_of, wanted_peers
from ultralong.bench.training.peers.titan import job_settings, llama_settings
from ultralong.bench.training.peers.trl_sft import sft_settings, sft_train
from ultralong.bench.training.ranks import failure, start_ranks
from ultralong.bench.training.work import WARM, prepare_training, random_model
from ultralong.cli.bench import train
from ultralong.planner.shapes import model_config
from ultralong.utils.files import read_json, write_json

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
        "| 4,096 | whole | torch context_parallel, cuDNN |  |  | 5 |  |",
        "| 4,096 | whole | ring-flash-attn on torch's flash-attn 2 |  |  |  | 5 |",
    ]


LLAMA = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def case(tmp_path):
    LlamaConfig(**LLAMA).save_pretrained(tmp_path / "model")
    return TrainingCase(str(tmp_path / "model"), 256, None, gpus=2, steps=1)


def loss_of_one_process(model: str, seed: int = 0) -> float:
    ids = torch.randint(0, 256, (1, 256), generator=torch.Generator().manual_seed(seed))
    logits = random_model(model, torch.device("cpu"), "eager", torch.float32)(ids).logits
    return torch.nn.functional.cross_entropy(logits[0], ids.roll(-1, 1)[0]).item()


@pytest.mark.parametrize("name", ["deepspeed-alst", "deepspeed-alst-offload", "deepspeed-alst-offload-all"])
def test_deepspeeds_training_runs_or_says_what_is_missing(case, tmp_path, monkeypatch, name):
    """Two processes on a CPU; with DeepSpeed installed its losses are those of one process."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    row = measure_peer(name, case, tmp_path)
    assert (row["peer"], row["tokens"], row["gpus"]) == (name, 256, 2)
    assert row["versions"]["accelerate"] == importlib.metadata.version("accelerate")
    if importlib.util.find_spec("deepspeed") is None:
        assert row["note"] == "deepspeed is not installed (pip install deepspeed)"
        return
    assert row["versions"]["deepspeed"] == importlib.metadata.version("deepspeed")
    assert len(row["steps"]) == (2 if "offload" in name else 3)
    assert row["seconds_per_step"] >= row["steps"][-1], "the slower process counts"
    assert row["peak_host_gib"] > 0
    assert row["losses"][0] == pytest.approx(loss_of_one_process(case.model), rel=2e-3), "in bfloat16"


def test_deepspeeds_own_offload_is_in_its_config():
    host = {"device": "cpu", "pin_memory": True}
    assert engine_settings(2)["zero_optimization"] == {"stage": 3}
    assert engine_settings(2, offload_optimizer=True)["zero_optimization"] == {"stage": 3, "offload_optimizer": host}


def test_a_refusal_is_a_row_with_the_peers_own_message_and_the_steps_before_it(case, tmp_path, monkeypatch):
    said = "[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 62.62 GiB."
    asked = []

    def refuse(gpus, module, *words, limit):
        asked.append((gpus, words[0], words[3], limit))
        for rank in range(gpus):
            done = {"times": [2.5], "losses": [6.2], "peaks": {"peak_gpu_gib": (130 + rank) << 30}}
            write_json(Path(words[2]) / f"rank-{rank}.json", done)
        return {"note": failure(said), "messages": said}

    monkeypatch.setattr(peers, "start_ranks", refuse)
    row = measure_peer("torch-cp-cudnn", case, tmp_path, limit=60.0)
    assert asked == [(2, "torch-cp-cudnn", "256,256,256", 60.0)]
    assert row["note"] == said.removeprefix("[rank1]: ")
    assert (row["steps"], row["peak_gpu_gib"]) == ([2.5], 131.0)
    assert "seconds_per_step" not in row
    assert training_table([{"rows": [row]}])[2:] == ["| model | 2 | 256 | torch-cp-cudnn | out of memory |  |  |  |  |"]


def test_short_rows_come_first_and_a_whole_one_where_a_length_is_compiled_or_pinned():
    case = TrainingCase("M", 262144, gpus=2, steps=2)
    assert rows_of("deepspeed-alst", case) == (WARM, WARM, 262144, 262144)
    assert rows_of("torchtitan-cp", case) == rows_of("deepspeed-alst-offload", case) == (262144,) * 3
    warmed = replace(case, warm_steps=1)
    assert rows_of("trl-sft-cp", warmed) == (WARM, WARM, 262144, 262144, 262144)
    assert rows_of("torchtitan-cp", warmed) == (262144,) * 3


def test_the_measured_steps_count_and_an_error_in_ending_is_none(case, tmp_path, monkeypatch):
    def ended_badly(gpus, module, *words, limit):
        for rank in range(gpus):
            done = {"times": [9.0, 8.0, 2.5 + rank], "losses": [6.2] * 3, "peaks": {"peak_host_gib": 1 << 30}}
            write_json(Path(words[2]) / f"rank-{rank}.json", done)
        return {"note": "exit code 1", "messages": "terminate called without an active exception"}

    monkeypatch.setattr(peers, "start_ranks", ended_badly)
    row = measure_peer("torch-cp-flash", case, tmp_path)
    assert (row["seconds_per_step"], row["steps"], row["warm_up_tokens"]) == (3.5, [9.0, 8.0, 2.5], 256)
    assert "note" not in row


def test_torchruns_own_error_is_not_taken_for_a_peers():
    ours = "AssertionError: Torch not compiled with CUDA enabled\n"
    assert failure(ours + "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n") == ours.strip()


def test_processes_past_their_limit_are_ended_and_what_they_did_is_kept(tmp_path, monkeypatch):
    (tmp_path / "endless.py").write_text(
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    found = start_ranks(1, "endless", str(tmp_path), limit=20)
    assert found["note"] == "stopped after its limit of 20 s"
    process = int((tmp_path / "0").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_what_is_measured_can_be_named():
    assert wanted_peers(()) == (OURS, *PEERS)
    assert wanted_peers(("torchtitan-cp", "ours")) == (OURS, "torchtitan-cp")
    with pytest.raises(ValueError, match=r"of ours, torch-cp-flash, .*; found megatron"):
        wanted_peers(("ours", "megatron"))
    with pytest.raises(ValueError, match="--only and --peer-limit go with --peers"):
        train(TrainingCase(gpus=2), only=("ours",))
    with pytest.raises(ValueError, match="two GPUs or more"):
        train(TrainingCase(gpus=1), peers=True)
    with pytest.raises(ValueError, match="--capped holds ultralong's processes alone"):
        train(TrainingCase(gpus=2, gpu_memory=24.0, capped=True), peers=True, only=("trl-sft-cp",))
    assert all(name in train.__doc__ for name in (OURS, *PEERS)), "the help names each"


def test_rows_of_peers_are_appended_as_they_come(tmp_path, monkeypatch, capsys):
    made = []

    def measured(name, case, folder, limit):
        made.append((name, limit, len(read_json(tmp_path / "rows.json")["rows"]) if made else 0))
        return {"peer": name, "model": "M", "tokens": case.tokens, "gpus": 2, "gpu": "G", "note": "refused"}

    monkeypatch.setattr(peers, "measure_peer", measured)
    names = ("torch-cp-cudnn", "trl-sft-cp")
    case = TrainingCase(gpus=2)
    train(case, lengths=(256,), peers=True, only=names, peer_limit=9.0, json=tmp_path / "rows.json")
    assert made == [("torch-cp-cudnn", 9.0, 0), ("trl-sft-cp", 9.0, 1)]
    assert [row["peer"] for row in read_json(tmp_path / "rows.json")["rows"]] == list(names)


def test_trls_trainer_is_set_up_as_its_guide_says_and_takes_steps(tmp_path):
    pytest.importorskip("trl")
    sft = sft_settings("out", 512, 3, "LlamaDecoderLayer", 2)
    assert sft["fsdp_config"]["version"] == 2
    assert sft["fsdp_config"]["activation_checkpointing"]
    assert sft["parallelism_config"].cp_size == 2
    assert sft["pad_to_multiple_of"] == 4
    assert not sft["packing"]
    LlamaConfig(**LLAMA).save_pretrained(tmp_path / "model")
    made = prepare_training(tmp_path, str(tmp_path / "model"), None, [256])["model"]
    rows, found = [torch.randint(0, 256, (1, 256), generator=torch.Generator().manual_seed(0))], []
    sft_train(made, 256, rows, str(tmp_path / "run"), lambda seconds, loss: found.append((seconds, loss)))
    model = random_model(made, torch.device("cpu"), "eager", torch.float32)
    expected = torch.nn.functional.cross_entropy(model(rows[0]).logits[0, :-1], rows[0][0, 1:]).item()
    assert len(found) == 1
    assert found[0][0] > 0
    assert found[0][1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B"])
def test_torchtitans_llama_has_the_shape(name):
    config = model_config(name)
    found = llama_settings(config)
    # As torchtitan rounds: two thirds of four hidden sizes, times the factor, up to the multiple.
    width = int(found["ffn_dim_multiplier"] * int(2 * 4 * found["dim"] / 3))
    assert math.ceil(width / found["multiple_of"]) * found["multiple_of"] == config.intermediate_size
    assert (found["dim"], found["n_layers"]) == (config.hidden_size, config.num_hidden_layers)
    job = job_settings("model", 262144, 2, 2, "out")
    assert job["parallelism"] == {"context_parallel_degree": 2}
    assert job["training"]["seq_len"] == 262144
    with pytest.raises(ValueError, match="trains Llama's shapes, found qwen2"):
        llama_settings(Qwen2Config())
    if importlib.util.find_spec("torchtitan"):
        from torchtitan.config import JobConfig

        assert all(hasattr(getattr(JobConfig(), part), key) for part, values in job.items() for key in values)

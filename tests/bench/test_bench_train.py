"""`ultralong bench train`: a measured row beside its plan, what its kernels took, and the README's table of rows."""

import json
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ultralong import __version__
from ultralong.bench.attention.measure import documents
from ultralong.bench.tables import training_table
from ultralong.bench.training import measure, ranks, work
from ultralong.bench.training.measure import TrainingCase, by_kind, measure_training
from ultralong.bench.training.ranks import failure
from ultralong.bench.training.tables import capped_table, measured_line, packed_table
from ultralong.bench.training.work import covered
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.training.config import DataSource, MemoryConfig, TrainConfig
from ultralong.utils import settings
from ultralong.utils.files import read_json
from ultralong.utils.units import GIB


@pytest.fixture
def machine(tmp_path):
    """An H200 with 2 GiB: on a real one the longest row of so small a model has millions of documents."""
    path = tmp_path / "small.json"
    known = read_json(resources.files("ultralong.planner") / "machines" / "h200.json")
    known["machine"]["memory_gib"] = 2.0
    path.write_text(json.dumps(known))
    return str(path)


def test_a_measured_row_has_what_others_rely_on(tmp_path, make_tiny_model, python, monkeypatch, machine):
    monkeypatch.setattr(ranks, "sys", SimpleNamespace(executable=python))
    model = make_tiny_model()
    model.save_pretrained(tmp_path / "tiny")
    memory = MemoryConfig(activation_checkpointing=True)
    case = TrainingCase(str(tmp_path / "tiny"), 96, documents=5, steps=2, profile=True, memory=memory)
    row = measure_training(case, machine, tmp_path / "made")
    (made,) = (tmp_path / "made").glob("rows-96-of-5-????????")
    rows = PackedRows(made)
    assert [rows[number].boundaries.tolist() for number in (0, 1)] == [list(documents(96, 5))] * 2
    assert "note" not in row, row
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    assert (row["tokens"], row["documents"], row["gpus"], len(row["steps"])) == (96, 5, 1, 2)
    assert row["profiled_seconds"] > 0.9 * sum(row["kinds"].values())
    for name in ("seconds_per_step", "tokens_per_second_per_gpu", "peak_host_gib", "planned_seconds_per_step", "loss"):
        assert row[name] > 0, name
    assert {"torch", "ultralong"} <= row["versions"].keys()
    seconds = [kernel["seconds"] for kernel in row["kernels"]]
    assert seconds == sorted(seconds, reverse=True)
    assert sum(row["kinds"].values()) >= 0.99 * sum(seconds) > 0
    assert row["kinds"]["matrix products"] > 0
    assert "matrix products" in measured_line(row)


def test_documents_are_of_the_lengths_given_over_and_over(tmp_path, make_tiny_model, python, monkeypatch, machine):
    monkeypatch.setattr(ranks, "sys", SimpleNamespace(executable=python))
    make_tiny_model().save_pretrained(tmp_path / "tiny")
    case = TrainingCase(str(tmp_path / "tiny"), 96, document_lengths=(40, 7), warm_steps=1, steps=1)
    row = measure_training(case, machine, tmp_path / "made")
    (made,) = (tmp_path / "made").glob("rows-96-of-5-????????")
    assert [PackedRows(made)[number].boundaries.tolist() for number in (0, 1)] == [[0, 40, 47, 87, 94, 96]] * 2
    assert "note" not in row, row
    assert (row["documents"], row["warm_steps"], len(row["steps"])) == (5, 1, 1)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_is_stopped_after_its_last_step_has_measured(
    tmp_path, make_tiny_model, python, monkeypatch, machine, steps
):
    monkeypatch.setattr(ranks, "sys", SimpleNamespace(executable=python))
    make_tiny_model().save_pretrained(tmp_path / "tiny")

    def stopped(gpus, module, run, *words):
        assert ranks.start_ranks(gpus, module, run, *words) == {}
        log = Path(run, "log.jsonl")
        log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:steps]))
        return {"note": "exit code -15", "messages": "ended by a signal"}

    monkeypatch.setattr(measure, "start_ranks", stopped)
    row = measure_training(TrainingCase(str(tmp_path / "tiny"), 96, steps=2), machine, tmp_path / "made")
    if steps == 2:
        assert (row["ended"], len(row["steps"]), "note" in row) == ("exit code -15", 2, False)
        assert row["seconds_per_step"] > 0 < row["peak_host_gib"]
    else:  # one of two steps is no measurement
        assert (row["note"], "steps" in row, "seconds_per_step" in row) == ("exit code -15", False, False)


@pytest.mark.parametrize("wrong", [{"document_lengths": (0,)}, {"documents": 2, "document_lengths": (3,)}])
def test_documents_that_no_row_can_hold_are_refused(wrong):
    with pytest.raises(ValueError, match=r"document_lengths must be 1 or more, and go without"):
        TrainingCase(**wrong)


def test_a_cap_needs_a_size_and_a_gpu_as_large(monkeypatch):
    with pytest.raises(ValueError, match=r"capped holds a process to gpu_memory GiB: say how many"):
        TrainingCase(capped=True)
    with pytest.raises(ValueError, match=r"can't be held to 24 GiB of a GPU: there are 0\.0"):
        work.hold_to(24.0)
    total, held = 141 * GIB, []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (130 * GIB, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 9.5 * GIB)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", held.append)
    work.hold_to(24.0)  # 1.5 GiB are the context's
    assert held == [pytest.approx(22.5 / 141)]
    with pytest.raises(ValueError, match=r"can't be held to 142 GiB of a GPU: there are 141\.0"):
        work.hold_to(142.0)


def test_a_capped_run_is_held_before_its_model_is_made_and_again_when_it_is_warm(monkeypatch, tmp_path):
    done = []
    run = SimpleNamespace(memory=SimpleNamespace(host_bytes=0))
    monkeypatch.setattr(work, "connect", lambda config: nullcontext(SimpleNamespace(barrier=list, is_main=False)))
    monkeypatch.setattr(work, "hold_to", done.append)
    monkeypatch.setattr(work, "warmed_up", lambda *arguments: done.append("warm") or run)
    monkeypatch.setattr(work, "training_step", lambda *arguments: done.append("step"))
    settings.save(TrainConfig("model", str(tmp_path), (DataSource("rows"),), steps=1), tmp_path / "config.yaml")
    work.work(tmp_path, "short", cap=24.0)
    work.work(tmp_path, "short")
    assert done == [24.0, "warm", 24.0, "step", "warm", "step"]


def test_a_capped_case_is_planned_for_its_memory_and_says_so(tmp_path, make_tiny_model, monkeypatch, machine):
    make_tiny_model().save_pretrained(tmp_path / "tiny")
    asked, planned, made_plan = [], [], measure.plan

    def stopped(gpus, module, *words, **options):
        asked.append(words[2:])
        return {"note": "torch.OutOfMemoryError: CUDA out of memory"}

    def plan(config, gpus, **options):
        planned.append(options["gpu_memory"])
        return made_plan(config, gpus, **options)

    monkeypatch.setattr(measure, "start_ranks", stopped)
    monkeypatch.setattr(measure, "plan", plan)
    case = TrainingCase(str(tmp_path / "tiny"), 96, steps=1, gpu_memory=1.5, capped=True)
    row = measure_training(case, machine, tmp_path / "made")
    assert (asked, planned, row["capped_gpu_gib"]) == ([("warm=1", "cap=1.5")], [1.5], 1.5)
    free = measure_training(replace(case, capped=False), machine, tmp_path / "made")
    assert asked[1] == ("warm=0",)
    assert "capped_gpu_gib" not in free
    lines = capped_table([{"rows": [row]}])
    assert lines[2:] == ["| tiny | all | 1.5 GiB | 96 | out of memory |  |  |  |"]


CAPPED = {
    "model": "M",
    "tokens": 24576,
    "gpus": 1,
    "gpu": "NVIDIA H200",
    "versions": {"ultralong": __version__},
    "lora": "rank 16, alpha 16",
    "capped_gpu_gib": 24.0,
    "planned_total_gpu_gib": 23.35,
    "planned_seconds_per_step": 3.75,
    "planned_peak_gpu_gib": 21.7,
    "planned_peak_host_gib": 14.94,
    "seconds_per_step": 4.0,
    "tokens_per_second_per_gpu": 6144.0,
    "mfu_causal": 0.3,
    "peak_gpu_gib": 21.5,
    "reserved_gpu_gib": 22.5,
    "context_gpu_gib": 1.25,
    "peak_host_gib": 14.0,
}


def test_a_capped_row_says_whose_memory_and_whose_seconds_it_has():
    said = measured_line(CAPPED)
    assert "held to 24 GiB of the GPU, took 23.8: the memory is such a card's, the seconds are this GPU's" in said
    assert capped_table([{"rows": [CAPPED]}])[2:] == [
        "| M | LoRA, rank 16 | 24 GiB | 24,576 | 23.8 (23.4) | 21.5 + 1.2 | 14.0 (14.9) | 4.0 (3.8) on NVIDIA H200 |"
    ]
    assert "took 24.4: the memory is 0.40 more, by what the driver came to hold" in measured_line(
        CAPPED | {"reserved_gpu_gib": 23.1, "context_gpu_gib": 1.3}
    )
    assert "ours, LoRA of rank 16, held to 24 GiB" in training_table([{"rows": [CAPPED]}])[2]
    assert capped_table([]) == packed_table([]) == []


def test_packed_rows_stand_beside_their_plan():
    row = {
        "model": "M",
        "tokens": 131072,
        "documents": 32,
        "kernel": "cudnn",
        "seconds_per_step": 3.3,
        "planned_seconds_per_step": 3.0,
        "mfu_causal": 0.4,
        "kinds": {"attention": 1.0, "matrix products": 1.5, "copies": 0.25, "all else": 0.25},
        "idle_seconds": 0.125,
    }
    assert packed_table([{"rows": [row]}])[2:] == [
        "| M | 131,072 | 32 masked documents | cuDNN | 3.30 (3.00) | 110.0% | 40.0% | 1.00 | 1.50 | 0.50 | 0.12 |"
    ]
    lost = {name: row[name] for name in ("model", "tokens", "kernel")} | {"note": "CUDA out of memory"}
    assert packed_table([{"rows": [lost, {**lost, "note": "rank 0 ended"}]}])[2:] == [
        f"| M | 131,072 | whole | cuDNN | {said} |  |  |  |  |  |  |" for said in ("out of memory", "stopped")
    ]


def test_kernels_beside_each_other_are_counted_once():
    assert covered([(5, 7), (0, 2), (1, 3), (5.5, 6), (7, 8)]) == 3 + 3
    assert covered([]) == 0


def test_kernels_are_told_apart_by_name():
    names = {
        "kernel_cutlass_kernel_flash_attn_cute_flash_bwd_sm90FlashAttentionBackwardSm90": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention",
        "nvjet_sm90_tst_128x256_64x4": "matrix products",
        "ncclDevKernel_SendRecv": "exchange between GPUs",
        "Memcpy DtoH (Device -> Pinned)": "copies",
        "aten::addmm": "matrix products",
        "void at::native::GammaBetaBackwardCUDAKernel": "all else",
    }
    assert by_kind([{"name": name, "seconds": 1.0} for name in names]) == dict.fromkeys(
        dict.fromkeys(names.values()), 1.0
    ) | {"attention": 2.0, "matrix products": 2.0}


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (
            {
                "versions": {"ultralong": __version__},
                "seconds_per_step": 876.0,
                "tokens_per_second_per_gpu": 598.5,
                "mfu_causal": 0.526,
                "peak_gpu_gib": 114.5,
                "planned_seconds_per_step": 861.9,
                "peak_host_gib": 212.0,
            },
            "| M | 2 | 1,024 | ours | 876.0 (861.9) | 598 | 52.6% | 114.5 | 212 |",
        ),
        (
            {
                "versions": {"torch": "2.11.0"},
                "seconds_per_step": 1.0,
                "tokens_per_second_per_gpu": 5.0,
                "mfu_causal": 0.5,
                "peak_gpu_gib": 1.0,
            },
            "| M | 2 | 1,024 | ours, 0.1 | 1.0 | 5 | 50.0% | 1.0 |  |",
        ),
        (
            {
                "versions": {"ultralong": "0.2.0"},
                "seconds_per_step": 1.0,
                "tokens_per_second_per_gpu": 5.0,
                "mfu_causal": 0.5,
                "peak_gpu_gib": 1.0,
            },
            "| M | 2 | 1,024 | ours, 0.2 | 1.0 | 5 | 50.0% | 1.0 |  |",
        ),
        (
            {"versions": {}, "peer": "other", "note": "CUDA out of memory. Tried"},
            "| M | 2 | 1,024 | other | out of memory |  |  |  |  |",
        ),
        ({"versions": {}, "peer": "other", "note": "exit code 1"}, "| M | 2 | 1,024 | other | stopped |  |  |  |  |"),
    ],
    ids=["ours", "older", "old", "out of memory", "stopped"],
)
def test_a_row_of_the_table(row, wanted):
    assert training_table([{"rows": [{"model": "M", "gpus": 2, "tokens": 1024} | row]}])[2:] == [wanted]


@pytest.mark.soak
def test_adapters_are_measured_beside_their_plan(tmp_path, make_tiny_model, python, monkeypatch, machine):
    monkeypatch.setattr(ranks, "sys", SimpleNamespace(executable=python))
    make_tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path / "tiny")
    tiled = MemoryConfig(activation_checkpointing=True, layer_tile=64)
    case = TrainingCase(str(tmp_path / "tiny"), 96, sharded=True, lora_rank=4, lora_whole=True, memory=tiled)
    row = measure_training(case, machine, tmp_path / "made")
    assert "note" not in row, row
    assert row["lora"].startswith("rank 4, alpha 16, dropout 0 at q_proj, k_proj, v_proj, o_proj, embeddings and norms")
    assert row["planned_seconds_per_step"] > 0


def test_a_failed_run_is_named_by_what_was_raised_last_on_its_first_rank():
    messages = """[rank1]: Traceback (most recent call last):
[rank1]: ModuleNotFoundError: No module named 'torchao'
[rank1]: The above exception was the direct cause of the following exception:
[rank1]: ImportError: Install it with: pip install 'ultralong[optim]'
[rank1]: This is rank 1 of 2, on host a.
[rank0]: torch.distributed.DistBackendError: gone
torch.distributed.elastic.multiprocessing.errors.ChildFailedError: 
"""  # noqa: W291
    assert failure(messages) == "ImportError: Install it with: pip install 'ultralong[optim]'"
    assert failure("torch.OutOfMemoryError: CUDA out of memory") == "torch.OutOfMemoryError: CUDA out of memory"
    assert failure("Killed") == ""


def test_processes_leave_no_folder(tmp_path, monkeypatch):
    """torchrun makes one for errors; torch's own cache has a fixed name and stays."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert ranks.start_ranks(1, "platform") == {}
    assert [path for path in tmp_path.iterdir() if not path.name.startswith("torchinductor")] == []

"""`ultralong bench train --mix`: which rows a step has, and what the kernels alone would take."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_run import make_run

from ultralong.bench.compare import case_name
from ultralong.bench.training.case import RowCount, TrainingCase, parse_mix
from ultralong.bench.training.measure import _planned
from ultralong.bench.training.mix import (
    CONVERSATIONS,
    OneRowPasses,
    conversations,
    kernel_seconds,
    seed_of,
)
from ultralong.planner import plan
from ultralong.planner.machine import load_machine
from ultralong.planner.shapes import model_config, shape_of
from ultralong.planner.sharing.priced import Asked, one_row_passes
from ultralong.training.batches import RowOrder
from ultralong.training.config import DataSource, ParallelConfig

MIX = (RowCount(8192, 5), RowCount(131072, 1))


def test_a_mix_is_lengths_and_rows():
    assert parse_mix(("8k:5", "131072:1")) == MIX
    for word in ("8k", "8k:0", "8k:x"):
        with pytest.raises(ValueError, match=f"LENGTH:ROWS, such as 8k:38, found '{word}'"):
            parse_mix((word,))


def test_every_step_of_the_run_has_the_mix(tmp_path, monkeypatch, make_tiny_model, tiny_tokenizer):
    monkeypatch.chdir(tmp_path)
    seed = seed_of(MIX, 3)
    run = make_run(
        tmp_path, make_tiny_model(), tiny_tokenizer, steps=3, global_batch_size=6, seed=seed,
        data=(DataSource("rows", 5), DataSource("rows", 1)), parallel=ParallelConfig(dynamic_context_parallel=True),
    )  # fmt: skip
    order = RowOrder.of_run(run)
    drawn = [[order.place(6 * step + row).source for row in range(6)] for step in range(3)]
    assert [step.count(1) for step in drawn] == [1, 1, 1]
    fixed = OneRowPasses.of_run(run).packs(6, 6, 1, 640, 1.0)
    assert [each[0] for each in fixed.passes] == [(order.place(6 + row),) for row in range(6)]
    side_by_side = OneRowPasses.of_run(run).packs(6, 6, 2, 640, 1.0).passes
    assert [each[1] for each in side_by_side] == [(order.place(9 + row),) for row in range(3)]
    together = order.packs(6, 6, 1, 640, 1.0)
    assert (len(together.passes), together.tokens, together.pairs) == (1, fixed.tokens, fixed.pairs)
    with pytest.raises(ValueError, match="take fewer steps or kinds of rows"):
        seed_of([RowCount(8, 1)] * 12, 9)


def test_a_fixed_degree_gives_every_group_as_many_rows():
    case = TrainingCase(mix=("8k:5", "128k:1"), gpus=4, degree=2, sharing="fixed")
    assert (case.shared_by, replace(case, sharing="dynamic").shared_by) == (2, 4)
    for degree, mix in ((3, ("8k:6",)), (2, ("8k:5",))):
        with pytest.raises(ValueError, match="degree must divide 4 GPUs into groups"):
            replace(case, degree=degree, mix=mix)


def test_conversations_have_the_lengths_of_the_real_set():
    made = conversations(60_000)
    assert 60_000 <= sum(len(document.text) for document in made) < 60_500
    assert {len(document.text) for document in made} <= set(CONVERSATIONS)
    assert np.mean([len(document.text) for document in made]) == pytest.approx(np.mean(CONVERSATIONS), rel=0.1)


def test_kernels_alone_take_what_their_rates_say():
    shape, machine = shape_of(model_config("meta-llama/Llama-3.2-1B")), load_machine("h200")
    one, two = (kernel_seconds(shape, machine, "cudnn", MIX, gpus) for gpus in (1, 2))
    assert one == pytest.approx(2 * two)
    forward, backward = machine.attention_rates("cudnn", 64, 131072)
    long = 16 * 2048 * 131072**2 / 2 * (4 / forward + 10 / backward)
    products = 6 * shape.multiplied * (131072 + 5 * 8192) / machine.matmul_rate(2048)
    assert long + products < one < 1.01 * (long + products), "conversations are a hundredth and less"


def test_both_ways_of_a_mix_are_planned(tmp_path, monkeypatch, make_tiny_model, tiny_tokenizer):
    monkeypatch.chdir(tmp_path)
    model = make_tiny_model()
    run = make_run(tmp_path, model, tiny_tokenizer, parallel=ParallelConfig(2, True), global_batch_size=6)
    shape, found = shape_of(model.config), {}
    for sharing in ("dynamic", "fixed"):
        case = TrainingCase(model="model", gpus=2, mix=("64:6",), sharing=sharing)
        found[sharing] = _planned(run, case, "h200", shape)
    seconds = {sharing: said["planned_seconds_per_step"] for sharing, said in found.items()}
    machine = load_machine("h200")
    asked = Asked(run, 2, model.config, shape, machine, machine.memory)
    assert seconds["fixed"] == pytest.approx(one_row_passes(asked).seconds, abs=1e-4)
    assert seconds["dynamic"] == pytest.approx(plan(run, 2).seconds_per_step, abs=1e-4)
    assert found["fixed"].keys() <= found["dynamic"].keys()


def test_rows_of_a_mix_are_cases_of_their_own():
    row = {"model": "M", "tokens": 9, "gpus": 2, "mix": "8k:1", "sharing": "dynamic"}
    assert case_name(row) != case_name({**row, "sharing": "fixed"})

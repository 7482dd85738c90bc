"""LongCE: losses, weights and gradients against transformers' eager attention, however the work is shared; refusals."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from forked import train_over
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.tiny_run import LENGTH, make_run
from ultralong.ablation import load_study
from ultralong.ablation.resolve import check
from ultralong.data.read.documents import Document
from ultralong.data.rows.packing import PackSettings, pack
from ultralong.data.rows.short_contexts import LongCEConfig
from ultralong.data.tokens.tokenize import tokenize_corpus
from ultralong.planner.machine import load_machine
from ultralong.planner.shapes import shape_of
from ultralong.planner.step_time import step_time
from ultralong.planner.workload import Workload
from ultralong.training.batches import RowOrder
from ultralong.training.config import DataSource, MemoryConfig, OptimizerConfig, ParallelConfig
from ultralong.training.loop import train
from ultralong.training.loss import tiled_cross_entropy
from ultralong.training.preflight import check_start
from ultralong.utils.files import read_jsonl

WEIGHTS = LongCEConfig(weight_cap=1.1, short_context=9, stride=6)


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_tiny_model, tiny_tokenizer):
    """A run of two rows a step, of rows and of rows whose documents do not see each other."""
    folder = tmp_path_factory.mktemp("long_ce")
    model = make_tiny_model(max_position_embeddings=LENGTH, vocab_size=len(tiny_tokenizer))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(12)  # attention that cares what lies far back
    config = make_run(folder, model, tiny_tokenizer, steps=1, long_ce=WEIGHTS, optimizer=OptimizerConfig(lr=1e-3))
    masked = PackSettings(length=LENGTH, mask_documents=True)
    texts = [f"Entry {number} of the log: the tide came in at {number}. " for number in range(40)]
    documents = [Document(str(number), text, "test", "CC0-1.0") for number, text in enumerate(texts)]
    store = tokenize_corpus(documents, tiny_tokenizer, folder / "short", quiet=True)
    pack(store, tiny_tokenizer, folder / "masked", masked, quiet=True)
    return replace(config, model=str(folder / "model"), data=(DataSource(str(folder / "rows")),))


def on(made, kind, **changes):
    return replace(made, data=(DataSource(str(made.data[0].rows).replace("rows", kind)),), **changes)


def reference(config):
    """The first step by transformers alone: loss, weighted loss and gradient norm; every target is read by itself."""
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32, attn_implementation="eager")
    weights, order, count = config.long_ce, RowOrder(config.data, config.seed, 2), 0
    plain = weighted = torch.zeros((), dtype=torch.float64)
    seen = []
    for index in range(2):
        place = order.place(index)
        row = order.folders[place.source][place.row]
        edges = row.boundaries.tolist() if order.mask_documents else [0, LENGTH]
        for start, end in pairwise(edges):
            ids, labels = (torch.from_numpy(x[start:end])[None] for x in (row.input_ids, row.labels))
            losses = cross_entropy(model(ids).logits[0].double(), labels[0], reduction="none")
            factors = torch.ones(end - start, dtype=torch.float64)
            for p in range(weights.shortest - 1, end - start):
                first = (p + 1 - weights.short_context) // weights.stride * weights.stride
                if labels[0, p] != -100:
                    with torch.no_grad():
                        logits = model(ids[:, first : p + 1]).logits[0, -1].double()
                    short = cross_entropy(logits, labels[0, p])
                    factors[p] = min(math.exp(short - losses[p].detach()), weights.weight_cap)
                    seen.append(float(factors[p]))
            plain, weighted = plain + losses.detach().sum(), weighted + (factors * losses).sum()
            count += int((labels != -100).sum())
    assert weights.weight_cap in seen, "no weight reaches the cap"
    assert min(seen) < 0.98, "nothing is weighted down"
    (weighted / count).backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    return float(plain / count), float(weighted.detach() / count), norm


@pytest.fixture(scope="module")
def expected(made):
    return {kind: reference(on(made, kind)) for kind in ("rows", "masked")}


SHARED = {
    "one process, two rows at once": (1, "rows", {"micro_batch_size": 2}),
    "tiles": (
        1,
        "masked",
        {
            "memory": MemoryConfig(
                activation_checkpointing=True, layer_tile=24, loss_tile=10, attention_outputs_on_gpu=1
            )
        },
    ),
    "two processes, ulysses": (2, "rows", {"parallel": ParallelConfig(2, scheme="ulysses")}),
    "two processes, ring, masked": (2, "masked", {"parallel": ParallelConfig(2, scheme="ring")}),
    "two rows beside each other": (2, "masked", {"memory": MemoryConfig(activation_checkpointing=True)}),
    "four processes, sharded": (4, "masked", {"parallel": ParallelConfig(2, fsdp_shard_degree=4, scheme="gathered")}),
}
LONG = ("two processes, ulysses", "two processes, ring, masked", "two rows beside each other")


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.soak] * (case in LONG)) for case in SHARED])
def test_a_step_is_that_of_the_formula(made, expected, tmp_path, case):
    processes, kind, changes = SHARED[case]
    config = on(made, kind, out=str(tmp_path / "run"), **changes)
    if processes == 1:
        train(config, quiet=True)
    else:
        train_over(config, processes)
    (record,) = read_jsonl(tmp_path / "run" / "log.jsonl")
    loss, weighted, norm = expected[kind]
    assert record["loss"] == pytest.approx(loss, abs=3e-6)
    assert record["long_ce"] == pytest.approx(weighted, abs=3e-6)
    assert record["grad_norm"] == pytest.approx(norm, rel=2e-5)
    assert abs(loss - weighted) > 1e-3
    assert "LongCE: targets weighted" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_the_tiled_loss_and_its_gradients_equal_the_formula_in_float64():
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=draw, dtype=torch.float64, requires_grad=True) for n in (40, 17))
    labels = torch.randint(0, 17, (40,), generator=draw)
    labels[::7] = -100
    short = torch.rand(40, generator=draw, dtype=torch.float64) * 8
    short[::3] = math.nan
    total, losses = tiled_cross_entropy(hidden, weight, labels, 6, short, 5.0)
    plain = cross_entropy(hidden @ weight.T, labels, ignore_index=-100, reduction="none")
    factors = torch.tensor(
        [
            1.0 if math.isnan(s) else min(math.exp(s - x), 5.0)
            for s, x in zip(short.tolist(), plain.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(losses, plain.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total, (factors * plain).sum(), rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(total * 0.3, (hidden, weight))
    theirs = torch.autograd.grad((factors * plain).sum() * 0.3, (hidden, weight))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="short_losses must be as labels"):
        tiled_cross_entropy(hidden, weight, labels, 6, short[1:], 5.0)


def test_what_would_weigh_nothing_or_is_no_weight_is_refused_by_name(made):
    with pytest.raises(ValueError, match=r"Rows have up to 64 tokens in .*long_ce weighs what stands in 5,120"):
        check_start(replace(made, long_ce=LongCEConfig(5.0)), 1)
    with pytest.raises(ValueError, match="Documents, which see no other, have up to"):
        check_start(on(made, "masked", long_ce=replace(WEIGHTS, short_context=LENGTH, stride=1)), 1)
    with pytest.raises(ValueError, match="weight_cap must be 0"):
        LongCEConfig(0.5)
    with pytest.raises(ValueError, match="1 or more"):
        LongCEConfig(5.0, stride=0)
    with pytest.raises(ValueError, match="compile and long_ce"):
        replace(made, compile=True)
    with pytest.raises(ValueError, match="rows have 2,048"):
        check(load_study("miniature", ["base.training.long_ce.weight_cap=5"]))


def test_the_plan_prices_the_short_contexts(made):
    def items(config):
        return {line.name: line.value for line in step_time(replace(workload, config=config, traced=workload.trace))}

    model = AutoConfig.from_pretrained(made.model)
    workload = Workload(made, model, shape_of(model), load_machine("h200"), LENGTH, 1)

    off, dense, sparse = (
        items(replace(made, long_ce=weights)) for weights in (LongCEConfig(), replace(WEIGHTS, stride=1), WEIGHTS)
    )
    name = "short contexts of LongCE"
    assert dense.pop(name) > sparse.pop(name) > 0
    assert off == dense == sparse

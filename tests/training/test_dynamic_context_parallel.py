"""Dynamic context parallelism: rows of different lengths in one step, each shared by as many processes as it needs."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from forked import train_over
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from ultralong.data.chat.pack import ChatSettings, pack_chat
from ultralong.data.read.documents import Document
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.data.rows.packing import pack
from ultralong.data.rows.separators import PackSettings
from ultralong.data.rows.short_contexts import LongCEConfig
from ultralong.data.rows.step_packs import step_packs
from ultralong.data.tokens.tokenize import tokenize_corpus
from ultralong.planner import plan
from ultralong.planner.rows import planned_packs
from ultralong.planner.shapes import shape_of
from ultralong.training.batches import RowOrder
from ultralong.training.config import DataSource, MemoryConfig, OptimizerConfig, ParallelConfig, TrainConfig
from ultralong.training.loop import train
from ultralong.training.memory.offload import HostBufferPool
from ultralong.training.run_folder import RunFolder
from ultralong.utils.files import read_jsonl

TEXT = "the keeper of the light wrote in his log that no ship had passed and the tide came in at dawn"
WORDS = TEXT.split()
LENGTHS = {"chat": 96, "masked": 128, "long": 448}
ROWS, STEPS = 7, 3


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, make_tiny_model, tiny_tokenizer):
    """A tiny model and rows of three lengths: conversations, masked documents, and long rows that see all of theirs."""
    folder = tmp_path_factory.mktemp("dynamic")
    model = make_tiny_model(vocab_size=len(tiny_tokenizer), max_position_embeddings=512)
    model.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    texts = [" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(30 + 67 * (i % 4))) for i in range(24)]
    documents = [Document(str(i), text, license="CC0-1.0") for i, text in enumerate(texts)]
    store = tokenize_corpus(documents, tiny_tokenizer, folder / "tokens", quiet=True)
    for name, masked in (("masked", True), ("long", False)):
        how = PackSettings(length=LENGTHS[name], mask_documents=masked, tail="pad")
        pack(store, tiny_tokenizer, folder / name, how, quiet=True)
    talks = [
        [{"role": "user", "content": text[:50]}, {"role": "assistant", "content": text[50 : 70 + 9 * (i % 5)]}]
        for i, text in enumerate(texts)
    ]
    pack_chat(talks, tiny_tokenizer, folder / "chat", ChatSettings(length=LENGTHS["chat"]), quiet=True)
    return folder


def run_of(mixture, out, **changes):
    """A run of all three on one process."""
    run = TrainConfig(
        model=str(mixture / "model"), out=str(out), steps=STEPS, global_batch_size=ROWS, dtype="float32",
        data=tuple(DataSource(str(mixture / name), weight) for name, weight in zip(LENGTHS, (3, 2, 1), strict=True)),
        optimizer=OptimizerConfig(lr=1e-3), parallel=ParallelConfig(dynamic_context_parallel=True),
    )  # fmt: skip
    return replace(run, **changes)


def curve(config, key="loss"):
    return [record[key] for record in read_jsonl(f"{config.out}/log.jsonl")]


def row_by_row(config):
    """The first step by transformers alone: every document of every row by itself, one loss over all targets."""
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float64, attn_implementation="eager")
    order = RowOrder.of_run(config)
    losses, targets, lengths = [], 0, set()
    for place in map(order.place, range(ROWS)):
        rows = order.folders[place.source]
        row = rows[place.row]
        lengths.add(rows.length)
        edges = row.boundaries if rows.mask_documents else (0, rows.length)
        for start, stop in pairwise(edges):
            ids, labels, positions = (
                torch.from_numpy(getattr(row, name)[start:stop])[None]
                for name in ("input_ids", "labels", "position_ids")
            )
            logits = model(input_ids=ids, position_ids=positions).logits
            losses.append(cross_entropy(logits[0], labels[0], reduction="sum"))
            targets += int((labels != -100).sum())
    loss = sum(losses) / targets
    loss.backward()
    norm = sum(float(parameter.grad.square().sum()) for parameter in model.parameters()) ** 0.5
    return loss.item(), norm, targets, lengths


@pytest.fixture(scope="module")
def one(mixture, tmp_path_factory):
    """The run of one process."""
    found = run_of(mixture, tmp_path_factory.mktemp("one") / "run", save_every=1, keep=9)
    train(found, quiet=True)
    return found


def first_gradients(config, place):
    """Each parameter's gradient in the first step, as AdamW's first moment holds it: a tenth, clipped."""
    dcp_to_torch_save(RunFolder(Path(config.out)).checkpoint(1), place)
    return {name: state["exp_avg"] for name, state in torch.load(place)["optimizer"]["state"].items()}


def over(one, folder, processes, save_every=0, **parallel):
    """The same run over several processes."""
    wanted = replace(one.parallel, **({"context_parallel_size": processes, "fsdp_shard_degree": processes} | parallel))
    many = replace(one, out=str(folder / "many"), parallel=wanted, save_every=save_every)
    train_over(many, processes)
    return many


def assert_same(many, one):
    for key in ("tokens", "targets"):
        assert curve(many, key) == curve(one, key)
    assert curve(many) == pytest.approx(curve(one), rel=2e-5)
    assert curve(many, "grad_norm") == pytest.approx(curve(one, "grad_norm"), rel=2e-4)
    for ours, theirs in zip(curve(many, "loss_by_position"), curve(one, "loss_by_position"), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)


def assert_same_gradients(many, one, folder):
    ours, right = (first_gradients(config, folder / "states.pt") for config in (many, one))
    assert len(ours) == len(right) == len(list(AutoModelForCausalLM.from_pretrained(one.model).parameters()))
    for name, gradient in right.items():
        assert (ours[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() > 0, name


def test_a_step_of_mixed_rows_is_what_each_row_gives_by_itself(one):
    loss, norm, targets, lengths = row_by_row(one)
    assert lengths == set(LENGTHS.values()), "rows of all three lengths in one step"
    assert curve(one, "targets")[0] == targets
    assert curve(one)[0] == pytest.approx(loss, rel=1e-5)
    assert curve(one, "grad_norm")[0] == pytest.approx(norm, rel=1e-5)
    assert all(record == {"1": ROWS} for record in curve(one, "rows_by_degree"))


@pytest.mark.parametrize(
    ("processes", "parallel"),
    [
        (2, {"scheme": "gathered", "max_tokens_per_rank": 300}),
        (4, {"context_parallel_size": 2, "max_tokens_per_rank": 512}),
    ],
    ids=["2 gathered", "2 x 2 of 4"],
)
def test_several_processes_make_the_same_steps(one, tmp_path, processes, parallel):
    many = over(one, tmp_path, processes, save_every=1, **parallel)
    assert_same(many, one)
    assert_same_gradients(many, one, tmp_path)
    degrees = curve(many, "rows_by_degree")
    assert all(sum(step.values()) == ROWS for step in degrees)
    if "scheme" in parallel:
        assert any(len(step) > 1 for step in degrees), "short rows lie on one process, long ones on two"


def test_a_group_without_a_row_takes_part_all_the_same(one, tmp_path):
    """FSDP gathers parameters in every pass on every process."""
    alone = replace(one, out=str(tmp_path / "one"), global_batch_size=1, steps=2, save_every=0)
    train(alone, quiet=True)
    assert_same(over(alone, tmp_path, 2, context_parallel_size=1), alone)


SCHEMES = ("auto", "ulysses", "gathered", "ring")


@pytest.mark.soak
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("split", [(2, 2, 1), (4, 4, 4), (4, 2, 4), (8, 8, 2), (8, 2, 8), (8, 4, 4)])
def test_every_scheme_makes_the_same_steps_on_2_to_8_processes(mixture, tmp_path, split, scheme):
    """Random sizes of packs and of steps; 8 processes hold more ranks than the model has heads (Ulysses has 4)."""
    processes, size, shard = split
    if scheme == "ulysses" and size > 4:
        pytest.skip("4 heads")
    rng = random.Random(f"{split} {scheme}")
    memory = rng.choice([MemoryConfig(), OFFLOADED])
    seed, rows = rng.randrange(99), rng.randrange(1, 12)
    alone = run_of(mixture, tmp_path / "one", seed=seed, global_batch_size=rows, save_every=1, keep=9)
    train(alone, quiet=True)
    most = rng.randrange(-(-LENGTHS["long"] // size), 700)
    alone = replace(alone, memory=memory)
    many = over(
        alone, tmp_path, processes, context_parallel_size=size, fsdp_shard_degree=shard, scheme=scheme,
        max_tokens_per_rank=most, save_every=1,
    )  # fmt: skip
    assert_same(many, alone)
    assert_same_gradients(many, alone, tmp_path)


OFFLOADED = MemoryConfig(
    activation_checkpointing=True, layer_tile=48, attention_outputs_on_gpu=1, attention_outputs_offloaded=-1,
    layer_inputs_offloaded=-1,
)  # fmt: skip


@pytest.mark.soak
@pytest.mark.parametrize("size", [1, 2])
def test_long_ce_weighs_targets_of_packs_alike(mixture, tmp_path, size):
    """Two processes that share each pack, and two groups of which one has no row."""
    weights = LongCEConfig(weight_cap=5, short_context=16, stride=16)
    alone = run_of(mixture, tmp_path / "one", long_ce=weights, global_batch_size=1 if size == 1 else ROWS)
    train(alone, quiet=True)
    many = over(alone, tmp_path, 2, context_parallel_size=size)
    assert_same(many, alone)
    assert curve(many, "long_ce") == pytest.approx(curve(alone, "long_ce"), rel=2e-5)


def test_offloaded_packs_of_any_size_lie_in_the_buffers_of_the_largest(one, tmp_path, monkeypatch):
    taken = []
    real = HostBufferPool.reserve
    monkeypatch.setattr(HostBufferPool, "reserve", lambda *given: (taken.append(given[1]), real(*given))[1])
    planned = replace(one, out=str(tmp_path / "run"), memory=OFFLOADED, save_every=0)
    train(planned, quiet=True)
    assert_same(planned, one)
    assert {shape[1] for shape in taken} == {LENGTHS["long"]}, "none was made for a smaller pack"
    assert len(taken) == 3  # one attention output and two inputs of two layers


def test_a_cut_run_resumes_to_the_bit(one, tmp_path):
    cut = replace(one, out=str(tmp_path / "cut"))
    shutil.copytree(one.out, cut.out, ignore=shutil.ignore_patterns("model", "result.json", "step-0000003"))
    train(cut, resume=True, quiet=True)
    for key in ("loss", "grad_norm", "tokens"):
        assert curve(cut, key) == curve(one, key)
    card = Path(cut.out, "model", "README.md").read_text()
    assert f"{STEPS} steps of {ROWS} x 96 or 128 or 448 tokens: {curve(one, 'tokens')[-1]:,} tokens" in card


def test_packs_hold_every_row_once_and_balance():
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.choice((rng.randrange(1, 50), rng.randrange(1, 800))) for _ in range(rng.randrange(1, 30))]
        groups, most = rng.choice((1, 2, 3, 4, 8)), max(lengths) * rng.choice((1, 2, 5))
        work = [n * (n + 100.0) for n in lengths]
        passes = step_packs(lengths, work, groups, most)
        assert sorted(row for each in passes for pack in each for row in pack) == list(range(len(lengths)))
        assert all(len(each) == groups for each in passes), "all groups make as many passes"
        assert all(sum(lengths[row] for row in pack) <= most for each in passes for pack in each)
        assert passes == step_packs(lengths, work, groups, most)
    one_long = step_packs([800, *[100] * 16], [64.0, *[4.0] * 16], 2, 1600)
    assert [sum(64.0 if row == 0 else 4.0 for row in pack) for pack in one_long[0]] == [64.0, 64.0]
    with pytest.raises(ValueError, match="at most 10 tokens, found a row of 11"):
        step_packs([11], [1.0], 1, 10)


def test_the_documents_of_a_row_are_known_without_its_tokens(mixture):
    for name in LENGTHS:
        rows = PackedRows(mixture / name)
        for number in range(len(rows)):
            row = rows[number]
            real = len(row.document_ids) - (row.document_ids[-1] == -1)
            assert rows.documents(number) == tuple(row.boundaries[: real + 1].tolist())
            assert (row.labels[rows.documents(number)[-1] :] == -100).all()


def test_the_plan_is_of_the_packs_that_the_run_makes(one):
    found = plan(one, 1)
    passes, tokens = sum(curve(one, "passes")) / STEPS, curve(one, "tokens")[-1]
    assert f"Rows of a step, {tokens / STEPS:,.0f} tokens in the mean, are laid end to end in {passes:.1f} packs" in (
        found.attention
    )
    (million,) = (line.value for line in found.lines if line.name == "tokens")
    assert million * 1e6 == pytest.approx(tokens)
    assert found.tokens == LENGTHS["long"]
    four = planned_packs(
        replace(one, parallel=replace(one.parallel, max_tokens_per_rank=448)),
        4,
        shape_of(AutoConfig.from_pretrained(one.model)),
    )
    assert four.packs.passes == 1
    assert 1 < four.packs.waiting < 2, "the group with the long row"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"micro_batch_size": ROWS}, "found micro_batch_size 7: set it to 1"),
        ({"compile": True}, "which compile is not for: switch one of them off"),
        ({"skip_positions_to": 512}, "which skip_positions_to is not for: switch one of them off"),
        ({"max_tokens_per_rank": 447}, "a row of 448 tokens has no room. --set parallel.max_tokens_per_rank=448"),
        ({"length": 512}, "The config says length: 512, the rows in .*long have 448 tokens"),
        ({"dynamic_context_parallel": False}, "must share row length and document mask, .*dynamic_context_parallel="),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(one, tmp_path, change, said):
    parallel = {key: value for key, value in change.items() if hasattr(one.parallel, key)}
    rest = {key: value for key, value in change.items() if key not in parallel}
    with pytest.raises(ValueError, match=said):
        train(replace(one, out=str(tmp_path / "run"), parallel=replace(one.parallel, **parallel), **rest), quiet=True)
    with pytest.raises(ValueError, match=r"max_tokens_per_rank .* for dynamic_context_parallel: true \(or auto\) only"):
        ParallelConfig(max_tokens_per_rank=64)

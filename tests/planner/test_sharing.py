"""`auto`: how rows are shared, decided by the planner at a run's start and kept by the run's folder."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from forked import train_over
from transformers import AutoConfig

from ultralong import cli
from ultralong.data.chat.pack import ChatSettings, pack_chat
from ultralong.data.read.documents import Document
from ultralong.data.rows.packing import pack
from ultralong.data.rows.separators import PackSettings
from ultralong.data.tokens.tokenize import tokenize_corpus
from ultralong.launch.dry_run import check
from ultralong.planner import decide_sharing, load_machine, plan
from ultralong.planner.shapes import shape_of
from ultralong.planner.sharing.priced import ONCE, Asked, one_row_passes, priced
from ultralong.training.batches import RowOrder
from ultralong.training.config import DataSource, OptimizerConfig, ParallelConfig, TrainConfig
from ultralong.training.loop import train
from ultralong.training.run_folder import RunFolder
from ultralong.training.sharing import SHARING
from ultralong.utils import settings
from ultralong.utils.files import read_json, read_jsonl

LENGTHS = {"short": 64, "padded": 512, "long": 512}
AUTO = ParallelConfig(context_parallel_size="auto", dynamic_context_parallel="auto")
ROWS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_tiny_model, tiny_tokenizer):
    """A tiny model; short rows, rows of which each holds little but padding, and long ones."""
    place = tmp_path_factory.mktemp("sharing")
    make_tiny_model(vocab_size=len(tiny_tokenizer), max_position_embeddings=512).save_pretrained(place / "model")
    tiny_tokenizer.save_pretrained(place / "model")
    words = "the tide came in and no ship had passed "
    documents = [Document(str(i), f"{words * 9}{i} ", license="CC0-1.0") for i in range(60)]
    store = tokenize_corpus(documents, tiny_tokenizer, place / "tokens", quiet=True)
    for name in ("short", "long"):
        pack(store, tiny_tokenizer, place / name, PackSettings(length=LENGTHS[name], tail="drop"), quiet=True)
    talks = [
        [{"role": "user", "content": words}, {"role": "assistant", "content": f"{words * 6}{i}"}] for i in range(40)
    ]
    pack_chat(talks, tiny_tokenizer, place / "padded", ChatSettings(length=LENGTHS["padded"]), quiet=True)
    return place


def run_of(folder, out, weights, **changes):
    run = TrainConfig(
        model=str(folder / "model"), out=str(out), steps=2, global_batch_size=ROWS, dtype="float32", parallel=AUTO,
        data=tuple(DataSource(str(folder / name), weight) for name, weight in weights.items()),
        optimizer=OptimizerConfig(lr=1e-3),
    )  # fmt: skip
    return replace(run, **changes)


MIX = {"short": 7, "long": 1}


def by_hand(config, decision, gpus):
    """The seconds of `plan` for each way that is not refused, and those of the decision."""
    for each in decision.choices:
        parallel = config.parallel.decided(each["context_parallel_size"], each["dynamic_context_parallel"])
        if "refused" not in each:
            yield plan(replace(config, parallel=parallel), gpus).seconds_per_step, each["seconds"], parallel


def test_on_a_mix_the_fastest_dynamic_sharing_is_taken(folder, tmp_path):
    run = run_of(folder, tmp_path / "run", MIX)
    found = decide_sharing(run, 4)
    ways = list(by_hand(run, found, 4))
    assert [way.context_parallel_size for _, _, way in ways] == [1, 2, 4]
    for planned, said, way in ways:
        assert way.dynamic
        assert said == pytest.approx(planned, abs=1e-6)
    best = min(ways, key=lambda way: way[0])[2]
    assert (found.dynamic_context_parallel, found.context_parallel_size) == (True, best.shared_by)
    refused = [each for each in found.choices if "refused" in each]
    assert [each["context_parallel_size"] for each in refused] == [1, 2, 4]
    fastest = min(refused, key=lambda each: each["seconds"])
    assert f"against {fastest['seconds']:.3g} s at a fixed degree of {fastest['context_parallel_size']}" in found.reason
    assert found.reason.endswith("which only dynamic sharing takes; longest row 512 on 4 x NVIDIA H200.")
    said = plan(run, 4)
    assert said.sharing == found.reason
    assert found.reason in str(said)
    assert said.seconds_per_step == pytest.approx(min(planned for planned, _, _ in ways), abs=1e-6)


def test_equal_rows_keep_a_fixed_degree(folder, tmp_path):
    run = run_of(folder, tmp_path / "run", {"long": 1})
    found = decide_sharing(run, 2)
    ways = list(by_hand(run, found, 2))
    for planned, said, _ in ways:
        assert said == pytest.approx(planned, abs=1e-6)
    fixed = {way.shared_by: planned for planned, _, way in ways if not way.dynamic}
    assert not found.dynamic_context_parallel, "packs of whole rows of one length are these rows"
    assert fixed[found.context_parallel_size] == min(fixed.values())
    assert found.reason.startswith(f"a fixed degree of {found.context_parallel_size}: step ")


def test_padded_rows_are_packed_where_that_wins_more_than_plans_are_wrong_by(folder, tmp_path):
    for most in (None, 4096):
        parallel = ParallelConfig(dynamic_context_parallel="auto", max_tokens_per_rank=most)
        run = run_of(folder, tmp_path / "run", {"padded": 1}, parallel=parallel)
        found = decide_sharing(run, 1)
        (fixed, said, _), (dynamic, and_said, _) = by_hand(run, found, 1)
        assert (said, and_said) == (pytest.approx(fixed, abs=1e-6), pytest.approx(dynamic, abs=1e-6))
        assert found.dynamic_context_parallel == (dynamic < 0.97 * fixed)
    assert found.dynamic_context_parallel, "all rows of a step in one pass"
    assert found.applied(run).parallel.max_tokens_per_rank == 4096


def test_a_way_that_does_not_fit_is_not_taken(folder, tmp_path):
    run = run_of(folder, tmp_path / "run", {"long": 1}, parallel=ParallelConfig(context_parallel_size="auto"))
    bytes_of = {each["context_parallel_size"]: each["gpu_gib"] for each in decide_sharing(run, 2).choices}
    assert bytes_of[2] != bytes_of[1]
    small = min(bytes_of, key=lambda size: bytes_of[size])
    found = decide_sharing(run, 2, gpu_memory=sum(bytes_of.values()) / 2)
    assert found.context_parallel_size == small
    none = decide_sharing(run, 2, gpu_memory=bytes_of[small] / 2)
    assert none.context_parallel_size == small
    assert "none fits in" in none.reason


def test_mixed_rows_at_a_fixed_degree_are_planned_pass_by_pass(folder, tmp_path):
    """By hand: each kind of rows as a run of its own, what comes once a step counted once."""
    run = run_of(folder, tmp_path / "run", MIX, steps=1, seed=4)
    model, machine = AutoConfig.from_pretrained(run.model), load_machine("h200")
    asked = Asked(run, 2, model, shape_of(model), machine, machine.memory)
    at = ParallelConfig(context_parallel_size=2)
    equal = run_of(folder, tmp_path / "run", {"long": 1}, parallel=at)
    alone = replace(asked, config=equal)
    assert one_row_passes(alone).seconds == pytest.approx(priced(alone).seconds, rel=0.02)
    mixed = one_row_passes(replace(asked, config=replace(run, parallel=at)))
    drawn = first_step(run)
    total, once = 0.0, 0.0
    for name in MIX:
        count = drawn.count(name)
        lines = plan(run_of(folder, tmp_path / "x", {name: 1}, parallel=at, global_batch_size=count), 2).lines
        once = max(once, sum(line.value for line in lines if line.name in ONCE))
        total += sum(line.value for line in lines if line.place == "step" and line.name not in ONCE)
    assert mixed.seconds == pytest.approx(total + once, rel=0.02)
    assert mixed.tokens == LENGTHS["long"]


def first_step(run):
    """The sources of the rows of the first step, by name."""
    order = RowOrder.of_run(replace(run, parallel=ParallelConfig(dynamic_context_parallel=True)))
    names = [Path(source.rows).name for source in run.data]
    found = [names[order.place(row).source] for row in range(run.global_batch_size)]
    assert set(found) == set(names)
    return found


@pytest.mark.parametrize(
    ("weights", "change", "said"),
    [
        ({"short": 1}, {"micro_batch_size": 2}, "dynamic sharing is refused: .*found micro_batch_size 2: set it to 1"),
        ({"short": 1}, {"compile": True}, "dynamic sharing is refused: .*which compile is not for"),
        ({"short": 1}, {"skip_positions_to": 512}, "dynamic sharing is refused: .*which skip_positions_to is not for"),
    ],
)
def test_what_dynamic_sharing_is_not_for_keeps_a_fixed_degree_and_says_why(folder, tmp_path, weights, change, said):
    found = decide_sharing(run_of(folder, tmp_path / "run", weights, **change), 1)
    assert not found.dynamic_context_parallel
    assert re.search(said, found.reason)


def test_a_degree_that_the_scheme_is_not_for_is_left_out(folder, tmp_path):
    run = run_of(folder, tmp_path / "run", MIX, parallel=replace(AUTO, scheme="ulysses"))
    found = decide_sharing(run, 8)
    refused = {each["context_parallel_size"]: each["refused"] for each in found.choices if "seconds" not in each}
    assert "ulysses" in refused[8].lower(), "4 heads"
    assert found.context_parallel_size < 8


def test_a_row_is_shared_inside_a_host_where_that_fits(folder, tmp_path):
    run = run_of(folder, tmp_path / "run", {"long": 1}, parallel=ParallelConfig(context_parallel_size="auto"))
    near = decide_sharing(run, 4, host_gpus=2).choices
    assert [each["context_parallel_size"] for each in near] == [1, 2]
    all_of_them = decide_sharing(run, 4, host_gpus=2, gpu_memory=0.001).choices
    assert [each["context_parallel_size"] for each in all_of_them] == [1, 2, 4]
    given = replace(run, parallel=ParallelConfig(4, dynamic_context_parallel="auto"))
    assert decide_sharing(given, 4, host_gpus=2).context_parallel_size == 4


def test_what_the_planner_can_not_count_keeps_a_fixed_degree_and_says_so(folder, tmp_path):
    run = run_of(folder, tmp_path / "run", {"long": 1}, parallel=replace(AUTO, kernel="flash3"))
    found = decide_sharing(run, 2)
    assert (found.context_parallel_size, found.dynamic_context_parallel) == (2, False)
    assert "as what it takes can't be counted: No rates of the attention kernel 'flash3'" in found.reason


def test_where_every_way_is_refused_it_says_why(folder, tmp_path):
    run = run_of(folder, tmp_path / "run", MIX, micro_batch_size=2)
    with pytest.raises(ValueError, match=r"^parallel.dynamic_context_parallel packs .*set it to 1\.$"):
        decide_sharing(run, 1)
    with pytest.raises(ValueError, match="set it to 1"):
        plan(run, 1)
    with pytest.raises(ValueError, match=r"^No model could be loaded from 'no-model'[^A]*$"):  # what all ways lack
        decide_sharing(replace(run, model="no-model", micro_batch_size=1), 1)
    assert not all(finding.good for finding in check(run, 1, 1))


def test_plans_dry_runs_and_launches_say_what_will_be_decided(folder, tmp_path, capsys):
    run = run_of(folder, tmp_path / "run", MIX)
    said = next(finding for finding in check(run, 1, 2) if finding.name == "sharing")
    assert said.good
    assert said.text == decide_sharing(run, 2).reason
    unpacked = plan(replace(run, data=(DataSource("not-there"),), length=128), 2)
    assert "not all rows are packed yet, so this is decided again once they are" in unpacked.sharing
    settings.save(run, tmp_path / "run.yaml")
    words = ["--nodes", "1", "--gpus-per-node", "2", "--out", str(tmp_path / "scripts")]
    cli.main(["launch", str(tmp_path / "run.yaml"), *words])
    shown = capsys.readouterr().out
    assert f"How rows are shared (auto) is decided when the run starts. Planned from here: {said.text}" in shown
    assert settings.load(TrainConfig, tmp_path / "scripts" / "config.yaml").parallel == AUTO


def curve(config, key):
    return [record[key] for record in read_jsonl(f"{config.out}/log.jsonl")]


def test_two_processes_train_as_the_way_that_auto_took_and_as_one_process(folder, tmp_path, capfd):
    run = run_of(folder, tmp_path / "auto", MIX, steps=1)
    found = decide_sharing(run, 2)
    train_over(run, 2, decide=decide_sharing)
    assert f"note: {found.reason}" in capfd.readouterr().err
    written = settings.load(TrainConfig, RunFolder(Path(run.out)).config)
    assert written.parallel == run.parallel.decided(found.context_parallel_size, True)
    explicit = replace(written, out=str(tmp_path / "explicit"))
    train_over(explicit, 2)
    one = run_of(folder, tmp_path / "one", MIX, steps=1, parallel=ParallelConfig(dynamic_context_parallel=True))
    train(one, quiet=True)
    for key in ("loss", "grad_norm", "loss_by_position", "rows_by_degree"):
        assert curve(run, key) == curve(explicit, key)
    assert curve(run, "loss") == pytest.approx(curve(one, "loss"), rel=2e-5)
    assert curve(run, "grad_norm") == pytest.approx(curve(one, "grad_norm"), rel=2e-4)


def no_more(config, processes):
    raise AssertionError("a resumed run asked again")


def test_a_resumed_run_keeps_what_was_decided_first(folder, tmp_path, capsys):
    run = run_of(folder, tmp_path / "run", MIX, save_every=1)
    asked = []

    def decide(config, processes):
        asked.append(processes)
        return decide_sharing(config, processes)

    train(run, quiet=True, decide=decide)
    assert asked == [1]
    left = read_json(Path(run.out, SHARING))
    assert left["reason"] == decide_sharing(replace(run, out=str(tmp_path / "x")), 1).reason
    assert [each["context_parallel_size"] for each in left["choices"]] == [1, 1]
    before = curve(run, "loss")
    for path in (Path(run.out, "checkpoints", "step-0000002"), Path(run.out, "result.json")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    capsys.readouterr()
    train(run, resume=True, quiet=True, decide=no_more)
    assert curve(run, "loss") == before
    assert f"keeps how its rows are shared: dynamic packs of rows on one GPU each. At its start: {left['reason']}" in (
        capsys.readouterr().err
    )
    assert read_json(Path(run.out, SHARING)) == left
    said = next(finding for finding in check(run, 1, 1) if finding.name == "sharing")
    assert "keeps how its rows are shared" in said.text


def test_a_config_in_the_runs_folder_that_still_says_auto_is_decided(folder, tmp_path):
    run = run_of(folder, tmp_path / "run", MIX)
    settings.save(run, RunFolder(Path(run.out)).config)  # as `launch --out` with the run's own folder leaves it
    expected = decide_sharing(run, 1)
    said = next(finding for finding in check(run, 1, 1) if finding.name == "sharing")
    assert (said.good, said.text) == (True, expected.reason)
    train(run, resume=True, quiet=True, decide=decide_sharing)
    assert settings.load(TrainConfig, RunFolder(Path(run.out)).config) == expected.applied(run)
    assert read_json(Path(run.out, SHARING))["reason"] == expected.reason


def test_on_other_processes_a_resumed_run_is_refused_as_one_without_auto(folder, tmp_path):
    out = tmp_path / "run"
    two = run_of(folder, out, MIX)
    taken = replace(two, parallel=two.parallel.decided(2, True))
    RunFolder(out).open(taken, resume=False)
    for run in (two, taken):
        with pytest.raises(ValueError, match="context_parallel_size is 2, but this run has 1 process"):
            train(run, resume=True, quiet=True, decide=no_more)


def test_nobody_to_decide_is_said(folder, tmp_path):
    with pytest.raises(ValueError, match="is auto: the planner decides it"):
        train(run_of(folder, tmp_path / "run", MIX), quiet=True)
    with pytest.raises(ValueError, match=r"context_parallel_size is auto: the planner decides it"):
        AUTO.shared_by  # noqa: B018
    with pytest.raises(ValueError, match=r"dynamic_context_parallel is auto: the planner decides it"):
        AUTO.dynamic  # noqa: B018


def test_auto_is_written_and_read(tmp_path, folder):
    run = run_of(folder, tmp_path / "run", MIX)
    settings.save(run, tmp_path / "run.yaml")
    assert settings.load(TrainConfig, tmp_path / "run.yaml") == run
    changed = settings.load(TrainConfig, tmp_path / "run.yaml", ["parallel.context_parallel_size=2"])
    assert (changed.parallel.shared_by, changed.parallel.dynamic_context_parallel) == (2, "auto")
    with pytest.raises(ValueError, match="must be of type bool or 'auto', found 'always'"):
        settings.load(TrainConfig, tmp_path / "run.yaml", ["parallel.dynamic_context_parallel=always"])
    assert ParallelConfig() == ParallelConfig(1, False), "the default stays a fixed degree"
    assert json.dumps(settings.to_mapping(run)["parallel"]["context_parallel_size"]) == '"auto"'


def test_choices_are_the_divisors_and_keep_most_tokens_for_packs_alone():
    asked = replace(AUTO, max_tokens_per_rank=64)
    ways = asked.choices(12)
    assert [way.shared_by for way in ways] == [1, 2, 3, 4, 6, 12] * 2
    assert [way.max_tokens_per_rank for way in ways] == [None] * 6 + [64] * 6
    assert not any(way.undecided for way in ways)
    assert all(b.dynamic >= a.dynamic for a, b in pairwise(ways))

"""Studies: refused before work starts, differences that are exact, and the same result after a stop."""

import json
import re
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.small_study import ARM, study_file
from ultralong.ablation import ablate, load_study
from ultralong.ablation import build as building
from ultralong.ablation import train_run as training
from ultralong.ablation.configs import evaluation_keys
from ultralong.ablation.keys import told
from ultralong.ablation.outcomes import Outcome
from ultralong.ablation.page import render_study, table_lines
from ultralong.ablation.resolve import check
from ultralong.ablation.results import summarise
from ultralong.ablation.study import STUDIES, Refutation
from ultralong.evaluation.measures.intervals import crossed_difference
from ultralong.training.config import DataSource, OptimizerConfig, TrainConfig

LOWER = {"changes": {"training.optimizer.lr": 1e-7}}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"Chapter {number}. " + "It was a dark and stormy night. " * 120)
    return folder


@pytest.mark.parametrize(
    ("arm", "base", "message"),
    [
        ({"changes": {}}, {}, "arm low changes nothing"),
        ({"changes": {"training.optimizer.lr": 1e-3}}, {}, "arm low changes nothing"),
        ({"changes": {"training.steps": 1, "training.keep": 2}}, {}, "arm low changes nothing: it does what the base"),
        ({"changes": {"scaling.bata": 2}}, {}, "unknown key 'bata'"),
        ({"changes": {"training.stepps": 2}}, {}, "arm low: .*unknown key 'stepps'"),
        ({"changes": {"rows.packing.joint": "none"}}, {}, "arm low: .*'joint'"),
        ({"changes": {"evaluation.max_rows": 1}}, {}, "arm low changes evaluation"),
        ({"changes": {"stages": [{"to": 600}]}}, {}, "ends at a window of 600"),
        ({"changes": {"training.seed": 3}}, {}, "seed does not belong here"),
        ({"changes": {"start_share": 1}}, {}, "start_share must be 0 or more and below 1, found 1"),
        (
            {"changes": {"training.skip_positions_to": 576, "rows.packing.mask_documents": True}},
            {},
            "cuts whole rows in two, and rows.packing masks documents",
        ),
        ({"refuted_if": {"outcome": "needels", "above": 0}}, {}, "'needels', which is not measured"),
        ({"refuted_if": {"outcome": "needles"}}, {}, "either below or above"),
        (
            {},
            {"evaluation": {"tasks": ["perplexity"], "kv_dtype": "fp8"}},
            "without base.evaluation.gpus and base.evaluation.kv_dtype",
        ),
    ],
)
def test_a_wrong_study_is_refused_by_name(tmp_path, texts, arm, base, message):
    with pytest.raises(ValueError, match=message):
        check(load_study(study_file(tmp_path, texts, arms=({**ARM, **arm},), **base)))


def test_an_error_of_an_evaluation_names_the_keys_of_its_study():
    words = "fifty-fifty of the model--mine: --skip-missing, give another --out, or --batch-tokens."
    expected = re.escape("the model--mine: base.evaluation.skip_missing, give another --out, or --batch-tokens.")
    with pytest.raises(ValueError, match=expected), evaluation_keys():
        raise ValueError(words)


def test_a_study_whose_published_questions_are_not_there_is_told_its_own_key(tmp_path, texts):
    asked = {"tasks": ["ruler_qa_squad"], "lengths": [500], "samples": 1}
    arm = {**ARM, "refuted_if": {"outcome": "all tests", "above": 0}}
    study = load_study(study_file(tmp_path, texts, arms=(arm,), evaluation=asked))
    with pytest.raises(ValueError, match=r"give base\.evaluation\.data, with SQuAD's") as caught:
        ablate(study, tmp_path / "study", draw=False, quiet=True)
    assert "base.evaluation.skip_missing leaves them out" in str(caught.value)
    assert not re.search(r"--\w|eval (run|make)", str(caught.value)), "an option of another command"


def test_a_note_of_an_evaluation_names_the_keys_of_its_study(tmp_path, texts):
    """As it comes, not at the end; and the note that a study leaves out stays out."""
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"question": f"Is it {x}?", "answer": "yes"}) + "\n" for x in range(3)))
    asked = {"tasks": [str(file)], "lengths": [600], "samples": 1}
    arm = {**ARM, "refuted_if": {"outcome": "all tests", "above": 0}}
    study = load_study(study_file(tmp_path, texts, arms=(arm,), evaluation=asked))
    before = warnings.showwarning
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ablate(study, tmp_path / "study", draw=False, quiet=True)
    assert warnings.showwarning is before
    notes = {str(each.message) for each in told if each.category is UserWarning}
    assert any(note.endswith("(3 at 600): base.evaluation.samples=3 asks all.") for note in notes), notes
    assert not [note for note in notes if "--" in note or "beyond the model's window" in note]


def test_two_arms_that_do_the_same_are_refused(tmp_path, texts):
    other = {**ARM, "name": "lower", "changes": {"training": {"optimizer": {"lr": 1e-6}}}}
    with pytest.raises(ValueError, match="arm lower does what arm low does"):
        check(load_study(study_file(tmp_path, texts, arms=(ARM, other))))


def test_a_setting_at_its_default_changes_no_key():
    """So that a study of an earlier version, which knew fewer settings, is resumed."""
    config = TrainConfig("model", "out", (DataSource("rows"),), steps=2, optimizer=OptimizerConfig(lr=1e-4))
    found = {"model": "model", "out": "out", "data": [{"rows": "rows"}], "steps": 2, "optimizer": {"lr": 1e-4}}
    assert told(config) == found
    assert told(replace(config, skip_positions_to=64)) == {**found, "skip_positions_to": 64}


def test_studies_that_ship_are_whole():
    names = sorted(path.stem for path in STUDIES.glob("*.yaml"))
    smollm2 = [f"smollm2-135m-{window}" for window in ("32k", "64k", "64k-longer", "64k-searched")]
    assert names == ["miniature", "qwen25-coder-1.5b-128k", *smollm2, "tinyllama-1.1b-16k"]
    for name in names:
        assert len(load_study(name).designs()) > 3


def test_intervals_over_seeds_and_samples():
    sure = crossed_difference(np.full((3, 8), 2.5), seed=0)
    assert (sure.mean, sure.low, sure.high, sure.n) == (2.5, 2.5, 2.5, 8)
    apart = np.repeat([[0.0], [1.0], [2.0]], 8, axis=1)  # seeds differ, samples do not
    found = crossed_difference(apart, seed=0)
    assert found.low < -1 < 3 < found.high, "three seeds are few"
    assert np.isnan(crossed_difference([[1.0], [2.0]], seed=0).low)
    random = np.random.default_rng(0)
    held = 0
    for trial in range(100):
        values = random.normal(0, 1, (3, 1)) + random.normal(0, 1, (3, 20))
        one = crossed_difference(values, seed=trial, resamples=200)
        held += one.low <= 0 <= one.high
    assert held >= 90


def test_differences_are_paired_and_exact(tmp_path, texts):
    study = load_study(study_file(tmp_path, texts))

    def score(*values):
        return [Outcome("needles", "per cent", ("a", "b"), values, headline=True)]

    trained = {"base": {0: score(50.0, 100.0)}, "low": {0: score(0.0, 100.0)}}
    found = summarise(study, score(0.0, 0.0), {"base": score(0.0, 50.0), "low": score(0.0, 50.0)}, trained)
    base, low = found["outcomes"][0]["arms"]
    assert (base["before"], base["rescaled"], base["trained"], base["to_base"]) == (0, 25, 75, None)
    assert (low["by_rescaling"]["mean"], low["by_training"]["mean"], low["to_base"]["mean"]) == (25, 25, -25)
    assert low["to_base"]["low"] == -50
    assert low["to_base"]["high"] == 0
    assert found["verdicts"][0]["verdict"] == "not refuted"
    seeds = {arm: {0: score(of, of), 1: score(0.0, 0.0)} for arm, of in (("base", 100.0), ("low", 0.0))}
    found = summarise(study, score(0.0, 0.0), {}, seeds)
    assert found["outcomes"][0]["arms"][1]["to_base"]["low"] == -100, "a score cannot fall by more"
    alike = {arm: {0: score(100.0, 100.0), 1: score(100.0, 100.0)} for arm in ("base", "low")}
    found = summarise(study, score(0.0, 0.0), {}, alike)
    same = found["outcomes"][0]["arms"][1]["to_base"]
    assert (same["low"], same["high"]) == pytest.approx((-65.8, 65.8), abs=0.1), "two samples alike show no certainty"
    assert found["verdicts"][0]["verdict"] == "undecided"
    other = [Outcome("needles", "per cent", ("a", "c"), (0.0, 0.0), headline=True)]
    with pytest.raises(ValueError, match="other samples"):
        summarise(study, score(0.0, 0.0), {"base": other}, {})


@pytest.mark.parametrize(("ends", "verdict"), [((-3, -1), "refuted"), ((0, 2), "not refuted"), ((-1, 1), "undecided")])
def test_a_verdict_needs_the_whole_interval(ends, verdict):
    assert Refutation("needles", below=0).verdict(*ends) == verdict
    assert Refutation("needles", above=0).verdict(-ends[1], -ends[0]) == verdict


@pytest.mark.parametrize("size", ["tiny", pytest.param("miniature", marks=pytest.mark.soak)])
def test_a_stopped_study_gives_the_same(tmp_path, texts, monkeypatch, make_tiny_model, tiny_tokenizer, size, capsys):
    changes = {}
    if size == "tiny":
        make_tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "model")
        tiny_tokenizer.save_pretrained(tmp_path / "model")
        changes = {"model": str(tmp_path / "model"), "stages": [{"to": 384, "factor": 2}]}
        changes["evaluation"] = {"needle_lengths": [300], "max_rows": 1, "grid_samples": 1}
    study = load_study(study_file(tmp_path, texts, **changes))
    whole = ablate(study, tmp_path / "whole", draw=False, quiet=True)
    assert "to resume from" not in capsys.readouterr().err, "a first start is told that it resumes nothing"
    real, calls = building.run, []

    def stopped(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(building, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        ablate(study, tmp_path / "stopped", draw=False, quiet=True)
    resumed = ablate(study, tmp_path / "stopped", draw=False, quiet=True)
    assert len(calls) == 5, "before, rescaled, base stopped; base and low after"
    assert resumed["outcomes"] == whole["outcomes"]
    assert resumed["verdicts"] == whole["verdicts"]
    assert whole["missing"] == []
    assert len(whole["runs"]) == 2
    assert not list((tmp_path / "whole" / "runs").glob("*/checkpoints")), "finished runs keep no states"
    assert json.loads((tmp_path / "stopped" / "results.json").read_text())["outcomes"] == whole["outcomes"]
    again = ablate(study, tmp_path / "whole", only=["low"], draw=False, quiet=True)
    assert (again["outcomes"], len(calls)) == (whole["outcomes"], 5), "nothing is measured again"
    two = load_study(study_file(tmp_path, texts, arms=(ARM, {**ARM, "name": "lower", **LOWER}), **changes))
    later = ablate(two, tmp_path / "whole", only=["lower"], draw=False, quiet=True)
    assert [run["arm"] for run in later["runs"]] == ["base", "low", "lower"], "earlier arms stay in the table"
    page = render_study(whole, interactive=False)
    assert "A rate of almost nothing" in page
    assert "Rescaled only" in page
    assert any(line.startswith("low: ") for line in table_lines(whole))


def test_an_arm_is_averaged_with_its_untrained_start(tmp_path, texts, make_tiny_model, tiny_tokenizer):
    """Trained once for both arms; the weights are the plain average, and its key is none that an unaveraged arm has."""
    make_tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    half = {**ARM, "name": "half", "changes": {"start_share": 0.25}}
    changes = {"model": str(tmp_path / "model"), "stages": [{"to": 768, "factor": 4}]}
    changes["evaluation"] = {"tasks": ["niah_single_1"], "lengths": [512], "samples": 2, "needle_lengths": []}
    half["refuted_if"] = {"outcome": "all tests beyond the old window", "below": 0}
    study = load_study(study_file(tmp_path, texts, arms=(half,), **changes))
    found = ablate(study, tmp_path / "study", draw=False, quiet=True)
    base, averaged = (tmp_path / "study" / run["model"] for run in found["runs"])
    assert base.parent.name.startswith("trained-")
    assert averaged.name.startswith("merged-")
    assert len(list((tmp_path / "study" / "runs").glob("trained-*/result.json"))) == 1
    (start,) = (tmp_path / "study" / "shared").glob("extended-*")
    trained, untrained, made = (load_file(folder / "model.safetensors") for folder in (base, start, averaged))
    assert any(not torch.equal(trained[name], untrained[name]) for name in trained)
    for name, tensor in made.items():
        assert torch.allclose(tensor, 0.75 * trained[name] + 0.25 * untrained[name], atol=1e-6), name
    assert {outcome["name"] for outcome in found["outcomes"]} >= {"niah_single_1 at 512", half["refuted_if"]["outcome"]}

    # Where weights were deleted, what is measured stands without them, and what is not has them made again, the same.
    for folder in (base, averaged):
        shutil.rmtree(folder)
    assert ablate(study, tmp_path / "study", draw=False, quiet=True)["outcomes"] == found["outcomes"]
    assert not base.exists()
    for folder in (tmp_path / "study" / "shared").glob("measured-*"):
        shutil.rmtree(folder)
    again = ablate(study, tmp_path / "study", draw=False, quiet=True)
    assert again["outcomes"] == found["outcomes"]
    assert [run["tokens"] for run in again["runs"]] == [run["tokens"] for run in found["runs"]]
    assert len((base.parent / "log.jsonl").read_text().splitlines()) == 1, "no step is counted twice"
    for name, tensor in load_file(averaged / "model.safetensors").items():
        assert torch.equal(tensor, made[name]), name


def test_two_calls_share_a_study(tmp_path, texts, monkeypatch, make_tiny_model, tiny_tokenizer):
    """What another call is at is left to it, and is in the table when it is done."""
    make_tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    evaluation = {"tasks": ["needle"], "needle_lengths": [300], "grid_samples": 1}
    study = load_study(
        study_file(
            tmp_path,
            texts,
            model=str(tmp_path / "model"),
            stages=[{"to": 384, "factor": 2}],
            evaluation=evaluation,
        )
    )
    order, real = [], training.train

    def trained(config, **options):
        order.append(config.optimizer.lr)
        if len(order) == 1:  # the first call is at its base arm: a second one comes, and finds the other arm free
            other = ablate(study, tmp_path / "study", only=["low"], draw=False, quiet=True)
            assert [(run["arm"], run["seed"]) for run in other["runs"]] == [("low", 0)]
            assert other["missing"] == [{"arm": "base", "seed": 0}]
        return real(config, **options)

    monkeypatch.setattr(training, "train", trained)
    monkeypatch.setattr("ultralong.ablation.run.PATIENCE", 0.0)  # the second call can't wait for the one it is within
    result = ablate(study, tmp_path / "study", draw=False, quiet=True)
    assert order == [1e-3, 1e-6], "each arm is trained once"
    assert [run["arm"] for run in result["runs"]] == ["base", "low"]
    assert result["missing"] == []


def test_an_arm_trains_an_adapter(tmp_path, texts, monkeypatch, make_tiny_model, tiny_tokenizer):
    """The adapter is in the weights that are measured; a call that ended before that does not train again."""
    pytest.importorskip("peft")
    make_tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    lora = {**ARM, "name": "lora", "changes": {"training.lora": {"rank": 2, "targets": ["q_proj", "k_proj"]}}}
    changes = {"model": str(tmp_path / "model"), "stages": [{"to": 384, "factor": 2}]}
    changes["training"] = {"optimizer": {"lr": 1e-1}, "steps": 2}
    changes["evaluation"] = {"tasks": ["needle"], "needle_lengths": [300], "grid_samples": 1}
    study = load_study(study_file(tmp_path, texts, arms=(lora,), **changes))

    def ended(*_):
        raise KeyboardInterrupt

    real = training.merge_adapter
    monkeypatch.setattr(training, "merge_adapter", ended)
    with pytest.raises(KeyboardInterrupt):
        ablate(study, tmp_path / "study", draw=False, quiet=True)
    monkeypatch.setattr(training, "merge_adapter", real)
    monkeypatch.setattr(training, "train", ended)
    found = ablate(study, tmp_path / "study", draw=False, quiet=True)
    assert found["missing"] == []
    (made,) = (tmp_path / "study" / run["model"] for run in found["runs"] if run["arm"] == "lora")
    (start,) = (tmp_path / "study" / "shared").glob("extended-*")
    trained, untrained = (load_file(folder / "model.safetensors") for folder in (made, start))
    changed = {name for name in trained if not torch.equal(trained[name], untrained[name])}
    assert changed == {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk"}
    assert not (made.parent / "checkpoints").exists()

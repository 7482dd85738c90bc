"""Studies with SFT: after the last stage or alone, on the same footing as the rest, and resumed to the same bits."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.small_study import ARM, study_file
from ultralong.ablation import ablate, load_study, price
from ultralong.ablation.configs import sft_config
from ultralong.ablation.keys import conversations_key
from ultralong.ablation.page import render_study
from ultralong.ablation.price import price_lines
from ultralong.ablation.resolve import NOWHERE, check, extension_key, final_key, links, tuned_key
from ultralong.checkpoints.config import load_config
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.planner import plan
from ultralong.rope import window_of
from ultralong.training.config import TrainConfig, preset
from ultralong.utils.files import read_jsonl
from ultralong.utils.settings import load, save

PRETRAINED, TUNED = 2, 3  # steps


@pytest.fixture
def made(tmp_path, make_tiny_model, tiny_tokenizer):
    """A folder with texts, conversations, their recipe, and a tiny model of 256 tokens."""
    make_tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Chapter {number}. " + "It was a dark night. " * 100)
    talks = [
        [{"role": "user", "content": f"What is in box {n}?"}, {"role": "assistant", "content": f"A stone of {n} kg."}]
        for n in range(40)
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    recipe = {
        "name": "talks",
        "description": "Boxes.",
        "kind": "chat",
        "sources": [{"name": "boxes", "license": "CC0-1.0", "path": "talks.jsonl"}],
    }
    (tmp_path / "talks.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def sft_of(folder, **changes):
    training = {"steps": TUNED, "dtype": "float32", "save_every": 1, "optimizer": {"lr": 1e-3}}
    return {"rows": {"recipe": str(folder / "talks.yaml")}, "length": 128, "training": training, **changes}


def an_arm(name, **changes):
    return {**ARM, "name": name, "changes": changes}


def study_of(folder, *arms, **changes):
    base = {
        "model": str(folder / "model"),
        "stages": [{"to": 384, "factor": 2}],
        "training": {"steps": PRETRAINED},
        "evaluation": {"tasks": ["needle"], "needle_lengths": [300], "grid_samples": 1},
    }
    return load_study(study_file(folder, folder / "texts", arms=arms, **{**base, **changes}))


def test_sft_follows_training_or_stands_alone(made):
    """Every model is trained from the one that its arm says; the differences stay those against rescaled alone."""
    sft = sft_of(made)
    study = study_of(
        made,
        an_arm("sft", sft=sft),
        an_arm("sft-only", **{"training.steps": 0}, sft=sft),
        an_arm("sft-merged", sft={**sft, "start_share": 0.25}),
        an_arm("half-then-sft", start_share=0.5, sft=sft),
    )
    found = ablate(study, made / "out", draw=False, quiet=True)
    runs = {run["arm"]: run for run in found["runs"]}
    folders = {arm: made / "out" / run["model"] for arm, run in runs.items()}
    assert found["missing"] == []
    trained = list((made / "out" / "runs").glob("*/result.json"))
    kinds = [file.parent.name.split("-")[0] for file in trained]
    assert sorted(kinds) == ["trained", "tuned", "tuned", "tuned"], "the base is trained once, and SFT once each"
    assert not list((made / "out" / "runs").glob("*/checkpoints")), "finished runs keep no states"

    (start,) = (made / "out" / "shared").glob("extended-*")
    (rows,) = (made / "out" / "shared").glob("conversations-*")
    assert PackedRows(rows).length == 128
    started = {arm: yaml.safe_load((folders[arm].parent / "config.yaml").read_text()) for arm in ("sft", "sft-only")}
    assert started["sft"]["model"] == str(folders["base"])
    assert started["sft-only"]["model"] == str(start)
    assert started["sft"]["data"] == started["sft-only"]["data"] == [{"rows": str(rows), "weight": 1.0}]
    weights = {arm: load_file(folder / "model.safetensors") for arm, folder in folders.items()}
    untrained = load_file(start / "model.safetensors")
    for name, tensor in weights["sft-merged"].items():
        assert torch.allclose(tensor, 0.75 * weights["sft"][name] + 0.25 * untrained[name], atol=1e-6), name
        assert not torch.equal(weights["sft"][name], weights["base"][name]), name
    # Averaged first, SFT starts from the average that the arm without SFT would be.
    assert folders["half-then-sft"].parent.name.startswith("tuned-")
    (half,) = (f for f in (made / "out" / "runs").glob("merged-*") if f != folders["sft-merged"])
    for name, tensor in load_file(half / "model.safetensors").items():
        assert torch.allclose(tensor, 0.5 * weights["base"][name] + 0.5 * untrained[name], atol=1e-6), name

    tuning = runs["sft"]["sft"]
    assert tuning["tokens"] == TUNED * 128
    assert runs["sft"]["tokens"] == runs["base"]["tokens"] + tuning["tokens"]
    seconds = {arm: sum(r["seconds"] for r in read_jsonl(folders[arm].parent / "log.jsonl")) for arm in ("base", "sft")}
    assert tuning["step_seconds"] == round(seconds["sft"], 1)
    assert runs["sft"]["step_seconds"] == pytest.approx(sum(seconds.values()), abs=0.11)
    assert (runs["sft"]["loss"], runs["sft-only"]["loss"]) == (runs["base"]["loss"], None)
    assert runs["sft-only"]["tokens"] == TUNED * 128
    assert "sft" not in runs["base"]
    (outcome,) = (outcome for outcome in found["outcomes"] if outcome["name"] == "needles beyond the old window")
    assert len({arm["rescaled"] for arm in outcome["arms"]}) == 1, "rescaled alone is the same in all arms"
    for arm in outcome["arms"]:
        assert arm["by_training"]["mean"] == pytest.approx(arm["trained"] - arm["rescaled"])
    page = render_study(found, interactive=False)
    assert "sft-only, seed 0: SFT alone" in page
    assert "pretraining and SFT together" in page


def test_a_study_killed_in_sft_gives_the_same_bits(made):
    sft = sft_of(made, training={"steps": 40, "dtype": "float32", "save_every": 2, "optimizer": {"lr": 1e-3}})
    study = study_of(made, an_arm("sft-only", **{"training.steps": 0}, sft=sft))
    whole = ablate(study, made / "whole", draw=False, quiet=True)
    save(study, made / "same.yaml")
    words = [sys.executable, "-m", "ultralong", "ablate", str(made / "same.yaml"), "--out", str(made / "killed")]
    child = subprocess.Popen([*words, "--quiet"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not list((made / "killed" / "runs").glob("tuned-*/checkpoints/*")):
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < until, "no state was saved"
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    (run,) = (made / "killed" / "runs").glob("tuned-*")
    assert not (run / "result.json").exists(), "it was killed after SFT"
    assert (made / "killed" / "results.json").exists(), "the base was in the table by then"
    again = ablate(study, made / "killed", draw=False, quiet=True)
    assert again["outcomes"] == whole["outcomes"]
    same = made / "whole" / "runs" / run.name
    assert (run / "model/model.safetensors").read_bytes() == (same / "model/model.safetensors").read_bytes()
    assert [record["step"] for record in read_jsonl(run / "log.jsonl")] == list(range(1, 41)), "a step was repeated"


def test_sft_is_priced(made):
    many, few = 60_000, 40_000  # steps, of which a GPU does a thousand a second
    sft = sft_of(made, training={"steps": few, "dtype": "float32"})
    arms = an_arm("sft", sft=sft), an_arm("sft-only", **{"training.steps": 0}, sft=sft)
    study = study_of(made, *arms, training={"steps": many})
    found = price(study, gpus=1)
    told = [
        (run["arm"], run["training"], run["steps"], run["row"], run["tokens"], run["shared"]) for run in found["runs"]
    ]
    assert told == [
        ("base", "pretraining", many, 384, many * 384, False),
        ("sft", "pretraining", many, 384, many * 384, True),
        ("sft", "SFT", few, 128, few * 128, False),
        ("sft-only", "SFT", few, 128, few * 128, False),
    ]
    config = sft_config(study.designs()["sft"].sft, 0, made / "model", NOWHERE, NOWHERE)
    seconds = few * plan(config, 1, machine="h200", tokens=128).total("step")
    assert [run["seconds"] for run in found["runs"]][2:] == [pytest.approx(seconds, abs=0.06)] * 2
    assert found["runs"][2]["seconds"] > 1
    hours = sum(run["gpu_hours"] for run in found["runs"] if not run["shared"])
    assert found["gpu_hours"] == pytest.approx(hours, abs=1e-3)
    assert found["evaluations"] == 1 + 3 * 2
    lines = price_lines(found)
    assert any(line.startswith("sft-only, SFT ") for line in lines)
    assert len(lines) == 1 + 4 + 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft": {"rows": {"recipe": "talkss"}}}, "arm sft: there is no recipe 'talkss'"),
        ({"sft": {"rows": {"recipe": "tiny"}}}, "sft.rows.recipe: tiny is of documents, which belong in rows"),
        ({"rows.recipe": "sft-offline"}, "rows.recipe: sft-offline is of conversations, which belong in sft.rows"),
        ({"training.steps": 0}, "arm sft: training.steps: 0 leaves the rescaled model"),
        ({"stages": [{"to": 384, "steps": 0}]}, "arm sft: training.steps: 0 leaves the rescaled model"),
        ({"training.steps": -1}, "steps must be 1 or more, found -1"),
        ({"training.steps": 0, "start_share": 0.5, "sft": {}}, "start_share averages what is trained"),
        ({"sft": {"training": {"steps": 0}}}, "arm sft: sft.training: steps must be 1 or more, found 0"),
        ({"sft": {"training": {"steps": 1, "seed": 3}}}, "sft.training: seed does not belong here"),
        ({"sft": {"training": {"steps": 1, "skip_positions_to": 384}}}, "sft.training.skip_positions_to cuts"),
        ({"sft": {"training": {"steps": 1, "preset": "sft-smoll"}}}, "arm sft: 'sft-smoll' is neither"),
        ({"sft": {"length": 512}}, "sft.length, 512 tokens of a row, is beyond the window of 384"),
        ({"sft": {"examples": 0}}, "examples must be 1 or more, found 0"),
        ({"sft": {"start_share": 1.0}}, "start_share must be 0 or more and below 1, found 1"),
        ({"sft": {"rows": {"recipe": "sft-offline", "max_characters": 9}}}, "conversations are whole"),
        ({"sft": {"rows": {"recipe": "sft-offline", "packing": {"join": "none"}}}}, "arm sft: .*'join'"),
    ],
)
def test_what_is_no_sft_is_refused_before_work_starts(made, changes, message):
    given = {key: {**sft_of(made), **value} if key == "sft" else value for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        check(study_of(made, an_arm("sft", **given)))


def test_a_model_without_a_chat_template_is_refused_before_work_starts(made):
    study = study_of(made, an_arm("sft", sft=sft_of(made)))
    check(study)
    (made / "model" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="arm sft: sft: the tokenizer has no chat template"):
        check(study)


def test_a_join_that_the_tokenizer_lacks_is_refused_before_work_starts(made):
    study = study_of(made, an_arm("joined", **{"rows.packing.join": "bos_eos"}))
    check(study)
    config = made / "model" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "bos_token": None}))
    with pytest.raises(ValueError, match=r"^arm joined: .*join is bos_eos, but"):
        check(study)


def test_arms_that_do_the_same_without_pretraining_are_refused(made):
    """Its rate is of no step there."""
    one = an_arm("one", **{"training.steps": 0}, sft=sft_of(made))
    two = an_arm("two", **{"training.steps": 0, "training.optimizer.lr": 1e-6}, sft=sft_of(made))
    with pytest.raises(ValueError, match="arm two does what arm one does"):
        check(study_of(made, one, two))


def test_keys_of_sft_hold_what_decides_its_bytes(made):
    base = study_of(made, an_arm("sft", sft=sft_of(made))).designs()["sft"]
    changes = {
        "": base,
        "examples": replace(base, sft=replace(base.sft, examples=4)),
        "length": replace(base, sft=replace(base.sft, length=96)),
        "training": replace(base, sft=replace(base.sft, training={**base.sft.training, "steps": 9})),
        "before": replace(base, start_share=0.5),
        "processes": replace(base, processes=2),
    }
    keys = {name: tuned_key(design, design.sft, 0, "model") for name, design in changes.items()}
    keys["seed"] = tuned_key(base, base.sft, 1, "model")
    rows = conversations_key(base.sft, "model", made / "model")
    template = made / "model" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert conversations_key(base.sft, "model", made / "model") != rows, "rows of another template"
    keys["template"] = tuned_key(base, base.sft, 0, "model")
    assert len(set(keys.values())) == len(keys)
    rate = sft_config(replace(base.sft, training={"steps": 1}), 0, NOWHERE, NOWHERE, NOWHERE).optimizer.lr
    assert rate == 5e-6, "without a preset the rate is the paper's for SFT"


def test_no_steps_mean_the_rescaled_model(made):
    """In one step, however many windows there are; a window that is trained before the last stays."""
    stages = [{"to": 320, "steps": 0}, {"to": 384, "factor": 2, "steps": 0}]
    study = study_of(made, an_arm("sft", stages=stages, sft=sft_of(made)))
    design = study.designs()["sft"]
    rescaled = extension_key("model", design.stages[-1], design.scaling)
    assert [link.trained for link in links(design, 0, "model")] == [rescaled]
    assert not links(design, 0, "model")[0].trains
    two = study_of(made, an_arm("two", stages=[{"to": 320, "steps": 1}, {"to": 384, "factor": 2, "steps": 0}]))
    ablate(two, made / "out", draw=False, quiet=True)
    first, last = links(two.designs()["two"], 0, check(two))
    assert (first.trains, last.trains, last.trained) == (True, False, last.extended)
    run, shared = made / "out" / "runs" / first.trained, made / "out" / "shared" / last.trained
    trained, untrained = load_file(run / "model" / "model.safetensors"), load_file(shared / "model.safetensors")
    assert all(torch.equal(trained[name], untrained[name]) for name in trained)
    assert (window_of(load_config(run / "model")), window_of(load_config(shared))) == (320, 512), "twice the first 256"


# Keys of arms that were run, as they were before there was SFT. A change means that their folders are built anew: do so
# knowingly.
KEYS = {
    "miniature/base": "trained-c558c23f2efc0ba1",
    "qwen25-coder-1.5b-128k/base": "trained-cf172f40a3f74fe2",
    "qwen25-coder-1.5b-128k/half-start": "merged-1e3cebd41f07c8f9",
    "smollm2-135m-32k/base": "trained-7864e2641f435f53",
    "smollm2-135m-32k/two-steps": "trained-2adb112fc3bd5d69",
    "smollm2-135m-64k-searched/base": "trained-02f1943c7cdc6d1a",
    "smollm2-135m-64k-longer/base": "trained-2fd4d3d72436a23a",
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_arms_that_were_run_stay(name):
    study, arm = name.split("/")
    assert final_key(load_study(study).designs()[arm], 0, "model") == KEYS[name]


def test_the_preset_of_an_arm_that_ran_is_the_arm():
    """Whoever runs the steps one by one trains with what was measured."""
    (arm,) = (arm for arm in load_study("smollm2-135m-64k-longer").arms if arm.name == "chat-answers")
    design = load_study("smollm2-135m-64k-longer").designs()[arm.name]
    of_study = sft_config(design.sft, 0, Path("model"), Path("rows"), Path("out"))
    by_hand = load(TrainConfig, preset("smollm2-135m-64k-answers"))
    own = {name: getattr(by_hand, name) for name in ("model", "base_model", "data", "out", "keep")}
    assert replace(of_study, **own) == by_hand

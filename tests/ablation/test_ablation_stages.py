"""Stages that stay at a window: the model that was trained there is trained further, and is not rescaled again."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support.small_study import ARM, study_file
from ultralong.ablation import ablate, load_study, price
from ultralong.ablation.resolve import check, links
from ultralong.training.batches import RowOrder
from ultralong.training.config import TrainConfig
from ultralong.utils.settings import load

FIRST, FURTHER = 3, 2  # steps


@pytest.fixture
def small(tmp_path, make_tiny_model, tiny_tokenizer):
    """A folder with texts, and a study of a tiny model of 256 tokens whose one arm has these stages."""
    make_tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Chapter {number}. " + f"It was dark night {number}. " * 100)
    base = {
        "model": str(tmp_path / "model"),
        "stages": [{"to": 384, "factor": 2}],
        "training": {"steps": FIRST},
        "evaluation": {"tasks": ["needle"], "needle_lengths": [300], "grid_samples": 1},
    }

    def made(stages):
        return load_study(
            study_file(tmp_path, tmp_path / "texts", arms=({**ARM, "changes": {"stages": stages}},), **base)
        )

    return made


def stages(**changes):
    further = {"to": 384, "factor": 2, "steps": FURTHER, "training": {"skip_rows": FIRST, "optimizer": {"lr": 1e-4}}}
    return [{"to": 384, "factor": 2}, {**further, **changes}]


def test_a_model_is_trained_further_at_its_window(small, tmp_path):
    study = small(stages())
    found = ablate(study, tmp_path / "out", draw=False, quiet=True)
    design, base = study.designs()[ARM["name"]], check(study)
    first, further = links(design, 0, base)
    assert first.trained == links(study.base, 0, base)[0].trained, "what the base has is trained once"
    assert len(list((tmp_path / "out" / "shared").glob("extended-*"))) == 1, "nothing is rescaled again"
    runs = tmp_path / "out" / "runs"
    configs = {link.trained: load(TrainConfig, runs / link.trained / "config.yaml") for link in (first, further)}
    before, after = configs.values()
    assert after.model == str(runs / first.trained / "model")
    assert (after.steps, after.optimizer.lr, before.optimizer.lr) == (FURTHER, 1e-4, 1e-3)
    every = [RowOrder.of_run(config) for config in (before, after)]
    read = [order.place(index) for order, count in zip(every, (FIRST, FURTHER), strict=True) for index in range(count)]
    whole = RowOrder(before.data, 0, FIRST + FURTHER)
    assert read == [whole.place(index) for index in range(FIRST + FURTHER)]
    weights = [load_file(runs / link.trained / "model" / "model.safetensors") for link in (first, further)]
    assert any(not torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    tokens = {run["arm"]: run["tokens"] for run in found["runs"]}
    assert tokens == {"base": FIRST * 384, ARM["name"]: (FIRST + FURTHER) * 384}
    rescaled = [arm["rescaled"] for arm in found["outcomes"][0]["arms"]]
    assert rescaled[0] == rescaled[1]
    assert [(run["steps"], run["shared"]) for run in price(study, gpus=1)["runs"]] == [
        (FIRST, False), (FIRST, True), (FURTHER, False)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 3}, "or stay at one with its factor to train on there, found windows"),
        ({"factor": None}, "or stay at one with its factor"),
        ({"steps": 0}, "arm low changes nothing: it does what the base does"),
        ({"training": {"steps": 4}}, "arm low: stages.training: steps does not belong here"),
        ({"training": {"seed": 4}}, "arm low: stages.training: seed does not belong here"),
        ({"training": {"skip_row": 4}}, "arm low: training: unknown key 'skip_row'"),
        ({"training": {"skip_rows": -1}}, "skip_rows must be 0 or more"),
    ],
)
def test_what_is_no_further_training_is_refused_before_work_starts(small, changes, message):
    with pytest.raises(ValueError, match=message):
        check(small(stages(**changes)))


def test_stages_are_read_back_as_they_were_written(small, tmp_path):
    study = small(stages())
    written = json.loads((tmp_path / "study.yaml").read_text())["arms"][0]["changes"]["stages"]
    assert study.designs()[ARM["name"]].stages[1].training == written[1]["training"]

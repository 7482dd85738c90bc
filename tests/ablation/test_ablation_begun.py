"""A study that has begun: what is kept, what is made anew, and what is said of it."""

from pathlib import Path

import pytest

from tests.support.small_study import ARM, study_file
from ultralong.ablation import ablate, load_study, price
from ultralong.ablation.page import _missing, render_study
from ultralong.ablation.price import price_lines
from ultralong.ablation.study import STUDIES, find_study
from ultralong.api.runs import load_config
from ultralong.data.recipe.schema import find_recipe

LOWER = {"changes": {"training.optimizer.lr": 1e-7}}


@pytest.fixture
def begun(tmp_path, make_tiny_model, tiny_tokenizer):
    """A study that ran in `tmp_path / "out"`, and what makes its file with other arms or values of the base."""
    make_tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Chapter {number}. " + f"It was dark night {number}. " * 100)
    base = {
        "model": str(tmp_path / "model"),
        "stages": [{"to": 384, "factor": 2}],
        "evaluation": {"tasks": ["needle"], "needle_lengths": [300], "grid_samples": 1},
    }

    def study(arms=(ARM,), **changes):
        return load_study(study_file(tmp_path, tmp_path / "texts", arms=arms, **base, **changes))

    return study, ablate(study(), tmp_path / "out", draw=False, quiet=True)


def test_a_study_that_has_begun_says_what_is_kept_and_what_is_made_anew(begun, tmp_path, capsys):
    study, found = begun
    assert [Path(name).name for run in found["runs"] for name in run["configs"]] == ["config.yaml"] * 2
    assert all((tmp_path / "out" / name).is_file() for run in found["runs"] for name in run["configs"])
    page = render_study(found, interactive=False)
    assert found["runs"][1]["configs"][0] in page
    assert "larger run" in page
    more = study((ARM, {**ARM, "name": "lower", **LOWER}))
    left = price(more, gpus=1, out=tmp_path / "out")
    assert [(run["arm"], run["done"]) for run in left["runs"]] == [("base", True), ("low", True), ("lower", False)]
    assert left["gpu_hours"] <= price(more, gpus=1)["gpu_hours"]
    assert [line[-4:] == "done" for line in price_lines(left)[1:4]] == [True, True, False]
    assert "GPU-hours on h200 that are left" in price_lines(left)[4]
    capsys.readouterr()
    ablate(more, tmp_path / "out", draw=False)
    said = capsys.readouterr().err
    assert "2 of 3 runs (arm and seed) are measured already\n" in said
    assert "arm lower, seed 0: run 3 of 3\n" in said
    assert "note:" not in said
    ablate(study(training={"steps": 2}), tmp_path / "out", draw=False)
    said = capsys.readouterr().err
    assert "note: base.training.steps was 1 when this folder was last used, and is 2 now.\nnote: What that" in said
    assert "measured already" not in said


def test_texts_that_have_changed_are_refused(begun, tmp_path):
    """Rows are named by their recipe: those of another packing would be of other texts than the base's."""
    study, _ = begun
    (tmp_path / "texts" / "2.txt").write_text("Another chapter. " * 200)
    other = study(({**ARM, "changes": {"rows.packing.join": "none"}},))
    with pytest.raises(ValueError, match=r"texts in .*texts are not those that were there when .*out was first used"):
        ablate(other, tmp_path / "out", draw=False, quiet=True)
    (tmp_path / "out" / "texts.json").unlink()
    ablate(other, tmp_path / "out", draw=False, quiet=True)


def test_a_study_or_a_recipe_that_is_taken_for_a_training_config_says_which_command_takes_it():
    with pytest.raises(ValueError, match=r"unknown key 'name'; .* ultralong ablate .*miniature.yaml --dry-run plans"):
        load_config(STUDIES / "miniature.yaml")
    with pytest.raises(ValueError, match=r"unknown key .* It is a data recipe: ultralong pack .*tiny.yaml"):
        load_config(find_recipe("tiny"))
    with pytest.raises(ValueError, match=r"Did you mean 'miniature'\? .* to copy for .*, are in .*studies"):
        find_study("miniatur")


def test_the_example_for_a_study_of_your_own_is_one(tmp_path, monkeypatch):
    text = (STUDIES.parent / "README.md").read_text(encoding="utf-8")
    (tmp_path / "study.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    for folder in ("texts", "held"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.txt").write_text("It was a dark and stormy night. " * 100)
    monkeypatch.chdir(tmp_path)
    assert {run["arm"] for run in price(load_study("study.yaml"), gpus=1)["runs"]} == {"base", "ntk", "no-separator"}


def test_what_has_not_run_is_told_arm_by_arm():
    runs = [{"arm": arm, "seed": seed} for seed in (0, 1) for arm in ("low", "high") if (arm, seed) != ("high", 1)]
    assert _missing(runs) == ["low (seeds 0, 1)", "high (seed 0)"]

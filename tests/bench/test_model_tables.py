"""Tables of real models: verdicts follow from intervals, and every arm of the recipe's study has its row."""

import copy
import json
from pathlib import Path

import pytest

from ultralong.ablation.study import load_study
from ultralong.bench.model_tables import CHOICES, TABLES, choices_table, effect, goals_table, study_table

RESULTS = Path(__file__).parents[2] / "notebooks" / "results"


@pytest.fixture
def recorded():
    return [{**json.loads((RESULTS / name).read_text()), "file": name} for name in TABLES["goals"][0]]


def goals(recorded):
    return {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in goals_table(recorded)[2:]}


def of(recorded, name):
    return next(each for each in recorded if each["file"] == name)


def row(table, part):
    (cells,) = (cells for goal, cells in table.items() if part in goal)
    return cells[-1].strip(" |")


def test_every_choice_is_an_arm_and_every_arm_a_choice():
    assert set(CHOICES) == {arm.name for arm in load_study("smollm2-135m-32k").arms}


def test_a_needle_less_or_a_minute_more_is_a_miss(recorded):
    assert row(goals(recorded), "95 of 100") == "met"
    fewer, slower = copy.deepcopy(recorded), copy.deepcopy(recorded)
    of(fewer, "smollm2_64k_chat_h200.json")["seeds"][1]["chat_answers"]["needles"]["found"] = 94
    of(slower, "smollm2_64k_chat_h200.json")["seeds"][2]["pretraining"]["step_seconds"] = 1800
    assert row(goals(fewer), "95 of 100") == row(goals(slower), "95 of 100") == "missed"


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.5, 9.0, "met"), (-5.1, 10.8, "missed"), (-9.0, -1.0, "missed")]
)
def test_above_rescaling_takes_both_intervals(recorded, low, high, verdict):
    study = of(recorded, "ablation_qwen25_coder_1_5b_128k.json")
    found = {"mean": (low + high) / 2, "low": low, "high": high}
    for outcome in study["outcomes"]:
        for arm in outcome["arms"]:
            if arm["arm"] == "chat-retrieval-lists":
                arm["by_training"] = found
    study["within_the_old_window"]["chat-retrieval-lists, seed 0"]["by_training"] = {
        "mean": 1.0, "low": 0.1, "high": 2.0
    }  # fmt: skip
    assert row(goals(recorded), "significant") == verdict
    study["within_the_old_window"]["chat-retrieval-lists, seed 0"]["by_training"]["low"] = 0.0
    assert row(goals(recorded), "significant") == "missed"


@pytest.mark.parametrize(
    ("mean", "low", "high", "verdict"),
    [
        (-3.0, -9.9, 3.0, "met"),
        (-19.0, -33.2, -4.9, "undecided, mean missed"),
        (-9.0, -18.0, 1.0, "undecided, mean within it"),
        (-20.0, -33.2, -10.1, "missed"),
    ],
)
def test_ten_points_at_262144(recorded, mean, low, high, verdict):
    of(recorded, "ruler_qwen25_coder_1_5b_262k.json")["difference"].update(mean=mean, low=low, high=high)
    assert row(goals(recorded), "262,144") == verdict


@pytest.mark.parametrize(
    ("mean", "low", "high", "verdict"),
    [
        (0.0, -1.0, 1.0, "met"),
        (-0.2, -1.01, 0.5, "undecided, mean within it"),
        (-1.1, -2.2, 0.0, "undecided, mean missed"),
        (3.0, 1.5, 4.5, "met"),
        (-2.0, -3.0, -1.1, "missed"),
    ],
)
def test_a_point_of_mmlu(recorded, mean, low, high, verdict):
    for pair in of(recorded, "short_qwen25_coder_1_5b.json")["paired_differences"]:
        if (pair["first"], pair["second"]) == ("before", "chat-retrieval-lists"):
            pair.update(difference=mean, low=low, high=high)
    table = goals(recorded)
    assert row(table, "MMLU") == verdict
    assert row(table, "GSM-8K") == "not measured"


def test_a_study_shows_what_was_trained_and_nothing_else():
    record = json.loads((RESULTS / "tinyllama_16k_h200.json").read_text())
    lines = study_table([record])[2:]
    assert [line.split(" | ")[1] for line in lines] == ["`base`", "`lr-2e-4`", "`preset-steps`"] * 2
    assert "0.0 | 4.2 | 79.6 | +75.5 (+57.3 to +95.2)" in lines[0]
    assert "3,894.05 | 43.28 | 20.18" in lines[3]


def test_a_side_is_read_from_the_interval():
    study = json.loads((RESULTS / "ablation_smollm2_32k.json").read_text())
    for outcome in study["outcomes"]:
        for arm in outcome["arms"]:
            if arm["arm"] == "mask":
                arm["to_base"] = {"mean": 3.0, "low": 0.1, "high": 6.0}
    (line,) = (line for line in choices_table([study]) if "documents masked" in line)
    assert line.strip(" |").endswith("+3.0 (+0.1 to +6.0) | better")


def test_no_effect_is_an_empty_cell():
    assert effect(None) == ""
    assert effect({"mean": 2.64, "low": -5.1, "high": 10.85}) == "+2.6 (-5.1 to +10.8)"

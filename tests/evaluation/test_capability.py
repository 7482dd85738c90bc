"""Scores by capability and length: means, areas under curves with intervals, and where they are told."""

import pytest

from ultralong import cli
from ultralong.evaluation.measures.capability import (
    capability_means,
    curve_areas,
    mean_of_tasks,
    trapezoid_weights,
)
from ultralong.evaluation.measures.result import Part, Result
from ultralong.evaluation.report.table import capability_lines
from ultralong.evaluation.tasks.samples import GENERATED, PUBLISHED, TASKS
from ultralong.evaluation.tasks.task import CAPABILITIES
from ultralong.utils.files import append_jsonl, read_json


def result(task, **values):
    """A score by length; each value with an interval of ten either way."""
    parts = tuple(
        Part(value, 10, max(0.0, value - 10), min(100.0, value + 10), length=int(length[1:]))
        for length, value in values.items()
    )
    return Result(task, "score", 0.0, 10, "per cent", "samples", by_length=parts)


def test_means_are_by_capability_in_their_order_and_published_texts_stay_out():
    scores = [
        result("ruler_vt", l1000=40.0, l2000=20.0),
        result("niah_single_1", l1000=100.0, l2000=80.0),
        result("json_kv", l1000=50.0),
        result(next(iter(PUBLISHED)), l1000=10.0),
    ]
    means = capability_means(scores)
    assert [(item["capability"], item["length"], item["tasks"], item["n"]) for item in means] == [
        ("retrieval", 1000, 2, 20),
        ("retrieval", 2000, 1, 10),
        ("multi-hop", 1000, 1, 10),
        ("multi-hop", 2000, 1, 10),
    ]
    assert means[0]["score"] == 75
    # Below: two distances of 10, halved, added as squares. Above: one value is at the ceiling and adds nothing.
    assert means[0]["low"] == pytest.approx(75 - 50**0.5)
    assert means[0]["high"] == pytest.approx(80)
    areas = curve_areas(means)
    assert [area["capability"] for area in areas] == ["multi-hop"], "retrieval has one length of both its tests"
    assert areas[0] | {"low": 0, "high": 0} == {
        "capability": "multi-hop",
        "tasks": 1,
        "first": 1000,
        "last": 2000,
        "score": 30.0,
        "low": 0,
        "high": 0,
    }


def test_an_area_is_the_mean_over_the_logarithm_of_length():
    assert trapezoid_weights([1024, 2048]) == [0.5, 0.5]
    assert trapezoid_weights([1024, 2048, 4096]) == pytest.approx([0.25, 0.5, 0.25])
    assert trapezoid_weights([1024, 2048, 16384]) == pytest.approx([1 / 8, 1 / 2, 3 / 8])
    flat = curve_areas(capability_means([result("json_kv", l4096=70.0, l8192=70.0, l65536=70.0)]))[0]
    assert flat["score"] == pytest.approx(70)
    # The ends of independent lengths add up as squares: narrower than any of the three intervals.
    assert flat["high"] - 70 == pytest.approx(10 * (0.125**2 + 0.5**2 + 0.375**2) ** 0.5)
    falls = curve_areas(capability_means([result("json_kv", l4096=100.0, l8192=100.0, l16384=0.0)]))[0]
    assert falls["score"] == pytest.approx(75)
    unsure = [Part(50.0, 1), Part(60.0, 9, 50.0, 70.0)]
    assert mean_of_tasks(unsure, [0.25, 0.75]) == {"score": 57.5, "low": None, "high": None}


def test_the_table_has_a_row_a_capability_and_says_where_an_area_is_missing():
    means = capability_means([result("json_kv", l1024=90.0, l2048=50.0), result("ruler_vt", l2048=30.0)])
    lines = capability_lines(means, curve_areas(means))
    assert lines[0].split()[:4] == ["by", "capability", "1,024", "2,048"]
    assert lines[1].split()[:4] == ["retrieval", "90.0", "50.0", "70.0"]
    assert lines[1].endswith("1,024 to 2,048")
    assert lines[2].split() == ["multi-hop", "30.0", "needs", "two", "lengths"]
    assert capability_lines([], []) == []


def test_every_capability_is_asked_by_a_test_and_every_test_has_one():
    assert {task.capability for task in TASKS.values()} == set(CAPABILITIES)
    assert {task.capability for task in GENERATED.values()} == set(CAPABILITIES) - {"summarisation"}


def test_a_scored_file_of_two_lengths_tells_its_curve(tmp_path, capsys):
    path, out = tmp_path / "answers.jsonl", tmp_path / "score.json"
    for length, said in ((1024, "12ab"), (1024, "12AB."), (4096, "12ab"), (4096, "no")):
        append_jsonl(path, {"outputs": ["12ab"], "prediction": said, "max_length": length})
    cli.main(["eval", "score", "json_kv", str(path), "--json", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("json_kv  75.0")
    assert lines[0].endswith("(retrieval)")
    assert [line.split()[:2] for line in lines[1:3]] == [["1,024", "100.0"], ["4,096", "50.0"]]
    assert lines[3].startswith("area under the curve  75.0")
    found = read_json(out)
    assert found["capability"] == "retrieval"
    assert found["areas"][0]["score"] == 75

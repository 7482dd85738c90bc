"""The report: JSON that programs read, one page that opens with nothing beside it."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from ultralong.demo.page import credit
from ultralong.evaluation.measures.intervals import wilson
from ultralong.evaluation.report.page import duration, table
from ultralong.evaluation.report.report import ReportData, count_needles, summarise, write_report
from ultralong.utils.environment import describe_environment

pytest.importorskip("plotly")
pytest.importorskip("matplotlib")

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects what a page holds and checks that every tag that opens also closes, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.links = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.text.append(data)


def cells(found):
    return [
        {
            "length": length,
            "depth": depth,
            "n": 4,
            "correct": found(length),
            "low": 0.0,
            "high": 1.0,
            "wrong": [{"sample": 0, "expected": "1234567", "got": "<b>7</b> & 8"}] * (found(length) < 4),
        }
        for length in (256, 512, 2048, 4096)
        for depth in (0.0, 1.0)
    ]


@pytest.fixture
def data():
    bins = [
        {"start": 0, "end": 512, "n": 4096, "rows": 8, "nll": 3.0, "perplexity": 20.1, "low": 18.0, "high": 22.0},
        {"start": 512, "end": 4096, "n": 9, "rows": 1, "nll": 3.0, "perplexity": 19.0, "low": None, "high": None},
    ]
    return ReportData(
        title="512 to 4,096 <tokens>",
        base_window=512,
        target_window=4096,
        seconds=187.4,
        checkpoint="runs/demo/model",
        needle_before=cells(lambda length: 4 if length <= 512 else 0),
        needle_after=cells(lambda length: 3),
        perplexity={"before": bins, "after": bins},
        losses={"continued pretraining": [(0, 4.0), (10, 2.0)]},
        packed_rows=[[0, 100, 4096]],
        facts={"trained on": "1.2 M tokens"},
        settings={"seed": 1, "train": {"steps": 10}},
        commands={"ultralong demo --seed 2": "Another seed:"},
        notes=["A needle is an easy test."],
    )


@pytest.mark.usefixtures("small_pictures")
def test_json_holds_what_others_read(tmp_path, data):
    write_report(tmp_path, data, interactive=False)
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"base_window", "target_window", "seconds", "needle_before", "needle_after", "checkpoint"} <= set(report)
    assert report["needle_before"][0].items() >= {"length": 256, "depth": 0.0, "n": 4, "correct": 4}.items()
    assert report["summary"]["after_beyond"]["correct"] == 12
    assert report["environment"]["torch"]


@pytest.mark.parametrize("interactive", [True, False])
def test_page_needs_nothing_beside_it(tmp_path, data, interactive):
    path = write_report(tmp_path, data, interactive=interactive)
    page = Page(path.read_text(encoding="utf-8"))
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert path.stat().st_size < (6 if interactive else 1) * 1_000_000
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 5, "the needle map before and the one after are pictures of their own"
    assert all(len(image["alt"]) > 20 for image in images)
    assert ("script" in dict(page.tags)) is interactive
    assert any(attributes.get("name") == "viewport" for _, attributes in page.tags)


@pytest.mark.usefixtures("small_pictures")
def test_page_tells_counts_intervals_and_failures(tmp_path, data):
    text = " ".join(Page(write_report(tmp_path, data, interactive=False).read_text(encoding="utf-8")).text)
    assert "512 to 4,096 <tokens>" in text, "a title is text, not markup"
    assert "0% \u2192 75%" in text
    assert "0 of 16 \u2192 12 of 16" in text
    low, high = wilson(6, 8)
    assert f"{low:.0%} to {high:.0%}" in text
    assert "<b>7</b> & 8" in text
    assert "3 min 7 s" in text
    assert "18.00 to 22.00" in text
    assert "steps: 10" in text


def test_empty_parts_are_left_out(tmp_path, data):
    bare = replace(
        data,
        needle_before=(),
        needle_after=(),
        perplexity={},
        losses={},
        packed_rows=(),
        notes=(),
        commands={},
        settings={},
    )
    page = Page(write_report(tmp_path, bare, interactive=False).read_text(encoding="utf-8"))
    assert "img" not in dict(page.tags)
    assert "Needle" not in " ".join(page.text)


@pytest.mark.usefixtures("small_pictures")
def test_one_sided_needles_are_drawn_alone(tmp_path, data):
    page = write_report(tmp_path, replace(data, needle_before=()), interactive=False).read_text(encoding="utf-8")
    assert "before and after" not in page
    assert "\u2192 75%" in page


@pytest.mark.usefixtures("small_pictures")
def test_the_same_data_gives_the_same_page(tmp_path, data):
    pages = [re.sub(r'"uid":"[^"]*"', "", write_report(tmp_path / name, data).read_text()) for name in ("a", "b")]
    assert pages[0] == pages[1]


def test_counts_respect_the_old_window(data):
    assert count_needles(data.needle_after, 512, 4096)["n"] == 16
    assert count_needles(data.needle_after, 0, 512)["cells"] == 4
    assert count_needles(data.needle_before, 0, 512)["cells_found"] == 4
    assert count_needles(data.needle_before, 4096, 8192) is None
    assert set(summarise(data)) == {"before_inside", "before_beyond", "after_inside", "after_beyond"}


@pytest.mark.parametrize(
    ("change", "message"), [({"base_window": 9000}, "base_window"), ({"seconds": -1.0}, "seconds")]
)
def test_what_cannot_be_is_refused(tmp_path, data, change, message):
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path, replace(data, **change))
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(4.26, "4.3 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (245, "4 min 5 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_tables_escape_and_scroll():
    text = table(["a", "b"], [["<i>", "&"]])
    assert "&lt;i&gt;" in text
    assert "&amp;" in text
    assert text.startswith('<div class="scroll"')


def test_environment_names_machine_and_versions():
    facts = describe_environment()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", facts["date"])
    assert {"python", "processor", "torch", "transformers", "numpy"} <= set(facts)


@pytest.mark.usefixtures("small_pictures")
def test_what_rescaling_alone_finds_has_a_column_of_its_own(tmp_path, data):
    data = replace(data, needle_rescaled=cells(lambda length: 4))
    page = write_report(tmp_path, data, interactive=False).read_text(encoding="utf-8")
    assert page.count("rescaled only") >= 3
    assert "rescaled only, nothing trained: 16 of 16" in page
    assert json.loads((tmp_path / "report.json").read_text())["summary"]["rescaled_beyond"]["correct"] == 16


@pytest.mark.parametrize(
    ("alone", "trained", "said"),
    [(4, 4, "training added none"), (0, 4, "training found the rest"), (2, 3, "within the intervals")],
)
def test_the_demo_credits_the_step_that_made_the_gain(alone, trained, said):
    rescaled = {"needle": cells(lambda length: alone), "perplexity": [{"perplexity": 30.0}]}
    after = {"needle": cells(lambda length: trained), "perplexity": [{"perplexity": 20.0}]}
    text = credit(rescaled, after, 512, 4096)
    assert said in text
    assert "30.0 with rescaling alone and 20.0 after" in text
    assert credit(rescaled, after, 4096, 8192).startswith("Perplexity"), "no cell beyond the window, no claim"

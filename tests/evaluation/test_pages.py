"""Pages hold nothing but what they were made of: hostile names stay text, and without plotly the tables are left."""

import json
import re
from dataclasses import asdict, fields

import pytest
from test_report import Page, cells

from ultralong import figures
from ultralong.evaluation.measures.result import Part, Result, interval_text
from ultralong.evaluation.report import page as pages
from ultralong.evaluation.report.page import figure_block, model_label, table
from ultralong.evaluation.report.report import ReportData, render, summarise
from ultralong.evaluation.report.run_page import render_run

pytest.importorskip("plotly")
pytest.importorskip("matplotlib")

HOSTILE = [
    "<!--<script>",
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a & b <i> {{ 7 * 7 }} {% include 'x' %} %{x} $\\frac{ _end",
]


def bins(count=3):
    return [
        {"start": 256 * k, "end": 256 * k + 256, "n": 9, "rows": 3, "perplexity": 5.0 + k, "low": 4.0, "high": 9.0}
        for k in range(count)
    ]


def report_data(text):
    wrong = [{"sample": 0, "expected": text, "got": text}]
    return ReportData(
        title=text,
        base_window=512,
        target_window=4096,
        seconds=1.0,
        checkpoint=text,
        needle_before=cells(lambda length: 4),
        needle_rescaled=[{**cell, "wrong": wrong} for cell in cells(lambda length: 2)],
        needle_after=[{**cell, "wrong": wrong} for cell in cells(lambda length: 3)],
        perplexity={text: bins()},
        losses={text: [(0, 2.0), (1, 1.0)]},
        packed_rows=[[0, 9]],
        facts={text: text},
        settings={text: [text]},
        commands={text: text},
        notes=[text],
        environment={text: text},
    )


def run_summary(text):
    part = Part(50.0, 2, 10.0, 90.0, length=1024)
    deep = Part(50.0, 2, length=1024, depth=0.5, details={"wrong": [{"expected": text, "got": text}]})
    position = Part(9.0, 9, 8.0, 10.0, start=0, end=256)
    results = [
        Result("needle", "found", 50.0, 2, "per cent", "needles", by_length=(part,), by_depth=(deep,)),
        Result("ruler_vt", "score", 50.0, 2, "per cent", "samples", by_length=(part,), by_depth=(deep,)),
        Result("lveval_cmrc_mixup_16k", "score", 50.0, 2, "per cent", "samples", by_length=(part,)),
        Result("perplexity", "perplexity_by_row", 9.0, 9, "", "tokens", by_position=(position,)),
        Result("loss", "loss", 2.0, 9, "nats per target", "targets", by_position=(position,)),
        Result(text, text, 50.0, 2, "per cent", "samples", 40.0, 60.0, details={"lm_eval": [text]}),
    ]
    return {
        "folder": text,
        "settings": {"model": text, "tasks": [text]},
        "window": 2048,
        "skipped": {text: text},
        "environment": {"model": text, text: text},
        "results": [result.to_dict() for result in results],
        "families": [{"family": "RULER", "length": 1024, "tasks": 1, "n": 2, "score": 50.0, "low": 1.0, "high": 99.0}],
        "capabilities": [
            {"capability": text, "length": length, "tasks": 1, "n": 2, "score": 50.0, "low": 1.0, "high": 99.0}
            for length in (1024, 2048)
        ],
        "areas": [
            {"capability": text, "tasks": 1, "first": 1024, "last": 2048, "score": 50.0, "low": 1.0, "high": 99.0}
        ],
        "effective": {"length": 1024, "bar": 85.6, "tasks": 1},
        "paper_means": {"RULER to 128K": 50.0},
        "failures": [{"task": text, "length": 1024, "index": 0, "depth": 0.5, "expected": text, "got": text}],
        "sources": {text: [text]},
    }


def check(html, text):
    """The page parses, runs no script of the text's and shows it as it is."""
    page = Page(html)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert all(attributes.get("type") in (None, "text/plain", "application/json") for attributes in scripts)
    assert "onerror" not in {name for _, attributes in page.tags for name in attributes}
    assert "<!--" not in html
    assert all(attributes["src"].startswith("data:image/png;base64,") for tag, attributes in page.tags if tag == "img")
    shown = " ".join(page.text)
    assert text in shown
    assert "49" not in re.findall(r"a & b <i> (\S+)", shown), "a template inside a value is not run"
    return page


@pytest.mark.usefixtures("small_pictures")
@pytest.mark.parametrize("interactive", [True, False])
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_in_every_field_of_a_report_stays_text(text, interactive, monkeypatch):
    if interactive:  # the page without a kernel has the same pictures
        monkeypatch.setattr(figures, "png_bytes", lambda figure, **size: b"\x89PNG\r\n\x1a\n")
    data = report_data(text)
    assert all(getattr(data, item.name) for item in fields(data)), "every field holds something"
    page = check(render(data, summarise(data), interactive=interactive), text)
    assert sum(text in piece for piece in page.text) >= 9


@pytest.mark.usefixtures("small_pictures")
@pytest.mark.parametrize("interactive", [True, False])
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_in_every_field_of_a_run_stays_text(text, interactive, monkeypatch):
    summary = run_summary(text) | {"before": run_summary(text), "compared": [], "not_compared": text}
    if interactive:  # the page without a kernel has the same pictures
        monkeypatch.setattr(figures, "png_bytes", lambda figure, **size: b"\x89PNG\r\n\x1a\n")
    page = check(render_run(summary, interactive=interactive), text)
    assert sum(text in piece for piece in page.text) >= 9


@pytest.mark.parametrize("text", HOSTILE)
def test_json_inside_a_page_is_what_it_was_and_holds_no_tag(text):
    html = figure_block(figures.perplexity_curve({text: bins()}), text, interactive=True)
    inner = re.search(r'<script type="application/json">(.*?)</script>', html, re.DOTALL).group(1)
    assert not {"<", ">", "&"} & set(inner)
    names = [trace.get("name") for trace in json.loads(inner)["data"]]
    assert figures.theme.plain_text(text) in names, "plotly shows the name and reads no markup in it"
    assert text not in html or "<" not in text


@pytest.mark.parametrize("text", HOSTILE)
def test_tables_escape(text):
    html = table([text], [[text, text]])
    assert text in " ".join(Page(html).text)
    assert "<script" not in html
    assert "<img" not in html


def test_without_plotly_a_page_of_tables_is_left(monkeypatch):
    """What draws figures is an extra: numbers come in any case, and the page says what is missing."""

    def missing(module, extra):
        raise ImportError(f"{module} is needed. Install it with: pip install 'ultralong[{extra}]'")

    monkeypatch.setattr(pages, "require", missing)
    for html in (
        render(report_data("x"), summarise(report_data("x")), interactive=True),
        render_run(run_summary("x"), interactive=True),
    ):
        page = Page(html)
        assert "img" not in dict(page.tags)
        assert "script" not in dict(page.tags)
        assert "Figures are left out: plotly.graph_objects is needed" in " ".join(page.text)
        assert "Counts by length" in html or "mean of tests" in html


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (Part(100.0, 1), "n = 1"),
        (Part(9.0, 5000, details={"rows": 1}), "n = 1 row"),
        (Result("x", "score", 0.0, 1, "per cent", "samples"), "n = 1"),
        (Part(50.0, 9, 20.0, 80.04), "20.0 to 80.0"),
        (Part(0.0, 9, 0.0, 12.3), "0.0 to 12.3"),
    ],
)
def test_intervals_of_one_sample_say_so(item, said):
    assert interval_text(item) == said


def test_results_survive_json():
    result = Result(
        "ruler_vt", "score", 0.0, 3, "per cent", "samples", 0.0, 56.2,
        by_length=(Part(0.0, 3, 0.0, 56.2, length=4096, details={"seconds": 0.0}),),
        by_depth=(Part(0.0, 3, length=4096, depth=0.1),),
    )  # fmt: skip
    kept = json.loads(json.dumps(result.to_dict()))
    assert Result.from_dict(kept) == result
    assert kept["by_length"][0]["value"] == 0.0, "a zero is a value"
    assert "by_position" not in kept
    assert set(asdict(result)) >= set(kept)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("runs/sft/model", "sft/model"),
        ("/data/a/b/model", "b/model"),
        ("nvidia/UltraLong-8B", "nvidia/UltraLong-8B"),
        ("model", "model"),
        ("../model", "model"),
    ],
)
def test_a_model_is_named_by_more_than_its_last_folder(name, label):
    assert model_label(name) == label


def test_the_axis_says_what_positions_are_counted_from():
    assert figures.perplexity_curve({"a": bins()}).layout.xaxis.title.text == "position in the row (tokens)"
    by_document = figures.perplexity_curve({"a": bins()}, by="document")
    assert by_document.layout.xaxis.title.text == "position in the document (tokens)"
    html = render(report_data("x"), summarise(report_data("x")), interactive=True)
    assert "position in the row (tokens)" in html


@pytest.mark.usefixtures("small_pictures")
def test_before_and_after_are_pictures_of_their_own():
    """Side by side where there is room, below each other on a narrow screen: none is hidden."""
    summary = run_summary("m")
    html = render_run({**summary, "before": summary, "compared": [], "not_compared": "none"}, interactive=False)
    needle = html.partition("Needle in a haystack")[2].partition("</figure>")[0]
    assert re.findall(r"<h3>(\w+)</h3>", needle) == ["before", "after"]
    assert needle.count("<img") == 2
    style = html.partition("<style>")[2].partition("</style>")[0]
    assert re.search(r"\.panels \{ display: grid; grid-template-columns: repeat\(auto-fit, minmax\(min\(100%", style)


@pytest.mark.parametrize("name", ["_tmp/model", "$x^$", "a & b", "<b>bold</b>", "a_b"])
def test_a_still_picture_names_its_lines_as_they_are(name):
    canvas = figures.static.draw(figures.perplexity_curve({name: bins(), "other": bins()}))
    (legend,) = canvas.legends
    shown = [text.get_text().replace(r"\$", "$").strip() for text in legend.get_texts()]
    assert shown == [name, "other"]
    figures.png_bytes(figures.perplexity_curve({name: bins(), "other": bins()}))

"""Figures: the still picture is drawn from the same traces, every bundle is whole, panels keep what they hold."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest

from ultralong import figures
from ultralong.figures.marks import _edges, number_format, rgba
from ultralong.figures.show import bundle
from ultralong.figures.static import draw
from ultralong.figures.theme import graph_objects, tokens_label, translucent

go = pytest.importorskip("plotly.graph_objects")
pytest.importorskip("matplotlib")

LENGTHS, DEPTHS = (256, 512, 1024, 4096), (0.0, 0.5, 1.0)


def cells(found=lambda length, depth: 2):
    return [
        {"length": length, "depth": depth, "n": 4, "correct": found(length, depth)}
        for length in LENGTHS
        for depth in DEPTHS
    ]


def pixels(figure, **size):
    """The drawn picture as an (H, W, 3) array."""
    image = pytest.importorskip("PIL.Image")
    return np.asarray(image.open(io.BytesIO(figures.png_bytes(figure, **size))).convert("RGB"))


@pytest.mark.parametrize(
    ("tokens", "label"),
    [
        (512, "512"),
        (1024, "1K"),
        (1536, "1.5K"),
        (8192, "8K"),
        (131072, "128K"),
        (1 << 20, "1M"),
        (1 << 22, "4M"),
        (26887, "26.3K"),
    ],
)
def test_tokens_label(tokens, label):
    assert tokens_label(tokens) == label


def test_needle_heatmap_holds_every_cell_at_its_place():
    figure = figures.needle_heatmap(cells(lambda length, depth: 4 if length <= 512 else 1), base_window=512)
    heat = figure.data[0]
    assert np.asarray(heat.z).tolist() == [[1, 1, 0.25, 0.25]] * 3
    assert heat.text[0][2] == "1/4"
    assert list(figure.layout.xaxis.ticktext) == ["256", "512", "1K", "4K"]
    # The mark stands between the last length inside the old window and the first beyond it.
    assert figure.layout.shapes[0].x0 == 1.5
    # Depth 0, the start of the prompt, is on top.
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]


def test_needle_heatmap_refuses_what_it_cannot_place():
    with pytest.raises(ValueError, match="no cells"):
        figures.needle_heatmap([])
    with pytest.raises(ValueError, match="two cells"):
        figures.needle_heatmap(cells() + cells())


def test_picture_shows_the_colours_of_the_cells():
    found = pixels(figures.needle_heatmap(cells(lambda *_: 4)))
    lost = pixels(figures.needle_heatmap(cells(lambda *_: 0)))
    blue, orange = np.array([0x00, 0x72, 0xB2]), np.array([0xD5, 0x5E, 0x00])
    assert (np.abs(found.astype(int) - blue).sum(-1) < 6).mean() > 0.3
    assert (np.abs(lost.astype(int) - orange).sum(-1) < 6).mean() > 0.3


def test_picture_is_opaque_white_of_the_asked_size_and_repeatable():
    figure = figures.loss_curve({"run": [(0, 3.0), (10, 2.0)]})
    picture = pixels(figure, width=500, height=300)
    assert picture.shape == (300, 500, 3)
    assert (picture[0] == 255).all()
    assert figures.png_bytes(figure) == figures.png_bytes(figure)


def test_bundle_is_whole():
    content = bundle(figures.needle_heatmap(cells()), "Two of four found everywhere.")
    assert set(content) == {"application/vnd.plotly.v1+json", "image/png", "text/plain"}
    assert content["image/png"].startswith(b"\x89PNG")
    assert json.loads(json.dumps(content["application/vnd.plotly.v1+json"]))["data"][0]["type"] == "heatmap"
    assert content["application/vnd.plotly.v1+json"]["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)"
    with pytest.raises(ValueError, match="alt"):
        bundle(figures.needle_heatmap(cells()), "  ")


def test_show_sends_one_bundle(monkeypatch):
    display, core = pytest.importorskip("IPython.display"), pytest.importorskip("IPython")
    sent = []
    kernel = SimpleNamespace(user_ns={"INTERACTIVE": False})
    monkeypatch.setattr(core, "get_ipython", lambda: kernel)
    monkeypatch.setattr(display, "display", lambda content, raw, metadata: sent.append((content, raw, metadata)))
    curve = figures.loss_curve({"run": [(0, 1.0)]})
    figures.show(curve, "A loss of one.")
    assert len(sent) == 1
    assert "image/png" in sent[0][0], "a page without scripts shows the picture"
    assert sent[0][1] is True
    assert sent[0][0]["text/plain"] == "A loss of one."

    assert sent[0][2] == {"image/png": {"alt": "A loss of one."}}, "a page reads the alternative text there"
    kernel.user_ns["INTERACTIVE"] = True
    figures.show(curve, "A loss of one.")
    assert set(sent[1][0]) == set(sent[0][0]) - {"image/png"}, "JupyterLab would hide the figure behind its picture"


def test_explore_draws_stills_first_and_asks_for_values(capsys):
    drawn = []

    def function(value):
        drawn.append(value)
        return figures.loss_curve({"run": [(0, value), (1, value / 2)]})

    figures.explore(function, "start", [1, 2, 3, 4, 5, 6, 7])
    assert drawn == [1, 3, 5, 7]
    assert "start = 3" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no values"):
        figures.explore(function, "start", [])


def test_side_by_side_keeps_traces_axes_and_marks():
    left = figures.needle_heatmap(cells(), base_window=512)
    right = figures.perplexity_curve(
        {"a": [{"start": 0, "end": 8, "perplexity": 3.0, "low": 2.0, "high": 4.0}]}, base_window=4
    )
    joined = figures.side_by_side([left, right], ["left", "right"])
    assert [trace.xaxis for trace in joined.data] == ["x", "x2", "x2"]
    assert [shape.xref for shape in joined.layout.shapes] == ["x", "x2"]
    assert joined.layout.shapes[1].yref == "y2 domain"
    assert joined.layout.xaxis.ticktext == left.layout.xaxis.ticktext
    assert joined.layout.xaxis2.title.text == right.layout.xaxis.title.text
    assert left.data[0].xaxis is None, "the source figure must stay as it was"
    assert pixels(joined, width=900).shape[1] == 900
    with pytest.raises(ValueError, match="one title"):
        figures.side_by_side([left], ["a", "b"])


def test_before_after_has_one_colour_bar():
    figure = figures.needle_before_after(cells(), cells(), base_window=512)
    assert [trace.showscale for trace in figure.data] == [False, True]


def test_perplexity_turns_logarithmic_only_for_wide_ranges():
    def curve(value):
        return [
            {"start": 0, "end": 8, "perplexity": 3.0, "low": 2.0, "high": 4.0},
            {"start": 8, "end": 16, "perplexity": value, "low": value, "high": value},
        ]

    assert figures.perplexity_curve({"a": curve(5.0)}).layout.yaxis.type is None
    assert figures.perplexity_curve({"a": curve(500.0)}).layout.yaxis.type == "log"


def test_loss_smoothing_starts_at_the_first_value_and_keeps_a_constant():
    figure = figures.loss_curve({"run": [(step, 2.5) for step in range(5)]}, smoothing=0.9)
    assert len(figure.data) == 2
    np.testing.assert_allclose(figure.data[1].y, 2.5)
    with pytest.raises(ValueError, match="smoothing"):
        figures.loss_curve({}, smoothing=1.0)


def test_packed_row_blocks_cover_the_row():
    figure = figures.packed_row([[0, 300, 1000], [0, 1000]])
    assert list(figure.data[0].x) == [300, 700]
    assert list(figure.data[0].base) == [0, 300]
    with pytest.raises(ValueError, match="rise from 0"):
        figures.packed_row([[0, 5, 3]])


@pytest.mark.parametrize("title", ["", "title"])
def test_a_new_figure_is_an_empty_one_in_the_style(title):
    """The first is made in one call, the second changes a figure that is there."""
    styled = figures.theme.style(graph_objects().Figure(), title=title, height=200)
    styled.update_xaxes(title_text="x").update_yaxes(title_text="")
    assert figures.new_figure(title, "x", height=200).to_plotly_json() == styled.to_plotly_json()


def test_still_picture_follows_the_layout():
    figure = figures.new_figure("title", "x", "y")
    figure.add_trace(go.Scatter(x=[1, 10, 100], y=[1, 2, 3], mode="lines+markers", name="line"))
    figure.add_trace(go.Bar(x=[1, 10, 100], y=[1, 1, 1], name="bars", width=0.5))
    figure.update_xaxes(type="log", range=[0, 2])
    figure.add_vline(x=10)
    panel = draw(figure).axes[0]
    assert panel.get_xscale() == "log"
    np.testing.assert_allclose(panel.get_xlim(), (1, 100))
    assert panel.get_xlabel() == "x"
    assert len(panel.patches) == 3
    np.testing.assert_allclose(panel.lines[0].get_xdata(), [1, 10, 100])
    np.testing.assert_allclose(panel.lines[1].get_xdata(), [10, 10])


def test_bars_stand_beside_each_other_or_on_top():
    figure = figures.new_figure()
    for values in ([1, 2], [3, 4]):
        figure.add_trace(go.Bar(x=["a", "b"], y=values, name=str(values)))
    beside = draw(figure).axes[0]
    assert [tick.get_text() for tick in beside.get_xticklabels()] == ["a", "b"]
    assert [round(patch.get_x(), 6) for patch in beside.patches] == [-0.4, 0.6, 0.0, 1.0]
    figure.update_layout(barmode="stack")
    assert [patch.get_y() for patch in draw(figure).axes[0].patches] == [0, 0, 1, 2]


@pytest.mark.parametrize("trace", ["Pie", "Surface"])
def test_unknown_traces_are_refused_by_name(trace):
    figure = graph_objects().Figure(getattr(go, trace)())
    with pytest.raises(ValueError, match=trace.lower()):
        figures.png_bytes(figure)


def test_colours_and_formats():
    assert rgba("rgba(255, 0, 51, 0.5)") == (1.0, 0.0, 0.2, 0.5)
    assert rgba("#0072B2") == "#0072B2"
    assert translucent("#ff0033", 0.25) == "rgba(255,0,51,0.25)"
    assert number_format(".0%")(0.5, 0) == "50%"
    assert number_format(",")(12345.0, 0) == "12,345"
    with pytest.raises(ValueError, match="tickformat"):
        number_format("~s")
    np.testing.assert_allclose(_edges(np.array([0.0, 2.0, 3.0])), [-1.0, 1.0, 2.5, 3.5])


def test_score_curves_hold_every_test_with_its_interval():
    scores = [
        {"task": task, "length": length, "score": 80.0, "low": low, "high": 90.0 if low else None}
        for task in ("a", "b")
        for length, low in ((8192, None), (4096, 60.0))
    ]
    figure = figures.score_curves(scores, base_window=4096)
    assert [trace.name for trace in figure.data] == ["a", "b"]
    assert list(figure.data[0].x) == [4096, 8192]
    assert (list(figure.data[0].error_y.array), list(figure.data[0].error_y.arrayminus)) == ([10, 0], [20, 0])
    assert list(figure.layout.xaxis.ticktext) == ["4K", "8K"]
    assert pixels(figure).shape == (480, 760, 3)
    with pytest.raises(ValueError, match="no scores"):
        figures.score_curves([])

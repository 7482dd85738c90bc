"""The left margin of a still picture: it follows the longest name, which is whole, or shortened where it can't be."""

import io

import numpy as np
import pytest
from PIL import Image

from ultralong import figures
from ultralong.figures.data import shares, token_table
from ultralong.figures.panels import side_by_side
from ultralong.figures.parallel import token_ownership
from ultralong.figures.samples import forest
from ultralong.figures.static import draw
from ultralong.figures.theme import graph_objects, new_figure, shortened

TESTS = ("niah_single_1", "niah_multikey_3_of_a_file_of_our_own", "ruler_qa_hotpot_WWWWWWWWWWWWWW")


def effects(*names):
    return forest(dict.fromkeys(names, (1.0, -1.0, 2.0)), "Arms", x="per cent points", zero=0.0)


def ruler(*tests):
    figure = new_figure("RULER", "tokens", "test")
    scale = [[0, "#D55E00"], [1, "#0072B2"]]
    cells = graph_objects().Heatmap(z=[[90, 80] for _ in tests], x=["4K", "8K"], y=list(tests), colorscale=scale)
    figure.add_trace(cells)
    return figure


def names_at(figure, width):
    """What stands at the left of each panel: texts with their ends in pixels, and the widths of the panels."""
    canvas = draw(figure, width=width)
    renderer = canvas.canvas.get_renderer()
    found = []
    for panel in canvas.axes:
        if panel.get_label() == "<colorbar>":
            continue
        ends = {label.get_text(): label.get_window_extent(renderer) for label in panel.get_yticklabels()}
        found.append((ends, panel.get_window_extent(renderer), panel.yaxis.get_tightbbox(renderer)))
    return found


@pytest.mark.parametrize("width", [480, 760, 920])
@pytest.mark.parametrize(
    "figure",
    [
        effects("base", "rescaled-with-longrope-WWWWWWWW-and-masked-documents-16k"),
        effects("base", "an-arm-of-a-long-name." * 8),
        effects("MMMMMMMMMMMMMMMMMMMMMMM", "low"),
        ruler(*TESTS),
        ruler(*TESTS, "own_a_file_of_questions_of_a_very_long_name_" * 3 + "2026"),
        shares({"books": {"a": 3}, "a table of conversations of a long name, WWWWW": {"a": 1}}),
        token_table({"what goes into the model": ["a"], "x": ["b"]}, {"what goes into the model": [0], "x": [0]}),
        token_ownership({"zigzag, MMMMMM MMMMMM MMMMMM": [0, 1], "plain": [0, 1]}, ranks=2),
        side_by_side([effects("an-arm-of-a-name-WWWWWWWWWW")] * 2, ["one", "two"]),
    ],
)
def test_no_name_is_cut_at_the_left(figure, width):
    (ends, panel, axis), *_ = names_at(figure, width)
    assert axis.x0 >= 1, "a name or the title begins left of the picture"
    assert all(end.x1 < panel.x0 for end in ends.values())
    assert panel.width > 0.1 * width
    picture = np.asarray(Image.open(io.BytesIO(figures.png_bytes(figure, width=width))).convert("L"))
    assert (picture[:, 0] == 255).all(), "ink at the left edge"


def test_the_margin_follows_the_longest_name():
    lefts = [names_at(effects("base", "w" * size), 920)[0][1].x0 for size in (1, 8, 20, 40)]
    assert lefts[0] == pytest.approx(64), "short names take no more than other figures do"
    assert lefts[0] < lefts[2] < lefts[3]
    for size, left in ((20, lefts[2]), (40, lefts[3])):
        (ends, _, _), *_ = names_at(effects("base", "w" * size), 920)
        assert 0 <= ends["w" * size].x0 <= 6, f"more room than the name needs, at {left}"


def test_a_name_that_is_too_long_keeps_its_beginning_and_end():
    assert shortened("short", 5) == "short"
    assert shortened("beginning and end", 10) == "beginn\u2026end"
    assert [len(shortened("x" * 30, most)) for most in (1, 2, 3, 29, 30)] == [1, 2, 3, 29, 30]
    first, second = (f"{'an-arm-of-a-long-name.' * 8}{last}" for last in ("one", "two"))
    (ends, _, _), *_ = names_at(effects(first, second), 480)
    assert sorted(name[-3:] for name in ends) == ["one", "two"]
    assert all(name.startswith("an-arm") and "\u2026" in name for name in ends)


def test_names_are_text_in_a_picture_too():
    (ends, _, _), *_ = names_at(effects("p < 5 & more"), 760)
    assert list(ends) == ["p < 5 & more"]

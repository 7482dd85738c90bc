"""Long lists of a figure's JSON become typed arrays that hold the same numbers; the rest stays as it is."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from ultralong import figures
from ultralong.figures.play import animated
from ultralong.figures.show import bundle, plotly_json, png_bytes
from ultralong.figures.static import draw
from ultralong.figures.theme import SCORE_SCALE
from ultralong.figures.typed_arrays import LEAST, compact

PLOTLY = "application/vnd.plotly.v1+json"


def numbers(value):
    """What plotly.js makes of a list or a typed array."""
    if isinstance(value, list):
        return np.array(value)
    array = np.frombuffer(base64.b64decode(value["bdata"]), dtype=f"<{value['dtype']}")
    return array.reshape([int(n) for n in value["shape"].split(", ")]) if "shape" in value else array


def typed(values, name="y"):
    """One list after `compact`."""
    return compact({"data": [{name: values}]})["data"][0][name]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (list(range(20)), "u1"),
        (list(range(-5, 20)), "i1"),
        (list(range(500, 520)), "u2"),
        ([-40_000, *range(20)], "i4"),
        ([2**20 * n for n in range(20)], "u4"),
        ([2**40 + n for n in range(20)], "f8"),
        ([n / 7 for n in range(20)], "f4"),
        ([1e-300 * n for n in range(1, 20)], "f8"),
        ([1e300 * n for n in range(1, 20)], "f8"),
        ([1_000_000 + n / 10 for n in range(20)], "f8"),
        ([0.7] * 20, "f8"),
        ([float("inf"), *[1.0] * 19], "f8"),
        ([0.5] * 20, "f4"),
    ],
)
def test_the_smallest_type_that_holds_the_numbers_is_taken(values, dtype):
    found = typed(values)
    assert found["dtype"] == dtype
    assert np.allclose(numbers(found).astype(float), np.array(values, dtype=float), rtol=2e-7, atol=0)


@pytest.mark.parametrize("offset", [0, -3.0, 1e6, 1.8e9, 1e14])
def test_no_number_moves_by_a_pixel_wherever_its_axis_begins(offset):
    values = [*(offset + n / 7 for n in range(20)), None]
    moved = np.abs(numbers(typed(values))[:-1] - np.array(values[:-1]))
    assert moved.max() <= 1e-6 * (max(values[:-1]) - min(values[:-1]))


def test_whole_numbers_stay_exact_and_rows_keep_their_shape():
    cells = np.random.default_rng(0).integers(0, 3, (8, 32)).tolist()
    found = typed(cells, "z")
    assert found["shape"] == "8, 32"
    assert (numbers(found) == cells).all()


def test_whole_numbers_stay_exact_beside_gaps():
    values = [None, *range(2**24, 2**24 + 20)]
    assert numbers(typed(values))[1:].tolist() == values[1:]


def test_gaps_are_kept():
    found = numbers(typed([1, None, 0.5] * 8))
    assert np.isnan(found[1::3]).all()
    assert (found[::3] == 1).all()
    assert (found[2::3] == 0.5).all()


@pytest.mark.parametrize(
    "values",
    [
        [1] * (LEAST - 1),
        ["a"] * 20,
        [True] * 20,
        [None] * 20,
        [1.0, "1"] * 10,
        [2**60] * 20,
        [[1] * 20, [2] * 19],
    ],
    ids=["short", "text", "booleans", "nothing", "mixed", "beyond a float", "ragged"],
)
def test_what_is_no_long_list_of_numbers_stays(values):
    assert typed(values) is values


def test_figures_and_frames_say_the_same_in_fewer_bytes():
    x = list(range(64))
    frames = [figures.lines({"a": (x, [n * step / 3 for n in x])}) for step in range(1, 5)]
    figure = animated(frames, list("abcd"))
    plain, small = json.loads(figure.to_json()), compact(json.loads(figure.to_json()))
    assert len(json.dumps(small["data"], indent=4)) < 0.6 * len(json.dumps(plain["data"], indent=4))
    for one, other in zip([plain, *plain["frames"]], [small, *small["frames"]], strict=True):
        for before, after in zip(one["data"], other["data"], strict=True):
            assert {key for key, value in after.items() if value != before[key]} <= {"x", "y"}
            assert all(np.allclose(numbers(after[key]), before[key]) for key in {"x", "y"} & set(before))
    assert plain["layout"] == small["layout"]


def test_error_bars_are_packed_and_a_bundle_has_them():
    figure = figures.new_figure()
    figure.add_scatter(x=list(range(20)), y=list(range(20)), error_y={"array": [0.5] * 20})
    trace = bundle(figure, "Twenty points with bars of one length.")[PLOTLY]["data"][0]
    assert trace["error_y"]["array"]["dtype"] == "f4"
    assert (numbers(trace["error_y"]["array"]) == 0.5).all()
    assert plotly_json(figure)["data"][0] == trace


def test_a_picture_of_few_colours_looks_as_it_was_drawn():
    x = list(range(40))
    figure = figures.lines({name: (x, [n**power for n in x]) for name, power in (("a", 0.5), ("b", 1), ("c", 1.2))})
    figure.add_heatmap(x=x, y=[0, 10], z=[x, x[::-1]], colorscale=[list(each) for each in SCORE_SCALE])
    canvas = draw(figure)
    drawn = io.BytesIO()
    canvas.savefig(drawn, format="png", facecolor="white")
    files = drawn, io.BytesIO(png_bytes(figure))
    before, after = (np.asarray(Image.open(each).convert("RGB"), dtype=int) for each in files)
    assert np.abs(before - after).max() <= 32
    assert np.sqrt(((before - after) ** 2).mean()) < 2
    assert len(png_bytes(figure)) < 0.35 * len(drawn.getvalue())

"""Numbers that more than one room takes have one range."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ultralong import miniature
from ultralong.checkpoints.extend import extend
from ultralong.cli import main
from ultralong.data.chat.pack import ChatSettings
from ultralong.data.recipe.schema import Recipe, Source, load_recipe
from ultralong.data.rows.separators import PackSettings
from ultralong.evaluation.measures.longppl import measure_longppl
from ultralong.evaluation.runs.compare import compare_answers
from ultralong.evaluation.runs.settings import RunSettings
from ultralong.evaluation.tasks.samples import make_samples
from ultralong.search.settings import SearchSettings
from ultralong.training.config import DataSource, TrainConfig
from ultralong.utils.hub import load_tokenizer
from ultralong.utils.units import check_seed, many

TAKE_SEEDS = {
    "rows": lambda seed: PackSettings(64, seed=seed),
    "chat rows": lambda seed: ChatSettings(64, seed=seed),
    "a recipe": lambda seed: load_recipe("tiny", (f"seed={seed}",)),
    "training": lambda seed: TrainConfig(model="m", out="r", data=(DataSource("rows"),), steps=1, seed=seed),
    "an evaluation": lambda seed: RunSettings("m", ("niah_single_1",), seed=seed),
    "samples": lambda seed: next(make_samples("niah_single_1", load_tokenizer(miniature.path()), 400, 1, seed)),
    "LongPPL": lambda seed: measure_longppl("m", "rows", seed=seed),
    "a comparison": lambda seed: compare_answers("one", "other", seed=seed),
    "a search": lambda seed: SearchSettings("m", 1024, seed=seed),
}


@pytest.mark.parametrize("seed", [-1, 2**32, -(2**40)])
@pytest.mark.parametrize("take", TAKE_SEEDS.values(), ids=TAKE_SEEDS)
def test_every_room_refuses_the_same_seeds_before_it_begins(take, seed):
    with pytest.raises(ValueError, match=f"seed must be 0 or more and below 2..32, found {seed}"):
        take(seed)


def test_the_ends_of_the_range_are_taken():
    for seed in (0, 1, 2**32 - 1):
        check_seed(seed)
        assert PackSettings(64, seed=seed).seed == seed


@pytest.mark.parametrize(
    "words",
    [
        ["pack", "tiny", "--tokenizer", "miniature", "--length", "64", "--set", "seed=-1"],
        ["eval", "run", "niah_single_1", "miniature", "--lengths", "400", "--device", "cpu", "--seed", "-1"],
        [
            "eval",
            "make",
            "niah_single_1",
            "--length",
            "400",
            "--samples",
            "1",
            "--tokenizer",
            "miniature",
            "--seed",
            "-1",
        ],
    ],
    ids=["pack", "eval run", "eval make"],
)
def test_commands_say_so_in_a_line_and_write_nothing(tmp_path, capsys, words):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--out", str(tmp_path / "out")])
    assert ended.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in line
    assert line.endswith("seed must be 0 or more and below 2**32, found -1.")
    assert not (tmp_path / "out").exists()


TOO_LONG = 2**31


@pytest.mark.parametrize(
    "make",
    [
        lambda: PackSettings(length=TOO_LONG),
        lambda: RunSettings("m", ("needle",), lengths=(TOO_LONG,)),
        lambda: RunSettings("m", ("needle",), needle_lengths=(10**15,)),
        lambda: TrainConfig("m", "o", (DataSource("r"),), 1, length=TOO_LONG),
        lambda: extend(miniature.path(), 10**15, "out"),
    ],
)
def test_a_length_that_no_position_has(make, tmp_path, monkeypatch):
    """Nothing of that length is made first: it would be an error of the memory, in the middle of the work."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="tokens, and a text has at most 2,147,483,647"):
        make()


def test_the_longest_length_is_taken():
    assert PackSettings(length=TOO_LONG - 1).length == TOO_LONG - 1


@pytest.mark.parametrize("depth", [-0.1, 1.5, float("nan"), float("inf")])
def test_a_depth_outside_of_the_text(depth):
    with pytest.raises(ValueError, match="depths are fractions from 0"):
        RunSettings("m", ("needle",), needle_depths=(0.5, depth))


@pytest.mark.parametrize("key", ["max_characters", "budget", "share", "characters_per_token"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_share_of_a_recipe_that_is_no_number(key, value):
    with pytest.raises(ValueError, match=f"{key} must be positive"):
        Source(name="s", license="x", path="p", **{key: value})


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a\x1b[2J", "a\u202eb"])
def test_a_name_that_reports_cannot_print(name):
    source = Source(name="s", license="x", path="p")
    for given in ({"name": name, "sources": (source,)}, {"name": "r", "sources": (replace(source, name=name),)}):
        with pytest.raises(ValueError, match="a name is a text of one line"):
            Recipe(description="d", **given)


@pytest.mark.parametrize(("count", "said"), [(0, "0 rows"), (1, "1 row"), (2048, "2,048 rows")])
def test_one_thing_is_no_plural(count, said):
    assert many(count, "row") == said

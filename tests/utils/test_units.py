"""Numbers that more than one room takes have one range."""

from __future__ import annotations

import pytest

from ultralong import miniature
from ultralong.cli import main
from ultralong.data.chat.pack import ChatSettings
from ultralong.data.recipe.schema import load_recipe
from ultralong.data.rows.separators import PackSettings
from ultralong.evaluation.measures.longppl import measure_longppl
from ultralong.evaluation.runs.compare import compare_answers
from ultralong.evaluation.runs.settings import RunSettings
from ultralong.evaluation.tasks.samples import make_samples
from ultralong.search.settings import SearchSettings
from ultralong.training.config import DataSource, TrainConfig
from ultralong.utils.hub import load_tokenizer
from ultralong.utils.units import check_seed

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

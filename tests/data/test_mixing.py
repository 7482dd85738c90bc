"""Long samples mixed into SFT: off unless asked for, and then at the share that the config states."""

import math
from dataclasses import replace

import numpy as np
import pytest
from tiny_run import make_run

from ultralong.data.chat.pack import ChatSettings, pack_chat
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.training.batches import RowOrder
from ultralong.training.config import PRESETS, DataSource, TrainConfig
from ultralong.training.loop import train
from ultralong.utils import settings

LENGTH, SHORT = 128, 40


def talks(words, count):
    return [
        [{"role": "user", "content": f"Is {n} a number?"}, {"role": "assistant", "content": " ".join(["yes"] * words)}]
        for n in range(count)
    ]


@pytest.fixture
def mixed(tmp_path, tiny_tokenizer):
    """Short examples under their own limit, and long ones, in rows of one length."""
    pack_chat(talks(2, 60), tiny_tokenizer, tmp_path / "short", ChatSettings(LENGTH, max_tokens=SHORT), quiet=True)
    pack_chat(talks(30, 12), tiny_tokenizer, tmp_path / "long", ChatSettings(LENGTH), quiet=True)
    return tmp_path


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5])
def test_rows_come_at_the_stated_share(mixed, share):
    total = 20_000
    sources = (DataSource(str(mixed / "short"), 1 - share), DataSource(str(mixed / "long"), share))
    drawn = np.array([RowOrder(sources, seed, total)._source.sum() for seed in range(5)])
    spread = math.sqrt(total * share * (1 - share))
    assert (abs(drawn - total * share) < 4.5 * spread).all(), "within the binomial error"
    assert len(set(drawn)) > 1, "and by chance, not by rote"


def test_each_source_is_read_whole_before_a_row_comes_again(mixed):
    order = RowOrder((DataSource(str(mixed / "short"), 3.0), DataSource(str(mixed / "long"), 1.0)), 0, 400)
    places = [order.place(index) for index in range(400)]
    for source, folder in enumerate(("short", "long")):
        size = len(PackedRows(mixed / folder))
        rows = [place.row for place in places if place.source == source]
        assert sorted(rows[:size]) == list(range(size))


def test_a_step_holds_both_and_each_keeps_its_own_limit(mixed):
    order = RowOrder((DataSource(str(mixed / "short")), DataSource(str(mixed / "long"))), 0, 40)
    longest = {0: 0, 1: 0}
    for index in range(40):
        place = order.place(index)
        row = order.folders[place.source][place.row]
        real = row.document_ids >= 0
        longest[place.source] = max(longest[place.source], int(np.diff(row.boundaries)[real].max()))
    assert longest[0] <= SHORT < longest[1] <= LENGTH


def test_sft_trains_on_the_mixture_and_the_card_states_it(mixed, monkeypatch, make_tiny_model, tiny_tokenizer):
    monkeypatch.chdir(mixed)
    run = make_run(mixed, make_tiny_model(), tiny_tokenizer)
    data = (DataSource("short", 0.75), DataSource("long", 0.25))
    train(replace(run, data=data, steps=3, global_batch_size=4, micro_batch_size=2), quiet=True)
    card = (mixed / "run" / "model" / "README.md").read_text()
    assert "rows: short" in card
    assert "weight 0.75" in card
    assert "weight 0.25" in card


def test_rows_of_another_length_are_refused_with_what_was_found(mixed, tiny_tokenizer):
    pack_chat(talks(2, 20), tiny_tokenizer, mixed / "other", ChatSettings(64), quiet=True)
    with pytest.raises(ValueError, match="must share row length"):
        RowOrder((DataSource(str(mixed / "short")), DataSource(str(mixed / "other"))), 0, 4)


@pytest.mark.parametrize("name", ["llama31-8b-sft", "smollm2-135m-sft"])
def test_the_presets_of_sft_are_the_papers_and_mix_nothing_in(name):
    config = settings.load(TrainConfig, PRESETS / f"{name}.yaml")
    assert config.optimizer.lr == 5e-6
    assert config.optimizer.betas == (0.9, 0.95)
    assert len(config.data) == 1

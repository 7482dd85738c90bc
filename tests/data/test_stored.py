"""A file that is cut while it is read is an error that names it: a memory map would end the process by a signal."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from tiny_run import make_run

from ultralong.data.rows.packed_rows import PackedRows
from ultralong.data.tokens.store import TokenStore
from ultralong.data.tokens.stored import StoredArray


@pytest.fixture
def folder(tmp_path, tiny_model, tiny_tokenizer):
    make_run(tmp_path, tiny_model, tiny_tokenizer)
    return tmp_path


@pytest.mark.parametrize(
    "array",
    [np.arange(7, dtype="<u2"), np.arange(60, dtype="<i8").reshape(20, 3), np.zeros((0, 3), "<i8"), np.ones((3, 1))],
)
def test_it_is_the_array(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    stored = StoredArray(tmp_path / "a.npy")
    assert (stored.shape, stored.dtype, len(stored)) == (array.shape, array.dtype, len(array))
    for place in (slice(None), slice(1, 3), slice(5, 2), slice(2, 99), slice(-2, None)):
        assert np.array_equal(stored[place], array[place])
        assert stored[place].shape == array[place].shape
    for number in range(len(array)):
        assert np.array_equal(stored[number], array[number])
    array.tofile(tmp_path / "a.bin")
    assert np.array_equal(StoredArray(tmp_path / "a.bin", array.dtype)[:], array.reshape(-1))


def test_places_of_ascending_rows(tmp_path):
    first = np.sort(np.random.default_rng(0).integers(0, 9, 50))
    np.save(tmp_path / "a.npy", np.stack([first, first * 0], axis=1))
    stored = StoredArray(tmp_path / "a.npy")
    for value in range(-1, 11):
        assert stored.first_at_least(value) == np.searchsorted(first, value)


@pytest.mark.parametrize("name", ["rows-00000.npy", "rows-00000.segments.npy"])
def test_rows_that_are_cut_while_they_are_read(folder, name):
    rows = PackedRows(folder / "rows")
    assert rows[0].input_ids.size
    os.truncate(folder / "rows" / name, 150)
    with pytest.raises(ValueError, match=rf"{name} was cut while it was read"):
        [*map(rows.__getitem__, range(len(rows)))]
    with pytest.raises(ValueError, match=name):
        [*map(PackedRows(folder / "rows").__getitem__, range(len(rows)))]


@pytest.mark.parametrize("name", ["tokens-00000.bin", "tokens-00000.offsets.npy"])
def test_tokens_that_are_cut_while_they_are_read(folder, name):
    store = TokenStore(folder / "tokens")
    assert store[0].size
    os.truncate(folder / "tokens" / name, 130)
    with pytest.raises(ValueError, match=rf"{name} was cut while it was read"):
        [*map(store.__getitem__, range(len(store)))]


@pytest.mark.parametrize("how", ["renamed", "deleted"])
def test_rows_that_go_while_they_are_read_are_read_to_their_end(folder, how):
    rows = PackedRows(folder / "rows")
    before = [rows[number].input_ids for number in range(len(rows))]
    if how == "renamed":
        (folder / "rows").rename(folder / "other")
    else:
        for file in (folder / "rows").iterdir():
            file.unlink()
    assert all(np.array_equal(rows[number].input_ids, ids) for number, ids in enumerate(before))
    with pytest.raises(ValueError, match="missing"):
        pickle.loads(pickle.dumps(rows))[0]  # noqa: S301 - our own object

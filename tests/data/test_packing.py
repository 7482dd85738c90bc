"""Packing: every token in, none twice; labels by the definition; exact resume; what is refused."""

from __future__ import annotations

import pickle
import tempfile
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ultralong.data.read.documents import Document
from ultralong.data.rows.packing import PackedRows, PackSettings, RowStream, pack, resolve_separators
from ultralong.data.rows.permutation import permuted
from ultralong.data.tokens.shards import verify
from ultralong.data.tokens.tokenize import tokenize_corpus

DOCUMENTS = st.lists(st.text(alphabet="abc the\n", min_size=1, max_size=40), min_size=1, max_size=12)
SETTINGS = st.builds(
    PackSettings,
    length=st.integers(2, 40),
    join=st.sampled_from(["separator", "none", "bos_eos"]),
    mask_documents=st.booleans(),
    positions=st.sampled_from(["auto", "row", "document"]),
    long_documents=st.sampled_from(["split", "drop"]),
    tail=st.sampled_from(["drop", "pad"]),
    shuffle=st.booleans(),
    seed=st.integers(0, 5),
)


def make_store(tokenizer, folder, texts, **options):
    documents = (Document(f"d{i}", text) for i, text in enumerate(texts))
    return tokenize_corpus(documents, tokenizer, folder, quiet=True, **{"shard_tokens": 50, **options})


def expected_stream(store, tokenizer, how):
    """The stream written down plainly: (token, document, first token of its document?) for every token."""
    order = np.arange(len(store))
    if how.shuffle:
        order = permuted(order, len(store), how.seed)
    kept = [d for d in order if how.long_documents == "split" or len(store[d]) <= how.length]
    separator = tokenizer.encode("<s>", add_special_tokens=False) if how.join == "separator" else []
    around = ([tokenizer.bos_token_id], [tokenizer.eos_token_id]) if how.join == "bos_eos" else ([], [])
    stream = []
    for place, document in enumerate(kept):
        ids = [*around[0], *store[document].tolist(), *around[1], *(separator if place + 1 < len(kept) else [])]
        stream += [(token, int(document), number == 0) for number, token in enumerate(ids)]
    return stream


@settings(max_examples=150)
@given(texts=DOCUMENTS, how=SETTINGS, rows_per_shard=st.integers(1, 4))
def test_rows_are_the_stream(tiny_tokenizer, texts, how, rows_per_shard):
    """Every token in, none twice, in order; labels, positions, boundaries and documents by their definitions."""
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(tiny_tokenizer, Path(folder) / "store", texts)
        stream = expected_stream(store, tiny_tokenizer, how)
        full, over = divmod(len(stream), how.length)
        expected_rows = full + (how.tail == "pad" and over > 0)
        if expected_rows == 0:
            with pytest.raises(ValueError, match="do not fill one row"):
                pack(store, tiny_tokenizer, Path(folder) / "rows", how, rows_per_shard=rows_per_shard, quiet=True)
            return
        rows = pack(store, tiny_tokenizer, Path(folder) / "rows", how, rows_per_shard=rows_per_shard, quiet=True)
        assert len(rows) == expected_rows
        for number in range(len(rows)):
            check_row(rows[number], stream, number * how.length, how)
        counts = rows.manifest
        padded = how.tail == "pad"
        assert counts["padding_tokens"] == (how.length - over if padded and over else 0)
        assert counts["tail_dropped_tokens"] == (0 if padded else over)
        assert counts["document_tokens"] + counts["separator_tokens"] == len(stream)
        assert counts["document_tokens"] + counts["dropped_tokens"] == store.tokens
        assert counts["documents"] + counts["dropped_documents"] == len(store)


def check_row(row, stream, begin, how):
    here = stream[begin : begin + how.length]
    real = len(here)
    assert row.input_ids.shape == row.labels.shape == row.position_ids.shape == (how.length,)
    assert row.input_ids[:real].tolist() == [token for token, _, _ in here]
    owner = row.document_of_token()
    assert owner[:real].tolist() == [document for _, document, _ in here]
    assert (owner[real:] == -1).all()
    assert row.boundaries.dtype == np.int32
    assert row.boundaries[0] == 0
    assert row.boundaries[-1] == how.length
    starts = [t for t in range(real) if t == 0 or here[t][2]] + ([real] if real < how.length else [])
    assert row.boundaries[:-1].tolist() == starts
    for t in range(how.length):
        target = stream[begin + t + 1] if t < real and begin + t + 1 < len(stream) else None
        crosses = target is not None and target[2] and how.mask_documents
        assert row.labels[t] == (-100 if target is None or crosses else target[0])
    restart = how.positions == "document" or (how.positions == "auto" and how.mask_documents)
    origin = np.repeat(row.boundaries[:-1], np.diff(row.boundaries)) if restart else 0
    assert np.array_equal(row.position_ids, np.arange(how.length) - origin)


@settings(max_examples=80)
@given(texts=DOCUMENTS, how=SETTINGS)
def test_rows_start_with_a_document_where_a_row_end_drops_the_rest(tiny_tokenizer, texts, how):
    how = replace(how, row_end="drop", long_documents="split")
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(tiny_tokenizer, Path(folder) / "store", texts)
        stream = expected_stream(store, tiny_tokenizer, how)
        expected, row = [], []
        for _, group in groupby(stream, key=lambda item: item[1]):
            tokens = [token for token, _, _ in group]
            room = how.length - len(row)
            row += tokens[:room]
            if len(row) == how.length:
                expected.append((row, tokens[room:]))
                row = []
        assume(expected)
        rows = pack(store, tiny_tokenizer, Path(folder) / "rows", how, rows_per_shard=2, quiet=True)
        counts = rows.manifest
        assert len(rows) == len(expected) + (how.tail == "pad" and row != [])
        for found, (ids, rest) in zip(rows, expected, strict=False):
            assert found.input_ids.tolist() == ids
            if rest:
                assert found.labels[-1] == rest[0], "the document's own next token is still a target"
        left_out = sum(len(rest) for _, rest in expected)
        packed = counts["document_tokens"] + counts["separator_tokens"]
        assert packed == len(stream) - left_out
        assert counts["document_tokens"] + counts["dropped_tokens"] == store.tokens
        if how.join == "none":
            assert counts["dropped_tokens"] == left_out


@settings(max_examples=60)
@given(texts=DOCUMENTS, how=SETTINGS, row_end=st.sampled_from(["continue", "drop"]), cut=st.integers(0, 30))
def test_the_stream_resumes_at_every_row(tiny_tokenizer, texts, how, row_end, cut):
    how = replace(how, row_end=row_end)
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(tiny_tokenizer, folder, texts)
        separators = resolve_separators(how, tiny_tokenizer)
        stream = RowStream(store, how, separators)
        states, rows = [stream.state_dict()], []
        for row in stream:
            rows.append(row)
            states.append(stream.state_dict())
        cut = min(cut, len(rows))
        again = list(RowStream(store, how, separators, states[cut]))
        assert len(again) == len(rows) - cut
        for old, new in zip(rows[cut:], again, strict=True):
            assert np.array_equal(old[0], new[0])
            assert old[1:] == new[1:]


@pytest.mark.parametrize("tail", ["drop", "pad"])
@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_a_crash_while_packing_leaves_nothing_half_and_resumes(tiny_tokenizer, tmp_path, monkeypatch, tail, after):
    store = make_store(tiny_tokenizer, tmp_path / "store", [f"document {i} says hello" for i in range(20)])
    how = PackSettings(16, tail=tail)
    pack(store, tiny_tokenizer, tmp_path / "whole", how, rows_per_shard=3, quiet=True)
    from ultralong.data.tokens import shards

    calls = {"left": after}

    def failing_replace(source, target):
        if ".lock" not in str(target):
            calls["left"] -= 1
        if calls["left"] < 0:
            raise OSError("no space left on device")
        return original(source, target)

    original = shards.os.replace
    monkeypatch.setattr(shards.os, "replace", failing_replace)
    with pytest.raises(OSError, match="no space"):
        pack(store, tiny_tokenizer, tmp_path / "cut", how, rows_per_shard=3, quiet=True)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no finished rows"):
        PackedRows(tmp_path / "cut")
    pack(store, tiny_tokenizer, tmp_path / "cut", how, rows_per_shard=3, quiet=True)
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir() if p.name != ".lock"} for n in ("whole", "cut")]
    assert files[0] == files[1]
    assert verify(tmp_path / "cut") == 2 * len(PackedRows(tmp_path / "cut").manifest["shards"])


@pytest.mark.parametrize("tail", ["drop", "pad"])
def test_a_crash_between_the_last_shard_and_the_manifest(tiny_tokenizer, tmp_path, tail):
    store = make_store(tiny_tokenizer, tmp_path / "store", [f"document {i} says hello" for i in range(20)])
    pack(store, tiny_tokenizer, tmp_path / "rows", PackSettings(16, tail=tail), rows_per_shard=3, quiet=True)
    before = (tmp_path / "rows" / "manifest.json").read_bytes()
    (tmp_path / "rows" / "manifest.json").unlink()
    pack(store, tiny_tokenizer, tmp_path / "rows", PackSettings(16, tail=tail), rows_per_shard=3, quiet=True)
    assert (tmp_path / "rows" / "manifest.json").read_bytes() == before


def test_the_separator_is_encoded_alone(tiny_tokenizer):
    separators = resolve_separators(PackSettings(8), tiny_tokenizer)
    assert tiny_tokenizer.decode(list(separators.between)) == "<s>"
    assert len(separators.between) > 1, "in this tokenizer, as in Llama-3's, <s> is ordinary text"
    assert separators.before == separators.after == ()


def test_same_seed_same_rows_other_seed_other_rows(tiny_tokenizer, tmp_path):
    store = make_store(tiny_tokenizer, tmp_path / "store", [f"document {i}" for i in range(50)])
    rows = [
        pack(store, tiny_tokenizer, tmp_path / f"rows{i}", PackSettings(32, seed=seed), quiet=True)
        for i, seed in enumerate((0, 0, 1))
    ]
    tokens = [np.stack([row[i].input_ids for i in range(len(row))]) for row in rows]
    assert np.array_equal(tokens[0], tokens[1])
    assert not np.array_equal(tokens[0], tokens[2])


def test_rows_are_read_lazily_and_survive_pickling(tiny_tokenizer, tmp_path):
    store = make_store(tiny_tokenizer, tmp_path / "store", ["the tide came in at dawn " * 40] * 10)
    rows = pack(store, tiny_tokenizer, tmp_path / "rows", PackSettings(64), rows_per_shard=4, quiet=True)
    assert len(pickle.dumps(rows)) < 20_000
    first = rows[0]
    copy = pickle.loads(pickle.dumps(rows))  # noqa: S301 - our own object
    assert np.array_equal(copy[len(rows) - 1].labels, rows[-1].labels)
    first.input_ids[:] = 0
    assert rows[0].input_ids.any(), "a row is a copy: writing to it must not reach the file"
    with pytest.raises(IndexError):
        rows[len(rows)]
    rows.release()
    assert rows[0].input_ids.any()


def test_other_settings_or_tokenizer_are_refused(tiny_tokenizer, tmp_path):
    store = make_store(tiny_tokenizer, tmp_path / "store", ["hello there, this is a text"] * 9)
    pack(store, tiny_tokenizer, tmp_path / "rows", PackSettings(8), quiet=True)
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        pack(store, tiny_tokenizer, tmp_path / "rows", PackSettings(8, seed=1), quiet=True)
    other = pickle.loads(pickle.dumps(tiny_tokenizer))  # noqa: S301 - our own object
    other.add_tokens(["hello"])
    with pytest.raises(ValueError, match="another tokenizer"):
        pack(store, other, tmp_path / "elsewhere", PackSettings(8), quiet=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"length": 1}, "at least 2"),
        ({"join": "comma"}, "join must be one of"),
        ({"tail": "keep"}, "tail must be"),
        ({"positions": "x"}, "positions must be"),
        ({"long_documents": "x"}, "long_documents must be"),
    ],
)
def test_nonsense_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        PackSettings(**{"length": 8, **wrong})


def test_joints_the_tokenizer_lacks_are_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="gives no token"):
        resolve_separators(PackSettings(8, separator=""), tiny_tokenizer)
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), name_or_path="my-model")
    with pytest.raises(ValueError, match="my-model gives no token for any text: it holds no tokenizer"):
        resolve_separators(PackSettings(8), empty)
    other = pickle.loads(pickle.dumps(tiny_tokenizer))  # noqa: S301 - our own object
    other.bos_token = None
    with pytest.raises(ValueError, match="BOS None"):
        resolve_separators(PackSettings(8, join="bos_eos"), other)

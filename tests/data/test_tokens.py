"""Tokenising: equal to the tokenizer, whole or not there, resumed to the same bytes, refused when something differs."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultralong.data.read.documents import Document
from ultralong.data.tokens.encoding import make_encoder, token_dtype, tokenizer_fingerprint
from ultralong.data.tokens.shards import verify
from ultralong.data.tokens.store import TokenStore
from ultralong.data.tokens.stored import StoredArray
from ultralong.data.tokens.tokenize import tokenize_corpus
from ultralong.utils.files import read_json


def corpus(count: int = 30) -> list[Document]:
    return [
        Document(f"d{i}", f"Document {i}: " + "the tide came in at dawn. " * (i % 7), f"s{i % 2}", "CC0-1.0")
        for i in range(count)
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def test_ids_equal_the_tokenizers_own(tiny_tokenizer, tmp_path):
    documents = [*corpus(), Document("control", "a <|turn|> is only text here", "s0", "CC0-1.0")]
    store = tokenize_corpus(documents, tiny_tokenizer, tmp_path / "store", shard_tokens=100, quiet=True)
    assert len(store) == len(documents)
    for index, document in enumerate(documents):
        expected = tiny_tokenizer(document.text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert store[index].tolist() == expected
        assert store.length(index) == len(expected)
        assert store.describe(index) == {"id": document.id, "source": document.source, "license": document.license}
    assert store.lengths.tolist() == [len(store[i]) for i in range(len(store))]
    assert tiny_tokenizer.convert_tokens_to_ids("<|turn|>") not in store[-1]


@given(texts=st.lists(st.text(max_size=60), max_size=20))
def test_any_text_survives(tiny_tokenizer, texts):
    for text, ids in zip(texts, make_encoder(tiny_tokenizer)(texts), strict=True):
        assert tiny_tokenizer.decode(ids) == text


def test_manifest_adds_up_and_hashes_hold(tiny_tokenizer, tmp_path):
    store = tokenize_corpus([*corpus(), Document("none", "")], tiny_tokenizer, tmp_path, shard_tokens=100, quiet=True)
    manifest = store.manifest
    assert manifest["tokens"] == sum(row["tokens"] for row in manifest["sources"].values()) == store.lengths.sum()
    assert manifest["documents"] == 30
    assert manifest["empty"] == 1
    assert manifest["sources"]["s0"]["licenses"] == {"CC0-1.0": manifest["sources"]["s0"]["tokens"]}
    assert manifest["sources"]["s1"]["characters"] == sum(len(d.text) for d in corpus() if d.source == "s1")
    assert len(manifest["shards"]) > 3
    assert verify(tmp_path) == 3 * len(manifest["shards"])
    damaged = tmp_path / "tokens-00001.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match=r"tokens-00001\.bin differs"):
        verify(tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_and_workers_do_not_change_the_bytes(tiny_tokenizer, tmp_path, workers):
    tokenize_corpus(corpus(), tiny_tokenizer, tmp_path / "a", shard_tokens=100, quiet=True)
    tokenize_corpus(
        corpus(), tiny_tokenizer, tmp_path / "b", shard_tokens=100, batch_characters=40, workers=workers, quiet=True
    )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("after", [0, 1, 7, 29])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tiny_tokenizer, tmp_path, after):
    def failing():
        yield from corpus()[:after]
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        tokenize_corpus(failing(), tiny_tokenizer, tmp_path / "a", shard_tokens=60, batch_characters=1, quiet=True)
    assert not (tmp_path / "a" / "manifest.json").exists()
    with pytest.raises(ValueError, match="no finished token store"):
        TokenStore(tmp_path / "a")
    tokenize_corpus(corpus(), tiny_tokenizer, tmp_path / "a", shard_tokens=60, quiet=True)
    tokenize_corpus(corpus(), tiny_tokenizer, tmp_path / "b", shard_tokens=60, quiet=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_killed_run_goes_on_to_the_same_bytes(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = textwrap.dedent(f"""
        import os, signal
        from transformers import AutoTokenizer
        from tests.data.test_tokens import corpus
        from ultralong.data.tokens.tokenize import tokenize_corpus
        def dying():
            yield from corpus()[:20]
            os.kill(os.getpid(), signal.SIGKILL)
        tokenize_corpus(dying(), AutoTokenizer.from_pretrained({str(tmp_path / "tokenizer")!r}),
                        {str(tmp_path / "a")!r}, shard_tokens=60, batch_characters=1, quiet=True)
    """)
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert "manifest.json" not in names
    assert "tokens-00000.json" in names
    tokenize_corpus(corpus(), tiny_tokenizer, tmp_path / "a", shard_tokens=60, quiet=True)
    tokenize_corpus(corpus(), tiny_tokenizer, tmp_path / "b", shard_tokens=60, quiet=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_changed_documents_are_refused(tiny_tokenizer, tmp_path):
    tokenize_corpus(corpus(), tiny_tokenizer, tmp_path, shard_tokens=60, quiet=True)
    changed = [Document(d.id, d.text.replace("dawn", "dusk"), d.source, d.license) for d in corpus()]
    with pytest.raises(ValueError, match="have changed since"):
        tokenize_corpus(changed, tiny_tokenizer, tmp_path, shard_tokens=60, quiet=True)
    with pytest.raises(ValueError, match="have changed since"):
        tokenize_corpus(corpus(20), tiny_tokenizer, tmp_path, shard_tokens=60, quiet=True)
    with pytest.raises(ValueError, match="more documents now"):
        tokenize_corpus(corpus(31), tiny_tokenizer, tmp_path, shard_tokens=60, quiet=True)
    tokenize_corpus(corpus(), tiny_tokenizer, tmp_path, shard_tokens=60, quiet=True)


def test_with_provenance_a_finished_store_is_not_read_again(tiny_tokenizer, tmp_path):
    def unreadable():
        raise AssertionError("read again")
        yield

    tokenize_corpus(corpus(), tiny_tokenizer, tmp_path, provenance={"recipe": "a"}, quiet=True)
    tokenize_corpus(unreadable(), tiny_tokenizer, tmp_path, provenance={"recipe": "a"}, quiet=True)
    with pytest.raises(ValueError, match=r"provenance\.recipe was 'a', now 'b'"):
        tokenize_corpus(unreadable(), tiny_tokenizer, tmp_path, provenance={"recipe": "b"}, quiet=True)


def test_another_tokenizer_is_refused(tiny_tokenizer, tmp_path):
    store = tokenize_corpus(corpus(), tiny_tokenizer, tmp_path, quiet=True)
    store.check_tokenizer(tiny_tokenizer)
    other = pickle.loads(pickle.dumps(tiny_tokenizer))  # noqa: S301 - our own object
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tiny_tokenizer)
    other.add_tokens(["lighthouse"])
    with pytest.raises(ValueError, match="another tokenizer"):
        store.check_tokenizer(other)
    with pytest.raises(ValueError, match=r"tokenizer\.vocabulary was 400, now 401"):
        tokenize_corpus(corpus(), other, tmp_path, quiet=True)


def test_identity_survives_saving_and_use(tiny_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    before = tokenizer_fingerprint(tiny_tokenizer)
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded(["a", "b c d"], padding=False, truncation=True, max_length=1)
    assert tokenizer_fingerprint(loaded)["sha256"] == before["sha256"]


def test_two_writers_do_not_meet(tiny_tokenizer, tmp_path):
    def second_writer():
        yield from corpus()
        tokenize_corpus(corpus(), tiny_tokenizer, tmp_path, quiet=True)

    with pytest.raises(ValueError, match="Another process"):
        tokenize_corpus(second_writer(), tiny_tokenizer, tmp_path, quiet=True)


def test_store_reads_lazily_and_pickles_small(tiny_tokenizer, tmp_path, monkeypatch):
    store = tokenize_corpus(corpus(), tiny_tokenizer, tmp_path, shard_tokens=100, quiet=True)
    ids = store[5]
    read, sizes = StoredArray.read, []
    monkeypatch.setattr(StoredArray, "read", lambda self, *ends: sizes.append(ends[1] - ends[0]) or read(self, *ends))
    assert np.array_equal(store[5], ids)
    assert sorted(sizes) == sorted([2, len(ids)])  # two offsets, and its ids
    copy = pickle.loads(pickle.dumps(store))  # noqa: S301 - our own object
    assert np.array_equal(copy[5], ids)
    assert np.array_equal(store[-1], store[len(store) - 1])
    with pytest.raises(IndexError):
        store[len(store)]


def test_a_folder_of_something_else_is_refused(tiny_tokenizer, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no settings.json"):
        tokenize_corpus(corpus(), tiny_tokenizer, tmp_path, quiet=True)
    assert read_json(tmp_path / "manifest.json") == {}


@pytest.mark.parametrize(("vocabulary", "bytes_each"), [(400, 2), (65_535, 2), (65_536, 4), (128_256, 4)])
def test_the_type_leaves_room_for_no_token(vocabulary, bytes_each):
    dtype = token_dtype(vocabulary)
    assert dtype.itemsize == bytes_each
    assert vocabulary - 1 < np.iinfo(dtype).max


def test_nonsense_settings_are_refused(tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        tokenize_corpus(corpus(), tiny_tokenizer, tmp_path, shard_tokens=0)

"""Folders of shards: damage is found and mended, foreign files stay, and `verify` names what differs."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from ultralong.cli import main
from ultralong.data.chat.pack import ChatSettings, pack_chat
from ultralong.data.read.documents import Document
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.data.rows.packing import PackSettings, pack
from ultralong.data.tokens.shards import ShardFolder, verify
from ultralong.data.tokens.store import TokenStore
from ultralong.data.tokens.tokenize import tokenize_corpus


def corpus() -> list[Document]:
    return [Document(f"d{n}", f"Document {n}: " + "the tide came in at dawn. " * 9) for n in range(20)]


@pytest.fixture
def made(tiny_tokenizer, tmp_path):
    """Rows with their token store, several shards each, and how to make them again."""

    def make(out=tmp_path / "rows"):
        store = tokenize_corpus(
            corpus(), tiny_tokenizer, out / "tokens", shard_tokens=900, provenance={"a": 1}, quiet=True
        )
        return pack(store, tiny_tokenizer, out, PackSettings(64), rows_per_shard=8, quiet=True)

    make()
    shutil.copytree(tmp_path / "rows", tmp_path / "whole")
    return make


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-2] ^= 4
    path.write_bytes(bytes(data))


DAMAGE = {"cut": cut, "deleted": lambda path: path.unlink(), "a bit": flip, "empty": lambda path: path.write_bytes(b"")}
FILES = ["rows-00001.npy", "rows-00000.segments.npy", "tokens/tokens-00001.bin", "tokens/tokens-00000.offsets.npy"]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, "tokens/tokens-00002.documents.jsonl"])
def test_a_damaged_shard_of_a_finished_folder_is_made_again(made, tmp_path, capsys, name, damage):
    DAMAGE[damage](tmp_path / "rows" / name)
    folder = (tmp_path / "rows" / name).parent
    with pytest.raises(ValueError, match=name.split("/")[-1]):
        verify(folder)
    made()
    assert f"{name.split('/')[-1]}" in capsys.readouterr().err
    for inner in ("", "tokens"):
        assert contents(tmp_path / "rows" / inner) == contents(tmp_path / "whole" / inner)
        assert verify(tmp_path / "rows" / inner) > 0


@pytest.mark.parametrize("name", FILES[:3])
def test_a_damaged_shard_of_an_unfinished_folder_is_made_again(made, tmp_path, name):
    flip(tmp_path / "rows" / name)
    (tmp_path / "rows" / name).with_name("manifest.json").unlink()
    made()
    for inner in ("", "tokens"):
        assert contents(tmp_path / "rows" / inner) == contents(tmp_path / "whole" / inner)


@pytest.mark.parametrize("damage", ["cut", "deleted", "empty"])
def test_a_file_that_lost_bytes_is_named_when_it_is_read(made, tmp_path, damage):
    for name in ("tokens/tokens-00001.bin", "tokens/tokens-00001.offsets.npy"):
        DAMAGE[damage](tmp_path / "rows" / name)
        with pytest.raises(ValueError, match=r"tokens-00001\.(bin|offsets).*makes it whole"):
            [*TokenStore(tmp_path / "rows" / "tokens")]
    with pytest.raises(ValueError, match=r"tokens-00001.*makes it whole"):
        _ = TokenStore(tmp_path / "rows" / "tokens").lengths
    DAMAGE[damage](tmp_path / "rows" / "rows-00001.npy")
    rows = PackedRows(tmp_path / "rows")
    assert rows[0].input_ids.size == 64
    with pytest.raises(ValueError, match=r"rows-00001\.npy.*makes it whole"):
        _ = rows[9]


def test_damaged_rows_of_conversations_are_made_again(tiny_tokenizer, tmp_path):
    talks = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a" * 40}] for n in range(30)]

    def make():
        return pack_chat(talks, tiny_tokenizer, tmp_path / "rows", ChatSettings(128), rows_per_shard=2, quiet=True)

    make()
    before = contents(tmp_path / "rows")
    cut(tmp_path / "rows" / "rows-00001.targets.npy")
    make()
    assert contents(tmp_path / "rows") == before


def test_foreign_files_in_the_folder_stay(made, tmp_path):
    foreign = (
        "rows-mine.txt",
        "rows-2024.tar.gz",
        "rows-00000.bak",
        ".download.partial",
        "rows-1.npy",
        "rows-00000-x.npy",
    )
    for name in foreign:
        (tmp_path / "rows" / name).write_text("precious")
    (tmp_path / "rows" / "rows-00009.npy").mkdir()
    (tmp_path / "rows" / ".rows-00007.npy.partial").write_text("left over")
    (tmp_path / "rows" / ".manifest.json.abcd1234.partial").write_text("left over")
    (tmp_path / "rows" / "manifest.json").unlink()
    made()
    left = {path.name for path in (tmp_path / "rows").iterdir()}
    assert left >= {*foreign, "rows-00009.npy"}
    assert not left & {".rows-00007.npy.partial", ".manifest.json.abcd1234.partial"}


@pytest.mark.parametrize("name", ["rows-00000.npy", "rows-00003.json", "rows-00001.segments.npy"])
def test_files_of_such_names_that_nobody_made_here_are_refused(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match=f"holds {name}, which this run did not write"):
        ShardFolder(tmp_path, "rows", {}).resume()
    assert (tmp_path / name).read_text() == "precious"
    assert ShardFolder(tmp_path, "tokens", {}).resume() == []


def test_the_command_compares_rows_and_tokens(made, tmp_path, capsys):
    main(["data", "verify", str(tmp_path / "rows")])
    told = capsys.readouterr().out
    assert told.count("all as their manifest says") == 2
    flip(tmp_path / "rows" / "tokens" / "tokens-00000.bin")
    for folder in (tmp_path / "rows", tmp_path / "rows" / "tokens"):
        with pytest.raises(SystemExit, match="1"):
            main(["data", "verify", str(folder)])
        assert "tokens-00000.bin differs from its record" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        main(["data", "verify", str(tmp_path)])
    assert "no finished shards" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_file_where_a_folder_should_be_is_named(tiny_tokenizer, tmp_path, out):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is a file, and a folder is needed"):
        tokenize_corpus(corpus(), tiny_tokenizer, tmp_path / out, quiet=True)
    with pytest.raises(ValueError, match="file is a file, and a folder is needed"):
        ShardFolder(tmp_path / out, "rows", {}).resume()


def test_reading_does_not_map_what_it_does_not_need(made, tmp_path):
    """Sizes are looked at, bytes are not: opening a large folder costs nothing."""
    flip(tmp_path / "rows" / "rows-00000.npy")
    assert isinstance(PackedRows(tmp_path / "rows")[0].input_ids, np.ndarray)

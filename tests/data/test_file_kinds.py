"""Files by what they hold: names in any case, links, foreign kinds, limits of size, values that Python cannot hold."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os

import pytest

from ultralong.data.read.compressed import lines, parse_json
from ultralong.data.read.datasets import Dataset, dataset_rows
from ultralong.data.read.detect import ForeignFile, file_format
from ultralong.data.read.documents import Document, ReadReport
from ultralong.data.read.listing import list_files
from ultralong.data.read.readers import ReadSettings, RecordReader

zstandard = pytest.importorskip("zstandard")
pyarrow = pytest.importorskip("pyarrow")
TEXTS = ["the tide came in", "a lantern at dawn"]
JSON_LINES = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:01\nsize 9\n"
LONG = b"".join(json.dumps({"text": f"{'word ' * 40}{n}"}).encode() + b"\n" for n in range(2000))


def read(path, **settings) -> tuple[list[str], ReadReport]:
    reader = RecordReader(ReadSettings(**settings))
    return [d.text for d in reader.documents(list_files(path, report=reader.report), "s", "x")], reader.report


@pytest.mark.parametrize(
    "name",
    ["a.JSONL", "a.Ndjson", "a.jsonlines", "a.jl", "part-00003", "a.jsonl.1", "a.txt", "a", "shard_0.data", "a.json"],
)
def test_json_lines_by_any_name_are_records(tmp_path, name):
    (tmp_path / name).write_bytes(JSON_LINES)
    assert read(tmp_path)[0] == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl.GZ", "a.gz", "a.jsonl.gzip", "a.backup"])
def test_what_is_compressed_is_known_by_its_content(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(JSON_LINES))
    assert read(tmp_path)[0] == TEXTS


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("a.jsonl.ZST", zstandard.ZstdCompressor().compress),
        ("a.jsonl.zstd", zstandard.ZstdCompressor().compress),
        ("a.jsonl.Bz2", bz2.compress),
        ("a.jsonl.XZ", lzma.compress),
        ("a.jsonl.lzma", lambda data: lzma.compress(data, lzma.FORMAT_ALONE)),
    ],
)
def test_endings_of_compressed_files_in_any_case(tmp_path, name, compress):
    (tmp_path / name).write_bytes(compress(JSON_LINES))
    assert read(tmp_path)[0] == TEXTS


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"text": text} for text in TEXTS]),
        json.dumps([{"text": text} for text in TEXTS], indent=2),
        "".join(json.dumps({"text": text}, indent=1) + "\n" for text in TEXTS),
        "\n\n" + "".join("\x1e" + json.dumps({"text": text}) + "\n" for text in TEXTS),
        "\ufeff" + JSON_LINES.decode(),
    ],
    ids=["list", "pretty list", "pretty objects in a row", "RFC 7464", "byte order mark"],
)
@pytest.mark.parametrize("name", ["part-0", "data.txt"])
def test_other_forms_of_json_are_never_text(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    texts, report = read(tmp_path)
    assert texts == TEXTS
    assert set(report.skipped) <= {"not JSON"}


@pytest.mark.parametrize(
    "content",
    ["{braces} open this text", "[1] A list of references.", '"Quoted," he said.', "{\\rtf1 none}", "[link](x) {a: 1}"],
)
def test_texts_that_begin_like_json_are_texts(tmp_path, content):
    (tmp_path / "a.md").write_text(content)
    assert read(tmp_path)[0] == [content]


def test_json_with_other_fields_is_left_out_and_said(tmp_path):
    (tmp_path / "notebook.ipynb").write_text(json.dumps({"cells": []}, indent=1))
    (tmp_path / "a.txt").write_text("text")
    texts, report = read(tmp_path)
    assert texts == ["text"]
    assert report.skipped == {"no field 'text'": 1}
    assert len(read(tmp_path, format="text")[0]) == 2, "who wants its source as text says so"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"%PDF-1.7 ...", "a PDF"),
        (b"WARC/1.0\r\n", "WARC"),
        (POINTER, "git lfs pull"),
        (b"PK\x03\x04...", "zip"),
        (b"ARROW1\0\0...", "Arrow"),
        (b"Rar!\x1a\x07\0", "rar"),
    ],
)
def test_files_of_other_programs_are_named(tmp_path, content, what):
    (tmp_path / "a.bin").write_bytes(content)
    _, report = read(tmp_path, encoding="latin-1")
    assert report.skipped == {"a kind of file that is not read": 1}
    assert what in report.examples["a kind of file that is not read"][0]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet"])
def test_a_pointer_in_the_place_of_a_file_is_no_text_and_no_damage(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    texts, report = read(tmp_path)
    assert not texts
    assert "git lfs pull" in report.examples["a kind of file that is not read"][0]


@pytest.mark.parametrize("name", ["a.csv", "A.TSV", "a.csv.gz"])
def test_a_table_is_not_read_as_a_text(tmp_path, name):
    """Its commas, quotes and numbers of rows would be trained on."""
    table = b'id,text\n1,"a ""quoted"" text, over\ntwo lines"\n'
    (tmp_path / name).write_bytes(gzip.compress(table) if name.endswith("gz") else table)
    texts, report = read(tmp_path)
    assert not texts
    assert "format: text" in report.examples["a kind of file that is not read"][0]
    assert read(tmp_path, format="text")[0] == [table.decode()], "who wants its source as text says so"
    assert not read(tmp_path, join="directory")[0]


def test_a_folder_joined_to_a_text_leaves_data_files_out(tmp_path):
    (tmp_path / "a.c").write_text("int a;")
    (tmp_path / "b.JSONL").write_bytes(JSON_LINES)
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    texts, report = read(tmp_path, join="directory")
    assert texts == ["int a;"]
    assert report.skipped == {"not a text file (JSON lines)": 1, "not a text file (Parquet)": 1}


def test_parquet_by_another_name(tmp_path):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "part-7")
    assert read(tmp_path)[0] == TEXTS


def test_a_zstandard_window_beyond_the_librarys_limit(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    with open(tmp_path / "a.jsonl.zst", "wb") as stream, compressor.stream_writer(stream, closefd=False) as writer:
        writer.write(JSON_LINES)
    assert read(tmp_path)[0] == TEXTS


def test_linked_files_and_folders_are_read_once(tmp_path):
    outside = tmp_path / "blobs"
    outside.mkdir()
    for name in ("one", "two", "three"):
        (outside / name).write_text(name)
    folder = tmp_path / "snapshot"
    (folder / "sub").mkdir(parents=True)
    (folder / "own.txt").write_text("own")
    (folder / "a.txt").symlink_to("../blobs/one")
    (folder / "again.txt").symlink_to(outside / "one")
    (folder / "inner.txt").symlink_to("own.txt")
    (folder / "sub" / "more").symlink_to(outside)
    (folder / "sub" / "up").symlink_to("..")
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "round.txt").symlink_to("round.txt")
    texts, report = read(folder)
    assert sorted(texts) == ["one", "own", "three", "two"]
    assert report.noted["a file behind a link"] == 3
    assert report.noted["a link to a file that is read anyway"] == 3
    assert report.noted["a link to nothing"] == 2
    (folder / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"no file that matches \*\.md; 3 a link to nothing"):
        list_files(folder, ("*.md",))


def test_names_that_are_no_text(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "wb") as stream:
        stream.write(b"text")
    reader = RecordReader()
    (document,) = reader.documents(list_files(tmp_path), "s", "x")
    assert document == Document("s/caf\\udce9.txt", "text", "s", "x")
    (tmp_path / "b.jsonl").write_text('{"text": "b", "id": "\\ud800"}\n')
    reader = RecordReader(ReadSettings(id_field="id"))
    (document,) = reader.documents([("b.jsonl", tmp_path / "b.jsonl")], "s", "x")
    assert document.id == "s/\\ud800"


@pytest.mark.parametrize("data", [b'{"n": %s}' % (b"7" * 5000), b'[1, {"a": [-%s]}]' % (b"9" * 4301)])
def test_integers_that_python_does_not_convert(data):
    assert b"7777" in json.dumps(parse_json(data)).encode() or b"9999" in json.dumps(parse_json(data)).encode()


def test_a_record_with_a_huge_integer_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "primes", "n": ' + b"7" * 5000 + b"}\n" + JSON_LINES)
    (tmp_path / "b.json").write_bytes(b'[{"text": "x", "n": ' + b"7" * 5000 + b'}, {"text": "y"}, {')
    texts, report = read(tmp_path)
    assert texts == ["primes", *TEXTS, "x", "y"]
    assert report.skipped == {"not JSON": 1}


def test_lines_and_files_beyond_the_limit_are_counted(tmp_path):
    long = json.dumps({"text": "x" * 5000}).encode() + b"\n"
    for ending, compress in {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.items():
        (tmp_path / f"a.jsonl{ending}").write_bytes(compress(JSON_LINES + long + JSON_LINES))
    (tmp_path / "b.txt").write_text("y" * 5000)
    texts, report = read(tmp_path, largest_record=1000)
    assert texts == [*TEXTS, *TEXTS] * 3
    assert report.skipped == {"more than 1,000 bytes (largest_record)": 4}
    assert "a.jsonl:3" in report.examples["more than 1,000 bytes (largest_record)"]
    assert list(lines(tmp_path / "b.txt", 10)) == [None]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_a_small_file_that_stands_for_a_huge_one_is_never_held_whole(tmp_path, kind):
    """Peak memory of reading 400 MB of zeros behind a few KB, in a process of its own."""
    import subprocess
    import sys

    options = {"gz": {"compresslevel": 1}, "bz2": {"compresslevel": 1}, "xz": {"preset": 0}, "zst": {}}[kind]
    opening = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open, "zst": zstandard.open}[kind]
    with opening(tmp_path / f"a.txt.{kind}", "wb", **options) as stream:
        for _ in range(400):
            stream.write(bytes(1 << 20))
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from ultralong.data.read.compressed import TooLarge, content\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    content(Path(sys.argv[1]), 1 << 24)\n    sys.exit(3)\n"
        "except TooLarge:\n    pass\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    path = next(tmp_path.iterdir())
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 250


def test_parquet_rows_that_python_cannot_hold_are_counted(tmp_path):
    import pyarrow.parquet

    bad = pyarrow.array([b"good", b"\xff\xfe", b"fine"]).cast(pyarrow.binary())
    column = pyarrow.StringArray.from_buffers(3, bad.buffers()[1], bad.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    texts, report = read(tmp_path)
    assert texts == ["good", "fine"]
    assert report.skipped == {"not UTF-8": 1}
    assert report.examples["not UTF-8"] == ["a.parquet:2"]
    dates = pyarrow.array([0, 1 << 60], pyarrow.int64()).cast(pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "when": dates}), tmp_path / "a.parquet")
    reader = RecordReader()
    assert [row["text"] for _, row in reader.rows(list_files(tmp_path))] == ["a"]
    assert reader.report.skipped == {"a value that cannot be read": 1}


@pytest.mark.parametrize("bad", [b'{"text": "\xff"}', b'{"text": "x", "n": ' + b"7" * 5000 + b"}"])
def test_a_dataset_that_ends_in_an_error_names_its_row(tmp_path, bad):
    pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_bytes(LONG * 30 + bad + b"\n")
    with pytest.raises(ValueError, match=r"split 'train' cannot be read beyond row [0-9,]+: \w+"):
        for _ in dataset_rows(Dataset(str(tmp_path))):
            pass


def test_nulls_and_missing_columns_of_a_dataset_are_counted(tmp_path):
    pytest.importorskip("datasets")
    rows = [{"text": "one"}, {"text": None}, {"body": "x"}, {"text": 7}, {"text": "two"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    (tmp_path / "b.jsonl").write_text(json.dumps(rows[4]) + "\n")
    reader = RecordReader()
    found = list(reader.checked(reader.dataset(Dataset(str(tmp_path))), "s", "x"))
    assert [document.text for document in found] == ["one", "two"]
    assert reader.report.skipped == {"text is not a string": 2}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "JSONL.gz"])
def test_json_in_another_encoding_is_refused_as_a_whole(tmp_path, encoding, ending):
    """Its first line alone was read, and the others were counted as no JSON."""
    content = ('{"text": "The night is dark."}\n' * 4).encode(encoding)
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    with pytest.raises(ForeignFile, match="UTF-16 or UTF-32"):
        file_format(path)
    with pytest.raises(UnicodeDecodeError):
        parse_json(content)

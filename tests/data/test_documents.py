"""Reading: every kind of file and of damage: a counted skip, or with strict an error; nothing lost before it."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random

import pytest

from ultralong.data.read.datasets import Dataset, dataset_rows
from ultralong.data.read.documents import Document, ReadReport
from ultralong.data.read.readers import ReadSettings, RecordReader, list_files
from ultralong.data.select.clean import strip_gutenberg, strip_rfc

pyarrow = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(level=1).compress,
}
LINES = b"".join(json.dumps({"text": f"text number {i}", "n": i}).encode() + b"\n" for i in range(2000))


def read(path, **settings) -> tuple[list[Document], ReadReport]:
    reader = RecordReader(ReadSettings(**settings))
    return list(reader.documents(list_files(path), "s", "CC0-1.0")), reader.report


@pytest.mark.parametrize("ending", COMPRESS)
def test_text_files_compressed_or_not(tmp_path, ending):
    (tmp_path / f"a.txt{ending}").write_bytes(COMPRESS[ending]("Köln\r\nam Rhein".encode()))
    documents, report = read(tmp_path)
    assert documents == [Document(f"s/a.txt{ending}", "Köln\nam Rhein", "s", "CC0-1.0")]
    assert report.as_json() == {"documents": 1, "characters": 13, "skipped": {}, "examples": {}}


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("last", [b"", b'{"text": "no line break at the end"}'])
def test_json_lines_compressed_or_not(tmp_path, ending, last):
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS[ending](LINES + last))
    documents, report = read(tmp_path)
    assert len(documents) == 2000 + bool(last)
    assert documents[41].text == "text number 41"
    assert documents[41].id == f"s/a.jsonl{ending}:42"
    assert not report.skipped


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_several_frames_in_a_file_are_all_read(tmp_path, ending):
    """Appending to a compressed log makes such files; some readers stop at the first frame's end."""
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS[ending](LINES) * 3)
    assert len(read(tmp_path)[0]) == 6000


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_truncated_file_gives_what_it_holds_and_is_counted(tmp_path, ending):
    draw = random.Random(0)
    # Random enough to compress badly, so that a good part comes before the cut for every method.
    rows = b"".join(json.dumps({"text": draw.randbytes(200).hex()}).encode() + b"\n" for _ in range(4000))
    whole = COMPRESS[ending](rows)
    (tmp_path / f"a.jsonl{ending}").write_bytes(whole[: len(whole) * 3 // 4])
    documents, report = read(tmp_path)
    assert report.skipped == {"truncated or damaged file": 1}
    assert "after line" in report.examples["truncated or damaged file"][0]
    if ending != ".bz2":  # its blocks are 900 KB: fewer come through whole
        assert len(documents) > 2000
    assert all(len(document.text) == 400 for document in documents), "no line is given out cut in two"
    with pytest.raises(ValueError, match="truncated or damaged"):
        read(tmp_path, strict=True)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", "Köln".encode("latin-1"), "not UTF-8"),
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\t ", "empty"),
        ("a.txt", b"ELF\0\0", "binary"),
        ("a.txt.gz", b"no gzip at all", "truncated or damaged file"),
        ("a.txt.gz", b"", "truncated or damaged file"),
        ("a.jsonl", b'{"text": \n', "not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "no field 'text'"),
        ("a.jsonl", b'{"text": 7}\n', "text is not a string"),
        ("a.jsonl", b'"text"\n', "not an object"),
        ("a.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
        ("a.json", b"[1, 2", "not JSON"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "not JSON"),
        ("a.parquet", b"PAR1 and then nothing", "truncated or damaged file"),
    ],
)
def test_bad_input_is_a_counted_skip_or_an_error(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "z-good.txt").write_text("good")
    documents, report = read(tmp_path)
    assert [document.text for document in documents] == ["good"]
    assert dict(report.skipped) == {reason: 1}
    assert name in report.examples[reason][0]
    assert reason in str(report)
    with pytest.raises(ValueError, match="Correct it, or read without strict"):
        read(tmp_path, strict=True)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}\n')
    assert [document.text for document in read(tmp_path)[0]] == ["one", "two"]


def test_other_encodings_when_asked_for(tmp_path):
    (tmp_path / "a.txt").write_bytes("Köln".encode("latin-1"))
    assert read(tmp_path, encoding="latin-1")[0][0].text == "Köln"


def test_json_objects_and_lists_and_ids(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"body": "one", "key": "k1"}))
    (tmp_path / "b.json").write_text(json.dumps([{"body": "two", "key": 2}, {"body": "three"}]))
    documents, _ = read(tmp_path, field="body", id_field="key")
    assert [(d.id, d.text) for d in documents] == [("s/k1", "one"), ("s/2", "two"), ("s/b.json:2", "three")]


def test_parquet_in_small_batches(tmp_path):
    import pyarrow.parquet

    table = pyarrow.table({"text": [f"t{i}" for i in range(200)] + [None], "other": list(range(201))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    documents, report = read(tmp_path)
    assert [document.text for document in documents] == [f"t{i}" for i in range(200)]
    assert report.skipped == {"text is not a string": 1}
    with pytest.raises(ValueError, match=r"no column 'body'; it has text, other"):
        read(tmp_path, field="body")


def test_a_dataset_saved_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two"], "id": ["a", "b"]})
    rows.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    for name in ("plain", "splits"):
        reader = RecordReader(ReadSettings(id_field="id"))
        assert list(reader.dataset(Dataset(str(tmp_path / name)))) == [("a", "one"), ("b", "two")]
    with pytest.raises(ValueError, match="split 'test' cannot be opened"):
        list(RecordReader().dataset(Dataset(str(tmp_path / "splits"), "test")))
    with pytest.raises(ValueError, match="no column 'body'"):
        list(RecordReader(ReadSettings(field="body")).dataset(Dataset(str(tmp_path / "plain"))))
    (tmp_path / "plain").rename(tmp_path / "before")
    (tmp_path / "elsewhere").mkdir()
    rows.remove_columns("id").save_to_disk(tmp_path / "plain")
    rows.remove_columns("id").save_to_disk(tmp_path / "elsewhere" / "plain")
    names = [
        [name for name, _ in dataset_rows(Dataset(str(folder / "plain")))]
        for folder in (tmp_path, tmp_path / "elsewhere")
    ]
    assert names == [["plain:0", "plain:1"]] * 2, "a folder that is moved gives the same corpus"


def test_a_directory_becomes_one_document(tmp_path):
    for name, text in {"b/y.c": "by", "a.c": "top", "b/x.c": "bx", "b/deep/z.c": "bz", "c/bad.c": "\udcff"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    documents, report = read(tmp_path, join="directory", format="text")
    assert [(d.id, d.text) for d in documents] == [("s/.", "top"), ("s/b", "bx\nby"), ("s/b/deep", "bz")]
    assert report.skipped == {"not UTF-8": 1}


def test_listing_files(tmp_path):
    for name in ("a.txt", "b/c.txt", "b/.hidden", ".git/x.txt", "b/d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    assert [name for name, _ in list_files(tmp_path)] == ["a.txt", "b/c.txt", "b/d.md"]
    assert [name for name, _ in list_files(tmp_path, ("*.txt",), ("b/*",))] == ["a.txt"]
    assert list_files(tmp_path / "a.txt") == [("a.txt", tmp_path / "a.txt")]
    with pytest.raises(ValueError, match="does not exist"):
        list_files(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no file that matches \*\.rst"):
        list_files(tmp_path, ("*.rst",))


def test_the_report_keeps_a_few_examples():
    report = ReadReport()
    for number in range(20):
        report.skip("empty", f"d{number}")
    assert report.skipped["empty"] == 20
    assert report.examples["empty"] == [f"d{i}" for i in range(5)]


def test_gutenberg_notices_go():
    text = (
        "The Project Gutenberg eBook of X\n\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\n\nCall me Ishmael.\n"
        "*** END OF THE PROJECT GUTENBERG EBOOK X ***\nlicence\n"
    )
    assert strip_gutenberg(text) == "Call me Ishmael.\n"
    assert strip_gutenberg("Call me Ishmael.\n") == "Call me Ishmael.\n"


RFC = """\
Network Working Group                                          A. Author
Request for Comments: 9999                                  January 2023


1.  Introduction

   This sentence is cut by a page break in the middle of what it



Author                   Standards Track                        [Page 1]
\f
RFC 9999                      A Title                       January 2023


   says, and goes on here.



Author                   Standards Track                        [Page 2]
\f
RFC 9999                      A Title                       January 2023


2.  The RFC 793 of September 1981 is text and stays.
"""


def test_rfc_page_furniture_goes_and_text_stays():
    assert (
        strip_rfc(RFC)
        == """\
Network Working Group                                          A. Author
Request for Comments: 9999                                  January 2023


1.  Introduction

   This sentence is cut by a page break in the middle of what it
   says, and goes on here.

2.  The RFC 793 of September 1981 is text and stays.
"""
    )


def test_the_oldest_rfcs_headers_go_too():
    text = (
        "one.\n\n[page 2]                 Postel\n\f\n28 Aug 1980\nRFC 768      UDP\n       Fields\n\ntwo.\n\n"
        "                [Page i]\n\f\n\nSeptember 1981\n      Internet Protocol\n\nthree"
    )
    assert strip_rfc(text) == "one.\n\ntwo.\n\nthree\n"
    assert strip_rfc("no pages\nat all\n") == "no pages\nat all\n"

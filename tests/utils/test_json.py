"""A key that stands twice in a JSON object is named: programs keep the one value or the other."""

from __future__ import annotations

import json
import shutil

import pytest

from ultralong import miniature
from ultralong.checkpoints.config import check_whole, load_config
from ultralong.data.read.compressed import parse_json
from ultralong.data.read.readers import RecordReader
from ultralong.evaluation.runs.answer_files import read_answers
from ultralong.utils.files import read_json, read_jsonl
from ultralong.utils.text_formats import TwiceError, json_value

TWICE = ('{"a": 1, "a": 2}', '{"a": {"b": 1, "c": 2, "b": 3}}', '[{"x": 0}, {"x": 0, "x": 0}]')


@pytest.mark.parametrize("text", TWICE)
def test_it_is_refused_by_name_wherever_it_stands(text, tmp_path):
    for read in (json_value, parse_json):
        with pytest.raises(TwiceError, match=r"the key '[abx]' stands twice"):
            read(text.encode())
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(ValueError, match=r"f\.json is not valid JSON \(the key '[abx]' stands twice\)"):
        read_json(tmp_path / "f.json")
    (tmp_path / "f.jsonl").write_text(text + "\n")
    for read in (read_jsonl, read_answers):
        with pytest.raises(ValueError, match="line 1: not valid JSON"):
            read(tmp_path / "f.jsonl")


def test_other_values_are_as_ever():
    for text in ("{}", '{"a": {"a": 1}, "b": [{"a": 1}, {"a": 1}]}', "[1, 2.5, null]", '{"a": NaN}'):
        assert repr(json_value(text.encode())) == repr(json.loads(text))
        assert repr(parse_json(text.encode())) == repr(json.loads(text))
    assert parse_json(b'{"a": ' + b"1" * 5000 + b"}") == {"a": "1" * 5000}


@pytest.mark.parametrize("again", ['"text": "other"', '"id": "x"', '"meta": {"n": 1, "n": 2}'])
def test_a_record_is_counted_as_left_out(tmp_path, again):
    good = {"text": "The tide came in.", "id": "a"}
    (tmp_path / "t.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good)[:-1] + f", {again}}}\n")
    reader = RecordReader()
    assert len(list(reader.documents([("t.jsonl", tmp_path / "t.jsonl")], "s", "CC0-1.0"))) == 1
    assert reader.report.skipped == {"a key that stands twice": 1}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json"])
def test_a_checkpoint(tmp_path, name):
    folder = tmp_path / "m"
    shutil.copytree(miniature.path(), folder)
    file = folder / name
    if name == "model.safetensors":
        content = file.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = content[8 : 8 + size].rstrip()
        first = next(iter(json.loads(header)))
        entry = json.dumps({first: json.loads(header)[first]})[1:-1]
        header = header[:-1] + b"," + entry.encode() + b"}"
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    else:
        text = file.read_text().rstrip()
        first, value = next(iter(json.loads(text).items()))
        file.write_text(f"{text[:-1]}, {json.dumps(first)}: {json.dumps(value)}}}")
    with pytest.raises(ValueError, match="stands twice"):
        load_config(folder) if name == "config.json" else check_whole(folder)

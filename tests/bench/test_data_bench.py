"""The measurement's parts: the corpus it writes, what a measured process does, what it compares."""

from __future__ import annotations

from pathlib import Path

import pytest

from ultralong.bench import data as bench
from ultralong.utils.files import read_json, write_json


@pytest.fixture
def recipe(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(f"Document {number}. " + "The tide came in at dawn. " * 40)
    source = "{name: a, license: CC0-1.0, path: texts}"
    (tmp_path / "r.yaml").write_text(f"name: r\ndescription: d\nsources: [{source}]\n")
    return tmp_path / "r.yaml"


def test_the_corpus_holds_about_as_much_as_asked_for(recipe, tmp_path):
    corpus = bench._write_corpus(str(recipe), "a", 3000, tmp_path, None)
    documents = len(Path(corpus).read_text().splitlines())
    assert 10 <= documents <= 12, "1,058 characters a document at 3.68 a token"
    assert bench._write_corpus(str(recipe), "a", 3000, tmp_path, None) == corpus
    with pytest.raises(ValueError, match="has no source 'b'; it has a"):
        bench._write_corpus(str(recipe), "b", 100, tmp_path, None)


def test_measured_jobs_and_equal_folders(recipe, tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    corpus = bench._write_corpus(str(recipe), None, 3000, tmp_path, None)
    results = {}
    for name, task in (("bare", "bare"), ("one", "pack"), ("two", "pack")):
        job = {"task": task, "corpus": corpus, "tokenizer": str(tmp_path / "model"), "length": 128}
        write_json(tmp_path / "job.json", {**job, "out": str(tmp_path / name), "result": str(tmp_path / "r.json")})
        bench._run_job(tmp_path / "job.json")
        results[name] = {**read_json(tmp_path / "r.json"), "peak_memory_bytes": 1}
    assert results["bare"]["encode_seconds"] > 0
    assert bench._hashes(tmp_path / "one") == bench._hashes(tmp_path / "two")
    (tmp_path / "two" / "rows-00000.npy").write_bytes(b"other")
    assert bench._hashes(tmp_path / "one") != bench._hashes(tmp_path / "two")
    summary = bench._summary(results["one"], results["two"], [results["bare"]], {})
    assert summary["document_tokens"] == results["one"]["report"]["counts"]["document_tokens"] > 1000
    assert summary["throughput_of_bare"] > 0

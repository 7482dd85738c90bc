"""The samples bench: one row a test and length, filled as the issue asks, and a reason where none can be made."""

from ultralong.bench.samples import main
from ultralong.evaluation.samples import make_samples
from ultralong.files import read_json


def test_rows_say_what_was_made(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    main([str(tmp_path / "tokenizer"), "--tasks", "infinitebench_passkey", "ruler_qa_hotpot", "--lengths", "4096",
          "2048", "--json", str(tmp_path / "out.json")])
    found = read_json(tmp_path / "out.json")
    assert [(row["task"], row["length"]) for row in found["rows"]] == [
        ("infinitebench_passkey", 2048), ("infinitebench_passkey", 4096), ("ruler_qa_hotpot", 2048)]
    for row in found["rows"][:2]:
        (sample,) = make_samples("infinitebench_passkey", tiny_tokenizer, row["length"], 1)
        assert row["tokens"] == sample["length"]
        assert 0.97 <= row["filled"] <= 1
        assert row["cpu_seconds"] > 0
        assert 0 < row["peak_gib"] < 4
    assert "hotpot" in found["rows"][2]["note"].lower()
    assert found["machine"]["date"]

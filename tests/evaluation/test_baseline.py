"""The baseline's file: runs under headings, each with its machine, counts and intervals, and nothing of a folder."""

import json

import pytest

from ultralong.evaluation.runs.baseline import collect, main
from ultralong.utils.files import read_json


@pytest.fixture
def checkpoint(tmp_path, make_tiny_model, tiny_tokenizer):
    make_tiny_model(3, max_position_embeddings=1024, vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path / "small")
    tiny_tokenizer.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_a_baseline_is_run_and_collected(checkpoint, tmp_path, capsys):
    words = [
        "run",
        str(checkpoint),
        "--tests",
        "needle",
        "infinitebench_passkey",
        "ruler_qa_hotpot",
        "--lengths",
        "1024",
        "2048",
        "--samples",
        "3",
        "--grid",
        "2",
        "2",
        "--grid-samples",
        "1",
        "--device",
        "cpu",
        "--batch",
        "4",
        "--data",
        str(tmp_path / "small"),
    ]
    with pytest.warns(UserWarning, match="beyond the model's window"):
        main([*words, "--out", str(tmp_path / "run"), "--json", str(tmp_path / "report.json")])
    assert "left out: ruler_qa_hotpot" in capsys.readouterr().out
    made = read_json(tmp_path / "report.json")
    needle, passkey = made["results"]
    assert [(part["length"], part["n"]) for part in passkey["by_length"]] == [(1024, 3), (2048, 3)]
    assert all({"low", "high"} <= part.keys() for part in passkey["by_length"])
    assert made["machine"]["date"]
    assert "the folder of data holds none of hotpot" in made["skipped"]["ruler_qa_hotpot"]
    assert len(needle["by_depth"]) == 4
    collect(tmp_path / "all.json", {"gpu": tmp_path / "report.json"}, "A tiny model.")
    main(["collect", "--json", str(tmp_path / "all.json"), f"cpu={tmp_path / 'run'}"])
    held = read_json(tmp_path / "all.json")
    assert held["model"] == "A tiny model."
    assert held["runs"]["gpu"] == made
    again = held["runs"]["cpu"]["results"]
    each = [part["details"].pop("each") for part in passkey["by_length"]]
    assert again == [needle, passkey]
    assert [len(scores) for scores in each] == [3, 3]
    assert str(tmp_path) not in json.dumps(held)


def test_what_is_no_run_is_refused(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    for place, said in (("nowhere", "no such folder"), ("other.json", "not what `run`"), (".", "holds no run")):
        with pytest.raises(SystemExit):
            main(["collect", "--json", str(tmp_path / "all.json"), f"cpu={tmp_path / place}"])
        assert said in capsys.readouterr().err

"""The SFT measurement from recipes to its table, on the miniature, as it runs on a GPU; conversations kept apart."""

import json

import pytest
from forked import forked_agents

from ultralong import cli, miniature
from ultralong.bench.sft.measure import found
from ultralong.data.chat.holdout import hold_out
from ultralong.data.read.conversations import Conversation
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.data.select.overlap import words_of
from ultralong.utils.files import read_json, read_jsonl

TEXT = "On day {0} of the voyage the mate wrote {1} miles in the log, and the captain of ship {2} read it twice. "


def talks(count, same=0):
    """Conversations about different numbers; the last `same` repeat the first one's long answer."""
    for n in range(count):
        m = 0 if n >= count - same else n
        answer = " ".join(f"word{m}of{k}" for k in range(14))
        question = {"role": "user", "content": f"Say {n}."}
        yield Conversation(f"c{n}", [question, {"role": "assistant", "content": answer}])


def test_conversations_are_kept_apart_by_their_ids_alone():
    every = list(talks(200))
    split = hold_out(every, 30, seed=1)
    assert (len(split.heldout), len(split.training), split.overlapping) == (30, 170, 0)
    assert {talk.id for talk in split.heldout} | {talk.id for talk in split.training} == {talk.id for talk in every}
    again = hold_out(reversed(every), 30, seed=1)
    assert {talk.id for talk in again.heldout} == {talk.id for talk in split.heldout}
    assert {talk.id for talk in hold_out(every, 30, seed=2).heldout} != {talk.id for talk in split.heldout}
    assert {talk.id for talk in hold_out(every, 20, seed=1).heldout} < {talk.id for talk in split.heldout}


def test_what_shares_words_with_those_kept_apart_is_not_trained_on():
    split = hold_out(talks(60, same=40), 20, seed=0)
    assert split.overlapping > 0
    assert len(split.heldout) + len(split.training) + split.overlapping == 60
    apart = {" ".join(words_of(talk.messages[1]["content"])) for talk in split.heldout}
    assert not apart & {" ".join(words_of(talk.messages[1]["content"])) for talk in split.training}


@pytest.mark.parametrize("count", [0, 5, 9])
def test_a_number_that_cannot_be_kept_apart_is_refused(count):
    with pytest.raises(ValueError, match="cannot be held out of 5"):
        hold_out(talks(5), count)
    with pytest.raises(ValueError, match="nothing is left to train on"):
        hold_out(talks(5, same=5), 1)


def recipe(folder, name, source, kind="documents"):
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"name": name, "description": "d", "kind": kind, "sources": [source]}))
    return path


@pytest.fixture
def settings(tmp_path):
    """Local texts and conversations, and the settings file of a run in seconds."""
    for name, count in (("train", 60), ("kept", 30)):
        (tmp_path / name).mkdir()
        for n in range(2):
            text = "".join(TEXT.format(k, 7 * k + n, name) for k in range(count))
            (tmp_path / name / f"{n}.txt").write_text(text)
    records = [{"messages": talk.messages} for talk in talks(60)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    named = {
        "documents": recipe(tmp_path, "train-texts", {"name": "log", "license": "CC0-1.0", "path": "train"}),
        "heldout": recipe(tmp_path, "kept-texts", {"name": "kept", "license": "CC0-1.0", "path": "kept"}),
        "conversations": recipe(tmp_path, "talks", {"name": "talks", "license": "MIT", "path": "talks.jsonl"}, "chat"),
    }
    path = tmp_path / "settings.yaml"
    path.write_text(
        json.dumps(
            {
                "model": "miniature",
                "target": 1024,
                "factor": 4,
                "method": "yarn",
                "processes": 1,
                "pretraining": {"steps": 1, "global_batch_size": 1, "lr": 1e-4},
                "tuning": {"steps": 3, "global_batch_size": 2, "micro_batch_size": 2, "lr": 1e-3},
                "lengths": [384, 768],
                "depths": [0.5],
                "samples": 1,
                "perplexity_rows": 1,
                **{key: str(value) for key, value in named.items()},
            }
        )
    )
    return path


def test_the_measurement_from_recipes_to_its_table(settings, tmp_path, capsys):
    base, rows, out = str(miniature.path()), tmp_path / "rows", tmp_path / "run"
    common = ["--settings", str(settings), "--base", base]
    cli.main(["bench", "sft-prepare", *common, "--out", str(rows), "--heldout", "12"])
    facts = read_json(rows / "rows.json")["conversations"]
    assert (facts["answers"]["documents"], facts["training"]["documents"], facts["overlapping"]) == (12, 48, 0)
    assert facts["licenses"] == {"talks": "MIT"}
    assert not list(rows.rglob("tokens-*")), "the token store travels for nothing"
    command = ["bench", "sft", *common, "--rows", str(rows), "--out", str(out), "--json", str(tmp_path / "sft.json")]
    with forked_agents():
        cli.main(command)
    said, result = capsys.readouterr().out, read_json(tmp_path / "sft.json")
    assert "after SFT" in said
    assert result["answer_loss"]["base"]["targets"] == PackedRows(rows / "answers").manifest["target_tokens"]
    change = result["answer_loss_change_by_sft"]
    losses = result["answer_loss"]
    assert change["change"] == pytest.approx(losses["tuned"]["loss"] - losses["pretrained"]["loss"])
    assert change["high"] < 0, "three steps at 1e-3 on answers of the same kind lower their loss"
    assert [cell["length"] for cell in result["needle_grid"]["tuned"]] == [384, 768]
    assert result["training"]["tuning"]["steps"] == 3
    assert "licenses" in facts
    card = (out / "tuning" / "model" / "README.md").read_text()
    assert "licences: CC0-1.0" in card
    assert "licences: MIT" in card
    # A second call finds every stage on disk.
    log = read_jsonl(out / "tuning" / "log.jsonl")
    cli.main(command)
    assert read_jsonl(out / "tuning" / "log.jsonl") == log
    assert read_json(tmp_path / "sft.json")["answer_loss"] == losses


def test_needles_are_counted_on_either_side_of_the_old_window():
    cells = [
        {"length": 512, "correct": 3, "n": 4},
        {"length": 1024, "correct": 1, "n": 4},
        {"length": 2048, "correct": 0, "n": 4},
    ]
    counted = found(cells, 1024)
    assert {name: (value["correct"], value["n"]) for name, value in counted.items()} == {
        "within": (4, 8),
        "beyond": (0, 4),
    }
    assert counted["beyond"]["low"] == 0 < counted["beyond"]["high"]
    assert "beyond" not in found(cells[:2], 1024)

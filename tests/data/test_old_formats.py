"""Recipes and folders of version 0.3, whose keys had other names, are read and resumed."""

import json
from dataclasses import replace

import pytest

from ultralong.data.recipe.build import pack_recipe
from ultralong.data.recipe.schema import load_recipe
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.data.tokens.store import TokenStore
from ultralong.utils.files import read_json, sha256, write_json

RULE = {"short_below": 40, "short_keep": 1.0, "long_above": 80, "long_copies": 1.5}
OLD_RECIPE_KEYS = {"length_rule": "lengths", "subsets": "parts", "pair_fields": "pairs", "include": "members"}
OLD_ROW_KEYS = {"separators": "joints", "separator_tokens": "joint_tokens", "buffer_rows": "window_rows"}


def renamed(value, names):
    if isinstance(value, dict):
        return {names.get(key, key): renamed(item, names) for key, item in value.items()}
    return [renamed(item, names) for item in value] if isinstance(value, list) else value


def documents(tmp_path, old):
    (tmp_path / "texts").mkdir(exist_ok=True)
    for n in range(9):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"Page {n} of the log of the ship. " * (2 + 3 * n))
    values = {
        "name": "ship",
        "description": "A log.",
        "sources": [{"name": "log", "license": "x", "path": "texts", "include": ["*.txt"]}],
        "length_rule": RULE,
    }
    path = tmp_path / f"ship-{old}.yaml"
    path.write_text(json.dumps(renamed(values, OLD_RECIPE_KEYS) if old else values))
    return path


def conversations(tmp_path, old):
    lines = [json.dumps({"q": f"Where is {n}?", "a": f"Behind {n + 1}. " * n}) for n in range(1, 12)]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines) + "\n")
    source = {"name": "t", "license": "x", "path": "talks.jsonl", "pair_fields": {"question": "q", "answer": "a"}}
    values = {
        "name": "talks",
        "description": "Talks.",
        "kind": "chat",
        "sources": [source],
        "packing": {"buffer_rows": 3},
    }
    path = tmp_path / f"talks-{old}.yaml"
    path.write_text(json.dumps(renamed(values, {**OLD_RECIPE_KEYS, "buffer_rows": "window_rows"}) if old else values))
    return path


def as_version_0_3_left_it(folder):
    """Every record in a folder of rows under the keys of 0.3, hashes that depend on them included."""
    for path in sorted(folder.rglob("*.json"), key=lambda path: (path.parent == folder, path.name)):
        if path.name in ("report.json", "sources.json"):
            continue
        record = renamed(read_json(path), OLD_ROW_KEYS)
        if "provenance" in record:
            record["provenance"] = renamed(record["provenance"], OLD_RECIPE_KEYS)
        if path.parent == folder and "tokens_sha256" in record:
            record["tokens_sha256"] = sha256(folder / "tokens" / "manifest.json")
        write_json(path, record)


@pytest.mark.parametrize("make", [documents, conversations])
def test_a_recipe_of_0_3_is_the_same_recipe(tmp_path, make, capsys):
    new, old = load_recipe(make(tmp_path, False)), load_recipe(make(tmp_path, True))
    assert replace(old, packing={}) == replace(new, packing={})
    assert old.row_settings(64) == new.row_settings(64)
    noted = capsys.readouterr().err
    assert "is now called" in noted


@pytest.mark.parametrize("make", [documents, conversations])
def test_a_folder_of_0_3_is_read_and_resumed(tmp_path, make, tiny_tokenizer):
    recipe, folder = make(tmp_path, False), tmp_path / "rows"
    pack_recipe(recipe, tiny_tokenizer, 64, folder, quiet=True)
    shards = {path: path.read_bytes() for path in folder.rglob("*.npy")}
    rows = [row.input_ids.tolist() for row in PackedRows(folder)]
    as_version_0_3_left_it(folder)
    text = (folder / "settings.json").read_text()
    assert any(f'"{key}"' in text for key in OLD_ROW_KEYS.values())
    assert not any(f'"{key}"' in text for key in OLD_ROW_KEYS)

    assert [row.input_ids.tolist() for row in PackedRows(folder)] == rows
    report = pack_recipe(recipe, tiny_tokenizer, 64, folder, quiet=True)
    assert report.rows == len(rows)
    assert {path: path.read_bytes() for path in folder.rglob("*.npy")} == shards

    (folder / "manifest.json").unlink()  # as a run that was stopped before its end leaves it
    pack_recipe(recipe, tiny_tokenizer, 64, folder, quiet=True)
    assert {path: path.read_bytes() for path in folder.rglob("*.npy")} == shards
    assert [row.input_ids.tolist() for row in PackedRows(folder)] == rows


def test_a_changed_recipe_is_still_noticed_in_a_folder_of_0_3(tmp_path, tiny_tokenizer):
    folder = tmp_path / "rows"
    pack_recipe(documents(tmp_path, False), tiny_tokenizer, 64, folder, quiet=True)
    as_version_0_3_left_it(folder)
    other = load_recipe(documents(tmp_path, False), ("length_rule.long_copies=2",))
    with pytest.raises(ValueError, match="made with other settings: ") as caught:
        pack_recipe(other, tiny_tokenizer, 64, folder, quiet=True)
    told = str(caught.value).partition("settings: ")[2]
    assert "provenance.recipe.length_rule" in told, "what differs"
    assert len(told) < 400, "and not what is the same"
    assert TokenStore(folder / "tokens").tokens

"""`verify`: each file of rows, runs and models against what is recorded of it; all faults are named, not the first."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ultralong import miniature, verify
from ultralong.checkpoints.distributed import hash_own_files, record_hashes
from ultralong.checkpoints.extend import extend
from ultralong.cli import main
from ultralong.data.tokens.shards import ShardFolder
from ultralong.utils.files import append_jsonl, read_json, sha256, write_json


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shards(folder: Path, finish: bool = True) -> Path:
    made = ShardFolder(folder, "rows", {})
    records = made.resume()
    for number in range(3):
        made.partial(number, "npy").write_bytes(bytes([number]) * 100)
        records.append(made.commit(number, {"npy": made.partial(number, "npy")}, {}))
    if finish:
        made.finish({"shards": records})
    return folder


def run_folder(folder: Path) -> Path:
    for step in (1, 2):
        place = folder / "checkpoints" / f"step-{step:07d}"
        place.mkdir(parents=True)
        for name in ("__0_0.distcp", ".metadata", "random-0.safetensors"):
            (place / name).write_bytes(os.urandom(64))
        hash_own_files(place, 0)
        record_hashes(place, {"step": step})
    append_jsonl(folder / "log.jsonl", {"step": 1, "loss": 2.0})
    shutil.copytree(miniature.path(), folder / "model")
    return folder


@pytest.mark.parametrize("finish", [True, False])
def test_rows_are_compared_and_every_fault_is_named(tmp_path, finish):
    rows = shards(tmp_path / "rows", finish)
    assert verify(rows).faults == ()
    assert "3 files, all as" in str(verify(rows))
    flip(rows / "rows-00000.npy")
    (rows / "rows-00001.npy").unlink()
    os.truncate(rows / "rows-00002.npy", 7)
    said = verify(rows).faults
    assert [line.split("/")[-1] for line in said] == [
        "rows-00000.npy differs from its record (sha256)",
        "rows-00001.npy is missing",
        "rows-00002.npy has 7 bytes, its record says 100",
    ]


@pytest.mark.parametrize("content", ["[]", "{", '{"shards": [{"files": 3}]}', '{"shards": [{"files": {"a": {}}}]}'])
def test_a_manifest_that_is_none_is_a_fault_and_no_traceback(tmp_path, content):
    (shards(tmp_path) / "manifest.json").write_text(content)
    (tmp_path / "a").write_text("")
    (said,) = verify(tmp_path).faults
    assert "manifest.json" in said
    assert "\n" not in said


def test_a_run_is_compared_with_its_checkpoints_its_log_and_its_model(tmp_path, capsys):
    run = run_folder(tmp_path / "run")
    main(["verify", str(run)])
    told = capsys.readouterr().out
    main(["runs", "verify", str(run)])
    assert capsys.readouterr().out == told
    assert told.count("3 files, all as its state.json says") == 2
    assert "model: " in told
    flip(run / "checkpoints" / "step-0000001" / "__0_0.distcp")
    (run / "checkpoints" / "step-0000002" / ".metadata").unlink()
    with open(run / "log.jsonl", "a") as log:
        log.write("{\n")
    flip_header = (run / "model" / "model.safetensors").stat().st_size - 1
    os.truncate(run / "model" / "model.safetensors", flip_header)
    with pytest.raises(SystemExit, match="1"):
        main(["verify", str(run), "--json", str(tmp_path / "said.json")])
    told = capsys.readouterr()
    assert len(told.err.splitlines()) == 4
    for part in ("step-0000001: __0_0.distcp is not what", "step-0000002: .metadata is missing", "log.jsonl, line 2"):
        assert part in told.err
    assert "its header describes" in told.err
    assert "3 files, 1 wrong" in told.out
    assert len(read_json(tmp_path / "said.json")["checked"]) == 4


def test_a_checkpoint_by_itself_and_one_without_hashes(tmp_path):
    step = run_folder(tmp_path / "run") / "checkpoints" / "step-0000001"
    assert verify(step).checked[0].files == 3
    write_json(step / "state.json", {"step": 1})
    assert "nothing to compare" in str(verify(step))
    (step / "state.json").write_text("[")
    assert "state.json" in verify(step).faults[0]


def test_a_model_is_compared_with_its_headers_and_its_index(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(miniature.path(), model)
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    (model / "model.safetensors").unlink()
    parts = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, model / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    write_json(model / "model.safetensors.index.json", index)
    assert verify(model).faults == ()
    save_file({"stray": torch.zeros(2)}, model / "extra.safetensors")
    assert "extra.safetensors belongs to no index" in verify(model).faults[0]
    (model / "extra.safetensors").unlink()
    write_json(
        model / "model.safetensors.index.json", {"weight_map": index["weight_map"] | {"gone": next(iter(parts))}}
    )
    assert "disagree about gone" in verify(model).faults[0]
    for file in parts:
        os.truncate(model / file, 50)
    (model / "tokenizer.json").write_text("{")
    said = verify(model).faults
    assert len(said) == 3
    assert all(any(name in line for line in said) for name in (*parts, "tokenizer.json"))


def test_a_header_whose_places_do_not_fit_its_shapes_is_a_fault(tmp_path):
    model = shutil.copytree(miniature.path(), tmp_path / "model")
    entries = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}
    text = json.dumps(entries).encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert "invalid shape, data type, or offset" in verify(model).faults[0]


def test_an_extended_model_misses_a_file_that_its_report_names(tmp_path):
    extend(miniature.path(), 1024, tmp_path / "out", quiet=True)
    assert verify(tmp_path / "out").faults == ()
    (tmp_path / "out" / "chat_template.jinja").unlink()
    assert "chat_template.jinja is missing" in verify(tmp_path / "out").faults[0]


def test_weights_in_the_hub_cache_are_compared_with_the_hash_that_names_them(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in miniature.path().iterdir():
        shutil.copy(path, blobs / (digest := sha256(path)))
        (snapshot / path.name).symlink_to(f"../../blobs/{digest}")
    assert verify(snapshot).faults == ()
    blob = (snapshot / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-3] ^= 8
    blob.write_bytes(data)
    assert "not what was downloaded" in verify(snapshot).faults[0]


@pytest.mark.parametrize("kind", ["nothing", "empty", "file"])
def test_what_is_none_of_these_is_one_line(tmp_path, kind):
    place = tmp_path / "x"
    if kind == "empty":
        place.mkdir()
    elif kind == "file":
        place.write_text("")
    with pytest.raises(ValueError, match=str(place)):
        verify(place)

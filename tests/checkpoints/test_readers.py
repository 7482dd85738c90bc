"""What leaves is what was trained, for every reader: types, RoPE, tokenizer, licence, card, in transformers 4 and 5.

Readers of version 4 are interpreters in build/readers, made by `make readers`, or below the folder in READERS.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_env import ROOT
from tiny_run import make_run
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ultralong import miniature
from ultralong.bench.checkpoints.readers import bench_readers, unnamed
from ultralong.checkpoints.config import config_for_readers, load_config, weights_dtype
from ultralong.checkpoints.extend import extend
from ultralong.checkpoints.write import copy_weights, write_checkpoint
from ultralong.demo.models import _save
from ultralong.miniature import build
from ultralong.training.config import DataSource, ParallelConfig, TrainConfig
from ultralong.training.loop import train
from ultralong.utils.files import read_json, write_json

READERS = sorted(Path(os.environ.get("READERS", ROOT / "build" / "readers")).glob("*/bin/python"))
TEXT = "The tide came in at dawn; no ship had passed. 1048576"
ASK = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
transformers.logging.set_verbosity_error()
text, *folders = sys.argv[1:]
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto")
    rotary = next(m for m in model.modules() if hasattr(m, "inv_freq"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, dtypes = tokenizer(text)["input_ids"], {str(p.dtype) for p in model.parameters()}
    with torch.no_grad():
        logits = model.float()(torch.tensor([ids])).logits[0, -1]
    print(json.dumps({
        "table": rotary.inv_freq.tolist(), "factor": float(rotary.attention_scaling), "dtypes": sorted(dtypes),
        "window": model.config.max_position_embeddings, "ids": ids, "chat": tokenizer.chat_template is not None,
        "special": sorted(tokenizer.all_special_tokens), "logits": logits.tolist(),
    }))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The miniature as a base model of 2024 has it: a larger RoPE base, a tokenizer of version 4, a licence file."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(miniature.path(), folder)
    config = read_json(folder / "config.json")
    config["rope_parameters"]["rope_theta"] = 500_000.0
    write_json(folder / "config.json", config)
    (folder / "LICENSE").write_text("Terms of the base model.\n")
    write_json(folder / "generation_config.json", {"do_sample": False, "temperature": 0.6, "eos_token_id": 2})
    return folder


def savable(folder, **options):
    """A model without the folder's generation config, which transformers 5.17 loads and refuses to save."""
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    model.generation_config = GenerationConfig()
    return model


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Every kind of checkpoint that is written, by its name."""
    here = tmp_path_factory.mktemp("made")
    for method in ("llama3", "yarn", "linear", "ntk"):
        extend(base, 1024, here / method, method, quiet=True)
    tokenizer = AutoTokenizer.from_pretrained(here / "llama3")
    config = make_run(here, savable(here / "llama3"), tokenizer)
    for name in ("llama3", "yarn"):
        data = (DataSource(str(here / "rows")),)
        run = replace(config, model=str(here / name), out=str(here / f"run-{name}"), data=data, steps=1)
        train(run, quiet=True)
        shutil.copytree(here / f"run-{name}" / "model", here / f"trained-{name}")
    found = {name: here / name for name in ("llama3", "yarn", "linear", "ntk", "trained-llama3", "trained-yarn")}
    found["demo"] = _save(
        savable(base, dtype=torch.bfloat16), AutoTokenizer.from_pretrained(base), "Made by a test.", here / "demo"
    )
    build._untrained(AutoTokenizer.from_pretrained(base), here / "miniature")
    return found | {"miniature": here / "miniature"}


def asked(python: str | Path, folders: dict[str, Path]) -> dict[str, dict]:
    words = [str(python), "-c", ASK, TEXT, *map(str, folders.values())]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{python}:\n{done.stderr[-1500:]}"
    return dict(zip(folders, map(json.loads, done.stdout.splitlines()[-len(folders) :]), strict=True))


@pytest.fixture(scope="module")
def ours(folders):
    return asked(sys.executable, folders)


@pytest.mark.slow
@pytest.mark.skipif(not READERS, reason="make readers makes interpreters with transformers of version 4")
@pytest.mark.parametrize("python", READERS, ids=lambda path: path.parts[-3])
def test_transformers_4_reads_what_transformers_5_reads(folders, ours, python):
    wrong = set()
    for name, theirs in asked(python, folders).items():
        mine = ours[name]
        for key in ("dtypes", "window", "ids", "chat", "special"):
            assert mine[key] == theirs[key], f"{name}: {key}"
        tables = [torch.tensor(found["table"]) for found in (mine, theirs)]
        if not torch.allclose(*tables, rtol=1e-6, atol=0) or abs(mine["factor"] - theirs["factor"]) > 1e-6:
            wrong.add(name)
        else:
            assert torch.allclose(torch.tensor(mine["logits"]), torch.tensor(theirs["logits"]), atol=1e-3), name
    # The card of a yarn model says that releases before 4.57 read another table.
    version = tuple(map(int, python.parts[-3].lstrip("v").split(".")[:2]))
    assert wrong <= (set() if version >= (4, 57) else {"yarn", "trained-yarn"})


@pytest.mark.slow
@pytest.mark.skipif(not READERS, reason="make readers makes interpreters with transformers of version 4")
def test_check_says_all_that_they_read_wrong():
    rows = bench_readers(READERS, (), vllm=None, sglang=None, json=None)
    assert unnamed(rows) == []
    assert [row for row in rows if row["read"] == "right" and row["check"] != "right"] == []


@pytest.mark.parametrize("name", ["llama3", "yarn"])
def test_the_trained_model_says_what_the_extended_one_says(folders, name):
    before, after = (read_json(folders[key] / "config.json") for key in (name, f"trained-{name}"))
    assert before == after
    assert after["rope_theta"] == 500_000.0
    assert after["rope_scaling"]["rope_type"] == name
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "generation_config.json"):
        assert (folders[f"trained-{name}"] / file).read_bytes() == (folders[name] / file).read_bytes()
    assert (
        read_json(folders[f"trained-{name}"] / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    )


def test_the_card_of_a_trained_model_says_that_it_was_trained(folders):
    card = (folders["trained-llama3"] / "README.md").read_text()
    assert "Not trained" not in card
    assert "byte for byte" not in card
    assert "**Trained at 64 tokens a row**, 128 tokens in all" in " ".join(card.split())
    assert card.count("## Training") == 1
    assert "Not trained at this length yet" in (folders["llama3"] / "README.md").read_text()


@pytest.mark.parametrize("name", ["llama3", "trained-llama3", "trained-yarn", "demo"])
def test_the_config_names_the_type_of_the_weights(folders, name):
    assert weights_dtype(folders[name]) == torch.bfloat16
    assert {read_json(folders[name] / "config.json")[key] for key in ("dtype", "torch_dtype")} == {"bfloat16"}
    assert AutoModelForCausalLM.from_pretrained(folders[name], dtype="auto").dtype == torch.bfloat16


def test_a_sharded_run_leaves_the_type_of_the_weights_in_the_config(folders, tmp_path):
    """FSDP2 holds float32 parameters under a float32 config, whatever the checkpoint was."""
    data = (DataSource(str(folders["llama3"].parent / "rows")),)
    parallel = ParallelConfig(fsdp_shard_degree=1)
    run = TrainConfig(str(folders["llama3"]), str(tmp_path / "run"), data, 1, dtype="bfloat16", parallel=parallel)
    train(run, quiet=True)
    model = Path(run.out) / "model"
    assert read_json(model / "config.json")["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(model / "model.safetensors").values()} == {torch.bfloat16}


def test_a_config_whose_type_is_not_that_of_its_weights_is_put_right(tmp_path, base):
    source = tmp_path / "source"
    shutil.copytree(base, source)
    write_json(
        source / "config.json", read_json(source / "config.json") | {"dtype": "float32", "torch_dtype": "float32"}
    )
    extend(source, 1024, tmp_path / "out", quiet=True)
    written = read_json(tmp_path / "out" / "config.json")
    assert (written["dtype"], written["torch_dtype"]) == ("bfloat16", "bfloat16")


def test_of_tables_by_layer_type_the_older_spelling_is_written_where_version_4_reads_it_so():
    full = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    layers = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert config_for_readers({"rope_parameters": layers}, None) == {"rope_parameters": layers}
    made = config_for_readers({"model_type": "gemma3_text", "rope_parameters": layers}, None)
    assert (made["rope_theta"], made["rope_local_base_freq"], made["rope_parameters"]) == (1e6, 1e4, layers)
    assert made["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0}
    quantized = config_for_readers({"quantization_config": {}, "dtype": "float16"}, torch.bfloat16)
    assert quantized["dtype"] == "float16"


def test_a_checkpoint_is_replaced_as_a_whole_and_a_link_not_followed(tmp_path, base):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "old.txt").write_text("from before")
    (tmp_path / "out").symlink_to(tmp_path / "far")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        write_checkpoint(tmp_path / "out", base, copy_weights(base), lambda folder: "card")
    write_checkpoint(tmp_path / "out", base, copy_weights(base), lambda folder: "card\n", replace=True)
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "far" / "old.txt").read_text() == "from before"
    assert (tmp_path / "out" / "README.md").read_text() == "card\n"
    (tmp_path / "out" / "stale.json").write_text("{}")
    write_checkpoint(tmp_path / "out", base, copy_weights(base), lambda folder: "new\n", replace=True)
    assert not (tmp_path / "out" / "stale.json").exists()
    assert load_config(tmp_path / "out").rope_parameters["rope_theta"] == 500_000.0


def test_nothing_is_left_when_the_weights_cannot_be_written(tmp_path, base):
    def fail(folder):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(tmp_path / "out", base, fail, lambda folder: "")
    assert list(tmp_path.iterdir()) == []

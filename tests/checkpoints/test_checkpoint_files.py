"""Files of a checkpoint folder: links out of it are not copied, and wrong types in its JSON are one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ultralong import miniature
from ultralong.checkpoints.check import check
from ultralong.checkpoints.config import load_config
from ultralong.checkpoints.extend import extend
from ultralong.checkpoints.files import companion_files, header, weight_files
from ultralong.checkpoints.model_card import read_licence
from ultralong.checkpoints.write import copy_weights, write_checkpoint
from ultralong.data.tokens import encoding
from ultralong.evaluation.measures.needle import needle_grid
from ultralong.evaluation.measures.perplexity import token_losses
from ultralong.evaluation.tasks.needle import prepare_haystack
from ultralong.inference.engines import LocalEngine
from ultralong.inference.load import load_model, load_model_and_tokenizer
from ultralong.rope import from_config
from ultralong.training import model as train_model
from ultralong.training.config import DataSource, TrainConfig
from ultralong.training.preflight import preflight
from ultralong.utils import hub
from ultralong.utils.files import read_json, sha256

LAUGHS = ["&a0 [x, x, x, x, x, x, x, x, x]"]
LAUGHS += [f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:01\nsize 9\n"


@pytest.fixture
def model(tmp_path) -> Path:
    """The miniature in a folder that may be changed."""
    return Path(shutil.copytree(miniature.path(), tmp_path / "model"))


def linked(place: Path, target: Path) -> None:
    """Put a link to `target` where `place` is."""
    place.unlink(missing_ok=True)
    place.symlink_to(target)


@pytest.mark.parametrize("name", ["LICENSE", "notes.txt", "tokenizer.json", "README.md", "model.safetensors"])
def test_a_link_out_of_the_checkpoint_is_refused_by_name(tmp_path, model, name):
    private = tmp_path / "private"
    private.mkdir()
    shutil.copy(model / name if (model / name).exists() else model / "config.json", private / name)
    linked(model / name, private / name)
    with pytest.raises(ValueError, match=f"^{name} in .* is a link to .*private/{name}"):
        extend(model, 1024, tmp_path / "out", quiet=True)
    with pytest.raises(ValueError, match=f"^{name} in .* is a link"):
        write_checkpoint(tmp_path / "out", model, copy_weights(model), lambda folder: "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "private"]


def test_folders_and_relative_and_broken_ways_out_are_refused_too(tmp_path, model):
    (tmp_path / "secret.json").write_text("{}")
    (model / "chain.json").symlink_to("hop.json")
    (model / "hop.json").symlink_to("../secret.json")
    with pytest.raises(ValueError, match=r"^chain\.json in .* is a link to .*secret\.json"):
        companion_files(model)
    for name in ("chain.json", "hop.json"):
        (model / name).unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "key.jinja").write_text("")
    (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    taken, _ = companion_files(model) if not _walks_links(model) else ([], [])
    assert not any(name.startswith("additional") for name in taken)


def _walks_links(folder: Path) -> bool:
    """Whether this Python's `rglob` enters linked folders; where it does, the file there is refused."""
    found = any(path.name == "key.jinja" for path in folder.rglob("*"))
    if found:
        with pytest.raises(ValueError, match=r"additional_chat_templates/key\.jinja in .* is a link"):
            companion_files(folder)
    return found


def test_links_within_the_checkpoint_and_hard_links_and_a_linked_folder_are_followed(tmp_path, model):
    os.link(model / "config.json", tmp_path / "same.json")
    (model / "NOTICE").write_text("terms")
    (model / "LICENSE").unlink(missing_ok=True)
    (model / "LICENSE").symlink_to("NOTICE")
    (tmp_path / "way").symlink_to(model)
    extend(tmp_path / "way", 1024, tmp_path / "out", quiet=True)
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"
    assert not (tmp_path / "out" / "LICENSE").is_symlink()


def hub_cache(root: Path, model: Path) -> Path:
    """The same files as the hub's cache keeps them: blobs by hash, and a snapshot of relative links."""
    snapshot = root / "models--owner--name" / "snapshots" / "0123abcd"
    blobs = root / "models--owner--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in model.iterdir():
        shutil.copy(path, blobs / sha256(path))
        (snapshot / path.name).symlink_to(f"../../blobs/{sha256(path)}")
    return snapshot


def test_the_hub_cache_is_followed_and_nothing_outside_of_it(tmp_path, model):
    snapshot = hub_cache(tmp_path / "hub", model)
    extend(snapshot, 1024, tmp_path / "out", quiet=True)
    copy = tmp_path / "out" / "model.safetensors"
    assert not copy.is_symlink()
    assert copy.stat().st_nlink == 1
    assert sha256(copy) == sha256(model / "model.safetensors")
    other = tmp_path / "hub" / "models--other--name" / "blobs"
    other.mkdir(parents=True)
    (other / "0").write_text("{}")
    (snapshot / "notes.txt").symlink_to("../../../models--other--name/blobs/0")
    with pytest.raises(ValueError, match=r"^notes\.txt in .* is a link to .*models--other--name"):
        extend(snapshot, 1024, tmp_path / "out2", quiet=True)


def test_only_the_caches_own_layout_opens_the_way_to_blobs(tmp_path, model):
    folder = tmp_path / "mine" / "snapshots" / "1"
    (tmp_path / "mine" / "blobs").mkdir(parents=True)
    shutil.copytree(model, folder)
    (tmp_path / "mine" / "blobs" / "0").write_text("{}")
    (folder / "notes.txt").symlink_to("../../blobs/0")
    with pytest.raises(ValueError, match=r"^notes\.txt in .* is a link"):
        companion_files(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"),
        ("config.json", '"llama"'),
        ("tokenizer_config.json", "[1]"),
        ("generation_config.json", "3"),
        ("model.safetensors.index.json", "[]"),
        ("model.safetensors.index.json", '{"weight_map": ["a"]}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}'),
        ("model.safetensors.index.json", "{}"),
        ("config.json", '{"a": ' + 99_999 * "[" + 99_999 * "]" + "}"),
        ("tokenizer_config.json", '{"a": ' + 9_999 * "1" + "}"),
        ("chat_template.jinja", "\udcff"),
    ],
)
def test_json_of_a_wrong_type_is_one_line_with_the_file(tmp_path, model, name, content):
    (model / name).write_text(content, errors="surrogateescape")
    if "index" in name:
        (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=name) as error:
        extend(model, 1024, tmp_path / "out", quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "entries",
    [
        [],
        {"a": 1},
        {"a": {"dtype": 3, "shape": [], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [], "data_offsets": ["0", 0]}},
        {"a": {"dtype": "F32", "data_offsets": [0, 0]}},
        {"a": {"dtype": "F9", "shape": [0], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 0]}},
        {"__metadata__": [1]},
        {"__metadata__": {"a": 10 * [[]]}},
    ],
)
def test_a_safetensors_header_of_wrong_types_is_one_line_with_the_file(tmp_path, entries):
    text = json.dumps(entries).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    for read in (lambda: header(tmp_path / "model.safetensors"), lambda: weight_files(tmp_path)):
        with pytest.raises(ValueError, match=r"model\.safetensors has a damaged safetensors header") as error:
            read()
        assert "\n" not in str(error.value)


def test_what_a_config_cannot_say_is_refused_by_name(tmp_path, model):
    """Not a crash: no window, no head size, a head size that differs between layers."""
    from transformers import AutoConfig

    with pytest.raises(ValueError, match="has no max_position_embeddings"):
        from_config({"model_type": "x", "rope_theta": 1e4, "head_dim": 64})
    with pytest.raises(ValueError, match="neither head_dim nor hidden_size"):
        from_config({"model_type": "x", "rope_theta": 1e4, "hidden_size": None, "max_position_embeddings": 8})
    config = AutoConfig.for_model("gemma4_text")
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    with pytest.raises(ValueError, match="'gemma4_text' has a head_dim that differs between its layers"):
        from_config(config)
    (model / "config.json").write_text('{"model_type": "nothing-like-it"}')
    with pytest.raises(ValueError, match=r"can't read the config in .*nothing-like-it"):
        load_config(model)


@pytest.mark.parametrize(("name", "value"), [("vocab_size", 7), ("num_hidden_layers", 7), ("hidden_size", 10**9)])
def test_weights_that_are_not_those_of_the_config_are_not_extended(tmp_path, model, name, value):
    file = model / "config.json"
    file.write_text(json.dumps(read_json(file) | {name: value, "layer_types": None}))
    with pytest.raises(ValueError, match=r"can't be extended: .*not of one model") as error:
        extend(model, 1024, tmp_path / "out", quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("adapter", ["settings alone", "whole", "sharded model"])
def test_a_model_with_an_adapter_in_its_folder_is_refused_by_that_name(tmp_path, model, adapter):
    """With the adapter's weights transformers and peft opened another model, and `extend` copied half of it."""
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}))
    if adapter == "whole":
        save_file({"x": torch.ones(2)}, model / "adapter_model.safetensors")
    if adapter == "sharded model":
        held = load_file(model / "model.safetensors")
        (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
        names = dict.fromkeys(held, "model-00001-of-00001.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    config = TrainConfig(model=str(model), out=str(model / "run"), data=(DataSource("rows"),), steps=1)
    for refused in (
        lambda: extend(model, 1024, tmp_path / "out", quiet=True),
        lambda: check(model),
        lambda: load_model(model),
        lambda: train_model.load_model(config),
    ):
        with pytest.raises(ValueError, match=r"holds a model and an adapter \(adapter_config.json\)") as error:
            refused()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def add_layer(weights):
    layer = {name: value for name, value in weights.items() if ".layers.0." in name}
    return {name.replace(".layers.0.", ".layers.7."): value.clone() for name, value in layer.items()}


def add_bias(weights):
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    return {name.replace(".weight", ".bias"): torch.ones(len(weights[name]))}


def add_norm(weights):
    return {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}


def add_experts(weights):
    return {"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(8, 8)}


def add_to(folder, weights):
    held = load_file(folder / "model.safetensors")
    save_file(held | weights(held), folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("more", [add_layer, add_bias, add_norm, add_experts])
def test_weights_that_the_config_does_not_know_are_refused_where_they_would_be_left_out(tmp_path, model, more):
    """Without them it is another model: the copy would hold them, and no program would read them."""
    add_to(model, more)
    for refused in (lambda: extend(model, 1024, tmp_path / "out", quiet=True), lambda: load_model(model)):
        with pytest.raises(
            ValueError, match=r"the files hold .*which the config does not know: .*not of one mod"
        ) as error:
            refused()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.k_scale",
        "v_head.weight",
        "mtp.layers.0.up_proj.weight",
    ],
)
def test_what_is_no_weight_of_the_decoder_lies_beside_it_as_before(tmp_path, model, name):
    add_to(model, lambda held: {name: torch.ones(4)})
    extend(model, 1024, tmp_path / "out", quiet=True)
    assert name in header(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("change", ["scaled", "one number", "negative"])
def test_a_head_that_the_config_ties_and_the_files_do_not_is_refused(tmp_path, model, change):
    """transformers 5 takes the head of the files, version 4 and servers the embedding."""

    def head(held):
        value = held["model.embed_tokens.weight"].clone()
        if change == "one number":
            value[5, 3] += 1
        return {"lm_head.weight": value * {"scaled": 2, "negative": -1}.get(change, 1)}

    assert read_json(model / "config.json")["tie_word_embeddings"]
    add_to(model, head)
    with pytest.raises(
        ValueError, match=r"lm_head.weight is not model.embed_tokens.weight, .*tie_word_embedd"
    ) as error:
        extend(model, 1024, tmp_path / "out", quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    add_to(model, lambda held: {"lm_head.weight": held["model.embed_tokens.weight"].clone()})
    extend(model, 1024, tmp_path / "same", quiet=True)  # the same twice, as torch's own format stored it


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.uint8])
def test_weights_of_a_type_that_needs_scales_are_refused_everywhere(tmp_path, model, kind):
    """transformers would turn them into the model's type without a word."""
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("up_proj.weight"))
    weights[name] = weights[name].to(kind)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    config = TrainConfig(model=str(model), out=str(model / "run"), data=(DataSource("rows"),), steps=1)
    for refused in (
        lambda: extend(model, 1024, tmp_path / "out", quiet=True),
        lambda: load_model(model),
        lambda: train_model.load_model(config),
    ):
        with pytest.raises(ValueError, match=f"{name} is stored as .*the config names no quantisation") as error:
            refused()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_any_floating_point_type_are_read(model, kind):
    weights = load_file(model / "model.safetensors")
    save_file(
        {name: weight.to(kind) for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"}
    )
    assert load_model(model, "cpu").dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_model_whose_logits_are_no_numbers_gives_no_answer(model, value):
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
    weights[name][0, 0] = value
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    loaded, tokenizer = load_model_and_tokenizer(model, "cpu")
    with pytest.raises(ValueError, match="logits are not numbers"):
        LocalEngine(loaded, tokenizer, chunk=64).answer([[1, 2, 3]], [4])
    ids = torch.arange(1, 9)[None]
    with pytest.raises(ValueError, match="logits are not numbers"):
        token_losses(loaded, ids, ids)
    with pytest.raises(ValueError, match="logits are not numbers"):
        needle_grid(loaded, tokenizer, [400], [0.5], 1, 0, prepare_haystack(tokenizer, None, 400), quiet=True)


@pytest.mark.parametrize(
    "front",
    [
        f"license: [{', '.join(LAUGHS)}]",
        "license: &a [*a]",
        f"license: {'[' * 5000}",
        "license: !!python/object/apply:os.system [true]",
    ],
    ids=["aliases", "of itself", "deep", "a tag"],
)
def test_a_model_card_that_cannot_be_read_states_no_licence(model, front):
    (model / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    assert read_licence(model) == {}


def test_a_config_of_a_billion_layers_is_refused_before_one_is_built(model):
    file = model / "config.json"
    file.write_text(json.dumps(read_json(file) | {"num_hidden_layers": 10**9}))
    with pytest.raises(ValueError, match="1,000,000,000 layers"):
        load_config(model)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", POINTER, "git lfs pull"),
        ("tokenizer.model", POINTER, "git lfs pull"),
        ("tokenizer.json", '{"version":', "not valid JSON"),
        ("generation_config.json", "[]", "generation_config.json"),
        ("added_tokens.json", "{", "not valid JSON"),
        ("special_tokens_map.json", "", "not valid JSON"),
    ],
)
def test_a_file_that_would_not_open_in_the_copy_is_refused_before_it_is_made(tmp_path, model, name, content, said):
    (model / name).write_text(content)
    config = TrainConfig(model=str(model), out=str(tmp_path / "run"), data=(DataSource("rows"),), steps=1)
    for refuse in (lambda: extend(model, 4096, tmp_path / "long", quiet=True), lambda: check(model)):
        with pytest.raises(ValueError, match=said) as error:
            refuse()
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "long").exists()
    wrong = {finding.name: finding.text for finding in preflight(config, 1) if not finding.good}
    assert said in wrong["shapes"]


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), [0.0, float("inf")]])
def test_an_infinity_of_a_config_stays(tmp_path, model, value):
    """Mamba's time_step_limit ends in one, which JSON has not and transformers writes and reads."""
    entries = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(entries | {"time_step_limit": value}))
    extend(model, 4096, tmp_path / "long", quiet=True)
    assert json.loads((tmp_path / "long" / "config.json").read_text())["time_step_limit"] == value
    assert load_config(tmp_path / "long").time_step_limit == value


@pytest.mark.parametrize("content", ["[]", '{"chat_template": [1]}', '{"a": ' + 99_999 * "[" + 99_999 * "]" + "}"])
def test_a_tokenizer_of_wrong_types_is_one_line(model, content):
    (model / "chat_template.jinja").unlink(missing_ok=True)
    (model / "tokenizer_config.json").write_text(content)
    for load in (hub.load_tokenizer, encoding.load_tokenizer):
        with pytest.raises(ValueError, match="no tokenizer that transformers") as error:
            load(model)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("broken", ["pickled", "cut", "no weights"])
def test_weights_that_cannot_be_read_are_one_line_before_a_run_or_a_measurement(model, broken):
    weights = model / "model.safetensors"
    if broken == "cut":
        os.truncate(weights, 100)
    else:
        weights.rename(model / "pytorch_model.bin")
        (model / "pytorch_model.bin").rename(model / ("pytorch_model.bin" if broken == "pickled" else "x.txt"))
    said = {"pickled": "are pickled", "cut": "cut off in its header", "no weights": "not a whole checkpoint"}[broken]
    config = TrainConfig(model=str(model), out=str(model / "run"), data=(DataSource("rows"),), steps=1)
    wrong = {finding.name: finding.text for finding in preflight(config, 1) if not finding.good}
    assert said in wrong["shapes"]
    for load in (lambda: train_model.load_model(config), lambda: load_model(model)):
        with pytest.raises(ValueError, match=said) as error:
            load()
        assert "\n" not in str(error.value)


def test_a_run_from_a_checkpoint_with_a_link_out_is_refused_before_it_starts(tmp_path, model):
    (tmp_path / "key.txt").write_text("private")
    (model / "LICENSE.txt").symlink_to(tmp_path / "key.txt")
    config = TrainConfig(model=str(model), out=str(tmp_path / "run"), data=(DataSource("rows"),), steps=1)
    wrong = {finding.name: finding.text for finding in preflight(config, 1) if not finding.good}
    assert "LICENSE.txt in" in wrong["shapes"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_attention_heads", 0),
        ("num_attention_heads", -1),
        ("head_dim", 0),
        ("max_position_embeddings", 0),
        ("vocab_size", -1),
        ("hidden_size", 0.5),
        ("num_hidden_layers", float("nan")),
        ("dtype", []),
    ],
)
def test_a_size_without_sense_is_one_line(model, name, value):
    """Not a division by zero somewhere behind."""
    entries = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**entries, name: value}))
    with pytest.raises(ValueError, match=rf"has a {name} of|can't read the config"):
        load_config(model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rms_norm_eps": float("nan")}, "holds a NaN"),
        ({"extra": [{"x": float("nan")}]}, "holds a NaN"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "a rope_theta of 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -10000.0}}, "a rope_theta of -10000.0"),
        ({"rope_theta": float("inf")}, "a rope_theta of inf"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 0}}, "a factor of 0"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "a factor of -2"),
        ({"rope_parameters": {"rope_type": "", "rope_theta": 1e4}}, "a rope_type of ''"),
        ({"dtype": 5}, "a dtype of 5"),
        ({"head_dim": 10**9}, "a head_dim of 1,000,000,000, and a model has at most 65,536"),
        ({"vocab_size": 10**13}, "a vocab_size of 10,000,000,000,000, and a model has at most"),
    ],
)
def test_numbers_of_a_config_that_no_model_has(model, changes, said):
    config = model / "config.json"
    config.write_text(json.dumps(read_json(config) | changes))
    with pytest.raises(ValueError, match=f"the config in .* (has|holds) {said.removeprefix('holds ')}"):
        load_config(model)


def test_infinity_in_a_config_is_a_number(model):
    """As in time_step_limit of Mamba 2."""
    config = model / "config.json"
    config.write_text(json.dumps(read_json(config) | {"time_step_limit": [0.0, float("inf")]}))
    assert load_config(model).time_step_limit == [0.0, float("inf")]


def test_an_index_that_transformers_does_not_read(model):
    weights = model / "model-00001-of-00001.safetensors"
    (model / "model.safetensors").rename(weights)
    index = {"weight_map": dict.fromkeys(header(weights), weights.name)}
    for metadata in ({}, {"metadata": None}, {"metadata": 5}):
        (model / "model.safetensors.index.json").write_text(json.dumps(index | metadata))
        with pytest.raises(ValueError, match="has no metadata, without which transformers reads no index"):
            weight_files(model)
    (model / "model.safetensors.index.json").write_text(json.dumps(index | {"metadata": {}}))
    assert weights.name in weight_files(model)


@pytest.mark.parametrize("device", ["", "gpu", "cuda:x", "mps", "meta", "cuda:99", "xpu:0", "vulkan"])
def test_a_device_that_is_not_here(device):
    with pytest.raises(ValueError, match=f"There is no '{device}' on this machine: use --device cpu"):
        load_model(miniature.path(), device)

"""Merged checkpoints: the averages of an independent reference, the first model's files, and refusals by name."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.tiny_run import make_run
from ultralong.checkpoints import merge as module
from ultralong.checkpoints.extend import extend
from ultralong.checkpoints.merge import merge
from ultralong.training.loop import train

pytestmark = pytest.mark.filterwarnings("ignore:The explicitly set RoPE scaling factor")


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_tiny_model, tiny_tokenizer):
    """Three random models of one shape: bfloat16 in two files, bfloat16 in one, float32."""
    folder = tmp_path_factory.mktemp("models")
    for name, dtype, size in (("a", "bfloat16", "60KB"), ("b", "bfloat16", "1GB"), ("c", "float32", "1GB")):
        model = make_tiny_model(seed=ord(name), num_hidden_layers=1, max_position_embeddings=64)
        model.to(getattr(torch, dtype)).save_pretrained(folder / name, max_shard_size=size)
        tiny_tokenizer.save_pretrained(folder / name)
    (folder / "a" / "README.md").write_text(
        "---\nlicense: mit\n---\n\n# a\n\n**Not trained at this length yet.** So.\n"
    )
    assert len(list((folder / "a").glob("*.safetensors"))) > 1
    return folder


def tensors(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def bits_of_bfloat16(values):
    """float32 rounded to the nearest bfloat16, ties to even, as its 16 bits."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def numpy_average(folders, weights):
    """By numpy alone, in float32 and in the order of the models."""
    read = [{name: t.float().numpy() for name, t in tensors(folder).items()} for folder in folders]
    found = {}
    for name, first in read[0].items():
        total = first * np.float32(weights[0])
        for other, weight in zip(read[1:], weights[1:], strict=True):
            total = total + other[name] * np.float32(weight)
        found[name] = total
    return found


@pytest.mark.parametrize("weights", [(), (0.9, 0.1, 0.0), (1.5, -0.25, -0.25)])
def test_averages_are_the_reference_s_bit_for_bit(models, tmp_path, weights, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 1000)
    folders = [models / "a", models / "b", models / "c"]
    report = merge(folders, tmp_path / "out", weights, quiet=True)
    expected = numpy_average(folders, weights or (1 / 3,) * 3)
    found = tensors(tmp_path / "out")
    assert report.tensors == len(found) == len(expected)
    for name, values in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert np.array_equal(found[name].view(torch.uint16).numpy(), bits_of_bfloat16(values)), name


def test_float32_stays_float32(models, tmp_path):
    merge([models / "c", models / "a"], tmp_path / "out", (0.25, 0.75), quiet=True)
    found = tensors(tmp_path / "out")
    for name, values in numpy_average([models / "c", models / "a"], (0.25, 0.75)).items():
        assert np.array_equal(found[name].numpy(), values)


def test_a_model_merged_with_itself_is_itself(models, tmp_path):
    merge([models / "a", models / "a"], tmp_path / "out", (0.5, 0.5), quiet=True)
    for file in (models / "a").glob("model*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_the_folder_opens_and_says_what_was_merged(models, tmp_path):
    report = merge([models / "a", models / "c"], tmp_path / "out", (0.9, 0.1), quiet=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.model.norm.weight, tensors(tmp_path / "out")["model.norm.weight"])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not trained at this length" not in card
    assert "**Merged from 2 checkpoints**" in card
    assert f"| {models.name}/a | 0.9 | mit |" in card
    assert f"| {models.name}/c | 0.1 | not stated |" in card
    assert json.loads((tmp_path / "out" / "merge.json").read_text()) == report.to_dict()


def test_another_rope_is_noted(models, tmp_path):
    extend(models / "a", 128, tmp_path / "long", quiet=True)
    report = merge([tmp_path / "long", models / "b"], tmp_path / "out", quiet=True)
    assert f"{models.name}/b has another RoPE (window 64 tokens)" in report.notes[0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == 128


def test_checkpoints_of_a_run(tmp_path, make_tiny_model, tiny_tokenizer, monkeypatch):
    """The last step's checkpoint is the model that the run wrote, so their average is the mean with the one before."""
    monkeypatch.chdir(tmp_path)
    model = make_tiny_model(num_hidden_layers=1, max_position_embeddings=64)
    train(make_run(tmp_path, model, tiny_tokenizer, steps=2, save_every=1, keep=2), quiet=True)
    first, last = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    merge([last, last], "same", quiet=True)
    trained = tensors(tmp_path / "run" / "model")
    for name, tensor in tensors(tmp_path / "same").items():
        assert torch.equal(tensor, trained[name]), name
    merge([first, last], "mean", (0.25, 0.75), quiet=True)
    merge([first, first], "early", quiet=True)
    for name, values in numpy_average([tmp_path / "early", tmp_path / "same"], (0.25, 0.75)).items():
        assert np.array_equal(tensors(tmp_path / "mean")[name].numpy(), values), name
    (last / "__0_0.distcp").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"is damaged: __0_0\.distcp has 3 bytes"):
        merge([first, last], "damaged", quiet=True)


def changed_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def changed_tokenizer(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    path.write_text(json.dumps(content))


def smaller(folder, make_tiny_model):
    make_tiny_model(num_hidden_layers=1, intermediate_size=64, max_position_embeddings=64).save_pretrained(folder)
    changed_config(folder, intermediate_size=128)


def deeper(folder, make_tiny_model):
    make_tiny_model(num_hidden_layers=2, max_position_embeddings=64).save_pretrained(folder)
    changed_config(folder, num_hidden_layers=1)


def not_finite(folder, make_tiny_model):
    model = make_tiny_model(num_hidden_layers=1, max_position_embeddings=64)
    model.model.norm.weight.data[3] = float("nan")
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder, make: changed_config(folder, rms_norm_eps=0.1),
            "other has rms_norm_eps = 0.1 in its config, .*",
        ),
        (lambda folder, make: changed_config(folder, model_type="mistral"), "of another architecture .mistral. than"),
        (lambda folder, make: changed_tokenizer(folder), "other has another tokenizer than .*: tokenizer.json differs"),
        (smaller, r"mlp.down_proj.weight has the shape \(64, 64\) in .*other and \(64, 128\) in"),
        (deeper, r"has no tensor model.layers.1.input_layernorm.weight \(it lacks 9\), .*other has"),
        (not_finite, r"model.norm.weight is not finite in .*other"),
    ],
)
def test_what_cannot_be_averaged_is_refused_by_name(models, tmp_path, make_tiny_model, change, message):
    other = tmp_path / "other"
    shutil.copytree(models / "c", other)
    change(other, make_tiny_model)
    with pytest.raises(ValueError, match=message) as caught:
        merge([models / "c", other], tmp_path / "out", quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_note_in_a_config_is_no_other_model(models, tmp_path):
    """As the name of the model that a GGUF file was made from."""
    shutil.copytree(models / "c", tmp_path / "other")
    changed_config(tmp_path / "other", _model_name_or_path="Mine 135M", _name_or_path="mine")
    merge([models / "c", tmp_path / "other"], tmp_path / "out", quiet=True)
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    ("count", "weights", "message"),
    [
        (1, (), "two models or more, or the folder of a LoRA adapter, found 1"),
        (2, (0.5,), "2 models and 1 weights"),
        (2, (0.9, 0.2), "add up to 1, found 0.9, 0.2: 1.1 in all"),
        (2, (float("nan"), 1.0), "add up to 1"),
    ],
)
def test_wrong_weights_are_refused(models, tmp_path, count, weights, message):
    with pytest.raises(ValueError, match=message):
        merge([models / "a"] * count, tmp_path / "out", weights)

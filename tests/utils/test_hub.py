"""Names of models and tokenizers: folders, hub ids, and the model that ships."""

import pytest

from ultralong import miniature
from ultralong.checkpoints.files import locate
from ultralong.planner.shapes import model_config
from ultralong.utils.hub import find_checkpoint, folder_name, load_tokenizer, local_folder


def test_miniature_is_a_name_wherever_a_model_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("miniature") == str(locate("miniature")) == str(miniature.path())
    assert model_config("miniature").max_position_embeddings == miniature.WINDOW
    assert len(load_tokenizer("miniature")) == 4096


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "miniature").mkdir()
    assert str(local_folder("miniature")) == find_checkpoint("miniature") == "miniature"
    (tmp_path / "miniature").rmdir()
    (tmp_path / "miniature").write_text("no folder")
    for resolve in (find_checkpoint, locate):
        with pytest.raises(ValueError, match="miniature is a file"):
            resolve("miniature")


@pytest.mark.parametrize("name", ["Miniature", "./miniature", "miniatur"])
def test_other_spellings_are_no_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for resolve in (find_checkpoint, locate):
        with pytest.raises(ValueError, match="There is no folder"):
            resolve(name)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("runs/cpt/model", "cpt/model"),
        ("model", "here/model"),
        ("/model", "model"),
        ("runs/cpt/model-2", "model-2"),
        ("llama-1m", "llama-1m"),
        ("meta-llama/Llama-3.1-8B", "Llama-3.1-8B"),
        ("miniature", "miniature"),
        (miniature.path(), "miniature"),
    ],
)
def test_a_folder_called_model_is_named_with_its_run(tmp_path, monkeypatch, model, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert folder_name(model) == name

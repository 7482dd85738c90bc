"""Extending whole checkpoints: what is written opens in unmodified transformers, and what can't be done is refused."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ultralong.checkpoints import extend as extend_module
from ultralong.checkpoints import write
from ultralong.checkpoints.extend import extend
from ultralong.rope import RopeScaling, from_config, inverse_frequencies, rope_parameters, window_of
from ultralong.utils.files import read_json, sha256, write_json

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def make(
    folder: Path, kind: str = "llama", window: int = 2048, rope: dict | None = None, shard: str = "5GB", **changes
) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | {"max_position_embeddings": window} | changes)
    if rope is not None:
        config.rope_parameters = dict(rope)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size=shard)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "b": 2}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", model_max_length=window, chat_template="{{ messages }}"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path) -> Path:
    return make(tmp_path / "source")


def table_in(model) -> tuple[torch.Tensor, float]:
    return model.model.rotary_emb.inv_freq, model.model.rotary_emb.attention_scaling


CHECKPOINTS = [
    ("llama", {"window": 131_072, "rope": LLAMA31}, 1_048_576, "llama3", 128.0),
    ("llama", {}, 16_384, "yarn", 8.0),
    ("llama", {"rope": {"rope_type": "default", "rope_theta": 1e5}, "shard": "30KB"}, 25_000, "yarn", 25_000 / 2048),
    ("qwen2", {"window": 32_768, "rope": {"rope_type": "default", "rope_theta": 1e6}}, 262_144, "yarn", 8.0),
    ("qwen3", {"window": 40_960, "tie_word_embeddings": True}, 1_048_576, "yarn", 25.6),
    ("mistral", {"window": 32_768, "sliding_window": None}, 131_072, "yarn", 4.0),
    ("stablelm", {"window": 4096}, 65_536, "yarn", 16.0),
]


@pytest.mark.parametrize(
    ("kind", "made", "to", "method", "factor"), CHECKPOINTS, ids=[f"{kind}-{to}" for kind, _, to, _, _ in CHECKPOINTS]
)
def test_extended_models_open_with_our_table_and_the_same_weights(tmp_path, kind, made, to, method, factor):
    source = make(tmp_path / "source", kind, **made)
    report = extend(source, to, tmp_path / "out", quiet=True)
    assert (report.method, report.factor, report.new_window) == (method, pytest.approx(factor, rel=1e-12), to)

    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.max_position_embeddings == to == window_of(config)
    model, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", source))
    ours, ours_factor = inverse_frequencies(from_config(config))
    table, table_factor = table_in(model)
    assert torch.equal(table, ours)
    assert table_factor == ours_factor == report.attention_factor
    assert not torch.equal(table, table_in(before)[0])
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    for path in source.glob("*.safetensors*"):
        assert sha256(path) == sha256(tmp_path / "out" / path.name)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == to
    assert model(torch.tensor([[1, 2, 1]])).logits.isfinite().all()


def test_llama31_gets_exactly_the_recipe(tmp_path):
    source = make(tmp_path / "source", window=131_072, rope=LLAMA31, head_dim=128)
    for to, factor in ((1_048_576, 128.0), (2_097_152, 256.0), (4_194_304, 512.0)):
        report = extend(source, to, tmp_path / str(to), quiet=True)
        assert report.new_rope == LLAMA31 | {"factor": factor}
        assert report.pairs == {"untouched": 29, "ramp": 6, "scaled": 29}
        assert (report.old_window, report.original_window) == (131_072, 8192)


def test_older_programs_read_the_same_scaling(tmp_path, llama):
    """transformers 4 knows rope_theta and rope_scaling only, and would scale nothing if it found neither."""
    for method in ("yarn", "llama3", "ntk"):
        extend(llama, 16_384, tmp_path / method, method, quiet=True)
        written = read_json(tmp_path / method / "config.json")
        new = written.pop("rope_parameters")
        assert from_config(written) == from_config(written | {"rope_parameters": new})
        assert (written["rope_scaling"] is None) == (method == "ntk")


LONGROPE = {"short_factors": (1.0,) * 32, "long_factors": tuple(1 + i / 4 for i in range(32))}
METHODS = [
    ("linear", {}, 2048),
    ("ntk", {}, 16_384),
    ("dynamic", {}, 2048),
    ("yarn", {"ramp": "rotations", "attention_factor": 1.0}, 16_384),
    ("yarn", {"attention_factor": 1.0, "beta": 32.0}, 16_384),
    ("llama3", {}, 16_384),
    ("default", {"theta": 8e6}, 16_384),
    ("longrope", LONGROPE, 16_384),
]


@pytest.mark.parametrize(("method", "options", "declared"), METHODS, ids=[f"{m}-{len(o)}" for m, o, _ in METHODS])
def test_every_method_is_written_so_that_transformers_reads_it_back(tmp_path, llama, method, options, declared):
    report = extend(llama, 16_384, tmp_path / "out", method, quiet=True, **options)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.max_position_embeddings == declared
    lists = {key: value for key, value in options.items() if key in ("short_factors", "long_factors")}
    meant = RopeScaling(
        method,
        64,
        options.get("theta", 1e4),
        1.0 if method == "default" else 8.0,
        2048,
        beta=options.get("beta", 4.0),
        ramp=options.get("ramp", "dimension"),
        attention_factor=options.get("attention_factor"),
        **lists,
    )
    table, factor = table_in(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.equal(table, inverse_frequencies(meant)[0])
    assert factor == inverse_frequencies(meant)[1]
    assert bool(report.notes) == (method in ("linear", "dynamic") or options.get("beta") == 32.0), report.notes


def test_a_model_class_that_renames_a_type_is_refused_before_copying_and_told(tmp_path, monkeypatch):
    """transformers' Phi-3 config takes every yarn for a longrope, whichever way it is written."""
    source = make(tmp_path / "source", "phi3", window=4096, original_max_position_embeddings=4096)
    monkeypatch.setattr(
        extend_module, "copy_weights", lambda *arguments: lambda folder: pytest.fail("copied before checking")
    )
    assert_refused(
        source,
        65_536,
        tmp_path / "out",
        "'yarn' scaling by config.*longrope.*Methods that work: ntk. .*search MODEL --to 65536 --methods longrope",
    )
    monkeypatch.undo()
    assert extend(source, 65_536, tmp_path / "ntk", "ntk", quiet=True).method == "ntk"
    none = "No other method works with these settings"  # as ntk takes no temperature
    assert_refused(source, 65_536, tmp_path / "out", none, attention_factor=1.2)
    notes = extend(source, 65_536, explain=True).notes
    assert any(note.startswith("It can't be written: transformers") for note in notes)
    assert not any("written" in note for note in extend(source, 65_536, explain=True, method="ntk").notes)
    extend(source, 65_536, tmp_path / "out", "longrope", quiet=True, **LONGROPE)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert from_config(config) == RopeScaling("longrope", 64, 1e4, 16.0, 4096, **LONGROPE)


def served_window(config: dict) -> int:
    """The longest input vLLM derives from a config: original window (yarn) or declared one, times the factor."""
    rope, length = config["rope_parameters"], config["max_position_embeddings"]
    if rope["rope_type"] in ("longrope", "llama3"):
        return length
    before = rope["original_max_position_embeddings"] if rope["rope_type"] == "yarn" else length
    return int(before * rope.get("factor", 1))


@pytest.mark.parametrize("method", ["auto", "linear", "dynamic", "yarn", "llama3", "ntk"])
@pytest.mark.parametrize("window", [2048, 6000, 4097])
@pytest.mark.parametrize("to", [16_384, 100_001, 1_000_003])
def test_a_server_offers_exactly_the_target(tmp_path, method, window, to):
    """Also where the factor has no exact binary form, so that its product could fall one token short."""
    entries = {"head_dim": 64, "rope_theta": 1e4, "max_position_embeddings": window}
    scaling = extend_module.choose_scaling(entries, extend_module.Extension(to, method))
    written = entries | extend_module.config_entries(entries, scaling, to)
    assert served_window(written) == to == window_of(written)


@pytest.mark.parametrize("first", ["yarn", "llama3", "dynamic", "longrope"])
def test_a_second_extension_replaces_the_factor_of_the_first(tmp_path, llama, first):
    lists = {"short_factors": (1.0,) * 32, "long_factors": (4.0,) * 32} if first == "longrope" else {}
    extend(llama, 8192, tmp_path / "first", first, quiet=True, **lists)
    second = extend(tmp_path / "first", 65_536, tmp_path / "second", "yarn", quiet=True)
    direct = extend(llama, 65_536, tmp_path / "direct", "yarn", quiet=True)
    assert second.new_rope == direct.new_rope
    assert second.factor == 32.0
    assert second.old_window == 8192
    assert any("is replaced by yarn" in note for note in second.notes) == (first != "yarn")
    tables = [table_in(AutoModelForCausalLM.from_pretrained(tmp_path / name))[0] for name in ("second", "direct")]
    assert torch.equal(*tables)


def test_linear_scaling_asks_for_the_window_it_does_not_record(tmp_path, llama):
    """A linear model of other programs; one that was extended here has its original window beside it."""
    extend(llama, 8192, tmp_path / "first", "linear", quiet=True)
    assert extend(tmp_path / "first", 65_536, tmp_path / "known", quiet=True).factor == 32.0
    config = read_json(tmp_path / "first" / "config.json")
    assert config.pop("original_max_position_embeddings") == 2048
    write_json(tmp_path / "first" / "config.json", config)
    with pytest.raises(ValueError, match="Pass it as original_window"):
        extend(tmp_path / "first", 65_536, tmp_path / "second", quiet=True)
    with pytest.raises(ValueError, match="not longer than the 8,192"):
        extend(tmp_path / "first", 8000, tmp_path / "second", original_window=2048, quiet=True)
    assert extend(tmp_path / "first", 65_536, tmp_path / "second", original_window=2048, quiet=True).factor == 32.0


def test_limits_that_were_the_old_window_follow_it(tmp_path, llama):
    write_json(llama / "generation_config.json", {"max_length": 2048, "temperature": 0.5})
    extend(llama, 16_384, tmp_path / "a", quiet=True)
    assert read_json(tmp_path / "a/generation_config.json") == {"max_length": 16_384, "temperature": 0.5}
    write_json(llama / "generation_config.json", {"max_length": 100})
    extend(llama, 16_384, tmp_path / "b", quiet=True)
    assert read_json(tmp_path / "b/generation_config.json") == {"max_length": 100}


def test_the_folder_holds_the_model_and_no_training_leftovers(tmp_path, llama):
    for name in ("optimizer.pt", "trainer_state.json", "pytorch_model.bin", "model.gguf", ".gitattributes"):
        (llama / name).write_text("{}")
    (llama / "additional_chat_templates").mkdir()
    (llama / "additional_chat_templates/tools.jinja").write_text("{{ tools }}")
    (llama / "original").mkdir()
    (llama / "original/params.json").write_text("{}")
    (llama / "LICENSE").write_text("Apache")
    report = extend(llama, 16_384, tmp_path / "out", quiet=True)
    there = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert (
        there
        == set(report.files)
        == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "additional_chat_templates/tools.jinja",
            "LICENSE",
            "README.md",
            "extend.json",
        }
    )
    assert set(report.left_out) == {
        "optimizer.pt",
        "trainer_state.json",
        "pytorch_model.bin",
        "model.gguf",
        "original/params.json",
    }
    sizes = [(tmp_path / "out" / name).stat().st_size for name in there - {"README.md", "extend.json"}]
    assert report.bytes == sum(sizes)
    assert read_json(tmp_path / "out/extend.json") == report.to_dict() == json.loads(json.dumps(report.to_dict()))


# ------------------------------------------------------------------------------------------------ the model card


def test_the_card_carries_the_licence_and_says_what_is_untrained(tmp_path, llama):
    (llama / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama3.1\nlicense_link: LICENSE\ntags: [chat]\n---\n# A model\n"
    )
    report = extend(llama, 16_384, tmp_path / "out", quiet=True)
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlicense: other\nlicense_name: llama3.1\nlicense_link: LICENSE\nlibrary_name: ")
    assert report.licence == "llama3.1"
    for words in (
        "Not trained at this length yet",
        "16,384 / 2,048",
        "| window (tokens) | 2,048 | 16,384 |",
        "vllm serve FOLDER --max-model-len 16384",
        '"rope_type": "yarn"',
        "0.5 KiB a token",
    ):
        assert words in card, words


@pytest.mark.parametrize("readme", [None, "no front matter", "---\nlicense: [unclosed\n---\n", "---\n- a list\n---\n"])
def test_a_card_without_a_licence_says_so(tmp_path, llama, readme):
    if readme:
        (llama / "README.md").write_text(readme)
    assert extend(llama, 16_384, tmp_path / "out", quiet=True).licence is None
    assert "states none" in (tmp_path / "out/README.md").read_text()


def test_a_licence_file_is_named(tmp_path, llama):
    (llama / "LICENSE.txt").write_text("terms")
    extend(llama, 16_384, tmp_path / "out", quiet=True)
    assert "see LICENSE.txt" in (tmp_path / "out/README.md").read_text()


# ------------------------------------------------------------------------------------------------ refusals


def assert_refused(source, to, out, match, **options):
    """Refused with a reason, and nothing left on the disk."""
    before = sorted(Path(out).parent.iterdir())
    with pytest.raises(ValueError, match=match):
        extend(source, to, out, quiet=True, **options)
    assert sorted(Path(out).parent.iterdir()) == before


SETTINGS = [
    (2048, {}, "2,048 tokens is not longer than the 2,048"),
    (512, {}, "512 tokens is not longer"),
    (16_384, {"factor": 4.0}, r"reaches 8,192, not the 16,384.*use 8 or more"),
    (16_384, {"method": "llama3", "attention_factor": 1.2}, "has no attention factor"),
    (16_384, {"method": "alibi"}, "unknown"),
    (16_384, {"ramp": "rotations"}, "ramp='dimension'"),
    (16_384, {"method": "default"}, "pass theta above"),
    (16_384, {"method": "longrope"}, "short_factors"),
    (16_384, {"original_window": 32_768}, "at least 1"),
    (16_384, {"alpha": 8.0}, "0 < alpha < beta"),
]


@pytest.mark.parametrize(("to", "options", "reason"), SETTINGS, ids=[f"{to} {options}" for to, options, _ in SETTINGS])
def test_settings_that_cannot_work_are_refused(tmp_path, llama, to, options, reason):
    assert_refused(llama, to, tmp_path / "out", reason, **options)


@pytest.mark.parametrize(
    ("kind", "sizes", "reason"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 16}, "gpt2.*no rotary position embedding"),
        (
            "opt",
            {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "ffn_dim": 16,
                "vocab_size": 16,
                "word_embed_proj_dim": 32,
            },
            "opt.*no rotary position embedding",
        ),
    ],
)
def test_models_without_one_rope_are_refused(tmp_path, kind, sizes, reason):
    config = AutoConfig.for_model(kind, **sizes | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    assert_refused(tmp_path / "source", 1_048_576, tmp_path / "out", reason)


@pytest.mark.parametrize(("kind", "base"), [("gemma3_text", 1e4), ("olmo3", 5e5)])
def test_window_layers_keep_their_rope(tmp_path, kind, base):
    """RoPE by layer type: only the full-attention layers are scaled, in both spellings."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2, "sliding_window": 64}
    rotary = AutoModelForCausalLM.from_pretrained(make(tmp_path / "source", kind, **layers)).model.rotary_emb
    report = extend(tmp_path / "source", 8192, tmp_path / "out", quiet=True)
    assert (report.method, report.factor) == ("yarn", 4.0)
    assert any("Layers of sliding_attention keep their own RoPE" in note for note in report.notes)
    written = read_json(tmp_path / "out" / "config.json")
    assert written["rope_parameters"]["sliding_attention"] == {"rope_type": "default", "rope_theta": base}
    assert written["rope_parameters"]["full_attention"]["factor"] == written["rope_scaling"]["factor"] == 4.0
    assert written.get("rope_local_base_freq") == (base if kind == "gemma3_text" else None)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.rotary_emb
    meant, temperature = inverse_frequencies(from_config(made.config))
    assert torch.equal(made.sliding_attention_inv_freq, rotary.sliding_attention_inv_freq)
    torch.testing.assert_close(made.full_attention_inv_freq, meant)
    assert not torch.equal(meant, rotary.full_attention_inv_freq)
    assert (made.sliding_attention_attention_scaling, made.full_attention_attention_scaling) == (1.0, temperature)
    again = extend(tmp_path / "out", 16_384, tmp_path / "again", quiet=True)
    assert (again.old_window, again.factor) == (8192, 8.0)


def test_a_source_without_a_tokenizer_is_told(tmp_path):
    source = make(tmp_path / "source")
    assert not any("tokenizer" in note for note in extend(source, 4096, tmp_path / "with", quiet=True).notes)
    for path in source.glob("token*"):
        path.unlink()
    report = extend(source, 4096, tmp_path / "without", quiet=True)
    assert any("has no tokenizer: copy the model's own" in note for note in report.notes)


def test_an_output_in_use_is_refused_and_an_empty_one_taken(tmp_path, llama):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    assert_refused(llama, 16_384, tmp_path / "full", "not an empty folder")
    assert_refused(llama, 16_384, tmp_path / "full/file", "not an empty folder")
    assert_refused(llama, 16_384, llama, "not an empty folder")
    (tmp_path / "empty").mkdir()
    extend(llama, 16_384, tmp_path / "empty", quiet=True)
    assert (tmp_path / "empty/config.json").exists()


def test_sources_that_are_no_checkpoint_are_refused(tmp_path, llama, monkeypatch):
    assert_refused(tmp_path / "nowhere", 16_384, tmp_path / "out", "There is no folder")
    assert_refused(llama / "config.json", 16_384, tmp_path / "out", "is a file")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", 16_384, tmp_path / "out", "no config.json")
    (tmp_path / "empty/adapter_config.json").write_text("{}")
    assert_refused(tmp_path / "empty", 16_384, tmp_path / "out", "holds an adapter: merge it")
    (llama / "config.json").write_text("{not json")
    assert_refused(llama, 16_384, tmp_path / "out", "not valid JSON")
    write_json(llama / "config.json", {"model_type": "brand_new", "auto_map": {"AutoConfig": "code.Config"}})
    assert_refused(llama, 16_384, tmp_path / "out", "brand_new.*their own code")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["pytorch_model.bin"], "pickled.*save_pretrained"),
        (["model.gguf"], "GGUF.*gguf_file"),
        (["model-00001-of-00002.safetensors"], "no model.safetensors.index.json"),
        ([], "not a whole checkpoint"),
    ],
)
def test_weights_in_other_forms_are_refused_with_what_to_do(tmp_path, llama, names, reason):
    (llama / "model.safetensors").unlink()
    for name in names:
        (llama / name).write_bytes(b"")
    assert_refused(llama, 16_384, tmp_path / "out", reason)


def test_damaged_weights_are_refused(tmp_path, llama):
    weights = llama / "model.safetensors"
    whole = weights.read_bytes()
    for broken, reason in (
        (whole[:-1], "header describes"),
        (whole + b"x", "header describes"),
        (b"", "cut off"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (whole[:8] + b"\0" + whole[9:], "damaged safetensors header"),
    ):
        weights.write_bytes(broken)
        assert_refused(llama, 16_384, tmp_path / "out", reason)


def test_shards_that_do_not_fit_their_index_are_refused(tmp_path):
    source = make(tmp_path / "source", shard="30KB")
    index = read_json(source / "model.safetensors.index.json")
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2

    stray = source / "model-00099-of-00099.safetensors"
    save_file({"other": torch.zeros(1)}, stray)
    assert_refused(source, 16_384, tmp_path / "out", "doesn't list: model-00099")
    stray.unlink()

    for change in ({"lm_head.weight": shards[0]}, {"not.there": shards[0]}):
        write_json(source / "model.safetensors.index.json", index | {"weight_map": index["weight_map"] | change})
        assert_refused(source, 16_384, tmp_path / "out", f"disagree about {next(iter(change))}")
    shorter = dict(index["weight_map"])
    dropped = next(name for name in shorter if list(shorter.values()).count(shorter[name]) > 1)
    del shorter[dropped]
    write_json(source / "model.safetensors.index.json", index | {"weight_map": shorter})
    assert_refused(source, 16_384, tmp_path / "out", f"disagree about {dropped}")

    write_json(source / "model.safetensors.index.json", index)
    (source / shards[1]).unlink()
    assert_refused(source, 16_384, tmp_path / "out", f"lists {len(shards)} shards, but {shards[1]}")


# ------------------------------------------------------------------------------------------------ hub, crashes, memory


def test_a_hub_id_is_downloaded_and_named_as_the_base(tmp_path, llama, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    report = extend("someone/Tiny-Llama", 16_384, tmp_path / "out", revision="abc", quiet=True)
    assert (asked["name"], asked["revision"]) == ("someone/Tiny-Llama", "abc")
    assert not any(pattern.endswith(".bin") for pattern in asked["allow_patterns"])
    assert (report.hub_id, report.base_model) == ("someone/Tiny-Llama", "Tiny-Llama")
    assert "base_model: someone/Tiny-Llama" in (tmp_path / "out/README.md").read_text()


def test_an_unreachable_hub_is_one_clear_error(tmp_path, monkeypatch):
    def snapshot_download(name, **options):
        raise ConnectionError("no route\nlong trace")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_refused("someone/model", 16_384, tmp_path / "out", r"no model of that name \(no route\)")


def test_a_failure_half_way_leaves_nothing(tmp_path, llama, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(write, "write_text", fail)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        extend(llama, 16_384, tmp_path / "out", quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_full_disk_is_noticed_before_anything_is_copied(tmp_path, llama, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert_refused(llama, 16_384, tmp_path / "out", "GB are free")


def test_what_a_killed_run_left_is_cleared_but_a_living_run_is_not_disturbed(tmp_path, llama):
    left = tmp_path / ".out.partial"
    (left / "deep").mkdir(parents=True)
    (left / "deep/half.safetensors").write_bytes(b"x")
    extend(llama, 16_384, tmp_path / "out", quiet=True)
    assert not left.exists()
    assert not (tmp_path / "out/deep").exists()
    with write._folder_beside(tmp_path / "other", 0):
        with pytest.raises(ValueError, match="Another run is writing"):
            extend(llama, 16_384, tmp_path / "other", quiet=True)
        assert (tmp_path / ".other.partial").exists()


def test_a_table_that_transformers_would_read_otherwise_is_never_written(tmp_path, llama, monkeypatch):
    meant = extend_module.config_entries

    def multiplied(config, scaling, to):
        entries = meant(config, scaling, to)
        return entries | {"rope_scaling": (entries["rope_scaling"] or {}) | {"factor": 2 * scaling.factor}}

    monkeypatch.setattr(extend_module, "config_entries", multiplied)
    assert_refused(llama, 16_384, tmp_path / "out", "'factor': 16.0.*where .*'factor': 8.0.* was meant")


def forbidden(*given, **named):
    raise AssertionError("weights were loaded")


class HeaderAlone:
    """`safe_open` for who looks at a file's header: reading a tensor is an error."""

    def __init__(self, *given, **named):
        self.file = safetensors.safe_open(*given, **named)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *raised):
        return self.file.__exit__(*raised)

    get_tensor = get_slice = forbidden


def across_file_systems(*given):
    raise OSError(errno.EXDEV, "across file systems")


def extended_in_a_process(folder, out, in_kernel, answers) -> None:
    """Send the megabytes by which the peak of this process's memory grows."""
    for module in [module for name, module in sys.modules.items() if name.startswith("ultralong")]:
        if "safe_open" in vars(module):
            module.safe_open = HeaderAlone
    torch.load = forbidden
    if not in_kernel:
        os.copy_file_range = across_file_systems
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    extend(folder, 16384, out, quiet=True)
    answers.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)


@pytest.mark.parametrize("in_kernel", [True, False])
def test_memory_does_not_grow_with_the_weights(tmp_path, llama, in_kernel):
    size = 160 << 20
    header = json.dumps({"big": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with open(llama / "model.safetensors", "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + size)
        stream.seek(-1, os.SEEK_END)
        stream.write(b"!")
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    process = fork.Process(target=extended_in_a_process, args=(llama, tmp_path / "out", in_kernel, answers))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    grown = answers.get(timeout=10)
    assert grown < 64, "megabytes"
    assert sha256(tmp_path / "out/model.safetensors") == sha256(llama / "model.safetensors")


def test_rope_parameters_in_the_report_are_those_on_the_disk(tmp_path, llama):
    report = extend(llama, 16_384, tmp_path / "out", quiet=True)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert rope_parameters(from_config(config)) == report.new_rope
    assert read_json(tmp_path / "out/config.json")["rope_parameters"] == report.new_rope


FEW_EXPERTS = {
    "mixtral": {"num_local_experts": 2},
    "minimax": {"num_local_experts": 2},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
}


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    """A function: a checkpoint of a class whose config has no head_dim, made once."""

    @cache
    def get(kind):
        source = make(tmp_path_factory.mktemp("headless") / kind, kind, window=512, **FEW_EXPERTS[kind])
        config = read_json(source / "config.json")
        config.pop("head_dim", None)
        write_json(source / "config.json", config)
        return source

    return get


@pytest.mark.parametrize("kind", ["mixtral", "minimax", "qwen2_moe"])
@pytest.mark.parametrize("method", ["auto", "llama3", "linear", "dynamic"])
def test_a_config_without_head_dim_opens_after_its_extension(tmp_path, headless, kind, method):
    """Config files of 2023 have none, and transformers computes a scaled table from nothing else."""
    extend(headless(kind), 4096, tmp_path / "out", method, quiet=True)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(table_in(opened)[0], inverse_frequencies(from_config(opened.config))[0])


def test_a_class_without_a_rotary_module_is_refused(tmp_path):
    """The hybrid's config has a RoPE entry by default, its layers have none."""
    source = make(
        tmp_path / "source", "granitemoehybrid", window=512, layer_types=["mamba", "mamba"], mamba_n_heads=8,
        mamba_d_head=32, mamba_n_groups=1, position_embedding_type="nope",
    )  # fmt: skip
    assert_refused(source, 4096, tmp_path / "out", "no rotary position embedding|another table")


def test_a_single_file_beside_an_index_is_refused(tmp_path):
    source = make(tmp_path / "source", shard="50KB")
    assert (source / "model.safetensors.index.json").is_file()
    save_file({"stray": torch.zeros(2)}, source / "model.safetensors")
    assert_refused(source, 16_384, tmp_path / "out", "holds both model.safetensors and model.safetensors.index.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_position_embeddings": 2048.0}, "max_position_embeddings"),
        ({"num_key_value_heads": 1.0}, "num_key_value_heads"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": "4"}}, "factor: '4' in its RoPE entry"),
        ({"hidden_size": "128"}, "hidden_size"),
    ],
)
def test_a_config_of_wrong_types_is_one_line(tmp_path, llama, change, said):
    config = read_json(llama / "config.json")
    if "rope_scaling" in change:
        config.pop("rope_parameters")
    write_json(llama / "config.json", config | change)
    with pytest.raises(ValueError, match=said) as error:
        extend(llama, 16_384, tmp_path / "out", quiet=True)
    assert "\n" not in str(error.value)


def test_what_another_program_must_be_told_is_in_the_notes(tmp_path, llama):
    write_json(llama / "config.json", read_json(llama / "config.json") | {"dual_chunk_attention_config": {"size": 1}})
    notes = " ".join(extend(llama, 16_384, tmp_path / "out", "yarn", quiet=True).notes)
    for told in ("transformers 4.57 or later", "--yarn-beta-fast 4 --yarn-beta-slow 1", "dual_chunk_attention_config"):
        assert told in notes
    assert "yarn-beta-fast" in (tmp_path / "out" / "README.md").read_text()

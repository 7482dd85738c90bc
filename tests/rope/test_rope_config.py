"""Reading scalings from real transformers configs, old and new, and refusing by name what can't be reproduced."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModel, Gemma3TextConfig, LlamaConfig

from ultralong.rope import RopeScaling, declared_window, from_config, inverse_frequencies, rope_parameters, window_of
from ultralong.rope.config import other_ropes

SCALINGS = [
    RopeScaling("default", 64, 1e5, original_window=8192),
    RopeScaling("linear", 64, 1e5, 4.0),
    RopeScaling("dynamic", 64, 1e5, 4.0, 8192),
    RopeScaling("yarn", 64, 1e5, 4.0, 8192),
    RopeScaling("yarn", 64, 1e5, 4.0, 8192, beta=32.0, truncate=False, attention_factor=1.0),
    RopeScaling("llama3", 64, 5e5, 128.0, 8192),
    RopeScaling("longrope", 64, 1e4, 4.0, 8192, short_factors=(1.0,) * 32, long_factors=(3.5,) * 32),
]


def llama(scaling: RopeScaling) -> LlamaConfig:
    window = 8192 if scaling.method in ("default", "dynamic") else int(8192 * scaling.factor)
    return LlamaConfig(head_dim=64, max_position_embeddings=window, rope_parameters=rope_parameters(scaling))


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.method)
def test_what_is_written_reads_back_the_same(scaling):
    config = llama(scaling)
    assert from_config(config) == scaling
    assert from_config(config.to_dict()) == scaling
    assert window_of(config) == (8192 if scaling.method == "default" else int(8192 * scaling.factor))


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.method)
def test_the_older_form_reads_the_same(scaling):
    new = rope_parameters(scaling)
    theta = new.pop("rope_theta")
    new["type"] = {"longrope": "su"}.get(new["rope_type"], new.pop("rope_type"))
    new.pop("rope_type", None)
    window = llama(scaling).max_position_embeddings
    old = {
        "model_type": "llama",
        "hidden_size": 512,
        "num_attention_heads": 8,
        "max_position_embeddings": window,
        "rope_theta": theta,
        "rope_scaling": None if scaling.method == "default" else new,
    }
    assert from_config(old) == scaling
    assert from_config(SimpleNamespace(**old)) == scaling


def test_defaults_that_configs_leave_out_are_transformers_own():
    entry = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32_768}
    scaling = from_config({"head_dim": 128, "max_position_embeddings": 32_768, "rope_parameters": entry})
    assert (scaling.alpha, scaling.beta, scaling.truncate) == (1.0, 32.0, True)
    without_factor = {"rope_parameters": entry | {"factor": None}, "head_dim": 128, "max_position_embeddings": 65_536}
    assert from_config(without_factor).factor == 2.0


def test_window_of_a_yarn_config_that_kept_its_old_window():
    entry = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32_768}
    assert window_of({"head_dim": 128, "max_position_embeddings": 32_768, "rope_parameters": entry}) == 131_072


TINY = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "phi3",
        "olmo2",
        "smollm3",
        "stablelm",
        "gpt_neox",
        "cohere",
        "nemotron",
        "glm",
        "granite",
        "starcoder2",
    ],
)
def test_tables_equal_those_inside_real_model_classes(kind):
    """Also where only a part of the head is rotated: StableLM, GPT-NeoX, Nemotron, GLM."""
    model = AutoModel.from_config(AutoConfig.for_model(kind, **TINY))
    scaling = from_config(model.config)
    tables = [module for module in model.modules() if hasattr(module, "inv_freq")]
    assert tables, kind
    for module in tables:
        ours, factor = inverse_frequencies(scaling)
        assert torch.equal(module.inv_freq, ours)
        assert module.attention_scaling == factor


def test_partial_rotary_is_written_and_read_back():
    scaling = RopeScaling("yarn", 64, 1e4, 4.0, 4096, partial_rotary_factor=0.25)
    assert inverse_frequencies(scaling)[0].shape == (8,)
    config = AutoConfig.for_model(
        "stablelm",
        hidden_size=512,
        num_attention_heads=8,
        max_position_embeddings=16_384,
        rope_parameters=rope_parameters(scaling),
    )
    assert from_config(config) == scaling


REFUSED = [
    ({"model_type": "gpt2", "n_embd": 64}, "no rotary position embedding"),
    ({"model_type": "bloom", "alibi": True, "rope_theta": 1e4}, "no rotary position embedding"),
    ({"model_type": "llava", "text_config": {"rope_theta": 1e4}}, "text_config"),
    ({"rope_theta": 1e6, "local_rope_theta": 1e4}, "local_rope_theta"),
    ({"rope_theta": 1e6, "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
    ({"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0}}, "mscale"),
    ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "proportional"}}, "proportional"),
    ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "'ntk' can't be rescaled"),
    ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear"}}, "lacks 'factor'"),
    ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "longrope", "long_factor": [1.0] * 32}}, "short_factor"),
]


@pytest.mark.parametrize(("config", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_cannot_be_reproduced_is_refused_by_name(config, reason):
    with pytest.raises(ValueError, match=reason):
        from_config({"head_dim": 64, "max_position_embeddings": 4096} | config)


def test_of_tables_by_layer_type_the_full_attention_layers_one_is_read():
    config = Gemma3TextConfig(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})
    found = from_config(config)
    assert (found.method, found.factor, found.theta, found.original_window) == ("yarn", 4.0, 1e6, 64)
    assert other_ropes(config) == {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    older = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "head_dim": 64, "max_position_embeddings": 4096}
    assert from_config(older).theta == 1e6
    assert other_ropes(older) == {}
    for layers in ({"chunked_attention": {"rope_theta": 1e4}}, {"full_attention": {"rope_theta": 1e4}, "a": {}}):
        with pytest.raises(ValueError, match="has more than one RoPE"):
            from_config(older | {"rope_parameters": layers})
    with pytest.raises(ValueError, match=r"more than one RoPE \(local_rope_theta\)"):
        from_config(older | {"local_rope_theta": 1e4})


def test_a_missing_window_is_named():
    with pytest.raises(ValueError, match="max_position_embeddings"):
        from_config({"head_dim": 64, "rope_theta": 1e4})


GOOD = RopeScaling("yarn", 64, 1e4, 4.0, 4096)
BAD_SETTINGS = [
    ({"method": "alibi"}, "unknown"),
    ({"ramp": "sideways"}, "unknown"),
    ({"head_dim": 63}, "even number"),
    ({"head_dim": 2}, "even number"),
    ({"theta": 1.0}, "above 1"),
    ({"factor": 0.5}, "at least 1"),
    ({"alpha": 4.0}, "0 < alpha < beta"),
    ({"alpha": 0.0}, "0 < alpha < beta"),
    ({"original_window": None}, "original_window"),
    ({"attention_factor": 0.0}, "1.0 turns it off"),
    ({"method": "llama3", "attention_factor": 1.4}, "has no attention"),
    ({"method": "longrope"}, "32 positive numbers"),
    ({"method": "longrope", "short_factors": (1.0,) * 32, "long_factors": (1.0,) * 31}, "found 31 numbers"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_SETTINGS, ids=[str(change) for change, _ in BAD_SETTINGS])
def test_bad_settings_are_refused_with_a_reason(change, reason):
    with pytest.raises(ValueError, match=reason):
        replace(GOOD, **change)


def test_the_papers_ramp_with_a_temperature_cannot_be_written():
    with pytest.raises(ValueError, match=r"ramp='dimension'.*attention_factor=1.0"):
        rope_parameters(replace(GOOD, ramp="rotations"))


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("dynamic", "alpha", 1000.0),
        ("yarn", "llama_4_scaling_beta", 0.1),
        ("longrope", "short_mscale", 1.25),
        ("llama3", "temperature_tuning", True),
    ],
)
def test_a_key_that_only_one_class_reads_is_refused_by_name(kind, key, value):
    lists = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    entry = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512, **lists}
    config = {"head_dim": 64, "max_position_embeddings": 2048, "rope_parameters": entry}
    assert from_config(config).method == kind
    with pytest.raises(ValueError, match=f"has {key} in its RoPE entry"):
        from_config(config | {"rope_parameters": entry | {key: value}})
    assert declared_window(config | {"rope_parameters": entry | {key: value}}) == 2048


def test_the_window_of_a_linear_scaling_counts_from_the_window_that_its_config_records():
    entry = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    config = {"head_dim": 64, "max_position_embeddings": 2048, "rope_parameters": entry}
    assert window_of(config) == 2048
    assert window_of(config | {"original_max_position_embeddings": 2048}) == 8192
    assert declared_window({"max_position_embeddings": 512, "alibi": True}) == 512
    assert declared_window({}) == 0

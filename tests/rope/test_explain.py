"""What `extend --explain` says is what transformers' own tables show, for every scaling type and several classes."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ultralong.checkpoints.class_table import class_norms
from ultralong.checkpoints.extend import extend
from ultralong.checkpoints.rescale import Extension, choose_scaling, config_entries, explanation, traits
from ultralong.cli import main
from ultralong.rope import RopeScaling, from_config
from ultralong.rope.explain import explain_scaling, explanation_lines

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 16,
}
WINDOW, TO = 512, 2048
LONG = tuple(1.0 + 0.5 * i for i in range(8))
METHODS = {
    "linear": {},
    "ntk": {},
    "dynamic": {},
    "yarn": {"beta": 16.0},
    "llama3": {},
    "longrope": {"short_factors": (1.0,) * 8, "long_factors": LONG, "factor": 4.0},
    "default": {"theta": 200000.0},
}


def model(kind="llama", **changes):
    return AutoConfig.for_model(kind, **SIZES | {"max_position_embeddings": WINDOW} | changes)


def class_wavelengths(config, tokens):
    """Of transformers' own rotary module, read at the last of so many tokens, from the turn of two neighbours."""
    module = LlamaRotaryEmbedding(config)
    module(torch.zeros(1, 1, 16), torch.tensor([[tokens - 1]]))
    return (2 * math.pi / module.inv_freq.double()).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_pairs_are_those_of_transformers_tables(method):
    config, options = model(), METHODS[method]
    before = class_wavelengths(config, WINDOW)
    wish = Extension(TO, method, **options)
    scaling = choose_scaling(config, wish)
    found = explain_scaling(from_config(config), scaling, TO)
    extended = model(rope_parameters=config_entries(config, scaling, TO)["rope_parameters"])
    extended.max_position_embeddings = WINDOW if method in ("linear", "dynamic") else TO
    if method == "longrope":
        extended.original_max_position_embeddings = WINDOW
    after = class_wavelengths(extended, TO)
    assert [pair.wavelength for pair in found.pairs] == pytest.approx(before, rel=1e-5)
    assert [pair.new_wavelength for pair in found.pairs] == pytest.approx(after, rel=1e-5)
    unseen = []
    for index, (old, new, pair) in enumerate(zip(before, after, found.pairs, strict=True)):
        assert (pair.turns, pair.new_turns) == pytest.approx((WINDOW / old, TO / new), rel=1e-5)
        close = [abs(new / old / wanted - 1) < 1e-5 for wanted in (1, scaling.factor)]
        slower = "slowed" if scaling.factor > 1 and new / old > scaling.factor else "ramp"
        assert pair.kind == ("kept" if close[0] else "interpolated" if close[1] else slower)
        if old > WINDOW and TO / new > WINDOW / old * (1 + 1e-5):
            unseen.append(index)
    assert list(found.unseen) == unseen
    assert found.critical_pair == next(index for index, old in enumerate(before) if old > WINDOW)
    text = "\n".join(explanation_lines(found))
    assert ("With this scaling none does" in text) == (not unseen)
    assert ("depends on the length" in text) == (method in ("dynamic", "longrope"))
    assert json.loads(json.dumps(found.to_dict()))["unseen"] == unseen


def test_a_source_that_is_scaled_already_is_told_from_its_pretraining():
    llama3 = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }  # fmt: skip
    config = model(max_position_embeddings=4096, rope_parameters=llama3)
    wish = Extension(16384)
    said = explanation(config, wish, choose_scaling(config, wish), frozenset())
    assert said["lines"][0].startswith("Method llama3: the model has it")
    last = said["pairs"][-1]
    assert last["divisor"] == pytest.approx(32)
    assert last["source_wavelength"] == pytest.approx(8 * last["wavelength"])
    assert (said["original_window"], said["unseen"]) == (512, [])


def test_every_pair_may_have_seen_all_angles_and_a_pair_may_turn_faster():
    old = RopeScaling("default", 8, theta=10.0, original_window=4096)
    new = replace(old, method="linear", factor=2.0)
    found = explain_scaling(old, new, 8192)
    assert found.critical_pair is None
    assert "no angle of the new window is new" in "\n".join(explanation_lines(found))
    shorter = RopeScaling("longrope", 8, 10.0, 2.0, 4096, short_factors=(1.0,) * 4, long_factors=(0.5, 1.0, 2.0, 3.0))
    assert [pair.kind for pair in explain_scaling(old, shorter, 8192).pairs] == [
        "faster",
        "kept",
        "interpolated",
        "slowed",
    ]


@pytest.mark.parametrize(
    ("kind", "changes", "names"),
    [
        ("llama", {"max_position_embeddings": 8192}, []),
        ("llama", {"num_key_value_heads": 2}, ["grouped queries", "short window of pretraining"]),
        ("qwen3", {"num_key_value_heads": 1, "max_position_embeddings": 32768}, ["normalisation", "grouped queries"]),
        (
            "olmo3",
            {
                "max_position_embeddings": 8192,
                "sliding_window": 64,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            ["normalisation", "sliding windows"],
        ),
        ("mistral", {"sliding_window": 64, "max_position_embeddings": 8192}, ["sliding windows"]),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64, "max_position_embeddings": 8192}, []),
    ],
)
def test_traits_are_those_of_the_class_and_its_config(kind, changes, names):
    config = model(kind, **changes)
    scaling = RopeScaling("yarn", 16, 10000.0, 4.0, config.max_position_embeddings)
    found, said = traits(config, scaling, class_norms(config))
    assert found == names
    assert len(said) == 4
    if kind == "olmo3":
        assert said[0] == "Norms: after a sublayer and queries and keys, beside the usual ones."
        assert said[3] == "Windows: 1 of 2 layers see 64 tokens, which no scaling widens."


def test_the_command_explains_without_writing_or_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model("qwen3", num_key_value_heads=1).save_pretrained("only-a-config")
    main(["extend", "only-a-config", "--to", "4x", "--explain", "--json", "found.json"])
    said = capsys.readouterr().out
    assert "Method yarn: the recipe's for a model without llama3" in said
    assert "3 of 4 traits" in said
    assert "three or more cost up to 47%" in said
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["explanation"]["lines"][0] in said
    assert (found["files"], found["new_window"]) == ([], TO)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "only-a-config"]
    with pytest.raises(ValueError, match="give the folder to write"):
        extend("only-a-config", TO)


def test_the_command_says_where_beta_changes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model("qwen3", num_key_value_heads=1).save_pretrained("only-a-config")
    for method, said in (("ntk", True), ("yarn", False), ("llama3", False)):
        main(["extend", "only-a-config", "--to", "4x", "--explain", "--method", method, "--beta", "8"])
        assert ("--beta changes nothing" in capsys.readouterr().out) == said

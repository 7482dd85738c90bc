"""Settings: strict about keys and types, and a file that is written reads back equal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from ultralong.training.config import DataSource, MemoryConfig, OptimizerConfig, ParallelConfig, TrainConfig, preset
from ultralong.utils import settings
from ultralong.utils.units import parse_tokens


@dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    count: int = 3
    inner: Inner = field(default_factory=Inner)
    items: tuple[Inner, ...] = ()
    maybe: int | None = None
    size: int | Literal["auto"] = 1


def test_reads_nested_values_and_overrides(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("name: x\ninner: {rate: 3e-5}\nitems: [{kind: b}]\n")
    found = settings.load(Outer, path, ["inner.kind=b", "maybe=7", "count=5"])
    assert found == Outer("x", 5, Inner(3e-5, "b"), (Inner(1.0, "b"),), 7)


def test_what_is_saved_reads_back_equal(tmp_path):
    config = TrainConfig("m", "o", (DataSource("rows", 0.5),), 7, optimizer=OptimizerConfig(lr=1e-5, betas=(0.8, 0.9)))
    settings.save(config, tmp_path / "c.yaml", "a header\nof two lines")
    assert (tmp_path / "c.yaml").read_text().startswith("# a header\n# of two lines\n")
    assert settings.load(TrainConfig, tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nme: x", "did you mean 'name'"),
        ("count: 1", "name must be given"),
        ("name: x\ncount: many", "count must be of type int, found 'many'"),
        ("name: x\ncount: true", "count must be of type int, found True"),
        ("name: x\nitems: 2", r"items must be a list, such as \[2\], found 2"),
        ("name: x\ninner: {kind: c}", "inner: kind must be one of 'a', 'b', found 'c'"),
        ("name: x\nitems: [{rate: fast}]", r"items\[0\]: rate must be of type float"),
        (f"name: x\ncount: {10**30}", "count must be a number of 64 bits"),
        (f"name: x\nmaybe: -{2**63 + 1}", "maybe must be a number of 64 bits"),
        (f"name: x\ninner: {{rate: {10**400}}}", "inner: rate must be of type float"),
        ("name: x\nmaybe: soon", "maybe must be of type int, found 'soon'"),
        ("name: x\nsize: atuo", r"size must be of type int or 'auto', found 'atuo'\.$"),
        (f"name: x\nsize: {2**63}", f"size must be a number of 64 bits, found {2**63}\\.$"),
        ("- a list", "must hold a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_mistakes_are_named_with_file_and_key(tmp_path, text, said):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        settings.load(Outer, path)
    assert "bad.yaml" in str(error.value)


def test_overrides_need_an_equals_sign_and_groups():
    with pytest.raises(ValueError, match="key=value"):
        settings.override({}, ["lr"])
    with pytest.raises(ValueError, match="not a group"):
        settings.override({"name": "x"}, ["name.first=y"])


def test_a_refusal_of_the_dataclass_itself_names_the_place():
    with pytest.raises(ValueError, match="where: optimizer: lr must be above 0"):
        settings.from_mapping(
            TrainConfig,
            {"model": "m", "out": "o", "data": [{"rows": "r"}], "steps": 1, "optimizer": {"lr": 0.0}},
            "where",
        )


def test_a_key_without_its_group_is_told_where_it_belongs():
    with pytest.raises(ValueError, match=r"unknown key 'rate'; it belongs to inner, as `inner: \{rate: \.\.\.\}`"):
        settings.from_mapping(Outer, {"name": "x", "rate": 2.0})
    with pytest.raises(ValueError, match=r"unknown key 'lr'; it belongs to optimizer"):
        settings.from_mapping(TrainConfig, {"model": "m", "out": "o", "data": [{"rows": "r"}], "steps": 1, "lr": 1e-5})
    with pytest.raises(ValueError, match=r"unknown key 'weight'; known keys"):  # of a list's items, not of a group
        settings.from_mapping(TrainConfig, {"model": "m", "out": "o", "weight": 2.0, "steps": 1})


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="neither a settings file nor a preset"):
        preset("no-such-preset")


def test_a_demos_file_is_no_run_and_says_so():
    with pytest.raises(ValueError, match=r"'demo-miniature' is what `ultralong demo --model miniature` does, not one"):
        preset("demo-miniature")
    with pytest.raises(ValueError, match=r"Presets: llama31-8b-1m, .*, tinyllama-1\.1b-16k\.$"):
        preset("demo-miniature")
    assert preset("demo-miniature", demos=True).name == "demo-miniature.yaml"


def test_keys_of_the_version_before_are_read_with_a_note(capsys):
    old = {
        "model": "m", "out": "o", "data": [{"rows": "r"}], "steps": 1, "rows_per_step": 4, "rows_at_once": 2,
        "largest_jump": 2.0, "optimizer": {"states": "8bit"},
        "parallel": {"sequence": 2, "shard": 4, "reshard": False, "stages": 2},
        "memory": {"checkpoint_layers": True, "layer_tile": 64, "attention_kept": 1, "attention_host": 2,
                   "inputs_host": 3, "inputs_every": 4},
    }  # fmt: skip
    found = settings.from_mapping(TrainConfig, old, "old.yaml")
    assert (found.global_batch_size, found.micro_batch_size, found.loss_spike_threshold) == (4, 2, 2.0)
    assert found.parallel == ParallelConfig(2, fsdp_shard_degree=4, reshard_after_forward=False, head_chunks=2)
    assert found.optimizer.state_precision == "8bit"
    assert found.memory == MemoryConfig(True, 2048, 64, 1, 2, 3, 4)
    notes = capsys.readouterr().err
    assert "old.yaml: 'rows_per_step' is now called 'global_batch_size'" in notes
    assert "old.yaml: parallel: 'sequence' is now called 'context_parallel_size'" in notes


def test_old_keys_work_in_overrides_and_never_beside_the_new_ones(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("{model: m, out: o, data: [{rows: r}], steps: 1, parallel: {context_parallel_size: 2}}")
    assert settings.load(TrainConfig, path, ["parallel.sequence=4"]).parallel.context_parallel_size == 4
    with pytest.raises(ValueError, match="'sequence' is the old name of 'context_parallel_size', and both are there"):
        settings.from_mapping(ParallelConfig, {"sequence": 2, "context_parallel_size": 2})


def test_a_change_that_is_wrong_is_named_and_not_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: x\n")
    with pytest.raises(ValueError, match=r"run\.yaml: unknown key 'foo'.* comes with foo\.bar=1, count=4\."):
        settings.load(Outer, path, ["foo.bar=1", "count=4"])
    path.write_text("name: x\nother: 1\n")
    with pytest.raises(ValueError, match=r"run\.yaml: unknown key 'other'") as caught:
        settings.load(Outer, path, ["foo.bar=1"])
    assert "sound" not in str(caught.value)


def test_tokens_are_read_with_units_in_files_and_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("{model: m, out: o, data: [{rows: r}], steps: 1, length: 128k}")
    assert settings.load(TrainConfig, path).length == 131072
    found = settings.load(TrainConfig, path, ["length=1m", "memory.loss_tile=8k"])
    assert (found.length, found.memory.loss_tile) == (1048576, 8192)
    assert settings.load(TrainConfig, path, ["length=4096"]).length == 4096
    for wrong in ("lots", "0.3k", "-5", "1e3", "12x"):
        with pytest.raises(ValueError, match=r"c\.yaml: length: tokens are a whole number such as 131072, 128k or 1m"):
            settings.load(TrainConfig, path, [f"length='{wrong}'"])
    with pytest.raises(ValueError, match="steps must be of type int, found '1k'"):
        settings.load(TrainConfig, path, ["steps=1k"])


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("131072", 131072), ("131,072", 131072), ("131_072", 131072), ("128k", 131072), ("128K", 131072),
     (" 1m ", 1048576), ("1.5M", 1572864), ("0.5k", 512), ("2g", 2**31), ("0", 0)],
)  # fmt: skip
def test_tokens_as_people_write_them(text, tokens):
    assert parse_tokens(text) == tokens


def test_an_override_that_is_no_yaml_is_named():
    with pytest.raises(ValueError, match=r"--set data=\[: the value is not valid YAML"):
        settings.override({}, ["data=["])

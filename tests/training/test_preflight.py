"""Can a run start: one answer for the trainer, SFT, the launcher's dry run and the plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_run import LENGTH, make_run
from transformers import AutoConfig, AutoModelForCausalLM

from ultralong import launch, planner
from ultralong.cli import main
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.data.rows.row_checks import check_vocabulary, longest_position
from ultralong.inference.load import load_model
from ultralong.training.config import DataSource, MemoryConfig, OptimizerConfig, ParallelConfig, TrainConfig
from ultralong.training.loop import train
from ultralong.training.preflight import check_start, preflight
from ultralong.utils import settings
from ultralong.utils.files import read_json, write_json

RUN = {"model": "m", "out": "o", "data": (DataSource("r"),), "steps": 1}
NAMES = ["processes", "model", "rows", "shapes", "targets", "window", "vocabulary", "attention", "folder"]


@pytest.fixture
def run(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = make_run(tmp_path, tiny_model, tiny_tokenizer)
    manifest = read_json("rows/manifest.json")
    write_json("rows/manifest.json", manifest | {"template": {"name": "as of conversations"}})  # so that sft takes them
    return made


def edit(path, **changes):
    write_json(path, read_json(path) | changes)


def second(run, **changes):
    """A second source: the same rows, with another manifest."""
    import shutil

    shutil.copytree("rows", "other")
    edit("other/manifest.json", **changes)
    return replace(run, data=(*run.data, DataSource("other")))


def many_positions(run):
    edit("model/config.json", max_position_embeddings=LENGTH // 2)
    return run


def one_long_document(run):
    """Positions start again at each document; one of the second source is longer than the window."""
    found = second(run, positions="document")
    edit("rows/manifest.json", positions="document")
    edit("model/config.json", max_position_embeddings=LENGTH - 1)
    for folder, cut in (("rows", LENGTH // 2), ("other", LENGTH)):
        manifest = read_json(f"{folder}/manifest.json")
        for shard in manifest["shards"]:
            starts = [0] if cut == LENGTH else [0, cut]
            rows = [(row, start, 1) for row in range(shard["rows"]) for start in starts]
            path = Path(folder, f"{shard['shard']}.segments.npy")
            np.save(path, np.array(rows, dtype="<i8"))
            shard["files"][path.name]["bytes"] = path.stat().st_size
        write_json(f"{folder}/manifest.json", manifest)
    return found


def other_tokenizer(run):
    manifest = read_json("rows/manifest.json")
    edit("rows/manifest.json", tokenizer=manifest["tokenizer"] | {"sha256": "0" * 64})
    return run


def large_vocabulary(run):
    manifest = read_json("rows/manifest.json")
    shards = [shard | {"largest_token": 9999} for shard in manifest["shards"]]
    edit("rows/manifest.json", tokenizer=manifest["tokenizer"] | {"vocabulary": 10**6}, shards=shards)
    ids = np.lib.format.open_memmap(Path("rows/rows-00000.npy"), mode="r+")
    ids[-1, 5] = 9999
    return run


def foreign_folder(run):
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("mine")
    return run


def no_targets(run):
    edit("rows/manifest.json", target_tokens=0)
    return run


def tiled(run):
    return replace(run, memory=MemoryConfig(activation_checkpointing=True, layer_tile=64))


def other_layers(run):
    edit("model/config.json", model_type="gemma2", architectures=["Gemma2ForCausalLM"])
    return tiled(run)


def dropout(run):
    edit("model/config.json", attention_dropout=0.1)
    return tiled(run)


def cut_shard(run):
    """The last of the files: a run would come to it after hours."""
    path = sorted(Path("rows").glob("rows-*.npy"))[-1]
    path.write_bytes(path.read_bytes()[:-8])
    return run


def other_manifest(**changes):
    def make(run):
        edit("rows/manifest.json", **changes)
        return run

    return make


def other_config(**changes):
    def make(run):
        edit("model/config.json", **changes)
        return run

    return make


def out_in_a_file(run):
    Path("notes").write_text("mine")
    return replace(run, out="notes/run")


def of_states(run):
    """Layers with a short convolution: what a document left in it would reach the next one."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    kinds = ["conv", "full_attention"]
    config = AutoConfig.for_model("lfm2", **sizes, **tokens, vocab_size=400, num_hidden_layers=2, layer_types=kinds)
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    edit("rows/manifest.json", mask_documents=True)
    return run


def parallel(**changes):
    return lambda run: replace(run, parallel=replace(run.parallel, **changes))


# What is wrong, and what all four say of it.
WRONG = {
    "a row's processes": (parallel(context_parallel_size=2), "context_parallel_size is 2, but this run has 1 process"),
    "a shard degree": (parallel(fsdp_shard_degree=2), "fsdp_shard_degree is 2, but this run has 1 process"),
    "mixed masks": (lambda run: second(run, mask_documents=True), "must share row length and document mask"),
    "mixed lengths": (lambda run: second(run, length=32), "must share row length and document mask"),
    "an empty source": (lambda run: second(run, rows=0, shards=[]), "other holds no row"),
    "another length": (lambda run: replace(run, length=1024), "The config says length: 1024"),
    "a tokenizer": (other_tokenizer, "rows was made with another tokenizer"),
    "a vocabulary": (large_vocabulary, "a vocabulary of 1000000 tokens and holds token 9999, the model has"),
    "positions": (many_positions, f"Rows have {LENGTH} tokens in rows, the model's window is {LENGTH // 2}"),
    "restarting positions": (one_long_document, f"Documents in rows have up to {LENGTH} tokens in other"),
    "a scheme": (parallel(scheme="ulises"), "scheme must be one of auto, single"),
    "a kernel": (parallel(kernel="flash9"), "kernel must be one of auto, flash4"),
    "compile": (lambda run: second(replace(run, compile=True), mask_documents=True), "must share row length"),
    "too many rows": (lambda run: replace(run, steps=2**40), "and a run reads at most 2,147,483,648"),
    "layers in tiles": (other_layers, "layers of gemma2 are not known to it: set memory.layer_tile to 0"),
    "dropout in tiles": (dropout, "memory.layer_tile is for layers without dropout, found attention_dropout=0.1"),
    "a foreign folder": (foreign_folder, "run is not empty and holds no run"),
    "no targets": (no_targets, "rows has no token to learn from"),
    "a cut shard": (cut_shard, "bytes, its record says"),
    "shards that are not all": (other_manifest(shards=[]), "rows, its shards hold 0"),
    "a count that is none": (other_manifest(rows="ten"), "manifest.json has a rows of 'ten'"),
    "a length of nothing": (other_manifest(length=0), "manifest.json has a length of 0"),
    "a layer without weights": (other_config(num_hidden_layers=9), "config.json and the weights are not of one model"),
    "weights of another shape": (other_config(intermediate_size=96), "the weights are not of one model"),
    "a config that is no object": (lambda run: Path("model/config.json").write_text("[]") and run, "must hold a JSON"),
    "a soft cap": (other_config(final_logit_softcapping=30.0), "changes its logits after the head"),
    "a state along the row": (of_states, "carries a state along the row (conv), so documents of a row can't be kept"),
    "an out in a file": (out_in_a_file, "notes is a file, and a folder is needed there"),
}


def said_by_plan(run: TrainConfig) -> str:
    with pytest.raises(ValueError, match=r".+") as error:
        planner.plan(run, 1)
    return str(error.value)


def said_by_trainer(run: TrainConfig) -> str:
    with pytest.raises(ValueError, match=r".+") as error:
        train(run, quiet=True, resume=True)
    return str(error.value)


def said_by_launch(run: TrainConfig) -> str:
    return " Also: ".join(finding.text for finding in launch.check(run, 1, 1) if not finding.good)


def said_by_sft(run: TrainConfig, capsys) -> str:
    settings.save(run, "run.yaml")
    with pytest.raises(SystemExit) as left:
        main(["sft", "run.yaml", "--quiet", "--resume"])
    assert left.value.code == 1
    return capsys.readouterr().err


def test_a_sound_run_passes(run):
    findings = preflight(run, 1, device="cpu")
    assert [finding.name for finding in findings] == NAMES
    assert all(finding.good for finding in findings), findings
    check_start(run, 1)


@pytest.mark.parametrize("what", WRONG)
def test_all_four_refuse_the_same(run, what, capsys):
    make, expected = WRONG[what]
    wrong = make(run)
    refusals = {"trainer": said_by_trainer(wrong), "launch": said_by_launch(wrong), "sft": said_by_sft(wrong, capsys)}
    if make in (foreign_folder, out_in_a_file):
        planner.plan(wrong, 1)  # it writes nothing
    else:
        refusals["plan"] = said_by_plan(wrong)
    for caller, text in refusals.items():
        assert expected in " ".join(text.split()), f"{caller} said: {text}"


def test_a_row_is_not_shared_by_layers_that_carry_a_state(run):
    of_states(run)
    edit("rows/manifest.json", mask_documents=False)
    check_start(run, 1)
    with pytest.raises(ValueError, match="a row can't be shared by 2 processes"):
        check_start(replace(run, parallel=ParallelConfig(context_parallel_size=2)), 2)


def test_what_is_measured_has_all_its_weights(run):
    """transformers would give a layer that the files lack random values."""
    edit("model/config.json", num_hidden_layers=3)
    with pytest.raises(
        ValueError, match=r"the files lack model\.layers\.2\.input_layernorm\.weight and 8 more weights"
    ):
        load_model("model", "cpu")


@pytest.mark.parametrize("recorded", [True, False])
def test_a_tokenizer_that_knows_more_than_its_model_has_is_fine_where_no_row_holds_it(run, monkeypatch, recorded):
    """As Gemma 3's, which has a token of images: their manifest decides, or what rows of an earlier version hold."""
    manifest = read_json("rows/manifest.json")
    top = max(int(row.labels.max()) for row in PackedRows("rows"))
    if recorded:
        monkeypatch.setattr(PackedRows, "__getitem__", lambda self, place: pytest.fail("a row is read"))
    else:
        shards = [{key: shard[key] for key in shard if key != "largest_token"} for shard in manifest["shards"]]
        edit("rows/manifest.json", shards=shards)
    edit("rows/manifest.json", tokenizer=manifest["tokenizer"] | {"vocabulary": 10**6})
    rows, size = PackedRows("rows"), AutoConfig.from_pretrained("model").vocab_size
    check_vocabulary(rows, size)
    check_vocabulary(rows, top + 1)
    with pytest.raises(ValueError, match=f"holds token {top}, the evaluator has {top}"):
        check_vocabulary(rows, top, "evaluator")


def test_nothing_is_written_by_a_refused_run(run, tmp_path):
    with pytest.raises(ValueError, match="kernel must be one of"):
        train(replace(run, parallel=ParallelConfig(kernel="flash9")), quiet=True)
    assert not (tmp_path / "run").exists()


def test_every_reason_is_given_at_once(run):
    wrong = replace(large_vocabulary(run), parallel=ParallelConfig(context_parallel_size=2, kernel="flash9"))
    with pytest.raises(
        ValueError, match=r"but this run has 1 process.* Also: .*a vocabulary of .* Also: kernel must be"
    ):
        check_start(wrong, 1)


@pytest.mark.parametrize("scheme", ["ring", "gathered", "auto"])
def test_only_ulysses_splits_heads(run, tiny_model, scheme):
    """Three processes and heads that three don't divide: the ring and gathered keys take any number."""
    assert tiny_model.config.num_attention_heads % 3
    check_start(replace(run, parallel=ParallelConfig(context_parallel_size=3, scheme=scheme)), 3)
    with pytest.raises(ValueError, match=r"Ulysses can't split"):
        check_start(replace(run, parallel=ParallelConfig(context_parallel_size=3, scheme="ulysses")), 3)


@pytest.mark.parametrize("key", ["context_parallel_size", "fsdp_shard_degree"])
def test_a_share_of_billions_is_refused_at_once(run, key):
    """What fits is looked for among the processes that there are, not among those that were asked for."""
    with pytest.raises(ValueError, match=f"{key} is 9000000000000000000, but this run has 1 process"):
        check_start(replace(run, parallel=ParallelConfig(**{key: 9 * 10**18})), 1)


def test_a_plan_needs_neither_model_nor_rows(run):
    import shutil

    shutil.rmtree("model")
    shutil.rmtree("rows")
    assert all(finding.good for finding in preflight(run, 1, planned=True))
    wrong = {finding.name for finding in preflight(run, 1) if not finding.good}
    assert wrong == {"model", "rows"}
    chunks = replace(run, parallel=ParallelConfig(context_parallel_size=2, scheme="ulysses", head_chunks=3))
    assert all(finding.good for finding in preflight(chunks, 2, planned=True)), "the heads are not known yet"
    text = next(finding.text for finding in preflight(run, 1) if finding.name == "rows")
    assert text.startswith("There is no folder rows")


@pytest.mark.parametrize("compile_with", ["processes", "mask"])
def test_compile_is_for_one_process_without_a_mask(run, compile_with):
    if compile_with == "mask":
        edit("rows/manifest.json", mask_documents=True)
    world = 2 if compile_with == "processes" else 1
    with pytest.raises(ValueError, match="compile works on one process"):
        check_start(replace(run, compile=True), world)


@pytest.mark.parametrize("processes", [1, 2])
def test_head_chunks_have_to_split_the_heads(run, processes):
    scheme = "ulysses" if processes > 1 else "auto"
    parallel = ParallelConfig(context_parallel_size=processes, scheme=scheme, head_chunks=3)
    with pytest.raises(ValueError, match=r"head_chunks must be one of \["):
        check_start(replace(run, parallel=parallel), processes)


def test_sft_refuses_documents(run, capsys):
    manifest = read_json("rows/manifest.json")
    del manifest["template"]
    write_json("rows/manifest.json", manifest)
    assert "holds documents, not conversations" in said_by_sft(run, capsys)
    assert all(finding.good for finding in preflight(run, 1))


def test_a_run_in_its_folder_is_resumed_or_refused(run):
    train(run, quiet=True)
    with pytest.raises(ValueError, match=r"holds a run already\. Resume it"):
        check_start(run, 1)
    findings = {finding.name: finding.text for finding in preflight(run, 1, resume=True)}
    assert findings["folder"] == "run: resumes after step 4"
    other = replace(run, steps=run.steps + 1)
    with pytest.raises(ValueError, match="holds a run with other settings"):
        check_start(other, 1, resume=True)
    planner.plan(other, 1)  # which writes nothing


def test_a_model_extended_with_a_factor_is_taken_at_its_window(run):
    """`linear` and `dynamic` keep the unscaled window in the config or not; programs that serve them know."""
    config = read_json("model/config.json")
    rope = config["rope_parameters"] | {"rope_type": "dynamic", "factor": 2.0}
    edit("model/config.json", max_position_embeddings=LENGTH // 2, rope_parameters=rope)
    check_start(run, 1)
    edit("model/config.json", max_position_embeddings=LENGTH // 4)
    with pytest.raises(ValueError, match=f"window is {LENGTH // 2}"):
        check_start(run, 1)


def test_positions_are_counted_over_every_document(run):
    rows = PackedRows("rows")
    assert longest_position(rows) == LENGTH
    edit("rows/manifest.json", positions="document")
    rows = PackedRows("rows")
    longest = max(int(np.diff(rows[index].boundaries).max()) for index in range(len(rows)))
    assert longest_position(rows) == longest
    assert longest == max(int(rows[index].position_ids.max()) for index in range(len(rows))) + 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trackers": ("tensorboard",)}, "trackers: tensorboard is not installed"),
        ({"trackers": ("wandb",)}, "trackers: wandb is not installed"),
        ({"optimizer": OptimizerConfig(state_precision="8bit")}, "torchao is needed for this"),
    ],
)
def test_packages_of_the_settings_are_needed_where_a_run_starts(run, monkeypatch, change, said):
    """A plan may be made on another machine; a tracker that is not installed would be left out without a word."""
    import importlib

    from ultralong.training import preflight as checked

    monkeypatch.setattr(checked, "get_available_trackers", list)
    found = importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda name, *rest: _missing(name) if "torchao" in name else found(name, *rest)
    )
    (packages,) = (finding for finding in preflight(replace(run, **change), 1) if finding.name == "packages")
    assert not packages.good
    assert said in packages.text
    assert all(finding.good for finding in preflight(replace(run, **change), 1, planned=True))


def test_a_tracker_that_is_none_is_refused_everywhere(run):
    wrong = replace(run, trackers=("tensorbord",))
    assert "trackers: 'tensorbord' is none of aim" in said_by_plan(wrong)
    assert "trackers: 'tensorbord' is none of aim" in said_by_launch(wrong)
    assert "tensorbord" in said_by_trainer(wrong)


def _missing(name):
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        (DataSource, {"rows": "r", "weight": float("inf")}),
        (DataSource, {"rows": "r", "weight": float("nan")}),
        (OptimizerConfig, {"lr": float("inf")}),
        (OptimizerConfig, {"betas": (0.9, 1.0)}),
        (OptimizerConfig, {"eps": 0.0}),
        (OptimizerConfig, {"weight_decay": -0.1}),
        (OptimizerConfig, {"weight_decay": float("nan")}),
        (OptimizerConfig, {"clip_norm": float("nan")}),
        (ParallelConfig, {"timeout_minutes": float("inf")}),
        (TrainConfig, RUN | {"save_every": -1}),
        (TrainConfig, RUN | {"seed": -1}),
        (TrainConfig, RUN | {"seed": 2**32}),
        (TrainConfig, RUN | {"loss_spike_threshold": -0.5}),
        (TrainConfig, RUN | {"loss_spike_threshold": float("nan")}),
    ],
)
def test_numbers_without_sense_are_refused(part, change):
    with pytest.raises(ValueError, match="must be"):
        part(**change)

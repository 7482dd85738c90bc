"""The loop: the same run on one and two processes, resumed to the bit, stopped with reasons, and what it leaves."""

from __future__ import annotations

import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import forked_agents, train_over
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ultralong import api
from ultralong.cli import main
from ultralong.data.chat.pack import ChatSettings, pack_chat
from ultralong.data.read.documents import Document
from ultralong.data.rows.packing import pack
from ultralong.data.rows.separators import PackSettings
from ultralong.data.tokens.tokenize import tokenize_corpus
from ultralong.training import checkpoint, loop
from ultralong.training.batches import RowOrder
from ultralong.training.config import DataSource, OptimizerConfig, ParallelConfig, TrainConfig
from ultralong.training.loop import train
from ultralong.training.throughput import query_key_pairs, step_flops
from ultralong.utils import settings
from ultralong.utils.files import read_json, read_jsonl

TEXT = "the keeper of the light wrote in his log that no ship had passed and the tide came in at dawn"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_tiny_model, tiny_tokenizer):
    """A tiny model, and three kinds of rows: unmasked, masked, chat."""
    folder = tmp_path_factory.mktemp("train")
    make_tiny_model(vocab_size=len(tiny_tokenizer), max_position_embeddings=128).save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    texts = [" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(40 + 37 * (i % 5))) for i in range(40)]
    documents = [Document(str(i), text, license="CC0-1.0") for i, text in enumerate(texts)]
    store = tokenize_corpus(documents, tiny_tokenizer, folder / "tokens", quiet=True)
    pack(store, tiny_tokenizer, folder / "rows", PackSettings(length=128), quiet=True)
    pack(store, tiny_tokenizer, folder / "masked", PackSettings(length=128, mask_documents=True), quiet=True)
    talks = [[{"role": "user", "content": text[:60]}, {"role": "assistant", "content": text[60:90]}] for text in texts]
    pack_chat(talks, tiny_tokenizer, folder / "chat", ChatSettings(length=128), quiet=True)
    return folder


@pytest.fixture
def config(made, tmp_path):
    return TrainConfig(
        model=str(made / "model"), out=str(tmp_path / "run"), data=(DataSource(str(made / "rows")),), steps=6,
        global_batch_size=2, dtype="float32", save_every=3, optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2),
    )  # fmt: skip


def weights(config):
    return load_file(f"{config.out}/model/model.safetensors")


def test_rows_of_another_length_than_the_config_says_are_refused(config):
    with pytest.raises(ValueError, match=r"length: 256, the rows in .* have 128 tokens.*or set length=128"):
        train(replace(config, length=256), quiet=True)
    assert not Path(config.out).exists()
    with pytest.raises(ValueError, match="length must be 1 or more, found 0"):
        replace(config, length=0)


def test_a_run_without_length_and_base_model_is_resumed_by_a_config_that_has_them(config):
    train(replace(config, steps=6), quiet=True)
    assert train(replace(config, length=128, base_model="miniature"), resume=True, quiet=True).steps == 6


def curve(config, key="loss"):
    return [record[key] for record in read_jsonl(f"{config.out}/log.jsonl")]


@pytest.fixture
def umask_022():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_learns_and_leaves_a_plain_checkpoint(config, umask_022):
    result = train(replace(config, steps=30, save_every=0), quiet=True)
    losses = curve(config)
    assert len(losses) == 30
    assert losses[-1] < 0.7 * losses[0]
    assert result.tokens == 30 * 2 * 128
    assert result.loss == pytest.approx(sum(losses[-3:]) / 3)
    opened = AutoModelForCausalLM.from_pretrained(result.model)
    assert len(AutoTokenizer.from_pretrained(result.model)) == opened.config.vocab_size
    card = Path(result.model, "README.md").read_text()
    assert "7,680 tokens, attention across documents" in card
    assert "CC0-1.0" in card
    assert "model.embed_tokens.weight" in weights(config)
    assert "lm_head.weight" not in weights(config)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in Path(config.out).rglob("*") if file.is_file()}
    assert {"model.safetensors", "random-0.safetensors"} <= modes.keys()
    assert set(modes.values()) == {0o644}, "others may read a run as the umask says: a colleague, or a server"


# Whole rows are shared in the test below, and in that of twenty steps.
@pytest.mark.parametrize("rows", [pytest.param("rows", marks=pytest.mark.soak), "masked", "chat"])
def test_two_sequence_parallel_processes_train_as_one(config, made, tmp_path, rows):
    one = replace(config, data=(DataSource(str(made / rows)),), out=str(tmp_path / "one"))
    two = replace(one, out=str(tmp_path / "two"), parallel=ParallelConfig(context_parallel_size=2))
    train(one, quiet=True)
    train_over(two, 2)
    assert curve(two, "targets") == curve(one, "targets")
    assert curve(two) == pytest.approx(curve(one), rel=2e-5)
    assert curve(two, "grad_norm") == pytest.approx(curve(one, "grad_norm"), rel=1e-4)
    for ours, theirs in zip(curve(two, "loss_by_position"), curve(one, "loss_by_position"), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)


def test_several_processes_say_what_they_did_as_one_does(config, tmp_path, capsys):
    """As a user starts it: torchrun, from a file. The ranks' words go nowhere; the command's are the run's result."""
    one = replace(config, out=str(tmp_path / "one"))
    train(one, quiet=True)
    config = replace(config, parallel=ParallelConfig(context_parallel_size=2))
    settings.save(config, tmp_path / "run.yaml")
    words = ["train", f"{tmp_path}/run.yaml", "--processes", "2", "--quiet", "--json", f"{tmp_path}/numbers.json"]
    with forked_agents():
        main(words)
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert (numbers["steps"], numbers["tokens"], numbers["model"]) == (6, 6 * 2 * 128, f"{config.out}/model")
    window = json.loads(Path(config.out, "model", "config.json").read_text())["max_position_embeddings"]
    assert capsys.readouterr().out == (
        f"{config.out}/model: 6 steps, 1,536 tokens, loss {numbers['loss']:.4f}. "
        f"Next: ultralong eval needle {config.out}/model --lengths {window // 4} {window}\n"
    )
    assert curve(config) == pytest.approx(curve(one), rel=2e-5)


@pytest.mark.soak
def test_several_processes_that_fail_have_said_why(config, tmp_path, monkeypatch):
    """And their agent's folder for that is gone; torch's own cache has a fixed name and stays."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    train(config, quiet=True)
    settings.save(config, tmp_path / "run.yaml")
    with pytest.raises(RuntimeError, match="exit code 1; its own message is above"):
        api.train(tmp_path / "run.yaml", processes=2, quiet=True)
    assert [path for path in (tmp_path / "temporary").iterdir() if not path.name.startswith("torchinductor")] == []


def test_micro_batches_do_not_change_a_step(config, tmp_path):
    whole, parts = (
        replace(config, global_batch_size=4, micro_batch_size=size, out=str(tmp_path / str(size))) for size in (4, 1)
    )
    train(whole, quiet=True)
    train(parts, quiet=True)
    assert curve(parts) == pytest.approx(curve(whole), rel=1e-5)
    assert curve(parts, "grad_norm") == pytest.approx(curve(whole, "grad_norm"), rel=1e-4)


def test_a_cut_run_resumes_to_the_bit(config, tmp_path, monkeypatch):
    train(config, quiet=True)
    cut = replace(config, out=str(tmp_path / "cut"))
    real = loop.append_jsonl

    def die_after_five(path, record):
        real(path, record)
        if record["step"] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "append_jsonl", die_after_five)
    with pytest.raises(KeyboardInterrupt):
        train(cut, quiet=True)
    monkeypatch.setattr(loop, "append_jsonl", real)
    assert len(curve(cut)) == 5
    train(cut, resume=True, quiet=True)
    assert curve(cut) == curve(config)  # steps 4 and 5 were logged once, the same numbers
    for name, tensor in weights(config).items():
        assert torch.equal(tensor, weights(cut)[name]), name


def test_a_crash_while_saving_leaves_the_checkpoint_before(config, tmp_path, monkeypatch):
    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    train(replace(config, steps=6), quiet=True)
    cut = replace(config, out=str(tmp_path / "cut"))
    real, calls = checkpoint.save_file, []

    def second_time(*arguments, **options):
        calls.append(1)
        return disk_full() if len(calls) == 2 else real(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_file", second_time)
    with pytest.raises(OSError, match="No space left"):
        train(cut, quiet=True)
    monkeypatch.setattr(checkpoint, "save_file", real)
    assert [step for step, _ in checkpoint.RunFolder(tmp_path / "cut").checkpoints()] == [3]
    train(cut, resume=True, quiet=True)
    assert curve(cut) == curve(config)


def truncate(checkpoint):
    victim = next(checkpoint.glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:1000])


def overwrite(pattern, start=0):
    def damage(checkpoint):
        victim = next(checkpoint.glob(pattern))
        content = victim.read_bytes()
        victim.write_bytes(content[:start] + b"\x00" * (len(content) - start))

    return damage


def remove(pattern):
    return lambda checkpoint: next(checkpoint.glob(pattern)).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        overwrite("*.distcp"),
        remove("*.distcp"),
        overwrite(".metadata"),
        remove(".metadata"),
        overwrite("random-0.safetensors"),
        remove("random-0.safetensors"),
        overwrite("state.json"),
        remove("state.json"),
    ],
)
def test_a_damaged_checkpoint_is_named(config, damage):
    train(replace(config, steps=2, save_every=1), quiet=True)
    newest = checkpoint.RunFolder(Path(config.out)).checkpoints()[-1][1]
    damage(newest)
    shutil.rmtree(f"{config.out}/model")
    with pytest.raises(ValueError, match=r"step-0000002 is damaged: .*Remove that folder.*the checkpoint before it"):
        train(replace(config, steps=2, save_every=1), resume=True, quiet=True)
    shutil.rmtree(newest)
    train(replace(config, steps=2, save_every=1), resume=True, quiet=True)
    assert len(curve(config)) == 2


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("the host is full"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        ConnectionError("Connection reset by peer"),
        torch.distributed.DistBackendError("NCCL communicator was aborted"),
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:525] Connection closed by peer"),
        OSError(5, "Input/output error"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("place", ["read_data", "set_state_dict"])
def test_what_is_no_damage_is_raised_as_it_is(config, monkeypatch, error, place):
    """Whether torch wraps it (inside of its loader) or not: the error and its traceback, and no advice to remove."""
    train(replace(config, steps=1), quiet=True)
    shutil.rmtree(f"{config.out}/model")  # the run is not finished then, and its checkpoint is read

    def failing(*_, **__):
        raise error

    owner = torch.distributed.checkpoint.FileSystemReader if place == "read_data" else checkpoint.of_torch
    monkeypatch.setattr(owner, place, failing)
    with pytest.raises(type(error)) as caught:
        train(replace(config, steps=1), resume=True, quiet=True)
    assert caught.value is error
    assert failing.__name__ in [entry.name for entry in caught.traceback], "it says where it came from"
    assert checkpoint.RunFolder(Path(config.out)).checkpoints(), "nothing was removed"


def test_a_folder_in_use_is_refused(config, tmp_path):
    train(config, quiet=True)
    with pytest.raises(ValueError, match="holds a run already"):
        train(config, quiet=True)
    with pytest.raises(ValueError, match=r"other settings.*seed: 0 -> 1"):
        train(replace(config, seed=1), resume=True, quiet=True)
    lr = config.optimizer.lr
    with pytest.raises(ValueError, match=rf"resumed: optimizer\.lr: {lr} -> 0\.5\. Restore"):
        train(replace(config, optimizer=replace(config.optimizer, lr=0.5)), resume=True, quiet=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        train(replace(config, out=str(tmp_path / "full")), quiet=True)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"


def test_a_loss_that_is_no_number_stops_before_the_update(config, made, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(made / "model", broken)
    model = AutoModelForCausalLM.from_pretrained(broken)
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(broken)
    with pytest.raises(FloatingPointError, match=r"Step 1: the loss is nan.*No update.*rows row \d+ \(documents"):
        train(replace(config, model=str(broken)), quiet=True)


def test_a_jump_of_the_loss_stops_before_the_update(config, monkeypatch):
    """Ten quiet steps, then rows whose labels are a token that never occurs: stopped, and where to go on."""
    quiet = replace(config, steps=14, save_every=5, optimizer=OptimizerConfig(lr=3e-3))
    real = RowOrder.batch

    def batch(self, first, count):
        made = real(self, first, count)
        return replace(made, labels=torch.full_like(made.labels, 2)) if first >= 20 else made

    train(quiet, quiet=True)
    assert curve(quiet) == sorted(curve(quiet), reverse=True), "nothing jumps by itself"
    monkeypatch.setattr(RowOrder, "batch", batch)
    said = r"Step 11: the loss is .* above the mean of the 10 steps before.*step-0000010"
    with pytest.raises(FloatingPointError, match=said):
        train(replace(quiet, out=quiet.out + "-jump", loss_spike_threshold=0.05), quiet=True)
    train(replace(quiet, out=quiet.out + "-off", loss_spike_threshold=0), quiet=True)


def test_the_log_says_what_a_step_was_worth(config, made):
    train(replace(config, data=(DataSource(str(made / "masked")),)), quiet=True)
    record = read_jsonl(f"{config.out}/log.jsonl")[-1]
    assert record["tokens_per_second_per_gpu"] == record["tokens_per_second"] > 0
    assert "mfu_causal" not in record, "a CPU has no datasheet here"


def test_useful_work_is_causal_and_by_document():
    assert query_key_pairs(8, None) == 32
    assert query_key_pairs(8, (0, 2, 8)) == (4 + 36) / 2
    # Llama-3.1-8B at a million tokens: 32 layers of 2 T^2 H D forward, twice that backward, and six a parameter.
    flops = step_flops(7_504_924_672, 32, 4096, 2**20, query_key_pairs(2**20, None))
    assert flops == pytest.approx(32 * 6 * 2**40 * 4096 + 6 * 7_504_924_672 * 2**20)
    assert flops == pytest.approx(9.12e17, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "no-such-model"}, "No model could be loaded"),
        ({"parallel": ParallelConfig(context_parallel_size=2)}, "this run has 1 process. Start a multiple of 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, change, said):
    with pytest.raises(ValueError, match=said):
        train(replace(config, **change), quiet=True)


def test_rows_longer_than_the_window_and_foreign_vocabularies_are_refused(config, made, tmp_path, make_tiny_model):
    for name, overrides, said in (
        ("short", {"vocab_size": 400, "max_position_embeddings": 64}, "the model's window is 64. Extend the model"),
        ("small", {"vocab_size": 100, "max_position_embeddings": 128}, "the model has 100"),
    ):
        make_tiny_model(**overrides).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=said):
            train(replace(config, model=str(tmp_path / name), out=str(tmp_path / f"run-{name}")), quiet=True)


def test_every_row_of_a_pass_comes_once_and_weights_are_kept(made):
    order = RowOrder((DataSource(str(made / "rows")),), seed=3, total=1000)
    size = len(order.folders[0])
    assert sorted(order.place(index).row for index in range(size)) == list(range(size))
    passes = [[order.place(index).row for index in range(n * size, (n + 1) * size)] for n in (0, 1)]
    assert passes[0] != passes[1]
    assert sorted(passes[1]) == list(range(size))
    mixed = RowOrder((DataSource(str(made / "masked"), 3.0), DataSource(str(made / "chat"), 1.0)), seed=0, total=4000)
    share = sum(mixed.place(index).source == 0 for index in range(4000)) / 4000
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5


def test_skipped_rows_are_those_that_a_run_before_has_read(made):
    """With one source and with several, and beyond a pass."""
    rows, masked, chat = (DataSource(str(made / name), 2.0) for name in ("rows", "masked", "chat"))
    for sources in ((rows,), (masked, chat)):
        whole = RowOrder(sources, seed=3, total=60)
        rest = RowOrder(sources, seed=3, total=40, skipped=20)
        assert [rest.place(index) for index in range(40)] == [whole.place(index) for index in range(20, 60)]
        assert rest.batch(0, 2).places == whole.batch(20, 2).places
    assert len({whole.place(index).source for index in range(60)}) == 2


def test_mixing_masked_and_unmasked_rows_is_refused(made):
    with pytest.raises(ValueError, match="must share row length and document mask"):
        RowOrder((DataSource(str(made / "rows")), DataSource(str(made / "chat"))), seed=0, total=10)


def test_only_answers_are_learned(made, tiny_tokenizer):
    order = RowOrder((DataSource(str(made / "chat")),), seed=0, total=10)
    batch = order.batch(0, 1)
    learned = tiny_tokenizer.decode(batch.labels[batch.labels != -100])
    asked = tiny_tokenizer.decode(batch.input_ids[0])
    assert "<|turn|>" in learned
    assert "user" in asked
    assert "user" not in learned
    assert "<|start|>" not in learned


def test_every_setting_of_a_run_is_in_its_folder(config):
    train(config, quiet=True)
    assert settings.load(TrainConfig, f"{config.out}/config.yaml") == config
    assert read_json(f"{config.out}/result.json")["steps"] == 6

"""Engines answer the same prompts alike; vLLM is called as its interface says, here played by the plain model."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ultralong.evaluation.runs.run import RunSettings, run
from ultralong.evaluation.tasks.samples import make_samples, prompt_ids
from ultralong.inference import engines
from ultralong.inference.decoding import Sampling
from ultralong.inference.engines import LocalEngine
from ultralong.inference.generate import generate
from ultralong.inference.local_runner import LocalRunner
from ultralong.inference.sharded_engine import ShardedEngine
from ultralong.inference.sharded_generation import ShardedRunner
from ultralong.inference.stop_tokens import end_tokens
from ultralong.inference.vllm_engine import VllmEngine
from ultralong.utils.files import read_jsonl


@pytest.fixture
def checkpoint(tmp_path, make_tiny_model, tiny_tokenizer):
    model = make_tiny_model(max_position_embeddings=2048, vocab_size=len(tiny_tokenizer))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


@pytest.fixture
def vllm(checkpoint, monkeypatch):
    """A module with the part of vLLM's interface (0.33) that is used, over the plain model."""
    calls = []

    class LLM:
        def __init__(
            self,
            model,
            *,
            max_model_len,
            tensor_parallel_size,
            seed,
            kv_cache_dtype,
            max_num_seqs,
            enable_prefix_caching,
            max_num_batched_tokens=None,
        ):
            calls.append(
                {
                    "model": model,
                    "length": max_model_len,
                    "gpus": tensor_parallel_size,
                    "kv": kv_cache_dtype,
                    "chunk": max_num_batched_tokens,
                }
            )

        def generate(self, prompts, sampling, *, use_tqdm):
            (prompt,) = prompts
            ids = torch.tensor([prompt["prompt_token_ids"]])
            stop = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else end_tokens(checkpoint[1]))}
            (said,) = generate(LocalRunner(checkpoint[1]), ids, sampling.max_tokens, stop=stop)
            assert sampling.temperature == 0
            ending = [min(stop)] if said.finish_reason == "stop" else []  # vLLM gives it as the last token
            output = SimpleNamespace(token_ids=[*said.tokens, *ending], finish_reason=said.finish_reason)
            return [SimpleNamespace(outputs=[output], num_cached_tokens=None)]

    module = SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: SimpleNamespace(**options))
    monkeypatch.setitem(sys.modules, "vllm", module)
    return calls


def test_both_engines_fill_the_same_records(checkpoint, vllm, tmp_path):
    tests = ("infinitebench_passkey", "infinitebench_kv_retrieval")
    wanted = RunSettings(str(checkpoint[0]), tests, (1024,), samples=2)
    run(wanted, tmp_path / "own", device="cpu", draw=False, quiet=True)
    run(replace(wanted, engine="vllm", gpus=2, kv_dtype="fp8", chunk=512), tmp_path / "vllm", draw=False, quiet=True)
    assert vllm == [{"model": str(checkpoint[0]), "length": 1024, "gpus": 2, "kv": "fp8", "chunk": 512}]
    for name in ("infinitebench_passkey-1024.jsonl", "infinitebench_kv_retrieval-1024.jsonl"):
        own, other = (read_jsonl(tmp_path / folder / name) for folder in ("own", "vllm"))
        assert [record["prediction"] for record in own] == [record["prediction"] for record in other]
        assert {record["engine"] for record in own} == {"transformers"}
        assert {record["engine"] for record in other} == {"vllm"}
        assert own[0].keys() == other[0].keys()
    with pytest.raises(ValueError, match="holds a run with engine transformers"):
        run(replace(wanted, engine="vllm"), tmp_path / "own", quiet=True)


def test_vllm_does_not_measure_what_it_cannot(vllm, tmp_path):
    with pytest.raises(ValueError, match="own forward pass, which vllm does not give"):
        RunSettings("model", ("perplexity", "ruler"), rows="rows", engine="vllm")
    with pytest.raises(ValueError, match="There is no folder"):
        run(RunSettings(str(tmp_path / "missing"), ("ruler_vt",), engine="vllm"), tmp_path / "x", quiet=True)


def test_without_vllm_the_error_says_what_to_do(tiny_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install vllm.*--engine"):
        VllmEngine("model", tiny_tokenizer, 1024)


def test_what_was_read_is_kept_from_prompt_to_prompt_and_when_the_room_grows(make_tiny_model, tiny_tokenizer):
    engine = LocalEngine(make_tiny_model(vocab_size=len(tiny_tokenizer)), tiny_tokenizer)
    ids = list(range(5, 65))
    (first,) = engine.answer([ids], [4], capacity=100)
    assert first.reused == 0
    for capacity in (100, 200, None):
        (again,) = engine.answer([ids], [4], capacity=capacity)
        assert (again.text, again.tokens, again.reused) == (first.text, first.tokens, 59)
    engine.release()
    (anew,) = engine.answer([ids], [4], capacity=200)
    assert anew == first
    with pytest.raises(ValueError, match="do not fit"):
        engine.answer([ids], [4], capacity=63)


def test_an_engine_streams_batches_and_samples(make_tiny_model, tiny_tokenizer):
    engine = LocalEngine(make_tiny_model(vocab_size=len(tiny_tokenizer)), tiny_tokenizer)
    ids = [list(range(5, 65)), list(range(9, 30))]
    together = engine.answer(ids, [6, 3], stop=())
    alone = [engine.answer([prompt], [budget], stop=())[0] for prompt, budget in zip(ids, (6, 3), strict=True)]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert tuple(step.tokens[0] for step in engine.stream(ids[0], 6, stop=())) == alone[0].tokens
    drawn = [engine.answer(ids[:1], [6], sampling=Sampling(2.0, seed=3), stop=())[0].tokens for _ in range(2)]
    assert drawn[0] == drawn[1] != alone[0].tokens
    stop = alone[0].tokens[2]
    (cut,) = engine.answer(ids[:1], [6], stop=(stop,))
    assert cut.finish_reason == "stop"
    assert cut.tokens == alone[0].tokens[: alone[0].tokens.index(stop)]


@pytest.mark.parametrize(("fast", "batch"), [(True, 1), (True, None), (False, 1)])
def test_an_evaluation_on_one_gpu_decodes_single_prompts_by_the_fused_step(
    checkpoint, tiny_tokenizer, tmp_path, monkeypatch, fast, batch
):
    """The choice and its answers, on a CPU where the runner of the fused step is the same without it."""
    monkeypatch.setattr(engines, "is_fast", lambda model: fast)
    made = []

    class Watched(ShardedRunner):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(engines, "ShardedRunner", Watched)
    wanted = RunSettings(str(checkpoint[0]), ("infinitebench_passkey", "niah_single_1"), (1024,), samples=2, chunk=300)
    wanted = replace(wanted, batch=batch)
    run(wanted, tmp_path / "run", device="cpu", draw=False, quiet=True)
    assert len(made) == (fast and batch == 1)
    plain = LocalEngine(checkpoint[1], tiny_tokenizer, 300)
    for name in wanted.tasks:
        for record, sample in zip(
            read_jsonl(tmp_path / "run" / f"{name}-1024.jsonl"),
            make_samples(name, tiny_tokenizer, 1024, 2, 0),
            strict=True,
        ):
            (expected,) = plain.answer([prompt_ids(tiny_tokenizer, sample)], [sample["max_new_tokens"]])
            assert (record["prediction"], record["engine"]) == (expected.text, "transformers")
    fused = LocalEngine(checkpoint[1], tiny_tokenizer, fused=True)
    ids = [list(range(5, 65)), list(range(9, 30))]
    together = fused.answer(ids, [6, 3], stop=())
    assert [answer.tokens for answer in together] == [
        plain.answer([prompt], [budget], stop=())[0].tokens for prompt, budget in zip(ids, (6, 3), strict=True)
    ], "prompts that are answered together are not touched by it"
    (again,) = fused.answer(ids[:1], [6], capacity=100, stop=())
    assert again.tokens == together[0].tokens


@pytest.mark.parametrize("engine", ["local", "sharded", "vllm"])
def test_an_answer_ends_with_the_turn_of_the_chat_template(checkpoint, vllm, tiny_tokenizer, engine):
    folder, model = checkpoint
    ids = list(range(5, 65))
    with torch.no_grad():  # so that it says various tokens
        for weight in model.model.layers.parameters():
            weight.mul_(5)
    (plain,) = LocalEngine(model, tiny_tokenizer).answer([ids], [6], stop=())
    turn = tiny_tokenizer.convert_tokens_to_ids("<|turn|>")
    place = 3
    assert plain.tokens[place] not in plain.tokens[:place]
    assert turn not in plain.tokens
    assert turn not in end_tokens(model)
    # The model now says the end of its turn where it said that token.
    with torch.no_grad():
        model.lm_head.weight[[turn, plain.tokens[place]]] = model.lm_head.weight[[plain.tokens[place], turn]]
    asked = {
        "local": lambda: LocalEngine(model, tiny_tokenizer),
        "sharded": lambda: ShardedEngine(model, tiny_tokenizer, quiet=True),
        "vllm": lambda: VllmEngine(str(folder), tiny_tokenizer, 1024),
    }[engine]()
    (cut,) = asked.answer([ids], [6])
    assert (cut.finish_reason, cut.tokens) == ("stop", plain.tokens[:place])
    (whole,) = asked.answer([ids], [6], stop=())
    assert whole.tokens[: place + 1] == (*plain.tokens[:place], turn)
    assert (whole.finish_reason, len(whole.tokens)) == ("length", 6)
    if engine == "local":
        assert asked.answer([ids, ids[:30]], [6, 2])[0] == cut

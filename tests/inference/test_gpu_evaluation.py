"""On GPUs: prompts read over one or two of them, from 8 bits too, and prompts answered together, on the miniature."""

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from ultralong import miniature
from ultralong.attention import NAME
from ultralong.evaluation.tasks.needle import make_needle
from ultralong.inference.batched import BatchedRunner
from ultralong.inference.continuous import ContinuousBatch
from ultralong.inference.engines import LocalEngine
from ultralong.inference.generate import generate, prefill
from ultralong.inference.sharded_generation import ShardedRunner
from ultralong.utils.local_ranks import run_ranks

HAVE = torch.cuda.device_count()
RANKS = [
    pytest.param(1, marks=[pytest.mark.gpu, pytest.mark.skipif(HAVE < 1, reason="needs a CUDA GPU")]),
    pytest.param(2, marks=[pytest.mark.multigpu, pytest.mark.skipif(HAVE < 2, reason="needs two CUDA GPUs")]),
]


def opened():
    model = AutoModelForCausalLM.from_pretrained(miniature.path(), dtype=torch.bfloat16, attn_implementation=NAME)
    tokenizer = AutoTokenizer.from_pretrained(miniature.path())
    return model.cuda().eval(), [
        make_needle(tokenizer, length, (index + 0.5) / 8, 0, sample=index)
        for index, length in enumerate((512, 500, 431, 512, 256, 300, 512, 477))
    ]


def ids_of(needle):
    return torch.from_numpy(needle.input_ids.astype("int64"))[None].cuda()


def read(rank, world, kv):
    """Needles found, and how far the first prompt's logits are from a plain pass's, in spreads."""
    model, needles = opened()
    reader = ShardedRunner(model, 600, dist.group.WORLD if world > 1 else None, kv=kv, chunk=96, quiet=True)
    logits = reader.prefill(ids_of(needles[0])).float()
    plain = prefill(model, ids_of(needles[0]))[:, -1].float()
    found = [
        generate(reader, ids_of(needle), len(needle.answer_ids), stop=set())[0].tokens == list(needle.answer_ids)
        for needle in needles
    ]
    return sum(found), float((logits - plain).abs().mean() / plain.std())


@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize("world", RANKS)
def test_long_prompts_are_read_as_plain_ones(world, kv):
    for found, apart in run_ranks(read, world, kv, device="cuda"):
        assert found == 8
        assert apart < (0.2 if kv == "fp8" else 0.05)


@pytest.mark.gpu
@pytest.mark.skipif(HAVE < 1, reason="needs a CUDA GPU")
def test_prompts_answered_together_are_found():
    model, needles = opened()
    said = generate(
        BatchedRunner(model, packed=1200),
        [needle.input_ids.tolist() for needle in needles],
        [len(needle.answer_ids) for needle in needles],
        stop=set(),
    )
    assert [answer.tokens for answer in said] == [list(needle.answer_ids) for needle in needles]


@pytest.mark.gpu
@pytest.mark.skipif(HAVE < 1, reason="needs a CUDA GPU")
def test_single_prompts_are_answered_by_the_fused_step_between_those_answered_together():
    model, needles = opened()
    engine = LocalEngine(model, AutoTokenizer.from_pretrained(miniature.path()), 96, fused=True)
    prompts = [needle.input_ids.tolist() for needle in needles]
    budgets = [len(needle.answer_ids) for needle in needles]
    expected = [tuple(needle.answer_ids) for needle in needles]

    def alone():
        answers = [
            engine.answer([ids], [size], capacity=600, stop=()) for ids, size in zip(prompts, budgets, strict=True)
        ]
        return [answer.tokens for (answer,) in answers]

    assert alone() == expected
    assert isinstance(engine._runner, ShardedRunner)
    assert engine._runner.step is not None, "the step agreed with the model's own code"
    assert engine._runner.step.checked
    assert engine.max_batch(600) > len(prompts), "this gives the cache's memory back"
    assert [answer.tokens for answer in engine.answer(prompts, budgets, stop=())] == expected
    assert alone() == expected


@pytest.mark.gpu
@pytest.mark.skipif(HAVE < 1, reason="needs a CUDA GPU")
def test_an_answer_begun_by_the_fused_step_goes_on_in_a_batch_and_comes_back():
    """As the server does where a second short request comes: keys and values are copied there and back."""
    model, needles = opened()
    engine = LocalEngine(model, AutoTokenizer.from_pretrained(miniature.path()), 96, fused=True)
    batch, apart = ContinuousBatch(model, 3, 600), []
    for needle in (needles[0], needles[4], needles[0]):
        ids, answer = needle.input_ids.tolist(), list(needle.answer_ids)
        steps = iter(engine.stream(ids, len(answer), stop=()))
        said = [next(steps).tokens[0] for _ in range(3)]
        steps.close()
        assert engine._runner.step.checked
        batch.adopt(0, engine.store)
        others = dict(zip((1, 2), batch.begin({1: ids, 2: ids[:100]}).argmax(-1).tolist(), strict=True))
        while len(said) < len(answer):
            logits = batch.step({0: said[-1], **others})
            plain = prefill(model, torch.tensor([ids + said], device="cuda"))[0, -1].float()
            apart.append(float((logits[0].float() - plain).abs().mean() / plain.std()))
            said.append(int(logits[0].argmax()))
            others = {row: int(logits[row].argmax()) for row in (1, 2)}
        assert said == answer
        batch.give_back(0, engine.store)
        engine.extend(said[2:-1])
        for row in range(3):
            batch.end(row)
        turn = [*ids, *said, *ids[:5]]
        (found,) = engine.answer([turn], [4], stop=())
        assert engine.reused == len(ids) + len(said) - 1
        (anew,) = LocalEngine(model, engine.tokenizer).answer([turn], [4], stop=())
        assert found.tokens == anew.tokens
    assert max(apart) < 0.05

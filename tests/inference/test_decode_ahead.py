"""Steps that are started before their token is read: the same tokens, the same cache behind them, and nobody waits."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_decode_step import CONFIGS, SHAPE, make
from test_sharded_generation import make_model
from transformers import LlamaConfig

from ultralong.inference.decode_step.step import DecodeStep
from ultralong.inference.decoding import GREEDY, Sampling, Step
from ultralong.inference.generate import stream
from ultralong.inference.local_runner import LocalRunner
from ultralong.inference.sharded_generation import ShardedRunner
from ultralong.utils.local_ranks import run_ranks

BUDGET = 8
DRAWN = Sampling(temperature=1.3, top_p=0.9, seed=5)


def ids_of(length, seed=1):
    return torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(seed))


def runner_of(model, ahead, *, group=None, kv="auto", fused=True):
    runner = ShardedRunner(model, None, group, kv=kv, chunk=8, quiet=True, ahead=ahead)
    if fused:
        runner.prefill(ids_of(9), [BUDGET])  # buffers, which a step takes
        runner.step = DecodeStep(model, runner.cache, runner.group)
        runner.step.checked = True
        runner.release()
    return runner


def answer(runner, ids, *, sampling=GREEDY, stop=(), leave_after=None):
    """The steps of an answer, which is left after some of them; and what it leaves: counts, ids and reused tokens."""
    found, steps = [], stream(runner, ids, BUDGET, sampling=sampling, stop=stop)
    for step in steps:
        found.append(step)
        if len(found) == leave_after:
            steps.close()
    held = runner._held()
    return found, runner.cache.held(), held.tolist(), runner.reused


def every_way_to_end(runner, leader=True):
    """Answers of all lengths: by a stop token, by the budget, and left after each step."""
    found = []
    for sampling in (GREEDY, DRAWN):
        whole = answer(runner, ids_of(30), sampling=sampling)
        found.append(whole)
        for index, step in enumerate(whole[0]):
            found.append(answer(runner, ids_of(30), sampling=sampling, stop={step.tokens[0]}))
            leave_after = index + 1 if leader else None
            found.append(answer(runner, ids_of(31 + index), sampling=sampling, leave_after=leave_after))
    runner.prefill(ids_of(33))  # behind what is kept
    found.append((runner.reused, runner.decode(torch.tensor([3])).numpy()))
    return found


def assert_equal(found, expected):
    assert found[:-1] == expected[:-1]
    assert found[-1][0] == expected[-1][0]
    assert np.array_equal(found[-1][1], expected[-1][1]), "logits, to the bit"


@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize("fused", [True, False])
@torch.inference_mode()
def test_answers_and_what_they_leave_are_those_of_waiting(kv, fused):
    model = make(CONFIGS["llama"])
    waiting, ahead = (every_way_to_end(runner_of(model, way, kv=kv, fused=fused)) for way in (False, True))
    assert_equal(ahead, waiting)
    reasons = {step.ended[0] for steps, *_ in ahead[:-1] for step in steps}
    assert reasons == {None, "stop", "length"}


@torch.inference_mode()
def on_ranks(rank, world, kv, fused):
    model, found = make(CONFIGS["qwen3"]), []
    for ahead in (False, True):
        runner = runner_of(model, ahead, group=dist.group.WORLD, kv=kv, fused=fused)
        found.append(every_way_to_end(runner, leader=rank == 0))
    return found


@pytest.mark.parametrize(("kv", "fused"), [("auto", True), ("fp8", False)])
def test_ranks_leave_an_answer_together_and_hold_the_same_after_it(kv, fused):
    for waiting, ahead in run_ranks(on_ranks, 2, kv, fused):
        assert_equal(ahead, waiting)
        assert max(len(found[0]) for found in ahead[:-1]) == BUDGET
        assert min(len(found[0]) for found in ahead[:-1]) == 1


def test_a_step_is_started_before_its_token_is_handed_out(monkeypatch):
    runner, events = runner_of(make_model("llama"), True, fused=False), []
    plain, back = runner.decode, runner.take_back
    monkeypatch.setattr(runner, "decode", lambda *a: (events.append("started"), plain(*a))[1])
    monkeypatch.setattr(runner, "take_back", lambda: (events.append("taken back"), back())[1])
    for step in stream(runner, ids_of(20), 3, stop=()):
        assert isinstance(step, Step)
        events.append("token")
    assert events == ["started", "token", "started", "token", "token"], "nothing behind the last token"
    runner.ahead = False
    events.clear()
    tokens = [step.tokens[0] for step in stream(runner, ids_of(20), 3, stop=())]
    assert events == ["started", "started"]
    runner.ahead = True
    events.clear()
    assert len(list(stream(runner, ids_of(20), 3, stop={tokens[1]}))) == 2
    assert events == ["started", "started", "taken back"]


def test_only_a_single_prompt_with_fixed_frequencies_is_decoded_ahead(monkeypatch):
    model = make_model("llama")
    runner = runner_of(model, True, fused=False)
    monkeypatch.setattr(runner, "take_back", None)  # called for no batch
    (step,) = stream(runner, torch.cat([ids_of(20), ids_of(20, 2)]), 1, stop=())
    both = list(stream(runner, torch.cat([ids_of(20), ids_of(20, 2)]), 3, stop={step.tokens[0], step.tokens[1]}))
    assert [step.ended for step in both] == [["stop", "stop"]]
    long = LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    assert not ShardedRunner(make(long), ahead=True).ahead
    assert not hasattr(LocalRunner(model), "ahead")

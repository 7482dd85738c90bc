"""Window layers and mixtures with a sharded KV cache: the answers are those of transformers' own generate."""

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES, VOCABULARY, WINDOW, family_model

from ultralong.inference.batched import BatchedRunner
from ultralong.inference.generate import generate
from ultralong.inference.sharded_generation import ShardedRunner
from ultralong.utils.local_ranks import run_ranks

PROMPT, NEW = 4 * WINDOW + 3, 2 * WINDOW
SHARP = 4.0  # factor on weights: sharper attention, where mistakes in it show


def model_of(family, attention="ultralong"):
    model = family_model(family, attention).eval()
    for parameter in model.parameters():
        parameter.data.mul_(SHARP if parameter.ndim > 1 else 1)
    return model


def prompt(seed=0, tokens=PROMPT):
    return torch.randint(2, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def wanted(family, ids):
    """Greedy tokens and logits of the last prompt token, by transformers' eager attention and cache."""
    model = model_of(family, "eager")
    with torch.no_grad():
        logits = model(ids).logits[:, -1]
        made = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    return logits, made[0, ids.shape[1] :].tolist()


def answers(rank, world, families):
    """Per family: logits and tokens of a prompt in chunks, and tokens of one that shares its beginning, for both."""
    found = {}
    for family in families:
        runner = ShardedRunner(model_of(family), None, dist.group.WORLD if world > 1 else None, chunk=11, quiet=True)
        first, second = prompt(), torch.cat([prompt()[:, :20], prompt(1, 9)], 1)
        logits = runner.prefill(first)
        made = [generate(runner, ids, NEW, stop=set())[0].tokens for ids in (first, second)]
        found[family] = logits, made, runner.reused
    return found


@pytest.fixture(scope="module")
def referee():
    second = torch.cat([prompt()[:, :20], prompt(1, 9)], 1)
    return {family: (*wanted(family, prompt()), wanted(family, second)[1]) for family in FAMILIES}


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.soak)])
def test_answers_past_the_window_are_those_of_transformers(world, referee):
    found = answers(0, 1, FAMILIES) if world == 1 else run_ranks(answers, world, tuple(FAMILIES))[0]
    for family, (logits, first, second) in referee.items():
        mine, made, reused = found[family]
        assert (mine - logits).abs().max() <= 1e-5 * logits.abs().max(), family
        assert made == [first, second], family
        assert reused == 20, "what the prompts share stays in the cache"
    assert len({tuple(first) for _, first, _ in referee.values()}) > len(FAMILIES) // 2, "the families differ"


def test_a_batch_of_prompts_is_refused_for_windows():
    with pytest.raises(ValueError, match=f"MistralForCausalLM has a sliding window of {WINDOW}.*--batch"):
        BatchedRunner(family_model("Mistral"))

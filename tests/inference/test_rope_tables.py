"""RoPE that follows the length of a text: every way of reading gives what one pass over the whole text gives.

The reference has no cache: each token comes from a pass of a new model over all tokens before it. Phi-3's `generate`,
which reads anew where its frequencies change, is a second one where transformers does so rightly.
"""

import copy
import inspect
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Phi3ForCausalLM, PhimoeConfig, Qwen2Config

from ultralong.attention import make_attention_context
from ultralong.evaluation.measures.perplexity import token_losses
from ultralong.inference.batched import BatchedRunner, batch_that_fits
from ultralong.inference.generate import generate, prefill
from ultralong.inference.local_runner import LocalRunner
from ultralong.inference.sharded_generation import ShardedRunner
from ultralong.rope.tables import RopeTables, text_lengths
from ultralong.training.loss import LanguageModelLoss
from ultralong.utils.local_ranks import run_ranks

WINDOW = 64
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": WINDOW,
    "short_factor": [1.0] * 8,
    "long_factor": [1 + 0.9 * pair for pair in range(8)],
    "factor": 8.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}
MSCALES = {"short_mscale": 1.2, "long_mscale": 1.6}
CONFIGS = {
    "phi3, longrope": (Phi3Config, {"original_max_position_embeddings": WINDOW, "rope_parameters": LONG}),
    "llama, longrope": (LlamaConfig, {"rope_parameters": LONG}),
    "phimoe, longrope with two scales": (
        PhimoeConfig,
        {"rope_parameters": LONG | MSCALES, "num_local_experts": 2, "sliding_window": None},
    ),
    "llama, dynamic": (LlamaConfig, {"rope_parameters": DYNAMIC, "max_position_embeddings": WINDOW}),
    "qwen2, dynamic": (Qwen2Config, {"rope_parameters": DYNAMIC, "max_position_embeddings": WINDOW}),
}
FEW = ["phi3, longrope", "llama, dynamic"]
every = pytest.mark.parametrize("kind", CONFIGS)


def build(kind):
    """A new model, whose frequencies are those that it begins with: a copy, which takes a third of the time."""
    return copy.deepcopy(_made(kind))


@cache
def _made(kind):
    torch.manual_seed(0)
    made, options = CONFIGS[kind]
    config = made(**(SIZES | options))
    dtype = torch.float32 if made is PhimoeConfig else torch.float64  # its experts' products are not for float64
    model = AutoModelForCausalLM.from_config(config, attn_implementation="ultralong", dtype=dtype).eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model


def ids(tokens, seed=0, rows=1):
    return torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@cache
def reference(kind, tokens, new, seed=0):
    """(new tokens, logits of the last of the prompt) of a prompt of `ids`, without a cache."""
    now, first = ids(tokens, seed), None
    for _ in range(new):
        with torch.no_grad():
            logits = build(kind)(input_ids=now, use_cache=False).logits[:, -1]
        first = logits if first is None else first
        now = torch.cat([now, logits.argmax(-1)[:, None]], 1)
    return now[0, tokens:].tolist(), first


def said(runner, prompts, new):
    return [answer.tokens for answer in generate(runner, prompts, new, stop=())]


def runners(model, capacity=None):
    return {
        "local": LocalRunner(model, capacity, chunk=16),
        "at once": LocalRunner(model, capacity),
        "sharded": ShardedRunner(model, capacity, chunk=16, quiet=True),
    }


@every
def test_the_frequencies_differ_where_these_tests_need_it(kind):
    model = build(kind)
    rope = RopeTables(model)
    assert rope.same(1, WINDOW)
    assert not rope.same(WINDOW, WINDOW + 1)
    assert rope.same(WINDOW + 1, 200) == ("longrope" in kind)
    whole = reference(kind, 200, 1)[1]
    with torch.no_grad(), rope.at(WINDOW // 2):
        forced = model(input_ids=ids(200)[:, :WINDOW], use_cache=False).logits
        assert_close(forced, build(kind)(input_ids=ids(200)[:, :WINDOW], use_cache=False).logits)
    with torch.no_grad(), rope.at(200):
        other = model(input_ids=ids(200)[:, :WINDOW], use_cache=False).logits
    assert (other - forced).abs().max() > 0.1
    with torch.no_grad():  # no hook is left behind, nor a longer text's frequencies
        assert_close(model(input_ids=ids(200), use_cache=False).logits[:, -1], whole)


@every
def test_a_prompt_read_in_chunks(kind):
    whole = reference(kind, 200, 1)[1]
    assert_close(prefill(build(kind), ids(200), chunk=50)[:, -1], whole)
    for runner in runners(build(kind)).values():
        assert_close(runner.prefill(ids(200)), whole)


@every
@pytest.mark.parametrize("way", ["local", "at once", "sharded"])
def test_an_answer_across_the_change_and_prompts_after_it(kind, way):
    runner = runners(build(kind), 260)[way]
    # Across the change, beyond it, and within the window again with the same beginning.
    wanted = {tokens: beginning(kind, tokens, new) for tokens, new in ((60, 10), (120, 3), (66, 3))}
    for tokens, new in ((60, 10), (120, 3), (60, 4), (60, 8), (66, 3)):
        assert said(runner, ids(200)[:, :tokens], new) == [wanted[tokens][:new]]


@cache
def beginning(kind, tokens, new):
    now = ids(200)[:, :tokens]
    for _ in range(new):
        with torch.no_grad():
            logits = build(kind)(input_ids=now, use_cache=False).logits[:, -1]
        now = torch.cat([now, logits.argmax(-1)[:, None]], 1)
    return now[0, tokens:].tolist()


def test_phi3_says_what_transformers_says():
    prompt, expected = ids(60), reference("phi3, longrope", 60, 12)[0]
    for runner in runners(build("phi3, longrope")).values():
        assert said(runner, prompt, 12) == [expected]
    # Where an answer crosses the old window `generate` reads the prompt again; 5.17 and 5.18 then gave the model the
    # last token alone, and other answers than the model without a cache gives.
    if "next_sequence_length" in inspect.getsource(Phi3ForCausalLM.prepare_inputs_for_generation):
        model = build("phi3, longrope")
        assert model.generate(prompt, max_new_tokens=12, do_sample=False)[0, 60:].tolist() == expected


@every
def test_batches_on_one_side_and_on_both(kind):
    model = build(kind)
    for sizes, together in (((20, 33), True), ((70, 90), "longrope" in kind), ((40, 62, 120), False)):
        prompts = [ids(size, size)[0].tolist() for size in sizes]
        runner = BatchedRunner(model)
        found = said(runner, prompts, [5, 4, 6][: len(sizes)])
        assert bool(runner._alone) != together
        for size, answer in zip(sizes, found, strict=True):
            assert answer == reference(kind, size, 6, size)[0][: len(answer)]
    assert batch_that_fits(model, 100, None) == 1


@every
def test_perplexity_of_a_long_text(kind):
    labels = torch.roll(ids(150), -1, 1)
    with torch.no_grad():
        logits = build(kind)(input_ids=ids(150), use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[0].float(), labels[0], reduction="none")
    model = build(kind)
    for chunk in (None, 40):
        found = token_losses(model, ids(150), labels, chunk=chunk)[0]
        assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


def read_sharded(rank, world, kind):
    runner = ShardedRunner(build(kind), 100, dist.group.WORLD, chunk=24, quiet=True)
    answers = [said(runner, ids(60), 8), said(runner, ids(80, 80), 3), said(runner, ids(60)[:, :50], 2)]
    return runner.prefill(ids(90, 90)).tolist(), answers


def losses(kind, tokens, boundaries, group):
    """(loss, gradient of the embeddings) of one row, shared over a group as the trainer does."""
    model = build(kind)
    context = make_attention_context(tokens, group, boundaries=boundaries, heads=4, kv_heads=2)
    edges = boundaries or (0, tokens)
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(edges)])[None]
    row = {
        "input_ids": ids(tokens),
        "labels": torch.roll(ids(tokens), -1, 1),
        "position_ids": positions,
        "text_lengths": text_lengths(positions),
    }
    row = {name: context.shard(x, dim=1, pad=-100 if name == "labels" else 1) for name, x in row.items()}
    total, _ = LanguageModelLoss(model, 64)(**row, attention_context=context)
    total.backward()
    return total.item(), model.get_input_embeddings().weight.grad.tolist()


def sum_of_shared(rank, world, kind, tokens, boundaries):
    shares = [torch.tensor(x, dtype=torch.float64) for x in losses(kind, tokens, boundaries, dist.group.WORLD)]
    for share in shares:
        dist.all_reduce(share)
    return [share.tolist() for share in shares]


def all_shared(rank, world, kind):
    """One start of the processes for all that they are asked: each start takes seconds."""
    rows = [sum_of_shared(rank, world, kind, tokens, edges) for tokens, edges in ROWS]
    return read_sharded(rank, world, kind), rows


ROWS = [(72, None), (128, None), (128, (0, 100, 128)), (140, (0, 30, 70, 140))]


@pytest.mark.parametrize("kind", FEW)
def test_several_processes(kind):
    found = run_ranks(all_shared, 2, kind)
    for (logits, answers), rows in found:
        assert_close(torch.tensor(logits).double(), reference(kind, 90, 1, 90)[1], rtol=1e-5, atol=1e-5)
        expected = [reference(kind, 60, 8)[0], reference(kind, 80, 3, 80)[0]]
        assert [answer[0] for answer in answers[:2]] == expected
        with torch.no_grad():
            first = build(kind)(input_ids=ids(60)[:, :50], use_cache=False).logits[:, -1].argmax(-1)
        assert answers[2][0][0] == int(first)
        for (tokens, edges), shared in zip(ROWS, rows, strict=True):
            for one, two in zip(losses(kind, tokens, edges, None), shared, strict=True):
                assert_close(torch.tensor(two), torch.tensor(one), rtol=1e-5, atol=1e-5)


@every
def test_packed_documents_are_read_as_each_alone(kind):
    edges = (0, 30, 105, 140)
    total, _ = losses(kind, 140, edges, None)
    labels, expected = torch.roll(ids(140), -1, 1), 0.0
    for start, stop in pairwise(edges):
        with torch.no_grad():
            logits = build(kind)(input_ids=ids(140)[:, start:stop], use_cache=False).logits[0]
        expected += torch.nn.functional.cross_entropy(logits, labels[0, start:stop], reduction="sum")
    assert total == pytest.approx(float(expected), rel=1e-5)


def test_lengths_of_texts_are_read_from_positions():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]])
    assert text_lengths(positions).tolist() == [[3, 3, 3, 1, 2, 2], [6] * 6]


@pytest.mark.parametrize("rope", ["default", "linear", "yarn"])
def test_other_models_have_no_table_to_watch(rope):
    entry = {"rope_type": rope, "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": WINDOW}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, rope_parameters=entry))
    assert RopeTables(model).same(1, 10**6)
    with RopeTables(model).at(10**6):
        assert not model.model.rotary_emb._forward_hooks

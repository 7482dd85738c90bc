"""A prompt that begins as the last one did is read from where they part, with the same outcome."""

import pytest
import torch
from test_generate import plain_tokens, prompts, tokens
from transformers import MistralConfig, MistralForCausalLM

from ultralong.evaluation.runs.records import answer_tasks
from ultralong.inference.local_runner import LocalRunner
from ultralong.inference.sharded_generation import ShardedRunner
from ultralong.utils.files import read_jsonl


def read_tokens(model):
    """Counts the tokens that pass through the model."""
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    return seen


@pytest.mark.parametrize("chunk", [None, 7])
def test_answers_are_those_without_sharing(make_tiny_model, chunk):
    model = make_tiny_model(3).double()
    whole = prompts(1, 90, 1)
    seen = read_tokens(model)
    runner = LocalRunner(model, 120, chunk=chunk)
    for parted, length in ((60, 90), (20, 90), (88, 80), (0, 70), (69, 70), (50, 100)):
        prompt = torch.cat([whole[:, :parted], prompts(1, 120, parted + 7)], dim=1)[:, :length]
        expected = plain_tokens(model, prompt, 10, chunk=chunk, stop=set())
        seen.clear()
        assert tokens(runner, prompt, 10, stop=set()) == expected
        assert sum(seen) == length - runner.reused + 9
        whole = prompt if parted else whole


def test_only_what_is_the_same_is_kept(make_tiny_model):
    model, ids = make_tiny_model(1).double(), prompts(1, 50)
    runner = LocalRunner(model)

    def ask(prompt):
        said = tokens(runner, prompt, 4, stop=set())
        assert said == plain_tokens(model, prompt, 4, stop=set())
        return said, runner.reused

    said, reused = ask(ids)
    assert reused == 0
    assert ask(ids)[1] == 49, "the last token is read again: its logits are wanted"
    other = ids.clone()
    other[0, 30] += 1
    assert ask(other)[1] == 30
    assert ask(ids[:, :20])[1] == 19
    assert ask(ids)[1] == 20, "what the shorter prompt did not hold is gone"
    buffer = runner._cache.store.layers[0][0].values.data_ptr()
    assert ask(ids)[1] == 49
    assert runner._cache.store.layers[0][0].values.data_ptr() == buffer, "the memory stays"
    dialogue = torch.cat([ids, torch.tensor(said), prompts(1, 30, 4)], 1)
    assert ask(dialogue)[1] == 53, "an answer that the next prompt holds is kept too; its last token was never read"
    assert runner._cache.store.capacity == 88, "and the cache has grown"
    assert ask(prompts(2, 20))[1] == 0, "another number of prompts begins anew"


@pytest.mark.parametrize("kind", [LocalRunner, ShardedRunner])
def test_a_chats_cache_grows_in_steps_up_to_what_was_promised(make_tiny_model, kind):
    model, ids = make_tiny_model(1).double(), prompts(1, 400)
    runner, most, made = kind(model, quiet=True), 384, []
    runner.most = most
    for turn in range(40, 381, 10):  # 35 turns
        runner.prefill(ids[:, :turn], [4])
        assert turn == 40 or runner.reused == turn - 10
        assert turn + 4 <= runner.store.capacity <= most, "no more memory than it may take"
        made.append(runner.store.generation)
    assert len(set(made)) <= 11, "44 tokens by a quarter ten times are more than 384"
    assert runner.store.capacity == most
    runner.prefill(prompts(1, 390, 3), [4])
    assert runner.store.capacity == 394, "what needs more gets it, no token too much"


def test_a_stopped_prefill_is_not_taken_for_a_whole_one(make_tiny_model, monkeypatch):
    model, ids = make_tiny_model(2).double(), prompts(1, 60)
    expected = plain_tokens(model, ids, 5, stop=set())
    runner = LocalRunner(model, 80, chunk=10)
    tokens(runner, prompts(1, 40, 5), 5, stop=set())
    calls = []
    forward = model.forward

    def stop_midway(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", stop_midway)
    with pytest.raises(KeyboardInterrupt):
        tokens(runner, ids, 5, stop=set())
    monkeypatch.setattr(model, "forward", forward)
    assert tokens(runner, ids, 5, stop=set()) == expected
    assert runner.reused == 20, "the chunks that were read whole are kept"


def test_models_with_special_layers_start_anew():
    config = MistralConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
    )
    model, ids = MistralForCausalLM(config).eval(), prompts(1, 30)
    runner = LocalRunner(model)
    expected = plain_tokens(model, ids, 5, stop=set())
    for _ in range(2):
        assert tokens(runner, ids, 5, stop=set()) == expected
        assert runner.reused == 0


@pytest.mark.parametrize(
    ("rope", "kept"),
    [
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, [39, 40, 80]),
        ({"rope_type": "dynamic", "factor": 2.0}, [39, 0, 0]),
        (
            {
                "rope_type": "longrope",
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "short_factor": [1.0] * 8,
                "long_factor": [1.5] * 8,
            },
            [39, 0, 80],
        ),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_keys_are_kept_only_where_the_frequencies_are_the_same(make_tiny_model, rope, kept, sharded):
    window = 128 if "original_max_position_embeddings" in rope else 64
    model = make_tiny_model(
        rope_parameters={"rope_theta": 10000.0, **rope}, max_position_embeddings=window, attn_implementation="ultralong"
    ).double()
    runner, ids = (ShardedRunner(model, quiet=True) if sharded else LocalRunner(model)), prompts(1, 120)
    found = []
    for length in (40, 40, 80, 100):
        expected = plain_tokens(model, ids[:, :length], 1, stop=set())
        assert tokens(runner, ids[:, :length], 1, stop=set()) == expected
        found.append(runner.reused)
    assert found[1:] == kept


def test_tests_over_one_text_share_it(make_tiny_model, tiny_tokenizer, tmp_path):
    model = make_tiny_model(max_position_embeddings=2048, vocab_size=len(tiny_tokenizer))
    answer_tasks(model, tiny_tokenizer, ["infinitebench_passkey"], [1024], 4, 0, tmp_path, quiet=True)
    records = read_jsonl(tmp_path / "infinitebench_passkey-1024.jsonl")
    starts = [record["positions"][0] for record in records]
    assert records[0]["reused"] == 0
    for before, record, start in zip(records, records[1:], starts, strict=False):
        assert record["reused"] >= min(start, record["positions"][0]) - 2, before

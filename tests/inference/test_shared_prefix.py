"""A prompt that begins as the last one did is read from where they part, with the same outcome."""

import pytest
import torch
from test_generate import prompts
from transformers import MistralConfig, MistralForCausalLM

from ultralong.evaluation.runs.records import answer_tasks
from ultralong.inference.generate import generate_greedy
from ultralong.inference.shared_prefix import SharedPrefix
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
    shared = SharedPrefix(model, 120)
    for parted, length in ((60, 90), (20, 90), (88, 80), (0, 70), (69, 70), (50, 100)):
        prompt = torch.cat([whole[:, :parted], prompts(1, 120, parted + 7)], dim=1)[:, :length]
        expected = generate_greedy(model, prompt, 10, chunk=chunk, stop=set())
        seen.clear()
        assert generate_greedy(model, prompt, 10, chunk=chunk, stop=set(), shared=shared) == expected
        assert sum(seen) == length - shared.reused + 9
        whole = prompt if parted else whole


def test_only_what_is_the_same_is_kept(make_tiny_model):
    model, shared = make_tiny_model(1), None
    ids = prompts(1, 50)
    shared = SharedPrefix(model, 64)
    generate_greedy(model, ids, 4, stop=set(), shared=shared)
    assert shared.reused == 0
    generate_greedy(model, ids, 4, stop=set(), shared=shared)
    assert shared.reused == 49, "the last token is read again: its logits are wanted"
    other = ids.clone()
    other[0, 30] += 1
    generate_greedy(model, other, 4, stop=set(), shared=shared)
    assert shared.reused == 30
    generate_greedy(model, ids[:, :20], 4, stop=set(), shared=shared)
    assert shared.reused == 19
    generate_greedy(model, ids, 4, stop=set(), shared=shared)
    assert shared.reused == 20, "what the shorter prompt did not hold is gone"
    buffer = shared._cache.layers[0].key_buffer.data_ptr()
    generate_greedy(model, prompts(1, 60), 4, stop=set(), shared=shared)
    assert shared._cache.layers[0].key_buffer.data_ptr() == buffer, "the memory stays"
    generate_greedy(model, prompts(1, 80), 4, stop=set(), shared=shared)
    assert shared.reused == 0, "a longer prompt than there is room for starts anew"
    with pytest.raises(ValueError, match="one at a time: got 2"):
        generate_greedy(model, prompts(2, 20), 4, shared=shared)


def test_a_stopped_prefill_is_not_taken_for_a_whole_one(make_tiny_model, monkeypatch):
    model, ids = make_tiny_model(2).double(), prompts(1, 60)
    expected = generate_greedy(model, ids, 5, stop=set())
    shared = SharedPrefix(model, 80)
    generate_greedy(model, prompts(1, 40, 5), 5, stop=set(), shared=shared)
    calls = []
    forward = model.forward

    def stop_midway(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", stop_midway)
    with pytest.raises(KeyboardInterrupt):
        generate_greedy(model, ids, 5, chunk=10, stop=set(), shared=shared)
    monkeypatch.setattr(model, "forward", forward)
    assert generate_greedy(model, ids, 5, chunk=10, stop=set(), shared=shared) == expected


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
    shared = SharedPrefix(model)
    expected = generate_greedy(model, ids, 5, stop=set())
    for _ in range(2):
        assert generate_greedy(model, ids, 5, stop=set(), shared=shared) == expected
        assert shared.reused == 0


def test_tests_over_one_text_share_it(make_tiny_model, tiny_tokenizer, tmp_path):
    model = make_tiny_model(max_position_embeddings=2048, vocab_size=len(tiny_tokenizer))
    answer_tasks(model, tiny_tokenizer, ["infinitebench_passkey"], [1024], 4, 0, tmp_path, quiet=True)
    records = read_jsonl(tmp_path / "infinitebench_passkey-1024.jsonl")
    starts = [record["positions"][0] for record in records]
    assert records[0]["reused"] == 0
    for before, record, start in zip(records, records[1:], starts, strict=False):
        assert record["reused"] >= min(start, record["positions"][0]) - 2, before

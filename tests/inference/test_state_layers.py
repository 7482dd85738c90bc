"""Models whose layers carry a state along the text: read as transformers reads them, or refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ultralong.evaluation.measures.perplexity import token_losses
from ultralong.inference.batched import BatchedRunner
from ultralong.inference.generate import generate
from ultralong.inference.local_runner import LocalRunner

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
OPTIONS = {
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False,
        "mamba_dt_rank": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
}  # fmt: skip


def made(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **OPTIONS[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="ultralong").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)  # so that answers hang on the prompt
    return model


@pytest.mark.parametrize("kind", ["jamba", "lfm2", "recurrent_gemma"])
def test_a_prompt_in_chunks_is_answered_as_one_pass_would(kind):
    model, ids = made(kind), torch.randint(3, 97, (1, 41), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, 41:].tolist()
    answer = generate(LocalRunner(model, 60, chunk=16), ids.tolist(), [4], stop=())[0]
    assert list(answer.tokens) == expected
    labels = ids.roll(-1, 1)
    if kind == "recurrent_gemma":
        with pytest.raises(ValueError, match="changes its logits after the head"):
            token_losses(model, ids, labels, chunk=16)
        return
    whole, parts = (token_losses(model, ids, labels, chunk=chunk) for chunk in (None, 16))
    torch.testing.assert_close(parts, whole)


def test_what_would_lose_or_mix_states_is_refused_by_name():
    with pytest.raises(ValueError, match="Mamba2ForCausalLM takes no past_key_values"):
        LocalRunner(made("mamba2"))
    with pytest.raises(ValueError, match="Lfm2ForCausalLM has layers of conv"):
        BatchedRunner(made("lfm2"))

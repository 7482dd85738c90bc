"""Unmodified transformers models under `attn_implementation="ultralong"` on one process, with and without a context."""

import pytest
import torch
import transformers as tf
from attention_yardstick import relative
from families import SIZE

from ultralong.attention import NAME, make_attention_context
from ultralong.attention.register import DeferredMask, register

FAMILIES = {
    "Llama": {"head_dim": 8},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"head_dim": 8, "sliding_window": 9},
    "Gemma2": {"head_dim": 8, "sliding_window": 9, "attn_logit_softcapping": 2.0},
    "GptOss": {"head_dim": 8, "sliding_window": 9, "num_local_experts": 2, "num_experts_per_tok": 1},
}
CLOSE = 2e-5  # eager attention takes its softmax in float32


def model_of(family, implementation=NAME, dtype=torch.float32, **overrides):
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(**(SIZE | FAMILIES[family] | overrides))
    model = getattr(tf, f"{family}ForCausalLM")._from_config(config, attn_implementation=implementation)
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(weight, std=2.0)
        elif weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model.to(dtype).eval()


def pair(family, **overrides):
    return model_of(family, **overrides), model_of(family, "eager", **overrides)


@pytest.fixture
def ids():
    return torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(1))


def never(**_):
    raise AssertionError("a mask was built")


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_context_a_model_is_itself(family, ids):
    mine, eager = pair(family)
    assert relative(mine(ids).logits, eager(ids).logits) <= CLOSE
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, -1)
    if family not in ("Gemma2", "GptOss"):
        packed = [model(ids, position_ids=positions, use_cache=False).logits for model in (mine, eager)]
        assert relative(*packed) <= CLOSE
        assert relative(packed[0], mine(ids, use_cache=False).logits) > 1e-2, "positions that restart mask documents"


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache(family, ids):
    mine, eager = pair(family)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(mine.generate(ids, **options), eager.generate(ids, **options))


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral"])
def test_padding_is_hidden(family, ids):
    mine, eager = pair(family)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    a, b = (model(ids, attention_mask=mask).logits for model in (mine, eager))
    assert relative(a[0, 7:], b[0, 7:]) <= CLOSE
    assert relative(a[1], b[1]) <= CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_in_chunks_builds_no_mask(family, ids, monkeypatch):
    mine, eager = pair(family)
    monkeypatch.setattr("ultralong.attention.register.sdpa_mask", never)
    cache, logits = tf.DynamicCache(config=mine.config), []
    for chunk in ids.split(7, 1):
        logits.append(mine(chunk, past_key_values=cache, use_cache=True).logits)
    assert relative(torch.cat(logits, 1), eager(ids).logits) <= CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_context_no_mask_is_built_and_the_answer_is_the_models(family, ids, monkeypatch):
    mine, eager = pair(family)
    expected = eager(ids).logits
    monkeypatch.setattr("ultralong.attention.register.sdpa_mask", never)
    context = make_attention_context(24, heads=4, kv_heads=2)
    found = mine(ids, position_ids=context.positions(), attention_context=context, use_cache=False).logits
    assert relative(found, expected) <= CLOSE
    every = torch.ones_like(ids)
    assert torch.equal(mine(ids, every, attention_context=context, use_cache=False).logits, found)


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_documents_in_a_context_are_separate_calls(family, ids):
    model = model_of(family)
    context = make_attention_context(
        24, heads=4, kv_heads=2, boundaries=torch.tensor([0, 1, 15, 24], dtype=torch.int32)
    )
    together = model(ids, position_ids=context.positions(), attention_context=context, use_cache=False).logits
    for start, stop in ((0, 1), (1, 15), (15, 24)):
        positions = torch.arange(start, stop)[None]
        alone = model(ids[:, start:stop], position_ids=positions, use_cache=False).logits
        assert relative(together[:, start:stop], alone) <= CLOSE


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(ids, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = model_of("Llama", dtype=torch.float64).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        context = make_attention_context(24, heads=4, kv_heads=2)
        model(ids, labels=ids, attention_context=context, use_cache=False).loss.backward()
        gradients.append([weight.grad for weight in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_autocast_computes_attention_in_its_type(family, ids):
    """Qwen3's norms hand over float32 queries beside bfloat16 values."""
    mine, theirs = model_of(family), model_of(family, "sdpa")
    context = make_attention_context(24, heads=4, kv_heads=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = mine(ids, attention_context=context, use_cache=False).logits
        found.float().sum().backward()
        expected = theirs(ids, use_cache=False).logits
    exact = theirs(ids, use_cache=False).logits
    own = relative(expected.float(), exact)
    assert relative(found.float(), exact) <= 1.5 * own
    assert own > 1e-3, "bfloat16 was used"


def test_a_mask_is_built_once_for_all_layers(ids, monkeypatch):
    from ultralong.attention import register as module

    built = []
    monkeypatch.setattr(module, "sdpa_mask", lambda **kwargs: built.append(1) or tf.masking_utils.sdpa_mask(**kwargs))
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    model_of("Llama", num_hidden_layers=4)(ids, attention_mask=mask)
    assert len(built) == 1


def test_what_a_context_cannot_honour_is_refused_by_name(ids):
    context = make_attention_context(24, heads=4, kv_heads=2)
    call = {"attention_context": context, "use_cache": False}
    model = model_of("Llama")
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="LlamaAttention: an attention_mask with hidden tokens"):
        model(ids, attention_mask=mask, **call)
    with pytest.raises(ValueError, match="an attention_mask with hidden tokens"):
        model(ids, attention_mask=torch.ones(2, 1, 24, 24, dtype=torch.bool), **call)
    with pytest.raises(ValueError, match=r"attention dropout 0\.1 is not supported"):
        model_of("Llama", attention_dropout=0.1).train()(ids, **call)
    cache = tf.DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"key-value cache can't be used .*found 48 keys for 24 queries"):
        model(ids, past_key_values=cache, attention_context=context)
    with pytest.raises(ValueError, match=r"query must be .*24 local tokens, 4 heads"):
        model(ids[:, :5], **call)
    layer = model.model.layers[0].self_attn
    q, k = torch.zeros(1, 4, 24, 8), torch.zeros(1, 2, 24, 8)
    function = tf.AttentionInterface()[NAME]
    with pytest.raises(ValueError, match="only causal attention"):
        function(layer, q, k, k, None, is_causal=False, attention_context=context)
    with pytest.raises(ValueError, match="position_bias is not supported"):
        function(layer, q, k, k, None, position_bias=q, attention_context=context)
    layer.config.layer_types = ["chunked_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="layer type 'chunked_attention' is not supported"):
        function(layer, q, k, k, None, attention_context=context)
    with pytest.raises(ValueError, match="passes no sliding_window"):
        function(model.model.layers[1].self_attn, q, k, k, None, attention_context=context)


def test_soft_caps_with_padding_are_refused_without_a_context(ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="Gemma2Attention: soft caps and sinks together with padding"):
        model_of("Gemma2")(ids, attention_mask=mask)


def test_the_name_is_registered_and_registering_twice_is_harmless():
    register()
    assert NAME == "ultralong"
    assert NAME in tf.AttentionInterface()
    mask = tf.masking_utils.AttentionMaskInterface()[NAME](q_length=3, kv_length=3, batch_size=1)
    assert isinstance(mask, DeferredMask)

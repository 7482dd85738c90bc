"""Scripts that an interpreter with another program runs: what it reads of checkpoints, a line of JSON for each.

Their words are a text, lengths as JSON, and folders. They print `version X`, then `said {...}` a folder: `tables`
(inverse frequencies at each length), `factor` (of cosine and sine), `offered` (the window of a server that is told
nothing), and what else the program tells.
"""

TRANSFORMERS = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
transformers.logging.set_verbosity_error()
print("version", transformers.__version__)
text, lengths, *folders = sys.argv[1:]
for folder in folders:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rotary = next(m for m in model.modules() if hasattr(m, "inv_freq"))
        tables = []
        for length in json.loads(lengths):
            cos, _ = rotary(torch.zeros(1), torch.arange(length)[None])  # at position 0 it is the factor alone
            tables.append(rotary.inv_freq.tolist())
        said = {
            "tables": tables, "factor": float(cos.flatten()[0]),
            "window": model.config.max_position_embeddings, "chat": tokenizer.chat_template is not None,
            "dtype": sorted({str(p.dtype) for p in model.parameters()}), "ids": tokenizer(text)["input_ids"],
        }
    except Exception as error:
        said = {"refused": f"{type(error).__name__}: {error}"[:300]}
    print("said", json.dumps(said))
"""

# A table of cosines and sines tells the frequencies by its second row, and how many positions it has by its length.
FROM_CACHE = """
def told(rope, lengths):
    tables = []
    for length in lengths:
        cache, first = getattr(rope, "cos_sin_cache", None), 0
        if cache is None:  # longrope: the short table's rows, then the long one's
            cache, original = rope.long_short_cos_sin_cache, rope.original_max_position_embeddings
            first = original if getattr(rope, "use_long_rope", length > original) else 0
        cos, sin = cache[first + 1].double().chunk(2)
        tables.append(torch.atan2(sin, cos).tolist())
    factor = float((cos**2 + sin**2).sqrt().mean())
    return {"tables": tables, "factor": factor, "positions": len(cache) - first}
"""

VLLM = (
    """
import json, sys, types, torch, vllm
from transformers import AutoConfig
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.config.model import _get_and_verify_max_len
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.transformers_utils.config import patch_rope_parameters
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase
"""
    + FROM_CACHE
    + """
print("version", vllm.__version__)
text, lengths, *folders = sys.argv[1:]
lengths = json.loads(lengths)
for folder in folders:
    try:
        config = AutoConfig.from_pretrained(folder)
        patch_rope_parameters(config)
        declared = ModelArchConfigConvertorBase(config, config).derive_max_model_len_and_key()
        declared = types.SimpleNamespace(derived_max_model_len_and_key=declared)
        offered = _get_and_verify_max_len(config, declared, None, None, False, None)
        made = VllmConfig(device_config=DeviceConfig(device="cpu"))
        made.model_config = types.SimpleNamespace(max_model_len=lengths[-1])
        with set_current_vllm_config(made):
            rope = get_rope(
                config.head_dim, config.max_position_embeddings, True, dict(config.rope_parameters), torch.float32
            )
        said = told(rope, lengths) | {"offered": offered}
    except Exception as error:
        said = {"refused": f"{type(error).__name__}: {error}"[:300]}
    print("said", json.dumps(said))
"""
)

SGLANG = (
    """
import json, sys, torch, sglang
from transformers import AutoConfig
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.utils.hf_transformers.common import get_context_length
"""
    + FROM_CACHE
    + """
print("version", sglang.__version__)
text, lengths, *folders = sys.argv[1:]
lengths = json.loads(lengths)
for folder in folders:
    try:
        config = AutoConfig.from_pretrained(folder)
        written = config.rope_parameters
        rope = get_rope(
            config.head_dim, config.head_dim, config.max_position_embeddings, written["rope_theta"], True,
            None if written["rope_type"] == "default" else dict(written), torch.float32,
        )
        said = told(rope, lengths) | {"offered": get_context_length(config)}
    except Exception as error:
        said = {"refused": f"{type(error).__name__}: {error}"[:300]}
    print("said", json.dumps(said))
"""
)

QUESTIONS = {"transformers": TRANSFORMERS, "vLLM": VLLM, "SGLang": SGLANG}

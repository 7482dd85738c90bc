"""What a model class does by itself: its rotary table, beside the one that was meant, and its norms.

transformers' classes differ from their common functions in places: some read further keys, some cannot compute a
scaled table without `head_dim`, and hybrids may have no rotary module at all. The class itself is asked, before a copy.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers import __version__ as transformers_version

from ultralong.checkpoints.config import CONFIG_ERRORS, one_line
from ultralong.rope import RopeScaling, inverse_frequencies


def class_table(config: PreTrainedConfig) -> tuple[torch.Tensor, float] | None:
    """Inverse frequencies (R/2,) and attention factor of the model class that a config names.

    The model is built without memory, its rotary module once more with it.

    Returns:
        None where no module of the class has a rotary table.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = (module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), torch.Tensor))
    module = next(modules, None)
    if module is None:
        return None
    built = type(module)(config.get_text_config())
    return built.inv_freq, float(getattr(built, "attention_scaling", 1.0))


def class_norms(config: PreTrainedConfig) -> frozenset[str]:
    """Where a model class normalises beside its layers' inputs: any of `queries and keys` and `after a sublayer`.

    By the names of transformers' modules; the model is built without memory.
    """
    with torch.device("meta"):
        names = {name.rsplit(".", 1)[-1] for name, _ in AutoModelForCausalLM.from_config(config).named_modules()}
    found = set()
    if names & {"q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm"}:
        found.add("queries and keys")
    if any(name.startswith(("post_feedforward", "post_mlp")) for name in names):
        found.add("after a sublayer")
    return frozenset(found)


def check_class_table(config: PreTrainedConfig, scaling: RopeScaling) -> None:
    """Refuse a config whose model class would not compute the table of `scaling`.

    Raises:
        ValueError: It cannot be built, has no rotary module, or computes another table.
    """
    trouble = f"transformers {transformers_version} can't run {config.model_type!r} with a {scaling.method!r} scaling"
    try:
        found = class_table(config)
    except CONFIG_ERRORS as error:
        raise ValueError(f"{trouble}: {one_line(error)} Choose another method.") from error
    if found is None:
        raise ValueError(f"{trouble}: the class has no rotary position embedding to scale.")
    table, factor = inverse_frequencies(scaling)
    if found[0].shape != table.shape or not torch.allclose(found[0], table, rtol=1e-6, atol=0):
        raise ValueError(f"{trouble}: the class computes another table than its config says. Choose another method.")
    if abs(found[1] - factor) > 1e-6:
        raise ValueError(f"{trouble}: the class takes {found[1]:g} for the attention factor of {factor:g}.")

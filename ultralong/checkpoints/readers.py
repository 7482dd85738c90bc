"""What other programs read from a checkpoint's folder, and what they ignore or get wrong.

One rule a program and version, each as its source has it; `ultralong bench readers` compares the rules with the
programs. A rule turns config.json into the rotary table that the program computes, and the table says the verdict: it
is compared with the one that is meant, at the length of the unscaled pretraining and at the whole window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ultralong.checkpoints.config import STRICT_4
from ultralong.rope import RopeScaling, from_config, inverse_frequencies

Table = Callable[[int], tuple[torch.Tensor, float]]  # inverse frequencies and attention factor at a length

# Architectures that transformers 5.23 can extend, by the first of these versions that knows them; those that are not
# named are in 4.46.
FIRST_KNOWN = {
    "4.51": "aria_text bamba cohere2 deepseek_v3 diffllama glm4 granitemoeshared helium llama4_text olmo2 "
    "phi4_multimodal qwen3 qwen3_moe",
    "4.57": "apertus arcee bitnet deepseek_v2 doge ernie4_5 ernie4_5_moe exaone4 falcon_h1 flex_olmo gpt_oss "
    "hunyuan_v1_dense hunyuan_v1_moe lfm2 longcat_flash minimax ministral qwen3_next seed_oss smollm3 vaultgemma",
    "5": "afmoe axk1 axk2 bailing_hybrid cohere2_moe cwm deepseek_v32 exaone_moe flint glm4_moe_lite glm_moe_dsa "
    "granite_swa granitemoe_swa hrm_text hy_v3 hy_v4 hyperclovax internlm3 iquestcoder jais2 kolibri1 minicpm3 "
    "minimax_m2 minimax_m3_vl_text ministral3 nanochat olmo_hybrid qwen3_5_moe_text qwen3_5_text solar_open youtu",
}
# Classes whose rotary module reads no rope_scaling in 4.46.
UNSCALED_4_46 = ("gemma", "gemma2", "glm", "jetmoe", "mistral", "mixtral", "moshi", "olmo")
OWN_LONGROPE = ("phi3", "phimoe", "phi4_multimodal")  # with a rotary module of their own, by each text's length
GGUF_LONGROPE = ("phi3", "phimoe", "minicpm", "minicpm3")
VERSIONS_4 = ("4.46", "4.51", "4.57")
UPDATE = "Take transformers 4.57 or later."
YARN = {
    "4.46": "it takes max_position_embeddings for the original window of yarn",
    "4.51": "it takes max_position_embeddings / original_max_position_embeddings for the factor of yarn",
}


@dataclass(frozen=True)
class Rule:
    """How one program in one version reads a config.

    Attributes:
        program: Its name.
        version: Which version was looked at; later ones read the same as far as is known.
        read: From the entries of config.json, the window and what is meant to the table that it computes and remarks:
            (what it does otherwise, what to do about it).
        window: The window that it offers by itself.
        typed: What to type to open the model, where FOLDER is the folder.
        raised: What to type besides where its window ends before the one that is meant.
    """

    program: str
    version: str
    read: Callable[[Mapping[str, Any], int, RopeScaling], tuple[Table, list[tuple[str, str]]]]
    window: Callable[[Mapping[str, Any], int, RopeScaling], int]
    typed: str
    raised: str = ""


def table_of(scaling: RopeScaling) -> Table:
    """The table that transformers computes of a scaling, at each length its own where the method has one."""
    return lambda length: inverse_frequencies(scaling, length)


def same_table(one: Table, other: Table, lengths: tuple[int, ...]) -> bool:
    """Whether two tables are equal at some lengths, up to float32's rounding."""
    for length in lengths:
        (frequencies, factor), (others, its_factor) = one(length), other(length)
        if frequencies.shape != others.shape or not torch.allclose(frequencies, others, rtol=1e-5, atol=0):
            return False
        if abs(factor - its_factor) > 1e-6:
            return False
    return True


def knows(version: str, model_type: str) -> bool:
    """Whether a version of transformers (of `VERSIONS_4`) knows an architecture, as far as is recorded here."""
    later = [first for first, names in FIRST_KNOWN.items() if model_type in names.split()]
    return not later or (later[0] != "5" and float(later[0]) <= float(version))


def _transformers_4(version: str) -> Callable[..., tuple[Table, list[tuple[str, str]]]]:
    def read(entries: Mapping[str, Any], window: int, meant: RopeScaling) -> tuple[Table, list[tuple[str, str]]]:
        older = {key: value for key, value in entries.items() if key != "rope_parameters"}
        newer = "Take transformers 5, or write the folder again with ultralong extend."
        remarks = []
        if not older.get("rope_theta"):
            older["rope_theta"] = 10_000.0
            remarks.append(("the config has no rope_theta, so it takes its class's base, 10,000 for most", newer))
        if not older.get("rope_scaling") and meant.method != "default":
            remarks.append(("the config has no rope_scaling, so nothing is scaled", newer))
        if version == "4.46" and older.get("rope_scaling") and older.get("model_type") in UNSCALED_4_46:
            older["rope_scaling"] = None
            remarks.append(("its class of this type reads no rope_scaling, so nothing is scaled", UPDATE))
        _check_strict(version, older)
        found = from_config(older)
        maximum = int(entries["max_position_embeddings"])
        if found.method == "yarn":
            before, scaling = found, older["rope_scaling"]
            if version == "4.46":
                found = replace(found, original_window=maximum, truncate=True)
            elif version == "4.51" and scaling.get("original_max_position_embeddings"):
                found = replace(
                    found, factor=max(1.0, maximum / scaling["original_max_position_embeddings"]), truncate=True
                )
            if found != before:
                said = YARN[version] if found.truncate == before.truncate else "it knows no truncate: false of yarn"
                remarks.append((said, UPDATE))
        if found.method == "longrope":
            return _longrope_4(version, found, older, maximum, remarks)
        return table_of(found), remarks

    return read


def _check_strict(version: str, older: Mapping[str, Any]) -> None:
    """Refuse what a class's own check of rope_scaling refuses.

    Raises:
        ValueError: It does.
    """
    kind, scaling = str(older.get("model_type")), older.get("rope_scaling")
    if kind not in STRICT_4 or not scaling:
        return
    methods, keys = STRICT_4[kind]
    if set(scaling) != {"type", *keys} or scaling["type"] not in methods:
        raise ValueError(
            f"its {kind} class opens a rope_scaling of {' or '.join(methods)} alone, with the keys "
            f"{', '.join(('type', *keys))}. Take transformers 5."
        )
    if version == "4.46" and (older.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError(f"its {kind} class knows no partial_rotary_factor. {UPDATE}")


def _longrope_4(
    version: str, found: RopeScaling, older: Mapping[str, Any], maximum: int, remarks: list[tuple[str, str]]
) -> tuple[Table, list[tuple[str, str]]]:
    """longrope: the original window is read beside its entry alone; releases before 4.51 keep the long table."""
    own = older.get("model_type") in OWN_LONGROPE
    if not older.get("original_max_position_embeddings"):
        found = replace(found, original_window=4096 if own else maximum)  # the first is its class's default
        remarks.append(
            (
                "it looks for original_max_position_embeddings beside rope_scaling, not in it",
                "Write it there too.",
            )
        )
    if version != "4.46" or own:
        return table_of(found), remarks
    remarks.append(
        ("it takes the long factors for short texts too", "Take transformers 4.51 or later for short texts.")
    )
    return (lambda length: inverse_frequencies(found, maximum + 1)), remarks


def _vllm(entries: Mapping[str, Any], window: int, meant: RopeScaling) -> tuple[Table, list[tuple[str, str]]]:
    if meant.method == "dynamic":
        plain = replace(meant, method="default", factor=1.0)
        return table_of(plain), [
            (
                "it scales nothing: its dynamic type grows from max_trained_positions, a key of its own",
                "Extend with yarn or llama3 to serve there.",
            )
        ]
    if meant.method == "longrope":
        found = replace(meant, attention_factor=None)
        said = [
            (
                "it takes one table for all lengths, and a window of the original one unless told",
                f"Pass --max-model-len {window}; short texts then read the long table.",
            )
        ]
        if meant.attention_factor is not None:
            said.append(("it ignores attention_factor of longrope", "Leave it out when extending."))
        return (lambda length: inverse_frequencies(found, window)), said
    return table_of(meant), []


def _sglang(entries: Mapping[str, Any], window: int, meant: RopeScaling) -> tuple[Table, list[tuple[str, str]]]:
    if meant.method == "dynamic":
        return (lambda length: inverse_frequencies(meant, window)), [
            ("it takes the table of the whole window for short texts too", "Extend with yarn or llama3 to serve there.")
        ]
    if meant.method in ("yarn", "longrope") and meant.attention_factor is not None:
        said = [(f"it ignores attention_factor of {meant.method}", "Leave it out when extending.")]
        return table_of(replace(meant, attention_factor=None)), said
    return table_of(meant), []


def _llama_cpp(entries: Mapping[str, Any], window: int, meant: RopeScaling) -> tuple[Table, list[tuple[str, str]]]:
    if meant.method == "dynamic":
        said = [("its converter writes nothing of the dynamic type", "Extend with yarn or llama3 to convert.")]
        return table_of(replace(meant, method="default", factor=1.0)), said
    if meant.method == "longrope" and entries.get("model_type") not in GGUF_LONGROPE:
        said = [("its converter writes longrope for Phi-3 and MiniCPM alone", "Extend with yarn or llama3 to convert.")]
        return table_of(replace(meant, method="default", factor=1.0, attention_factor=None)), said
    if meant.method == "yarn":
        found = replace(meant, alpha=1.0, beta=32.0, truncate=True)
        said = []
        if found != meant:
            betas = f"--yarn-beta-fast {meant.beta:g} --yarn-beta-slow {meant.alpha:g}"
            said.append(("it ignores beta_fast and beta_slow for most architectures", f"Pass {betas}."))
        if meant.attention_factor is not None:
            said.append(
                (
                    "it ignores attention_factor for most architectures",
                    f"Pass --yarn-attn-factor {meant.attention_factor:g}.",
                )
            )
            found = replace(found, attention_factor=None)
        return table_of(found), said
    return table_of(meant), []


def _declared(entries: Mapping[str, Any], window: int, meant: RopeScaling) -> int:
    return int(entries["max_position_embeddings"])


def _by_vllm(entries: Mapping[str, Any], window: int, meant: RopeScaling) -> int:
    """Its `_get_and_verify_max_len`: what the config declares, which a factor of linear or dynamic multiplies."""
    declared = int(entries["max_position_embeddings"])
    if meant.method == "longrope":
        return int(entries.get("original_max_position_embeddings") or meant.original_window or declared)
    return declared if meant.method in ("default", "yarn", "llama3") else int(declared * meant.factor)


def _by_sglang(entries: Mapping[str, Any], window: int, meant: RopeScaling) -> int:
    """Its `get_context_length`: the same, where the entry names no original window."""
    declared = int(entries["max_position_embeddings"])
    scaling = entries.get("rope_scaling") or entries.get("rope_parameters") or {}
    named = "original_max_position_embeddings" in scaling or scaling.get("rope_type") == "llama3"
    return declared if named else int(declared * float(scaling.get("factor") or 1.0))


OPEN_4 = 'AutoModelForCausalLM.from_pretrained(FOLDER, torch_dtype="auto")'
RULES = (
    *(Rule("transformers", version, _transformers_4(version), _declared, OPEN_4) for version in VERSIONS_4),
    Rule(
        "vLLM",
        "0.33",
        _vllm,
        _by_vllm,
        "vllm serve FOLDER --max-model-len WINDOW",
        " --hf-overrides '{\"max_position_embeddings\": WINDOW}'",
    ),
    Rule(
        "SGLang",
        "0.5",
        _sglang,
        _by_sglang,
        "python -m sglang.launch_server --model-path FOLDER --context-length WINDOW",
        " --json-model-override-args '{\"max_position_embeddings\": WINDOW}'",
    ),
    Rule("llama.cpp", "b6000 on", _llama_cpp, _declared, "llama-server -m FILE.gguf --ctx-size WINDOW"),
)

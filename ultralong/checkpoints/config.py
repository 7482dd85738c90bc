"""The JSON files of a checkpoint: read with one-line errors, and written so that every reader finds its own spelling.

transformers 5 reads `rope_parameters`; transformers 4, and servers built on it, read `rope_theta` and `rope_scaling`,
and where these are missing they take an unscaled table without a word. A tokenizer that transformers 5 saved names a
class that no version 4 has.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers import __version__ as transformers_version

from ultralong.checkpoints.files import check_links, companion_files, header, weight_files
from ultralong.rope.config import FULL, SLIDING
from ultralong.utils.files import LFS_POINTER, read_json_object
from ultralong.utils.hub import LARGEST_TOKENIZER, check_tokenizer, load_tokenizer

# Types with a RoPE for each type of layers whose version-4 classes read rope_scaling for full attention alone.
BY_LAYER_TYPE = ("gemma3_text", "olmo3")
# What transformers raises for a config that it cannot read.
CONFIG_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, NotImplementedError, OSError, ArithmeticError,
    StrictDataclassError,
)  # fmt: skip
# Sizes of a model, which it has one of at least.
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip
LARGEST_SIZE, LARGEST_HEAD = 2**40, 2**16  # far above any model's, and small enough to compute with
# How the names of tokenizers' files begin.
TOKENIZERS = ("tokenizer", "tokenization", "vocab", "spiece", "sentencepiece", "tekken", "tiktoken")
MOST_LAYERS = 10_000  # a class is built layer by layer, also without memory: a damaged number would take for ever
# Files beside config.json that hold an object, without which a tokenizer or a generation does not open.
OBJECTS = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json",
)  # fmt: skip
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


# Classes of transformers 4 that open a rope_scaling of these types with `type` and these keys, and no other.
STRICT_4 = {
    **dict.fromkeys(("phi3", "phi4_multimodal"), (("longrope",), ("short_factor", "long_factor"))),
    **dict.fromkeys(("olmo", "olmo2"), (("linear", "dynamic"), ("factor",))),
}


def load_config(model: str | os.PathLike[str]) -> PreTrainedConfig:
    """The config of a checkpoint folder or hub id.

    Raises:
        ValueError: There is none, or transformers cannot read it; one line that says what it is.
    """
    folder = Path(model).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise ValueError(
            f"{folder} is not a checkpoint: it has no config.json."
            f"{' It holds an adapter: merge it into its base first.' if adapter else ''}"
        )
    entries = read_json_object(folder / "config.json") if folder.is_dir() else {}
    kind = entries.get("model_type")
    _check_entries(entries, f"the config in {model}")
    if isinstance(layers := entries.get("num_hidden_layers"), int) and layers > MOST_LAYERS:
        raise ValueError(f"the config in {model} has {layers:,} layers, and a model has at most {MOST_LAYERS:,}.")
    try:
        return AutoConfig.from_pretrained(str(folder) if folder.is_dir() else model, trust_remote_code=False)
    except CONFIG_ERRORS as error:
        raise ValueError(
            f"transformers {transformers_version} can't read the config in {model} (type {kind!r}): {one_line(error)} "
            "Models that bring their own code are not supported."
        ) from error


def _check_entries(entries: Any, where: str) -> None:
    """Refuse numbers that no model has: transformers takes them, and computes with them or fails far from here."""
    if isinstance(entries, list):
        for entry in entries:
            _check_entries(entry, where)
    if not isinstance(entries, Mapping):
        if isinstance(entries, float) and math.isnan(entries):
            raise ValueError(f"{where} holds a NaN, which is no number. Restore it.")
        return
    for name, value in entries.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in SIZES and number and not value >= 1:
            raise ValueError(f"{where} has a {name} of {value}, and a model has at least 1.")
        if name in SIZES and number and value > (most := LARGEST_HEAD if name == "head_dim" else LARGEST_SIZE):
            raise ValueError(f"{where} has a {name} of {value:,}, and a model has at most {most:,}.")
        if name in ("rope_theta", "factor", "rope_local_base_freq") and number and not 0 < value < math.inf:
            raise ValueError(f"{where} has a {name} of {value}, which is above 0. Restore it.")
        if name in ("rope_type", "dtype") and value is not None and not (value and isinstance(value, str)):
            raise ValueError(f"{where} has a {name} of {value!r}, and it is a name. Restore it.")
        _check_entries(value, where)


def check_whole(model: str | os.PathLike[str]) -> None:
    """Refuse a local checkpoint with weights that are no whole safetensors files, links out of it, or files cut short.

    Args:
        model: Folder or hub id; of an id nothing is checked, as nothing is here.

    Raises:
        ValueError: One line that says what is wrong.
    """
    folder = Path(model)
    if folder.is_dir():
        check_links(folder, weight_files(folder))
        check_companions(folder, companion_files(folder)[0])


def tokenizer_notes(names: Sequence[str]) -> tuple[str, ...]:
    """What a user should know of a checkpoint's tokenizer, from the names of its files."""
    if not any(name.startswith(TOKENIZERS) for name in names):
        return ("The source has no tokenizer: copy the model's own beside the weights before rows are packed with it.",)
    if "tokenizer_config.json" not in names:
        return ("The source has no tokenizer_config.json, so no tokenizer limit was set.",)
    return ()


def check_companions(folder: Path, names: Collection[str]) -> None:
    """Refuse what goes along with the weights and would not open in the copy: it is copied without being opened.

    Args:
        folder: The checkpoint.
        names: Its files that go along, as `companion_files` names them.

    Raises:
        ValueError: One is a Git LFS pointer in the place of the file, the tokenizer's or the generation's JSON is no
            object, or the tokenizer does not open.
    """
    for name in names:
        with open(folder / name, "rb") as file:
            pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
        if pointer:
            raise ValueError(f"{folder / name} is a Git LFS pointer in the place of the file: run `git lfs pull`.")
        if (folder / name).stat().st_size > LARGEST_TOKENIZER and name in OBJECTS:
            raise ValueError(f"{folder / name} has more than {LARGEST_TOKENIZER:,} bytes, and is no such file.")
        if name in OBJECTS:
            read_json_object(folder / name)
        if name.endswith(".jinja"):
            try:
                (folder / name).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{folder / name} is no UTF-8 text ({error}). Restore it.") from error
    if "tokenizer.json" in names:
        own = read_json_object(config) if (config := folder / "tokenizer_config.json").is_file() else {}
        # A class that the checkpoint brings is not run.
        check_tokenizer(folder) if "auto_map" in own else load_tokenizer(folder)


def one_line(error: BaseException) -> str:
    """What an error says, on one line that ends in a full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else f"{text}."


def rope_entries(written: Mapping[str, Any], model_type: str, window: int) -> dict[str, Any]:
    """The entries of config.json that carry one `rope_parameters` dictionary to readers of every age.

    Args:
        written: The dictionary.
        model_type: transformers' name of the architecture.
        window: The config's `max_position_embeddings`.
    """
    if FULL in written:  # by layer type: what version 4 calls rope_scaling is that of the full-attention layers
        made = rope_entries(written[FULL], model_type, window) if model_type in BY_LAYER_TYPE else {}
        local = {"rope_local_base_freq": written[SLIDING]["rope_theta"]} if model_type == "gemma3_text" else {}
        return made | local | {"rope_parameters": {key: dict(entry) for key, entry in written.items()}}
    older = {key: value for key, value in written.items() if key != "rope_theta"}
    made = {
        "rope_parameters": dict(written),
        "rope_theta": written["rope_theta"],
        "rope_scaling": None if written.get("rope_type", "default") == "default" else older,
    }
    if "partial_rotary_factor" in written:
        made["partial_rotary_factor"] = written["partial_rotary_factor"]
    methods, keys = STRICT_4.get(model_type, ((), ()))
    if written.get("rope_type") not in methods:
        return made
    # What stands beside the entry, or follows from the two windows, is no loss; version 5 reads this entry first.
    beside = {"rope_type", "partial_rotary_factor", "original_max_position_embeddings"}
    if written.get("factor") == window / (written.get("original_max_position_embeddings") or window):
        beside.add("factor")
    if set(older) <= {*keys, *beside}:
        made["rope_scaling"] = {"type": written["rope_type"], **{key: older[key] for key in keys}}
    return made


def config_for_readers(entries: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """A config.json whose RoPE stands in both spellings, and whose type is that of the weights.

    Args:
        entries: Content of config.json.
        dtype: Type of the weights; None leaves what the config says.
    """
    made = dict(entries)
    written = made.get("rope_parameters")
    written = written if isinstance(written, Mapping) else {}
    table = written.get(FULL, written)
    if table and "rope_theta" in table and not any(isinstance(value, Mapping) for value in table.values()):
        made |= rope_entries(written, str(made.get("model_type")), int(made.get("max_position_embeddings") or 1))
    if dtype is not None and "quantization_config" not in made:
        name = str(dtype).removeprefix("torch.")
        made |= {"dtype": name, "torch_dtype": name}  # the second for version 4, whose servers take float32 without it
    return made


def tokenizer_for_readers(entries: Mapping[str, Any], template: str | None = None) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 4 opens too.

    Version 5's general class stands by the name that both know, and the chat template stands in this file, as releases
    before 4.51 look for no chat_template.jinja.

    Args:
        entries: Content of tokenizer_config.json.
        template: Content of chat_template.jinja, where there is one.
    """
    made = dict(entries)
    if made.get("tokenizer_class") == "TokenizersBackend":
        made["tokenizer_class"] = "PreTrainedTokenizerFast"
        made.pop("backend", None)
    if isinstance(made.get("extra_special_tokens"), list):  # a mapping of names in version 4
        made["additional_special_tokens"] = made.pop("extra_special_tokens")
    if template is not None:
        made.setdefault("chat_template", template)
    return made


def weights_dtype(folder: Path) -> torch.dtype | None:
    """The floating-point type that most of a checkpoint's weights have; None where none has one.

    Raises:
        ValueError: The weights are missing, damaged or in another format (see `files.weight_files`).
    """
    sizes: Counter[torch.dtype] = Counter()
    for name in weight_files(folder):
        if name.endswith(".safetensors"):
            for entry in header(folder / name).values():
                if entry["dtype"] in DTYPES:
                    first, end = entry["data_offsets"]
                    sizes[DTYPES[entry["dtype"]]] += end - first
    return sizes.most_common(1)[0][0] if sizes else None


def head_counts(config: PreTrainedConfig) -> tuple[int, int]:
    """Query heads and kv heads of a layer."""
    text = config.get_text_config()
    return text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def head_size(config: PreTrainedConfig) -> int:
    """Size D of one attention head."""
    text = config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)

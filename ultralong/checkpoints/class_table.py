"""What a model class does by itself: which weights it has, its rotary table beside the one that was meant, its norms.

transformers' classes differ from their common functions in places: some read further keys, some cannot compute a
scaled table without `head_dim`, and hybrids may have no rotary module at all. The class itself is asked, before a copy.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.utils import logging

from ultralong.checkpoints.config import CONFIG_ERRORS, one_line
from ultralong.checkpoints.files import header, weight_files
from ultralong.rope import RopeScaling, inverse_frequencies
from ultralong.rope.config import FULL
from ultralong.utils.progress import library_bars

# Of what lies in the files and is none of a class's: tables that older releases stored, and scales of 8-bit caches.
NO_WEIGHT = re.compile(r"rotary_emb\.|inv_freq$|masked_bias$|attn\.bias$|attention\.bias$|_scale$")
LAYER = re.compile(r"\.layers\.(\d+)\.")
PLAIN_TYPES = ("F64", "F32", "F16", "BF16")  # of weights, as safetensors names them


def open_model(
    model: str | os.PathLike[str],
    attention: str,
    dtype: torch.dtype | str = "auto",
    device: str | None = None,
) -> PreTrainedModel:
    """A causal language model all of whose weights are the checkpoint's.

    transformers gives weights that a checkpoint lacks random values, with a warning among others; here they are an
    error. So are weights of its layers that the config does not name, which transformers leaves out.

    Args:
        model: Folder or hub id.
        attention: Name of an attention in transformers' registry.
        dtype: Type of the parameters.
        device: "meta" for shapes without memory: of the files only names and shapes are read.

    Raises:
        ValueError: It lacks a weight of its class, or has one more, or one of another shape or of a type that needs
            scales, or its class has an attention of its own. Other errors are transformers'.
    """
    try:
        with library_bars():
            both: Any = AutoModelForCausalLM.from_pretrained(  # the model and what was found, by output_loading_info
                model,
                dtype=dtype,
                attn_implementation=attention,
                device_map=device,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # named below, where transformers raises an error of many lines
            )
    except KeyError as error:
        if error.args != (attention,):
            raise
        raise ValueError("its class has an attention of its own, which no other can stand in for.") from error
    opened, found = both
    advice = "config.json and the weights are not of one model"
    if lacking := sorted(found["missing_keys"]):
        raise ValueError(f"the files lack {_and_more(lacking)}, which the config says it has: {advice}.")
    if other := sorted(found["mismatched_keys"]):
        name, stored, meant = other[0][:3]
        raise ValueError(f"{_and_more([name])} is {tuple(stored)}, by the config {tuple(meant)}: {advice}.")
    if more := _left_out(found["unexpected_keys"], opened):
        raise ValueError(f"the files hold {_and_more(more)}, which the config does not know: {advice}.")
    if Path(model).is_dir():
        _check_types(Path(model), opened)
    return cast(PreTrainedModel, opened)


def _left_out(unexpected: Iterable[str], opened: PreTrainedModel) -> list[str]:
    """Weights below the head that transformers did not take, though they belong to what was trained.

    Nothing is said of what the class itself leaves out, of further modules beside the decoder, and of layers that
    predict several tokens (`num_nextn_predict_layers`), which stand behind the last.
    """
    config = opened.config.get_text_config()
    end = int(config.num_hidden_layers)
    extra = range(end, end + int(getattr(config, "num_nextn_predict_layers", None) or 0))

    def counts(name: str) -> bool:
        layer = LAYER.search(name)
        own = name.startswith(f"{opened.base_model_prefix}.") and not NO_WEIGHT.search(name)
        return own and not (layer is not None and int(layer[1]) in extra)

    return sorted(name for name in unexpected if counts(name))


def _check_types(place: Path, opened: PreTrainedModel) -> None:
    """Refuse weights of a type that says nothing without the scales of a quantised checkpoint.

    transformers turns whole numbers, fp8 and complex numbers into the model's type without a word: another model.
    """
    if getattr(opened.config, "quantization_config", None) is not None:
        return
    meant = opened.state_dict()
    for file in (place / name for name in weight_files(place) if name.endswith(".safetensors")):
        for name, entry in header(file).items():
            if entry["dtype"] not in PLAIN_TYPES and name in meant and meant[name].is_floating_point():
                raise ValueError(
                    f"{name} is stored as {entry['dtype']}, and the config names no quantisation: its scales are "
                    "unknown. Take the unquantised checkpoint."
                )


def _and_more(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more weights" if len(names) > 1 else names[0]


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint, known by what its class is built from, wherever it lies."""

    place: Path = field(compare=False)
    content: str


def class_model(place: Path, attention: str) -> PreTrainedModel:
    """The class of a checkpoint on the meta device, its weights checked by name and shape; not to be changed.

    Args:
        place: Folder of a whole checkpoint.
        attention: Name of an attention in transformers' registry.

    Raises:
        ValueError: As for `open_model`.
    """
    files = [place / name for name in weight_files(place) if name.endswith(".safetensors")]
    shapes = {name: (entry["dtype"], entry["shape"]) for file in files for name, entry in header(file).items()}
    written = (place / "config.json").read_text(encoding="utf-8")
    return _class_model(_Checkpoint(place, json.dumps([written, sorted(shapes.items())])), attention)


@lru_cache(maxsize=8)
def _class_model(checkpoint: _Checkpoint, attention: str) -> PreTrainedModel:
    with _silent():  # what it has to say is said when the weights are loaded
        return open_model(checkpoint.place, attention, device="meta")


def check_class_weights(place: Path, config: PreTrainedConfig) -> None:
    """Refuse a checkpoint whose weights are not those of the class that its config names.

    Nothing is said of quantised weights, of those of another class than the causal language model (of pictures and
    text, say), and of files in which no name is one of the class.

    Args:
        place: Folder of a whole checkpoint.
        config: Its config, as transformers reads it.

    Raises:
        ValueError: A weight is missing, one too many, or of another shape or type, or a head that the config ties to
            the embedding is another matrix.
    """
    if getattr(config, "quantization_config", None) is not None:
        return
    with torch.device("meta"), _silent():
        model = AutoModelForCausalLM.from_config(config)
    if (config.architectures or [type(model).__name__]) != [type(model).__name__]:
        return
    files = [place / name for name in weight_files(place) if name.endswith(".safetensors")]
    if model.state_dict().keys() & {name for file in files for name in header(file)}:
        try:
            class_model(place, "eager")
            _check_tied(files, model)
        except ValueError as error:
            raise ValueError(f"{place} can't be extended: {error}") from error


def _check_tied(files: Sequence[Path], model: PreTrainedModel) -> None:
    """Refuse two different matrices where the config says that there is one.

    transformers 5 keeps both, with a warning; version 4 and the servers take the embedding for the head.

    Raises:
        ValueError: There are two.
    """
    where = {name: file for file in files for name in header(file)}
    for tied, source in (model.all_tied_weights_keys or {}).items():
        if tied not in where or source not in where:
            continue
        with safe_open(where[tied], "pt") as first, safe_open(where[source], "pt") as second:
            if not torch.equal(first.get_tensor(tied), second.get_tensor(source)):
                raise ValueError(
                    f"{tied} is not {source}, and by tie_word_embeddings in config.json it is: programs differ in "
                    "which they take. Set tie_word_embeddings to false, or remove the weight that was not trained."
                )


@contextmanager
def _silent() -> Iterator[None]:
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def class_table(config: PreTrainedConfig) -> tuple[torch.Tensor, float] | None:
    """Inverse frequencies (R/2,) and attention factor of the model class that a config names, in full-attention layers.

    The model is built without memory, its rotary module again with it.

    Returns:
        None where no module of the class has a rotary table.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for module in model.modules():
        for prefix in ("", f"{FULL}_"):
            if isinstance(getattr(module, f"{prefix}inv_freq", None), torch.Tensor):
                built = type(module)(config.get_text_config())
                return getattr(built, f"{prefix}inv_freq"), float(getattr(built, f"{prefix}attention_scaling", 1.0))
    return None


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
        raise ValueError(f"{trouble}: {one_line(error)}") from error
    if found is None:
        raise ValueError(f"{trouble}: the class has no rotary position embedding to scale.")
    table, factor = inverse_frequencies(scaling)
    if found[0].shape != table.shape or not torch.allclose(found[0], table, rtol=1e-6, atol=0):
        raise ValueError(f"{trouble}: the class computes another table than its config says.")
    if abs(found[1] - factor) > 1e-6:
        raise ValueError(f"{trouble}: the class takes {found[1]:g} for the attention factor of {factor:g}.")

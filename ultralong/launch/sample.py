"""A run small enough to rehearse anywhere: a tiny Llama of bytes, rows of Python's own help texts, one config."""

from __future__ import annotations

import os
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ultralong.data.read.documents import Document
from ultralong.data.rows.packing import PackSettings, pack
from ultralong.data.tokens.tokenize import tokenize_corpus
from ultralong.training.config import DataSource, OptimizerConfig, ParallelConfig, TrainConfig

LENGTH = 64


def sample_run(folder: str | os.PathLike[str], steps: int = 120, seed: int = 0) -> TrainConfig:
    """Write `model` and `rows` into a folder, and give the config of a run whose paths are relative to it.

    Args:
        folder: Where they go; made when missing.
        steps: Steps of the run; a checkpoint is saved at each eighth.
        seed: Of the weights and of the order of the rows.

    Raises:
        ValueError: The folder holds such a run already.
    """
    place = Path(folder)
    tokenizer = _bytes()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=4 * LENGTH,
                tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=None,
            )
        )  # fmt: skip
    if (place / "model").exists():
        raise ValueError(f"{place / 'model'} is there already. Choose an empty folder.")
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    documents = [Document(name, text, "python help", "PSF-2.0") for name, text in sorted(topics.items())[:12]]
    store = tokenize_corpus(documents, tokenizer, place / "tokens", quiet=True)
    pack(store, tokenizer, place / "rows", PackSettings(length=LENGTH, seed=seed), quiet=True)
    return TrainConfig(
        model="model",
        out="run",
        data=(DataSource("rows"),),
        steps=steps,
        global_batch_size=4,
        dtype="float32",
        seed=seed,
        save_every=max(1, steps // 8),
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=max(1, steps // 10)),
        parallel=ParallelConfig(context_parallel_size=2),
    )


def _bytes() -> PreTrainedTokenizerFast:
    """One token a byte, and one each for the start and the end of a text."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={name: at for at, name in enumerate(names)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=names[0], eos_token=names[1])

"""Make the miniature from nothing: texts, tokenizer, rows, training. The trainer is the library's own.

Three kinds of rows of 512 tokens, each kept to its own document: prose, conversations, and questions about a passage
(`ultralong.data.chat.synthetic_qa`). No row of any kind is longer than the window, so nothing here practises what
the extension is to show.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    set_seed,
)

from ultralong.checkpoints.files import CARD
from ultralong.checkpoints.write import copy_weights, write_checkpoint
from ultralong.data.chat.pack import ChatSettings, pack_chat
from ultralong.data.chat.synthetic_qa import synthetic_qa_conversations
from ultralong.data.read.documents import Document
from ultralong.data.read.messages import Message
from ultralong.data.rows.packing import pack
from ultralong.data.rows.separators import PackSettings
from ultralong.data.tokens.tokenize import tokenize_corpus
from ultralong.miniature import WINDOW
from ultralong.miniature.tokenizer import train_tokenizer
from ultralong.training.config import DataSource, MemoryConfig, OptimizerConfig, TrainConfig
from ultralong.utils.files import write_text

SEED = 20_251
STEPS = 4000
QUESTIONS = 40_000  # about passages
ROPE_BASE = 10_000.0
# Shares of the rows drawn. Answers are a fraction of a conversation's tokens, hence the many rows with questions.
SHARES = {"text": 0.40, "chat": 0.15, "reading": 0.45}


def architecture(vocabulary: int, turn_end: int, padding: int) -> LlamaConfig:
    """The miniature's shape: 6 layers, hidden size 256, 4 query heads on 2 kv heads of size 64, tied head."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=turn_end,
        pad_token_id=padding,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
    )


def prepare_texts(
    documents: Sequence[Document],
    conversations: Sequence[list[Message]],
    out: str | os.PathLike[str],
) -> Path:
    """Train the tokenizer, write the three kinds of rows and the untrained model.

    Args:
        documents: Prose to learn from; whatever is kept for evaluation must not be among it.
        conversations: Short conversations.
        out: Folder to work in; finished parts are kept when called again.

    Returns:
        `out`.
    """
    out = Path(out)
    tokenizer = _tokenizer(documents, conversations, out / "tokenizer")
    store = tokenize_corpus(documents, tokenizer, out / "tokens")
    pack(store, tokenizer, out / "rows" / "text", PackSettings(length=WINDOW, mask_documents=True, seed=SEED))
    settings = ChatSettings(length=WINDOW, seed=SEED)
    pack_chat(conversations, tokenizer, out / "rows" / "chat", settings)
    texts = [document.text for document in documents]
    made = synthetic_qa_conversations(texts, tokenizer, count=QUESTIONS, max_tokens=WINDOW, seed=SEED)
    pack_chat(made, tokenizer, out / "rows" / "reading", settings)
    _untrained(tokenizer, out / "untrained")
    return out


def training(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> TrainConfig:
    """The run that trains the miniature from what `prepare_texts` left in `folder`: 65,536 tokens a step on one GPU."""
    folder = Path(folder)
    return TrainConfig(
        model=str(folder / "untrained"),
        out=str(out),
        data=tuple(DataSource(str(folder / "rows" / name), share) for name, share in SHARES.items()),
        steps=STEPS,
        global_batch_size=128,
        micro_batch_size=128,
        seed=SEED,
        dtype="bfloat16",
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=100, schedule="linear", final_ratio=0.02),
        memory=MemoryConfig(loss_tile=32_768),
    )


def finish(trained: str | os.PathLike[str], log: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Put the trained checkpoint where the package has it, in bfloat16, with its training log; a card there is kept.

    Args:
        trained: The folder `model` of the run.
        log: The run's `log.jsonl`; every 20th line is kept.
        out: The folder to write.
    """
    trained, out = Path(trained), Path(out)
    card = (out if (out / CARD).is_file() else trained) / CARD
    text = card.read_text(encoding="utf-8")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(trained / "model.safetensors").items()}

    def weights(folder: Path) -> None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    write_checkpoint(out, trained, weights, lambda folder: text, replace=True)
    lines = Path(log).read_text(encoding="utf-8").splitlines(keepends=True)
    write_text(out / "training_log.jsonl", "".join(lines[19::20]))


def _tokenizer(
    documents: Sequence[Document], conversations: Iterable[list[Message]], folder: Path
) -> PreTrainedTokenizerBase:
    if not (folder / "tokenizer.json").exists():
        texts = [document.text for document in documents]
        texts += [message["content"] for conversation in conversations for message in conversation]
        random.Random(SEED).shuffle(texts)
        train_tokenizer(texts, WINDOW).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _untrained(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    set_seed(SEED)
    model = LlamaForCausalLM(architecture(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    card = "# The miniature before its training\n"
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        write_checkpoint(folder, Path(made), copy_weights(Path(made)), lambda _: card, replace=True)

"""Text to token ids exactly as a tokenizer does it without special tokens, and a fingerprint of who did it.

Documents are data: a document that happens to contain the characters `<|eot_id|>` means these characters, not the
control token. So ids here equal `tokenizer(text, add_special_tokens=False, split_special_tokens=True)`, computed by the
fast tokenizer's own core, which is several times quicker than the call above because it skips masks and offsets.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ultralong.data.tokens.long_texts import LONG, Cuts, EncodeIds, cut_text
from ultralong.utils.hub import TOKENIZER_ERRORS, check_tokenizer, tokenizer_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS_AT_ONCE = 8
Encoder = Callable[[list[str]], list[np.ndarray]]


def load_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder on this machine: a checkpoint's, or one that holds nothing but a tokenizer.json.

    Raises:
        ValueError: The folder holds no tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Give the folder of a tokenizer or of a checkpoint.")
    check_tokenizer(folder)
    try:
        with tokenizer_errors("the tokenizers library refuses it"):
            if (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
                return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except TOKENIZER_ERRORS as error:
        raise ValueError(f"{folder} holds no tokenizer that transformers can open: {error}") from error


def token_dtype(vocabulary: int) -> np.dtype:
    """The smallest little-endian type for ids 0..vocabulary-1 that leaves its largest value free as "no token"."""
    return np.dtype("<u2") if vocabulary <= np.iinfo(np.uint16).max else np.dtype("<u4")


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids that a tokenizer may give: its pieces, or more where it leaves some out."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def make_encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """A function from a list of texts to their token ids; it holds its own copy of the tokenizer.

    Args:
        tokenizer: Any transformers tokenizer. A fast one encodes a batch on as many threads as it likes; a Python one
            works too, slowly.

    Returns:
        `encode(texts) -> list of (tokens,) arrays` of `token_dtype(len(tokenizer))`. Memory follows the ids, and a few
        parts of a long text: see `long_texts`.
    """
    dtype = token_dtype(vocabulary_of(tokenizer))
    encode, cuts = _ids_encoder(tokenizer), _safe_cuts(tokenizer)

    def short(texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, dtype) for ids in encode(texts)] if texts else []

    def encoded(texts: list[str]) -> list[np.ndarray]:
        # The ids of a long text are made part by part: what the tokenizer holds of a part is gone before the next.
        found = iter(short([text for text in texts if len(text) <= LONG]))
        return [next(found) if len(text) <= LONG else _encode_long(text, encode, dtype, cuts) for text in texts]

    return encoded


def _ids_encoder(tokenizer: PreTrainedTokenizerBase) -> EncodeIds:
    """A function from texts to lists of ids."""
    if not getattr(tokenizer, "is_fast", False):
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        # The warning about texts longer than the model is meant for models; here the text is cut into rows later.
        return lambda texts: [tokenizer(text, verbose=False, **options)["input_ids"] for text in texts]
    core = copy.deepcopy(tokenizer.backend_tokenizer)
    core.no_truncation()
    core.no_padding()
    core.encode_special_tokens = True

    def encode(texts: list[str]) -> list[list[int]]:
        with tokenizer_errors("the tokenizer fails at a text"):
            return [found.ids for found in core.encode_batch_fast(texts, add_special_tokens=False)]

    return encode


def _safe_cuts(tokenizer: PreTrainedTokenizerBase) -> Cuts:
    """Where a tokenizer's long texts may be cut: see `long_texts` for why a unigram model is another matter."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None or type(core.model).__name__ != "Unigram":
        return "anywhere"
    words = core.pre_tokenizer is not None and len(core.pre_tokenizer.pre_tokenize_str("a a")) > 1
    return "before spaces" if words else "nowhere"


def _encode_long(text: str, encode: EncodeIds, dtype: np.dtype, cuts: Cuts) -> np.ndarray:
    """The ids of a long text, from parts of it; a few at a time, so that the tokenizer's threads share the work."""
    ids: list[np.ndarray] = []
    parts = cut_text(text, encode, cuts=cuts)
    while group := list(islice(parts, PARTS_AT_ONCE)):
        found = encode([text[part.start - part.context : part.end] for part in group])
        ids += [np.array(own[part.context_ids :], dtype) for part, own in zip(group, found, strict=True)]
        del found
    return np.concatenate(ids)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Who turned text into these ids: enough to refuse shards made by another tokenizer.

    The fingerprint covers what decides the ids of plain text: vocabulary, merges, normaliser, pre-tokeniser and added
    tokens. It leaves out truncation, padding and the post-processor, which only acts when special tokens are asked for,
    and the class, which differs between ways of loading the same tokenizer.json.

    Returns:
        `{"class", "vocabulary", "sha256"}`; two tokenizers agree when `sha256` does.
    """
    if getattr(tokenizer, "is_fast", False):
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        model = dict(spec["model"])
        # Written as "a b" by older releases of tokenizers and as ["a", "b"] by newer ones.
        if "merges" in model:
            model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        content = [model, spec["added_tokens"], spec["normalizer"], spec["pre_tokenizer"]]
    else:
        content = [type(tokenizer).__name__, tokenizer.get_vocab(), sorted(map(str, tokenizer.all_special_tokens))]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {"class": type(tokenizer).__name__, "vocabulary": vocabulary_of(tokenizer), "sha256": digest}


def check_same_tokenizer(expected: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a tokenizer that is not the one `where` was made with.

    Raises:
        ValueError: The fingerprints differ.
    """
    found = tokenizer_fingerprint(tokenizer)
    if found["sha256"] != expected["sha256"]:
        raise ValueError(
            f"{where} was made with another tokenizer ({expected['class']}, {expected['vocabulary']:,} tokens, "
            f"{expected['sha256'][:12]}) than the one given ({found['class']}, {found['vocabulary']:,} tokens, "
            f"{found['sha256'][:12]}). Use the same tokenizer, or build it again in another folder."
        )

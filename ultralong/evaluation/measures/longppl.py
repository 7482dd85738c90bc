"""LongPPL: perplexity over the tokens that need the long context, after arXiv 2410.23771.

A mean over all tokens hides what a long window is for: most tokens are as easy with the last few thousand tokens as
with all of them. LongPPL counts key tokens alone (`key_tokens`); the paper finds r = -0.96 between it and long
benchmarks, where plain perplexity has next to none. Models are compared on the same key tokens, so one evaluator
chooses them for all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from ultralong.attention.collectives import Group
from ultralong.data.rows.packed_rows import IGNORE, PackedRows
from ultralong.data.rows.row_checks import check_vocabulary
from ultralong.evaluation.measures.intervals import bootstrap_ratio
from ultralong.evaluation.measures.key_tokens import By, KeyRule, Text, find_key_tokens, long_texts, read_long
from ultralong.evaluation.measures.perplexity import position_edges
from ultralong.evaluation.measures.result import Part, Result
from ultralong.inference.load import load_model
from ultralong.utils.environment import describe_environment
from ultralong.utils.local_ranks import run_ranks
from ultralong.utils.units import check_seed

ONE_PASS = 32768  # texts beyond this are read in chunks by one GPU
DAY = 24 * 3600.0  # seconds that ranks may take


def longppl_result(
    texts: Sequence[Text],
    keys: Sequence[np.ndarray],
    losses: Sequence[np.ndarray],
    rule: KeyRule,
    *,
    evaluator: str,
    seed: int = 0,
    level: float = 0.95,
) -> Result:
    """LongPPL with a bootstrap interval over documents, and by the key tokens' position in their text.

    Args:
        texts: The texts.
        keys: Their key tokens.
        losses: The measured model's losses.
        rule: How key tokens were chosen.
        evaluator: By which model.
        seed: Seed of the bootstrap.
        level: Confidence, two-sided.

    Returns:
        `value` is LongPPL, `n` counts key tokens; in `details`: `perplexity` over all `tokens` of the same texts, the
        `evaluator`, the `rule`, and `each`: document, nats and key tokens.

    Raises:
        ValueError: No text has a key token.
    """
    names, edges, sums, counts = _key_sums(texts, keys, losses)
    scored = [text.labels != IGNORE for text in texts]
    nats = sum(float(loss[here].sum()) for loss, here in zip(losses, scored, strict=True))
    tokens = sum(int(here.sum()) for here in scored)
    n = int(counts.sum())
    if not n:
        raise ValueError(
            f"{evaluator} finds no key token among {tokens:,}: the context beyond {rule.short_context:,} tokens "
            f"raises no log-likelihood by more than {rule.alpha:g} to above {rule.beta:g}. Take an evaluator that "
            "reads this far, longer texts, or milder thresholds."
        )
    whole = (sums.sum(1, keepdims=True), counts.sum(1, keepdims=True))
    (low,), (high,) = bootstrap_ratio(*whole, seed=seed, level=level)
    each = [[int(a), float(b), int(c)] for a, b, c in zip(names, whole[0][:, 0], whole[1][:, 0], strict=True) if c]
    details: dict[str, Any] = {
        "perplexity": math.exp(nats / tokens),
        "tokens": tokens,
        "documents": len(each),
        "evaluator": evaluator,
        "rule": asdict(rule),
        "each": each,
    }
    value = math.exp(sums.sum() / n)
    return Result(
        "longppl",
        "longppl",
        value,
        n,
        "",
        "key tokens",
        _exp(low),
        _exp(high),
        by_position=_by_position(sums, counts, edges, seed, level),
        details=details,
    )


def _key_sums(
    texts: Sequence[Text], keys: Sequence[np.ndarray], losses: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Documents, edges of position ranges, and the key tokens' nats and number, both (documents, ranges)."""
    names, place = np.unique([text.document for text in texts], return_inverse=True)
    edges = np.asarray(position_edges(max(len(text.labels) for text in texts)))
    sums, counts = np.zeros((2, len(names), len(edges) - 1))
    for key, loss, document in zip(keys, losses, place, strict=True):
        ranges = np.searchsorted(edges, np.flatnonzero(key), side="right") - 1
        np.add.at(sums[document], ranges, loss[key])
        np.add.at(counts[document], ranges, 1)
    return names, edges, sums, counts


def _by_position(sums: np.ndarray, counts: np.ndarray, edges: np.ndarray, seed: int, level: float) -> tuple[Part, ...]:
    """LongPPL of each range of positions that has key tokens; `sums` of nats and `counts` are (documents, ranges)."""
    lows, highs = bootstrap_ratio(sums, counts, seed=seed, level=level)
    return tuple(
        Part(
            math.exp(sums[:, i].sum() / counts[:, i].sum()),
            int(counts[:, i].sum()),
            _exp(lows[i]),
            _exp(highs[i]),
            start=int(edges[i]),
            end=int(edges[i + 1]),
            details={"rows": int((counts[:, i] > 0).sum())},
        )
        for i in range(len(edges) - 1)
        if counts[:, i].sum()
    )


def _exp(nats: float) -> float | None:
    return None if math.isnan(nats) else math.exp(nats)


def longppl(
    model: PreTrainedModel,
    rows: PackedRows,
    rule: KeyRule | None = None,
    *,
    evaluator: PreTrainedModel | None = None,
    evaluator_name: str | None = None,
    by: By = "document",
    most: int | None = None,
    chunk: int | None = None,
    group: Group | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Result:
    """LongPPL of a model on packed rows.

    Args:
        model: A causal language model with this library's attention; it is put into eval mode.
        rows: Packed rows, whose documents are long.
        rule: Which tokens are key tokens; None is the paper's.
        evaluator: The model that chooses them; None is `model` itself, and its number is then not comparable with
            another model's.
        evaluator_name: What the result calls it.
        by: `document` reads every document by itself, `row` a whole row as one text.
        most: Rows to use; None is all.
        chunk: Tokens of one pass over a text; None takes all at once.
        group: Ranks that share each text in one pass, each with the whole model; None is this one alone.
        seed: Seed of the bootstrap.
        quiet: True draws no progress bar.

    Raises:
        ValueError: As for `long_texts` and `longppl_result`; or the rows are of another vocabulary than a model's.
    """
    rule = rule or KeyRule()
    for name, reader in (("model", model), ("evaluator", evaluator)):
        if reader is None:
            continue
        check_vocabulary(rows, cast(nn.Embedding, reader.get_input_embeddings()).weight.shape[0], name)
    texts = long_texts(rows, rule, by, most)
    chosen = model if evaluator is None else evaluator
    keys, losses = find_key_tokens(chosen, texts, rule, chunk=chunk, group=group, quiet=quiet)
    if evaluator is not None:
        losses = read_long(model, texts, chunk=chunk, group=group, quiet=quiet)
    named = evaluator_name or ("the model itself" if evaluator is None else "the evaluator")
    return longppl_result(texts, keys, losses, rule, evaluator=named, seed=seed)


def measure_longppl(
    model: str | os.PathLike[str],
    rows: str | os.PathLike[str],
    *,
    evaluator: str | os.PathLike[str] | None = None,
    rule: KeyRule | None = None,
    by: By = "document",
    max_rows: int | None = 16,
    chunk: int | None = None,
    gpus: int = 1,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """What `ultralong eval longppl` does: open checkpoints, read rows, give JSON values.

    Args:
        model: Folder or hub id.
        rows: Folder of packed rows.
        evaluator: Folder or hub id of the model that chooses the key tokens; None is the model itself.
        rule: Which tokens are key tokens.
        by: See `longppl`.
        max_rows: Rows to use; None is all.
        chunk: Tokens of one pass over a text; None is all of it up to 32,768 tokens, and 16,384 of longer ones.
        gpus: GPUs that share each text; on a CPU, asked for by name, processes.
        device: `auto`, or any of torch's.
        seed: Seed of the interval.

    Returns:
        `model`, `rows_folder`, `environment`, and `result` (a `Result` as JSON values).

    Raises:
        ValueError: As for `longppl`; no such checkpoint; or fewer GPUs than asked for.
    """
    check_seed(seed)
    arguments = (str(model), str(rows), evaluator, rule, by, max_rows, chunk, device, seed)
    if gpus < 1 or (gpus > 1 and chunk is not None):
        raise ValueError(f"gpus must be 1 or more, and several read a text in one pass without chunk: found {gpus}.")
    if gpus == 1:
        found = _open_and_read(0, 1, *arguments)
    else:
        kind = "cuda" if device == "auto" or device.startswith("cuda") else "cpu"
        found = run_ranks(_open_and_read, gpus, *arguments, device=kind, timeout=DAY)[0]
    if isinstance(found, ValueError):
        raise found
    return {
        "model": str(model),
        "rows_folder": str(rows),
        "result": found.to_dict(),
        "environment": describe_environment(),
    }


def _open_and_read(
    rank: int,
    world: int,
    model: str,
    rows: str,
    evaluator: str | os.PathLike[str] | None,
    rule: KeyRule | None,
    by: By,
    most: int | None,
    chunk: int | None,
    device: str,
    seed: int,
) -> Result | ValueError:
    """One rank's part. What a user did wrong is the same on every rank, and is returned."""
    try:
        where = f"cuda:{torch.cuda.current_device()}" if world > 1 and device != "cpu" else device
        packed, reader = PackedRows(Path(rows)), load_model(model, where)
        other = None if evaluator is None or str(evaluator) == model else load_model(evaluator, where)
        return longppl(
            reader,
            packed,
            rule,
            evaluator=other,
            evaluator_name=str(model if other is None else evaluator),
            by=by,
            most=most,
            chunk=ONE_PASS // 2 if chunk is None and world == 1 and packed.length > ONE_PASS else chunk,
            group=dist.group.WORLD if world > 1 else None,
            seed=seed,
            quiet=rank > 0,
        )
    except ValueError as error:
        return error

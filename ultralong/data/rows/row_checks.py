"""Checks of the packed rows that one training run reads: together, and for what its settings do with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ultralong.data.rows.packed_rows import LARGEST_TOKEN, PackedRows
from ultralong.data.rows.short_contexts import LongCEConfig
from ultralong.utils.progress import progress

TOGETHER = "All sources of a run must share row length and document mask"


def check_rows(folders: Sequence[PackedRows], length: int | None, mixed: bool) -> None:
    """Refuse folders of rows that one run can't read together.

    Args:
        folders: The run's.
        length: Tokens that a row must have, the longest where they are mixed; None accepts any length.
        mixed: Rows of different lengths and masks are allowed.

    Raises:
        ValueError: One is empty, they differ in row length or document mask, or their length is not `length`.
    """
    for rows in folders:
        if not len(rows):
            raise ValueError(f"{rows.folder} holds no row. Pack more documents, or use a shorter row length.")
    kinds = {(rows.length, rows.mask_documents): rows.folder for rows in folders}
    if len(kinds) > 1 and not mixed:
        listed = "; ".join(f"{folder}: length {n}, document mask {mask}" for (n, mask), folder in kinds.items())
        raise ValueError(
            f"{TOGETHER}, found {listed}. Or let each row be shared "
            "by as many processes as it needs: --set parallel.dynamic_context_parallel=auto "
            "parallel.context_parallel_size=auto."
        )
    longest = max(folders, key=lambda rows: rows.length, default=None)
    if longest is not None and length not in (None, found := longest.length):
        raise ValueError(
            f"The config says length: {length}, the rows in {longest.folder} have {found} tokens. "
            f"Pack rows of {length} (ultralong pack ... --length {length}), or set length={found}."
        )


def check_room(folders: Sequence[PackedRows], most: int | None, ranks: int) -> None:
    """Refuse packs that have no room for the longest row.

    Args:
        folders: The run's.
        most: Most tokens of a pack on one process; None is as many as the longest row needs.
        ranks: Processes that share a pack.

    Raises:
        ValueError: A row is longer than a pack.
    """
    longest = max((rows.length for rows in folders), default=0)
    if most is not None and most * ranks < longest:
        raise ValueError(
            f"parallel.max_tokens_per_rank is {most:,} and parallel.context_parallel_size {ranks}: a row of "
            f"{longest:,} tokens has no room. --set parallel.max_tokens_per_rank={-(-longest // ranks)}."
        )


def check_skipping(folders: Sequence[PackedRows], to: int) -> None:
    """Refuse rows whose positions can't be skipped.

    Raises:
        ValueError: They are longer than `to`, of one token, or of documents that do not see each other.
    """
    for rows in folders:
        if rows.mask_documents or rows.restart_positions:
            raise ValueError(
                f"skip_positions_to cuts whole rows in two, and documents in {rows.folder} do not see each other. Pack "
                "them with mask_documents: false and positions: row, or leave skip_positions_to out."
            )
        if not 1 < rows.length <= to:
            raise ValueError(
                f"skip_positions_to is {to:,}, the rows in {rows.folder} have {rows.length:,} tokens: it must be as "
                "much or more, and a row 2 tokens at least."
            )


def longest_position(rows: PackedRows) -> int:
    """Positions that a folder's rows use: their length, or the longest document where each starts at 0 again."""
    return _longest_document(rows) if rows.restart_positions else rows.length


def _longest_document(rows: PackedRows) -> int:
    longest = 0
    for shard in rows.segments():
        ends = np.append(shard[1:, 1], 0)
        ends[np.append(shard[1:, 0] != shard[:-1, 0], True)] = rows.length
        longest = max(longest, int((ends - shard[:, 1]).max(initial=0)))
    return longest


def anchor_token(folders: Sequence[PackedRows], config: Any) -> int:
    """The token that documents which do not see each other share: the BOS of the model.

    Args:
        folders: The rows.
        config: The text config of the model.

    Raises:
        ValueError: No documents are masked, or the model names no BOS token.
    """
    if not any(rows.mask_documents for rows in folders):
        raise ValueError(
            f"anchor shares a token among documents that do not see each other, and those in {folders[0].folder} do: "
            "pack them with mask_documents: true, or set anchor=false."
        )
    if not isinstance(config.bos_token_id, int):
        raise ValueError(f"anchor needs a BOS token, and the model's config has bos_token_id {config.bos_token_id!r}.")
    return config.bos_token_id


def check_vocabulary(rows: PackedRows, size: int, name: str = "model") -> None:
    """Refuse rows with a token that a model does not have.

    A tokenizer may know more than its model has, as Gemma 3's does a token of images: the manifest then says which is
    the largest in the rows. Rows of earlier versions, whose manifest does not, are read through.

    Args:
        rows: The rows.
        size: Tokens that the model has an embedding of.
        name: What the model is called.

    Raises:
        ValueError: There is such a token.
    """
    vocabulary = rows.manifest["tokenizer"]["vocabulary"]
    if vocabulary <= size:
        return
    largest: Iterable[int] = [shard.get(LARGEST_TOKEN) for shard in rows.manifest["shards"]]
    if not all(type(token) is int for token in largest):
        every = progress(
            (rows[place] for place in range(len(rows))), total=len(rows), desc="tokens", unit="row", delay=2.0
        )
        largest = (int(max(row.input_ids.max(), row.labels.max())) for row in every)
    found = next((token for token in largest if token >= size), None)
    if found is not None:
        raise ValueError(
            f"{rows.folder} was tokenised with a vocabulary of {vocabulary} tokens and holds token {found}, the {name} "
            f"has {size}. Pack the documents with its own tokenizer."
        )


def check_long_ce(folders: Sequence[PackedRows], weights: LongCEConfig) -> str:
    """Refuse rows in which LongCE would weigh nothing; returns what it weighs.

    Raises:
        ValueError: Their texts are no longer than a short context and its stride.
    """
    reached = {_longest_document(rows) if rows.mask_documents else rows.length: rows for rows in folders}
    reach, rows = max(reached.items(), key=lambda item: item[0])
    if reach < weights.shortest:
        text = "Documents, which see no other," if rows.mask_documents else "Rows"
        raise ValueError(
            f"{text} have up to {reach:,} tokens in {rows.folder}, and long_ce weighs what stands in "
            f"{weights.shortest:,} (short_context and stride) or more: nothing would be weighted. Set "
            "long_ce.short_context and long_ce.stride lower, or long_ce.weight_cap=0."
        )
    return f"targets behind {weights.short_context:,} tokens and more are weighted by up to {weights.weight_cap:g}"

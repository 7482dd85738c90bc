"""How documents are joined into rows: the settings, and the token ids that they come to with a given tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ultralong.utils.units import check_length, check_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PackSettings:
    """How documents become rows. The defaults are the recipe's.

    Attributes:
        length: Tokens per row, T.
        join: What stands between documents: "separator", "none" or "bos_eos".
        separator: The separator's text, encoded alone; used by join="separator".
        mask_documents: True keeps attention and labels inside each document.
        positions: "row" counts 0..T-1 over the row, "document" starts again at each document, "auto" is "document" with
            `mask_documents` and "row" without.
        long_documents: "split" lets a document of more than T tokens run over several rows, "drop" leaves it out.
        row_end: What becomes of a document that a row's end cuts: "continue" puts the rest into the next row, "drop"
            leaves the rest out and counts it. Every row then starts with a document's first token, and no question in a
            row asks for what only the row before told.
        tail: The last row that the stream does not fill: "drop" it or "pad" it. Counted either way.
        shuffle: True takes the documents in a pseudo-random order, False in the store's.
        seed: Names that order; 0 or more and below 2**32.
    """

    length: int
    join: Literal["separator", "none", "bos_eos"] = "separator"
    separator: str = "<s>"
    mask_documents: bool = False
    positions: Literal["auto", "row", "document"] = "auto"
    long_documents: Literal["split", "drop"] = "split"
    row_end: Literal["continue", "drop"] = "continue"
    tail: Literal["drop", "pad"] = "drop"
    shuffle: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(f"length must be at least 2 tokens, found {self.length}.")
        check_length("length", self.length)
        check_seed(self.seed)
        choices = {
            "join": ("separator", "none", "bos_eos"),
            "positions": ("auto", "row", "document"),
            "long_documents": ("split", "drop"),
            "row_end": ("continue", "drop"),
            "tail": ("drop", "pad"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, found {getattr(self, name)!r}.")


@dataclass(frozen=True)
class Separators:
    """Token ids around documents: `before` and `after` each one, `between` two, `padding` where a row ends early."""

    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    padding: int = 0


def resolve_separators(settings: PackSettings, tokenizer: PreTrainedTokenizerBase) -> Separators:
    """Turn the setting of what stands between documents into token ids.

    Raises:
        ValueError: The separator gives no token, or the tokenizer lacks the BOS or EOS that was asked for.
    """
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    padding = next((token for token in (pad, eos, bos) if token is not None), 0)
    if settings.join == "none":
        return Separators(padding=padding)
    if settings.join == "bos_eos":
        if bos is None or eos is None:
            raise ValueError(f"join is bos_eos, but the tokenizer has BOS {bos} and EOS {eos}. Choose another.")
        return Separators(before=(bos,), after=(eos,), padding=padding)
    between = tuple(tokenizer.encode(settings.separator, add_special_tokens=False))
    if not between:
        if not tokenizer.encode("a b", add_special_tokens=False):  # transformers makes an empty one for some models
            raise ValueError(
                f"{tokenizer.name_or_path} gives no token for any text: it holds no tokenizer. Copy the files of the "
                "model's own there, such as tokenizer.json and tokenizer_config.json."
            )
        raise ValueError(f"the separator {settings.separator!r} gives no token. Choose another, or join none.")
    return Separators(between=between, padding=padding)

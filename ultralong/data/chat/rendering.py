"""A conversation as its chat template writes it: text, tokens, and the tokens of its beginnings."""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ultralong.data.read.messages import REASONING, Message
from ultralong.utils.chat_template import apply_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any) -> Any:
    """Render with the template; what the template itself refuses (roles out of turn, say) is a ValueError too."""
    from jinja2 import TemplateError

    try:
        return apply_chat_template(tokenizer, [_for_template(message) for message in messages], **options)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses it: {error}") from error


def _for_template(message: Message) -> dict[str, str]:
    """What a template is given: reasoning under both names that templates know it by."""
    reasoning = {name: message[REASONING] for name in (REASONING, "thinking") if REASONING in message}
    return {"role": message["role"], "content": message["content"], **reasoning}


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Every token that the tokenizer reads as a control token when it meets its text."""
    return _added(tokenizer, len(tokenizer))[0]


@lru_cache(maxsize=16)
def _added(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[tuple[str, ...], frozenset[int]]:
    """Texts of the control tokens; ids of all added tokens but those of white space, as some add line breaks.

    A tokenizer makes its list anew whenever it is asked: of Gemma's 6,400 that takes longer than a conversation.

    Args:
        tokenizer: Has them.
        size: Of its vocabulary, which grows when tokens are added.
    """
    added = tokenizer.added_tokens_decoder
    control = tuple(sorted({what.content for what in added.values() if what.special}))
    return control, frozenset(token for token, what in added.items() if what.content.strip())


def added_places(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Places of added tokens that are more than white space."""
    added = _added(tokenizer, len(tokenizer))[1]
    return [place for place, token in enumerate(ids) if token in added]


class Whole:
    """A conversation's tokens, and how many of them a beginning of its text is.

    A tokenizer cuts at control tokens before all else, so of a beginning only what follows its last control token has
    to be encoded again. To encode every beginning takes as long as all turns times all tokens.

    Args:
        tokenizer: Has a chat template.
        messages: The conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> None:
        self._tokenizer = tokenizer
        self.ids: list[int] = render(tokenizer, messages, tokenize=True)
        self.added = added_places(tokenizer, self.ids)
        self._text, self._ends = "", list[int]()
        if tokenizer.is_fast:
            text = render(tokenizer, messages, tokenize=False)
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            if encoded["input_ids"] == self.ids:
                self._text, self._ends = text, [end for _, end in encoded["offset_mapping"]]
        self._control = frozenset(control_tokens(tokenizer))
        self._cuts = [place for place in self.added if self._is_cut(place)]

    def begins_with(self, messages: list[Message], **options: Any) -> int | None:
        """Tokens of these first messages; None where the conversation does not begin with them, token for token."""
        text = render(self._tokenizer, messages, tokenize=False, **options)
        if self._text.startswith(text) and (found := self._by_its_end(text)) is not None:
            return found
        ids = render(self._tokenizer, messages, tokenize=True, **options)
        return len(ids) if self.ids[: len(ids)] == ids else None

    def _is_cut(self, place: int) -> bool:
        """Whether an added token is a control token as it is spelled; one for what is unknown cuts nothing."""
        if place >= len(self._ends):
            return False
        spelled, end = self._tokenizer.convert_ids_to_tokens(self.ids[place]), self._ends[place]
        return spelled in self._control and self._text[end - len(spelled) : end] == spelled

    def _by_its_end(self, text: str) -> int | None:
        """Tokens of a beginning of the text, from its last control token; None where that does not tell."""
        behind = bisect_right(self._cuts, len(text), key=lambda place: self._ends[place])
        if not behind:
            return None
        cut = self._cuts[behind - 1]
        rest = self._tokenizer(text[self._ends[cut] :], add_special_tokens=False, verbose=False)["input_ids"]
        tokens = cut + 1 + len(rest)
        return tokens if self.ids[cut + 1 : tokens] == rest and self._ends[tokens - 1] == len(text) else None

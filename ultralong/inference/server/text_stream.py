"""Text of an answer as its tokens come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ultralong.inference.engines import as_text

BROKEN = "\ufffd"  # what a decoder writes for a character whose bytes have not all come


class TextStream:
    """Turns tokens into text piece by piece.

    The pieces together are what the tokens decode to at once, cut before the first stop string.

    Args:
        tokenizer: Decodes; special tokens are left out.
        stop: Strings that end the text, and are not part of it.

    Attributes:
        stopped: A stop string has come; nothing is taken any more.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._tokens: list[int] = []
        self._start = self._read = 0  # a window of tokens: decoding the last ones alone would lose a leading space
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one token; the text that is now certain, which may be none."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        before, now = self._decode(self._start, self._read), self._decode(self._start, len(self._tokens))
        if len(now) <= len(before) or now.endswith(BROKEN):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return self._certain(now[len(before) :])

    def finish(self) -> str:
        """The text that was held back."""
        if self.stopped:
            return ""
        before, now = self._decode(self._start, self._read), self._decode(self._start, len(self._tokens))
        self._start = self._read = len(self._tokens)
        piece = self._certain(now[len(before) :])
        rest, self._held = ("" if self.stopped else self._held), ""
        return piece + rest

    def _decode(self, start: int, end: int) -> str:
        return as_text(self._tokenizer, self._tokens[start:end])

    def _certain(self, piece: str) -> str:
        """What of the text held back and the new piece can be no part of a stop string."""
        text = self._held + piece
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters are the first ones of a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

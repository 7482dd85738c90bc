"""One conversation to token ids and a loss mask, by the tokenizer's own chat template.

Only what the assistant says is learned, up to and with the token that ends its turn: that token is where generation
stops. Two exact ways to find it, and no guess:
* A template with `{% generation %}` marks says so itself. Where its marks end before the turn does, its end is added.
* Otherwise the conversation is rendered up to the assistant's turn with the generation prompt, which is what the model
  will see when it is used, and once more with the turn. Both have to be prefixes, token by token, of the whole
  conversation; a template that rewrites earlier turns (some drop old reasoning) fails this and is refused, but
  for conversations of which the last answer alone is learned (`ChatSettings.each_answer`).

What ends a turn is found out by rendering a short answer: it is what the template writes behind it. A template that
writes nothing there cannot be used, for a model trained with it would not learn to stop.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ultralong.data.chat.rendering import Whole, added_places, control_tokens, render
from ultralong.data.read.messages import REASONING, Message, check_messages, is_learned

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
QUESTION, ANSWER = "Where is the number?", "The number is 7391."


class UnusableTemplate(ValueError):
    """No conversation at all can be encoded with this template."""


@dataclass(frozen=True)
class TurnEnd:
    """What a template writes behind an answer.

    Attributes:
        text: All of it.
        ids: Its tokens, up to and with the last control token; all of them where it holds none.
        controls: How many control tokens are among them; 0 for an end in plain text.
        rest: How many tokens follow, which open the next turn and are never generated.
    """

    text: str
    ids: tuple[int, ...]
    controls: int
    rest: int


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> tuple[list[int], list[int]]:
    """One conversation as token ids and, for each token, 1 where the model is to learn to produce it.

    Args:
        tokenizer: Must have a chat template.
        messages: `{"role", "content"}` each, at least one of them the assistant's; see `read.messages` for more keys.

    Returns:
        `(input_ids, loss_mask)` of equal length. `loss_mask[t]` speaks of token t itself, not yet of the shifted
        target. A turn with a loss has one on the token that ends it.

    Raises:
        UnusableTemplate: There is no template, or one under which no answer has an end.
        ValueError: A message without role or content; no or an empty answer; a control token inside a message; or a
            template under which the assistant's tokens cannot be told exactly.
    """
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    if template is None:
        raise UnusableTemplate("the tokenizer has no chat template. Set one, or use a tokenizer that has one.")
    check_messages(messages, control_tokens(tokenizer))
    end = turn_end(tokenizer, template)
    _check_written(messages, render(tokenizer, messages, tokenize=False))
    if GENERATION_MARK.search(template):
        return _encode_by_marks(tokenizer, messages, end)
    return _encode_by_prefixes(tokenizer, messages, end)


def _check_written(messages: list[Message], whole: str) -> None:
    """Refuse a conversation of which the template leaves something out, as many do with roles they don't know."""
    for message in messages:
        if REASONING in message and message[REASONING].strip() not in whole:
            raise ValueError("reasoning that the chat template leaves out")
        text = message["content"].strip()
        # Some templates write what a tool says as JSON.
        if text not in whole and not any(
            json.dumps(text, ensure_ascii=ascii)[1:-1] in whole for ascii in (True, False)
        ):
            what = "a part of an answer" if message["role"] == "assistant" else f"a {message['role']} message"
            raise ValueError(f"{what} that the chat template leaves out or rewrites")


@lru_cache(maxsize=16)
def turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> TurnEnd:
    """What the template writes behind an answer.

    Args:
        tokenizer: Has the template.
        template: Its chat template, which the result is remembered for.

    Raises:
        UnusableTemplate: The template refuses a question with an answer, leaves the answer out, or ends it by nothing.
    """
    talk: list[Message] = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    try:
        text = render(tokenizer, talk, tokenize=False)
    except ValueError:
        try:
            text = render(tokenizer, [{"role": "system", "content": "Answer."}, *talk], tokenize=False)
        except ValueError as error:
            raise UnusableTemplate(f"{str(error).rstrip('.')}, though it is a question with an answer.") from error
    _, found, behind = text.rpartition(ANSWER)
    if not found:
        raise UnusableTemplate("the chat template does not write an answer as it is. Use one that does.")
    if not behind.strip():
        raise UnusableTemplate(
            "the chat template writes nothing behind an answer that ends it (in some, the next turn's role does), so a "
            "model could not learn to stop. Use a template that ends every answer by a token."
        )
    ids = list(tokenizer(behind, add_special_tokens=False)["input_ids"])
    places = added_places(tokenizer, ids)
    size = places[-1] + 1 if places else len(ids)
    return TurnEnd(behind, tuple(ids[:size]), len(places), len(ids) - size)


def _encode_by_marks(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], end: TurnEnd
) -> tuple[list[int], list[int]]:
    encoded = render(tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, marks = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    if not any(marks):
        raise ValueError("the chat template's generation marks cover none of the assistant's tokens")
    edges = np.flatnonzero(np.diff([0, *marks, 0])).tolist()
    turns: list[tuple[int, int]] = []
    first = None
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        first = start if first is None else first
        closed = _closed(tokenizer, ids, start, stop, end)
        if closed is not None:
            turns.append((first, closed))
            first = None
    answers = [message for message in messages if message["role"] == "assistant"]
    if first is not None or len(turns) != len(answers):
        raise ValueError(
            f"the chat template's generation marks give {len(turns)} of {len(answers)} answers an end to be learned"
        )
    mask = [0] * len(ids)
    for (start, stop), answer in zip(turns, answers, strict=True):
        if is_learned(answer):
            mask[start:stop] = marks[start:stop]
            tail = _tail_of(ids, stop, end)
            mask[tail:stop] = [1] * (stop - tail)
    return ids, mask


def _closed(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int, stop: int, end: TurnEnd) -> int | None:
    """Where the turn that is marked from `start` to `stop` ends with its end; None when that does not stand there."""
    if not end.controls:
        return stop if _text(tokenizer, ids[start:stop]).endswith(end.text.strip()) else None
    last = end.ids[-1]
    # Marked too, perhaps with the line break behind it; or it follows the marks, wholly or from its middle on.
    for place in range(stop - 1, max(start, stop - 1 - end.rest) - 1, -1):
        if ids[place] == last and not added_places(tokenizer, ids[place + 1 : stop]):
            return stop
    for marked in range(len(end.ids)):
        if tuple(ids[stop - marked : stop + len(end.ids) - marked]) == end.ids:
            return stop + len(end.ids) - marked
    return None


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).rstrip()


def _tail_of(ids: list[int], stop: int, end: TurnEnd) -> int:
    """Where the end's tokens begin that stand before `stop`; `stop` when what stands there is another thing."""
    begin = stop - len(end.ids)
    return begin if begin >= 0 and tuple(ids[begin:stop]) == end.ids else stop


def _encode_by_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], end: TurnEnd
) -> tuple[list[int], list[int]]:
    whole = Whole(tokenizer, messages)
    ids, mask = whole.ids, [0] * len(whole.ids)
    for turn, message in enumerate(messages):
        if not is_learned(message):
            continue
        if turn == 0:
            raise ValueError("begins with an answer, before which the chat template has nothing to render")
        start = whole.begins_with(messages[:turn], add_generation_prompt=True)
        stop = whole.begins_with(messages[: turn + 1])
        if start is None or stop is None:
            raise ValueError(_why_not(tokenizer, messages, turn))
        if end.controls:
            # Counted from the end: the answer may hold added tokens of its own.
            places = whole.added[: bisect_left(whole.added, stop)][-end.controls :]
            wanted = [end.ids[place] for place in added_places(tokenizer, list(end.ids))]
            if [ids[place] for place in places] != wanted or places[0] < start:
                raise ValueError("the chat template does not end this answer as it ends others")
            # What follows the end-of-turn token (often a line break) opens the next turn and is never generated.
            stop = places[-1] + 1
        elif not _text(tokenizer, ids[max(0, stop - len(end.ids) - 8) : stop]).endswith(end.text.strip()):
            raise ValueError("the chat template does not end this answer as it ends others")
        mask[start:stop] = [1] * (stop - start)
    return ids, mask


def _why_not(tokenizer: PreTrainedTokenizerBase, messages: list[Message], turn: int) -> str:
    """Why a turn's tokens cannot be told apart: is the text already different, or only where tokens are cut?"""
    whole = render(tokenizer, messages, tokenize=False)
    before = render(tokenizer, messages[:turn], tokenize=False, add_generation_prompt=True)
    upto = render(tokenizer, messages[: turn + 1], tokenize=False)
    if whole.startswith(before) and whole.startswith(upto):
        if messages[turn]["content"] != messages[turn]["content"].strip():
            return "an answer's edge merges with the template's text into one token (strip the answer's white space)"
        return "the template's text and the answer merge into one token where they meet, so the prompt is cut otherwise"
    history = render(tokenizer, messages[:turn], tokenize=False)
    if whole.startswith(history) and before.startswith(history):
        same = next((place for place, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole))
        opened = before[same:].strip()
        if opened:
            return (
                f"the chat template's generation prompt ends in {opened!r}, and the answer does not begin with it "
                "(such a template is for answers with reasoning)"
            )
    return (
        "the chat template rewrites earlier turns (packing.each_answer: true makes an example of every answer, with "
        "the turns before it)"
    )

"""Chat templates rendered the same way every day, within limits of time and memory.

Some templates (Llama 3.2, Granite) write today's date through `strftime_now`. Rows, prompts and their lengths would
then change from one day to the next. Here the clock stands at one date: the one that Llama 3's templates fall back to
where there is no clock.
"""

from __future__ import annotations

import functools
import itertools
import re
import secrets
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ultralong.utils.template_renderer import render_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a template has written, in pieces, with the marks of what the model generates.
PIECES = (
    "{%- for text, marked in pieces %}{% if marked %}{% generation %}{{ text }}{% endgeneration %}"
    "{% else %}{{ text }}{% endif %}{% endfor %}"
)
DATE = "2024-07-26"
CLOCK = "strftime_now"
# That date at midnight, UTC, in every directive of strftime, spelled as in the C locale.
_DIRECTIVES = {
    "%c": "Fri Jul 26 00:00:00 2024",
    "%x": "07/26/24",
    "%X": "00:00:00",
    "%D": "07/26/24",
    "%F": DATE,
    "%a": "Fri",
    "%A": "Friday",
    "%w": "5",
    "%u": "5",
    "%d": "26",
    "%-d": "26",
    "%e": "26",
    "%j": "208",
    "%b": "Jul",
    "%h": "Jul",
    "%B": "July",
    "%m": "07",
    "%-m": "7",
    "%y": "24",
    "%Y": "2024",
    "%G": "2024",
    "%U": "29",
    "%W": "30",
    "%V": "30",
    "%C": "20",
    "%H": "00",
    "%-H": "0",
    "%I": "12",
    "%-I": "12",
    "%p": "AM",
    "%M": "00",
    "%-M": "0",
    "%S": "00",
    "%-S": "0",
    "%f": "000000",
    "%z": "+0000",
    "%Z": "UTC",
    "%s": "1721952000",
    "%T": "00:00:00",
    "%R": "00:00",
    "%n": "\n",
    "%t": "\t",
}


def uses_clock(template: str) -> bool:
    """Whether a chat template asks for the date or time."""
    return CLOCK in template


def with_fixed_date(template: str) -> str:
    """The template with a `strftime_now` of its own that says the same on every day; others come back as they are."""
    if not uses_clock(template):
        return template
    # A percent sign that is written twice is set aside first, so that what follows it is no directive.
    replaced = "".join(f"|replace({code!r},{text!r})" for code, text in _DIRECTIVES.items())
    macro = f"{{%- macro {CLOCK}(format) %}}{{{{ format|replace('%%','\\0'){replaced}|replace('\\0','%') }}}}"
    # The empty expression keeps a line break at the template's start, which a block before it would take away.
    return f"{macro}{{%- endmacro %}}{{{{ '' }}}}{template}"


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> str:
    """A conversation's text under the tokenizer's template; what it says of the date is today's.

    Args:
        tokenizer: Has a chat template, and the control tokens that templates may ask for.
        messages: The conversation.
        **options: `add_generation_prompt`, and variables of the template.

    Raises:
        jinja2.TemplateError: The template refuses the conversation.
        ValueError: It takes too long or too much memory.
    """
    template = tokenizer.get_chat_template()
    return render_template(template, messages, **{**tokenizer.special_tokens_map, **options})[0]


def apply_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    tokenize: bool = True,
    add_generation_prompt: bool = False,
    return_dict: bool = False,
    return_assistant_tokens_mask: bool = False,
) -> Any:
    """`tokenizer.apply_chat_template` with the date fixed; without `return_dict` it gives ids or text alone.

    The template runs in a process of its own, and the tokenizer gets what it wrote.

    Args:
        tokenizer: Has a chat template.
        messages: The conversation.
        tokenize: False gives the text.
        add_generation_prompt: Open the assistant's next turn.
        return_dict: As of the tokenizer's own method.
        return_assistant_tokens_mask: As of the tokenizer's own method.

    Raises:
        jinja2.TemplateError: The template refuses the conversation.
        ValueError: It takes too long or too much memory; templates come with other people's checkpoints.
    """
    template = with_fixed_date(tokenizer.get_chat_template())
    options = {"add_generation_prompt": add_generation_prompt, **tokenizer.special_tokens_map}
    if return_assistant_tokens_mask:
        options["return_assistant_tokens_mask"] = True
    text, marks = render_template(template, messages, **options)
    if not tokenize:
        return text
    edges = sorted({0, len(text), *(edge for mark in marks for edge in mark)})
    pieces = [
        (text[begin:end], any(first <= begin and end <= last for first, last in marks))
        for begin, end in itertools.pairwise(edges)
    ]
    return tokenizer.apply_chat_template(
        messages,
        chat_template=PIECES,
        pieces=pieces,
        return_dict=return_dict,
        return_assistant_tokens_mask=return_assistant_tokens_mask,
        tokenizer_kwargs={"verbose": False},  # a conversation that is longer than the model's window is no fault here
    )


@functools.lru_cache(maxsize=8)
def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """What matches any control token as it is spelled; None where a tokenizer has none."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    spelled = sorted(filter(None, added | set(tokenizer.all_special_tokens)), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, spelled))) if spelled else None


def text_ids(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    add_special_tokens: bool = True,
    split_special_tokens: bool | None = None,
) -> list[int]:
    """Ids of a text of any length, as the tokenizer's call gives them.

    A fast tokenizer's core is asked for nothing else: it is two to three times quicker, and to free the pieces and
    offsets of a million tokens, which the call makes too, holds all threads of the process for 0.2 s.

    Args:
        tokenizer: Any tokenizer; used by nobody else meanwhile.
        text: The text.
        add_special_tokens: As of the call.
        split_special_tokens: As of the call; None does as the tokenizer is set to.
    """
    if not getattr(tokenizer, "is_fast", False):
        options = {} if split_special_tokens is None else {"split_special_tokens": split_special_tokens}
        found: Any = tokenizer(text, verbose=False, add_special_tokens=add_special_tokens, **options)["input_ids"]
        return list(found)
    core: Any = tokenizer.backend_tokenizer
    core.no_truncation()
    core.no_padding()
    core.encode_special_tokens = (
        tokenizer.split_special_tokens if split_special_tokens is None else split_special_tokens
    )
    ids: list[int] = core.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    return ids


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    render: Callable[[list[dict[str, str]]], str],
    most: int | None = None,
) -> list[int]:
    """Ids of a rendered conversation: the template's control tokens are control tokens, those in messages stay text.

    Otherwise whoever writes a message could end his turn and speak as another role.

    Args:
        tokenizer: Any tokenizer.
        messages: Turns, each with `role` and `content`.
        render: Gives the conversation as the template writes it.
        most: Ids that are of use; once there are more, those so far are returned, as each control token that is text is
            encoded by itself, and a message may hold millions.
    """
    pattern = control_tokens(tokenizer)
    spelled: list[str] = []
    mark = f"\u2402{secrets.randbelow(10**18)}\u2403"  # which nobody can have spelled

    def set_aside(match: re.Match[str]) -> str:
        spelled.append(match[0])
        return f"{mark}{len(spelled) - 1}\u2404"

    if pattern is not None:
        messages = [{**message, "content": pattern.sub(set_aside, message["content"])} for message in messages]
    ids: list[int] = []
    for text, split in _pieces(render(messages), mark, spelled):
        ids += text_ids(tokenizer, text, add_special_tokens=False, split_special_tokens=split)
        if most is not None and len(ids) > most:
            break
    return ids


def _pieces(text: str, mark: str, spelled: list[str]) -> Iterator[tuple[str, bool]]:
    """What stands between marks, and what was set aside for each, also where a template says a message twice.

    One by one: to split a text at a million marks at once would hold all other threads.
    """
    last = 0
    for match in re.finditer(f"{mark}([0-9]+)\u2404", text) if spelled else ():
        yield text[last : match.start()], False
        yield spelled[int(match[1])], True
        last = match.end()
    yield text[last:], False

"""Chat templates rendered the same way every day.

Some templates (Llama 3.2, Granite) write today's date through `strftime_now`. Rows, prompts and their lengths would
then change from one day to the next. Here the clock stands at one date: the one that Llama 3's templates fall back to
where there is no clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def apply_chat_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> Any:
    """`tokenizer.apply_chat_template` with the date fixed; without `return_dict` it gives ids or text alone.

    Args:
        tokenizer: Has a chat template.
        messages: The conversation.
        **options: As for the tokenizer's own method.
    """
    template = tokenizer.get_chat_template()
    return tokenizer.apply_chat_template(
        messages, chat_template=with_fixed_date(template), **{"return_dict": False, **options}
    )

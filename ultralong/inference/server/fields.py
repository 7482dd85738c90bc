"""Types of options: what they take of JSON, which is less than pydantic takes for the same types."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

MOST_STOPS = 16
LONGEST_STOP = 1024  # characters; what the model has said is compared with every beginning of each


def _whole(text: str) -> str:
    try:
        text.encode()  # a loop over the letters of a long text keeps all others waiting
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no character") from None
    return text


def number(value: Any) -> Any:
    """A number as JSON has them."""
    if isinstance(value, bool | str):  # which pydantic would take for a number
        raise ValueError("Input should be a number")
    return value


def flag(value: Any) -> Any:
    """A truth value as JSON has them."""
    if not isinstance(value, bool):
        raise ValueError("Input should be true or false")
    return value


def _texts(given: dict[str, Any]) -> dict[str, Any]:
    if not all(isinstance(value, str) for value in given.values()):  # of millions, pydantic would name each
        raise ValueError("Input should be an object of strings")
    return given


Text = Annotated[str, AfterValidator(_whole)]  # JSON can spell what no text holds
Number = Annotated[float, BeforeValidator(number)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(number)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63), BeforeValidator(number)]
Flag = Annotated[bool, BeforeValidator(flag)]
_stop = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
_stops = {"type": "array", "items": _stop, "maxItems": MOST_STOPS}
# Without `fail_fast` each of millions of entries has an error of its own, which takes minutes and gigabytes.
_Listed = Annotated[list[Text], Field(fail_fast=True), WithJsonSchema(_stops)]
Stop = Annotated[Text, WithJsonSchema(_stop)] | _Listed  # how many, and how long: see `_Request.stops`
Ids = Annotated[list[int], Field(fail_fast=True)]
_pairs = {"type": "object", "additionalProperties": {"type": "string"}}
Texts = Annotated[dict[str, Any], AfterValidator(_texts), WithJsonSchema(_pairs)]

"""Requests of OpenAI's chat and completions routes: what is understood, and what is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from jinja2 import TemplateError
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from transformers import PreTrainedTokenizerBase

from ultralong.inference.decoding import Sampling
from ultralong.inference.server.fields import (
    LONGEST_STOP,
    MOST_STOPS,
    Flag,
    Ids,
    Number,
    Positive,
    Seed,
    Stop,
    Text,
    Texts,
    flag,
    number,
)
from ultralong.inference.server.tickets import Job, Refused
from ultralong.utils.chat_template import conversation_ids, render_chat, text_ids

CHARACTERS = 8  # of a token; few texts have more
CUT = 64  # tokens that a text may have less than its beginning, which is cut anywhere
# Options that this server lacks, at the values at which they ask for nothing: many clients send all that they know.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    # Of vLLM's and SGLang's own.
    "top_k": (0, -1),
    "min_p": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    # Of a turn that a server gave.
    "tool_calls": ([],),
    "annotations": ([],),
}


def _no_echo(value: Any) -> Any:
    if value is not False:
        raise ValueError("a prompt is not given back, with its log probabilities or without: no loglikelihood here")
    return value


def _asks(key: str, value: Any) -> bool:
    """Whether an option asks for something; a whole number is no truth value, though Python says 0 == False."""
    return value is not None and all(type(value) is not type(one) or value != one for one in NEUTRAL.get(key, ()))


def _with_neutral(schema: dict[str, Any]) -> None:
    """Say in a model's schema that null is taken for what may be left out, and what asks for nothing."""
    for key, found in schema["properties"].items():
        if key not in schema.get("required", ()):
            schema["properties"][key] = {"anyOf": [found, {"type": "null"}]}
    neutral = {key: {"enum": [*values, None]} for key, values in NEUTRAL.items()}
    schema["properties"] = {**neutral, **schema["properties"]}
    # Everything else that is null is left out, too.
    schema["additionalProperties"] = {"type": "null"}


class _Given(BaseModel):
    # What this server does not know is refused: an option without effect would give another answer than was asked for.
    model_config = ConfigDict(extra="forbid", json_schema_extra=_with_neutral)

    @model_validator(mode="before")
    @classmethod
    def without_neutral(cls, given: Any) -> Any:
        """What was given without null, which OpenAI takes for what is left out, and what asks for nothing."""
        if not isinstance(given, dict):
            return given
        known = {field.alias or name for name, field in cls.model_fields.items()}
        asked = {key: value for key, value in given.items() if _asks(key, value)}
        unknown = [key for key in asked if key not in known]
        for key in unknown[1:]:  # the first one is refused: millions of errors take minutes and gigabytes
            del asked[key]
        return asked


class Part(_Given):
    """A part of a message; text is the only kind."""

    type: Literal["text"]
    text: Text


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(_Given):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Part], Field(fail_fast=True), BeforeValidator(_parts, json_schema_input_type=str | list[Part])
    ]
    name: Text | None = None

    def plain(self) -> dict[str, str]:
        """The turn as chat templates take it."""
        text = "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Given):
    """Options of a streamed answer."""

    include_usage: Flag = False
    include_obfuscation: Flag = False


class _Request(_Given):
    model: str
    temperature: Number = Field(1.0, ge=0, le=2)
    top_p: Number = Field(1.0, gt=0, le=1)
    seed: Seed | None = None
    stop: Stop | None = Field(None, description=f"Up to {MOST_STOPS} strings of 1 to {LONGEST_STOP:,} characters.")
    stream: Flag = False
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    n: Annotated[Literal[1], BeforeValidator(number)] = 1
    presence_penalty: Annotated[Literal[0], BeforeValidator(number)] = 0
    frequency_penalty: Annotated[Literal[0], BeforeValidator(number)] = 0
    # Read by nobody here, and without an effect on the answer.
    user: str | None = None
    metadata: Texts | None = None
    store: Annotated[Literal[False], BeforeValidator(flag)] | None = None

    @property
    def with_usage(self) -> bool:
        """Whether a streamed answer ends with what it took."""
        return self.stream_options is not None and self.stream_options.include_usage

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(given) > MOST_STOPS or not all(0 < len(text) <= LONGEST_STOP for text in given):
            text = f"stop takes up to {MOST_STOPS} strings of 1 to {LONGEST_STOP:,} characters."
            raise Refused(400, text, "invalid_request", "stop")
        return tuple(given)

    def job(self, prompt: list[int], most: int, route: str) -> Job:
        """The job for the worker."""
        sampling = Sampling(self.temperature, self.top_p, self.seed)
        return Job(tuple(prompt), most, sampling, self.stops(), route)


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: Positive | None = None

    def prompt(self, tokenizer: PreTrainedTokenizerBase, most: int) -> list[int]:
        """Token ids of the conversation under the tokenizer's chat template, the next turn opened.

        What a message spells like a control token stays text; `/v1/completions` reads control tokens, as prompts for it
        are written by whoever knows the template.

        Args:
            tokenizer: Has a chat template.
            most: Tokens that the server takes.

        Raises:
            Refused: There is no template, it refuses the conversation, or that is too long.
        """
        if not tokenizer.chat_template:
            raise Refused(400, "The model's tokenizer has no chat template: use /v1/completions.", "no_chat_template")
        if len(self.messages) > most:  # which a template would take long to write
            raise _too_long(most)
        turns = [message.plain() for message in self.messages]
        check_beginning(tokenizer, "".join(turn["content"] for turn in turns), most, "messages")

        def render(messages: list[dict[str, str]]) -> str:
            return render_chat(tokenizer, messages, add_generation_prompt=True)

        try:
            ids = conversation_ids(tokenizer, turns, render, most)
        except (TemplateError, ValueError, TypeError) as error:
            text = f"The model's chat template refuses these messages: {error}"
            raise Refused(400, text, "invalid_messages", "messages") from error
        if len(ids) > most:
            raise _too_long(most)
        return ids

    @property
    def most(self) -> int | None:
        """Most tokens of the answer, where the request says."""
        return self.max_completion_tokens or self.max_tokens


def _too_long(most: int) -> Refused:
    text = f"The conversation has more than {most:,} tokens, which is what this server takes. Shorten it."
    return Refused(400, text, "context_length_exceeded", "messages")


def _only(prompt: Any) -> Any:
    """The one prompt of a list of prompts."""
    if isinstance(prompt, list) and not {str, list}.isdisjoint(map(type, prompt)):
        if len(prompt) > 1:
            raise ValueError("One prompt a request is taken; send the others by themselves.")
        prompt = prompt[0]
    if isinstance(prompt, list) and not {int}.issuperset(map(type, prompt)):  # true would be taken for 1
        raise ValueError("A list holds one prompt, or the token ids of one, which are whole numbers.")
    return prompt


Prompt = (
    Annotated[str, Field(min_length=1)]
    | Annotated[list[int], Field(min_length=1)]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1)]
    | Annotated[list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1, max_length=1)]
)


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt_: Annotated[Text | Ids, BeforeValidator(_only, json_schema_input_type=Prompt)] = Field(alias="prompt")
    echo: Annotated[Literal[False], BeforeValidator(_no_echo)] = False
    best_of: Annotated[Literal[1], BeforeValidator(number)] = 1

    def prompt(self, tokenizer: PreTrainedTokenizerBase, most: int) -> list[int]:
        """Token ids of the prompt; those that were given as they are.

        Args:
            tokenizer: Encodes it.
            most: Tokens that the server takes.

        Raises:
            Refused: Ids that the model does not have, or a text that is too long by far.
        """
        ids = self.prompt_
        if isinstance(ids, str):
            check_beginning(tokenizer, ids, most, "prompt")
            return text_ids(tokenizer, ids)
        known = len(tokenizer)
        if wrong := [token for token in ids if not 0 <= token < known]:
            raise Refused(400, f"The model has no token {wrong[0]}; its ids end at {known - 1}.", "bad_token")
        return ids

    @property
    def most(self) -> int | None:
        """Most tokens of the answer, where the request says."""
        return self.max_tokens


def check_beginning(tokenizer: PreTrainedTokenizerBase, text: str, most: int, parameter: str) -> None:
    """Refuse a text whose beginning alone has too many tokens: to encode all of it may take minutes, and others wait.

    Args:
        tokenizer: Encodes.
        text: Of a prompt, without what a template adds.
        most: Tokens that the server takes.
        parameter: Where the text stands in the request.

    Raises:
        Refused: It is too long.
    """
    read = CHARACTERS * most
    while read < len(text):
        if len(text_ids(tokenizer, text[:read])) > most + CUT:
            words = f"The text alone has too many tokens: this server takes {most:,}. Shorten it."
            raise Refused(400, words, "context_length_exceeded", parameter)
        read *= 2

"""Options of a command from its signature: one table of words, defaults and help texts for all commands.

A command is a function. Its parameters are its options; a parameter can stand for all fields of a dataclass of
settings, or for all parameters of a function of the public API, which it then gets with its values filled in (`takes`),
so that no option is declared twice. Help comes from the docstrings' `Args` and `Attributes`, where another option in
backticks is shown as it is typed. The result is one flat dataclass for tyro, which parses it and prints the help.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import importlib
import inspect
import re
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tyro.conf import DisallowNone, FlagCreatePairsOff, Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from ultralong.api.names import Words
from ultralong.utils.units import TokenCount, parse_tokens

Command = TypeVar("Command", bound=Callable[..., None])
METAVARS = {  # the word for an option's value in usage and help; by the option's name, else by its type
    "model": "MODEL", "tokenizer": "MODEL", "base": "FOLDER", "config": "CONFIG", "recipe": "RECIPE",
    "target": "RECIPE", "out": "FOLDER", "rows": "FOLDER", "cache": "FOLDER", "folder": "FOLDER", "work": "FOLDER",
    "data": "FOLDER", "haystack": "PATH", "json": "FILE", "picture": "FILE", "html": "FILE", "instruction": "FILE",
    "predictions": "FILE", "language_model": "FILE", "against": "PATH", "first": "FOLDER", "second": "FOLDER",
    "set": "KEY=VALUE", "memory": "NAME=VALUE", "kernel": "KERNEL", "kernels": "KERNEL", "schemes": "SCHEME",
    "machine": "MACHINE", "device": "DEVICE", "method": "METHOD", "revision": "REVISION", "url": "URL",
    "key_variable": "VARIABLE", "task": "TASK", "tasks": "TASK", "benchmarks": "NAME", "fields": "FIELD",
    "language": "LANGUAGE", "language_code": "CODE", "partition": "PARTITION", "time": "TIME", "environment": "COMMAND",
    "dtype": "TYPE", "gpu_memory": "GIB", "host_memory": "GIB", "questions": "PATH", "only": "NAME", "to": "TOKENS",
    "settings": "CONFIG", "before": "FOLDER", "filters": "FILTER", "dedup": "METHOD", "host": "ADDRESS", "name": "NAME",
    "checkpoint": "FOLDER", "llama_cpp": "FOLDER", "study": "STUDY", "arms": "ARM", "models": "MODEL",
    "mix": "LENGTH:ROWS", "endpoint": "URL", "endpoint_model": "NAME", "evaluator": "MODEL", "site": "NAME=VALUE",
    "notebooks": "NAME", "repository": "URL", "pages_branch": "BRANCH", "kinds": "KIND", "types": "NAME",
    "source": "NAME", "meshes": "MESH", "methods": "METHOD", "train": "CONFIG", "write": "FOLDER", "exchange": "WAY",
    "kv": "TYPE",
}  # fmt: skip
# tyro's markers, which are types to a type checker.
POSITIONAL: Any = Positional
FLAG: Any = FlagCreatePairsOff
YES_OR_NO: Any = DisallowNone
FREE_TEXT = ("set", "memory", "fields")
TYPES = {int: "INT", float: "FLOAT", Path: "PATH"}


@dataclasses.dataclass(frozen=True)
class Group:
    """A dataclass of settings or a function, whose fields or parameters are options of a command.

    Attributes:
        place: Where it is, "module:name"; imported when the command is chosen.
        positional: Fields that are given by place, in this order.
        names: Options' names where they differ from the fields'.
        given: Fields that are no options, with the values that they get.
        commas: Fields whose list is one word with commas.
        left_out: Fields that are no options and keep their defaults.
        defaults: Defaults of fields that have none.
    """

    place: str
    positional: tuple[str, ...] = ()
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    commas: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def load(self) -> Callable[..., Any]:
        """The dataclass or function."""
        module, _, name = self.place.partition(":")
        return getattr(importlib.import_module(module), name)

    def made(self, given: Mapping[str, Any]) -> Any:
        """The dataclass, or the function with its arguments, from values by the options' names."""
        thing, other = self.load(), (*self.given, *self.left_out)
        taken = {field: given[self.names.get(field, field)] for field in _defaults(thing) if field not in other}
        if inspect.isfunction(thing):
            return functools.partial(thing, **taken, **self.given)
        return thing(**taken, **self.given)


def takes(**groups: Group) -> Callable[[Command], Command]:
    """Say which parameters of a command are whole dataclasses of settings, or functions with their arguments."""

    def mark(command: Command) -> Command:
        command.__dict__["groups"] = groups
        return command

    return mark


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a command line, as `parser_of` hands it to tyro."""

    name: str
    kind: Any
    default: Any
    text: str
    positional: bool = False
    commas: bool = False

    def field(self) -> tuple[str, Any, Any]:
        """The field of the dataclass that tyro reads."""
        kind, *extras = get_args(self.kind) if get_origin(self.kind) is Annotated else (self.kind,)
        own = next((extra.metavar for extra in extras if getattr(extra, "metavar", None)), None)
        kind, markers = _parsed(self.name, Annotated[(kind, *extras)] if extras else kind, self.commas)
        required = self.default is dataclasses.MISSING
        metavar = own or metavar_of(self.name, self.kind, self.commas)
        if metavar and self.positional and not required:
            metavar = f"[{metavar}]"
        told = _default_text(() if required else self.default)
        markers = [*markers, *([POSITIONAL] if self.positional else [])]
        # tyro says (required) by itself, and of a positional list that it has an empty default, which is not so.
        shown = arg(
            metavar=metavar, help=self.text, help_behavior_hint=None if required and not self.positional else told
        )
        return (self.name, Annotated[(kind, shown, *markers)], dataclasses.field(default=self.default))


def parser_of(command: Callable[..., None]) -> type[Any]:
    """The flat dataclass of a command's options, `--traceback` included."""
    fields = [option.field() for option in options_of(command)]
    text = "When the command fails, show where: the whole traceback instead of one line."
    fields.append(Option("traceback", bool, False, text).field())
    return dataclasses.make_dataclass(command.__name__, fields, kw_only=True)


def options_of(command: Callable[..., None]) -> list[Option]:
    """The options of a command in the order of its signature, of a group's fields the positional ones first."""
    found: list[Option] = []
    groups: dict[str, Group] = command.__dict__.get("groups", {})
    texts = described(command, "Args")
    hints = _hints(command)
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            found += _fields_of(groups[name])
            continue
        default = dataclasses.MISSING if parameter.default is inspect.Parameter.empty else parameter.default
        positional = parameter.kind is inspect.Parameter.POSITIONAL_ONLY
        found.append(Option(name, hints[name], default, texts[name], positional))
    return found


def call(command: Callable[..., None], values: Any) -> None:
    """Call a command with what was parsed: dataclasses of settings are made from their options."""
    given = {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
    groups: dict[str, Group] = command.__dict__.get("groups", {})
    positional, named = [], {}
    for name, parameter in inspect.signature(command).parameters.items():
        value = groups[name].made(given) if name in groups else given[name]
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            positional.append(value)
        else:
            named[name] = value
    command(*positional, **named)


def described(thing: Any, section: str, options: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """What a docstring's section (`Args`, `Attributes`) says of each name, on one line; `options` by their fields."""
    text = inspect.getdoc(thing) or ""
    found = re.search(rf"^{section}:\n((?:[ ].*\n?|\n)*)", text, re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", found[1] if found else "", re.MULTILINE)
    shown = {f"`{field}`": "--" + option.replace("_", "-") for field, option in options.items()}
    told = {name: re.sub(r"`\w+`", lambda word: shown.get(word[0], word[0]), text) for name, text in entries}
    return {name: re.sub(r"\s+", " ", text).replace("`", "") for name, text in told.items()}


def metavar_of(name: str, kind: Any, commas: bool = False) -> str | None:
    """The word for an option's value: None for a flag, `TOKENS [TOKENS ...]` for a list."""
    inner, many = _inner(kind)
    plain = get_args(inner)[0] if get_origin(inner) is Annotated else inner
    if plain is bool:
        return None
    if get_origin(plain) is Literal:
        word = "{" + ",".join(map(str, get_args(plain))) + "}"
    elif inner is not plain and any(isinstance(extra, TokenCount) for extra in get_args(inner)[1:]):
        word = "TOKENS"
    elif plain in (str, Path) or name.endswith("_memory"):
        word = METAVARS.get(name) or TYPES.get(plain) or name.upper().replace("_", "-")
    else:
        word = TYPES[plain]
    if commas:
        return f"{word}[,{word}...]"
    if many is None:
        return word
    return " ".join([word] * many) if many else f"{word} [{word} ...]"


def _hints(thing: Any) -> dict[str, Any]:
    """Types of parameters or fields, with what is annotated; what is imported for type checkers alone is any."""
    if not inspect.isfunction(thing):
        return get_type_hints(thing, include_extras=True)
    texts = [text for name, text in thing.__annotations__.items() if isinstance(text, str)]
    used = {name for text in texts for name in compile(text, "annotation", "eval").co_names}
    unknown = used - set(thing.__globals__) - set(vars(builtins))
    return get_type_hints(thing, localns=dict.fromkeys(unknown, Any), include_extras=True)


def _defaults(thing: Any) -> dict[str, Any]:
    """Fields of a dataclass, or parameters of a function but for `**`, with their defaults."""
    if inspect.isfunction(thing):
        kept = [one for one in inspect.signature(thing).parameters.values() if one.kind is not one.VAR_KEYWORD]
        return {one.name: dataclasses.MISSING if one.default is one.empty else one.default for one in kept}
    found: dict[str, Any] = {}
    for field in (one for one in dataclasses.fields(thing) if one.init):
        made = field.default_factory
        found[field.name] = field.default if made is dataclasses.MISSING else made()
    return found


def _fields_of(group: Group) -> list[Option]:
    thing = group.load()
    defaults, hints, found = {**_defaults(thing), **group.defaults}, _hints(thing), []
    typed = {field: group.names.get(field, field) for field in defaults if field not in group.positional}
    texts = described(thing, "Args" if inspect.isfunction(thing) else "Attributes", typed)
    places = {name: place for place, name in enumerate(group.positional)}
    for field in sorted(defaults, key=lambda field: places.get(field, len(places))):
        if field in (*group.given, *group.left_out):
            continue
        kind, default, name = hints[field], defaults[field], group.names.get(field, field)
        found.append(
            Option(name, _narrow(kind), default, texts[field], field in group.positional, field in group.commas)
        )
    return found


def _narrow(kind: Any) -> Any:
    """The type that a command line reads: of what takes more in Python, the type in its mark."""
    if get_origin(kind) in (Union, types.UnionType) and len(get_args(kind)) == 2 and type(None) in get_args(kind):
        inner = _narrow(next(one for one in get_args(kind) if one is not type(None)))
        plain, *extras = get_args(inner) if get_origin(inner) is Annotated else (inner,)
        shown = [extra for extra in extras if getattr(extra, "metavar", None)]
        return Annotated[(plain | None, *shown)] if shown else inner | None
    words = next((extra for extra in getattr(kind, "__metadata__", ()) if isinstance(extra, Words)), None)
    if words is None:
        return kind
    return words.kind if words.shown is None else Annotated[words.kind, arg(metavar=words.shown)]


def _inner(kind: Any) -> tuple[Any, int | None]:
    """The type of one value, and how many there are: None is one, 0 any number."""
    if get_origin(kind) is Annotated and not any(isinstance(extra, TokenCount) for extra in get_args(kind)[1:]):
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(one for one in get_args(kind) if one is not type(None))
    if get_origin(kind) is tuple:
        arguments = get_args(kind)
        return arguments[0], 0 if arguments[1:] == (...,) else len(arguments)
    return kind, None


def _parsed(name: str, kind: Any, commas: bool) -> tuple[Any, list[Any]]:
    """How tyro is to read a type: flags, units of tokens, and lists in one way for every command."""
    inner, many = _inner(kind)
    tokens = get_origin(inner) is Annotated and any(isinstance(extra, TokenCount) for extra in get_args(inner)[1:])
    plain = get_args(inner)[0] if get_origin(inner) is Annotated else inner
    optional = get_origin(kind) in (Union, types.UnionType)
    if plain is bool:
        return (bool | None, [YES_OR_NO]) if optional else (bool, [FLAG])
    if commas:
        return kind, [_spec(lambda words: tuple(words[0].split(",")), 1)]
    if get_origin(plain) is Literal:
        return kind, []
    # A shell leaves ~ as it is in --out=~/run.
    read = parse_tokens if tokens else (lambda word: Path(word).expanduser()) if plain is Path else plain
    if many is None:
        return kind, [_spec(lambda words: read(words[0]), 1)]
    # A list may hold commas too: --lengths 4k,8k. What holds free text, such as key=value, is taken as it is.
    split = plain is not Path and name not in FREE_TEXT
    return kind, [_spec(lambda words: tuple(map(read, _items(words, split))), many or "*")]


def _items(words: list[str], split: bool) -> list[str]:
    return [item for word in words for item in word.split(",")] if split else words


def _spec(read: Callable[[list[str]], Any], count: int | Literal["*"]) -> PrimitiveConstructorSpec[Any]:
    def written(value: Any) -> list[str]:
        return [str(item) for item in (value if isinstance(value, tuple | list) else [value])]

    return PrimitiveConstructorSpec(
        nargs=count, metavar="VALUE", instance_from_str=read, is_instance=lambda _: True, str_from_instance=written
    )


def _default_text(value: Any) -> str:
    if value is None or value is False or value == () or value == "":
        return ""
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"(default: {shown})"

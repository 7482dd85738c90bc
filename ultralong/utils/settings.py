"""Settings: frozen dataclasses read from YAML, changed by `key=value`, written back as the file that repeats a run.

The dataclass is the schema. A key that it does not have, or a value of another type, is an error that names the place
and what was meant; nothing is guessed and nothing is dropped. A key that had another name in the version before is read
under its old name once more, with a note that says the new one: a dataclass lists such keys in `RENAMED`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ultralong.utils.files import write_text
from ultralong.utils.text_formats import read_yaml
from ultralong.utils.units import TokenCount, parse_tokens

T = TypeVar("T")
LONGEST_VALUE = 300  # characters of a value that a message shows


class UnknownKey(ValueError):
    """A key that the settings don't have."""


def load(cls: type[T], path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> T:
    """Read a YAML file into the dataclass `cls`.

    Args:
        cls: A dataclass, whose fields may be dataclasses.
        path: The YAML file; it holds a mapping.
        overrides: `"key=value"` or `"part.key=value"`, applied on top. Values are read as YAML.

    Raises:
        ValueError: The file is missing or not a mapping, a key is unknown, or a value is of the wrong type or refused
            by the dataclass itself; the message starts with the file and the key, and ends with the changes where
            the file is sound without them.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such settings file.")
    try:
        values = read_yaml(path.read_text(encoding="utf-8"), settings=True)
    except ValueError as error:  # bytes that are no text are one too
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of keys to values, found {type(values).__name__}.")
    values, changes = renamed(cls, values, str(path)), list(overrides)
    changed = override(values, changes, cls)
    try:
        return from_mapping(cls, changed, str(path))
    except UnknownKey as error:
        if not changes or not _is_sound(cls, values):
            raise
        said = ", ".join(change if len(change) < 80 else f"{change[:60]}..." for change in changes[:8])
        raise ValueError(f"{error} The file is sound: this comes with {said}.") from error


def _is_sound(cls: type[Any], values: Mapping[str, Any]) -> bool:
    try:
        from_mapping(cls, values)
    except ValueError:
        return False
    return True


def renamed(cls: type[Any], values: Mapping[str, Any], where: str = "settings") -> dict[str, Any]:
    """Return a copy of nested `values` in which keys of the version before have their names of today.

    Each old name is noted on standard error, once a process.

    Raises:
        ValueError: A setting is there under both its names.
    """
    old_names, hints, found = getattr(cls, "RENAMED", {}), get_type_hints(cls), {}
    for key, value in values.items():
        name = old_names.get(key, key)
        if name != key and name in values:
            raise ValueError(f"{where}: {key!r} is the old name of {name!r}, and both are there. Remove {key!r}.")
        if name != key:
            _note(f"{where}: {key!r} is now called {name!r}. The old name will be refused by the next version.")
        inner = _dataclass_in(hints.get(name))
        if inner is not None and isinstance(value, Mapping):
            found[name] = renamed(inner, value, f"{where}: {name}")
        else:
            found[name] = _copy(value)
    return found


def override(values: Mapping[str, Any], overrides: Iterable[str], cls: type[Any] | None = None) -> dict[str, Any]:
    """Return a copy of nested `values` with `"a.b=value"` strings applied.

    Args:
        values: Nested settings.
        overrides: The changes, applied in order.
        cls: The dataclass that the values are for: keys of the version before are then understood (see `renamed`).

    Raises:
        ValueError: A string without `=`, a value that is not YAML, or a path that goes through something that is not a
            mapping.
    """
    changed = _copy(values)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"--set takes key=value, found {text!r}.")
        *parents, last = _path_of_today(cls, key.split("."), f"--set {text}")
        place = changed
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ValueError(f"--set {text}: {parent!r} is not a group of settings.")
        try:
            place[last] = read_yaml(value, settings=True)
        except ValueError as error:
            raise ValueError(f"--set {text}: the value is not valid YAML: {error}") from error
    return changed


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str = "settings") -> T:
    """Build the dataclass `cls` from nested mappings, checking every key and type.

    Raises:
        ValueError: See `load`.
    """
    values = renamed(cls, values, where)
    hints = get_type_hints(cls, include_extras=True)
    names = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}."
            if groups := _groups_with(key, hints):
                hint = f"it belongs to {' or '.join(groups)}, as `{groups[0]}: {{{key}: ...}}`."
            raise UnknownKey(f"{where}: unknown key {key!r}; {hint}")
    missing = [name for name, field in names.items() if name not in values and _required(field)]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} must be given.")
    arguments = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _groups_with(key: Any, hints: Mapping[str, Any]) -> list[str]:
    """Groups of a dataclass, by its type hints, that have a key of this name."""
    groups = {name: dataclasses.fields(hint) for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    return [name for name, fields in groups.items() if any(key == field.name for field in fields)]


def to_mapping(settings: Any) -> dict[str, Any]:
    """The nested plain values of a dataclass, as `from_mapping` reads them back."""
    return _plain(dataclasses.asdict(settings))


def save(settings: Any, path: str | os.PathLike[str], header: str = "") -> None:
    """Write every setting, defaults included, as YAML; `load` reads back an equal dataclass."""
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    write_text(path, comment + yaml.safe_dump(to_mapping(settings), sort_keys=False, allow_unicode=True))


def _note(text: str, said: set[str] = set()) -> None:  # noqa: B006 - remembers what was said, for as long as it runs
    if text not in said:
        said.add(text)
        print(f"note: {text}", file=sys.stderr)


def _dataclass_in(hint: Any) -> type[Any] | None:
    """The dataclass that a type hint allows, if there is one: `X`, `X | None`."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind) and isinstance(kind, type)), None)


def _path_of_today(cls: type[Any] | None, path: list[str], where: str) -> list[str]:
    """The dotted path of a setting, each part under its name of today."""
    found = []
    for part in path:
        name = getattr(cls, "RENAMED", {}).get(part, part)
        if name != part:
            _note(f"{where}: {part!r} is now called {name!r}. The old name will be refused by the next version.")
        found.append(name)
        cls = None if cls is None else _dataclass_in(get_type_hints(cls).get(name))
    return found


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]} ..."


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if isinstance(value, str) and any(isinstance(extra, TokenCount) for extra in arguments[1:]):
            return _tokens(value, where)
        return _convert(arguments[0], value, where)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} must be one of {', '.join(map(repr, arguments))}, found {_shown(value)}.")
        return value
    if origin in (tuple, list):
        return _convert_list(origin, arguments, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping, found {_shown(value)}.")
        return {_convert(arguments[0], k, where): _convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a group of settings, found {_shown(value)}.")
        return from_mapping(hint, value, where)
    return _convert_plain(hint, value, where)


def _convert_list(origin: Any, arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        such = "" if isinstance(value, Mapping) or value is None else f", such as [{value}]"
        raise ValueError(f"{where} must be a list{such}, found {_shown(value)}.")
    kinds = [arguments[0]] * len(value) if origin is list or arguments[1:] == (...,) else list(arguments)
    if len(kinds) != len(value):
        raise ValueError(f"{where} must have {len(kinds)} values, found {_shown(value)}.")
    return origin(
        _convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _tokens(text: str, where: str) -> int:
    try:
        return parse_tokens(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _convert_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    errors = []
    for kind in kinds:
        try:
            return _convert(kind, value, where)
        except ValueError as error:
            errors.append(str(error))
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if words and isinstance(value, str):  # a misspelt word, or what should have been a number
        types_ = " or ".join(f"of type {kind.__name__}" for kind in kinds if isinstance(kind, type))
        raise ValueError(f"{where} must be {types_} or {' or '.join(map(repr, words))}, found {_shown(value)}.")
    errors = [error for kind, error in zip(kinds, errors, strict=True) if get_origin(kind) is not Literal]
    raise ValueError(" Or: ".join(errors))


def _convert_plain(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    # YAML 1.1 reads 3e-5 (no dot) as a string, which is how people write learning rates.
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if hint is Path and isinstance(value, str):
        return Path(value)
    # No setting counts beyond 64 bits, and what counts up to a number, or divides by it, would not end or fail there.
    if hint is int and isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{where} must be a number of 64 bits, found {_shown(value)}.")
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where} must be of type {hint.__name__}, found {_shown(value)}.")

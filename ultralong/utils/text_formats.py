"""YAML and JSON as people and other people's files write it, read within bounds: no key twice, no endless expansion."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Sequence
from typing import Any

import yaml

LARGEST = 8 << 20  # characters of a text
MOST_VALUES = 200_000  # values, with each alias counted as all that it stands for
MERGE = "tag:yaml.org,2002:merge"
# YAML 1.1, which PyYAML reads, takes 010 for 8 and 1:30 for 90; YAML 1.2, and a reader of a file, do not.
OTHER_NUMBERS = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-9]+)+(\.[0-9_]*)?)")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which takes the later of two equal keys without a word; here they are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if isinstance(node, yaml.MappingNode):
            seen: set[Any] = set()
            for key, _ in node.value:
                name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
                if name in seen and key.tag != MERGE:
                    raise yaml.constructor.ConstructorError(
                        "while reading a mapping", node.start_mark, f"found the key {key.value!r} twice", key.start_mark
                    )
                if name is not None:
                    seen.add(name)
        return super().construct_mapping(node, deep)


class _SettingsLoader(_Loader):
    """The loader of what people write for this library: a number that is another one elsewhere is refused."""


def _number(loader: _SettingsLoader, node: yaml.ScalarNode) -> Any:
    if OTHER_NUMBERS.fullmatch(node.value):
        raise yaml.constructor.ConstructorError(
            None,
            None,
            f"{node.value} is another number in YAML 1.1 than in 1.2: write it without leading zeros or colons, or in "
            "quotes if it is a text",
            node.start_mark,
        )
    whole = node.tag.endswith(":int")
    return loader.construct_yaml_int(node) if whole else loader.construct_yaml_float(node)


for _kind in ("int", "float"):
    _SettingsLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number)


def read_yaml(text: str, *, settings: bool = False) -> Any:
    """The value of a YAML text.

    Args:
        text: The YAML.
        settings: Refuse numbers that YAML 1.1 and 1.2 read differently; else YAML 1.1 holds, as PyYAML writes it.

    Raises:
        ValueError: It is not valid YAML, holds a key twice, is too large, is nested too deeply, or its aliases stand
            for too many values.
    """
    if len(text) > LARGEST:
        raise ValueError(f"it has {len(text):,} characters, and more than {LARGEST:,} are not read.")
    try:
        loader = (_SettingsLoader if settings else _Loader)(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("it is nested too deeply.") from None
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(str(error)) from error


def _check_size(root: yaml.Node) -> None:
    """Count the values that a document stands for: an alias shares a node, and each place of it counts."""
    counted: dict[int, int] = {}
    open_nodes: set[int] = set()

    def count(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) in open_nodes:
            raise ValueError(f"an alias stands for a value that holds it, {_place(node)}.")
        if id(node) not in counted:
            open_nodes.add(id(node))
            parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            counted[id(node)] = 1 + sum(map(count, parts))
            open_nodes.discard(id(node))
        if counted[id(node)] > MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {MOST_VALUES:,} values, {_place(node)}.")
        return counted[id(node)]

    count(root)


def _place(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


class TwiceError(ValueError):
    """A key stands twice in a JSON object."""


def each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values, for `object_pairs_hook` of `json.loads`.

    Raises:
        TwiceError: A key stands twice; names it.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in names if names.count(name) > 1)
        raise TwiceError(f"the key {name[:80]!r} stands twice")
    return found


def json_value(text: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: It is not JSON, is nested too deeply, holds a key twice, or a number of too many digits.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=each_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None

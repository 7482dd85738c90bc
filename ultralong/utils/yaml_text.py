"""YAML as people and other people's files write it, read within bounds: no key twice, no endless expansion."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

LARGEST = 8 << 20  # characters of a text
MOST_VALUES = 200_000  # values, with each alias counted as all that it stands for
MERGE = "tag:yaml.org,2002:merge"


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


def read_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: It is not valid YAML, holds a key twice, is too large, is nested too deeply, or its aliases stand
            for too many values.
    """
    if len(text) > LARGEST:
        raise ValueError(f"it has {len(text):,} characters, and more than {LARGEST:,} are not read.")
    try:
        loader = _Loader(text)
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

"""The structure of the package, measured on its imports: rooms, arrows between rooms, cycles, sizes of folders.

`python tests/support/structure.py [FOLDER]` prints the numbers of the package in FOLDER (default: this clone).

An import counts wherever it stands, inside a function too. Only what is under `if TYPE_CHECKING:` does not count, as it
never runs. A room is a folder of the package, or a module that stands beside the folders. `ultralong/__init__.py` is no
room: what it offers it loads on demand, and inside the package only `__version__` is taken from it.
"""

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

PACKAGE = "ultralong"
MOST_MODULES_A_FOLDER = 15

# Lowest first. A room may import the rooms of the lines above its own; rooms of one line may not import each other.
LAYERS = (
    {"utils"},
    {"figures"},  # computes nothing, only draws what it is handed: the rooms in `DRAWING` may use it
    {"rope"},
    {"checkpoints"},
    {"data"},
    {"attention"},
    {"training"},
    {"inference"},
    {"evaluation"},
    {"planner"},
    {"launch"},
    {"notebook_tools"},
    {"miniature"},  # trains the committed model, so it stands above the trainer
    {"demo", "ablation", "search"},  # run the whole recipe, on the miniature too
    {"course"},  # its exercises are about all of these
    {"bench"},  # times all of the rooms, the demo included
    {"api"},  # what `from ultralong import ...` gives
    {"cli"},
    {"__main__"},
)
# Rooms inside a room, lowest first: a later one may import an earlier one.
INNER_LAYERS = {"data": ("read", "select", "tokens", "rows", "chat", "recipe")}
DRAWING = {"evaluation", "notebook_tools", "course", "demo", "ablation", "cli"}


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package below `root`, by its dotted name."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _only_for_types(node: ast.AST) -> bool:
    if not isinstance(node, ast.If):
        return False
    test = node.test
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _statements(node: ast.AST) -> Iterable[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if _only_for_types(child):
            yield from (part for other in child.orelse for part in (other, *_statements(other)))
        else:
            yield child
            yield from _statements(child)


def _targets(node: ast.AST, module: str, is_package: bool, known: set[str]) -> Iterable[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        yield from (part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str))
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = module.split(".")
            here = parts[: len(parts) - node.level + (1 if is_package else 0)]
            base = ".".join([*here, base] if base else here)
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            yield inner if inner in known else base


def imports(root: Path) -> dict[str, set[str]]:
    """Which of the package's modules each of its modules imports when it runs."""
    paths = modules(root)
    known = set(paths)
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        is_package = path.name == "__init__.py"
        found: set[str] = set()
        for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
            found.update(target for target in _targets(node, module, is_package, known) if target in known)
        graph[module] = found - {module, PACKAGE}
    return graph


def names_from_package(root: Path) -> dict[str, set[str]]:
    """Names that modules take from `ultralong` itself, by module: each could hide an arrow, but for `__version__`."""
    known = set(modules(root))
    found: dict[str, set[str]] = {}
    for module, path in modules(root).items():
        for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == PACKAGE and not node.level:
                names = {alias.name for alias in node.names if f"{PACKAGE}.{alias.name}" not in known}
                found[module] = found.get(module, set()) | names
    return found


def room(module: str) -> str:
    """The room a module belongs to: the first name below the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PACKAGE


def arrows(graph: dict[str, set[str]]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Each pair of rooms with the imports that go from the first to the second."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for module, targets in sorted(graph.items()):
        for target in sorted(targets):
            pair = (room(module), room(target))
            if pair[0] != pair[1]:
                found.setdefault(pair, []).append((module, target))
    return found


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of two or more nodes that reach each other (strongly connected components, by Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = []
            while True:
                group.append(stack.pop())
                if group[-1] == node:
                    break
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(found)


def rooms_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph of rooms that a graph of modules makes."""
    found: dict[str, set[str]] = {room(module): set() for module in graph}
    for source, target in arrows(graph):
        found[source].add(target)
    return found


def upward(graph: dict[str, set[str]]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """The arrows that do not point down the table of layers, with their imports; rooms it does not name count too."""
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    return {
        pair: found
        for pair, found in arrows(graph).items()
        if layer.get(pair[1], len(LAYERS)) >= layer.get(pair[0], -1)
        or (pair[1] == "figures" and pair[0] not in DRAWING)
    }


def upward_inside(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Imports inside a room of `INNER_LAYERS` that go from an earlier inner room to a later or to an unknown one."""
    found = []
    for module, targets in sorted(graph.items()):
        for target in sorted(targets):
            order = INNER_LAYERS.get(room(module), ())
            if not order or room(target) != room(module) or len(module.split(".")) < 4 or len(target.split(".")) < 4:
                continue
            here, there = module.split(".")[2], target.split(".")[2]
            if here not in order or there not in order or order.index(there) > order.index(here):
                found.append((module, target))
    return found


def folder_sizes(root: Path) -> dict[str, int]:
    """How many modules stand in each folder of the package, `__init__` and `__main__` not counted."""
    found: dict[str, int] = {}
    for path in modules(root).values():
        folder = str(path.parent.relative_to(root))
        found[folder] = found.get(folder, 0) + (path.stem not in {"__init__", "__main__"})
    return found


def summary(root: Path) -> str:
    """The numbers of the package below `root`, in a few lines."""
    graph = imports(root)
    pairs, up = arrows(graph), upward(graph)
    sizes = folder_sizes(root)
    largest = max(sizes, key=lambda folder: sizes[folder])
    lines = [
        f"rooms                {len(rooms_graph(graph))}",
        f"modules              {len(graph)}",
        f"arrows               {len(pairs)} between rooms ({sum(map(len, pairs.values()))} imports)",
        f"upward arrows        {len(up)}",
        f"cycles of rooms      {len(cycles(rooms_graph(graph)))}",
        f"cycles of modules    {len(cycles(graph))}",
        f"largest folder       {largest} with {sizes[largest]} modules",
    ]
    for (source, target), found in up.items():
        lines.append(f"  up: {source} -> {target}: " + ", ".join(f"{a} -> {b}" for a, b in found))
    for group in cycles(rooms_graph(graph)):
        lines.append("  cycle of rooms: " + ", ".join(group))
    for group in cycles(graph):
        lines.append("  cycle of modules: " + ", ".join(group))
    lines += [
        f"  over {MOST_MODULES_A_FOLDER}: {folder}: {n}" for folder, n in sizes.items() if n > MOST_MODULES_A_FOLDER
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(summary(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2]))

"""GraphWalks (OpenAI 2025, huggingface.co/datasets/openai/graphwalks): a graph as a list of edges, and one question.

| test | asks |
|---|---|
| `graphwalks_bfs` | the nodes at a depth of 1 to 4 of a breadth-first search, in turn |
| `graphwalks_parents` | the nodes with an edge to a given node |

As published: nodes are hexadecimal names, three worked examples stand first, the answer is a list after `Final Answer:`
on the last line, and the score is F1 between the two sets of nodes. Our own: the wording, the graph (edges drawn
evenly, two a node), and that answers hold 1 to 16 nodes, so that neither an empty list nor a long one is a good guess.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from ultralong.evaluation.tasks.task import Draft, Setting, Task

TASK = (
    "A directed graph is written as a list of edges, one a line: `a -> b` is an edge from a to b. An operation on the "
    "graph follows the list. Answer with the set of nodes that it gives, as a list in square brackets.\n"
    "A breadth-first search (BFS) to depth d gives the nodes whose shortest path from the start has d edges; the start "
    "is not one of them. The parents of a node are the nodes with an edge to it.\n\n{examples}"
    "Graph:\n{edges}\n\nOperation: {operation}"
)
PREFIX = "\nFinal Answer: ["
BFS, PARENTS = "BFS from node {node} to depth {depth}.", "Parents of node {node}."
DEPTHS = (1, 2, 3, 4)
MOST_NODES = 16
STARTS = 64  # nodes tried for an answer of the wanted depth and size
NAME_BITS = 40
EXAMPLE_EDGES = 5

Edge = tuple[str, str]


@dataclass(frozen=True)
class Walk:
    """An operation on a graph, its answer, and the places in the list of the edges that the answer rests on."""

    operation: str
    nodes: tuple[str, ...]
    needed: tuple[int, ...]


@dataclass(frozen=True)
class GraphBuilder:
    """Makes graphs with one question; a unit of size is an edge.

    Attributes:
        kind: `bfs` or `parents`.
        setting: Its tokenizer counts what the answer takes.
    """

    kind: str
    setting: Setting
    source: str = "random graphs"
    smallest: int = 12
    probe: int = 60

    def build(self, draw: random.Random, size: int, index: int) -> Draft:
        """A graph of `size` edges; the depths of the search are taken in turn."""
        shown = "".join(
            f"Example:\nGraph:\n{_written(edges)}\n\nOperation: {walk.operation}{PREFIX}{', '.join(walk.nodes)}]\n\n"
            for edges, walk in (_example(draw, kind) for kind in ("bfs", "parents", self.kind))
        )
        edges = draw_edges(draw, size)
        walk = ask(draw, edges, self.kind, DEPTHS[index % len(DEPTHS)])
        head, tail = TASK.replace("{examples}", shown).split("{edges}")
        line = len(_written(edges[:1])) + 1  # names are of one length, so edges are too
        gold = tuple(len(head) + line * place for place in walk.needed)
        answer = ", ".join(walk.nodes) + "]"
        tokens = len(self.setting.tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"])
        message = head + _written(edges) + tail.replace("{operation}", walk.operation)
        # Half as much again as the answer takes: a longer list is wrong anyway.
        return Draft(message, PREFIX, walk.nodes, gold, max_new_tokens=tokens + tokens // 2 + 8)


def _written(edges: Iterable[Edge]) -> str:
    return "\n".join(f"{start} -> {end}" for start, end in edges)


def _example(draw: random.Random, kind: str) -> tuple[list[Edge], Walk]:
    edges = draw_edges(draw, EXAMPLE_EDGES)
    return edges, ask(draw, edges, kind, 1)


def draw_edges(draw: random.Random, count: int) -> list[Edge]:
    """Different edges between different nodes, in random order, two for each node on average."""
    names: dict[str, None] = {}
    while len(names) < max(4, count // 2):
        names[f"{draw.getrandbits(NAME_BITS):010x}"] = None
    nodes = list(names)
    edges: dict[Edge, None] = {}
    while len(edges) < count:
        start, end = draw.choice(nodes), draw.choice(nodes)
        if start != end:
            edges[start, end] = None
    return list(edges)


def ask(draw: random.Random, edges: Sequence[Edge], kind: str, depth: int) -> Walk:
    """A question about a graph whose answer has 1 to 16 nodes; a search that finds none is tried less deep."""
    after: dict[str, list[int]] = {}
    for place, edge in enumerate(edges):
        after.setdefault(edge[0 if kind == "bfs" else 1], []).append(place)
    starts = draw.sample(sorted(after), min(STARTS, len(after)))
    if kind == "parents":
        node = next((node for node in starts if len(after[node]) <= MOST_NODES), starts[0])
        return Walk(PARENTS.format(node=node), tuple(edges[place][0] for place in after[node]), tuple(after[node]))
    for steps in range(depth, 0, -1):
        for node in starts:
            nodes, needed = _level(edges, after, node, steps)
            if 1 <= len(nodes) <= MOST_NODES:
                return Walk(BFS.format(node=node, depth=steps), nodes, needed)
    raise AssertionError("every start has an edge, and an even graph has starts with few")


def _level(
    edges: Sequence[Edge], after: dict[str, list[int]], start: str, depth: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Nodes at a depth of a breadth-first search, and the edges that lead from one level to the next."""
    seen, level, needed = {start}, [start], []
    for _ in range(depth):
        found: dict[str, None] = {}
        for node in level:
            for place in after.get(node, ()):
                if edges[place][1] not in seen:
                    found[edges[place][1]] = None
                    needed.append(place)
        seen.update(found)
        level = list(found)
    return tuple(level), tuple(needed)


def read_nodes(answer: str, prefix: str | None) -> list[str] | None:
    """The nodes of an answer, or None where it is of another form.

    The list that the prompt began ends at the first bracket. An answer that says `Final Answer:` itself is read as the
    published code reads it: a bracketed list behind these words on the last line.

    Args:
        answer: What the model said.
        prefix: Start of the answer in the prompt, if it had one.
    """
    begun, closed, _ = answer.partition("]")
    if prefix and closed and "final answer:" not in begun.lower():
        inside = begun
    else:
        line = answer.strip().splitlines()[-1] if answer.strip() else ""
        found = re.search(r"final answer: ?\[(.*)\]", line, re.IGNORECASE)
        if found is None:
            return None
        inside = found.group(1)
    return [node for part in inside.split(",") if (node := part.strip().strip("[]"))]


def node_set_f1(answer: str, references: Sequence[str], answer_prefix: str | None = None) -> float:
    """F1 between the nodes of the answer and the right ones, each counted once; 0 for an answer of another form."""
    said, right = set(read_nodes(answer, answer_prefix) or ()), set(references)
    common = len(said & right)
    return 2 * common / (len(said) + len(right)) if common else 0.0


GRAPHWALKS_TASKS = {
    name: Task(name, 0, partial(GraphBuilder, kind), node_set_f1, ("answer_prefix",), capability="multi-hop")
    for kind, name in (("bfs", "graphwalks_bfs"), ("parents", "graphwalks_parents"))
}

"""Exercises of 03_separator_packing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from ultralong.course.exercise import Exercise, Mistake

DOCUMENTS = [[11, 12, 13], [21, 22], [31, 32, 33, 34], [41]]
SEPARATOR = [7, 8]
LENGTH = 4

Rows = list[tuple[list[int], list[int]]]


# ---- 03.pack


def pack(documents: list[list[int]], separator: list[int], length: int) -> Rows:
    """Rows of `length` inputs with as many targets; what does not fill a row is dropped."""
    stream: list[int] = []
    for index, document in enumerate(documents):
        stream += (separator if index else []) + document
    starts = range(0, len(stream) - length, length)
    return [(stream[at : at + length], stream[at + 1 : at + length + 1]) for at in starts]


def _pack_double_shift(documents: list[list[int]], separator: list[int], length: int) -> Rows:
    return [(inputs, targets[1:] + [-100]) for inputs, targets in pack(documents, separator, length)]


def _pack_lost_label(documents: list[list[int]], separator: list[int], length: int) -> Rows:
    return [(inputs, inputs[1:] + [-100]) for inputs, _ in pack(documents, separator, length)]


def _pack_same(documents: list[list[int]], separator: list[int], length: int) -> Rows:
    return [(inputs, inputs) for inputs, _ in pack(documents, separator, length)]


def _pack_no_separator(documents: list[list[int]], separator: list[int], length: int) -> Rows:
    return pack(documents, [], length)


def _pack_overlapping(documents: list[list[int]], separator: list[int], length: int) -> Rows:
    stream = [token for inputs, _ in pack(documents, separator, 1) for token in inputs]
    starts = range(0, len(stream) - length, length + 1)
    return [(stream[at : at + length], stream[at + 1 : at + length + 1]) for at in starts]


def _check_pack(answer: Any) -> str:
    right, found = pack(DOCUMENTS, SEPARATOR, LENGTH), answer([list(d) for d in DOCUMENTS], list(SEPARATOR), LENGTH)
    assert isinstance(found, list) and all(len(row) == 2 for row in found), (
        "Give a list of rows, each (inputs, targets)."
    )
    tokens = [token for inputs, _ in found for token in inputs]
    assert 7 in tokens and 8 in tokens, (
        "The separator's ids are missing: they stand between every two documents, encoded once and alone, never "
        "as text "
        "in front of a document."
    )
    for (inputs, targets), (wanted, expected) in zip(found, right, strict=False):
        assert list(inputs) == wanted, (
            f"A row's inputs are {wanted}, yours {list(inputs)}: the stream is cut every {LENGTH} tokens, "
            f"wherever that "
            "is, and the next row starts with the very next token."
        )
        assert list(targets) != list(inputs), "A target is the token after its input; yours are the inputs themselves."
        assert list(targets) != expected[1:] + [-100], (
            f"Shifted twice: the target of input {inputs[0]} is {expected[0]}, the token after it."
        )
        assert list(targets) != wanted[1:] + [-100], (
            "The last input of a row has a target too: the stream's next token, which opens the next row. One label in "
            "every row is lost here."
        )
        assert list(targets) == expected, f"Targets of {wanted} are {expected}, yours {list(targets)}."
    assert len(found) == len(right), f"{len(right)} rows are full, yours has {len(found)}."
    return f"{len(right)} rows of {LENGTH}, every input with the target that follows it in the stream."


# ---- 03.pairs


def pairs_inside(boundaries: list[int], length: int) -> int:
    """Query-key pairs inside documents: causal, each token with itself and those before it in its document."""
    edges = [*boundaries, length]
    return sum(n * (n + 1) // 2 for n in (end - start for start, end in pairwise(edges)))


def _check_pairs(answer: Any) -> str:
    for boundaries, length in (([0, 3, 7], 12), ([0], 10), ([0, 1, 2, 3], 4)):
        right, found = pairs_inside(boundaries, length), answer(list(boundaries), length)
        lengths = [b - a for a, b in zip([*boundaries], [*boundaries[1:], length], strict=True)]
        assert found != sum(n * n for n in lengths) or found == right, (
            f"Documents of {lengths}: {found} counts keys after the query as well. Attention is causal."
        )
        assert found != sum(n * (n - 1) // 2 for n in lengths), (
            f"Documents of {lengths}: {found} leaves out each token's pair with itself."
        )
        assert found != sum(n * (n + 1) // 2 for n in lengths[:-1]), (
            f"Documents of {lengths}: {found} leaves out the last document, from the last boundary to the row's end."
        )
        assert found == right, f"Documents of {lengths} have {right} pairs, yours says {found}."
    share = pairs_inside([index * 100 for index in range(30)], 3000) / (3000 * 3001 // 2)
    return f"in a row of 30 equal documents {1 - share:.0%} of all pairs are between strangers."


# ---- 03.leak

LEAK_OPTIONS = ("none", "those in A only", "those from A's change on in A only", "all from A's change on")


def _check_leak(answer: Any) -> str:
    right = {"masked": LEAK_OPTIONS[2], "not masked": LEAK_OPTIONS[3]}
    assert isinstance(answer, dict) and set(answer) == set(right), (
        f"Give a dict with the keys 'masked' and 'not masked'; found {answer!r}."
    )
    for name, said in answer.items():
        assert said in LEAK_OPTIONS, f"{name}: {said!r} is not one of {LEAK_OPTIONS}."
        assert said != "none", f"{name}: the changed token itself has other logits, at least."
        assert said != "those in A only", f"{name}: attention is causal, so tokens before the change can't see it."
    assert answer["masked"] == right["masked"], "masked: B's tokens may not see A, so B's logits do not move by a bit."
    assert answer["not masked"] == right["not masked"], (
        "not masked: B follows A in the row and sees it; its logits move. That is what the recipe lets happen."
    )
    return "with a mask the change ends with its document; without one it reaches every later token of the row."


EXERCISES = (
    Exercise(
        name="03.pack",
        title="Pack documents into rows",
        task=(
            "Write `pack(documents, separator, length)`: given the documents' token ids (a list of lists) "
            "and the separator's ids, return rows (inputs, targets) of `length` ids each. Drop the end of "
            "the stream that does not fill a row and its targets."
        ),
        check=_check_pack,
        solution=pack,
        mistakes=(
            Mistake("double shift", _pack_double_shift, "Shifted twice"),
            Mistake("label lost at the cut", _pack_lost_label, "last input of a row has a target"),
            Mistake("no shift", _pack_same, "inputs themselves"),
            Mistake("no separator", _pack_no_separator, "separator's ids are missing"),
            Mistake("a token skipped at each cut", _pack_overlapping, "very next token"),
        ),
        hints=(
            "Make one long list first: documents with the separator between them.",
            "A row needs length + 1 tokens of the stream: the targets are the same tokens, one further.",
            "The next row starts `length` tokens later, not length + 1.",
        ),
        minutes=10,
    ),
    Exercise(
        name="03.pairs",
        title="Pairs inside documents",
        task=(
            "Write `pairs_inside(boundaries, length)`: documents start at `boundaries` (rising, first 0) in a row of "
            "`length` tokens; how many query-key pairs are inside documents, under causal attention?"
        ),
        check=_check_pairs,
        solution=pairs_inside,
        mistakes=(
            Mistake(
                "not causal",
                lambda b, n: sum((e - s) ** 2 for s, e in zip(b, [*b[1:], n], strict=True)),
                "causal",
            ),
            Mistake(
                "without itself",
                lambda b, n: sum((e - s) * (e - s - 1) // 2 for s, e in zip(b, [*b[1:], n], strict=True)),
                "with itself",
            ),
            Mistake(
                "last document forgotten",
                lambda b, n: sum((e - s) * (e - s + 1) // 2 for s, e in pairwise(b)),
                "last document",
            ),
        ),
        hints=("A document of n tokens has 1 + 2 + ... + n pairs.", "The last document ends at `length`."),
        difficulty="easy",
        minutes=5,
    ),
    Exercise(
        name="03.leak",
        title="The leak probe",
        task=(
            "A row holds document A, then B. One token in the middle of A is changed. Which logits move, with the mask "
            "between documents and without it? Give a dict from 'masked' and 'not masked' to one of `LEAK_OPTIONS`."
        ),
        check=_check_leak,
        solution={"masked": LEAK_OPTIONS[2], "not masked": LEAK_OPTIONS[3]},
        mistakes=(
            Mistake("mask forgotten", {"masked": LEAK_OPTIONS[3], "not masked": LEAK_OPTIONS[3]}, "may not see A"),
            Mistake("mask always", {"masked": LEAK_OPTIONS[2], "not masked": LEAK_OPTIONS[2]}, "sees it"),
            Mistake("not causal", {"masked": LEAK_OPTIONS[1], "not masked": LEAK_OPTIONS[3]}, "causal"),
            Mistake("nothing moves", {"masked": "none", "not masked": LEAK_OPTIONS[3]}, "changed token itself"),
        ),
        hints=("Can a token see what stands after it?", "With the mask, can B see A?"),
        difficulty="easy",
        minutes=4,
    ),
)

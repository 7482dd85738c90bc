"""Exercises of 03_separator_packing."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from ultralong import miniature
from ultralong.course.exercise import Exercise, Mistake
from ultralong.data.read.documents import Document
from ultralong.data.rows.packing import PackSettings
from ultralong.data.rows.packing import pack as pack_rows
from ultralong.data.tokens.encoding import load_tokenizer
from ultralong.data.tokens.tokenize import tokenize_corpus

# With the separators 15 ids: the last row is not full, whether or not one more id is asked for as its last target.
DOCUMENTS = [[11, 12, 13], [21, 22], [31, 32, 33], [41]]
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
    assert isinstance(found, list | tuple) and found and all(len(row) == 2 for row in found), (
        f"Give a list of rows, each (inputs, targets); found {found!r}."
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


# ---- 03.settings

ROW = 32
LETTERS = [
    Document(f"letter-{number}", f"{name} wrote: {'the lamp was lit and no ship had passed, ' * lines}and signed it.")
    for number, (name, lines) in enumerate((("Anna", 1), ("Boris", 2), ("Clara", 1), ("David", 4), ("Emma", 1)))
]
SETTINGS = {"mask_documents": True, "row_end": "drop", "tail": "pad"}


def _check_settings(answer: Any) -> str:
    assert isinstance(answer, dict), f"Give a dict of settings and their values; found {answer!r}."
    tokenizer = load_tokenizer(miniature.path())
    with tempfile.TemporaryDirectory() as name:
        store = tokenize_corpus(LETTERS, tokenizer, Path(name) / "tokens", quiet=True)
        try:
            settings = PackSettings(**{"length": ROW, "shuffle": False, **answer})
            rows = pack_rows(store, tokenizer, Path(name) / "rows", settings, quiet=True)
        except (TypeError, ValueError) as error:
            raise AssertionError(f"`PackSettings` refuses it: {error}") from error
        assert settings.length == ROW, f"Rows have {ROW} tokens here; the length was right."
        packed = [rows[number] for number in range(len(rows))]
        several = [row for row in packed if len(row.document_ids) > 1]
        assert all((row.labels[row.boundaries[1:-1] - 1] == -100).all() for row in several), (
            "A letter sees the one before it: its first word is the label of the other's end. `mask_documents` keeps "
            "attention and labels inside."
        )
        begins = [row.input_ids[:2].tolist() for row in packed]
        first = [store[int(row.document_ids[0])][:2].tolist() for row in packed]
        other = [number for number, (a, b) in enumerate(zip(begins, first, strict=True)) if a != b]
        assert not other or settings.join == "bos_eos", (
            f"Row {other[0]} starts in the middle of a letter: it had begun in the row before. `row_end` says what "
            "becomes of a letter that a row's end cuts."
        )
        assert settings.row_end == "drop", "Rows start in the middle of a letter; see `row_end`."
        lost = rows.manifest["tail_dropped_tokens"]
        assert not lost, f"The last row was not full, and its {lost} tokens are lost; see `tail`."
    return f"{len(rows)} rows: each starts with a letter, none sees another, and the last one is padded."


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
        name="03.settings",
        title="Other choices than the recipe's",
        task=(
            "Letters are to be packed so that none sees another, every row starts with the first word of a letter, and "
            "the last row is kept though it is not full. Give a dict of the `PackSettings` to change (print "
            "`PackSettings.__doc__`); the check packs `LETTERS` with them in rows of 32 tokens."
        ),
        check=_check_settings,
        solution=SETTINGS,
        mistakes=(
            Mistake("the recipe", {}, "A letter sees the one before it"),
            Mistake("mask alone", {"mask_documents": True}, "in the middle of a letter: it had begun"),
            Mistake("tail lost", {"mask_documents": True, "row_end": "drop"}, "was not full"),
            Mistake("another word", {**SETTINGS, "tail": "keep"}, "`PackSettings` refuses it"),
            Mistake("another key", {"masked": True}, "unexpected keyword"),
        ),
        hints=(
            "Three things are asked for, and each is one setting.",
            "mask_documents, row_end, tail: the docstring says which values they have.",
        ),
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

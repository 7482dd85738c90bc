"""What the exercises of 04_data_at_scale check, with the wrong answers that their tests use."""

from __future__ import annotations

import builtins
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ultralong.data.read.documents import Document
from ultralong.data.recipe.schema import Recipe, load_recipe
from ultralong.data.recipe.stats import recipe_stats, totals
from ultralong.data.select.length_rule import LengthRule, uniform
from ultralong.data.select.overlap import words_of

CHARACTERS_PER_TOKEN = 4


# ---- 04.keep

SHORT, MIDDLE, LONG = 1_000 * CHARACTERS_PER_TOKEN, 6_000 * CHARACTERS_PER_TOKEN, 20_000 * CHARACTERS_PER_TOKEN
Keep = Callable[[Document, LengthRule, int], int]


def keep(document: Document, rule: LengthRule, seed: int) -> int:
    """How often a document is taken: the whole part of the expected number, once more for its share of ids."""
    expected = rule.expected(len(document.text) / CHARACTERS_PER_TOKEN)
    whole = math.floor(expected)
    return whole + (uniform(seed, document.id) < expected - whole)


def keep_by_turns() -> Keep:
    """Draws from one generator, so that a document's fate depends on how many came before it."""
    draw = random.Random(0)

    def answer(document: Document, rule: LengthRule, seed: int) -> int:
        return math.floor(rule.expected(len(document.text) / CHARACTERS_PER_TOKEN) + draw.random())

    return answer


def keep_salted(document: Document, rule: LengthRule, seed: int) -> int:
    """Mistake: Python's `hash` is another one in each process."""
    expected = rule.expected(len(document.text) / CHARACTERS_PER_TOKEN)
    return math.floor(expected + random.Random(hash((seed, document.id))).random())


def keep_without_seed(document: Document, rule: LengthRule, seed: int) -> int:
    """Mistake: every seed draws the same documents."""
    return keep(document, rule, 0)


def keep_without_id(document: Document, rule: LengthRule, seed: int) -> int:
    """Mistake: all documents of a length have the same draw."""
    return keep(Document("", document.text), rule, seed)


def keep_rounded(document: Document, rule: LengthRule, seed: int) -> int:
    """Mistake: the expected number is rounded, not drawn."""
    return round(rule.expected(len(document.text) / CHARACTERS_PER_TOKEN))


def keep_once(document: Document, rule: LengthRule, seed: int) -> int:
    """Mistake: no document is taken more than once."""
    return min(1, keep(document, rule, seed))


def keep_characters(document: Document, rule: LengthRule, seed: int) -> int:
    """Mistake: the rule is asked about characters, not tokens."""
    expected = rule.expected(len(document.text))
    return math.floor(expected + uniform(seed, document.id))


def check_keep(answer: Any) -> str:
    """Order, process, seed and id, then the rates."""
    rule = LengthRule(short_below=4096, short_keep=0.3, long_above=8192, long_copies=2.5)
    texts = {"short": "a" * SHORT, "middle": "a" * MIDDLE, "long": "a" * LONG}
    every = [Document(f"{kind}-{number}", text) for kind, text in texts.items() for number in range(400)]
    first = answer(every[0], rule, 0)
    assert isinstance(first, int), f"Give a whole number, how often it is taken; found {first!r}."
    salted: list[Any] = []
    kept, real = {}, builtins.hash
    try:
        # Python's own hash of a text differs from process to process, which one process can't see.
        builtins.hash = lambda value: salted.append(value) or real(value)  # type: ignore[func-returns-value]
        kept = {document.id: int(answer(document, rule, 0)) for document in every}
    finally:
        builtins.hash = real
    again = {document.id: int(answer(document, rule, 0)) for document in reversed(every)}
    assert kept == again, (
        f"{sum(kept[id] != again[id] for id in kept)} of {len(kept)} documents have another fate when they are read "
        "in another order. No counter, and no generator that goes on from document to document."
    )
    assert not salted, (
        "hash() of a text is salted: each Python process has other numbers, so no two tasks of a cluster agree. Take "
        "a digest of hashlib, or the library's uniform(seed, id)."
    )
    counted = {kind: sorted({kept[f"{kind}-{n}"] for n in range(400)}) for kind in texts}
    if all(len(found) == 1 for found in counted.values()):
        assert any(answer(every[0], rule, seed) for seed in range(20)), (
            "Not one of 400 short documents is kept at a rate of 0.3: it was rounded away."
        )
        raise AssertionError("All documents of one length have the same fate: the number has to come from the id.")
    assert counted["long"] != [1] and counted["long"] != [0, 1], (
        "A long document is taken 2.5 times on average, yours at most once. That is 2 or 3 times."
    )
    for kind, tokens in (("short", 1_000), ("middle", 6_000), ("long", 20_000)):
        mean, right = sum(kept[f"{kind}-{n}"] for n in range(400)) / 400, rule.expected(tokens)
        assert abs(mean - right) < 0.12, (
            f"Documents of {tokens:,} tokens are taken {mean:.2f} times on average, the rule says {right:g}. A token "
            f"is {CHARACTERS_PER_TOKEN} characters here."
        )
    other = {document.id: int(answer(document, rule, 1)) for document in every}
    assert other != kept, "Another seed has to choose other documents; yours chooses the same ones."
    return "the same fate in any order, in any process, and another one with another seed."


# ---- 04.overlap

MOST, LEAST = 13, 8
SENTENCE = (
    "The keeper of the northern light wrote down each ship that passed before midnight, and he counted every lamp "
    "that still burned upon the shore"
)


def overlaps(text: str, items: dict[str, str]) -> set[str]:
    """Names of items that share 13 words in a row with a text; items of 8 to 12 words have to occur as a whole."""
    words = words_of(text)
    found = set()
    for name, item in items.items():
        wanted = words_of(item)
        size = min(MOST, len(wanted))
        if size < LEAST:
            continue
        grams = {tuple(wanted[at : at + size]) for at in range(len(wanted) - size + 1)}
        if any(tuple(words[at : at + size]) in grams for at in range(len(words) - size + 1)):
            found.add(name)
    return found


def overlaps_as_written(text: str, items: dict[str, str]) -> set[str]:
    """Mistake: words are compared as they are written, with case and punctuation."""
    words = text.split()
    grams = {tuple(words[at : at + n]) for n in range(LEAST, MOST + 1) for at in range(len(words))}
    sizes = {name: min(MOST, len(item.split())) for name, item in items.items()}
    return {
        name
        for name, item in items.items()
        if sizes[name] >= LEAST
        and any(tuple(item.split()[at : at + sizes[name]]) in grams for at in range(len(item.split())))
    }


def overlaps_whole(text: str, items: dict[str, str]) -> set[str]:
    """Mistake: only an item that is there from end to end is found."""
    whole = " ".join(words_of(text))
    return {name for name, item in items.items() if len(words_of(item)) >= LEAST and " ".join(words_of(item)) in whole}


def overlaps_bag(text: str, items: dict[str, str]) -> set[str]:
    """Mistake: shared words count without their order."""
    words = set(words_of(text))
    return {name for name, item in items.items() if len(words & set(words_of(item))) >= LEAST}


def overlaps_not_the_last(text: str, items: dict[str, str]) -> set[str]:
    """Mistake: the text's last word is never compared."""
    return overlaps(" ".join(words_of(text)[:-1]), items)


def overlaps_short_too(text: str, items: dict[str, str]) -> set[str]:
    """Mistake: items of a few words are looked for as well."""
    whole = f" {' '.join(words_of(text))} "
    short = {name for name, item in items.items() if f" {' '.join(words_of(item))} " in whole}
    return short | overlaps(text, items)


def overlaps_no_short(text: str, items: dict[str, str]) -> set[str]:
    """Mistake: items shorter than the longest n-gram are left out."""
    return {name for name in overlaps(text, items) if len(words_of(items[name])) >= MOST}


def check_overlap(answer: Any) -> str:
    """A planted item in several clothes, and items that must not be found."""
    words = SENTENCE.split()
    text = f"In that year nothing else happened. {SENTENCE}. Then the log ends"
    scattered = list(words)
    random.Random(3).shuffle(scattered)
    cases = (
        ({"as written": SENTENCE}, True, "The planted item stands in the text word for word, and is not found."),
        (
            {"shouted": SENTENCE.upper().replace(" ", ", ")},
            True,
            "Case and punctuation hide the planted item. Words are compared in lower case without punctuation: "
            "words_of(text) does that.",
        ),
        (
            {"a part": f"Fill in the gap: {' '.join(words[4:19])} of the ocean. Which word is missing here?"},
            True,
            "Fifteen words in a row of this item stand in the text, the rest does not. Thirteen shared words are "
            "enough; the whole item need not occur.",
        ),
        (
            {"scattered": " ".join(scattered)},
            False,
            "This item has the same words in another order, and was found. The words have to follow each other.",
        ),
        (
            {"short": "and he counted every lamp that still burned"},
            True,
            "An item of 8 to 12 words is looked for as a whole: this one of 8 stands in the text.",
        ),
        ({"too short": "each ship that passed"}, False, "Four words in a row are ordinary speech: not looked for."),
    )
    for items, wanted, message in cases:
        found = answer(text, dict(items))
        assert isinstance(found, set), f"Give a set of names; found {type(found).__name__}."
        assert found == (set(items) if wanted else set()), message
    ends = answer(f"He said: {SENTENCE}", {"last": " ".join(words[-MOST:])})
    assert ends == {"last"}, "The item stands at the very end of the text: the last window of 13 words was left out."
    return "the planted item is found in any clothes, and what only looks like it is not."


# ---- 04.recipe

# What someone wrote; the schema accepts it, and the rows that come of it hold no long document.
BROKEN = """\
name: harbour
description: Logs and manuals of a harbour, for rows of 131,072 tokens.
seed: 7
sources:
  - name: logs
    license: CC0-1.0
    path: texts
    read: {format: text}
    max_characters: 4096
    characters_per_token: 4
length_rule: {short_below: 4096, short_keep: 0.1, long_above: 8192, long_copies: 2.0}
packing: {join: separator, separator: <s>}
"""
REPAIRED = BROKEN.replace("    max_characters: 4096\n", "    max_characters: 4000000\n")
LINE = "The tide came in at dawn and no ship had passed the light.\n"


def write_harbour(folder: Path) -> None:
    """The texts of the recipe: forty short logs and eight manuals of about 16,000 tokens."""
    (folder / "texts").mkdir(parents=True, exist_ok=True)
    for number in range(48):
        lines = 40 if number < 40 else 1_100
        (folder / "texts" / f"{number:02d}.txt").write_text(f"Log {number}\n" + LINE * lines)


def harbour_stats(recipe: str, folder: Path) -> dict[str, Any]:
    """What a recipe's text takes of these texts: documents and tokens by length, before and after sampling.

    Raises:
        ValueError: The text is no recipe.
    """
    write_harbour(folder)
    (folder / "recipe.yaml").write_text(recipe)
    return totals(recipe_stats(folder / "recipe.yaml", quiet=True)["sources"])


def check_recipe(answer: Any) -> str:
    """Load the repaired text, read with it, and look at what it takes."""
    assert isinstance(answer, str), f"Give the recipe's text, repaired; found {type(answer).__name__}."
    assert answer != BROKEN, "This is the recipe as it was. Which setting speaks of characters, and which of tokens?"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "broken.yaml").write_text(BROKEN)
        write_harbour(folder)
        broken = load_recipe(folder / "broken.yaml")
        try:
            stats = harbour_stats(answer, folder)
            recipe = load_recipe(folder / "recipe.yaml")
        except ValueError as error:
            raise AssertionError(f"The schema refuses it: {str(error).replace(name, '.')}") from error
    before, after = stats["before"]["tokens"], stats["after"]["tokens"]
    _unchanged(recipe, broken)
    assert sum(before[2:]) > 0, (
        f"No piece of a text has more than 8,192 tokens: max_characters is {recipe.sources[0].max_characters}, and "
        "the manuals have 65,000 characters. It is in characters, not in tokens."
    )
    assert sum(after[2:]) > sum(before[2:]), "The long documents should come twice on average."
    return f"documents above 8,192 tokens hold {sum(after[2:]) / sum(after):.0%} of what is taken, before it was none."


def _unchanged(recipe: Recipe, broken: Recipe) -> None:
    assert recipe.length_rule is not None, (
        "Without its length rule the recipe takes everything once. The rule was right: it did not get long documents "
        "to work on."
    )
    assert recipe.length_rule == broken.length_rule, (
        "The length rule was right. Changing its rates treats the symptom: the pieces it gets are all short."
    )
    assert recipe.packing == broken.packing and recipe.seed == broken.seed, "A repair changes what is wrong only."

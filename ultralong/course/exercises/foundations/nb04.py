"""Exercises of 04_data_at_scale."""

from __future__ import annotations

from ultralong.course.exercise import Exercise, Mistake
from ultralong.course.exercises.foundations.nb04_checks import (
    BROKEN,
    REPAIRED,
    check_keep,
    check_overlap,
    check_recipe,
    keep,
    keep_by_turns,
    keep_characters,
    keep_once,
    keep_rounded,
    keep_salted,
    keep_without_id,
    keep_without_seed,
    overlaps,
    overlaps_as_written,
    overlaps_bag,
    overlaps_no_short,
    overlaps_not_the_last,
    overlaps_short_too,
    overlaps_whole,
)

EXERCISES = (
    Exercise(
        name="04.keep",
        title="Who is kept, in any order",
        task=(
            "Write `keep(document, rule, seed)`: how often a document is taken, 0 or more. `rule.expected(tokens)` "
            "says how often on average; a token is 4 characters here. The answer depends on the seed and "
            "`document.id` alone."
        ),
        check=check_keep,
        solution=keep,
        mistakes=(
            Mistake("one generator", keep_by_turns(), "in another order"),
            Mistake("Python's hash", keep_salted, "is salted"),
            Mistake("no seed", keep_without_seed, "chooses the same ones"),
            Mistake("no id", keep_without_id, "has to come from the id"),
            Mistake("rounded", keep_rounded, "rounded away"),
            Mistake("once at most", keep_once, "yours at most once"),
            Mistake("characters", keep_characters, "A token is 4 characters"),
        ),
        hints=(
            "What number in [0, 1) belongs to a seed and an id, in every process? `uniform` of "
            "`ultralong.data.select.length_rule` gives one.",
            "2.5 copies: the whole part always, and once more if the number is below 0.5.",
        ),
        minutes=8,
    ),
    Exercise(
        name="04.overlap",
        title="A test item in the training data",
        task=(
            "Write `overlaps(text, items)`: the set of names of the items (name to text) that share 13 words in a row "
            "with the text. Words are in lower case, without punctuation. Items of 8 to 12 words have to occur as a "
            "whole; shorter ones are not looked for."
        ),
        check=check_overlap,
        solution=overlaps,
        mistakes=(
            Mistake("as written", overlaps_as_written, "in lower case without punctuation"),
            Mistake("the whole item", overlaps_whole, "need not occur"),
            Mistake("a bag of words", overlaps_bag, "have to follow each other"),
            Mistake("not the last window", overlaps_not_the_last, "at the very end"),
            Mistake("short ones too", overlaps_short_too, "ordinary speech"),
            Mistake("no short ones", overlaps_no_short, "this one of 8 stands in the text"),
        ),
        hints=(
            "`words_of` of `ultralong.data.select.overlap` makes words; compare tuples of them.",
            "A list of N words has N - 13 + 1 windows. The size is min(13, words of the item).",
        ),
        difficulty="medium",
        minutes=10,
    ),
    Exercise(
        name="04.recipe",
        title="A recipe that loads and is wrong",
        task=(
            "`BROKEN` is accepted, and gives rows without a single long document. Give its text with the one wrong "
            "setting repaired. `harbour_stats(text, folder)` shows what a recipe takes."
        ),
        check=check_recipe,
        solution=REPAIRED,
        mistakes=(
            Mistake("all short ones", BROKEN.replace("short_keep: 0.1", "short_keep: 1.0"), "treats the symptom"),
            Mistake("tokens for characters", BROKEN.replace("rs: 4096", "rs: 8192"), "in characters, not in tokens"),
            Mistake(
                "no rule",
                "".join(line for line in BROKEN.splitlines(keepends=True) if not line.startswith("length_rule")),
                "did not get long documents",
            ),
            Mistake("as it was", BROKEN, "recipe as it was"),
            Mistake("a new key", BROKEN.replace("max_characters: 4096", "max_tokens: 131072"), "The schema refuses"),
        ),
        hints=(
            "How long is the longest document before sampling? Which setting could do that?",
            "`max_characters` cuts a longer document into several. 4,096 characters are about 1,000 tokens.",
        ),
        difficulty="easy",
        minutes=6,
    ),
)

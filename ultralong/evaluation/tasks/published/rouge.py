"""The two ROUGE scores that the benchmarks use. Both look for common subsequences; they count them differently.

* LV-Eval calls the package `rouge`, whose ROUGE-L counts different words: a word that stands twice counts once.
* InfiniteBench calls `rouge-score` through `evaluate`, whose ROUGE-Lsum follows the original program (Lin 2004): line
  by line, each word as often as it stands.

N reference words, M candidate words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence


def common_places(reference: Sequence[str], candidate: Sequence[str], *, keep_candidate: bool) -> list[int]:
    """Places in the reference of one longest common subsequence.

    Args:
        reference: N words.
        candidate: M words.
        keep_candidate: Which of several subsequences of the same length is taken, as the two packages differ in it: on
            the way back through the table, a tie drops a reference word (True) or a candidate word (False).
    """
    table = [[0] * (len(candidate) + 1)]  # (N + 1, M + 1)
    for word in reference:
        above, row = table[-1], [0]
        for place, other in enumerate(candidate):
            row.append(above[place] + 1 if word == other else max(above[place + 1], row[place]))
        table.append(row)
    places = []
    i, j = len(reference), len(candidate)
    while i and j:
        if reference[i - 1] == candidate[j - 1]:
            places.append(i - 1)
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1] or (keep_candidate and table[i - 1][j] == table[i][j - 1]):
            i -= 1
        else:
            j -= 1
    return places[::-1]


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L's F of the package `rouge` 1.0.1, from 0 to 1; 0 where either text holds no sentence.

    That package walks back through its table by recursion and fails beyond some thousand words, which LV-Eval counts as
    0; here such texts get their score.
    """
    said, wanted = _sentences(answer), _sentences(reference)
    if not said or not wanted:
        return 0.0
    shared = {
        sentence[place]
        for sentence in wanted
        for other in said
        for place in common_places(sentence, other, keep_candidate=False)
    }
    precision = len(shared) / len({word for sentence in said for word in sentence})
    recall = len(shared) / len({word for sentence in wanted for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    """Words of each part between full stops; a part of white space alone is one empty word, as in the package."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def rouge_lsum(answer: str, reference: str) -> float:
    """ROUGE-Lsum's F of `rouge-score` without a stemmer, from 0 to 1: lines as sentences, no word counted twice."""
    said, wanted = (
        [re.findall(r"[a-z0-9]+", line.lower()) for line in text.split("\n") if line] for text in (answer, reference)
    )
    left_said, left_wanted = (Counter(word for line in lines for word in line) for lines in (said, wanted))
    sizes = left_said.total(), left_wanted.total()
    if not all(sizes):
        return 0.0
    hits = 0
    for line in wanted:
        places = {place for other in said for place in common_places(line, other, keep_candidate=True)}
        for word in (line[place] for place in sorted(places)):
            if left_said[word] and left_wanted[word]:
                hits += 1
                left_said[word] -= 1
                left_wanted[word] -= 1
    precision, recall = hits / sizes[0], hits / sizes[1]
    return 2 * precision * recall / (precision + recall) if hits else 0.0

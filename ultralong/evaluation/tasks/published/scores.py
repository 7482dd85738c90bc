"""Scores of the published sets as the official code gives them, one answer at a time, from 0 to 1.

LV-Eval: github.com/infinigence/LVEval, metrics.py and evaluation.py. Three things differ there from what its paper
says, and the code is followed: the gate is 0.2 for English and 0.4 for Chinese; idle words are left out of the keywords
that count as found, and not before F1; only the first reference counts.

InfiniteBench: github.com/OpenBMB/InfiniteBench, compute_scores.py of June 2024, En.Dia as mended in August 2024.

The two ROUGE scores look for common subsequences and count them differently. LV-Eval calls the package `rouge`, whose
ROUGE-L counts different words: a word that stands twice counts once. InfiniteBench calls `rouge-score` through
`evaluate`, whose ROUGE-Lsum follows the original program (Lin 2004): line by line, each word as often as it stands.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

from ultralong.evaluation.tasks.published.catalogue import idle_words, marks
from ultralong.utils.extras import require

ENGLISH_GATE = 0.2
CHINESE_GATE = 0.4
SEGMENTED = ("chinese_f1", "gated_chinese_f1", "chinese_rouge_l")  # scores that split Chinese into words by jieba
ASCII_MARKS = str.maketrans("", "", string.punctuation)
CHOICE_SEPARATORS = str.maketrans(dict.fromkeys("\n\"'.,?!{}", " "))
BUG_SEPARATORS = re.compile("[\n`'\"*-]|[Oo]ption")


def english_words(text: str) -> list[str]:
    """Words in lower case without punctuation and articles (SQuAD's normalisation)."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(ASCII_MARKS)).split()


def chinese_plain(text: str) -> str:
    """The text in lower case without punctuation and white space."""
    return "".join("".join(mark for mark in text.lower() if mark not in marks()).split())


@cache
def _segmenter() -> Callable[[str], list[str]]:
    jieba = require("jieba", extra="eval")
    jieba.setLogLevel("WARNING")  # it tells of its dictionary on standard error
    return jieba.lcut


def chinese_words(text: str) -> list[str]:
    """Words by jieba, without punctuation.

    Raises:
        ImportError: jieba is not installed.
    """
    return [word for word in (chinese_plain(piece) for piece in _segmenter()(text)) if word]


def token_f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over tokens, each counted as often as it stands."""
    same = (Counter(said) & Counter(wanted)).total()
    if not same:
        return 0.0
    precision, recall = same / len(said), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _gated(said: Sequence[str], wanted: Sequence[str], keys: Sequence[str], idle: frozenset[str], gate: float) -> float:
    found = Counter(said) & Counter(keys)
    # Keywords of punctuation alone stop the official code with an error; nothing can be asked of such an answer.
    if keys and sum(count for word, count in found.items() if word not in idle) / len(keys) < gate:
        return 0.0
    return token_f1(said, wanted)


def english_f1(answer: str, references: Sequence[str], keywords: str | None = None) -> float:
    """LV-Eval's `qa_f1_score`; keywords do not count."""
    return token_f1(english_words(answer), english_words(references[0]))


def gated_english_f1(answer: str, references: Sequence[str], keywords: str | None = None) -> float:
    """LV-Eval's `qa_f1_score_with_gold_ans`: 0 below a fifth of the keywords' words, otherwise F1."""
    return _gated(
        english_words(answer),
        english_words(references[0]),
        english_words(keywords or ""),
        idle_words("en"),
        ENGLISH_GATE,
    )


def chinese_f1(answer: str, references: Sequence[str], keywords: str | None = None) -> float:
    """LV-Eval's `qa_f1_zh_score`; keywords do not count."""
    return token_f1(chinese_words(answer), chinese_words(references[0]))


def gated_chinese_f1(answer: str, references: Sequence[str], keywords: str | None = None) -> float:
    """LV-Eval's `qa_f1_zh_score_with_gold_ans`: 0 below two fifths of the keywords' words, otherwise F1.

    Without keywords the reference stands in for them.
    """
    return _gated(
        chinese_words(answer),
        chinese_words(references[0]),
        chinese_words(keywords or references[0]),
        idle_words("zh"),
        CHINESE_GATE,
    )


def chinese_rouge_l(answer: str, references: Sequence[str], keywords: str | None = None) -> float:
    """LV-Eval's `rouge_zh_score_blacklist`: ROUGE-L over words that are not idle; keywords do not count."""
    cut, idle = _segmenter(), idle_words("zh")
    # The official code segments what it has segmented and joined by spaces, which can split words further.
    words = [[chinese_plain(piece) for piece in cut(" ".join(cut(text)))] for text in (answer, references[0])]
    said, wanted = (" ".join(word for word in part if word not in idle) for part in words)
    return rouge_l(said, wanted)


def best_english_f1(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench's En.QA: F1 over words, the best of all references."""
    return max(token_f1(english_words(answer), english_words(reference)) for reference in references)


def best_chinese_f1(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench's Zh.QA: F1 over characters, the best of all references."""
    return max(token_f1(chinese_plain(answer), chinese_plain(reference)) for reference in references)


def rouge_lsum(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench's En.Sum: ROUGE-Lsum's F without a stemmer, the best of all references.

    lm-eval's version stems words, which reads higher.
    """
    return max(rouge_lsum_f(answer, reference) for reference in references)


def chosen_letter(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench's En.MC; `references` are the right option's text and its letter.

    The first character counts when it is A, B, C or D. Failing that: the answer is the option's text; or what follows
    "answer is" and the like starts with it; or the first word made of these letters is it.
    """
    text = answer.strip()
    if not text:
        return 0.0
    if text[0] in "ABCD":
        return float(text[0] in references)
    if text in references:
        return 1.0
    text = re.sub(" +", " ", text.translate(CHOICE_SEPARATORS))
    after = _after(text, ("answer is:", "answer:", "answer is", "option is"))
    if after is not None:
        return float(after.startswith(tuple(references)))
    letters = next((word for word in text.split() if word in "ABCD"), None)
    return float(letters in references)


def named_bug(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench's Code.Debug; `references` are the broken function's name and its letter.

    The letter must come first with a full stop or colon behind it, or follow "is:" or "answer:", as may the name. A
    letter alone is wrong: so says the official code.
    """
    name, letter = references
    text = answer.strip()
    if text[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    text = re.sub(" +", " ", BUG_SEPARATORS.sub(" ", text))
    after = _after(text, ("answer is:", "is:", "answer:"))
    return float(after is not None and after.startswith((letter, name)))


def _after(text: str, openings: Sequence[str]) -> str | None:
    """What follows the first opening that occurs, without the character behind it; None where none does."""
    for opening in openings:
        place = text.find(opening)
        if place >= 0:
            return text[place + len(opening) + 1 :]
    return None


def named_character(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench's En.Dia: any of the names occurs in the answer, letter case aside.

    The code of June 2024 took the first name alone and compared it with single words, so that a name of two words was
    never right; the authors mended that in August 2024 (their repository's issue 18).
    """
    said = answer.upper()
    return float(any(name.upper() in said for name in references if name))


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


def rouge_lsum_f(answer: str, reference: str) -> float:
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

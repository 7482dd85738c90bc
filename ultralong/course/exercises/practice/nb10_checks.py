"""What the exercises of 10_evaluation compute: right answers, wrong ones, and the checks."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from ultralong.evaluation.measures.intervals import paired_difference, wilson
from ultralong.evaluation.tasks.samples import find_task, make_samples
from ultralong.evaluation.tasks.scoring import match_part
from ultralong.utils.hub import MINIATURE

SOLVED = (
    "infinitebench_kv_retrieval",
    "ruler_vt",
    "ruler_fwe",
)  # tests whose texts are all made here, without a download


# ---- 10.solve


def solve(task: str, text: str, prefix: str) -> str:
    """The answer to a prompt of three tests by regular expressions, without reading it."""
    if task == "infinitebench_kv_retrieval":
        key = re.findall(r'Key: "(.+)"', text)[-1]
        return re.findall(rf'"{key}": "(.+?)"', text)[0]
    if task == "ruler_vt":
        asked = text[text.rindex("Memorize and track") :]
        value = re.findall(r"assigned the value (\d+)", asked)[-1]
        names = re.findall(rf"VAR (\w+) = {value}", asked)
        for name, source in re.findall(r"VAR (\w+) = VAR (\w+)", asked):
            if source in names:
                names.append(name)
        return " ".join(names)
    words = text[text.index("coded words. ") + 13 : text.index("\nQuestion")].split()
    return " ".join(word for word, _ in Counter(words).most_common(4) if set(word) != {"."})


def solve_first_value(task: str, text: str, prefix: str) -> str:
    """Mistake: the last value of the list, whatever the key that is asked for."""
    return re.findall(r'": "(.+?)"', text)[-1] if "kv" in task else solve(task, text, prefix)


def solve_one_hop(task: str, text: str, prefix: str) -> str:
    """Mistake: only the variable that was given the value itself."""
    return solve(task, text, prefix).split()[0] if task == "ruler_vt" else solve(task, text, prefix)


def solve_example(task: str, text: str, prefix: str) -> str:
    """Mistake: the worked example is answered."""
    if task != "ruler_vt":
        return solve(task, text, prefix)
    return " ".join(re.findall(r"VAR (\w+) =", text[: text.rindex("Memorize and track")]))


def solve_dots(task: str, text: str, prefix: str) -> str:
    """Mistake: the dots between coded words count as a word."""
    if task != "ruler_fwe":
        return solve(task, text, prefix)
    words = text[text.index("coded words. ") + 13 : text.index("\nQuestion")].split()
    return " ".join(word for word, _ in Counter(words).most_common(3))


def check_solve(answer: Any) -> str:
    """The solver's score on samples of each test."""
    tokenizer = AutoTokenizer.from_pretrained(str(MINIATURE))
    for task in SOLVED:
        for record in make_samples(task, tokenizer, 1500, 3, chat=False):
            found = str(answer(task, record["input"], record["answer_prefix"]))
            score = find_task(task).grade({**record, "prediction": found})
            wanted = ", ".join(record["outputs"])
            said = f"{task}: you said {found[:60]!r}, wanted {wanted}. "
            if task == "ruler_vt" and score < 1:
                example = record["input"][: record["input"].rindex("Memorize and track")]
                assert not found or not all(name in example for name in found.split()), (
                    said + "Those are names of the worked example that stands before the task: look behind the last "
                    "'Memorize and track'."
                )
                assert len(found.split()) >= 5, (
                    said + "A variable that was set from another one of the chain has the value too: follow it."
                )
            if task == "ruler_fwe" and score < 1:
                assert "..." not in found, said + "The dots are noise, and the most frequent word: leave them out."
            assert score == 1, said + "Read the question at the end of the prompt: which key, which value?"
    return "100 on three tests, and nothing was understood. So they test finding and counting over a long text."


# ---- 10.match_part


def match_part_lm_eval(answer: str, references: Sequence[str]) -> float:
    """Mistake: the share of references found, where one of them is enough."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def check_match_part(answer: Any) -> str:
    """An answer that names one of several references."""
    several = ["Denver Broncos", "Denver", "the Broncos"]
    said = "I think it was Denver, in 2016."
    found, right = float(answer(said, several)), match_part(said, several)
    assert not math.isclose(found, match_part_lm_eval(said, several)), (
        f"{found:.2f}: you divide by the {len(several)} references. They are ways to write one answer, so any one is "
        "enough: 1. (An old version of a well-known harness divides, and reads low.)"
    )
    assert found != 0, "The answer holds 'Denver' within a sentence; a reference has to occur in it, not to equal it."
    assert found == right, f"One reference occurs, the score is 1, yours {found}."
    assert float(answer("DENVER", several)) == 1, "'DENVER' is right as well: letter case does not count."
    assert float(answer("Carolina", several)) == 0, "'Carolina' holds no reference: 0."
    return "1 where any reference occurs, else 0."


# ---- 10.wilson


def my_wilson(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z, share = 1.959963984540054, correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def wald(correct: int, n: int) -> tuple[float, float]:
    """Mistake: the normal interval, which has no width at 0 and 100 percent."""
    share = correct / n
    half = 1.96 * math.sqrt(share * (1 - share) / n)
    return share - half, share + half


def wilson_ninety(correct: int, n: int) -> tuple[float, float]:
    """Mistake: 90 percent instead of 95."""
    return wilson(correct, n, 0.90)


def wilson_whole_width(correct: int, n: int) -> tuple[float, float]:
    """Mistake: the whole width on each side."""
    low, high = wilson(correct, n)
    return low - (high - low) / 2, high + (high - low) / 2


def check_wilson(answer: Any) -> str:
    """The interval for few and many samples, none and all of them right."""
    for correct, n in ((20, 20), (0, 5), (16, 20), (54, 120)):
        low, high = map(float, answer(correct, n))
        right = wilson(correct, n)
        say = f"{correct} of {n}: you say {low:.3f} to {high:.3f}, Wilson {right[0]:.3f} to {right[1]:.3f}. "
        if correct in (0, n):
            assert high - low > 1e-6, say + f"{n} samples can't make certain: plus or minus two errors is empty here."
        assert not (math.isclose(low, wilson(correct, n, 0.90)[0]) and correct not in (0,)), (
            say + "That is the 90% interval: z is 1.96 for 95%."
        )
        assert -1e-9 <= low <= high <= 1 + 1e-9, say + "A share lies between 0 and 1."
        assert math.isclose(low, right[0], abs_tol=2e-4), say + "See the formula above the exercise."
        assert math.isclose(high, right[1], abs_tol=2e-4), say + "See the formula above the exercise."
    return "it stays within 0 and 1, and is not empty at 20 of 20: 84% to 100%."


# ---- 10.paired


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean of second minus first over the same samples, and its standard error."""
    differences = np.asarray(second, float) - np.asarray(first, float)
    return float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))


def paired_as_apart(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mistake: the error of two sets of samples that have nothing to do with each other."""
    n = len(first)
    return paired(first, second)[0], math.sqrt((np.var(first, ddof=1) + np.var(second, ddof=1)) / n)


def paired_turned(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mistake: first minus second."""
    mean, error = paired(first, second)
    return -mean, error


def paired_spread(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mistake: the spread of the differences instead of the error of their mean."""
    mean, error = paired(first, second)
    return mean, error * math.sqrt(len(first))


def two_readers(seed: int = 0, n: int = 100) -> tuple[list[float], list[float]]:
    """Scores of two readers on the same samples: hard samples are hard for both, and the second is a little better."""
    draw = np.random.default_rng(seed)
    hard = draw.normal(0, 1, n)
    noise = draw.normal(0, 0.35, (2, n))
    return (hard + noise[0] < 0.2).astype(float).tolist(), (hard + noise[1] < 0.45).astype(float).tolist()


def check_paired(answer: Any) -> str:
    """The mean difference of two readers and its standard error."""
    first, second = two_readers()
    right, found = paired(first, second), tuple(map(float, answer(list(first), list(second))))
    say = f"You say {found[0]:+.3f} with an error of {found[1]:.4f}. "
    assert not math.isclose(found[0], -right[0]), say + "The sign is turned: it is second minus first."
    assert not math.isclose(found[1], paired_as_apart(first, second)[1], rel_tol=0.02), (
        say + "That is the error for two models on *different* samples. Here hard samples are hard for both: take the "
        "differences first, then their spread."
    )
    assert not math.isclose(found[1], right[1] * math.sqrt(len(first)), rel_tol=0.02), (
        say
        + f"That is the spread of one difference; the mean of {len(first)} has a {math.sqrt(len(first)):.0f}th of it."
    )
    assert math.isclose(found[0], right[0]), say + f"The mean difference is {right[0]:+.3f}."
    assert math.isclose(found[1], right[1], rel_tol=0.02), say + f"The error is {right[1]:.4f}."
    library = paired_difference(first, second, seed=0)
    apart = paired_as_apart(first, second)[1]
    return (
        f"{right[0]:+.2f}, {library.low:+.2f} to {library.high:+.2f} by the library's bootstrap; with other samples "
        f"for each the error would be {apart / right[1]:.1f} times as large."
    )


# ---- 10.unaverage


def unaverage(to_128k: float, to_512k: float, to_1m: float) -> tuple[float, float]:
    """Mean score at 256K and 512K, and score at 1M, from means over all lengths from 4K up to each."""
    return (8 * to_512k - 6 * to_128k) / 2, 9 * to_1m - 8 * to_512k


def unaverage_sum(to_128k: float, to_512k: float, to_1m: float) -> tuple[float, float]:
    """Mistake: the sum over two lengths instead of their mean."""
    return 8 * to_512k - 6 * to_128k, 9 * to_1m - 8 * to_512k


def check_unaverage(answer: Any) -> str:
    """Single lengths from the published means of two models."""
    for name, row in (("Llama-3.1-8B-Instruct", (88.3, 68.2, 61.3)), ("Gradient-1048k", (82.4, 79.8, 77.8))):
        right = unaverage(*row)
        found = tuple(map(float, answer(*row)))
        say = f"{name}: you say {found[0]:.1f} at 256K and 512K, {found[1]:.1f} at 1M. "
        assert not math.isclose(found[0], row[1]), (
            say + "Those are the means as published: six, eight and nine lengths from 4K on are in them."
        )
        assert not math.isclose(found[0], unaverage_sum(*row)[0]), (
            say + "What two lengths add to the sum is the sum of both; their mean is half of it."
        )
        assert not math.isclose(found[1], 2 * row[2] - row[1]), (
            say + "A mean over 9 lengths holds each as a ninth, not as a half: multiply each mean by its lengths."
        )
        assert math.isclose(found[0], right[0], abs_tol=0.1), say + f"At 256K and 512K it is {right[0]:.1f}."
        assert math.isclose(found[1], right[1], abs_tol=0.1), say + f"At 1M it is {right[1]:.1f}."
    return "a mean from 4K to 1M of 61 hides a score of 6 at 1M."

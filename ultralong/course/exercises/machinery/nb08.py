"""Exercises of 08_one_gpu_run: a step's time from two others, learning rates from curves, what a resume needs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch

from ultralong.course.exercise import Exercise, Mistake
from ultralong.course.exercises.presets import changed_preset
from ultralong.planner.planner import plan

# Seconds of a training step of SmolLM2-135M on one H200, from notebooks/results/training_h200.json.
MEASURED = {16384: 0.257, 65536: 1.9663, 131072: 6.9167}


# ---- 08.step


def step_seconds(tokens: int, measured: Mapping[int, float]) -> float:
    """Seconds of a step at another length: a part that grows with the tokens, and one with their square."""
    (n, s), (m, t) = sorted(measured.items())
    square = (t / m - s / n) / (m - n)
    return tokens * (s / n - square * n) + square * tokens**2


def step_in_proportion(tokens: int, measured: Mapping[int, float]) -> float:
    """Wrong: seconds in proportion to the tokens."""
    n = min(measured)
    return measured[n] * tokens / n


def step_square_only(tokens: int, measured: Mapping[int, float]) -> float:
    """Wrong: seconds in proportion to the tokens' square."""
    n = min(measured)
    return measured[n] * (tokens / n) ** 2


def step_on_the_line(tokens: int, measured: Mapping[int, float]) -> float:
    """Wrong: the line through both measurements."""
    (n, s), (m, t) = sorted(measured.items())
    return s + (t - s) * (tokens - n) / (m - n)


def check_step(answer: Any) -> str:
    """Compare with what was measured at two lengths."""
    worst = 0.0
    for tokens in (65536, 131072):
        known = {n: s for n, s in MEASURED.items() if n != tokens}
        found, right = float(answer(tokens, dict(known))), MEASURED[tokens]
        say = f"{tokens:,} tokens: you say {found:.2f} s, measured {right:.2f}. "
        off = abs(found / right - 1)
        assert off <= 0.25 or not math.isclose(found, step_in_proportion(tokens, known), rel_tol=0.01), (
            say + "In proportion to the tokens? Attention grows with their square."
        )
        assert off <= 0.25 or not math.isclose(found, step_square_only(tokens, known), rel_tol=0.01), (
            say + "Not all work is a square: projections and feed-forward layers grow with the tokens only."
        )
        assert off <= 0.25 or not math.isclose(found, step_on_the_line(tokens, known), rel_tol=0.01), (
            say + "A straight line between two points has no square in it."
        )
        assert off <= 0.25, say + "Solve a n + b n^2 for the two measured lengths."
        worst = max(worst, off)
    return f"within {worst:.0%} of what was measured, from two other lengths."


# ---- 08.plan

PRESET, TOKENS, HOUR, LOST = "smollm2-135m-64k", 130_000_000, 3600.0, 600.0  # seconds: of the run, between checkpoints
CHANGES = {"steps": 2000, "save_every": 200}


def check_plan(answer: Any) -> str:
    """Ask the planner for the seconds of the changed preset's run, and count its tokens."""
    plain, config = changed_preset(PRESET, {}), changed_preset(PRESET, answer)
    assert config.length is not None and plain.length is not None
    assert config.length >= plain.length, (
        f"Rows of {config.length:,} tokens never show the model the far half of its window of {plain.length:,}."
    )
    made = plan(config, 1)
    assert made.fits, f"It does not fit: {made.total('gpu') / 2**30:.0f} GiB on an H200."
    step, seconds = made.seconds_per_step, config.steps * made.seconds_per_step
    tokens = config.steps * config.global_batch_size * config.length
    said = f"{config.steps:,} steps of {step:.2f} s, {seconds / 60:.0f} minutes by the plan. "
    assert tokens >= TOKENS, (
        said + f"They read {tokens / 1e6:.0f} million tokens, and {TOKENS / 1e6:.0f} are asked for."
    )
    assert seconds <= HOUR, (
        said + "There are 60. A row of twice the tokens takes more than twice the time, and so does attention that is "
        "computed again: what did you change that costs more than it gives?"
    )
    every = config.steps // 20 if config.save_every == "auto" else config.save_every or config.steps
    assert every * step <= LOST, (
        said
        + f"A checkpoint every {every:,} steps: a machine that is lost takes {every * step / 60:.0f} minutes of work "
        "with it. Ten are allowed."
    )
    return f"{tokens / 1e6:.0f} million tokens in {seconds / 60:.0f} minutes of one H200, as planned before it starts."


# ---- 08.triage

VERDICTS = ("too low", "good", "too high", "diverged")
RIGHT = {"A": "good", "B": "diverged", "C": "too low", "D": "too high"}


def verdicts(a: str, b: str, c: str, d: str) -> dict[str, str]:
    """The verdicts of the four curves."""
    return dict(zip("ABCD", (a, b, c, d), strict=True))


def check_triage(answer: Any) -> str:
    """Compare with the verdict on each recorded curve."""
    given = answer if isinstance(answer, dict) else {}
    assert set(given) == set(RIGHT) and set(given.values()) <= set(VERDICTS), (
        f"Give a dict with the keys A, B, C, D, each with one of {', '.join(VERDICTS)}; found {answer!r}."
    )
    assert given["B"] == "diverged", f"B is {given['B']!r}? Its loss ends far above that of guessing: it has diverged."
    assert given["C"] == "too low", (
        f"C is {given['C']!r}? It is smooth, but it hardly moves from its first value: nothing is learnt yet."
    )
    assert given["D"] == "too high", (
        f"D is {given['D']!r}? It rises in its first steps and stays above zero, but does not run away: too high."
    )
    assert given["A"] == "good", f"A is {given['A']!r}? It falls from the start, and ends lowest."
    return "a smooth curve is no proof of a good learning rate, and a rising one is not always lost."


# ---- 08.resume

STATES = ("parameters", "adam mean", "adam square", "step", "random state", "gradients")
NEEDED = frozenset(STATES) - {"gradients"}
MISSING = {
    "parameters": "Without the parameters there is no model to go on with.",
    "adam mean": "AdamW's running mean of gradients starts from zero again: the first steps go another way.",
    "adam square": "AdamW's running mean of squares starts from zero again: the first steps are of another size.",
    "step": "Without the step the warm-up starts again, and AdamW corrects its means as if they were new.",
    "random state": "Without the random state dropout and the order of rows are drawn anew.",
}


def _train(first: int, last: int, state: dict[str, Any]) -> dict[str, Any]:
    """A toy run with AdamW, a warm-up and dropout, from step `first` to before `last`."""
    generator = torch.Generator()
    generator.set_state(state["random state"])
    weight, mean, square = (state[name].clone() for name in ("parameters", "adam mean", "adam square"))
    step = state["step"]
    for _ in range(first, last):
        step += 1
        row = torch.randn(8, generator=generator, dtype=torch.float64)
        kept = torch.rand(8, generator=generator, dtype=torch.float64) > 0.1
        grad = 2 * (weight - row) * kept
        mean, square = 0.9 * mean + 0.1 * grad, 0.95 * square + 0.05 * grad**2
        size = 0.1 * min(1.0, step / 4) / (1 - 0.9**step)
        weight = weight - size * mean / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
    return {"parameters": weight, "adam mean": mean, "adam square": square, "step": step,
            "random state": generator.get_state(), "gradients": grad}  # fmt: skip


def _fresh() -> dict[str, Any]:
    zero = torch.zeros(8, dtype=torch.float64)
    start = {"parameters": zero, "adam mean": zero, "adam square": zero, "step": 0, "gradients": zero}
    return {**start, "random state": torch.Generator().manual_seed(0).get_state()}


def resumed_alike(saved: Collection[str]) -> bool:
    """Whether the toy run, stopped after half of its steps, ends with the same bits if only `saved` was saved."""
    whole = _train(0, 10, _fresh())
    half = _train(0, 5, _fresh())
    again = _train(5, 10, {name: half[name] if name in saved else value for name, value in _fresh().items()})
    return torch.equal(whole["parameters"], again["parameters"])


def check_resume(answer: Any) -> str:
    """Compare with what a resume needs."""
    given = set(answer) if isinstance(answer, set | frozenset | list | tuple) else {answer}
    assert given <= set(STATES), f"Choose among {', '.join(STATES)}; found {sorted(map(str, given - set(STATES)))}."
    for name in STATES:
        assert name in given or name not in NEEDED, f"The resumed run ended with other weights. {MISSING[name]}"
    assert "gradients" not in given, (
        "The same bits, but gradients are saved for nothing: they are zero after each step, and as large as the model."
    )
    assert resumed_alike(given), "The resumed run ended with other weights."
    return "the resumed run ends with the same bits, and nothing is saved for nothing."


EXERCISES = (
    Exercise(
        name="08.step",
        title="The time of a step from two others",
        task=(
            "Write `step_seconds(tokens, measured)`: `measured` has the seconds of a step at two lengths. Give those "
            "at another length, within 25% of what was measured."
        ),
        check=check_step,
        solution=step_seconds,
        mistakes=(
            Mistake("in proportion", step_in_proportion, "grows with their square"),
            Mistake("square only", step_square_only, "Not all work is a square"),
            Mistake("straight line", step_on_the_line, "no square in it"),
            Mistake("a constant", lambda n, m: max(m.values()) * 3, "Solve a n + b n^2"),
        ),
        hints=(
            "Which work grows with the tokens, and which with their square?",
            "Divide both times by their tokens: s/n = a + b n is a straight line through two points.",
        ),
        minutes=8,
    ),
    Exercise(
        name="08.plan",
        title="A run that fits an hour",
        task=(
            f"You have one hour of one H200. Give the changes of the preset {PRESET}, a dict as --set takes it, so "
            "that the run reads 130 million tokens or more in rows of at least 65,536 and saves at least every ten "
            "minutes. The planner judges."
        ),
        check=check_plan,
        solution=CHANGES,
        mistakes=(
            Mistake("as it is", {}, "They read 66 million tokens"),
            Mistake("shorter rows", {"length": 32768, "steps": 4000}, "far half of its window"),
            Mistake("longer rows", {"length": 131072, "steps": 1000, "save_every": 100}, "There are 60"),
            Mistake("never saved", {"steps": 2000, "save_every": 0}, "Ten are allowed"),
            Mistake("another key", {"tokens": 130_000_000}, "The trainer refuses it"),
        ),
        hints=(
            "130 million over the tokens of a row are the steps. The plan above has the seconds of one.",
            "Ten minutes over the seconds of a step are the most steps between two checkpoints.",
        ),
        minutes=6,
    ),
    Exercise(
        name="08.triage",
        title="Four learning rates from their curves",
        task=(
            'Give a dict with a verdict for each of the recorded curves A, B, C and D: "too low", "good", "too high" '
            'or "diverged".'
        ),
        check=check_triage,
        solution=verdicts("good", "diverged", "too low", "too high"),
        mistakes=(
            Mistake("smooth is good", verdicts("too high", "diverged", "good", "too high"), "hardly moves"),
            Mistake("B only too high", verdicts("good", "too high", "too low", "too high"), "it has diverged"),
            Mistake("D diverged", verdicts("good", "diverged", "too low", "diverged"), "does not run away"),
            Mistake("a list", ["good", "diverged"], "Give a dict"),
        ),
        hints=("Where does each start, and where does it end?", "Guessing among 512 words costs log(512) = 6.2 nats."),
        difficulty="easy",
        minutes=5,
    ),
    Exercise(
        name="08.resume",
        title="What a checkpoint needs",
        task=(
            "Give a set of what has to be saved so that a resumed run ends with the same bits, and nothing more. There "
            f"are: {', '.join(STATES)}."
        ),
        check=check_resume,
        solution=set(NEEDED),
        mistakes=(
            Mistake("weights only", {"parameters"}, "running mean of gradients starts from zero"),
            Mistake("no step", set(NEEDED) - {"step"}, "warm-up starts again"),
            Mistake("no random state", set(NEEDED) - {"random state"}, "drawn anew"),
            Mistake("all", set(STATES), "saved for nothing"),
        ),
        hints=(
            "Which variables does the loop read before it writes them?",
            "AdamW has three: two means and the number of steps.",
        ),
        minutes=6,
    ),
)

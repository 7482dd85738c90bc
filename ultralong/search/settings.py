"""What a search tries, and on what it is scored."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal

from ultralong.utils.units import Tokens, check_seed

Temperature = Literal["own", "off"]


@dataclass(frozen=True)
class SearchSettings:
    """A search for the scaling of one model.

    Attributes:
        model: Folder, hub id or miniature: the model to extend.
        to: Tokens of the new window.
        methods: RoPE methods to try; longrope evolves a factor for each pair.
        factors: Scaling factors to try, as multiples of the new window over the window of pretraining.
        betas: For yarn and llama3: turns within the pretraining window above which a rotary pair keeps its frequency.
        temperatures: For yarn and longrope: the method's own attention factor, or none.
        bases: RoPE bases to try by themselves, without a factor.
        population: longrope: factor lists of the first generation.
        parents: longrope: best lists that the next generation comes from.
        generations: longrope: further generations, each of as many new lists as the population.
        critical: longrope: the first pair that is slowed down by the whole factor and more; by default the one that
            theory gives and three before it are tried.
        objective: What the order is by: the loss of needles' answers, or LongPPL.
        lengths: Tokens of the needles' prompts; by default the new window alone.
        depths: Where needles stand, from 0 (first) to 1 (last).
        samples: Needles of each length and depth.
        haystack: Text file or folder to hide needles in; repeated filler without it.
        rows: LongPPL: folder of packed rows of long documents, read as whole rows.
        evaluator: LongPPL: the model that chooses key tokens, one that reads this far.
        short_context: LongPPL: tokens of the short context.
        short_stride: LongPPL: tokens that share a short context.
        key_alpha: LongPPL: nats by which the long context must raise a key token's log-likelihood.
        key_beta: LongPPL: what a key token's log-likelihood with the long context must be above.
        max_rows: LongPPL: rows to use.
        finalists: Best scalings that are also trained for a few steps, where `train` is given; of each method at most
            one more than an even share.
        train: Settings file or preset of that training; its rows are trained on.
        steps: Its steps.
        seed: Seed of needles and of all draws.
        chunk: Tokens of one pass over a prompt; by default 16,384 of prompts beyond 32,768.
    """

    model: str
    to: Tokens
    methods: tuple[str, ...] = ("yarn", "llama3", "ntk", "linear", "longrope")
    factors: tuple[float, ...] = (1.0, 2.0)
    betas: tuple[float, ...] = (4.0, 16.0, 32.0)
    temperatures: tuple[Temperature, ...] = ("own", "off")
    bases: tuple[float, ...] = ()
    population: int = 16
    parents: int = 6
    generations: int = 6
    critical: int | None = None
    objective: Literal["needles", "longppl"] = "needles"
    lengths: tuple[Tokens, ...] = ()
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    samples: int = 2
    haystack: str | None = None
    rows: str | None = None
    evaluator: str | None = None
    short_context: Tokens = 4096
    short_stride: Tokens = 1024
    key_alpha: float = 2.0
    key_beta: float = -2.0
    max_rows: int = 4
    finalists: int = 3
    train: str | None = None
    steps: int = 10
    seed: int = 0
    chunk: Tokens | None = None

    def __post_init__(self) -> None:
        for name in ("model", "haystack", "rows", "evaluator", "train"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, os.path.expanduser(path))
        counts = ("population", "parents", "samples", "max_rows", "finalists", "steps")
        if min(getattr(self, name) for name in counts) < 1 or self.generations < 0 or self.to < 2:
            raise ValueError(f"{', '.join(counts)} must be 1 or more, generations 0 or more, and to a window.")
        check_seed(self.seed)
        if self.parents > self.population:
            raise ValueError(f"parents ({self.parents}) must be no more than population ({self.population}).")
        if not self.methods and not self.bases:
            raise ValueError("Name at least one method or base to try.")
        if any(not 1 <= factor < math.inf for factor in self.factors):
            raise ValueError(f"factors are multiples of new over old window and at least 1, found {self.factors}.")
        if self.objective == "longppl" and (self.rows is None or self.evaluator is None):
            raise ValueError(
                "LongPPL needs rows of long documents and an evaluator that reads this far: give both, or search by "
                "needles."
            )

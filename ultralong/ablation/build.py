"""The artefacts of a study in its folder: each is built once, under its key, and found again after a stop."""

from __future__ import annotations

import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ultralong.ablation.configs import evaluation_keys, run_settings, sft_config, training_config
from ultralong.ablation.design import Design, Sft, Stage
from ultralong.ablation.keys import conversations_key, conversations_of, recipe_of
from ultralong.ablation.outcomes import Outcome, read_outcomes
from ultralong.ablation.resolve import (
    Link,
    base_folder,
    extension_key,
    final_key,
    heldout_key,
    links,
    measured_key,
    pretrained_key,
    tuned_key,
)
from ultralong.ablation.train_run import has_states, is_trained, remove_states, train_run
from ultralong.checkpoints.config import load_config
from ultralong.checkpoints.extend import extend
from ultralong.checkpoints.merge import merge
from ultralong.data.recipe.build import pack_recipe
from ultralong.data.recipe.schema import Recipe
from ultralong.data.recipe.texts import read_documents
from ultralong.evaluation.runs.run import run
from ultralong.rope import window_of
from ultralong.training.config import TrainConfig
from ultralong.utils.environment import describe_environment
from ultralong.utils.files import drop_partials, file_lock, make_folder, read_json, read_jsonl, write_json, write_text

LOCKS = "locks"
PATIENCE = 30 * 24 * 3600.0  # seconds that one call waits for what another builds


@dataclass(frozen=True)
class Builder:
    """Builds what is missing.

    Attributes:
        out: The study's folder.
        base: Key of the model before.
        device: Where evaluation runs.
        quiet: No progress bars, and no line for each thing that is built.
    """

    out: Path
    base: str
    device: str = "auto"
    quiet: bool = False

    @contextmanager
    def alone(self, key: str, wait: float = PATIENCE) -> Iterator[None]:
        """Hold a part of the study among all calls that work in its folder.

        Args:
            key: Name of the part.
            wait: Seconds to wait for another call that holds it.

        Raises:
            ValueError: Another call still holds it.
        """
        folder = make_folder(self.out / LOCKS)
        with file_lock(folder / f"{key}.lock", f"Another call is at {key} of the study in {self.out}.", wait=wait):
            yield

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Hold a file of the study's own folder, which every call writes; what a killed one left of it is removed."""
        with self.alone(name):
            drop_partials(self.out / name)
            yield self.out / name

    def _once(self, key: str, is_done: Callable[[], bool], make: Callable[[], None]) -> None:
        """Make what is missing, or wait for another call that makes it."""
        if not is_done():
            with self.alone(key):
                if not is_done():
                    make()

    def before(self, design: Design) -> list[Outcome]:
        """The model before, measured."""
        return self.measured(design, self.base, lambda: base_folder(design), "the model before")

    def rescaled(self, design: Design) -> list[Outcome]:
        """The model rescaled to the last window and not trained, measured."""
        last = design.stages[-1]
        key = extension_key(self.base, last, design.scaling)
        return self.measured(design, key, lambda: self.extended(design, last, key, base_folder(design)), "rescaled")

    def trained(self, design: Design, seed: int) -> list[Outcome]:
        """The arm's model of a seed, measured."""
        key = final_key(design, seed, self.base)
        return self.measured(design, key, lambda: self.model(design, seed), f"trained, seed {seed}")

    def records(self, design: Design, seed: int) -> list[Path]:
        """The files that are there when the arm's model of a seed, and what it is compared with, are measured."""
        last = design.stages[-1]
        wanted = [self.base, extension_key(self.base, last, design.scaling), final_key(design, seed, self.base)]
        return [self.out / "shared" / measured_key(design, model, self.base) / "outcomes.json" for model in wanted]

    def _runs(self, design: Design, seed: int) -> tuple[list[str], list[str]]:
        stages = [link.trained for link in links(design, seed, self.base) if link.trains]
        return stages, [] if design.sft is None else [tuned_key(design, design.sft, seed, self.base)]

    def model(self, design: Design, seed: int) -> Path:
        """Folder of the arm's model of a seed, averaged with its start where the arm asks for it."""

        def pretrained() -> Path:
            found = links(design, seed, self.base)
            key = pretrained_key(design, seed, self.base)
            return self._averaged(design, key, design.start_share, lambda: self._pretrained(design, seed, found))

        if (sft := design.sft) is None:
            return pretrained()
        key = final_key(design, seed, self.base)
        return self._averaged(design, key, sft.start_share, lambda: self._tuned(design, sft, seed, pretrained))

    def _averaged(self, design: Design, key: str, share: float, find: Callable[[], Path]) -> Path:
        """A model averaged with the one that is rescaled and not trained, which has this share."""
        if not share:
            return find()
        out, last = self.out / "runs" / key, design.stages[-1]
        start = extension_key(self.base, last, design.scaling)

        def make() -> None:
            trained = find()
            self._say(f"average with the start, of weight {share:g}: {out.name}")
            untrained = self.extended(design, last, start, base_folder(design))
            merge([trained, untrained], out, [1 - share, share], quiet=True)

        self._once(key, out.exists, make)
        return out

    def _pretrained(self, design: Design, seed: int, stages: list[Link]) -> Path:
        """The model after these stages."""
        if not stages:
            return base_folder(design)
        *earlier, link = stages

        def start() -> Path:
            if earlier and earlier[-1].trained == link.extended:
                return self._pretrained(design, seed, earlier)
            return self.extended(design, link.stage, link.extended, self._pretrained(design, seed, earlier))

        def config(out: Path) -> TrainConfig:
            rows = self.rows(recipe_of(design.rows), design.rows.limit, link.stage.length, link.rows, design)
            return training_config(design, link.stage, seed, start(), rows, out)

        return self._train(link.trained, config, design.processes, "train") if link.trains else start()

    def _tuned(self, design: Design, sft: Sft, seed: int, pretrained: Callable[[], Path]) -> Path:
        """The model after SFT."""

        def config(out: Path) -> TrainConfig:
            key = conversations_key(sft, self.base, base_folder(design))
            rows = self.rows(conversations_of(sft), sft.rows.limit, sft.length, key, design)
            return sft_config(sft, seed, pretrained(), rows, out)

        return self._train(tuned_key(design, sft, seed, self.base), config, design.processes, "sft")

    def extended(self, design: Design, stage: Stage, key: str, model: Path) -> Path:
        """A checkpoint rescaled to a stage's window."""
        out = self.out / "shared" / key

        def make() -> None:
            self._say(f"rescale to {stage.to:,} tokens: {key}")
            scaling = asdict(design.scaling)
            extend(model, stage.to, out, scaling.pop("method"), factor=stage.factor, quiet=True, **scaling)

        self._once(key, out.exists, make)
        return out

    def rows(self, recipe: Recipe, limit: int | None, length: int, key: str, design: Design) -> Path:
        """Packed rows; a stopped call is resumed."""
        out = self.out / "shared" / key

        def make() -> None:
            self._say(f"pack rows of {length:,} tokens: {key}")
            pack_recipe(recipe, base_folder(design), length, out, limit=limit, quiet=self.quiet)

        self._once(key, (out / "report.json").exists, make)
        return out

    def texts(self, design: Design) -> Path:
        """A folder of the held-out documents as text files, which prompts are filled with."""
        out = self.out / "shared" / heldout_key(design, self.base).replace("heldout-", "texts-")

        def make() -> None:
            scratch = out.with_name(f".{out.name}.partial")
            shutil.rmtree(scratch, ignore_errors=True)
            make_folder(scratch)
            recipe = recipe_of(design.heldout).with_token_limit(design.heldout.limit)
            for number, document in enumerate(read_documents(recipe, quiet=True)):
                write_text(scratch / f"{number:05d}.txt", document.text)
            os.replace(scratch, out)

        self._once(out.name, out.exists, make)
        return out

    def measured(self, design: Design, model: str, find: Callable[[], Path], title: str) -> list[Outcome]:
        """What a model scores, sample by sample; a stopped evaluation is resumed.

        Args:
            design: The arm, for what is measured.
            model: Key of the model.
            find: Gives its folder, building what is missing.
            title: What the model is called while it works.
        """
        out = self.out / "shared" / measured_key(design, model, self.base)
        record = out / "outcomes.json"

        def make() -> None:
            folder = find()
            self._say(f"measure ({title}): {out.name}")
            started = time.perf_counter()
            key = heldout_key(design, self.base)
            rows = self.rows(recipe_of(design.heldout), design.heldout.limit, design.window, key, design)
            wanted = run_settings(design, str(folder), str(self.texts(design)), str(rows))
            with warnings.catch_warnings():  # the model before is asked beyond its window, to show that it fails there
                warnings.filterwarnings("ignore", message=".*beyond the model's window")
                with evaluation_keys():
                    run(wanted, out, device=self.device, draw=False, quiet=self.quiet)
            found = read_outcomes(out, window_of(load_config(base_folder(design))))
            seconds = round(time.perf_counter() - started, 1)
            write_json(
                record,
                {
                    "outcomes": [outcome.to_dict() for outcome in found],
                    "seconds_of_last_call": seconds,
                    "environment": describe_environment(),
                },
            )

        self._once(out.name, record.exists, make)
        return [Outcome.from_dict(values) for values in read_json(record)["outcomes"]]

    def cost(self, design: Design, seed: int) -> dict[str, Any]:
        """What an arm and seed took: tokens and seconds of all its training steps, and of them those of SFT.

        `loss` is that of pretraining, so that arms with and without SFT compare; None where it has no steps. Tokens and
        seconds are None where the folder of one of the runs was deleted; `configs` are files of their settings.
        """
        names = self._runs(design, seed)
        stages, sft = ([self._cost(name) for name in of] for of in names)
        configs = [f"runs/{name}/config.yaml" for of in names for name in of]
        final = final_key(design, seed, self.base)
        where, every = {"merged": f"runs/{final}", "extended": f"shared/{final}"}, [*stages, *sft]
        return {
            "tokens": _total(every, "tokens"),
            "loss": stages[-1]["loss"] if stages else None,
            "step_seconds": _total(every, "step_seconds"),
            "model": where.get(final.split("-")[0], f"runs/{final}/model"),
            "configs": [path for path in configs if (self.out / path).exists()],
            **({"sft": sft[0]} if sft else {}),
        }

    def _cost(self, run: str) -> dict[str, Any]:
        folder = self.out / "runs" / run
        if not ((folder / "result.json").exists() and (folder / "log.jsonl").exists()):
            # Deleted, as models are large. What was measured of them is kept, and is all that the study asks.
            return {"tokens": None, "loss": None, "step_seconds": None}
        result, log = read_json(folder / "result.json"), read_jsonl(folder / "log.jsonl")
        seconds = sum(record["seconds"] for record in log)
        return {"tokens": result["tokens"], "loss": result["loss"], "step_seconds": round(seconds, 1)}

    def _train(self, run: str, config: Callable[[Path], TrainConfig], processes: int | None, command: str) -> Path:
        out = self.out / "runs" / run

        def make() -> None:
            if not is_trained(out):
                made = config(out)
                self._say(f"{command} {made.steps:,} steps of {made.global_batch_size} x {made.length:,}: {run}")
                train_run(made, processes, command, self.quiet)
            remove_states(out)

        self._once(run, lambda: is_trained(out) and not has_states(out), make)
        return out / "model"

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


def _total(parts: Sequence[Mapping[str, Any]], name: str) -> Any:
    """A sum of what runs took, to a tenth; None where one of them is not known."""
    values = [part[name] for part in parts]
    return None if None in values else round(sum(values), 1)

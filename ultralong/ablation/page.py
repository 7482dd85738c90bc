"""The page of a study and its table for a terminal: hypotheses first, then forest plots and what each step gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ultralong.ablation.study import BASE_ARM
from ultralong.evaluation.report.page import Drawer, duration, render_page, settings_text
from ultralong.evaluation.report.parts import Section, Table
from ultralong.figures.samples import forest
from ultralong.utils.files import write_text

PAGE = "report.html"
STEPS = {"before": "before", "rescaled": "rescaled only", "trained": "trained"}
EFFECTS = {"by_rescaling": "by rescaling", "by_training": "by training", "to_base": "against the base arm"}
UNKNOWN = "not known"
TAKE_OVER = (
    "The settings of each training, RoPE's rescaled checkpoint (model) and rows (data) among them, are a config that "
    "ultralong plan, train and launch take as it is: ultralong launch FOLDER/runs/.../config.yaml --nodes 2 "
    "--gpus-per-node 8 --out job --set out=runs/long steps=1000 global_batch_size=16 data='[{rows: ROWS}]'. Paths in "
    "it are meant from the folder that the study was run in. The scaling of the base, and an arm's changes of it, are "
    "in study.yaml."
)
HEAD = ("arm", *STEPS.values(), *EFFECTS.values())


def draw_study(result: Mapping[str, Any], folder: Path, *, interactive: bool = True) -> Path:
    """Write `report.html` of a study.

    Args:
        result: As `ablate` returns it.
        folder: The study's folder.
        interactive: True adds plotly's script and each figure's data.
    """
    page = Path(folder) / PAGE
    write_text(page, render_study(result, interactive=interactive))
    return page


def render_study(result: Mapping[str, Any], *, interactive: bool) -> str:
    """The page as a string of HTML. See `draw_study` for the arguments."""
    draw = Drawer(interactive)
    headline = [outcome for outcome in result["outcomes"] if outcome["headline"]]
    rest = [outcome for outcome in result["outcomes"] if not outcome["headline"]]
    sections = [
        Section("Hypotheses, written down before the run", tables=[_hypotheses(result["verdicts"])]),
        *(_section(outcome, draw) for outcome in headline),
    ]
    if rest:
        tables = [_table(outcome, folded=True) for outcome in rest]
        sections.append(Section("Each test at each length", tables=tables))
    sections.append(Section("What the training took", tables=[_runs(result["runs"])]))
    if any(run.get("configs") for run in result["runs"]):
        tables = [_configs(result["runs"])]
        sections.append(Section("To take an arm over to a larger run", tables=tables, texts=[TAKE_OVER]))
    values = {
        "title": f"Ablation study: {result['name']}",
        "question": result["question"],
        "missing": _missing(result["missing"]),
        "no_figures": draw.missing,
        "sections": sections,
        "notes": notes(result),
        "settings": settings_text({"base": result["base"], "seeds": result["seeds"]}),
        "environment": {key: value for key, value in result["environment"].items() if isinstance(value, str)},
    }
    return render_page("study.html.j2", values, interactive=interactive)


def notes(result: Mapping[str, Any]) -> list[str]:
    """How the numbers are to be read."""
    seeds = len(result["seeds"])
    said = [
        "Every arm answers the same samples, and its training seeds are those of the base arm: differences are taken "
        "sample by sample and seed by seed.",
        "Intervals hold 95% and are a bootstrap that draws training seeds and samples, crossed; what seeds differ by "
        "is widened for their small number (ultralong.evaluation.measures.intervals.crossed_difference). "
        "Where all pairs of a score are alike a bootstrap would claim certainty: the interval is as wide as the number "
        "of samples lets it be (alike_difference).",
        "n is the number of samples, such as needles or rows, the same ones for every seed. Few make "
        "an interval too narrow where seeds agree: of 3 rows it held the true mean in 74% to 81% of 400 simulated "
        "studies, of 6 in 88% to 92%, of 20 in 92% to 96%.",
        "Differences of scores are in per cent points; those of perplexity are in per cent of the perplexity, and less "
        "is better. Perplexity is the exponential of the mean loss of rows.",
        "Rescaled only: the model before with its RoPE rescaled to the last window in one step, and no training. Its "
        "own difference has no seeds, as nothing is drawn in it.",
        "A verdict says on which side of the number the whole interval lies; undecided means that it holds the number. "
        "Each is of one comparison: of twenty true nulls one is expected to be refuted by chance.",
    ]
    if any("sft" in run for run in result["runs"]):
        said.append(
            "An arm with SFT is measured after it: its trained column and differences are of pretraining and SFT "
            "together, or of SFT alone where pretraining has no steps. Its tokens and time are of both, its loss is of "
            "pretraining; the row below has SFT's own."
        )
    if any(run["tokens"] is None for run in result["runs"]):
        said.append(
            "Not known: what a run took whose folder was deleted. Its scores are of the measurements, which were kept."
        )
    if seeds == 1:
        said.append("One seed alone: the intervals say nothing of what another seed would have given.")
    return said


def _hypotheses(verdicts: Sequence[Mapping[str, Any]]) -> Table:
    head = ("arm", "changes", "hypothesis", "refuted if", "found", "verdict")
    rows = [
        [
            v["arm"],
            v["changes"],
            v["hypothesis"],
            v["refuted_if"],
            _unbroken(effect_text(v["difference"])),
            v["verdict"],
        ]
        for v in verdicts
    ]
    return Table(head, rows, numbers=False)


def _unbroken(text: str) -> str:
    return text.replace(" ", "\u00a0")


def _section(outcome: Mapping[str, Any], draw: Drawer) -> Section:
    score = outcome["unit"] == "per cent"
    unit = "per cent points" if score else "per cent of the perplexity"
    figures = []
    for effect, title in (("to_base", "trained, against the base arm"), ("by_training", "trained, against rescaled")):
        rows = {
            arm["arm"]: (arm[effect]["mean"], arm[effect]["low"], arm[effect]["high"])
            for arm in outcome["arms"]
            if arm[effect] is not None and arm[effect]["low"] is not None
        }
        if rows:
            ends = [0.0, *(end for _, low, high in rows.values() for end in (low, high))]
            margin = 0.04 * (max(ends) - min(ends)) or 1.0  # so that no interval seems to be cut
            span = (min(ends) - margin, max(ends) + margin)
            make = partial(forest, rows, x=f"{unit}, 95% interval", zero=0.0, span=span)
            figures.append(draw(f"{outcome['name']}: {title}, paired differences.", make, names=(title,)))
    title = f"{outcome['name']} ({'per cent, ' if score else ''}n = {outcome['n']})"
    return Section(title, figures=figures, tables=[_table(outcome)])


def _table(outcome: Mapping[str, Any], *, folded: bool = False) -> Table:
    rows = [[arm["arm"], *cells(arm)] for arm in outcome["arms"]]
    return Table(HEAD, rows, f"{outcome['name']}, n = {outcome['n']}" if folded else "", folded=folded)


def cells(arm: Mapping[str, Any]) -> list[str]:
    """An arm's row of a table, but for its name."""
    levels = ["" if arm[name] is None else f"{arm[name]:.2f}" for name in STEPS]
    return [*levels, *("" if arm["arm"] == BASE_ARM and e == "to_base" else effect_text(arm[e]) for e in EFFECTS)]


def _missing(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Arms that have not run on every seed, each with the seeds that it lacks."""
    seeds: dict[str, list[str]] = {}
    for run in runs:
        seeds.setdefault(run["arm"], []).append(str(run["seed"]))
    return [f"{arm} (seed{'' if len(of) == 1 else 's'} {', '.join(of)})" for arm, of in seeds.items()]


def effect_text(effect: Mapping[str, Any] | None) -> str:
    """A difference with its interval: `+2.1 [-0.3, +4.6]`."""
    if effect is None:
        return "-"
    between = "" if effect["low"] is None else f" [{effect['low']:+.1f}, {effect['high']:+.1f}]"
    return f"{effect['mean']:+.1f}{between}"


def _runs(runs: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for run in runs:
        name = f"{run['arm']}, seed {run['seed']}"
        rows.append(_run(name, run))
        if "sft" in run:
            rows.append(_run(f"{name}: SFT alone", run["sft"]))
    return Table(("run", "tokens", "loss of the last tenth", "time of its steps"), rows)


def _configs(runs: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [f"{run['arm']}, seed {run['seed']}", ", ".join(run.get("configs", ())), run["model"]]
        for run in runs
        if run.get("configs")
    ]
    return Table(("run", "settings", "trained model"), rows, numbers=False)


def _run(name: str, run: Mapping[str, Any]) -> list[str]:
    known = run["tokens"] is not None
    loss = ("" if known else UNKNOWN) if run["loss"] is None else f"{run['loss']:.3f}"
    return [name, f"{run['tokens']:,}" if known else UNKNOWN, loss, duration(run["step_seconds"]) if known else UNKNOWN]


def table_lines(result: Mapping[str, Any]) -> list[str]:
    """The headline outcomes and the verdicts, for a terminal."""
    lines = []
    for outcome in result["outcomes"]:
        if not outcome["headline"]:
            continue
        unit = "per cent; differences in points" if outcome["unit"] == "per cent" else "differences in per cent"
        lines.append(f"{outcome['name']} (n = {outcome['n']}; {unit})")
        rows = [HEAD, *([arm["arm"], *cells(arm)] for arm in outcome["arms"])]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
        lines += ["  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    for verdict in result["verdicts"]:
        found = effect_text(verdict["difference"])
        lines.append(f"{verdict['arm']}: {verdict['verdict']} (refuted if {verdict['refuted_if']}; found {found})")
    return [line.rstrip() for line in lines]

"""Functions that measure a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from ultralong.api.names import Named, StrPath, Words
from ultralong.utils.processes import without_collections
from ultralong.utils.units import Tokens


def needle(
    model: Named,
    lengths: Annotated[Sequence[int], Words(tuple[Tokens, ...])] = (),
    depths: Annotated[Sequence[float], Words(tuple[float, ...])] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 5,
    *,
    seed: int = 0,
    haystack: StrPath | None = None,
    device: str = "auto",
    out: StrPath | None = None,
    engine: Literal["transformers", "openai"] = "transformers",
    endpoint: str | None = None,
    endpoint_model: str | None = None,
    key_variable: str | None = None,
) -> dict[str, Any]:
    """Hide a number in a long text and ask the model for it, at every length and depth.

    >>> found = needle("miniature", lengths=[256], depths=[0.5], samples=2)
    >>> print(found["results"][0]["by_depth"][0]["n"])
    2

    Args:
        model: Folder, hub id or miniature (the model that ships).
        lengths: Tokens of the prompts; by default a short one and eighths of the model's window.
        depths: Depths of the needle in the text, from 0 (beginning) to 1 (end).
        samples: Prompts of each length and depth.
        seed: Seed of the prompts.
        haystack: Text file or folder to hide the needle in; repeated filler without it.
        device: `auto`, `cpu` or `cuda`.
        out: Folder of the run and its report.
        engine: What answers: transformers opens the model here; openai asks an endpoint of that protocol, and takes
            only tokenizer and window from the model's folder.
        endpoint: openai: its URL with the version, such as http://localhost:8000/v1.
        endpoint_model: openai: the model's name there; by default the only one it has.
        key_variable: openai: environment variable that holds the API key.

    Returns:
        The content of `report.json`: the needle's result in `results`, with `by_length` and `by_depth` (each with
        value in per cent, n and its 95% interval, low and high), `settings` and `environment`.

    Raises:
        ValueError: No such model, or lengths and depths that no prompt can have.
    """
    with without_collections():
        from ultralong.evaluation.runs.commands import measure_one
    from ultralong.utils.hub import find_checkpoint

    return measure_one(
        "needle",
        find_checkpoint(model),
        lengths=lengths,
        depths=depths,
        samples=samples,
        seed=seed,
        haystack=haystack,
        device=device,
        out=out,
        engine=engine,
        endpoint=endpoint,
        endpoint_model=endpoint_model,
        key_variable=key_variable,
    )


def perplexity(
    model: Named,
    rows: StrPath,
    max_rows: int = 16,
    *,
    seed: int = 0,
    device: str = "auto",
    out: StrPath | None = None,
) -> dict[str, Any]:
    """Measure perplexity by position on packed rows.

    >>> parts = perplexity("run/model", "rows", max_rows=1)["results"][0]["by_position"]
    >>> print(parts[0]["start"], parts[-1]["end"])
    0 1024

    Args:
        model: Folder, hub id or miniature (the model that ships).
        rows: Folder of packed rows.
        max_rows: Rows to use.
        seed: Seed of the intervals.
        device: `auto`, `cpu` or `cuda`.
        out: Folder of the run and its report.

    Returns:
        The content of `report.json`: in `results` perplexity by position in the row, and by distance from the start of
        the document, each with `by_position` (start, end, value and its 95% interval, low and high).

    Raises:
        ValueError: No such model or rows.
    """
    with without_collections():
        from ultralong.evaluation.runs.commands import measure_one
    from ultralong.utils.hub import find_checkpoint

    place = find_checkpoint(model)
    return measure_one("perplexity", place, rows=rows, max_rows=max_rows, seed=seed, device=device, out=out)


def evaluate(
    model: Named,
    tasks: str | Iterable[str],
    out: StrPath,
    *,
    before: StrPath | None = None,
    device: str = "auto",
    quiet: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Measure a model on tests such as RULER, and leave a report. A stopped call is resumed.

    >>> result = evaluate("miniature", "niah_single_1", "measured", lengths=(512,), samples=1, quiet=True)
    >>> print(result["families"][0]["n"])
    1

    Args:
        model: Folder, hub id or miniature (the model that ships).
        tasks: Tests and groups of tests, such as "needle,ruler", and paths of files of questions (.jsonl).
        out: Folder of answers and report.
        before: Folder of a run of the earlier model, to compare with.
        device: `auto`, `cpu` or `cuda`.
        quiet: No progress bars.
        **settings: Fields of `ultralong.evaluation.runs.settings.RunSettings`, such as `lengths` and `samples`.

    Returns:
        The content of `report.json`; empty on the other processes of torchrun.

    Raises:
        ValueError: `out` holds another run; a test is unknown or misses its data; or no length is in the window.
    """
    with without_collections():
        from ultralong.evaluation.runs.run import RunSettings, run
        from ultralong.utils.hub import find_checkpoint

    names = tuple(tasks.split(",")) if isinstance(tasks, str) else tuple(tasks)
    wanted = RunSettings(model=find_checkpoint(model), tasks=names, **settings)
    return run(wanted, out, before=before, device=device, quiet=quiet) or {}

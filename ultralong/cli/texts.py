"""Commands on texts before they are rows: tests kept out, answers refined, recipes run on many machines."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from ultralong.cli.options import Group, takes
from ultralong.cli.shared import Json, leave, quoted, resumable

if TYPE_CHECKING:
    from ultralong.data.chat.endpoint import Endpoint
    from ultralong.data.chat.refine import RefineSettings
    from ultralong.data.recipe.build import PackReport
    from ultralong.data.recipe.datatrove_script import DatatroveSettings


@takes(work=Group("ultralong.api.texts:decontaminate", positional=("recipe",)))
def decontaminate(work: partial[dict[str, Any]], *, json: Json = None) -> None:
    """Write a recipe's texts without those that overlap with test sets, and what was left out.

    GPT-3's rule: 13 words in a row, in lower case and without punctuation; test items of 8 to 12 words as a whole.
    A recipe can hold the same under `decontaminate`, and is then clean whenever it is built.

    Example: ultralong data decontaminate sft-offline --against gsm8k.jsonl mmlu/ --out clean

    Args:
        work: The function, with the texts and the tests.
        json: Write the report as JSON to this file.
    """
    report, out = work(), work.keywords["out"]
    leave(json, report)
    for name, told in report["sources"].items():
        print(f"{name}: {told['checked']:,} checked, {told['dropped']:,} dropped, {told['cut']:,} cut")
        for test, row in told["tests"].items():
            print(
                f"  {test}: {row['texts_hit']:,} texts overlap with {row['items_found']:,} of {row['items']:,} items "
                f"({row['too_short']:,} more are too short to look for)"
            )
    print(f"Next: ultralong pack {quoted(out / 'clean.jsonl')} ..., after a look at {out / 'contaminated.jsonl'}")


@takes(
    wanted=Group("ultralong.data.chat.refine:RefineSettings", left_out=("instruction",), given={"endpoint": None}),
    endpoint=Group("ultralong.data.chat.endpoint:Endpoint", left_out=("options", "backoff", "longest_backoff")),
)
def refine(
    recipe: Positional[str],
    /,
    endpoint: Endpoint,
    wanted: RefineSettings,
    *,
    out: Path,
    instruction: Path | None = None,
    limit: int | None = None,
    cache: Path | None = None,
    quiet: bool = False,
    json: Json = None,
) -> None:
    """Have a stronger model improve the answers of conversations, through an OpenAI-compatible endpoint.

    Every original stays beside its refinement. Stop it at any time: the same command resumes, and only requests
    that were under way are paid for twice. The texts are sent to the endpoint, and its terms decide what may be done
    with its answers.

    Example: ultralong data refine sft-offline --url http://localhost:8000/v1 --model my-model --out refined

    Args:
        recipe: A recipe of conversations.
        endpoint: Where requests go.
        wanted: What is asked, and for how much.
        out: Folder to write: refined.jsonl and report.json.
        instruction: A text file in place of the built-in instruction.
        limit: Refine only this many conversations, from the first on.
        cache: Where fetched packages are kept.
        quiet: No progress bars.
        json: Write the report as JSON to this file.
    """
    from dataclasses import replace
    from itertools import islice

    from ultralong.data.chat.refine import refine as run
    from ultralong.data.recipe.schema import load_recipe
    from ultralong.data.recipe.texts import read_conversations

    settings = replace(wanted, endpoint=endpoint)
    if instruction is not None:
        settings = replace(settings, instruction=instruction.read_text(encoding="utf-8"))
    with resumable(out):
        report = run(
            islice(read_conversations(load_recipe(recipe), cache=cache, quiet=quiet), limit), out, settings, quiet=quiet
        )
    leave(json, report.to_dict())
    print(report)
    print(f"{out / 'refined.jsonl'}: a recipe reads it with kind chat and read: {{field: messages, id_field: id}}")


@takes(wanted=Group("ultralong.data.recipe.datatrove_script:DatatroveSettings"))
def render(recipe: Positional[str], /, wanted: DatatroveSettings, *, out: Path, set: tuple[str, ...] = ()) -> None:
    """Write a recipe as a datatrove program, for many processes or for Slurm.

    The program reads, filters, deduplicates and tokenises; it is one Python file, and running it again resumes with
    the tasks that are left. Its token stores become one with ultralong data merge.

    Example: ultralong data render slimpajama-per-source --tokenizer llama-1m --base run --out scripts --tasks 64

    Args:
        recipe: A recipe's name, its YAML file, or a folder of texts.
        wanted: How the recipe runs.
        out: Folder to write pipeline.py and recipe.yaml into.
        set: Changes of the recipe.
    """
    from dataclasses import replace

    from ultralong.data.recipe.datatrove_script import render as write

    def absolute(path: str | None) -> str | None:
        return None if path is None else str(Path(path).resolve())

    settings = replace(
        wanted,
        base=str(Path(wanted.base).resolve()),
        tokenizer=str(Path(wanted.tokenizer).resolve()),
        cache=absolute(wanted.cache),
        language_model=absolute(wanted.language_model),
    )
    path = write(recipe, settings, out, set)
    print(f"{path}: run it with python, which needs datatrove: pip install 'ultralong[cluster]'")


@takes(work=Group("ultralong.api.texts:merge_stores", positional=("base",)))
def merge(work: partial[PackReport], *, json: Json = None) -> None:
    """Make one token store of the many that a datatrove run left, and pack it into rows.

    Example: ultralong data merge run --recipe scripts/recipe.yaml --tokenizer llama-1m --length 1m --out rows

    Args:
        work: The function, with the run and how it is packed.
        json: Write the report as JSON to this file.
    """
    from ultralong.data.recipe import stats

    report = work()
    leave(json, report.to_dict())
    print(report)
    print(stats.format_table(stats.folder_stats(work.keywords["out"])))

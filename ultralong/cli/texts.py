"""Commands on texts before they are rows: tests kept out, answers refined, recipes run on many machines."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ultralong.cli.shared import Json, leave


def decontaminate(
    recipe: Positional[str],
    /,
    *,
    against: tuple[Path, ...],
    out: Path,
    words: int = 13,
    shortest: int = 8,
    action: Literal["drop", "cut"] = "drop",
    fields: tuple[str, ...] = (),
    cache: Path | None = None,
    quiet: bool = False,
    json: Json = None,
) -> None:
    """Write a recipe's texts without those that overlap with test sets, and say what was dropped and why.

    GPT-3's rule: 13 words in a row, in lower case and without punctuation; test items of 8 to 12 words as a whole.
    A recipe can hold the same under `decontaminate`, and is then clean whenever it is built.

    Example: ultralong data decontaminate sft-offline --against gsm8k.jsonl mmlu/ --out clean

    Args:
        recipe: A recipe's name, its YAML file, or a folder of texts.
        against: Files or folders of test items: text, JSON lines, JSON, Parquet.
        out: Folder to write: clean.jsonl, contaminated.jsonl (what overlaps, with the words) and report.json.
        words: Words of a gram.
        shortest: Words of the shortest item that is looked for as a whole.
        action: drop leaves a document out; cut takes the words out with 200 characters on either side.
        fields: Fields of a test record to look for; by default every text in it.
        cache: Where fetched packages are kept.
        quiet: No progress bars.
        json: Write the report as JSON to this file.
    """
    from ultralong.data.recipe.build import load_recipe
    from ultralong.data.recipe.clean_files import write_clean
    from ultralong.data.select.decontaminate import Decontaminate, TestSet

    tests = tuple(TestSet(path.name, str(path), fields=fields) for path in against)
    report = write_clean(load_recipe(recipe), Decontaminate(tests, words, shortest, action), out, cache, quiet)
    leave(json, report)
    for name, told in report["sources"].items():
        print(f"{name}: {told['checked']:,} checked, {told['dropped']:,} dropped, {told['cut']:,} cut")
        for test, row in told["tests"].items():
            print(
                f"  {test}: {row['texts_hit']:,} texts overlap with {row['items_found']:,} of {row['items']:,} items "
                f"({row['too_short']:,} more are too short to look for)"
            )
    print(f"Next: ultralong pack {out / 'clean.jsonl'} ..., after a look at {out / 'contaminated.jsonl'}")


def refine(
    recipe: Positional[str],
    /,
    *,
    url: str,
    model: str,
    out: Path,
    key_variable: str | None = None,
    instruction: Path | None = None,
    turns: Literal["last", "all"] = "last",
    concurrency: int = 8,
    budget_tokens: int | None = None,
    budget_money: float | None = None,
    prompt_price: float = 0.0,
    answer_price: float = 0.0,
    max_tokens: int = 2048,
    temperature: float = 0.0,
    timeout: float = 120.0,
    retries: int = 6,
    limit: int | None = None,
    cache: Path | None = None,
    quiet: bool = False,
    json: Json = None,
) -> None:
    """Have a stronger model improve the answers of a recipe's conversations, through any OpenAI-compatible endpoint.

    Every original stays beside its refinement. Stop it at any time: the same command goes on, and pays for nothing
    twice but what was under way. The texts are sent to the endpoint, and its terms decide on what may be done with its
    answers.

    Example: ultralong data refine sft-offline --url http://localhost:8000/v1 --model my-model --out refined

    Args:
        recipe: A recipe of conversations.
        url: The endpoint up to and with its version.
        model: The model's name there.
        out: Folder to write: refined.jsonl and report.json.
        key_variable: Environment variable that holds the key; nothing else ever holds it.
        instruction: A text file in place of the built-in instruction.
        turns: Refine each conversation's last answer, or all.
        concurrency: Requests under way at once.
        budget_tokens: Tokens that may be used over all runs.
        budget_money: Money that may be spent over all runs; needs the two prices.
        prompt_price: Money for a million tokens of prompt.
        answer_price: Money for a million tokens of answer.
        max_tokens: An answer's longest length.
        temperature: 0 asks for the likeliest answer.
        timeout: Seconds to wait for an answer.
        retries: Repetitions after 429, 5xx, time-outs, lost connections and unreadable answers.
        limit: Only the first conversations.
        cache: Where fetched packages are kept.
        quiet: No progress bars.
        json: Write the report as JSON to this file.
    """
    from itertools import islice

    from ultralong.data.chat.endpoint import Endpoint
    from ultralong.data.chat.refine import INSTRUCTION, RefineSettings
    from ultralong.data.chat.refine import refine as run
    from ultralong.data.recipe.build import load_recipe
    from ultralong.data.recipe.clean_files import conversations

    settings = RefineSettings(
        Endpoint(url, model, key_variable, temperature, max_tokens, timeout=timeout, retries=retries),
        instruction.read_text(encoding="utf-8") if instruction is not None else INSTRUCTION,
        turns,
        concurrency,
        budget_tokens,
        budget_money,
        prompt_price,
        answer_price,
    )
    report = run(islice(conversations(load_recipe(recipe), cache, quiet), limit), out, settings, quiet=quiet)
    leave(json, report.to_dict())
    print(report)
    print(f"{out / 'refined.jsonl'}: a recipe reads it with kind chat and read: {{field: messages, id_field: id}}")


def render(
    recipe: Positional[str],
    /,
    *,
    tokenizer: str,
    base: Path,
    out: Path,
    executor: Literal["local", "slurm"] = "local",
    tasks: int = 8,
    workers: int = -1,
    filters: tuple[Literal["language", "quality", "repetition"], ...] = (),
    dedup: tuple[Literal["exact", "minhash"], ...] = ("exact", "minhash"),
    language: str = "eng",
    language_code: str | None = None,
    language_model: Path | None = None,
    longest: int = 10_000_000,
    cache: Path | None = None,
    partition: str | None = None,
    time: str = "24:00:00",
    memory: int = 4,
    environment: str | None = None,
    set: tuple[str, ...] = (),
) -> None:
    """Write a recipe as a datatrove program, for many processes or for Slurm: read, filter, deduplicate, tokenise.

    The program is one Python file; running it again goes on with the tasks that are left. Its token stores become one
    with ultralong data merge.

    Example: ultralong data render slimpajama-per-source --tokenizer llama-1m --base run --out scripts --tasks 64

    Args:
        recipe: A recipe's name, its YAML file, or a folder of texts.
        tokenizer: Folder of the tokenizer, which every task sees.
        base: Folder of the run, which every task sees.
        out: Folder to write pipeline.py and recipe.yaml into.
        executor: local (processes of this machine) or slurm.
        tasks: Parts that the recipe is read in.
        workers: Tasks at once; -1 for all.
        filters: Of language, quality and repetition.
        dedup: Of exact and minhash.
        language: For filters and word splitting, as datatrove names it (ISO 639-3).
        language_code: What the identifying model calls it; by default ISO 639-1's name.
        language_model: A fastText model's file for the language filter, where lid.176 cannot be downloaded.
        longest: Words of the longest document that the quality filter lets pass.
        cache: Where fetched packages are kept, which every task sees.
        partition: With Slurm: the partition.
        time: With Slurm: time limit of a task.
        memory: With Slurm: GiB for each core.
        environment: With Slurm: a command that activates the environment.
        set: key=value changes of the recipe.
    """
    from ultralong.data.recipe.datatrove_script import TroveSettings
    from ultralong.data.recipe.datatrove_script import render as write

    settings = TroveSettings(
        str(base.resolve()),
        str(Path(tokenizer).resolve()),
        executor,
        tasks,
        workers,
        str(cache.resolve()) if cache is not None else None,
        tuple(filters),
        language,
        tuple(dedup),
        longest,
        partition,
        time,
        memory,
        environment,
        language_code,
        str(language_model.resolve()) if language_model is not None else None,
    )
    path = write(recipe, settings, out, set)
    print(f"{path}: run it with python, which needs datatrove: pip install 'ultralong[cluster]'")


def merge(
    base: Positional[Path],
    /,
    *,
    recipe: str,
    tokenizer: str,
    length: int,
    out: Path,
    quiet: bool = False,
    json: Json = None,
) -> None:
    """Make one token store of the many that a datatrove run left, and pack it into rows.

    Example: ultralong data merge run --recipe scripts/recipe.yaml --tokenizer llama-1m --length 1048576 --out rows

    Args:
        base: Folder of the run.
        recipe: The recipe that it ran: its packing is used.
        tokenizer: Folder of the tokenizer.
        length: Tokens of a row.
        out: Folder to write the rows into; the store goes into tokens/ inside it.
        quiet: No progress bars.
        json: Write the report as JSON to this file.
    """
    from ultralong.data.recipe import stats
    from ultralong.data.tokens.merge import pack_merged

    report = pack_merged(base, recipe, tokenizer, length, out, quiet=quiet)
    leave(json, report.to_dict())
    print(report)
    print(stats.table(stats.folder_stats(out)))

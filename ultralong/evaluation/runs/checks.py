"""What is checked of a run before a model is opened or asked: packages, data, settings of an earlier start, lengths."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ultralong.data.chat.transport import check_address
from ultralong.evaluation.measures.lm_eval import find_benchmarks
from ultralong.evaluation.report.page import missing_for_figures
from ultralong.evaluation.runs.answer_files import check_own_answers
from ultralong.evaluation.runs.results import SETTINGS_FILE
from ultralong.evaluation.runs.settings import RunSettings
from ultralong.evaluation.tasks.groups import SPECIAL, find_questions
from ultralong.evaluation.tasks.own import own_task as own
from ultralong.evaluation.tasks.samples import PUBLISHED, TASKS, check_task
from ultralong.inference.vllm_engine import require_vllm
from ultralong.utils import settings
from ultralong.utils.extras import require

FIXED = ("model", "seed", "chat", "haystack", "data", "rows", "engine", "kv_dtype")
OF_LONGPPL = ("evaluator", "texts", "short_context", "short_stride", "key_alpha", "key_beta")


def check_needs(names: Sequence[str], wanted: RunSettings) -> None:
    """See that everything is there that the tests of a run need, before a model is opened.

    Figures are an extra: without what draws them a run says so now, and leaves a page of tables.

    Raises:
        ValueError: Perplexity or loss without rows, or an unknown benchmark.
        ImportError: A package is missing; the message holds the command that installs it.
    """
    for name, title in (("perplexity", "Perplexity"), ("longppl", "LongPPL"), ("loss", "Loss")):
        if name in names and wanted.rows is None:
            raise ValueError(f"{title} needs packed rows to read: give --rows FOLDER, as written by `ultralong pack`.")
    if "lm_eval" in names:
        find_benchmarks(wanted.benchmarks)
        require("lm_eval", "eval")
    if wanted.engine == "vllm":
        require_vllm()
    if wanted.engine == "openai":
        require("openai", "openai")
        check_address(str(wanted.endpoint), wanted.key_variable)
    if (reason := missing_for_figures()) is not None:
        warnings.warn(f"The report will hold tables and no figures: {reason}", stacklevel=3)


def check_same_run(wanted: RunSettings, out: Path) -> None:
    """See that a folder is free, or holds a run that this one continues.

    Raises:
        ValueError: It holds another run.
    """
    if not (out / SETTINGS_FILE).exists():
        return
    there = settings.load(RunSettings, out / SETTINGS_FILE)
    measured = OF_LONGPPL if (out / "longppl.json").exists() else ()
    for name in (*FIXED, *measured):
        if getattr(there, name) != getattr(wanted, name):
            raise ValueError(
                f"{out} holds a run with {name} {getattr(there, name)}, this one has "
                f"{getattr(wanted, name)}. Give another --out, or remove the folder."
            )


def check_own_files(names: Sequence[str], out: Path) -> None:
    """See that files of questions are those that a run's folder holds settings of and answers to.

    Args:
        names: What `groups.expand` gives.
        out: Folder of the run.

    Raises:
        ValueError: A file has changed since.
    """
    files = own.files_of(names)
    if files and (out / SETTINGS_FILE).exists():
        there = settings.load(RunSettings, out / SETTINGS_FILE)
        for word in filter(own.is_file, there.tasks):
            if own.own_task(word).name in files and word.partition(own.PIN)[1]:
                own.pinned(f"{files[own.own_task(word).name]}{own.PIN}{word.partition(own.PIN)[2]}")
    check_own_answers(out, files, {})


def _tell_unasked(name: str, counts: Mapping[int, int], samples: int) -> None:
    """A file of questions is not to be asked in part without a word."""
    if (most := max(counts.values())) > samples:
        told = ", ".join(f"{count} at {length:,}" for length, count in counts.items() if count > samples)
        warnings.warn(f"{name} holds more questions than are asked ({told}): --samples {most} asks all.", stacklevel=4)


def plan_pairs(
    names: Sequence[str],
    lengths: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    wanted: RunSettings,
    texts: Sequence[str] | None,
) -> tuple[list[tuple[str, int]], dict[str, Path], dict[str, str]]:
    """Which test is asked at which length, with all that could stop it found before the first answer.

    Returns:
        Pairs of test and length, shortest first; files of questions by test; and the reason of each test, or test at a
        length, left out.

    Raises:
        ValueError: A test cannot be made and `skip_missing` is not set; the message names all such tests.
    """
    pairs: list[tuple[str, int]] = []
    questions: dict[str, Path] = {}
    skipped: dict[str, str] = {}
    for name, path in own.files_of(names).items():
        counts, too_long = own.lay_out(path, tokenizer, lengths, wanted.chat)
        skipped |= {f"{name}, question {number}": reason for number, reason in too_long.items()}
        if any(counts.values()):
            pairs += [(name, length) for length in counts]
            questions[name] = path
        _tell_unasked(name, counts, wanted.samples)
    for name in (name for name in names if name not in SPECIAL and not own.is_file(name)):
        chosen = [max(lengths)] if name in PUBLISHED else sorted(lengths)
        possible, found, reasons = _possible(name, chosen, tokenizer, wanted, texts)
        pairs += [(name, length) for length in possible]
        questions |= {} if found is None else {name: found}
        if possible:
            skipped |= {f"{name} at {length:,}": reason for length, reason in reasons.items()}
        else:
            skipped[name] = reasons[chosen[-1]]
    if skipped and not wanted.skip_missing:
        told = "; ".join(f"{name}: {reason.rstrip('.')}" for name, reason in list(skipped.items())[:3])
        more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        raise ValueError(f"Some tests cannot be made: {told}{more}. --skip-missing leaves them out and runs the rest.")
    return sorted(pairs, key=lambda pair: pair[1]), questions, skipped


def _possible(
    name: str,
    lengths: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    wanted: RunSettings,
    texts: Sequence[str] | None,
) -> tuple[Sequence[int], Path | None, dict[int, str]]:
    """Of rising lengths those at which a test can be made, its questions, and the reason at each shorter one."""
    reasons: dict[int, str] = {}
    for place, length in enumerate(lengths):
        try:
            if TASKS[name].needs:
                require(TASKS[name].needs, "eval")
            found = find_questions(name, None if wanted.data is None else Path(wanted.data))
            asked: dict[str, Any] = {"samples": wanted.samples, "seed": wanted.seed}
            check_task(name, tokenizer, length, chat=wanted.chat, haystack=texts, questions=found, **asked)
        except (ValueError, ImportError) as error:
            reasons[length] = str(error)
        else:
            # What can be made at one length can be made at all longer ones.
            return lengths[place:], found, reasons
    return (), None, reasons

"""Functions on single tests and rows: samples for a model that runs elsewhere, answers, the loss on packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

from ultralong.api.names import File, Named, OtherModel, StrPath, Words
from ultralong.utils.processes import without_collections
from ultralong.utils.units import Tokens


def row_loss(
    model: Named,
    rows: StrPath,
    *,
    before: OtherModel | None = None,
    max_rows: int | None = None,
    micro_batch_size: int = 1,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    device: str = "auto",
) -> dict[str, Any]:
    """Measure the loss on packed rows as training does, with an interval over documents.

    Args:
        model: Folder, hub id or miniature.
        rows: Folder of packed rows; for SFT, of conversations that were held out of training.
        before: Another model to compare with.
        max_rows: Read only this many rows.
        micro_batch_size: Rows of one forward pass.
        dtype: Type that the forward pass computes in; auto is bfloat16 on a GPU, as in training.
        device: auto, cpu or cuda.

    Returns:
        As `ultralong.evaluation.measures.row_loss.measure_loss`.

    Raises:
        ValueError: No such model or rows, or rows of another tokenizer.
    """
    from ultralong.utils.hub import find_checkpoint

    place = find_checkpoint(model)
    other = None if before is None else find_checkpoint(before)
    with without_collections():
        from ultralong.evaluation.measures.row_loss import measure_loss

    return measure_loss(
        place, rows, before=other, device=device, most=max_rows, micro_batch_size=micro_batch_size, dtype=dtype
    )


def longppl(
    model: Named,
    rows: StrPath,
    *,
    evaluator: OtherModel | None = None,
    texts: Literal["document", "row"] = "document",
    short_context: Tokens = 4096,
    short_stride: Tokens = 1024,
    key_alpha: float = 2.0,
    key_beta: float = -2.0,
    max_rows: int = 16,
    chunk: Tokens | None = None,
    gpus: int = 1,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Measure perplexity over the tokens that need the long context (LongPPL).

    Args:
        model: Folder, hub id or miniature.
        rows: Folder of packed rows of long documents.
        evaluator: The model that chooses key tokens; by default the model itself.
        texts: Read each document of a row by itself, or the whole row as one text.
        short_context: Tokens of the short context.
        short_stride: Tokens that share a short context; fewer cost more.
        key_alpha: Nats by which the long context must raise the log-likelihood.
        key_beta: What the log-likelihood with the long context must be above.
        max_rows: Rows to use.
        chunk: Tokens of one pass; by default 16,384 of texts beyond 32,768.
        gpus: GPUs that share each text, each with the whole model.
        seed: Seed of the intervals.
        device: auto, cpu or cuda.

    Returns:
        As `ultralong.evaluation.measures.longppl.measure_longppl`.

    Raises:
        ValueError: No such model or rows, rows of another tokenizer, or no key token in them.
    """
    from ultralong.utils.hub import find_checkpoint

    place = find_checkpoint(model)
    other = None if evaluator is None else find_checkpoint(evaluator)
    with without_collections():
        from ultralong.evaluation.measures.key_tokens import KeyRule
        from ultralong.evaluation.measures.longppl import measure_longppl

    rule = KeyRule(short_context, short_stride, key_alpha, key_beta)
    return measure_longppl(
        place,
        rows,
        evaluator=other,
        rule=rule,
        by=texts,
        max_rows=max_rows,
        chunk=chunk,
        gpus=gpus,
        device=device,
        seed=seed,
    )


def write_samples(
    task: str,
    length: Tokens,
    samples: int,
    tokenizer: Named,
    out: File,
    *,
    seed: int = 0,
    haystack: StrPath | None = None,
    questions: Named | None = None,
) -> dict[str, Any]:
    """Write samples of a test to a file, for a model that runs elsewhere.

    Args:
        task: Name of the test, such as needle, niah_single_1, ruler_vt, babilong_style_qa2 or lveval_cmrc_mixup_16k, or
            the path of a file of questions (.jsonl).
        length: Most tokens of prompt and answer together.
        samples: Number of samples.
        tokenizer: Folder, hub id or miniature: the model whose tokenizer counts.
        out: File of JSON lines: input, answer_prefix, outputs, length, max_new_tokens.
        seed: Seed of all draws; sample k of a seed is always the same.
        haystack: Text file or folder to fill prompts with, where the test has a haystack.
        questions: File or folder of published questions, or package, for the tests that need them.

    Returns:
        As `ultralong.evaluation.runs.records.write_samples`.

    Raises:
        ValueError: No such test or tokenizer, a length that the test cannot have, or a file of other samples.
    """
    from ultralong.utils.hub import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    with without_collections():
        from ultralong.evaluation.runs.records import write_samples as write
        from ultralong.evaluation.tasks.haystack import read_haystack

    return write(task, loaded, length, samples, seed, out, haystack=read_haystack(haystack), questions=questions)


def answer(
    model: Named,
    tasks: Annotated[Sequence[str], Words(tuple[str, ...])],
    lengths: Annotated[Sequence[int], Words(tuple[Tokens, ...])],
    out: StrPath,
    *,
    samples: int = 20,
    seed: int = 0,
    haystack: StrPath | None = None,
    chunk: Tokens | None = None,
    gpus: int = 1,
    kv: Literal["auto", "fp8"] = "auto",
    batch: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Let a model answer tests at several lengths, and score it. A stopped call is resumed.

    Args:
        model: Folder, hub id or miniature.
        tasks: Names of tests, and paths of files of questions (.jsonl).
        lengths: Tokens of prompt and answer together.
        out: Folder of answers and scores.
        samples: Samples of each test at each length.
        seed: Seed of the samples.
        haystack: Text file or folder to fill prompts with.
        chunk: Tokens of one prefill pass; by default 16,384, or 65,536 a GPU where `gpus` or `kv` is given.
        gpus: GPUs that share a prompt; each holds the whole model and its part of the cache.
        kv: Type of keys and values: auto, or fp8, which takes half the memory and rounds them to 8 bits.
        batch: Short prompts to answer together; by default as many as fit on a GPU, one on a CPU.
        device: auto, cpu or cuda.

    Returns:
        `results` (one a test, with `by_length`), `settings` and `environment`; empty on torchrun's other processes.

    Raises:
        ValueError: No such model or test, a length outside of the window, or a folder of other answers.
    """
    from ultralong.utils.hub import find_checkpoint

    place = find_checkpoint(model)
    with without_collections():
        from ultralong.evaluation.runs.commands import answer as work
        from ultralong.evaluation.tasks.own.own_task import is_file, pinned
        from ultralong.inference.sharded_engine import with_model

    tasks = [pinned(task) if is_file(task) else task for task in tasks]  # wrong lines are told before a model opens
    asked = partial(work, tasks, lengths, samples, seed, out, haystack, chunk, batch)
    return with_model(asked, place, gpus=gpus, kv=kv, chunk=chunk, device=device) or {}

"""Functions that make something: a longer window, rows, an average of checkpoints, an attention context."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from ultralong.api.names import Changes, File, Named, StrPath, Words, as_overrides
from ultralong.utils.hub import find_checkpoint, local_folder, unless_miniature
from ultralong.utils.processes import without_collections
from ultralong.utils.units import Tokens

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ultralong.attention import AttentionContext
    from ultralong.attention.collectives import GroupOrMesh
    from ultralong.checkpoints.extend import ExtendReport
    from ultralong.checkpoints.gguf import GgufExport
    from ultralong.checkpoints.merge import MergeReport
    from ultralong.data.recipe.build import PackReport


def extend(
    model: Named,
    to: Annotated[int | str, Words(str)],
    out: StrPath | None = None,
    method: str = "auto",
    *,
    explain: bool = False,
    factor: float | None = None,
    attention_factor: float | None = None,
    original_window: Tokens | None = None,
    theta: float | None = None,
    beta: float | None = None,
    revision: str | None = None,
    quiet: bool = False,
) -> ExtendReport:
    """Write a copy of a checkpoint with a longer context window: RoPE rescaled in one step, weights untouched.

    >>> report = extend("miniature", to=1024, out="long", quiet=True)
    >>> print(report.method, report.factor, report.old_window, report.new_window)
    yarn 2.0 512 1024

    Args:
        model: Checkpoint folder with safetensors weights, a hub id, or miniature (the model that ships).
        to: Tokens of the new window, such as 1048576 or 1m, or how many times the old one, such as 8x.
        out: Folder to write; it must be empty or not exist. Required, except with `explain`.
        method: `auto` keeps a model's llama3 scaling and gives any other yarn; or `linear`, `ntk`, `dynamic`, `yarn`,
            `llama3`.
        explain: Write nothing and say which scaling this is, what it changes for which rotary pairs, and what to
            expect of the model by its design.
        factor: Scaling factor; by default the new window over the window of the unscaled pretraining.
        attention_factor: Factor on cos and sin; 1.0 switches YaRN's temperature off.
        original_window: Window of the unscaled pretraining, where the config does not say it.
        theta: Another RoPE base.
        beta: Turns within the original window above which a rotary pair keeps its frequency; by default 4, as in
            the recipe.
        revision: Branch, tag or commit of a hub model.
        quiet: No progress bar.

    Returns:
        What was done: see `ultralong.checkpoints.extend.ExtendReport`; with `explain`, the lines to read are in its
        `explanation`.

    Raises:
        ValueError: The model can't be extended so; nothing is written then.
    """
    with without_collections():
        from ultralong.checkpoints.extend import extend as run

    return run(
        unless_miniature(model),
        to,
        out,
        method,
        explain=explain,
        factor=factor,
        attention_factor=attention_factor,
        original_window=original_window,
        theta=theta,
        beta=beta,
        revision=revision,
        quiet=quiet,
    )


def pack(
    recipe: Named,
    tokenizer: Annotated[PreTrainedTokenizerBase | StrPath, Words(str)],
    length: Tokens,
    out: StrPath,
    *,
    limit: Tokens | None = None,
    changes: Changes = (),
    cache: StrPath | None = None,
    workers: int = 1,
    quiet: bool = False,
) -> PackReport:
    """Turn documents (or conversations) into packed rows of exactly `length` tokens. A stopped call is resumed.

    >>> report = pack("texts", "long", length=1024, out="rows", quiet=True)
    >>> report.rows > 0
    True

    Args:
        recipe: A recipe's name, its YAML file, or a folder of texts.
        tokenizer: Folder, hub id or miniature: the model whose tokenizer is used.
        length: Tokens of a row.
        out: Folder to write the rows into.
        limit: Take about this many tokens of each source at most, to try a recipe out.
        changes: Changes of the recipe, such as seed=1.
        cache: Where fetched packages are kept; by default ~/.cache/ultralong/sources.
        workers: Processes that tokenise; 1 leaves it to the tokenizer's threads.
        quiet: No progress bars.

    Returns:
        Rows, tokens, documents and times: see `ultralong.data.recipe.build.PackReport`.

    Raises:
        ValueError: The recipe is wrong, a source cannot be read, or `out` was made from something else.
    """
    from ultralong.data.recipe.build import pack_recipe
    from ultralong.data.recipe.schema import load_recipe

    place = find_checkpoint(tokenizer) if isinstance(tokenizer, str | os.PathLike) else tokenizer
    loaded = load_recipe(recipe, tuple(as_overrides(changes)))
    return pack_recipe(loaded, place, length, out, limit=limit, cache=cache, workers=workers, quiet=quiet)


def export_gguf(
    checkpoint: Named,
    out: File,
    llama_cpp: StrPath | None = None,
    dtype: Literal["auto", "f32", "f16", "bf16", "q8_0"] = "auto",
) -> GgufExport:
    """Write a checkpoint as one GGUF file for llama.cpp, by llama.cpp's own converter.

    Args:
        checkpoint: Checkpoint folder with safetensors weights, or miniature.
        out: The file to write.
        llama_cpp: Folder of llama.cpp's sources.
        dtype: Type of the weights in the file; auto keeps the checkpoint's.

    Returns:
        The file, and the options that llama.cpp needs to read it.

    Raises:
        ValueError: llama.cpp cannot apply the checkpoint's RoPE, the converter is not there or failed, or `out` exists.
        ImportError: gguf is not installed.
    """
    from ultralong.checkpoints.gguf import export_gguf as run

    return run(local_folder(checkpoint), out, llama_cpp, dtype)


def merge(
    models: Annotated[Sequence[StrPath], Words(tuple[str, ...])],
    out: StrPath,
    weights: Annotated[Sequence[float], Words(tuple[float, ...])] = (),
    *,
    quiet: bool = False,
) -> MergeReport:
    """Write the weighted average of checkpoints of one model, or a model with its LoRA adapter merged into it.

    An average is taken in float32 a tensor at a time. Config, tokenizer and the type of the weights are those of the
    first model, of an adapter's base.

    >>> report = merge(["run/model", "long"], out="merged", weights=[0.9, 0.1], quiet=True)
    >>> print(report.weights, report.dtypes)
    (0.9, 0.1) ('BF16',)

    Args:
        models: Checkpoint folders, hub ids, or checkpoints of a run; or an adapter's folder, after its base if that is
            not where it was.
        out: Folder to write; it must be empty or not exist.
        weights: A number a model, which add up to 1; by default all count alike.
        quiet: No progress bar.

    Returns:
        What was done: see `ultralong.checkpoints.merge.MergeReport`.

    Raises:
        ValueError: Another architecture, shape or tokenizer, or weights that don't fit; nothing is written then.
    """
    from ultralong.checkpoints.merge import merge as run
    from ultralong.training.adapters.config import is_adapter

    if any(map(is_adapter, models)):
        from ultralong.training.adapters.merge import merge_adapter

        return merge_adapter(models, out, weights)
    return run([unless_miniature(model) for model in models], out, weights, quiet=quiet)


def make_attention_context(
    tokens: int,
    group: GroupOrMesh | None = None,
    scheme: str = "auto",
    kernel: str = "auto",
    boundaries: Tensor | Sequence[int] | None = None,
    *,
    heads: int,
    kv_heads: int | None = None,
    head_chunks: int | None = None,
    anchors: Sequence[int] = (),
) -> AttentionContext:
    """Decide how the attention of one row is shared out over processes (context parallelism).

    A model that was loaded with `attn_implementation="ultralong"` takes the result as `attention_context=`.

    >>> context = make_attention_context(1024, heads=4, kv_heads=2)
    >>> print(context.tokens, context.scheme)
    1024 single

    Args:
        tokens: Tokens of the row.
        group: The processes that share it: a process group or a device mesh; None is this process alone.
        scheme: "auto", or one of `ultralong.attention.SCHEMES`.
        kernel: "auto", or one of `ultralong.attention.KERNELS`.
        boundaries: (N + 1,) cumulative document lengths where documents must not see each other.
        heads: Query heads of the model.
        kv_heads: Kv heads of the model; None is as many as query heads.
        head_chunks: Chunks of heads that the scheme works through one after another.
        anchors: First tokens of documents that all tokens behind them see, up to the next anchor.

    Raises:
        ValueError: A name is unknown, boundaries don't fit, or the heads can't be split over the group.
    """
    from ultralong.attention import make_attention_context as make

    return make(
        tokens,
        group,
        scheme,
        kernel,
        boundaries,
        heads=heads,
        kv_heads=kv_heads,
        head_chunks=head_chunks,
        anchors=anchors,
    )

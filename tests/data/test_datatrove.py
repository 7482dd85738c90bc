"""Recipes on datatrove: the program is right, parts add up to the whole, merged stores are one machine's corpus."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import json
import random
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ultralong.cli import main
from ultralong.data.read.documents import Document
from ultralong.data.recipe.build import pack_recipe
from ultralong.data.recipe.datatrove_script import DatatroveSettings, render
from ultralong.data.recipe.datatrove_steps import Prepare, Tokenise
from ultralong.data.recipe.merge import pack_merged
from ultralong.data.recipe.schema import Recipe, Source, load_recipe
from ultralong.data.recipe.sources import SourceReader
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.data.tokens.merge import merge_stores
from ultralong.data.tokens.shards import verify
from ultralong.data.tokens.store import TokenStore
from ultralong.data.tokens.tokenize import tokenize_corpus
from ultralong.utils.files import read_json, write_json

needs_datatrove = pytest.mark.skipif(find_spec("datatrove") is None, reason="datatrove is not installed")
WORDS = ["".join(letters) for letters in itertools.product("bdkt", "aeo", "lmnr", "aiu")]


def prose(draw: random.Random, words: int) -> str:
    """Words without sense, but with the small words that a quality filter wants to see."""
    return " ".join(
        itertools.chain.from_iterable(
            (*draw.choices(WORDS, k=4), draw.choice(["the", "of", "and", "that"])) for _ in range(words // 5)
        )
    )


@pytest.fixture
def corpus(tmp_path, tiny_tokenizer):
    """Texts, one twice, one nearly twice, one too short for the quality filter; a recipe; a tokenizer's folder."""
    draw = random.Random(0)
    texts = {f"{n:02d}": prose(draw, 150 + 40 * (n % 5)) for n in range(24)}
    texts |= {"same": texts["07"], "near": texts["08"] + " ta", "short": "of the and that"}
    (tmp_path / "texts").mkdir()
    for name, text in texts.items():
        (tmp_path / "texts" / f"{name}.txt").write_text(text)
    rule = {"short_below": 100, "short_keep": 0.5, "long_above": 400, "long_copies": 2.0}
    (tmp_path / "mine.yaml").write_text(
        json.dumps(
            {
                "name": "mine",
                "description": "d",
                "seed": 3,
                "length_rule": rule,
                "sources": [{"name": "a", "license": "CC0-1.0", "path": "texts"}],
            }
        )
    )
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


def trove(folder, **changes):
    return DatatroveSettings(
        **{"base": str(folder / "run"), "tokenizer": str(folder / "model"), "tasks": 3, "workers": 1, **changes}
    )


EVERY = {"filters": ("language", "quality", "repetition"), "executor": "slurm", "partition": "cpu"}


@pytest.mark.parametrize(
    "changes", [{}, {"dedup": ()}, {"dedup": ("minhash",)}, EVERY, {"filters": ("quality",), "cache": "/a b/c'd"}]
)
def test_the_program_compiles_and_names_what_it_uses(corpus, changes):
    path = render(str(corpus / "mine.yaml"), trove(corpus, **changes), corpus / "scripts")
    text = path.read_text()
    tree = ast.parse(text)
    compile(tree, str(path), "exec")
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert imported <= used, "nothing is imported for nothing"
    assert {"Prepare", "Read", "Tokenise"} <= imported
    for name, sign in (("exact", "ExactDedupFilter"), ("minhash", "MinhashDedupFilter")):
        assert (sign in imported) == (name in changes.get("dedup", ("exact", "minhash")))
    for name, sign in (
        ("language", "language_filter"),
        ("quality", "GopherQualityFilter"),
        ("repetition", "GopherRepetitionFilter"),
    ):
        assert (sign in imported) == (name in changes.get("filters", ()))
    assert ("SlurmPipelineExecutor" in imported) == (changes.get("executor") == "slurm")
    assert load_recipe(corpus / "scripts" / "recipe.yaml").length_rule.short_keep == 0.5


def paths_and_names(text: str, at: str) -> dict[str, object]:
    """The program's constants as they are where it stands at `at`."""
    constants = text[text.index("HERE = ") : text.index("def stage")]
    values: dict[str, object] = {"Path": Path, "__file__": at}
    exec(constants, values)
    return values


@pytest.mark.parametrize(
    ("language", "changes", "code"),
    [("eng", {}, "en"), ("spa", {}, "es"), ("jpn", {}, "ja"), ("yue", {"language_code": "yue"}, "yue")],
)
def test_a_language_has_the_name_that_the_model_gives_it(corpus, language, changes, code):
    """Their first two letters would be `sp` and `jp`, which the model never says: every text would be thrown out."""
    made = trove(corpus, filters=("language",), language=language, language_model="/models/it's.bin", **changes)
    text = render(str(corpus / "mine.yaml"), made, corpus / "scripts").read_text()
    values = paths_and_names(text, "/elsewhere/pipeline.py")
    assert (values["LANGUAGE_CODE"], values["LANGUAGE_MODEL"]) == (code, "/models/it's.bin")


def test_paths_that_are_not_absolute_are_meant_from_the_program(corpus):
    """So a folder with the program, its recipe and a tokenizer runs wherever it is copied to."""
    made = DatatroveSettings(base="run", tokenizer="model", cache="cache", tasks=2, workers=1)
    text = render(str(corpus / "mine.yaml"), made, corpus / "scripts").read_text()
    values = paths_and_names(text, "/elsewhere/copied/pipeline.py")
    wanted = {"BASE": "run", "TOKENIZER": "model", "CACHE": "cache", "RECIPE": "recipe.yaml"}
    assert {name: values[name] for name in wanted} == {key: f"/elsewhere/copied/{name}" for key, name in wanted.items()}
    assert str(corpus) not in text, "nothing of the machine that wrote it"


@needs_datatrove
@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_every_argument_is_one_that_datatrove_takes(corpus, executor):
    path = render(str(corpus / "mine.yaml"), trove(corpus, **{**EVERY, "executor": executor}), corpus / "scripts")
    tree = ast.parse(path.read_text())
    named = {
        alias.name: getattr(importlib.import_module(node.module), alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") in named]
    assert len(calls) > 15
    for call in calls:
        if not any(keyword.arg is None for keyword in call.keywords):
            inspect.signature(named[call.func.id]).bind(*call.args, **{k.arg: k.value for k in call.keywords})


@needs_datatrove
def test_a_dry_run_builds_every_stage_for_slurm(corpus):
    changes = {"executor": "slurm", "partition": "cpu", "filters": ("quality", "repetition")}
    path = render(str(corpus / "mine.yaml"), trove(corpus, **changes), corpus / "scripts")
    done = subprocess.run([sys.executable, path, "--dry-run"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10
    assert lines[1].endswith("3 tasks: Read, GopherQualityFilter, GopherRepetitionFilter, JsonlWriter")
    assert lines[6].endswith("14 tasks: MinhashDedupBuckets")


GERMAN = ("der", "die", "das", "und", "nicht", "ist", "ein", "mit", "auf", "wird", "auch", "nach", "zwischen", "schiff")


@pytest.fixture
def language_model(tmp_path):
    """A stand-in for lid.176, trained here: it knows the corpus's words, and some German ones."""
    fasttext = pytest.importorskip("fasttext")
    draw, lines = random.Random(1), []
    for _ in range(200):
        lines += [f"__label__en {prose(draw, 20)}", f"__label__de {' '.join(draw.choices(GERMAN, k=20))}"]
    (tmp_path / "labelled.txt").write_text("\n".join(lines))
    # Eleven threads: each fills a tenth of fastText 0.9.2's matrix (and one the rest); with fewer some stays as the
    # memory was, and that may be NaN.
    trained = fasttext.train_supervised(str(tmp_path / "labelled.txt"), dim=16, loss="hs", thread=11, verbose=0)
    trained.save_model(str(tmp_path / "lid.bin"))
    return tmp_path / "lid.bin"


@needs_datatrove
@pytest.mark.slow
def test_all_filters_and_both_deduplications_from_the_command_to_the_rows(corpus, language_model, monkeypatch):
    """The language filter is datatrove's, its model a stand-in; everything else is as on real texts."""
    draw = random.Random(2)
    for n in range(4):
        (corpus / "texts" / f"german-{n}.txt").write_text(" ".join(draw.choices(GERMAN, k=200)))
    monkeypatch.setenv("HF_HOME", str(corpus / "cache"))
    words = [
        "data",
        "render",
        str(corpus / "mine.yaml"),
        "--tokenizer",
        str(corpus / "model"),
        "--base",
        str(corpus / "run"),
        "--out",
        str(corpus / "scripts"),
        "--tasks",
        "3",
        "--workers",
        "2",
        "--filters",
        "language",
        "quality",
        "repetition",
        "--language-model",
        str(language_model),
        "--set",
        "length_rule.short_keep=1.0",
    ]
    main(words)
    done = subprocess.run(
        [sys.executable, corpus / "scripts" / "pipeline.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    main(
        [
            "data",
            "merge",
            str(corpus / "run"),
            "--recipe",
            str(corpus / "scripts" / "recipe.yaml"),
            "--tokenizer",
            str(corpus / "model"),
            "--length",
            "512",
            "--out",
            str(corpus / "rows"),
            "--quiet",
        ]
    )
    store = TokenStore(corpus / "rows" / "tokens")
    names = {store.describe(n)["id"].split("#")[0] for n in range(len(store))}
    every = {f"a/{path.name}" for path in (corpus / "texts").iterdir()}
    assert every - names == (
        {f"a/german-{n}.txt" for n in range(4)}
        | {"a/short.txt"}
        | ({"a/07.txt", "a/same.txt"} - names)
        | ({"a/08.txt", "a/near.txt"} - names)
    )
    assert len(names & {"a/07.txt", "a/same.txt"}) == len(names & {"a/08.txt", "a/near.txt"}) == 1
    steps = read_json(corpus / "run" / "logs" / "read" / "stats.json")
    counted = {step["name"].rsplit(" ", 1)[-1]: step["stats"] for step in steps}
    left = {
        name: stats["dropped"] if isinstance(stats["dropped"], int) else stats["dropped"]["total"]
        for name, stats in counted.items()
        if "dropped" in stats
    }
    assert left == {"ID": 4, "Quality": 1}, "each was left out by the filter that is for it"


@needs_datatrove
def test_a_language_model_that_is_not_there_is_said_before_anything_runs(tmp_path):
    from ultralong.data.recipe.datatrove_steps import language_filter

    with pytest.raises(ValueError, match="is not there"):
        language_filter("en", tmp_path / "none.bin")


@needs_datatrove
@pytest.mark.slow
def test_the_local_executor_gives_the_corpus_of_one_machine_without_its_duplicates(corpus, tiny_tokenizer):
    """From a folder that was copied elsewhere, as it would be to a cluster."""
    made = DatatroveSettings(base="run", tokenizer="model", tasks=3, workers=1, filters=("quality",))
    render(str(corpus / "mine.yaml"), made, corpus / "written")
    shutil.copytree(corpus / "written", corpus / "scripts")
    shutil.copytree(corpus / "model", corpus / "scripts" / "model")
    shutil.rmtree(corpus / "written")
    for _ in range(2):  # the second run has nothing left to do
        done = subprocess.run(
            [sys.executable, corpus / "scripts" / "pipeline.py"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    main(
        [
            "data",
            "merge",
            str(corpus / "scripts" / "run"),
            "--recipe",
            str(corpus / "scripts" / "recipe.yaml"),
            "--tokenizer",
            str(corpus / "model"),
            "--length",
            "512",
            "--out",
            str(corpus / "rows"),
            "--quiet",
        ]
    )
    pack_recipe(corpus / "mine.yaml", tiny_tokenizer, 512, corpus / "one", quiet=True)
    merged, one = TokenStore(corpus / "rows" / "tokens"), TokenStore(corpus / "one" / "tokens")
    here = {merged.describe(n)["id"]: merged[n].tolist() for n in range(len(merged))}
    there = {one.describe(n)["id"]: one[n].tolist() for n in range(len(one))}
    missing = {name.split("#")[0] for name in there.keys() - here.keys()}
    assert not here.keys() - there.keys()
    assert all(here[name] == there[name] for name in here)
    assert len(missing & {"a/07.txt", "a/same.txt"}) == 1
    assert len(missing & {"a/08.txt", "a/near.txt"}) == 1
    assert missing <= {"a/07.txt", "a/same.txt", "a/08.txt", "a/near.txt", "a/short.txt"}
    report = read_json(corpus / "rows" / "report.json")
    assert report["sources"]["a"]["licenses"] == {"CC0-1.0": merged.tokens}
    assert report["sources"]["a"]["read"]["documents"] == 27
    assert report["rows"] == len(PackedRows(corpus / "rows"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.integers(1, 7), join=st.sampled_from(["file", "directory"]))
def test_parts_add_up_to_the_whole(tmp_path, parts, join):
    for number in range(20):
        folder = tmp_path / "tree" / f"d{number % 6}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.txt").write_text(f"text {number}")
    source = Source("a", "x", path=str(tmp_path / "tree"), read=load_recipe("debian-docs").sources[1].read)
    source = Source("a", "x", path=source.path, read=type(source.read)(join=join))
    recipe = Recipe("m", "d", (source,))
    whole = {d.id: d.text for d in SourceReader(source, recipe, None).texts()}
    found = [d for n in range(parts) for d in SourceReader(source, recipe, None, part=(n, parts)).texts()]
    assert len(found) == len(whole) == (20 if join == "file" else 6)
    assert {d.id: d.text for d in found} == whole


def test_streams_are_parted_too(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.jsonl").write_text("\n".join(json.dumps({"text": f"t{n}"}) for n in range(20)))
    recipe = Recipe("m", "d", load_recipe(write_recipe(tmp_path)).sources)
    found = [d for n in range(3) for d in SourceReader(recipe.sources[0], recipe, None, part=(n, 3)).texts()]
    assert sorted(d.text for d in found) == sorted(f"t{n}" for n in range(20))
    assert len({d.id for d in found}) == 20


def write_recipe(tmp_path):
    path = tmp_path / "stream.yaml"
    path.write_text(
        json.dumps(
            {
                "name": "s",
                "description": "d",
                "sources": [{"name": "a", "license": "x", "dataset": {"id": str(tmp_path / "in")}}],
            }
        )
    )
    return path


def stores(tmp_path, tokenizer, counts):
    number = itertools.count()
    for place, count in enumerate(counts):
        documents = [
            Document(f"d{next(number)}", f"The tide came in at dawn {n}. " * 3, f"s{n % 2}", "MIT")
            for n in range(count)
        ]
        yield tokenize_corpus(documents, tokenizer, tmp_path / f"part{place}", shard_tokens=60, quiet=True).folder


def test_merged_stores_are_one(tmp_path, tiny_tokenizer):
    parts = list(stores(tmp_path, tiny_tokenizer, [5, 0, 9]))
    merged = merge_stores(parts, tmp_path / "all")
    whole = [(store.describe(n), store[n].tolist()) for store in map(TokenStore, parts) for n in range(len(store))]
    assert [(merged.describe(n), merged[n].tolist()) for n in range(len(merged))] == whole
    assert merged.manifest["sources"]["s0"]["documents"] + merged.manifest["sources"]["s1"]["documents"] == 14
    assert verify(tmp_path / "all") == sum(verify(part) for part in parts)
    for name in ("manifest.json", "tokens-00001.json"):
        (tmp_path / "all" / name).unlink()
    again = merge_stores(parts, tmp_path / "all")
    assert again.manifest == merged.manifest
    with pytest.raises(ValueError, match="provenance"):
        merge_stores(parts[:2], tmp_path / "all")
    with pytest.raises(ValueError, match="Merge each part once"):
        merge_stores([parts[0], *stores(tmp_path / "other", tiny_tokenizer, [3])], tmp_path / "twice")


def test_damaged_and_foreign_stores_are_refused(tmp_path, tiny_tokenizer):
    import pickle

    parts = list(stores(tmp_path, tiny_tokenizer, [3, 3]))
    other = pickle.loads(pickle.dumps(tiny_tokenizer))  # noqa: S301 - our own object
    other.add_tokens(["dawn"])
    foreign = tokenize_corpus([Document("x", "at dawn")], other, tmp_path / "foreign", quiet=True).folder
    with pytest.raises(ValueError, match="another tokenizer"):
        merge_stores([*parts, foreign], tmp_path / "all")
    shard = next(parts[1].glob("tokens-*.bin"))
    shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(ValueError, match="differs from its manifest"):
        merge_stores(parts, tmp_path / "all")
    with pytest.raises(ValueError, match="no token store"):
        merge_stores([], tmp_path / "none")


def test_the_steps_by_hand(corpus, tiny_tokenizer):
    """What datatrove calls, called without it: every task's store together is the recipe on one machine."""
    step = {"recipe": str(corpus / "mine.yaml"), "base": str(corpus / "run"), "tokenizer": str(corpus / "model")}
    Prepare(**step)(None)
    recipe = load_recipe(step["recipe"])
    ratio = read_json(corpus / "run" / "characters_per_token.json")["a"]
    for rank in range(3):
        opened = SourceReader(recipe.sources[0], recipe, None, part=(rank, 3))
        items = [
            SimpleNamespace(text=d.text, id=d.id, metadata={"source": d.source, "license": d.license})
            for d in opened.texts()
        ]
        write_json(corpus / "run" / "read" / f"{rank:05d}" / "a.json", opened.report.as_json())
        Tokenise(**step)(iter(items), rank, 3)
        if rank == 1:
            write_json(corpus / "run" / "read" / "00002" / "a.json", {})
            with pytest.raises(ValueError, match="tasks without tokens: 00002"):
                pack_merged(corpus / "run", step["recipe"], step["tokenizer"], 512, corpus / "rows", quiet=True)
    merged = pack_merged(corpus / "run", step["recipe"], step["tokenizer"], 512, corpus / "rows", quiet=True)
    one = pack_recipe(recipe, tiny_tokenizer, 512, corpus / "one", quiet=True)
    assert ratio == pytest.approx(one.sources["a"]["characters_per_token"])
    for key in ("documents", "tokens", "characters", "licenses", "lengths"):
        assert merged.sources["a"][key] == one.sources["a"][key]
    assert merged.sources["a"]["read"] == one.sources["a"]["read"]
    assert merged.counts["document_tokens"] == one.counts["document_tokens"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"filters": ("speed",)}, "speed is not known"),
        ({"dedup": ("fuzzy",)}, "fuzzy is not known"),
        ({"filters": ("language",), "language": "yue"}, "language-code"),
        ({"tasks": 0}, "tasks"),
        ({"executor": "slurm"}, "partition"),
    ],
)
def test_nonsense_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DatatroveSettings("b", "t", **wrong)


def test_conversations_are_packed_on_one_machine(tmp_path):
    with pytest.raises(ValueError, match="of chat"):
        render("sft-offline", DatatroveSettings("b", "t"), tmp_path)

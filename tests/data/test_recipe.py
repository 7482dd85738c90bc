"""Recipes: the schema names what is wrong, the shipped ones hold, and one call goes from a recipe to rows and back."""

from __future__ import annotations

import gzip
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from ultralong.data.recipe.build import pack_recipe
from ultralong.data.recipe.schema import RECIPES, Recipe, Source, find_recipe, load_recipe
from ultralong.data.recipe.sources import SourceReader
from ultralong.data.recipe.texts import read_conversations, read_documents
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.data.select.length_rule import LengthRule
from ultralong.utils.files import read_json
from ultralong.utils.settings import to_mapping

UNTIMED = {"seconds": 0, "cpu_seconds": 0}
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        text = f"This is document {number}.\n" + "The tide came in at dawn. " * 5 * number
        (folder / f"{number:02d}.txt").write_text(text)
    (folder / "broken.txt").write_bytes(b"\xff\xfe")
    return folder


def recipe_file(tmp_path, **changes):
    values = {
        "name": "mine",
        "description": "d",
        "packing": {"join": "separator"},
        "sources": [{"name": "a", "license": "CC0-1.0", "path": "texts"}],
        **changes,
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(values))
    return tmp_path / "mine.yaml"


def contents(folder):
    """Every file but the report, which holds seconds."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "report.json"}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_valid_pinned_and_described(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description.endswith(".")
    table = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert f"({name}.yaml)" in table
    for source in recipe.sources:
        assert source.license
        for package in source.packages:
            pinned = package.sha256 is not None and len(package.sha256) == 64
            assert pinned or package.registry == "deb"


def test_the_heldout_works_are_not_in_the_training_recipe():
    train, held = (load_recipe(name).sources[0].packages[0] for name in ("tiny", "tiny-heldout"))
    assert set(held.include) == set(train.exclude)
    assert train.sha256 == held.sha256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sorces": []}, "unknown key 'sorces'; did you mean 'sources'"),
        (
            {"sources": [{"name": "a", "license": "x"}]},
            r"sources\[0\]: source 'a' needs one of packages, path and dataset",
        ),
        ({"sources": [{"name": "a", "license": "x", "path": "p", "dataset": {"id": "q"}}]}, "needs one of"),
        ({"sources": [{"name": "a", "path": "p"}]}, r"sources\[0\]: license must be given"),
        ({"sources": [{"name": "a", "license": "x", "path": "p", "clean": ["html"]}]}, "clean: html is not known"),
        (
            {"sources": [{"name": "a", "license": "x", "path": "p", "read": {"format": "pdf"}}]},
            "read: format must be one of",
        ),
        ({"sources": [{"name": "a", "license": "x", "path": "p", "budget": 0}]}, "budget must be positive"),
        (
            {
                "sources": [
                    {"name": "a", "license": "x", "packages": [{"registry": "pypi", "name": "b", "version": "1"}]}
                ]
            },
            r"packages\[0\]: sha256",
        ),
        ({"sources": []}, "one or more"),
        ({"sources": [{"name": "a", "license": "x", "path": "p"}] * 2}, "different names"),
        ({"length_rule": {"short_keep": 2}}, "length_rule: short_keep"),
        ({"packing": {"joint": "none"}}, "unknown key 'joint'; did you mean 'join'"),
        ({"packing": {"join": "comma"}}, "packing: join must be one of"),
        ({"packing": {"seed": 1}}, "seed does not belong here"),
        ({"kind": "chat", "packing": {}, "length_rule": {}}, "length_rule: the length rule is for documents"),
        (
            {
                "kind": "chat",
                "packing": {},
                "tokens": 9,
                "sources": [
                    {"name": "a", "license": "x", "path": "p", "subsets": {"field": "f", "shares": {"b": 1.0}}}
                ],
            },
            "subsets: they are for documents; a is of conversations",
        ),
    ],
)
def test_a_wrong_recipe_names_the_key(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(recipe_file(tmp_path, **changes))
    assert "mine.yaml" in str(error.value)


def test_finding_recipes(tmp_path, texts):
    assert find_recipe("tiny") == RECIPES / "tiny.yaml"
    assert find_recipe("tiny.yaml") == RECIPES / "tiny.yaml"
    with pytest.raises(ValueError, match=r"no recipe 'tny'.*tiny"):
        find_recipe("tny")
    assert load_recipe(texts).sources[0].path == str(texts)
    changed = load_recipe(texts, ("seed=5", "packing.tail=pad"))
    assert (changed.seed, changed.packing) == (5, {"tail": "pad"}), "a folder takes changes as a file does"
    assert changed == replace(load_recipe(texts), seed=5, packing={"tail": "pad"})
    with pytest.raises(ValueError, match=r"a recipe of .*unknown key 'sede'; did you mean 'seed'"):
        load_recipe(texts, ("sede=5",))
    assert load_recipe(recipe_file(tmp_path), ("seed=5",)).seed == 5


def test_from_a_recipe_to_rows(tmp_path, texts, tiny_tokenizer):
    path = recipe_file(tmp_path)
    report = pack_recipe(path, tiny_tokenizer, 64, tmp_path / "rows", quiet=True)
    rows = PackedRows(tmp_path / "rows")
    assert report.rows == len(rows) > 10
    assert report.tokens == rows.length * len(rows)
    source = report.sources["a"]
    assert source["documents"] == 12
    assert source["licenses"] == {"CC0-1.0": source["tokens"]}
    assert source["read"]["skipped"] == {"not UTF-8": 1}
    assert source["read"]["examples"] == {"not UTF-8": ["broken.txt"]}
    assert source["lengths"]["before"] == source["lengths"]["after"]
    assert report.bytes["rows"] > 0
    assert read_json(tmp_path / "rows" / "report.json") == report.to_dict()
    assert "12 documents" in str(report)
    assert "; left out: 1 not UTF-8 (see left_out.jsonl)" in str(report)
    resolved = load_recipe(tmp_path / "rows" / "recipe.yaml")
    assert to_mapping(resolved) == to_mapping(load_recipe(path))


def test_the_same_command_again_does_nothing_and_changes_are_refused(tmp_path, texts, tiny_tokenizer):
    path = recipe_file(tmp_path)
    first = pack_recipe(path, tiny_tokenizer, 64, tmp_path / "rows", quiet=True).to_dict()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "rows").rglob("*-0*")}
    again = pack_recipe(path, tiny_tokenizer, 64, tmp_path / "rows", quiet=True).to_dict()
    assert {**first, **UNTIMED} == {**again, **UNTIMED}
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "rows").rglob("*-0*")}
    with pytest.raises(ValueError, match="length was 64, now 32"):
        pack_recipe(path, tiny_tokenizer, 32, tmp_path / "rows", quiet=True)
    other = pickle.loads(pickle.dumps(tiny_tokenizer))  # noqa: S301 - our own object
    other.add_tokens(["tide"])
    with pytest.raises(ValueError, match=r"tokenizer\.vocabulary was 400, now 401"):
        pack_recipe(path, other, 64, tmp_path / "rows", quiet=True)
    (texts / "new.txt").write_text("A new text came in.")
    with pytest.raises(ValueError, match=r"provenance\.sources\.a\.files was"):
        pack_recipe(path, tiny_tokenizer, 64, tmp_path / "rows", quiet=True)


@pytest.mark.parametrize(
    "lost",
    [("tokens/sources.json", "manifest.json"), ("report.json",), ("tokens/manifest.json", "tokens/sources.json")],
)
def test_a_run_cut_anywhere_goes_on_to_the_same_rows_and_report(tmp_path, texts, tiny_tokenizer, lost):
    path = recipe_file(tmp_path)
    first = pack_recipe(path, tiny_tokenizer, 64, tmp_path / "rows", quiet=True).to_dict()
    files = contents(tmp_path / "rows")
    for name in lost:
        (tmp_path / "rows" / name).unlink()
    again = pack_recipe(path, tiny_tokenizer, 64, tmp_path / "rows", quiet=True).to_dict()
    assert {**first, **UNTIMED} == {**again, **UNTIMED}
    assert files == contents(tmp_path / "rows")


def test_a_folder_is_a_recipe_and_a_checkpoint_folder_is_a_tokenizer(tmp_path, texts, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    report = pack_recipe(texts, tmp_path / "model", 64, tmp_path / "rows", quiet=True)
    assert report.sources["texts"]["documents"] == 12
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    again = pack_recipe(texts, tmp_path / "model", 64, tmp_path / "again", quiet=True)
    assert again.tokenizer["sha256"] == report.tokenizer["sha256"]
    with pytest.raises(ValueError, match="is not a folder"):
        pack_recipe(texts, tmp_path / "nowhere", 64, tmp_path / "x", quiet=True)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        pack_recipe(texts, texts, 64, tmp_path / "x", quiet=True)


def test_limit_takes_a_part_that_is_not_the_beginning_of_the_alphabet(tmp_path, texts, tiny_tokenizer):
    report = pack_recipe(recipe_file(tmp_path), tiny_tokenizer, 64, tmp_path / "rows", limit=200, quiet=True)
    assert 0 < report.sources["a"]["documents"] < 12
    recipe = load_recipe(recipe_file(tmp_path))
    with_token_limit = Recipe("m", "d", (Source("a", "x", path=str(texts), budget=10**9),))
    names = [name for name, _ in SourceReader(with_token_limit.sources[0], with_token_limit, None).files]
    assert names != sorted(names)
    assert sorted(names) == [name for name, _ in SourceReader(recipe.sources[0], recipe, None).files]


def test_a_budget_does_not_undo_the_length_rule(tmp_path):
    """A budget reads files in a shuffled order; that order must not be the one that decides which short ones stay."""
    for number in range(400):
        (tmp_path / f"{number}.txt").write_text("x" * 100)
    rule = LengthRule(short_below=1000, short_keep=0.1, long_above=1000)
    recipe = Recipe(
        "m", "d", (Source("a", "x", path=str(tmp_path), budget=1000, characters_per_token=1.0),), length_rule=rule
    )
    opened = SourceReader(recipe.sources[0], recipe, None)
    kept = list(opened.documents())
    counts = opened.counts["a"].as_json()
    assert counts["after"]["documents"][0] == len(kept) == 10
    # Ten kept of about a hundred read; within four standard deviations of that negative binomial.
    assert 40 < counts["before"]["documents"][0] < 220


def test_characters_per_token_are_measured_all_over_a_source(tmp_path, tiny_tokenizer):
    """The first files, by name, are not like the others."""
    for number in range(300):
        text = "The tide came in at dawn. " if number < 30 else "0x1F2E3D4C, ~!@%^ "
        (tmp_path / f"{number:03d}.txt").write_text(text * 20)
    source = Source("a", "x", path=str(tmp_path))
    opened = SourceReader(source, Recipe("m", "d", (source,)), None)
    texts = [document.text for document in opened.documents(tiny_tokenizer)]
    whole = sum(map(len, texts)) / sum(len(tiny_tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts)
    assert opened.characters_per_token == pytest.approx(whole, rel=0.03)
    assert len(texts) == 300


def test_sampling_copies_are_tokenised_like_the_first(tmp_path, texts, tiny_tokenizer):
    rule = {"short_below": 20, "short_keep": 0.0, "long_above": 100, "long_copies": 3.0}
    report = pack_recipe(recipe_file(tmp_path, length_rule=rule), tiny_tokenizer, 64, tmp_path / "rows", quiet=True)
    lengths = report.sources["a"]["lengths"]
    assert lengths["before"]["documents"][0] == 12
    documents = list(
        read_documents(Recipe("m", "d", load_recipe(recipe_file(tmp_path)).sources, length_rule=LengthRule(**rule)))
    )
    assert len([d for d in documents if d.id.endswith("#3")]) > 3
    from ultralong.data.tokens.store import TokenStore

    store = TokenStore(tmp_path / "rows" / "tokens")
    by_id = {store.describe(i)["id"]: store[i] for i in range(len(store))}
    copied = [name for name in by_id if name.endswith("#2")]
    assert copied
    for name in copied:
        assert np.array_equal(by_id[name], by_id[name.removesuffix("#2")])


def test_long_documents_are_cut_at_line_ends_and_nothing_is_lost(tmp_path):
    text = "".join(f"line {i} of the text\n" for i in range(300)) + "x" * 500
    (tmp_path / "a.txt").write_text(text)
    recipe = Recipe("m", "d", (Source("a", "x", path=str(tmp_path / "a.txt"), max_characters=100),))
    parts = list(read_documents(recipe))
    assert "".join(part.text for part in parts) == text
    assert all(len(part.text) <= 100 for part in parts)
    assert [part.id for part in parts[:2]] == ["a/a.txt@1", "a/a.txt@2"]
    assert parts[0].text.endswith("\n")


def test_a_dataset_is_a_source_too(tmp_path, tiny_tokenizer):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"body": [f"Text number {i} of a data set." for i in range(30)] + [""]})
    rows.save_to_disk(tmp_path / "saved")
    source = {"name": "a", "license": "x", "dataset": {"id": str(tmp_path / "saved")}, "read": {"field": "body"}}
    report = pack_recipe(recipe_file(tmp_path, sources=[source]), tiny_tokenizer, 64, tmp_path / "rows", quiet=True)
    assert report.sources["a"]["documents"] == 30
    assert report.sources["a"]["read"]["skipped"] == {"empty": 1}


TALKS = [
    {
        "messages": [
            {"role": "system", "content": "You are Bob."},
            {"role": "user", "content": f"Say {i}"},
            {"role": "assistant", "content": f"{i}"},
        ]
    }
    for i in range(20)
]


def chat_recipe(tmp_path, system):
    lines = [json.dumps(talk) for talk in TALKS] + ['{"messages": [{"role": "user", "content": "?"}]}', "{broken"]
    (tmp_path / "talks.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    source = {
        "name": "a",
        "license": "Apache-2.0",
        "path": "talks.jsonl.gz",
        "read": {"field": "messages"},
        "system": system,
    }
    return recipe_file(tmp_path, kind="chat", sources=[source], packing={"max_tokens": 8192})


@pytest.mark.parametrize(
    ("system", "first"), [(None, "system:You are Bob."), ("", "user:Say 0"), ("Be brief.", "system:Be brief.")]
)
def test_conversations_to_rows(tmp_path, tiny_tokenizer, system, first):
    path = chat_recipe(tmp_path, system)
    talks = [talk.messages for talk in read_conversations(path)]
    assert len(talks) == 20
    assert f"{talks[0][0]['role']}:{talks[0][0]['content']}" == first
    report = pack_recipe(path, tiny_tokenizer, 128, tmp_path / "rows", quiet=True)
    assert report.counts["documents"] == 20
    assert report.skipped == {"no answer": 1, "not JSON": 1}
    assert report.counts["target_tokens"] == sum(
        int((PackedRows(tmp_path / "rows")[i].labels != -100).sum()) for i in range(report.rows)
    )
    again = pack_recipe(path, tiny_tokenizer, 128, tmp_path / "rows", quiet=True)
    assert {**again.to_dict(), **UNTIMED} == {**report.to_dict(), **UNTIMED}
    with pytest.raises(ValueError, match="of documents"):
        list(read_conversations("tiny"))

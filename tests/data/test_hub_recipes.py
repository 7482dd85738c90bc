"""The recipes that read the hub, on local files of the same shape: shares, rule, categories, licences."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from ultralong.data.read.datasets import Dataset
from ultralong.data.read.documents import Document
from ultralong.data.recipe.build import pack_recipe
from ultralong.data.recipe.schema import Recipe, Source, Subsets, load_recipe
from ultralong.data.recipe.sources import SourceReader
from ultralong.data.recipe.texts import read_conversations, read_documents
from ultralong.data.select.length_rule import LengthCounts, LengthRule, sample_subsets

# A record of each data set, with the fields of its card; Q and A are put in.
CHAT = {
    "sharegpt": {"id": "x", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "slimorca": {
        "conversations": [
            {"from": "system", "value": "S", "weight": None},
            {"from": "human", "value": "Q", "weight": 0.0},
            {"from": "gpt", "value": "A", "weight": 1.0},
        ]
    },
    "evol-instruct": {"idx": "1", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "gpteacher": {"instruction": "Q", "input": "", "response": "A"},
    "alpaca-gpt4": {"instruction": "Q", "input": "", "output": "A", "text": "Below is an instruction"},
    "ultrainteract": {
        "task": "Math_CoT",
        "dataset": "gsm8k",
        "instruction": "Q",
        "response": "A",
        "id": "1",
        "parent_id": "",
    },
    "orca-math": {"question": "Q", "answer": "A"},
    "mathinstruct": {"source": "data/CoT/gsm", "output": "A", "instruction": "Q"},
    "metamath": {"type": "GSM_AnsAug", "query": "Q", "original_question": "O", "response": "A"},
    "magicoder": {
        "lang": "python",
        "raw_index": 1,
        "index": 1,
        "seed": "s",
        "openai_fingerprint": None,
        "problem": "Q",
        "solution": "A",
    },
    "wizardcoder": {"instruction": "Q", "output": "A"},
    "glaive-code": {"question": "Q", "answer": "A"},
    "acemath-general": {"messages": [{"role": "user", "content": "Q"}], "answer": "A"},
}


def filled(value, question, answer):
    if isinstance(value, dict):
        return {key: filled(part, question, answer) for key, part in value.items()}
    if isinstance(value, list):
        return [filled(part, question, answer) for part in value]
    return {"Q": question, "A": answer, "S": "Be brief."}.get(value, value) if isinstance(value, str) else value


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Folders are named relative to the test's own: their names are in documents' ids, which decide what is kept."""
    monkeypatch.chdir(tmp_path)


def stand_in(recipe, records):
    """The recipe with a folder of JSON lines for each of its hub data sets, still read through `datasets`."""
    sources = []
    for source in recipe.sources:
        folder = Path(source.name)
        folder.mkdir()
        name = source.dataset.data_files or "train.jsonl"
        rows = records(source.name)
        text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
        (folder / name).write_text(text)
        local = Dataset(str(folder), data_files=source.dataset.data_files, shuffle_buffer=source.dataset.shuffle_buffer)
        sources.append(replace(source, dataset=local))
    return replace(recipe, sources=tuple(sources))


@pytest.mark.parametrize("name", ["sft-100k", "sft-100k-acemath"])
def test_instruction_blends(name, tmp_path, tiny_tokenizer):
    pytest.importorskip("datasets")
    loaded = load_recipe(name)
    assert loaded.subsample.total == 100_000
    recipe = stand_in(
        loaded, lambda source: [filled(CHAT[source], f"Question {n} of {source}?", f"Answer {n}.") for n in range(20)]
    )
    talks = [talk.messages for talk in read_conversations(recipe, quiet=True)]
    assert len(talks) == 20 * len(recipe.sources)
    assert {len(talk) for talk in talks} <= {2, 3}
    assert all(
        talk[-2]["content"].startswith("Question") and talk[-1]["content"].startswith("Answer") for talk in talks
    )
    few = replace(recipe, subsample=replace(recipe.subsample, total=len(recipe.sources) * 10))
    report = pack_recipe(few, tiny_tokenizer, 512, tmp_path / "rows", quiet=True)
    categories = Counter(source.category for source in recipe.sources)
    assert {key: row["taken"] for key, row in report.subsampled.items()} == {
        key: 10 * count for key, count in categories.items()
    }
    assert sum(row["documents"] for row in report.sources.values()) == len(recipe.sources) * 10
    for source in recipe.sources:
        row = report.sources[source.name]
        assert row["category"] == source.category
        assert list(row["licenses"]) == [source.license]
        assert sum(row["lengths"]["before"]["documents"]) == 20
    if name == "sft-100k":
        assert categories == {"general": 6, "math": 3, "code": 3}


def part_rows(count):
    draw = random.Random(0)
    names = ["CommonCrawl", "C4", "Github", "ArXiv", "Book", "Wikipedia", "StackExchange"]
    return [
        {
            "text": "w" * draw.choice([300, 900, 5000, 20_000, 60_000]),
            "meta": {"redpajama_set_name": f"RedPajama{draw.choice([*names, 'Other'])}"},
        }
        for _ in range(count)
    ]


def test_slimpajama_by_source(tmp_path):
    pytest.importorskip("datasets")
    loaded = load_recipe("slimpajama-per-source")
    assert sum(loaded.sources[0].subsets.shares.values()) == pytest.approx(1.0, abs=1e-6)
    assert (loaded.length_rule.short_below, loaded.length_rule.short_keep, loaded.length_rule.long_above) == (
        4096,
        0.1,
        8192,
    )
    recipe = replace(stand_in(loaded, lambda source: part_rows(3000)), tokens=2_000_000)
    opened = SourceReader(recipe.sources[0], recipe, None, quiet=True)
    taken = Counter()
    longest = 2 * 60_000 / 3.68
    for document in opened.documents():
        taken[document.source] += len(document.text) / 3.68
    for part, share in loaded.sources[0].subsets.shares.items():
        budget = share * 2_000_000
        assert budget <= taken[f"slimpajama/{part}"] <= budget + longest
    assert opened.report.skipped["of no wanted part"] > 0
    notes = opened.notes()
    assert set(notes) == {f"slimpajama/{part}" for part in loaded.sources[0].subsets.shares}
    short = Counter()
    for name, row in notes.items():
        assert sum(row["lengths"]["after"]["tokens"]) == pytest.approx(taken[name], rel=0.01)
        short += Counter({when: row["lengths"][when]["documents"][0] for when in ("before", "after")})
    assert 0 < short["after"] < 0.3 * short["before"], "a tenth of the short ones is kept"
    assert [d.id for d in read_documents(recipe, quiet=True)] == [d.id for d in read_documents(recipe, quiet=True)]


def test_parts_reach_the_report_of_the_rows(tmp_path, tiny_tokenizer):
    rows = [{"text": f"Document {n}. " * 20, "kind": {"name": "ab"[n % 2]}} for n in range(40)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = Source(
        "mix",
        "CC0-1.0",
        path=str(tmp_path / "in.jsonl"),
        characters_per_token=1.0,
        subsets=Subsets("kind.name", {"a": 0.25, "b": 0.75}),
    )
    recipe = Recipe("m", "d", (source,), tokens=4000)
    report = pack_recipe(recipe, tiny_tokenizer, 128, tmp_path / "rows", quiet=True)
    # Texts of 240 characters below number 10 and of 260 from there: five of the one, five and seven of the other.
    assert {name: row["characters"] for name, row in report.sources.items()} == {"mix/a": 1200, "mix/b": 3020}
    assert report.sources["mix/a"]["budget"] == 1000
    with_token_limit = pack_recipe(recipe, tiny_tokenizer, 128, tmp_path / "few", limit=600, quiet=True)
    assert {name: row["documents"] for name, row in with_token_limit.sources.items()} == {"mix/a": 3, "mix/b": 3}


def test_web_books_and_code(tmp_path):
    pytest.importorskip("datasets")
    loaded = load_recipe("fineweb-books-code")
    assert sum(source.share for source in loaded.sources) == pytest.approx(1.0)
    draw = random.Random(1)
    recipe = replace(
        stand_in(
            loaded,
            lambda source: [
                {"id": f"{source}-{n}", "text": f"{source} " * draw.choice([100, 4000, 9000])} for n in range(300)
            ],
        ),
        tokens=1_000_000,
    )
    taken = Counter()
    for document in read_documents(recipe, quiet=True):
        taken[document.source] += len(document.text) / 3.68
    for source in loaded.sources:
        assert source.share * 1e6 <= taken[source.name] <= source.share * 1e6 + 2 * 9000 * 6 / 3.68


def test_a_stream_of_parts_ends_when_all_have_theirs():
    def endless():
        number = 0
        while True:
            yield Document(f"d{number}", "x" * 10, "ab"[number % 2])
            number += 1

    counts = {"a": LengthCounts(), "b": LengthCounts()}
    got = list(
        sample_subsets(
            endless(), {"a": 100, "b": 30}, rule=LengthRule(0, 1, 5, 1.0), characters_per_token=1.0, counts=counts
        )
    )
    assert Counter(document.source for document in got) == {"a": 10, "b": 3}
    assert counts["b"].as_json()["before"]["documents"][0] == 3, "what is passed over is not counted"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 0.5}, "tokens: a takes a share"),
        ({"subsets": Subsets("k", {"x": 1.0}), "share": 0.5}, "their own shares"),
        ({"share": -1.0}, "share must be positive"),
    ],
)
def test_nonsense_shares_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe("m", "d", (Source("a", "x", path="p", **changes),))

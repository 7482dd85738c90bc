"""`ultralong eval` on a checkpoint on disk: numbers, a picture, and sentences where it cannot."""

import json
import math
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ultralong.data.rows.separators import PackSettings
from ultralong.evaluation import tasks
from ultralong.evaluation.measures.perplexity import position_edges
from ultralong.evaluation.measures.result import Result, perplexity_result, read_measurements
from ultralong.evaluation.report.table import position_lines, table_lines
from ultralong.evaluation.runs.commands import measure_one
from ultralong.evaluation.runs.direct import grid_lengths
from ultralong.evaluation.runs.run import run
from ultralong.evaluation.runs.settings import RunSettings
from ultralong.evaluation.tasks.haystack import read_haystack
from ultralong.evaluation.tasks.samples import TASKS
from ultralong.inference.load import load_model_and_tokenizer
from ultralong.utils.files import read_json


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_tiny_model, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_tiny_model(max_position_embeddings=1024).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_the_needle_command_is_a_run_of_its_own(checkpoint, tmp_path):
    result = measure_one(
        "needle", checkpoint, lengths=(600, 1024), depths=(0.0, 1.0), samples=1, device="cpu", out=tmp_path / "short"
    )
    (needle,) = (Result.from_dict(values) for values in result["results"])
    assert [(part.length, part.depth, part.n) for part in needle.by_depth] == [
        (600, 0.0, 1),
        (600, 1.0, 1),
        (1024, 0.0, 1),
        (1024, 1.0, 1),
    ]
    assert json.loads((tmp_path / "short" / "report.json").read_text()) == result
    assert read_measurements(tmp_path / "short" / "results.json") == [needle]
    assert (tmp_path / "short" / "report.html").exists()
    assert result["window"] == 1024
    assert result["environment"]["torch"]
    assert "LlamaForCausalLM" in result["environment"]["model"]
    # The same as `eval run needle` with the same map, cell by cell.
    wanted = RunSettings(
        str(checkpoint), ("needle",), (600, 1024), needle_lengths=(600, 1024), needle_depths=(0.0, 1.0), grid_samples=1
    )
    assert run(wanted, tmp_path / "long", device="cpu")["results"] == result["results"]


def test_what_was_found_is_shown(checkpoint, monkeypatch, capsys):
    """Also without a file to write to: the numbers of a long measurement must not be lost."""
    from ultralong.cli import main
    from ultralong.evaluation.runs import direct

    found = {(512, 0.0): 5, (512, 0.5): 4, (1024, 0.0): 0, (1024, 0.5): 3}

    def cells(model, tokenizer, lengths, depths, samples, *_, **__):
        return [
            {"length": length, "depth": depth, "n": samples, "correct": found[length, depth]}
            for length in lengths
            for depth in depths
        ]

    monkeypatch.setattr(direct, "needle_grid", cells)
    main(["eval", "needle", str(checkpoint), "--lengths", "512", "1k", "--depths", "0.0", "0.5", "--device", "cpu"])
    assert capsys.readouterr().out.splitlines() == [
        f"needles found by {checkpoint}, by length and depth",
        "     tokens       0%      50%",
        "        512      5/5      4/5",
        "      1,024      0/5      3/5",
        "For a page with figures: --out FOLDER.",
    ]
    bins = [
        {"start": 0, "end": 256, "n": 512, "rows": 2, "perplexity": 9.2745, "low": 3.3, "high": 25.8},
        {"start": 256, "end": 512, "n": 9, "rows": 1, "perplexity": 8.0, "low": None, "high": None},
    ]
    assert position_lines(perplexity_result(bins, "row"), "m") == [
        "perplexity of m by position in the row (95% interval)",
        "          0 to         256       9.27  (3.30 to 25.80)",
        "        256 to         512       8.00  (n = 1 row)",
    ]
    alone = perplexity_result(bins[1:], "row")
    assert position_lines(alone, "m")[0] == "perplexity of m by position in the row", "no interval is there"
    summary = {"settings": {"model": "m"}, "families": [], "capabilities": [], "areas": [], "effective": None}
    both = [alone, perplexity_result(bins[1:], "document")]
    lines = table_lines(summary | {"results": [result.to_dict() for result in both]})
    assert lines[1:] == [
        "        256 to         512       8.00  (n = 1 row)",
        "  by distance from the document's start it is the same: each row is one document",
    ]
    both[1] = perplexity_result(bins[:1], "document")
    assert len(table_lines(summary | {"results": [result.to_dict() for result in both]})) == 4
    of_one_test = {"effective": {"length": 1024, "bar": 85.6, "tasks": 1}, "results": []}
    assert table_lines(summary | of_one_test) == [
        "effective length (longest with a mean of 85.6 or more up to it, 1 of RULER's 13 tests): 1,024"
    ]


def test_perplexity_reads_packed_rows(checkpoint, tmp_path, tiny_tokenizer):
    from ultralong.data.read.documents import Document
    from ultralong.data.rows.packing import pack
    from ultralong.data.tokens.tokenize import tokenize_corpus

    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(["sea", "wall", "boat", "night", "stone"], 400)) for _ in range(6)]
    documents = [Document(str(index), text, "made here", "CC0") for index, text in enumerate(texts)]
    store = tokenize_corpus(documents, tiny_tokenizer, tmp_path / "tokens")
    pack(store, tiny_tokenizer, tmp_path / "rows", PackSettings(length=512))
    result = measure_one("perplexity", checkpoint, rows=tmp_path / "rows", max_rows=3, device="cpu")
    by_row, by_document = (Result.from_dict(values) for values in result["results"])
    assert [item.metric for item in (by_row, by_document)] == ["perplexity_by_row", "perplexity_by_document"]
    assert [(part.start, part.end, part.details["rows"]) for part in by_row.by_position] == [(0, 256, 3), (256, 512, 3)]
    # A random model is about as surprised as one that guesses among 512 tokens.
    assert all(300 < part.value < 900 for part in by_row.by_position)
    # Both are of the same tokens, counted from another place.
    assert by_row.n == by_document.n
    assert by_row.value == pytest.approx(by_document.value)
    loss = measure_one("loss", checkpoint, rows=tmp_path / "rows", max_rows=3, device="cpu", out=tmp_path / "loss")
    (found,) = (Result.from_dict(values) for values in loss["results"])
    assert (found.metric, found.unit, found.n) == ("loss", "nats per target", by_row.n)
    assert found.value == pytest.approx(math.log(by_row.value), abs=1e-4)
    assert [(part.start, part.end) for part in found.by_position] == [(64 * k, 64 * k + 64) for k in range(8)]
    assert "Loss on packed rows" in (tmp_path / "loss" / "report.html").read_text()


def test_the_whole_path_equals_the_plain_model(checkpoint):
    """Opened for measuring, a model attends without masks; what it says must be what the plain model says."""
    import torch
    from transformers import AutoModelForCausalLM

    from ultralong.inference.generate import prefill

    ours, _ = load_model_and_tokenizer(checkpoint, "cpu")
    plain = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    ids = torch.randint(5, 400, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(ids).logits[:, -10:]
    for chunk in (None, 32):
        torch.testing.assert_close(prefill(ours, ids, keep=10, chunk=chunk), expected, rtol=1e-4, atol=1e-4)


def test_lengths_beyond_the_window_warn(checkpoint):
    with pytest.warns(UserWarning, match=r"beyond the model's window of 1,024") as caught:
        measure_one("needle", checkpoint, lengths=(1100,), depths=(0.5,), samples=1, device="cpu")
    assert sum("beyond the model's window" in str(warning.message) for warning in caught) == 1, "it is said once"


def test_the_example_of_a_test_of_ones_own_runs(tmp_path, monkeypatch):
    page = (Path(tasks.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    # dataclass looks there. The entry is set and the dict kept: half of an import looks in the interpreter's own, and
    # the first import of matplotlib, which imports in circles, failed under a copy.
    monkeypatch.setitem(sys.modules, "example", ModuleType("example"))
    place: dict = {"__name__": "example"}
    try:
        exec(compile(example, "README.md", "exec"), place)
        made = place["Rivers"]().build(random.Random(0), 50, 0)
        assert made.outputs == (str(made.input.splitlines()[0].split().count("river")),)
        assert (place["exact"](f" {made.outputs[0]} times", made.outputs), place["exact"]("", made.outputs)) == (
            1.0,
            0.0,
        )
    finally:
        TASKS.pop("count_rivers", None)
    report = read_json(tmp_path / "runs" / "own" / "report.json")
    assert [(part["length"], part["n"]) for part in report["results"][0]["by_length"]] == [(256, 2), (512, 2)]


def test_haystacks_come_from_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    assert read_haystack(tmp_path) == ["first", "second"]
    assert read_haystack(tmp_path / "b.txt") == ["second"]
    assert read_haystack(None) is None
    with pytest.raises(ValueError, match="no text"):
        read_haystack(tmp_path / "missing.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no text"):
        read_haystack(tmp_path / "empty")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("poetry", "x"), "no evaluation 'poetry'"),
        (("perplexity", "x"), "needs packed rows"),
        (("needle", "/nowhere/at/all"), "cannot be opened"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        measure_one(*arguments, device="cpu")


def test_bins_double_and_end_with_the_row():
    assert position_edges(1024) == (0, 256, 512, 1024)
    assert position_edges(1500) == (0, 256, 512, 1024, 1500)
    assert position_edges(200) == (0, 200)
    assert grid_lengths(9, 4096) == [256, *range(512, 4097, 512)]

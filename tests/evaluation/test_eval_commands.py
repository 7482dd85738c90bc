"""`ultralong eval` on a checkpoint on disk: numbers, a picture, and sentences where it cannot."""

import json

import numpy as np
import pytest

from ultralong.data.rows.separators import PackSettings
from ultralong.evaluation.measures.perplexity import position_edges
from ultralong.evaluation.runs.commands import default_lengths, measure, summary
from ultralong.evaluation.tasks.haystack import read_haystack
from ultralong.inference.load_model import load_model_and_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_tiny_model, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_tiny_model(max_position_embeddings=1024).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_needle_leaves_numbers_and_picture(checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    result = measure(
        "needle", checkpoint, lengths=(600, 1024), depths=(0.0, 1.0), samples=1, device="cpu", out=tmp_path
    )
    assert [(cell["length"], cell["n"]) for cell in result["cells"]] == [(600, 1), (600, 1), (1024, 1), (1024, 1)]
    assert json.loads((tmp_path / "needle.json").read_text()) == result
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG")
    assert result["window"] == 1024
    assert result["environment"]["torch"]


def test_what_was_found_is_shown(checkpoint, monkeypatch, capsys):
    """Also without a file to write to: the numbers of a long measurement must not be lost."""
    from ultralong.cli.measure import needle
    from ultralong.evaluation.runs import commands

    cells = [
        {"length": length, "depth": depth, "n": 5, "correct": correct}
        for length, depth, correct in ((131072, 0.0, 5), (131072, 0.5, 4), (1048576, 0.0, 0), (1048576, 0.5, 3))
    ]
    monkeypatch.setattr(commands, "needle_grid", lambda *_, **__: cells)
    needle(str(checkpoint), lengths=(512,))
    assert capsys.readouterr().out.splitlines() == [
        f"needles found by {checkpoint}, by length and depth",
        "     tokens       0%      50%",
        "    131,072      5/5      4/5",
        "  1,048,576      0/5      3/5",
        "For a picture and the numbers: --out FOLDER.",
    ]
    bins = [{"start": 0, "end": 256, "perplexity": 9.2745, "low": 3.3, "high": 25.8}]
    assert summary({"task": "perplexity", "model": "m", "rows": 2, "bins": bins}).splitlines() == [
        "perplexity of m by position, 2 rows (95% interval)",
        "          0 to         256       9.27  (3.30 to 25.80)",
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
    result = measure("perplexity", checkpoint, rows=tmp_path / "rows", max_rows=3, device="cpu")
    assert result["rows"] == 3
    assert [(item["start"], item["end"]) for item in result["bins"]] == [(0, 256), (256, 512)]
    # A random model is about as surprised as one that guesses among 512 tokens.
    assert all(300 < item["perplexity"] < 900 for item in result["bins"])


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
    with pytest.warns(UserWarning, match=r"beyond the model's window of 1,024"):
        measure("needle", checkpoint, lengths=(1100,), depths=(0.5,), samples=1, device="cpu")


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
        measure(*arguments, device="cpu")


def test_bins_double_and_end_with_the_row():
    assert position_edges(1024) == (0, 256, 512, 1024)
    assert position_edges(1500) == (0, 256, 512, 1024, 1500)
    assert position_edges(200) == (0, 200)
    assert default_lengths(4096)[0] == 512
    assert default_lengths(4096)[-1] == 4096

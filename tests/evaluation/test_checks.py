"""What a run needs is known before a model is opened, and its numbers come whatever draws figures or not."""

import sys
from dataclasses import replace

import pytest

from ultralong import cli
from ultralong.evaluation.runs.run import run
from ultralong.evaluation.runs.settings import RunSettings
from ultralong.utils.files import read_json

WANTED = RunSettings("/no/such/model", ("needle",), (1024,))


@pytest.mark.parametrize(
    ("package", "change", "said"),
    [
        ("lm_eval", {"tasks": ("lm_eval",)}, r"lm_eval is needed .*ultralong\[eval\]"),
        ("vllm", {"tasks": ("ruler",), "engine": "vllm"}, "vllm is needed for this engine"),
        (None, {"tasks": ("perplexity",)}, "Perplexity needs packed rows"),
        (None, {"tasks": ("loss",)}, "Loss needs packed rows"),
        (None, {"tasks": ("lm_eval",), "benchmarks": ("poetry",)}, "no short benchmark 'poetry'"),
        (None, {"tasks": ("poetry",)}, "no test 'poetry'"),
    ],
)
def test_what_is_missing_is_said_before_the_model_is_opened(tmp_path, monkeypatch, package, change, said):
    if package is not None:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises((ValueError, ImportError), match=said):
        run(replace(WANTED, **change), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["plotly", "matplotlib", "PIL"])
def test_without_what_draws_figures_numbers_are_printed_and_written(
    tmp_path, monkeypatch, make_tiny_model, tiny_tokenizer, capsys, package
):
    make_tiny_model(max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "run"
    words = ["--lengths", "1024", "--grid", "1", "2", "--grid-samples", "1", "--device", "cpu"]
    with pytest.warns(UserWarning, match=rf"tables and no figures: {package} is needed .*ultralong\[notebooks\]"):
        cli.main(["eval", "run", "needle", str(tmp_path / "model"), *words, "--out", str(out)])
    printed = capsys.readouterr().out
    assert "needles found by" in printed
    assert "1,024      0/1      0/1" in printed
    assert read_json(out / "results.json")[0]["n"] == 2
    page = (out / "report.html").read_text()
    assert f"Figures are left out: {package} is needed" in page
    assert "<img" not in page


def test_numbers_are_written_before_anything_is_drawn(tmp_path, monkeypatch, make_tiny_model, tiny_tokenizer, capsys):
    """A page that fails, for whatever reason, takes no number with it."""
    from ultralong.evaluation.report import run_page

    make_tiny_model(max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")

    def fail(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr(run_page, "write_text", fail)
    words = ["--lengths", "1024", "--grid", "1", "1", "--grid-samples", "1", "--device", "cpu"]
    with pytest.raises(SystemExit):
        cli.main(["eval", "run", "needle", str(tmp_path / "model"), *words, "--out", str(tmp_path / "run")])
    assert "needles found by" in capsys.readouterr().out
    assert read_json(tmp_path / "run" / "report.json")["results"]

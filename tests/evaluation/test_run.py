"""A run over many tests: planned before it starts, continued after a stop, reported from its files alone."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from induction import InductionModel
from test_report import Page
from test_samples import prose

from ultralong import cli
from ultralong.evaluation.measures.capability import mean_of_tasks
from ultralong.evaluation.measures.result import Part, Result, read_measurements
from ultralong.evaluation.report.run_page import paper_tables, render_run
from ultralong.evaluation.report.sections import join_depths
from ultralong.evaluation.runs.checks import plan_pairs
from ultralong.evaluation.runs.direct import grid_lengths
from ultralong.evaluation.runs.results import paper_means, quote, summarise, write_results
from ultralong.evaluation.runs.run import run
from ultralong.evaluation.runs.settings import RunSettings, doubled_lengths, within_window
from ultralong.evaluation.tasks.groups import FAMILIES, GROUPS, expand, find_questions
from ultralong.evaluation.tasks.ruler import RULER_TASKS
from ultralong.evaluation.tasks.samples import TASKS
from ultralong.utils import settings
from ultralong.utils.files import append_jsonl, read_jsonl

pytest.importorskip("plotly")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("small_pictures")


@pytest.fixture
def wanted(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(prose(count=2)))
    return RunSettings(
        "reader",
        ("needle", "infinitebench_passkey", "nonliteral_world"),
        (1024, 2048),
        samples=3,
        grid=(2, 3),
        grid_samples=1,
        chat=False,
        haystack=str(text),
    )


def model(tokenizer, window=None):
    return InductionModel(len(tokenizer), window=window), tokenizer


def results_of(summary):
    return {values["task"]: Result.from_dict(values) for values in summary["results"]}


def numbers(summary):
    return [
        (result.task, result.value, [(p.length, p.value) for p in result.by_length])
        for result in results_of(summary).values()
    ]


def page_of(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_a_run_leaves_scores_maps_and_a_page_and_goes_on_after_a_stop(wanted, tiny_tokenizer, tmp_path, monkeypatch):
    whole = run(wanted, tmp_path / "whole", opened=model(tiny_tokenizer), quiet=True)
    assert json.loads((tmp_path / "whole" / "report.json").read_text()) == whole
    assert read_measurements(tmp_path / "whole" / "results.json") == list(results_of(whole).values())
    results = results_of(whole)
    needle, passkeys, nonliteral = (results[task] for task in wanted.tasks)
    assert [[(part.length, part.n) for part in result.by_length] for result in (passkeys, nonliteral)] == [
        [(length, 3) for length in wanted.lengths]
    ] * 2
    assert all(part.value == 100 and 40 < part.low < 100 and part.high == 100 for part in passkeys.by_length)
    assert all(part.value == 0 and part.low == 0 and 0 < part.high < 60 for part in nonliteral.by_length), (
        "a model that only repeats cannot see a meaning"
    )
    assert [(part.length, part.depth) for part in needle.by_depth] == [
        (length, depth) for length in (1024, 2048) for depth in (0.0, 0.5, 1.0)
    ]
    # RULER's wording repeats all but the needle's colon: the reader gets every digit but the first.
    quoted = [part.details["wrong"][0] for part in needle.by_depth]
    assert all(wrong["got"].endswith(wrong["expected"][1:]) for wrong in quoted)
    assert all(part.n == 1 for part in needle.by_depth)
    joined = join_depths([passkeys, nonliteral])
    assert sum(part.n for part in joined) == 12, "passkeys and names stand at one depth each"
    assert whole["failures"][0]["task"] == "nonliteral_world"
    assert whole["failures"][0]["expected"]
    assert (whole["effective"], whole["paper_means"], whole["window"]) == (None, {}, 2048)
    assert whole["sources"]["non-literal needle"] == ["documents given"]
    page = page_of(tmp_path / "whole")
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    text = " ".join(page.text)
    for said in (
        "Needle in a haystack",
        "non-literal needle",
        f"{passkeys.by_length[0].low:.1f} to 100.0",
        "(published)",
        "What it got wrong",
        "haystack:",
        whole["failures"][0]["expected"],
        quoted[0]["got"],
    ):
        assert said in text

    answered = []
    forward = InductionModel.next_token

    def stop_after_a_while(self, tokens):
        answered.append(1)
        if len(answered) == 60:
            raise KeyboardInterrupt
        return forward(self, tokens)

    monkeypatch.setattr(InductionModel, "next_token", stop_after_a_while)
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run(wanted, stopped, opened=model(tiny_tokenizer), quiet=True)
    there = {path.name: path.read_bytes() for path in stopped.glob("*.jsonl")}
    assert sum(content.count(b"\n") for content in there.values()) < 18
    assert there["needle.jsonl"]
    monkeypatch.setattr(InductionModel, "next_token", forward)
    again = run(wanted, stopped, opened=model(tiny_tokenizer), quiet=True)
    for name, content in there.items():
        assert (stopped / name).read_bytes().startswith(content), "what was there is kept as it was"
    assert numbers(again) == numbers(whole)
    assert results_of(again)["needle"] == needle


def test_more_may_be_asked_of_a_run_but_nothing_else(wanted, tiny_tokenizer, tmp_path):
    from dataclasses import replace

    less = replace(wanted, tasks=("infinitebench_passkey",), lengths=(1024,), samples=1)
    run(less, tmp_path / "run", opened=model(tiny_tokenizer), quiet=True)
    file = tmp_path / "run" / "infinitebench_passkey-1024.jsonl"
    first = file.read_bytes()
    more = run(replace(less, samples=3), tmp_path / "run", opened=model(tiny_tokenizer), quiet=True)
    assert file.read_bytes().startswith(first)
    assert more["results"][0]["n"] == 3
    kept = settings.load(RunSettings, tmp_path / "run" / "run.yaml")
    assert (kept.samples, kept.lengths) == (3, (1024,))
    for change in ({"model": "other"}, {"seed": 1}, {"chat": None}):
        with pytest.raises(ValueError, match=f"holds a run with {next(iter(change))} "):
            run(replace(less, **change), tmp_path / "run", opened=model(tiny_tokenizer), quiet=True)


def test_two_runs_stand_side_by_side(wanted, tiny_tokenizer, tmp_path):
    for name, window in (("before", 700), ("after", None)):
        run(wanted, tmp_path / name, opened=model(tiny_tokenizer, window), draw=False, quiet=True)
    result = write_results(tmp_path / "after", tmp_path / "before", interactive=False)
    gained = {(row["task"], row["length"]): row["difference"] for row in result["compared"]}
    assert gained["infinitebench_passkey", 2048] == 100
    assert gained["nonliteral_world", 1024] == 0
    text = " ".join(page_of(tmp_path / "after").text)
    assert "Before and after, sample by sample" in text
    assert "+100.0" in text
    assert (tmp_path / "after" / "report.html").stat().st_size < 1_500_000, "no script where none was asked for"
    with pytest.raises(ValueError, match="holds no run"):
        write_results(tmp_path / "after", tmp_path)
    shutil.copytree(tmp_path / "after", tmp_path / "other")
    for path in (tmp_path / "other").glob("*-*.jsonl"):
        path.unlink()
    alone = write_results(tmp_path / "other", tmp_path / "before", interactive=False)
    assert alone["compared"] == []
    assert "no answers to the same test" in " ".join(page_of(tmp_path / "other").text)


def test_lengths_beyond_the_window_are_asked_only_if_told_to():
    assert within_window((4096, 1024), 4096, False) == [1024, 4096]
    with pytest.warns(UserWarning, match=r"8,192 tokens are beyond the model's window of 4,096 and are left out"):
        assert within_window((8192, 4096), 4096, False) == [4096]
    with pytest.warns(UserWarning, match="expect it to fail there"):
        assert within_window((8192, 4096), 4096, True) == [4096, 8192]
    with pytest.raises(ValueError, match=r"beyond the model's window of 4,096\. Ask at shorter.*--beyond-window"):
        within_window((8192,), 4096, False)


def test_what_cannot_be_made_is_said_before_the_first_answer(wanted, tiny_tokenizer, tmp_path):
    from dataclasses import replace

    names = expand(["ruler_vt,babilong_style_qa1,ruler_qa_squad,ruler_qa_hotpot,lveval_cmrc_mixup_16k,needle"])
    with pytest.raises(ValueError, match=r"cannot be made: ruler_qa_squad: .*; ruler_qa_hotpot: .*--skip-missing"):
        plan_pairs(names, [4096, 8192], tiny_tokenizer, replace(wanted, data=None), prose(count=2))
    lenient = replace(wanted, skip_missing=True)
    pairs, _, skipped = plan_pairs(names, [4096, 8192], tiny_tokenizer, lenient, prose(count=2))
    assert pairs == [("ruler_vt", 4096), ("babilong_style_qa1", 4096), ("ruler_vt", 8192), ("babilong_style_qa1", 8192)]
    assert set(skipped) == {"ruler_qa_squad", "ruler_qa_hotpot", "lveval_cmrc_mixup_16k"}
    with pytest.raises(ValueError, match=r"babilong_style_qa1 at 300: 300 tokens are too few: .* takes [\d,]+\. Ask"):
        plan_pairs(["babilong_style_qa1"], [300, 8192], tiny_tokenizer, wanted, prose(count=2))
    pairs, _, skipped = plan_pairs(["babilong_style_qa1"], [300, 8192], tiny_tokenizer, lenient, prose(count=2))
    assert (pairs, list(skipped)) == ([("babilong_style_qa1", 8192)], ["babilong_style_qa1 at 300"])
    with pytest.raises(ValueError, match="needs packed rows"):
        run(replace(wanted, tasks=("perplexity",)), tmp_path / "x", opened=model(tiny_tokenizer))
    assert not (tmp_path / "x").exists()
    for change, message in (({"samples": 0}, "at least 1"), ({"lengths": (0,)}, "lengths are tokens")):
        with pytest.raises(ValueError, match=message):
            replace(wanted, **change)


def test_published_sets_are_asked_once_at_the_longest_length(wanted, tiny_tokenizer, tmp_path):
    from dataclasses import replace

    (tmp_path / "deep").mkdir()
    row = {"context": "A stone lies there. " * 300, "input": "What?", "answer": ["stone"]}
    (tmp_path / "deep" / "longbook_qa_eng.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    asked = replace(wanted, tasks=("infinitebench_longbook_qa_eng",), data=str(tmp_path))
    result = run(asked, tmp_path / "run", opened=model(tiny_tokenizer), quiet=True)
    (part,) = result["results"][0]["by_length"]
    assert (part["length"], part["n"], part["details"]["cut"]) == (2048, 2, 2)
    assert "lost their middle" in " ".join(page_of(tmp_path / "run").text)


def test_groups_name_every_test_once():
    assert set(expand(["ruler,infinitebench,lveval,babilong_style,nonliteral,reported,longbench,needle"])) == set(TASKS)
    assert (len(GROUPS["ruler"]), len(GROUPS["infinitebench"]), len(GROUPS["lveval_64k"])) == (13, 12, 11)
    assert expand(["ruler_vt", "niah, ruler_vt"])[:2] == ["ruler_vt", "niah_single_1"]
    assert set(FAMILIES) == set(TASKS) - {"needle"}
    with pytest.raises(ValueError, match=r"no test 'vt'; did you mean ruler_vt\?"):
        expand(("vt",))
    with pytest.raises(ValueError, match=r"no test 'rular'; did you mean ruler.*Groups: ruler, niah"):
        expand(["rular"])
    with pytest.raises(ValueError, match="No test was named"):
        expand([","])


def test_questions_are_found_by_the_names_that_they_are_published_under(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "dev-v1.1.json").touch()
    assert find_questions("ruler_qa_squad", tmp_path) == tmp_path / "a" / "dev-v1.1.json"
    (tmp_path / "dev-v2.0.json").touch()
    assert find_questions("ruler_qa_squad", tmp_path) == tmp_path / "dev-v2.0.json", "RULER's own comes first"
    assert find_questions("ruler_qa_squad", Path("package")) == Path("package")
    assert find_questions("lveval_cmrc_mixup_16k", tmp_path) == tmp_path
    assert find_questions("ruler_vt", tmp_path) is None
    assert find_questions("ruler_qa_hotpot", Path("package")) is None
    with pytest.raises(ValueError, match=r"hotpot_dev_distractor_v1\.json, which ruler_qa_hotpot asks"):
        find_questions("ruler_qa_hotpot", tmp_path)
    with pytest.raises(ValueError, match="There is no folder"):
        find_questions("ruler_qa_squad", tmp_path / "missing")


def test_the_map_is_the_papers():
    lengths = grid_lengths(40, 1 << 20)
    assert len(lengths) == 40
    # The ticks that the paper's figure shows: every second length, and the window itself.
    assert (lengths[1], lengths[3], lengths[-1]) == (26887, 80660, 1048576)
    assert lengths[0] == 1024
    assert grid_lengths(1, 5000) == [5000]
    assert doubled_lengths(32768) == (4096, 8192, 16384, 32768)
    assert doubled_lengths(2048) == (2048,)


def fabricate(folder, right):
    """A run of all thirteen RULER tests whose share of right answers at each length is given."""
    settings.save(RunSettings("made up", tuple(RULER_TASKS), tuple(right)), folder / "run.yaml")
    for task in RULER_TASKS:
        for length, share in right.items():
            for index in range(10):
                append_jsonl(
                    folder / f"{task}-{length}.jsonl",
                    {
                        "task": task,
                        "index": index,
                        "seed": 0,
                        "max_length": length,
                        "outputs": ["yes"],
                        "seconds": 1.0,
                        "prediction": "yes" if index < 10 * share else "no",
                        "source": "made up",
                        "depth": None,
                    },
                )


def test_effective_length_and_the_papers_means_come_from_all_thirteen(tmp_path):
    right = {
        1024 << power: share for power, share in zip(range(2, 10), (1, 1, 0.9, 0.9, 0.8, 0.9, 0.5, 0.1), strict=True)
    }
    fabricate(tmp_path, right)
    result = summarise(tmp_path)
    assert result["effective"] == {"length": 32768, "bar": 85.6, "tasks": 13}
    assert result["paper_means"] == {
        "RULER to 128K": pytest.approx(100 * 5.5 / 6),
        "RULER to 512K": pytest.approx(100 * 6.1 / 8),
    }
    assert paper_means([]) == {}
    text = " ".join(Page(render_run(result, interactive=False)).text)
    assert "32K" in text
    assert "made up (measured here) 91.7 76.2" in re.sub(r"\s+", " ", text)
    assert len(result["failures"]) == 3 * sum(share <= 0.7 for share in right.values()) * 13 + 13 * (1 * 3 + 2)


def test_intervals_of_means_shrink_with_the_number_of_tests():
    one = Part(50.0, 9, 40.0, 62.0)
    mean = mean_of_tasks([one] * 16)
    assert (mean["score"], mean["low"], mean["high"]) == pytest.approx((50, 50 - 10 / 4, 50 + 12 / 4))
    sure = Part(100.0, 9, 84.0, 100.0)
    assert mean_of_tasks([sure] * 4) == {"score": 100, "low": 92, "high": 100}
    mixed = mean_of_tasks([one, sure])
    assert mixed["low"] == pytest.approx(75 - math.hypot(10, 16) / 2)
    assert mean_of_tasks([one, Part(1.0, 1)])["low"] is None


def test_the_papers_tables_hold_what_it_printed():
    long, short = paper_tables()
    assert long.rows["UltraLong-8B-1M"][:3] == [86.6, 81.6, 79.1]
    for table in (long, short):
        assert all(len(values) == len(table.columns) == 6 for values in table.rows.values())
    for values in short.rows.values():
        assert sum(values[:5]) / 5 == pytest.approx(values[5], abs=0.011), "the printed mean is the mean of the five"


def test_quotes_stay_on_one_line():
    assert quote("a\n b") == "a b"
    assert len(quote("x" * 500)) < 170


def test_the_command_line_runs_and_reports(tmp_path, make_tiny_model, tiny_tokenizer, capsys):
    make_tiny_model(max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "run"
    words = [
        "infinitebench_passkey,needle",
        str(tmp_path / "model"),
        "--lengths",
        "1024",
        "--samples",
        "2",
        "--grid",
        "1",
        "2",
        "--grid-samples",
        "1",
        "--device",
        "cpu",
        "--out",
        str(out),
        "--json",
        str(tmp_path / "r.json"),
    ]
    for _ in range(2):
        cli.main(["eval", "run", *words])
        assert "InfiniteBench" in capsys.readouterr().out
    assert len(read_jsonl(out / "infinitebench_passkey-1024.jsonl")) == 2, "the second time there was nothing to do"
    assert json.loads((tmp_path / "r.json").read_text())["results"][0]["n"] == 2
    (out / "report.html").unlink()
    cli.main(["eval", "report", str(out)])
    assert (out / "report.html").exists()
    with pytest.raises(SystemExit) as left:
        cli.main(["eval", "run", "poetry", str(tmp_path / "model"), "--out", str(tmp_path / "x")])
    assert left.value.code == 1
    assert "no test 'poetry'" in capsys.readouterr().err

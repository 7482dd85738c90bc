"""`ultralong data`: rows built, counted and looked at by command; what is shown is what is in the rows."""

from __future__ import annotations

import json
import time

import pytest
from forked import start_command

from ultralong import cli
from ultralong.data.recipe import stats
from ultralong.data.recipe.build import pack_recipe
from ultralong.data.rows.inspect_rows import as_html, as_text, check_row, inspect_row
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.data.rows.packing import PackSettings, pack
from ultralong.data.tokens.store import TokenStore
from ultralong.figures.rows import browse_rows, row_browser
from ultralong.utils.files import read_json

RULE = {"short_below": 40, "short_keep": 0.0, "long_above": 400, "long_copies": 2.0}


@pytest.fixture
def recipe(tmp_path):
    """Two sources, one of short and one of long texts, and a rule that drops the one and doubles the other."""
    for name, repeat in (("short", 1), ("long", 90)):
        (tmp_path / name).mkdir()
        for number in range(6):
            (tmp_path / name / f"{number}.txt").write_text(f"{name} {number}. " + "The tide came in at dawn. " * repeat)
    (tmp_path / "short" / "bad.txt").write_bytes(b"\xff\xfe")
    path = tmp_path / "mine.yaml"
    path.write_text(
        json.dumps(
            {
                "name": "mine",
                "description": "d",
                "length_rule": RULE,
                "sources": [{"name": name, "license": "CC0-1.0", "path": name} for name in ("short", "long")],
            }
        )
    )
    return path


@pytest.fixture
def rows(recipe, tmp_path, tiny_tokenizer):
    pack_recipe(recipe, tiny_tokenizer, 1500, tmp_path / "rows", quiet=True)
    return PackedRows(tmp_path / "rows")


def test_build_stats_and_show_by_command(recipe, tmp_path, tiny_tokenizer, capsys):
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    build = [
        "data",
        "build",
        str(recipe),
        "--tokenizer",
        str(tmp_path / "model"),
        "--length",
        "1500",
        "--out",
        str(tmp_path / "rows"),
        "--quiet",
        "--json",
        str(tmp_path / "build.json"),
    ]
    cli.main(build)
    built = read_json(tmp_path / "build.json")
    assert built["rows"] == len(PackedRows(tmp_path / "rows"))
    assert built["peak_memory_bytes"] >= built["of_it_before_reading_bytes"] > 0
    assert "peak memory" in capsys.readouterr().out
    cli.main(["data", "stats", str(tmp_path / "rows"), "--picture", str(tmp_path / "p.png")])
    shown = capsys.readouterr().out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "short: left out: not UTF-8" in shown
    cli.main(
        [
            "data",
            "show",
            str(tmp_path / "rows"),
            "--tokenizer",
            str(tmp_path / "model"),
            "--colour",
            "always",
            "--html",
            str(tmp_path / "row.html"),
            "--json",
            str(tmp_path / "row.json"),
        ]
    )
    assert "\x1b[1;97;45m<s>\x1b[0m" in capsys.readouterr().out
    assert "<table>" in (tmp_path / "row.html").read_text()
    assert read_json(tmp_path / "row.json")["length"] == 1500


def test_limit_and_overrides_reach_the_recipe(recipe, tmp_path, capsys):
    cli.main(["data", "stats", str(recipe), "--limit", "700", "--quiet", "--json", str(tmp_path / "a.json")])
    one = read_json(tmp_path / "a.json")["sources"]["long"]["lengths"]["after"]
    assert 700 <= sum(one["tokens"]) < 1500
    cli.main(
        [
            "data",
            "stats",
            str(recipe),
            "--set",
            "length_rule.long_copies=3",
            "--quiet",
            "--json",
            str(tmp_path / "b.json"),
        ]
    )
    three = read_json(tmp_path / "b.json")["sources"]["long"]["lengths"]
    assert sum(three["after"]["documents"]) == 3 * sum(three["before"]["documents"]) == 18
    capsys.readouterr()


def test_stats_of_a_recipe_and_of_its_rows_tell_the_same_story(recipe, rows):
    estimated, counted = stats.recipe_stats(recipe, quiet=True), stats.folder_stats(rows.folder)
    for told in (estimated, counted):
        assert sum(told["sources"]["short"]["lengths"]["before"]["documents"]) == 6
        assert sum(told["sources"]["short"]["lengths"]["after"]["documents"]) == 0
        assert sum(told["sources"]["long"]["lengths"]["after"]["documents"]) == 12
    both = stats.totals(counted["sources"])
    assert sum(both["before"]["documents"]) == 12
    text = stats.format_table(counted)
    assert [line.split()[0] for line in text.splitlines() if " before " in line] == ["short", "long", "all"]
    bars = stats.shares_by_length(counted)
    assert all(list(shares) == stats.bucket_names(both["edges"]) for shares in bars.values())
    assert set(bars) == {f"{name}, {when}" for name in ("short", "long", "all") for when in ("before", "after")}
    for name, shares in bars.items():
        assert sum(shares.values()) == pytest.approx(0.0 if name == "short, after" else 1)
    with pytest.raises(ValueError, match="neither a recipe"):
        stats.folder_stats(recipe.parent)


def test_a_view_is_the_row(rows, tiny_tokenizer):
    store = TokenStore(rows.folder / "tokens")
    between = rows.manifest["separators"]["between"]
    for number in range(len(rows)):
        row, view = rows[number], inspect_row(rows, tiny_tokenizer, number, boundaries=100)
        assert [s.start for s in view.segments] + [1500] == row.boundaries.tolist()
        for segment in view.segments:
            assert segment.facts == store.describe(segment.document)
            if segment.separator:
                assert row.input_ids[segment.end - len(between) : segment.end].tolist() == between
        assert view.checks["boundaries_with_separator"] == view.checks["boundaries"] == len(view.segments) - 1
        assert view.checks["labels_that_are_the_next_input"] == 1499
        for boundary in view.boundaries:
            for place, text, label, position in boundary:
                assert text == tiny_tokenizer.decode([int(row.input_ids[place])])
                assert label == tiny_tokenizer.decode([int(row.labels[place])])
                assert position == place


def test_masked_padded_and_broken_rows_are_told_apart(rows, tmp_path, tiny_tokenizer):
    store = TokenStore(rows.folder / "tokens")
    masked = pack(
        store, tiny_tokenizer, tmp_path / "masked", PackSettings(4096, mask_documents=True, tail="pad"), quiet=True
    )
    view = inspect_row(masked, tiny_tokenizer, -1)
    assert view.segments[-1].name == "padding"
    assert view.segments[-1].targets == 0
    assert view.checks["masked_labels"] >= view.segments[-1].end - view.segments[-1].start
    assert "-> -" in as_text(view, most=12)
    row = rows[0]
    row.labels[7] = row.labels[7] + 1
    cut = int(row.boundaries[1])
    row.input_ids[cut - 1] += 1
    found = check_row(row, rows.manifest["separators"]["between"])
    assert found["boundaries_with_separator"] == found["boundaries"] - 1
    assert found["labels_that_are_the_next_input"] == 1499 - 2


def test_long_rows_are_shown_at_both_ends(rows, tiny_tokenizer):
    view = inspect_row(rows, tiny_tokenizer, 0)
    assert len(view.segments) >= 2
    whole = as_text(view, most=12)
    assert "\x1b" not in whole
    assert whole.count("document ") == len(view.segments)
    many = type(view)(0, view.length, view.segments * 20, view.boundaries, view.checks)
    assert f"{20 * len(view.segments) - 4} more segments" in as_text(many, most=2)
    assert f"{20 * len(view.segments) - 4} more" in as_html(many, most=2)
    assert "&lt;s&gt;" in as_html(view, most=12)


def test_rows_in_a_notebook(rows, tiny_tokenizer, capsys):
    box = row_browser(len(rows), lambda n: as_html(inspect_row(rows, tiny_tokenizer, n), most=12))
    slider, table = box.children
    assert (slider.min, slider.max) == (0, len(rows) - 1)
    first = table.value
    slider.value = len(rows) - 1
    assert table.value != first
    assert f"Row {len(rows) - 1}:" in table.value
    browse_rows(
        len(rows),
        lambda n: as_html(inspect_row(rows, tiny_tokenizer, n), most=12),
        lambda n: as_text(inspect_row(rows, tiny_tokenizer, n), most=12),
    )
    assert capsys.readouterr().out.startswith("row 0:")
    with pytest.raises(ValueError, match="no row 99"):
        browse_rows(3, str, str, first=99)


def test_what_cannot_be_shown_is_refused(rows, tiny_tokenizer):
    with pytest.raises(ValueError, match="no row"):
        inspect_row(rows, tiny_tokenizer, len(rows))


def test_conversations_are_counted_and_shown_too(tmp_path, tiny_tokenizer, capsys):
    rows = [{"question": f"Where is {n}?", "answer": "There. " * (1 + n % 3)} for n in range(12)]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.yaml").write_text(
        json.dumps(
            {
                "name": "mine",
                "description": "d",
                "kind": "chat",
                "subsample": {"total": 6},
                "sources": [{"name": "a", "license": "MIT", "path": "talks.jsonl"}],
            }
        )
    )
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    cli.main(
        [
            "data",
            "build",
            str(tmp_path / "mine.yaml"),
            "--tokenizer",
            str(tmp_path / "model"),
            "--length",
            "256",
            "--out",
            str(tmp_path / "rows"),
            "--quiet",
        ]
    )
    assert "taken: general 6 of 12" in capsys.readouterr().out
    table = stats.folder_stats(tmp_path / "rows")["sources"]["a"]["lengths"]
    assert (sum(table["before"]["documents"]), sum(table["after"]["documents"])) == (12, 6)
    packed = PackedRows(tmp_path / "rows")
    view = inspect_row(packed, tiny_tokenizer, 0)
    shown = [segment for segment in view.segments if segment.name != "padding"]
    assert sum(segment.targets for segment in shown) == packed.manifest["target_tokens"] > 0
    assert all(0 < segment.targets < segment.end - segment.start for segment in shown)
    assert "masked" in as_text(view, most=12)
    with pytest.raises(ValueError, match="holds conversations"):
        stats.recipe_stats(tmp_path / "mine.yaml")


def contents(folder):
    """Every file but the report, which holds seconds, and the lock."""
    left = ("report.json", ".lock")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in left
    }


def test_one_and_two_workers_write_the_same_bytes(recipe, tmp_path, tiny_tokenizer):
    for workers in (1, 2):
        pack_recipe(recipe, tiny_tokenizer, 500, tmp_path / str(workers), workers=workers, quiet=True)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize("sign", ["tokens/settings.json", "tokens/manifest.json"])
def test_a_build_killed_at_any_stage_ends_in_the_same_bytes(recipe, tmp_path, tiny_tokenizer, sign):
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    words = ["data", "build", str(recipe), "--tokenizer", str(tmp_path / "model"), "--length", "500", "--quiet"]
    pack_recipe(recipe, tmp_path / "model", 500, tmp_path / "whole", quiet=True)
    killed = tmp_path / "killed"
    process = start_command(*words, "--out", killed, streams=(tmp_path / "said", tmp_path / "errors"))
    while not (killed / sign).exists() and process.is_alive():
        time.sleep(0.001)
    process.kill()
    process.join()
    cli.main([*words, "--out", str(killed)])
    assert contents(killed) == contents(tmp_path / "whole")

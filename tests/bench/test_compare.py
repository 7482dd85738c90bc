"""`ultralong bench compare` sees what got worse, in every form of file that has been recorded."""

import json
import re
import subprocess

import pytest
from test_env import ROOT

from ultralong.bench.compare import HIGHER_IS_BETTER, LOWER_IS_BETTER, case_name, compare, compare_measured
from ultralong.bench.results import Facts, append_row, facts_of, read_measured, read_rows, rows_of, write_rows
from ultralong.bench.tables import measured_table, training_table
from ultralong.cli import main
from ultralong.utils.environment import commit

RESULTS = ROOT / "notebooks" / "results"
# Files of rows that are no measurement of speed or memory.
OTHER = ("config_sweep", "families_cpu", "faults", "kills_async_saves", "kills_commands", "manifests")
OTHER += ("many_keys_miniature", "passkey_llama_cpp", "plans_longest_rows", "readers", "ruler_against_lm_eval")


def holds_rows(path) -> bool:
    try:
        return bool(read_rows(path))
    except ValueError:
        return False


RECORDED = [path for path in sorted(RESULTS.glob("*.json")) if holds_rows(path) and path.stem not in OTHER]
RECORDED.append(ROOT / "ultralong" / "planner" / "machines" / "h200.json")


def worsened(row: dict, value: str, by: float) -> dict:
    """The row with one value worse by a share."""
    return {**row, value: row[value] * (1 - by if value in HIGHER_IS_BETTER else 1 + by)}


def compared(row: dict) -> list[str]:
    """Values of a row that are compared."""
    known = HIGHER_IS_BETTER | LOWER_IS_BETTER
    return [value for value in row if value in known and isinstance(row[value], int | float) and row[value] > 0]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_four_percent_are_seen_in_any_recorded_row_and_two_are_not(path):
    rows = read_rows(path)
    last = {case_name(row): index for index, row in enumerate(rows)}  # a case measured again replaces the first time
    assert compare(rows, rows, 0.03).regressions == ()
    tried = 0
    for index in last.values():
        for value in compared(rows[index]):
            for by, seen in ((0.04, True), (0.02, False), (-0.2, False)):
                found = compare([rows[index]], [worsened(rows[index], value, by)], 0.03).regressions
                assert [change.value for change in found] == ([value] if seen else [])
            tried += 1
    assert tried >= len(rows) / 2, "most recorded rows have values to compare"


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_different_cases_of_a_recorded_file_have_different_names(path):
    """Two rows share a name only where the same case was measured twice."""
    told_apart: dict[str, dict] = {}
    measured = HIGHER_IS_BETTER | LOWER_IS_BETTER
    for row in read_rows(path):
        if compared(row):
            before = told_apart.setdefault(case_name(row), row)
            same = {key for key in row if key not in measured and row[key] == before.get(key)}
            telling = {"model", "tokens", "task", "kernel", "rate", "packed", "gpus", "lora", "notebook", "exchange"}
            assert telling & row.keys() <= same


def test_a_slower_server_checkpoint_or_kernel_is_seen():
    """One row each of a file that the command once passed over."""
    for name, value in (
        ("serve_1m_2gpu", "seconds_to_first_token"),
        ("serve_1m_2gpu", "tokens_per_second_after"),
        ("saves_2gpu_h200", "cost_seconds"),
        ("decode_kernel_h200", "ms"),
        ("fp8_forward_h200", "fp8_tflops"),
        ("kept_kernels_h200", "seconds"),
        ("course_05_h200", "seconds"),
    ):
        row = read_rows(RESULTS / f"{name}.json")[-1]
        assert [change.value for change in compare([row], [worsened(row, value, 0.04)], 0.03).regressions] == [value]


def test_adapters_are_not_the_whole_model():
    row = read_rows(RESULTS / "models_lora_h200.json")[0]
    assert case_name(row) != case_name({**row, "lora": ""})


def test_rows_without_a_case_or_numbers_take_no_part():
    rows = [{"tokens": 8, "seconds": 1.0}, {"what": "a fault", "seconds": 2.0}, {"tokens": 9, "note": "out of memory"}]
    after = [rows[0], {"what": "another", "seconds": 9.0}, {"tokens": 9, "seconds": 3.0}, {"kind": "no numbers"}]
    found = compare(rows, after, 0.03)
    assert (found.regressions, found.missing, found.new) == ((), (), ("tokens 9",))


@pytest.mark.parametrize("name", OTHER)
def test_other_files_hold_nothing_to_compare(name):
    assert not any(map(compared, read_rows(RESULTS / f"{name}.json")))


def test_a_case_that_ran_out_of_memory_is_a_regression():
    before = [{"model": "M", "tokens": 8, "gpus": 1, "seconds_per_step": 2.0}]
    after = [{"model": "M", "tokens": 8, "gpus": 1, "note": "CUDA out of memory"}]
    found = compare(before, after, 0.03)
    assert [(change.value, change.after) for change in found.regressions] == [("seconds_per_step", None)]
    assert "no number" in str(found)


def test_the_report_names_cases_values_and_changes():
    before = [{"name": "ring", "tokens": n, "ranks": 2, "tflops": 100.0, "forward_ms": 5.0} for n in (1, 2, 3)]
    after = [
        {"name": "ring", "tokens": 1, "ranks": 2, "tflops": 90.0, "forward_ms": 5.1},
        {"name": "ring", "tokens": 2, "ranks": 2, "tflops": 120.0, "forward_ms": 5.0},
        {"name": "ring", "tokens": 4, "ranks": 2, "tflops": 1.0, "forward_ms": 5.0},
    ]
    found = compare(before, after, 0.03)
    assert str(found).splitlines() == [
        "worse   name ring, tokens 1, ranks 2: tflops 100 -> 90 (10.0% worse)",
        "better  name ring, tokens 2, ranks 2: tflops 100 -> 120 (20.0% better)",
        "not measured again  name ring, tokens 3, ranks 2",
        "new  name ring, tokens 4, ranks 2",
        "4 values compared: 1 worse and 1 better by more than 3%, 2 within it",
    ]
    assert compare(before, after, 0.2).regressions == ()


def test_rows_with_old_names_are_the_same_cases():
    old = {
        "model": "M",
        "tokens": 8,
        "gpus": 2,
        "stages": 4,
        "states": "8bit",
        "memory": {"checkpoint_layers": True, "inputs_host": 3},
    }
    new = {
        "model": "M",
        "tokens": 8,
        "gpus": 2,
        "head_chunks": 4,
        "state_precision": "8bit",
        "memory": {"activation_checkpointing": True, "layer_inputs_offloaded": 3, "loss_tile": 2048},
    }
    assert case_name(old) == case_name(new)
    assert case_name(new) != case_name({**new, "memory": {**new["memory"], "layer_inputs_offloaded": 4}})


def test_what_has_nothing_in_common_is_an_error():
    with pytest.raises(ValueError, match="no case with numbers in common"):
        compare([{"tokens": 1, "seconds": 1.0}], [{"tokens": 2, "seconds": 1.0}], 0.03)
    with pytest.raises(ValueError, match="tolerance"):
        compare([], [], -1.0)


def test_hardware_has_to_be_the_same_and_is_named():
    h100, h200, nobody = Facts("H100"), Facts("H200", "0.4.0", "abc", "2.11.0", "2026-11-29"), Facts()
    rows = [{"tokens": n, "seconds": 1.0} for n in (1, 2, 3)]
    before = [(row, h200) for row in rows]
    found = compare_measured(before, [(row | {"seconds": 9.0}, h100) for row in rows[:1]] + before[1:], 0.03)
    assert (found.regressions, found.elsewhere) == ((), (("tokens 1", "H200", "H100"),))
    said = str(found)
    assert "before  0.4.0 at abc, torch 2.11.0, H200, 2026-11-29" in said
    assert "other hardware (H200, then H100), not compared  tokens 1" in said
    assert compare_measured(before, [(rows[0] | {"seconds": 9.0}, nobody)], 0.03).regressions, "a file may not say"
    with pytest.raises(ValueError, match="different hardware, such as H200 and H100"):
        compare_measured(before, [(row, h100) for row in rows], 0.03)


def test_who_measured_is_read_from_the_row_or_the_head():
    head = {"machine": {"device": "cpu", "processor": "P", "date": "2026-01-01", "packages": {"torch": "2.11.0"}}}
    assert facts_of(head, {}) == Facts("cpu, P", torch="2.11.0", date="2026-01-01")
    assert str(facts_of(head, {})) == "version not recorded, torch 2.11.0, cpu, P, 2026-01-01"
    row = {"gpu": "H200", "date": "2026-02-02", "versions": {"ultralong": "0.4.0", "ultralong-commit": "abc"}}
    assert facts_of({"machine": "some hosts"}, row) == Facts("H200", "0.4.0", "abc", "", "2026-02-02")


def test_the_table_of_who_measured_names_peers_with_their_versions():
    ours = {"gpu": "H200", "date": "2026-02-02", "versions": {"ultralong": "0.4.0", "torch": "2.11.0"}}
    older = ours | {"peer": "torch-cp-flash"}
    alst = ours | {"peer": "deepspeed-alst-offload", "versions": ours["versions"] | {"deepspeed": "0.19.8"}}
    assert measured_table([{"file": "a.json", "rows": [alst, ours, older, ours]}])[2:] == [
        "| a.json | 0.4.0 |  | 2.11.0 |  | H200 | 2026-02-02 |",
        "| a.json | 0.4.0 |  | 2.11.0 | deepspeed-alst-offload, deepspeed 0.19.8 | H200 | 2026-02-02 |",
        "| a.json | 0.4.0 |  | 2.11.0 | torch-cp-flash, accelerate of a version not recorded | H200 | 2026-02-02 |",
    ]


def test_a_folder_is_all_of_its_rows_and_the_latest_of_a_case_counts(tmp_path, capsys):
    row = {"model": "M", "tokens": 8, "gpus": 1}
    for name, date, seconds in (("b", "2026-01-01", 10.0), ("a", "2026-02-02", 5.0)):
        append_row(tmp_path / f"{name}.json", row | {"seconds": seconds, "gpu": "H200", "date": date})
    (tmp_path / "other.json").write_text('{"what": 1}')
    (tmp_path / "list.json").write_text("[1]")
    assert [found["seconds"] for found, _ in read_measured(tmp_path)] == [10.0, 5.0]
    (tmp_path / "new").mkdir()
    after, changes = tmp_path / "new" / "c.json", tmp_path / "changes.json"
    append_row(after, row | {"seconds": 5.5, "gpu": "H200", "date": "2026-03-03"})
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "compare", str(tmp_path), str(after), "--json", str(changes)])
    assert stopped.value.code == 1
    assert "seconds 5 -> 5.5 (10.0% worse)" in capsys.readouterr().out
    recorded = json.loads(changes.read_text())
    (value,) = recorded["values"]
    assert (value["value"], value["before"], value["after"], value["ratio"]) == ("seconds", 5.0, 5.5, 1.1)
    assert recorded["regressions"] == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no result file"):
        read_measured(tmp_path / "empty")


def test_of_many_cases_that_were_not_measured_again_some_are_named():
    rows = [{"tokens": n, "seconds": 1.0} for n in range(1, 20)]
    said = str(compare(rows, rows[:1], 0.03))
    assert (said.count("not measured again  tokens"), "8 more; --json names them" in said) == (10, True)


def test_a_file_is_written_and_read_alike(tmp_path):
    path = tmp_path / "rows.json"
    write_rows(path, [{"tokens": 1, "seconds": 2.0}], options={"repeats": 3})
    append_row(path, {"tokens": 2, "seconds": 3.0})
    recorded = json.loads(path.read_text())
    assert recorded["options"] == {"repeats": 3}
    assert recorded["machine"]["packages"]["torch"]
    assert read_rows(path) == [{"tokens": 1, "seconds": 2.0}, {"tokens": 2, "seconds": 3.0}]
    append_row(tmp_path / "new.json", {"tokens": 1})
    assert read_rows(tmp_path / "new.json") == [{"tokens": 1}]


def test_the_three_forms_of_files_are_read():
    assert rows_of({"results": [{"tokens": 1}]}) == rows_of({"rows": [{"tokens": 1}]}) == [{"tokens": 1}]
    assert rows_of({"rates": {"link": [{"gbps": 5.0}]}}) == [{"rate": "link", "gbps": 5.0}]
    with pytest.raises(ValueError, match="no rows were found; the file has model"):
        rows_of({"model": 1})


def test_a_measurement_says_of_which_commit_it_is(tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *words], check=True)

    assert commit(tmp_path) == ""
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "one")
    assert re.fullmatch(r"[0-9a-f]{12,}", commit(tmp_path))
    (tmp_path / "file").write_text("2")
    assert re.fullmatch(r"[0-9a-f]{12,}-dirty", commit(tmp_path))
    row = {"model": "M", "gpus": 2, "tokens": 1024, "note": "stopped", "mix": "8k:1", "sharing": "fixed", "degree": 1}
    row["versions"] = {"ultralong": "0.4.0", "ultralong-commit": "0123456789ab"}
    assert "ours, 0.4 at 0123456789ab, fixed degree of 1 over 8k:1 | stopped" in training_table([{"rows": [row]}])[2]


@pytest.mark.parametrize("text", ["[1]", "{", '{"what": 1}'])
def test_other_files_are_refused_by_name(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is not"):
        read_rows(tmp_path / "a.json")


def test_the_command_exits_with_1_on_a_regression(tmp_path, capsys):
    row = {"model": "M", "tokens": 8, "gpus": 1, "seconds": 10.0}
    write_rows(tmp_path / "a.json", [row])
    write_rows(tmp_path / "b.json", [row | {"seconds": 10.5}])
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "compare", *files])
    assert stopped.value.code == 1
    assert "seconds 10 -> 10.5 (5.0% worse)" in capsys.readouterr().out
    main(["bench", "compare", *files, "--tolerance", "0.1"])
    assert "1 values compared: 0 worse" in capsys.readouterr().out

"""A report that is made beside a run: who comes later has read later, so that nothing older stays in the folder."""

import threading
from dataclasses import replace

import pytest
from induction import InductionModel

from ultralong import cli
from ultralong.evaluation.runs import results
from ultralong.evaluation.runs.results import draw_results, write_results
from ultralong.evaluation.runs.run import run
from ultralong.evaluation.runs.settings import RunSettings
from ultralong.utils.files import file_lock, locked, read_json

pytest.importorskip("plotly")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("small_pictures")


@pytest.fixture
def measure(tmp_path, tiny_tokenizer):
    """Bring the run in `tmp_path / "run"` to so many samples."""
    (tmp_path / "text.txt").write_text("The keeper of the light wrote in his log that no ship had passed. " * 60)
    wanted = RunSettings(
        "reader", ("infinitebench_passkey",), (1024,), chat=False, haystack=str(tmp_path / "text.txt"), samples=1
    )

    def to(samples):
        opened = (InductionModel(len(tiny_tokenizer)), tiny_tokenizer)
        return run(replace(wanted, samples=samples), tmp_path / "run", opened=opened, draw=False, quiet=True)

    to(1)
    return to


def test_a_report_that_began_before_a_runs_end_does_not_replace_the_runs_own(tmp_path, measure, monkeypatch):
    read, has_read, goes_on = results.summarise, threading.Event(), threading.Event()

    def summarise(folder):
        found = read(folder)
        if threading.current_thread() is report:  # it has read one sample, and writes when the run has three
            has_read.set()
            assert goes_on.wait(60)
        return found

    report = threading.Thread(target=write_results, args=(tmp_path / "run",), kwargs={"interactive": False})
    monkeypatch.setattr(results, "summarise", summarise)
    report.start()
    assert has_read.wait(60)
    rest = threading.Thread(target=measure, args=(3,))
    rest.start()
    rest.join(3)  # ends where nothing holds it
    goes_on.set()
    for thread in (report, rest):
        thread.join(60)
        assert not thread.is_alive()
    found = read_json(tmp_path / "run" / "report.json")
    assert found["results"] == read_json(tmp_path / "run" / "results.json")
    assert found["results"][0]["n"] == 3, "the report of one sample was written over that of three"
    assert not list((tmp_path / "run").glob(".report*"))


def test_a_page_is_drawn_of_the_numbers_beside_it(tmp_path, measure):
    """So that a slow drawing of old numbers leaves no page that is older than they are."""
    page = tmp_path / "run" / "report.html"
    write_results(tmp_path / "run", tmp_path / "run", interactive=False)
    first = page.read_bytes()
    page.unlink()
    assert draw_results(tmp_path / "run", interactive=False) == page
    assert page.read_bytes() == first
    measure(2)
    draw_results(tmp_path / "run", interactive=False)
    assert page.read_bytes() != first


def test_a_run_under_way_can_be_reported_so_far(tmp_path, measure, capsys):
    with locked(tmp_path / "run"):
        cli.main(["eval", "report", str(tmp_path / "run")])
    assert "report.html" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").exists()


def test_a_report_that_never_ends_is_named(tmp_path, measure, monkeypatch):
    monkeypatch.setattr(results, "PATIENCE", 0.2)
    with file_lock(tmp_path / "run" / ".report.lock", "busy"):
        for work in (write_results, draw_results):
            with pytest.raises(ValueError, match="Another process has been writing the report of"):
                work(tmp_path / "run")


def test_a_folder_without_a_run_is_refused_and_left_as_it_is(tmp_path):
    for work in (write_results, draw_results):
        with pytest.raises(ValueError, match="holds no run"):
            work(tmp_path)
        with pytest.raises(ValueError, match="holds no run"):
            work(tmp_path / "none")
    assert not list(tmp_path.iterdir())

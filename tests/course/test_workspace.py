"""A course folder is a copy that keeps the learner's answers; the site stands alone."""

from __future__ import annotations

import dataclasses
import html
import importlib
import json
import re
import warnings
from html.parser import HTMLParser

import pytest

from ultralong import cli, course, planner
from ultralong.course import links, progress, reference, site, workspace
from ultralong.course.elsewhere import Repository


def test_a_course_folder_is_made_once_and_keeps_what_the_learner_wrote(tmp_path):
    folder = tmp_path / "work"
    copied = workspace.start(folder)
    assert [path.name for path in copied] == [path.name for path in sorted(workspace.CLONE.glob("*.ipynb"))]
    assert (folder / "results" / "attention_131k.json").is_file()
    copied[0].write_text("mine")
    (folder / copied[1].name).unlink()
    assert workspace.start(folder) == [copied[1]]
    assert copied[0].read_text() == "mine"


def test_a_copy_keeps_what_it_makes_and_differs_in_nothing_else(tmp_path):
    for path in workspace.start(tmp_path, ["00", "01", "12"]):
        text, source = path.read_text(), (workspace.CLONE / path.name).read_text()
        place = f'OUT: str = "made/{path.stem[:2]}"'
        pairs = zip(json.loads(text)["cells"], json.loads(source)["cells"], strict=True)
        for copy, cell in pairs:
            was = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                was = links.as_words(was)
            elif "parameters" in cell["metadata"].get("tags", []) and path.stem[:2] not in workspace.TEMPORARY:
                was = was.replace('OUT: str = ""', place)
            assert copy == cell | {"source": copy["source"]}
            assert "".join(copy["source"]) == was
        assert "](../" not in text, "a link that leads out of the learner's folder"
        assert (json.dumps(place)[1:-1] in text) == (path.stem[:2] == "12"), (
            "00 makes a folder of one setting, 01 nothing"
        )
    assert "](00_quickstart.ipynb)" in (tmp_path / "README.md").read_text()


def test_some_notebooks_can_be_chosen_and_unknown_ones_are_refused(tmp_path):
    assert [path.stem for path in workspace.start(tmp_path / "a", ["06"])] == ["06_sequence_parallel"]
    with pytest.raises(ValueError, match="No notebook starts with '99'"):
        workspace.start(tmp_path / "b", ["99"])
    assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match="Choose a folder outside"):
        workspace.start(workspace.CLONE / "work")


def test_the_overview_counts_solved_exercises(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="ultralong course start"):
        workspace.overview(tmp_path)
    cli.main(["course", "start", str(tmp_path / "work")])
    monkeypatch.chdir(tmp_path / "work")
    course.check("01.wavelength", course.exercise("01.wavelength").solution)
    capsys.readouterr()
    cli.main(["course", "check"])
    shown = capsys.readouterr().out
    assert re.search(r"01_rope_frequencies +#\.\.\.\. +1 of 5", shown)
    assert "Next: 00.gain, in 00_quickstart.ipynb" in shown
    assert json.loads((tmp_path / "work" / progress.FILE).read_text())["solved"].keys() == {"01.wavelength"}


class Page(HTMLParser):
    """What a page loads, links to and shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads, self.links, self.figures, self.images, self.ids = [], [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.update(given[key] for key in ("id", "name") if given.get(key))
        if tag in ("script", "img", "link") and (found := given.get("src") or given.get("href")):
            self.loads.append(found)
        if tag == "a" and "href" in given:  # without one it is a place that others link to
            self.links.append(given["href"])
        if tag == "div" and (given.get("class") or "").startswith("figure"):
            self.figures.append(given["aria-label"])
        if tag == "img":
            self.images.append(given.get("alt"))


# Most of the time goes into the API's pages, room by room.
SOME_ROOMS = ("attention", "planner", "inference", "api")


@pytest.fixture(scope="module", params=[SOME_ROOMS, pytest.param(reference.ROOMS, marks=pytest.mark.soak)], ids=len)
def built(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "ROOMS", request.param)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            site.build(folder, Repository("https://github.com/lab/course", "main"))
        yield folder


def test_pages_load_nothing_from_elsewhere_and_link_to_each_other(built):
    for path in built.glob("*.html"):
        page = Page(path.read_text())
        assert all(
            load.startswith(("data:", "plotly.min.js", "pictures/", "architecture.svg")) for load in page.loads
        ), path.name
        assert "|---" not in path.read_text(), f"{path.name}: a table that did not become one"


def test_every_link_of_the_site_opens_at_its_place(built):
    """Files and anchors, of the API's pages too: a private class that a member comes from has no place there."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in built.rglob("*.html")}
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"(?!api/)[a-z]+:", link):
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.is_file(), f"{path.name} links to {link}"
            assert not anchor or target not in pages or anchor in pages[target].ids, f"{path.name} links to {link}"


def test_a_heading_has_the_place_that_github_gives_it(built):
    places = Page((built / "models.html").read_text()).ids
    assert {"goals", "smollm2-135m-8192-to-65536-tokens", "tinyllama-11b-2048-to-16384-tokens"} <= places
    assert "models.html#the-choices-of-the-recipe" in Page((built / "results.html").read_text()).links


def test_every_readme_of_a_room_has_a_page(built):
    """And the page is in the menu of all others; a link from one to another's file opens that one's page."""
    sources = {source: name for name, _, source in reference.TOPICS}
    there = {path.relative_to(reference.PACKAGE).as_posix() for path in reference.PACKAGE.rglob("README.md")}
    assert set(sources) == there
    front = Page((built / "index.html").read_text())
    assert {f"{name}.html" for name in sources.values()} <= set(front.links)
    assert not (built / "miniature.html").read_text().partition("<main>")[2].lstrip().startswith(("---", "<hr"))
    assert "results.html#families" in Page((built / "memory.html").read_text()).links


def test_a_table_of_many_columns_names_each_cell_for_a_narrow_screen():
    text = site._markdown("| a | b | c | d | `e` |\n|---|---|---|---|---|\n| 1 | `x\\|y` | 3 | | 5 |\n")
    assert '<div class="table many">' in text
    assert re.findall(r'data-head="(\w)"', text) == list("abcde")
    assert "<code>x|y</code>" in text
    assert 'class="table"' in site._markdown("| a | b |\n|---|---|\n| 1 | 2 |\n")


def test_pages_say_where_their_notebooks_run(built):
    for path in built.glob("[0-9][0-9]_*.html"):
        assert f'href="elsewhere/{path.stem}.ipynb"' in path.read_text()
    assert "elsewhere" not in (built / "architecture.html").read_text()


def test_a_place_is_named_only_with_an_address(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["course", "site", str(tmp_path), "--pages-branch", "gh-pages"])
    assert "give --repository too" in capsys.readouterr().err


def test_exercises_have_their_hints_and_solution_folded(built):
    text = (built / "05_attention_kernels.html").read_text()
    assert "<details><summary>One solution of 05.merge</summary>" in text
    assert "<details open" not in text
    assert text.count("<summary>Hints for 05.") == text.count("<summary>One solution of 05.") == 6


def test_links_into_the_clone_open_pages_or_are_words():
    said = '<a href="../ultralong/rope/yarn.py">yarn</a> <a href="../ultralong/presets">presets</a>'
    found = links.as_pages(said, {"ultralong.rope.yarn"}, {})
    assert found == '<a href="api/ultralong/rope/yarn.html">yarn</a> presets (<code>ultralong/presets</code>)'
    assert (
        links.as_words("[the\nring](../ultralong/ring.py), [b](c.md)") == "the\nring (`ultralong/ring.py`), [b](c.md)"
    )


def test_the_reference_stands_beside_the_course(built):
    """Topic pages, every settings key with its former name, and a page of the API for every module."""
    for name, title in (
        ("architecture", "Architecture"),
        ("memory", "Memory and offloading"),
        ("formats", "File formats"),
    ):
        assert f"<h1>{title}</h1>" in (built / f"{name}.html").read_text()
    keys = (built / "config.html").read_text()
    for group, cls in reference.GROUPS:
        names = {field.name for field in dataclasses.fields(cls)} - {name for name, _ in reference.GROUPS}
        assert [name for name in names if f"<code>{name}</code>" not in keys] == [], group
        assert all(f"<code>{old}</code>" in keys for old in getattr(cls, "RENAMED", {}))
    missing = [
        name
        for name in reference.documented_modules()
        if not (built / "api" / f"{name.replace('.', '/')}.html").exists()
    ]
    assert missing == []
    rooms = {name: (built / f"api/ultralong/{name}.html").read_text() for name in ("planner", "inference/decoding")}
    for name in planner.__all__:  # which are loaded when they are asked for
        assert f'id="{name}"' in rooms["planner"]
    said = re.sub("<[^>]*>", "", rooms["inference/decoding"])
    assert "ended: list[typing.Optional[typing.Literal['stop', 'length']]]" in html.unescape(said)
    ulysses = (built / "api/ultralong/attention/ulysses.html").read_text()
    assert 'href="../../../index.html"' in ulysses
    assert "all-to-all" in ulysses


def test_every_documented_module_can_be_imported_here():
    """One that cannot, as it needs a package of GPU machines, ends the whole site unless `NEEDS` names it."""
    for name in reference.documented_modules():
        importlib.import_module(name)


def test_every_figure_has_a_sentence_and_a_still(built):
    page = Page((built / "06_sequence_parallel.html").read_text())
    assert len(page.figures) >= 8
    assert all(len(alt.split()) > 5 for alt in page.figures)
    assert page.images == page.figures, "each figure has its picture for readers without scripts"


def test_formulas_are_mathml_and_code_keeps_its_dollars():
    text = site._markdown("A factor $s = 8$ and `$PATH`.\n\n$$x^2$$\n\n```\ncost $5 and $6\n```\n")
    assert text.count("<math") == 2
    assert "$PATH" in text
    assert "cost $5 and $6" in text


def test_a_figure_can_not_end_its_script():
    data = {site.PLOTLY: {"data": [], "layout": {"title": "</script><b>"}}, "text/plain": '"quoted" <b>'}
    text = site._figure(data, "f")
    assert "</script><b>" not in text
    assert "&quot;quoted&quot; &lt;b&gt;" in text

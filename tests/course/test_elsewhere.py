"""Notebooks without a clone: the cell that installs, its links, and nothing of it without an address."""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from ultralong.course.elsewhere import EXTRAS, Repository, links, write_copy

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "01_rope_frequencies.ipynb"
# A build backend of its own, so that installing needs no package from anywhere.
BACKEND = """
import zipfile
from pathlib import Path
META = "ultralong-9.dist-info/"
def build_wheel(target, settings=None, metadata=None):
    name = "ultralong-9-py3-none-any.whl"
    with zipfile.ZipFile(Path(target) / name, "w") as wheel:
        wheel.writestr("ultralong/__init__.py", "WHICH = " + repr(Path("which.txt").read_text()))
        wheel.writestr(META + "METADATA", "Metadata-Version: 2.1\\nName: ultralong\\nVersion: 9\\n"
            + "".join(f"Provides-Extra: {extra}\\n" for extra in ("notebooks", "serve")))
        wheel.writestr(META + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(META + "RECORD", "")
    return name
"""


@pytest.fixture
def repository(tmp_path):
    """A git repository of a package by this one's name: a branch, and a tag before its last commit."""
    folder = tmp_path / "origin"
    (folder / "notebooks").mkdir(parents=True)
    (folder / "notebooks" / "results.json").write_text("{}")
    (folder / "backend.py").write_text(BACKEND)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "ultralong"\nversion = "9"\n'
    )

    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", folder, *words], check=True)

    git("init", "--quiet", "--initial-branch=main")
    for which in ("tagged", "newest"):
        (folder / "which.txt").write_text(which)
        git("add", "-A")
        git("commit", "--quiet", "-m", which)
        if which == "tagged":
            git("tag", "v9")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("revision", "which"), [("main", "newest"), ("v9", "tagged")])
def test_the_first_cell_installs_the_course_and_goes_to_its_notebooks(tmp_path, repository, revision, which):
    venv.create(tmp_path / "fresh")
    # With this interpreter's pip: to unpack one of its own takes two seconds each time.
    pip = Path(pytest.importorskip("pip").__file__).parent
    (site,) = (tmp_path / "fresh" / "lib").glob("python*/site-packages")
    (site / "pip").symlink_to(pip)
    cell = Repository(repository.as_uri(), revision).cell()
    work = tmp_path / "work"
    work.mkdir()
    told = f"{cell}\n{cell}\nimport ultralong\nprint(ultralong.WHICH, os.path.exists('results.json'))\n"
    for _ in range(2):  # the second time as in a kernel that was started again: nothing is fetched
        done = subprocess.run(
            [tmp_path / "fresh/bin/python", "-c", told], cwd=work, capture_output=True, text=True,
            env={"PATH": "/usr/bin:/bin", "PIP_NO_INDEX": "1", "HOME": str(tmp_path)}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [which, "True"]
        shutil.rmtree(repository, ignore_errors=True)


def test_the_first_cell_does_nothing_where_the_course_is(tmp_path):
    cell = Repository("https://example.invalid/none", "main").cell()
    done = subprocess.run([sys.executable, "-c", cell], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_a_copy_has_the_cell_before_all_code_and_no_outputs(tmp_path):
    copy = write_copy(NOTEBOOK, tmp_path, Repository("https://github.com/lab/course", "v1"))
    cells, before = (json.loads(path.read_text())["cells"] for path in (copy, NOTEBOOK))
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert "'https://github.com/lab/course', 'v1'" in "".join(code[0]["source"])
    assert f"[{EXTRAS}]" in "".join(code[0]["source"])
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert [cell["source"] for cell in cells if cell is not code[0]] == [cell["source"] for cell in before]


def test_links_name_what_is_known():
    page = links(NOTEBOOK, Repository("https://github.com/lab/course.git", "v1"))
    assert "https://mybinder.org/v2/gh/lab/course/v1?labpath=notebooks%2F01_rope_frequencies.ipynb" in page
    assert 'href="elsewhere/01_rope_frequencies.ipynb"' in page
    assert "colab.research" not in page
    assert "Upload notebook" in page
    page = links(NOTEBOOK, Repository("https://github.com/lab/course", "v1", "gh-pages"))
    assert (
        "https://colab.research.google.com/github/lab/course/blob/gh-pages/elsewhere/01_rope_frequencies.ipynb" in page
    )
    assert "Upload notebook" not in page
    page = links(NOTEBOOK, Repository("https://git.example.org/a/b", "main"))
    assert "https://mybinder.org/v2/git/https%3A%2F%2Fgit.example.org%2Fa%2Fb/main?" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("github.com/lab/course", "main"), "must be an address"),
        (("https://user:secret@github.com/lab/course", "main"), "must be an address"),
        (("https://github.com/lab/course'; import os", "main"), "must be an address"),
        (("https://github.com/lab/course", "--upload-pack=x"), "revision must be"),
        (("https://github.com/lab/course", "main", "a b"), "pages_branch must be"),
        (("https://gitlab.com/lab/course", "main", "pages"), "repository on github.com"),
    ],
)
def test_addresses_without_sense_are_refused(words, said):
    with pytest.raises(ValueError, match=said):
        Repository(*words)

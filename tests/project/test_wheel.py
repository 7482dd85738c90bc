"""The wheel: it holds everything that `ultralong demo` needs, and runs it in an empty folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_env import ROOT, tracked

from ultralong.data.recipe.schema import RECIPES

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
# The real stages on the real texts, as few of each as there can be. One process trains: what starts several is among
# the wheel's files, and the first page's blocks do so.
QUICK = (
    "processes=1",
    "target=1024", "factor=4", "pretraining.steps=2", "tuning.steps=2", "tuning.global_batch_size=1",
    "tuning.micro_batch_size=1", "examples=24", "lengths=[512, 1024]", "depths=[0.5]", "samples=1",
    "perplexity_rows=1", "limit=100_000",
)  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what is committed, so that nothing else can get in and the clone stays clean."""
    pytest.importorskip("pip")
    copy, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("dist")
    for file in tracked():
        target = copy / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    for part in ("", "presets"):  # what a build of an earlier version left in a clone
        left = copy / "build" / "lib" / "ultralong" / part / "removed_since.py"
        left.parent.mkdir(parents=True, exist_ok=True)
        left.touch()
    subprocess.run(
        [*PIP, "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", str(out), str(copy)],
        check=True,
    )
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_recipes_presets_and_the_miniature(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in tracked("data_recipes"):
        assert f"ultralong/data_recipes/{file.name}" in names
    for file in tracked("ultralong"):
        assert str(file.relative_to(ROOT)) in names
    assert not [name for name in names if "removed_since" in name]
    inside = {name.split("/")[0] for name in names}
    assert {name for name in inside if not name.endswith(".dist-info")} == {"ultralong"}, "nothing else is installed"


def test_a_clone_reads_the_recipes_at_the_top_level():
    assert RECIPES == ROOT / "data_recipes"


@pytest.mark.slow
def test_an_installed_wheel_runs_the_demo_in_an_empty_folder(wheel, tmp_path):
    place, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    # Most modules are not imported here, and need not be compiled.
    install = ["install", "--quiet", "--no-deps", "--no-compile", "--target", str(place), str(wheel)]
    subprocess.run([*PIP, *install], check=True)
    environment = os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=empty, env=environment, capture_output=True, text=True, check=False)

    where = run(sys.executable, "-c", "import ultralong.data.recipe.schema as s; print(s.__file__, s.RECIPES)")
    assert where.stdout.split() == [
        str(place / "ultralong/data/recipe/schema.py"),
        str(place / "ultralong/data_recipes"),
    ]
    done = run(str(place / "bin" / "ultralong"), "demo", "--out", "demo", "--set", *QUICK)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Path(empty, "demo", "report.html").is_file()
    assert [path.name for path in empty.iterdir()] == ["demo"]


def test_a_build_into_the_source_keeps_it(tmp_path):
    """`--build-lib .` names the package itself as what a build before has left."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    for name in ("ultralong/__init__.py", "data_recipes/one.yaml"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "ultralong"\nversion = "0"\n[tool.setuptools]\npackages = ["ultralong"]\n'
    )
    words = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "."]
    subprocess.run(words, cwd=tmp_path, check=True)
    assert (tmp_path / "ultralong" / "__init__.py").exists()

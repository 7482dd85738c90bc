"""`make setup`: which torch it asks for, tried with stand-ins for the interpreter, uv and nvidia-smi; what CI runs."""

import os
import re
import shutil
import subprocess

import pytest
from test_env import ROOT


@pytest.fixture
def setup(tmp_path):
    """A function: run `make setup` with these programs on the path; returns what was called, and what was said."""
    folder, log = tmp_path / "bin", tmp_path / "log"

    def program(path, body):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def run(*programs: str, uv_works: bool = True, torch: bool = False, **variables: str):
        log.write_text("")
        for name in programs:
            program(folder / name, f'echo "{name} $*" >> {log}\nexit {int(name == "uv" and not uv_works)}')
        answer = f'[[ "$1 $2" == "-c import torch" ]] && exit {int(not torch)}; [[ "$1" == -c ]] && exit 0'
        program(tmp_path / "venv" / "bin" / "python", f'{answer}; echo "python $*" >> {log}')
        for name in ("bash", "touch", "nproc", "env", "dirname"):
            (folder / name).parent.mkdir(exist_ok=True)
            if not (folder / name).exists():
                (folder / name).symlink_to(shutil.which(name))
        words = [f"{key}={value}" for key, value in variables.items()]
        done = subprocess.run(
            [shutil.which("make"), "setup", f"VENV={tmp_path / 'venv'}", *words],
            cwd=ROOT,
            env={"PATH": str(folder), "HOME": os.environ.get("HOME", "/")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (tmp_path / "venv" / ".installed").unlink()
        return log.read_text().splitlines(), done.stderr

    return run


def test_with_a_gpu_torch_comes_as_the_others_do(setup):
    called, said = setup("nvidia-smi", "uv")
    assert len(called) == 1
    assert called[0].endswith("install --disable-pip-version-check -c constraints.txt -e .[dev]")
    assert said == ""


def test_without_a_gpu_uv_finds_the_cpu_build(setup):
    called, _ = setup("uv")
    assert called[0].startswith("uv pip install --python")
    assert "--torch-backend cpu -c constraints.txt torch" in called[0]
    assert "-e .[dev]" in called[1]


@pytest.mark.parametrize("programs", [(), ("uv",)])
def test_where_no_cpu_build_is_within_reach_the_ordinary_one_is_taken_and_said(setup, programs):
    called, said = setup(*programs, uv_works=False)
    assert "-e .[dev]" in called[-1]
    assert "make setup TORCH_INDEX=URL" in said


def test_a_named_index_or_folder_of_cpu_builds_is_used(setup, tmp_path):
    called, _ = setup(TORCH_INDEX="https://example.org/cpu")
    assert called[0].endswith("-c constraints.txt --extra-index-url https://example.org/cpu torch")
    called, _ = setup(TORCH_INDEX=str(tmp_path))
    assert called[0].endswith(f"-c constraints.txt --find-links {tmp_path} torch")
    assert len(called) == 2


def test_a_torch_that_is_there_is_kept(setup):
    called, said = setup("uv", torch=True)
    assert len(called) == 1
    assert said == ""


def test_what_make_test_leaves_out_is_a_job_of_its_own():
    """Each marker that `make test` excludes is run whole by a target, and that target by the hosted CI file."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    jobs = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    targets = dict(re.findall(r"^(\w+): .*\n\t.* -m pytest .*-m (\"[^\"]*\"|\w+) \$\(ARGS\)$", makefile, re.MULTILINE))
    left_out = re.findall(r"not (\w+)", targets.pop("test"))
    assert left_out
    assert sorted(left_out) == sorted(targets.values())
    for target in (*targets, "readers"):
        assert f"run: make {target}\n" in jobs, f"no job runs `make {target}`"
    assert "run: make servers SERVERS=" in jobs
    assert re.search(r"run: sudo .* make integrations\n", jobs), "Slurm's daemons are started by root"

"""Rendered scripts: the same bytes each time, clean bash, values quoted, and runs that survive the loss of a host."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import make_run

from ultralong import __version__
from ultralong.launch import SCHEDULERS, check, launch
from ultralong.launch import rehearse as rehearsal
from ultralong.launch.rehearse import _Hosts, rehearse
from ultralong.launch.render import run_name
from ultralong.launch.sample import sample_run
from ultralong.training.config import DataSource, ParallelConfig, TrainConfig, preset
from ultralong.training.parallel import process_problem
from ultralong.utils import settings

GOLDEN = Path(__file__).parents[1] / "golden" / "launch"
HOSTILE = 'runs/it\'s; a "$(touch gone)" `run` \\ *\n#SBATCH --nodes=99'


def config(out: str = "runs/llama-1m", **changes) -> TrainConfig:
    values = {
        "model": "llama-1m",
        "data": (DataSource("rows"),),
        "steps": 120,
        "global_batch_size": 8,
        "save_every": 10,
        "parallel": ParallelConfig(context_parallel_size=8),
    }
    return TrainConfig(out=out, **(values | changes))


def scripts(folder: Path) -> list[Path]:
    return sorted([*folder.rglob("*.sh"), *folder.rglob("*.sbatch")])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_rendered_files_are_the_golden_ones(tmp_path, scheduler):
    written = launch(config(), 2, 8, scheduler, tmp_path)
    golden = {path.name: path.read_text() for path in (GOLDEN / scheduler).iterdir()}
    found = {path.name: path.read_text().replace(__version__, "VERSION") for path in written}
    if os.environ.get("ULTRALONG_WRITE_GOLDEN"):
        for name, text in found.items():
            (GOLDEN / scheduler / name).write_text(text)
    assert found == golden, "if the change is meant: ULTRALONG_WRITE_GOLDEN=1 pytest tests/launch, and read it"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("out", ["runs/plain", HOSTILE])
def test_scripts_are_clean(tmp_path, scheduler, nodes, out):
    launch(config(out), nodes, 8, scheduler, tmp_path)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    for path in scripts(tmp_path):
        assert os.access(path, os.X_OK)
        subprocess.run(["bash", "-n", path], check=True)
        done = subprocess.run([shellcheck, "--severity=style", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


# Without the control characters that PyYAML itself does not bring back, but with those that end a line.
PATHS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Zl", "Zp"]) | st.sampled_from("\n\t\r"), min_size=1
)


@given(out=PATHS)
def test_values_reach_bash_unchanged(tmp_path_factory, out):
    folder = tmp_path_factory.mktemp("launch")
    launch(config(out), 1, 8, "torchrun", folder)
    text = (folder / "run.sh").read_bytes().decode()
    values = text[text.index("# ---- Values") : text.index("# ---- Facts")]
    done = subprocess.run(
        ["bash", "-c", values + '\nprintf "%s" "$run_folder"'], capture_output=True, cwd=folder, check=True
    )
    assert done.stdout.decode() == out
    assert settings.load(TrainConfig, folder / "config.yaml") == config(out)


def test_no_value_of_the_user_becomes_a_directive(tmp_path):
    launch(config(HOSTILE), 2, 8, "slurm", tmp_path)
    lines = [line for line in (tmp_path / "job.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    before = (tmp_path / "job.sbatch").read_text().split("set -euo pipefail")[0]
    assert "#SBATCH --nodes=2" in lines
    # Slurm stops reading directives at the first command, which comes before any value.
    assert "nodes=99" not in before
    assert run_name(config(HOSTILE)) == "it-s-a-touch-gone-run-SBATCH---nodes-99"


@pytest.mark.parametrize(
    ("changes", "nodes", "gpus", "scheduler", "message"),
    [
        ({}, 2, 8, "lsf", "scheduler 'lsf' is unknown. Use one of: torchrun, slurm, accelerate"),
        ({}, 0, 8, "slurm", "nodes and gpus_per_node must be 1 or more"),
        (
            {},
            3,
            4,
            "slurm",
            "but this run has 12 processes.*--set parallel.context_parallel_size=6",
        ),
        (
            {"global_batch_size": 3},
            2,
            8,
            "slurm",
            r"global_batch_size \(3\) is not a multiple of 2 groups.*--set global_batch_size=4",
        ),
    ],
)
def test_what_cannot_run_is_refused_here(tmp_path, changes, nodes, gpus, scheduler, message):
    with pytest.raises(ValueError, match=message):
        launch(config(**changes), nodes, gpus, scheduler, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "missing", ["PYTHON", "WORKDIR", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NCCL_SOCKET_IFNAME"]
)
def test_a_missing_fact_of_the_site_is_named(tmp_path, missing):
    launch(config(), 2, 8, "torchrun", tmp_path)
    facts = {
        "PYTHON": "python",
        "WORKDIR": str(tmp_path),
        "NODE_RANK": "0",
        "MASTER_ADDR": "host",
        "MASTER_PORT": "1",
        "NCCL_SOCKET_IFNAME": "eth0",
        "PATH": os.environ["PATH"],
    }
    del facts[missing]
    done = subprocess.run([tmp_path / "run.sh"], env=facts, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"\n  {missing} is " in done.stderr
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    ("scheduler", "script", "named"),
    [
        ("torchrun", "run.sh", ["PYTHON", "WORKDIR", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NCCL_SOCKET_IFNAME"]),
        (
            "accelerate",
            "run.sh",
            ["PYTHON", "WORKDIR", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NCCL_SOCKET_IFNAME"],
        ),
        ("slurm", "submit.sh", ["PARTITION", "TIME_LIMIT", "PYTHON", "WORKDIR", "NCCL_SOCKET_IFNAME"]),
    ],
)
def test_all_missing_facts_are_named_at_once(tmp_path, scheduler, script, named):
    launch(config(), 2, 8, scheduler, tmp_path)
    env = {"PATH": os.environ["PATH"]}
    done = subprocess.run([tmp_path / script], env=env, capture_output=True, text=True, check=False)
    assert [line.split()[0] for line in done.stderr.splitlines()[1:]] == named


def test_files_that_are_there_are_not_replaced_silently(tmp_path):
    launch(config(), 2, 8, "slurm", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"holds submit.sh, job.sbatch, run.sh, config.yaml already.*--overwrite"):
        launch(config("other"), 2, 8, "slurm", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    launch(config("other"), 2, 8, "slurm", tmp_path, overwrite=True)
    assert settings.load(TrainConfig, tmp_path / "config.yaml").out == "other"


@pytest.mark.parametrize(
    ("steps", "asked", "saved"), [(9, 0, "auto"), (9, "auto", "auto"), (1000, 1000, 1000), (1000, 3, 3)]
)
def test_a_launched_run_saves_at_intervals(tmp_path, steps, asked, saved):
    launch(config(steps=steps, save_every=asked), 1, 8, "torchrun", tmp_path)
    assert settings.load(TrainConfig, tmp_path / "config.yaml").save_every == saved


@pytest.mark.parametrize("out", ["-runs", "--help/x", "runs/plain", "./here", "a folder"])
def test_the_newest_checkpoint_is_found_in_any_folder(tmp_path, out):
    launch(config(out), 1, 8, "torchrun", tmp_path / "scripts")
    for step in (5, 10):
        (tmp_path / out / "checkpoints" / f"step-{step:07}").mkdir(parents=True)
    text = (tmp_path / "scripts" / "run.sh").read_text()
    values = text[text.index("# ---- Values") : text.index("# ---- Facts")]
    newest = text[text.index("newest() {") : text.index("# ---- Start, and")]
    done = subprocess.run(
        ["bash", "-euc", f"{values}{newest}newest"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("checkpoints/step-0000010\n")
    assert done.stderr == ""


def words_of(folder: Path, scheduler: str) -> list[str]:
    """What the script hands to its launcher, as an interpreter that only prints its arguments sees it."""
    launch(config(), 2, 8, scheduler, folder / "scripts")
    (folder / "python").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "$SEEN"\n')
    (folder / "python").chmod(0o755)
    facts = {
        "PYTHON": str(folder / "python"), "WORKDIR": str(folder), "NODE_RANK": "1", "MASTER_ADDR": "host",
        "MASTER_PORT": "1234", "NCCL_SOCKET_IFNAME": "eth0", "LOCAL_ADDR": "host-b", "NUMA_BINDING": "node",
        "SEEN": str(folder / "seen"), "PATH": os.environ["PATH"],
    }  # fmt: skip
    subprocess.run([folder / "scripts" / "run.sh"], env=facts, check=True, stdout=subprocess.DEVNULL)
    return (folder / "seen").read_text().splitlines()


def test_torchrun_knows_every_option_that_is_passed(tmp_path):
    from torch.distributed.run import parse_args

    words = words_of(tmp_path, "torchrun")
    assert words[:2] == ["-m", "torch.distributed.run"]
    found = parse_args(words[2:])
    assert (found.training_script, found.module, found.nnodes, found.nproc_per_node) == ("ultralong", True, "2", "8")
    assert found.training_script_args == ["train", str(tmp_path / "scripts" / "config.yaml"), "--resume"]
    assert (found.rdzv_endpoint, found.rdzv_conf) == ("host:1234", "is_host=false,join_timeout=1800")


def test_accelerate_knows_every_option_that_is_passed(tmp_path):
    from accelerate.commands.launch import launch_command_parser

    words = words_of(tmp_path, "accelerate")
    assert words[:2] == ["-m", "accelerate.commands.launch"]
    found = launch_command_parser().parse_args(words[2:])
    assert (found.training_script, found.module, found.machine_rank) == ("ultralong", True, 1)
    assert found.training_script_args == ["train", str(tmp_path / "scripts" / "config.yaml"), "--resume"]


def test_slurm_options_take_their_values_after_an_equals_sign():
    """Slurm reads some values in no other way, and takes the next word for the program to start."""
    pieces = Path(sys.modules["ultralong.launch"].__file__).parent / "pieces"
    for name in ("job", "submit"):
        for line in (pieces / f"{name}.sh").read_text().replace("\\\n", " ").splitlines():
            if line.lstrip().startswith(("#", "echo", "fact")) or not any(
                tool in line for tool in ("srun ", "sbatch ", "squeue ", "scancel ", "options")
            ):
                continue
            for option in line.split():
                if option.startswith("--"):
                    assert "=" in option or option in ("--noheader", "--test-only"), option


@pytest.mark.parametrize(
    ("nodes", "advice", "more"),
    [
        (32, "parallel.context_parallel_size=256", ": more GPUs share a row"),
        (4, "global_batch_size=4", " (4 times the tokens in as many steps: lower steps)"),
    ],
)
def test_a_preset_on_any_number_of_hosts_starts_or_says_which_setting_does(tmp_path, nodes, advice, more):
    wanted = settings.load(TrainConfig, preset("llama31-8b-1m"))
    with pytest.raises(ValueError, match=re.escape(f"--set {advice}{more}")):
        launch(wanted, nodes, 8, "slurm", tmp_path / "refused")
    launch(settings.load(TrainConfig, preset("llama31-8b-1m"), [advice]), nodes, 8, "slurm", tmp_path / "scripts")


PRESETS = sorted(path.stem for path in preset("tiny-cpu").parent.glob("*.yaml") if not path.stem.startswith("demo-"))


@pytest.mark.parametrize("name", PRESETS)
def test_whatever_is_advised_starts(name):
    """Each preset on 1 to 64 hosts of 1, 4 and 8 GPUs: the settings after each --set are all that it takes."""
    for processes in sorted({nodes * gpus for nodes in (1, 2, 3, 4, 8, 16, 32, 64) for gpus in (1, 4, 8)}):
        said = process_problem(settings.load(TrainConfig, preset(name)), processes)
        for advice in [] if said is None else said.split("--set ")[1:]:
            words = re.findall(r"[\w.]+=\d+", advice)
            assert words, said
            assert process_problem(settings.load(TrainConfig, preset(name), words), processes) is None, said
        assert said is None or "--set" in said


def test_an_agent_that_does_not_stop_is_killed_with_its_ranks(tmp_path):
    launch(config(), 1, 8, "torchrun", tmp_path / "scripts")
    (tmp_path / "python").write_text(
        '#!/usr/bin/env bash\ntrap "" TERM\nsleep 300 &\necho $! > "$SEEN"\nwhile true; do wait; done\n'
    )
    (tmp_path / "python").chmod(0o755)
    facts = {
        "PYTHON": str(tmp_path / "python"), "WORKDIR": str(tmp_path), "SEEN": str(tmp_path / "seen"),
        "STOP_SECONDS": "1", "PATH": os.environ["PATH"],
    }  # fmt: skip
    with open(tmp_path / "log", "wb") as log:
        host = subprocess.Popen([tmp_path / "scripts" / "run.sh"], env=facts, stdout=log, stderr=log)
    wait_for(lambda: (tmp_path / "seen").exists() and (tmp_path / "seen").read_text().strip(), 30)
    host.terminate()
    assert host.wait(timeout=30) == 143
    assert "did not stop within 1 s" in (tmp_path / "log").read_text()
    rank = int((tmp_path / "seen").read_text())
    wait_for(lambda: not Path(f"/proc/{rank}/cmdline").exists() or not Path(f"/proc/{rank}/cmdline").read_bytes(), 10)


# ---- The check that --dry-run makes.


@pytest.fixture
def run(tmp_path, tiny_model, tiny_tokenizer):
    return make_run(tmp_path, tiny_model, tiny_tokenizer)


def found(folder: Path, config: TrainConfig, nodes: int = 1, gpus: int = 1) -> dict[str, tuple[bool, str]]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        return {finding.name: (finding.good, finding.text) for finding in check(config, nodes, gpus)}
    finally:
        os.chdir(before)


def test_a_sound_run_passes_every_check(tmp_path, run):
    findings = found(tmp_path, run)
    assert all(good for good, _ in findings.values()), findings
    checks = "processes model rows shapes targets window vocabulary attention folder weights disk resume"
    assert list(findings) == checks.split()
    assert "the run reads 8" in findings["rows"][1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("break_it", "name", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "model"), "weights", "no config.json"),
        (lambda folder: (folder / "model" / "model.safetensors").unlink(), "weights", "lacks 1 of its 1 weight files"),
        (lambda folder: (folder / "rows" / "manifest.json").unlink(), "rows", "no finished rows"),
    ],
)
def test_what_is_missing_is_found(tmp_path, run, break_it, name, message):
    break_it(tmp_path)
    good, text = found(tmp_path, run)[name]
    assert not good
    assert message in text


def test_a_window_that_is_too_short_is_found(tmp_path, run):
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 32}))
    good, text = found(tmp_path, run)["window"]
    assert (good, "Rows have 64 tokens" in text and "the model's window is 32" in text) == (False, True)


def test_rows_of_another_length_than_the_config_says_are_found(tmp_path, run):
    good, text = found(tmp_path, replace(run, length=1024))["rows"]
    assert (good, "The config says length: 1024" in text and "have 64 tokens" in text) == (False, True)


def test_heads_that_do_not_split_are_found(tmp_path, run):
    odd = settings.from_mapping(
        TrainConfig,
        settings.to_mapping(run)
        | {"parallel": {"context_parallel_size": 3, "scheme": "ulysses"}, "global_batch_size": 3},
    )
    good, text = found(tmp_path, odd, 1, 3)["attention"]
    assert (good, "can't split 4 query and 2 kv heads over 3" in text) == (False, True)


def test_a_full_disk_is_found(tmp_path, run, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    good, text = found(tmp_path, run)["disk"]
    assert (good, "Free some" in text) == (False, True)


@pytest.mark.parametrize(
    ("kernel", "cure"),
    [("flash4", "ultralong[flash4]"), ("flash3", "folder hopper"), ("flash2", "make flash"), ("auto", None)],
)
def test_a_kernel_without_its_package_is_found(tmp_path, run, monkeypatch, kernel, cure):
    monkeypatch.setattr("ultralong.launch.dry_run.find_spec", lambda name: None)
    config = replace(run, parallel=ParallelConfig(kernel=kernel))
    if cure is None:
        assert "kernel" not in found(tmp_path, config)
        return
    good, text = found(tmp_path, config)["kernel"]
    assert (good, cure in text) == (False, True)
    monkeypatch.setattr("ultralong.launch.dry_run.find_spec", lambda name: name)
    assert found(tmp_path, config)["kernel"] == (True, f"{kernel} is installed")


def test_dry_run_needs_no_gpu_and_starts_nothing(tmp_path, run, python):
    launch(run, 1, 2, "torchrun", tmp_path / "scripts")
    facts = {"PYTHON": python, "WORKDIR": str(tmp_path), "PATH": os.environ["PATH"]}

    def dry_run() -> subprocess.CompletedProcess[str]:
        words = [tmp_path / "scripts" / "run.sh", "--dry-run"]
        return subprocess.run(words, env=facts, capture_output=True, text=True, check=False)

    done = dry_run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ok   ") == 12
    assert not (tmp_path / "run").exists()
    shutil.rmtree(tmp_path / "rows")
    done = dry_run()
    assert (done.returncode, "WRONG rows" in done.stdout) == (1, True)


# ---- Slurm, played by small programs on the PATH.

SBATCH = '#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "$SEEN/sbatch"\n'
SCONTROL = """#!/usr/bin/env bash
if [[ "$1" == show ]]; then echo host-a; echo host-b; else echo "$*" >> "$SEEN/scontrol"; fi
"""
SQUEUE = '#!/usr/bin/env bash\necho "${JOB_STATE:-RUNNING}"\n'
SCANCEL = """#!/usr/bin/env bash
echo "$*" >> "$SEEN/scancel"
kill -TERM "$(cat "$SEEN/waiting")"
"""
SRUN = """#!/usr/bin/env bash
printf "%s\\n" "$@" > "$SEEN/srun"
env | grep -E '^(MASTER|RUN_ID)' | sort >> "$SEEN/srun"
if [[ -n "${NEW_CHECKPOINT:-}" ]]; then mkdir -p "$NEW_CHECKPOINT"; fi
trap 'exit 143' TERM
if [[ -n "${WAIT:-}" ]]; then echo $$ > "$SEEN/waiting"; sleep "$WAIT" & wait $!; fi
exit "${CODE:-0}"
"""


@pytest.fixture
def slurm(tmp_path):
    """A launched folder and an environment in which Slurm's commands only write down what they were asked."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "seen").mkdir()
    for name, text in (
        ("sbatch", SBATCH),
        ("scontrol", SCONTROL),
        ("squeue", SQUEUE),
        ("srun", SRUN),
        ("scancel", SCANCEL),
    ):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    launch(config(), 2, 8, "slurm", tmp_path / "scripts")
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SEEN": str(tmp_path / "seen"),
        "PARTITION": "gpu",
        "ACCOUNT": "an account",
        "TIME_LIMIT": "24:00:00",
        "PYTHON": sys.executable,
        "WORKDIR": str(tmp_path),
        "NCCL_SOCKET_IFNAME": "eth0",
        "LAUNCH_DIR": str(tmp_path / "scripts"),
        "SLURM_JOB_ID": "40007",
        "SLURM_JOB_NODELIST": "host-[a-b]",
        "SLURM_CPUS_ON_NODE": "96",
    }
    return tmp_path, environment


def start_job(folder: Path, environment: dict[str, str], **more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["bash", folder / "scripts" / "job.sbatch"], env=environment | more, cwd=folder, stdout=subprocess.DEVNULL
    )


def requeued(folder: Path) -> bool:
    seen = folder / "seen" / "scontrol"
    return seen.exists() and "requeue 40007" in seen.read_text()


def test_submit_passes_the_facts_of_the_site(slurm):
    folder, environment = slurm
    subprocess.run([folder / "scripts" / "submit.sh", "--nice"], env=environment, check=True)
    seen = (folder / "seen" / "sbatch").read_text().splitlines()
    assert {"--partition=gpu", "--account=an account", "--time=24:00:00", "--export=ALL"} < set(seen)
    assert seen[-2:] == ["--nice", str(folder / "scripts" / "job.sbatch")]


def test_a_dry_run_looks_for_files_where_the_job_will(slurm, tmp_path_factory):
    """From wherever it is started: paths of the config are relative to WORKDIR."""
    folder, environment = slurm
    python = folder / "python"
    python.write_text('#!/usr/bin/env bash\npwd > "$SEEN/place"\nexit "${CODE:-0}"\n')
    python.chmod(0o755)
    submit = [folder / "scripts" / "submit.sh", "--dry-run"]
    environment |= {"PYTHON": str(python)}
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    subprocess.run(submit, env=environment, cwd=elsewhere, check=True)
    assert (folder / "seen" / "place").read_text().strip() == str(folder)
    assert "--test-only" in (folder / "seen" / "sbatch").read_text().splitlines()
    (folder / "seen" / "sbatch").unlink()
    failed = subprocess.run(submit, env=environment | {"CODE": "1"}, cwd=elsewhere, check=False)
    assert failed.returncode == 1  # and Slurm is not asked
    assert not (folder / "seen" / "sbatch").exists()


def test_an_account_is_optional(slurm):
    folder, environment = slurm
    del environment["ACCOUNT"]
    subprocess.run([folder / "scripts" / "submit.sh"], env=environment, check=True)
    assert "--account" not in (folder / "seen" / "sbatch").read_text()


def test_a_job_starts_one_agent_a_host_at_one_meeting_place(slurm):
    folder, environment = slurm
    assert start_job(folder, environment).wait() == 0
    seen = (folder / "seen" / "srun").read_text()
    assert "--ntasks-per-node=1\n--cpus-per-task=96\n--cpu-bind=none\n--kill-on-bad-exit=1\nbash\n-c\n" in seen
    assert "MASTER_ADDR=host-a\nMASTER_PORT=20007\nRUN_ID=llama-1m-40007-0" in seen
    assert not requeued(folder)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"CODE": "1"}, (1, False)),
        ({"CODE": "1", "NEW_CHECKPOINT": "runs/llama-1m/checkpoints/step-0000010"}, (0, True)),
        (
            {"CODE": "1", "NEW_CHECKPOINT": "runs/llama-1m/checkpoints/step-0000010", "JOB_STATE": "CANCELLED"},
            (1, False),
        ),
        ({"CODE": "0", "NEW_CHECKPOINT": "runs/llama-1m/checkpoints/step-0000010"}, (0, False)),
    ],
)
def test_a_failed_job_goes_back_only_when_it_got_further(slurm, more, expected):
    folder, environment = slurm
    code = start_job(folder, environment, **more).wait()
    assert (code, requeued(folder)) == expected


def test_a_job_near_its_end_stops_its_processes_and_goes_back(slurm):
    folder, environment = slurm
    job = start_job(folder, environment, WAIT="120")
    wait_for(lambda: (folder / "seen" / "waiting").exists(), 60)
    started = time.perf_counter()
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=100) == 0
    assert time.perf_counter() - started < 90
    assert requeued(folder)
    assert (folder / "seen" / "scancel").read_text() == "--signal=TERM 40007\n"


@pytest.mark.parametrize("progress", [False, True])
def test_a_job_that_saves_nothing_is_requeued_a_few_times_only(slurm, progress):
    """Six allocations, each told to end while it runs; `progress` leaves a checkpoint in every one."""
    folder, environment = slurm
    for restart in range(6):
        (folder / "seen" / "waiting").unlink(missing_ok=True)
        more = {"NEW_CHECKPOINT": f"runs/llama-1m/checkpoints/step-{restart:07}"} if progress else {}
        job = start_job(folder, environment, WAIT="120", SLURM_RESTART_COUNT=str(restart), **more)
        wait_for(lambda: (folder / "seen" / "waiting").exists() and (folder / "seen" / "waiting").read_text(), 60)
        job.send_signal(signal.SIGUSR1)
        code = job.wait(timeout=60)
    times = (folder / "seen" / "scontrol").read_text().count("requeue")
    assert (times, code) == ((6, 0) if progress else (3, 143))


# ---- Two hosts, played by two agents on this machine: `ultralong launch rehearse`.


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, pytest.param(0, marks=pytest.mark.soak)])
def test_a_run_on_two_hosts_survives_the_loss_of_one(tmp_path, tiny_model, tiny_tokenizer, lost, python, monkeypatch):
    monkeypatch.setattr(rehearsal, "sys", SimpleNamespace(executable=python))
    run = make_run(
        tmp_path, tiny_model, tiny_tokenizer, steps=120, save_every=20, parallel=ParallelConfig(context_parallel_size=2)
    )
    found = rehearse(run, tmp_path, lose=lost, at_step=24, timeout=360)
    assert [record["step"] for record in found.after] == list(range(1, run.steps + 1))
    assert 20 <= found.saved < 120, "a host was to be lost in the middle"
    assert 0 <= found.repeated < 120
    # The steps that were computed again gave the same losses, to the last bit.
    assert [record["loss"] for record in found.before] == [r["loss"] for r in found.after[: len(found.before)]]
    assert [(event.host, event.what) for event in found.events][:4] == [
        (0, "started"), (1, "started"), (lost, "lost"), (lost, "started again")
    ]  # fmt: skip
    if lost == 1:  # host 0, which keeps the meeting place, stayed: nobody has to start a second time
        assert not re.search(r"attempt \d|DistStoreError|exit code", "".join(found.logs)), "the hosts met too late"
    assert (tmp_path / "run" / "model" / "config.json").exists()
    written = {
        path.relative_to(tmp_path / "scripts" / "logs").parts[0]
        for path in (tmp_path / "scripts" / "logs").rglob("stderr.log")
    }
    assert written == {"node-0", "node-1"}
    with pytest.raises(ValueError, match="holds a run already"):
        rehearse(run, tmp_path)


def test_nobody_takes_the_meeting_place_of_a_rehearsal_before_its_hosts_do(tmp_path, python, monkeypatch):
    """Hosts that find it taken start again and again; the check before takes seconds."""
    monkeypatch.setattr(rehearsal, "sys", SimpleNamespace(executable=python))

    def start(self, host, what):
        with socket.socket() as other:
            other.bind(("", self.port))

    monkeypatch.setattr(_Hosts, "start", start)
    with pytest.raises(OSError, match="in use"):
        rehearse(sample_run(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hosts": 1}, "two hosts or more"),
        ({"lose": 2}, "one of them to lose"),
        ({"at_step": 120}, "choose one from 15 .* to 119"),
        ({"at_step": 3}, "lost at step 3"),
    ],
)
def test_a_rehearsal_that_could_show_nothing_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        rehearse(sample_run(tmp_path), tmp_path, **options)
    assert not (tmp_path / "scripts").exists()


def test_the_sample_of_a_rehearsal_passes_every_check(tmp_path):
    wanted = sample_run(tmp_path)
    findings = found(tmp_path, wanted, nodes=2)
    assert all(good for good, _ in findings.values()), findings
    with pytest.raises(ValueError, match="there already"):
        sample_run(tmp_path)


def test_a_rehearsal_of_a_run_that_cannot_start_says_why_before_hosts_try(tmp_path):
    run = replace(sample_run(tmp_path / "made"), model="nowhere/here")
    with pytest.raises(ValueError, match=r"cannot start in .*relative\. .*model: .*nowhere/here"):
        rehearse(run, tmp_path / "place")
    assert not list((tmp_path / "place").glob("host-*.log"))


def test_a_rehearsal_whose_hosts_all_stop_does_not_wait(tmp_path):
    played = [subprocess.Popen(["false"]) for _ in range(2)]
    stage = _Hosts(tmp_path, 1, time.monotonic(), lambda text: None, dict(enumerate(played)))
    with pytest.raises(RuntimeError, match="All hosts stopped"):
        stage.wait(lambda: False, 60)
    with pytest.raises(RuntimeError, match="Waited 0 s"):
        stage.wait(lambda: False, 0)

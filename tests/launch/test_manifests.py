"""Manifests: accepted by the projects' own readers, values as data, the same run.sh reached with what it asks for."""

import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from test_launch import GOLDEN, HOSTILE, config

from ultralong import __version__
from ultralong.launch import launch
from ultralong.launch.manifests import FACTS, MANIFEST_FILES, kubernetes_name, named_values
from ultralong.training.config import TrainConfig
from ultralong.utils.settings import from_mapping, override, to_mapping

SITE = {
    "skypilot": {"image": "lab/ultralong:1", "accelerator": "H200", "volume": "data", "workdir": "/data"},
    "trainjob": {"image": "lab/ultralong:1", "namespace": "lab", "volume": "data", "workdir": "/data"},
    "jobset": {"image": "lab/ultralong:1", "namespace": "lab", "volume": "data", "workdir": "/data"},
}
TARGETS = list(MANIFEST_FILES)


def render(folder: Path, target: str, nodes: int = 2, out: str = "runs/llama-1m", **more: str) -> dict:
    """The rendered manifest without the scripts that it carries."""
    site = SITE[target] | ({"interface": "eth0"} if nodes > 1 else {}) | more
    written = launch(config(out), nodes, 8, target, folder, site=site)
    assert [file.name for file in written] == [MANIFEST_FILES[target], "run.sh", "config.yaml", "Containerfile"]
    return list(yaml.safe_load_all(written[0].read_text(encoding="utf-8")))[-1]


def started(target: str, manifest: dict) -> tuple[list[str], dict[str, str]]:
    """What a host is started with: the command, and its variables as the cluster's controller would complete them."""
    if target == "skypilot":
        given = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
        return ["bash", "-c", manifest["run"]], manifest["envs"] | given
    if target == "trainjob":
        trainer = manifest["spec"]["trainer"]
        given = {"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "job-node-0-0.job", "PET_NNODES": "2", "PET_MASTER_PORT": "1"}
        return trainer["command"], {item["name"]: item["value"] for item in trainer["env"]} | given
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return container["command"], {item["name"]: item.get("value", "1") for item in container["env"]}


@pytest.mark.parametrize("target", TARGETS)
def test_manifests_are_the_golden_ones(tmp_path, target):
    render(tmp_path, target)
    found = (tmp_path / MANIFEST_FILES[target]).read_text(encoding="utf-8").replace(__version__, "VERSION")
    golden = GOLDEN / target / MANIFEST_FILES[target]
    if os.environ.get("ULTRALONG_WRITE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(found, encoding="utf-8")
    assert found == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("target", "first"),
    [("skypilot", "10.0.0.1"), ("trainjob", "job-node-0-0.job"), ("jobset", "llama-1m-host-0-0.llama-1m")],
)
def test_a_host_starts_torchrun_with_its_number_and_the_first_hosts_address(tmp_path, target, first):
    manifest = render(tmp_path / "job", target, workdir=str(tmp_path))
    (tmp_path / "python").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$NODE_RANK" "$@" > "$WORKDIR/seen"\n')
    (tmp_path / "python").chmod(0o755)
    command, variables = started(target, manifest)
    command = [word.replace("/etc/ultralong", shlex.quote(str(tmp_path / "job"))) for word in command]
    variables |= {"PYTHON": str(tmp_path / "python"), "PATH": os.environ["PATH"]}
    subprocess.run(command, env=variables, cwd=tmp_path / "job", check=True, stdout=subprocess.DEVNULL)
    rank, *words = (tmp_path / "seen").read_text().splitlines()
    assert rank == "1"
    assert words[words.index("--rdzv-endpoint") + 1] == f"{first}:29500"
    assert words[words.index("--nproc-per-node") + 1] == "8"
    assert list(tmp_path.glob("logs-llama-1m")), "logs lie where all hosts see them"


@pytest.mark.parametrize("target", ["trainjob", "jobset"])
def test_pods_find_the_rendered_scripts(tmp_path, target):
    render(tmp_path, target)
    scripts = next(yaml.safe_load_all((tmp_path / MANIFEST_FILES[target]).read_text(encoding="utf-8")))
    assert scripts["metadata"] == {"name": "llama-1m-scripts", "namespace": "lab"}
    assert scripts["data"] == {name: (tmp_path / name).read_text() for name in ("run.sh", "config.yaml")}


@pytest.mark.parametrize("target", TARGETS)
def test_values_stay_data(tmp_path, target):
    hostile = "/a: b\n- c #'\"$(touch gone) \u2028*"
    manifest = render(tmp_path, target, out=HOSTILE, workdir=hostile)
    variables = started(target, manifest)[1]
    assert variables["WORKDIR"] == (hostile if target == "skypilot" else hostile.replace("$(", "$$("))
    assert manifest.get("name", manifest.get("metadata", {}).get("name")) == "it-s-a-touch-gone-run-sbatch-nodes-99"


@pytest.mark.parametrize("target", TARGETS)
def test_all_missing_facts_are_named_at_once(tmp_path, target):
    with pytest.raises(ValueError, match="as --site NAME=VALUE") as refused:
        launch(config(), 2, 8, target, tmp_path / "out", site={"colour": "red"})
    assert all(f" {name}=... is " in str(refused.value) for name in [*FACTS[target], "interface", "colour"])
    assert not (tmp_path / "out").exists()
    render(tmp_path, target, nodes=1)  # one host needs no network interface
    with pytest.raises(ValueError, match=f"holds {MANIFEST_FILES[target]}, run.sh.*--overwrite"):
        render(tmp_path, target)
    with pytest.raises(ValueError, match="start with a slash"):
        render(tmp_path, target, workdir="data")


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_whose_folder_a_container_would_lose_is_refused(tmp_path, target):
    with pytest.raises(ValueError, match=r"out \(/scratch/run\) is not inside workdir=/data"):
        render(tmp_path / "a", target, out="/scratch/run")
    with pytest.raises(ValueError, match=r"out \(\.\./run\) is not inside"):
        render(tmp_path / "a", target, out="../run")
    assert not (tmp_path / "a").exists()
    render(tmp_path / "b", target, out="/data/runs/x")
    with pytest.warns(UserWarning, match=r"model \(/models/x\).*the image has to hold it"):
        launch(config(model="/models/x"), 1, 8, target, tmp_path / "c", site=SITE[target])


def test_facts_are_read_from_words():
    assert named_values(["image=a:b=c", "volume=d"]) == {"image": "a:b=c", "volume": "d"}
    for words in (["image"], ["=a"], ["image="], ["image=a", "image=b"]):
        with pytest.raises(ValueError, match="takes NAME=VALUE"):
            named_values(words)


def test_scripts_take_no_facts_of_the_site(tmp_path):
    with pytest.raises(ValueError, match="slurm takes no --site"):
        launch(config(), 2, 8, "slurm", tmp_path, site={"image": "a"})


@pytest.mark.parametrize(
    ("name", "made"), [("Llama_1M.x", "llama-1m-x"), ("8b", "run-8b"), ("-", "run"), ("a" * 60, "a" * 40)]
)
def test_names_are_what_kubernetes_takes(name, made):
    assert kubernetes_name(name) == made


def test_the_container_installs_the_pins_of_the_clone(tmp_path):
    render(tmp_path, "jobset")
    lines = (tmp_path / "Containerfile").read_text().splitlines()
    root = Path(__file__).parents[2]
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert all((root / name).exists() for name in copied), copied
    assert "constraints.txt" in copied
    installs = [line for line in lines if "pip install" in line]
    assert len(installs) == 2
    assert all("-c constraints.txt" in line or "-c pins.txt" in line for line in installs)


def recipe_of(folder: Path, words: str) -> str:
    """The container recipe of the run of these tests with other settings."""
    run = from_mapping(TrainConfig, override(to_mapping(config()), words.split(), TrainConfig))
    launch(run, 2, 8, "jobset", folder, site=SITE["jobset"] | {"interface": "eth0"})
    return (folder / "Containerfile").read_text()


@pytest.mark.parametrize(
    ("words", "packages"),
    [
        ("", "'.[data]'"),
        ("optimizer.state_precision=8bit parallel.kernel=flash4", "'.[data,optim,flash4]'"),
        ("lora.rank=8 trackers=[prometheus,tensorboard,comet_ml,all]", "'.[data,lora,serve]' tensorboard comet-ml"),
        ("lora.rank=8 lora.base=nf4 parallel.fsdp_shard_degree=16", "'.[data,lora,optim]'"),
    ],
)
def test_the_container_holds_what_the_config_asks_for(tmp_path, words, packages):
    text = recipe_of(tmp_path, words)
    assert f" && pip install -c pins.txt {packages} \\\n" in text
    assert not {"PACKAGES", "# WHY", "# BUILT"} & {line.strip() for line in text.splitlines()}
    (said,) = [line for line in text.splitlines() if "config.yaml asks for" in line]
    assert ("nothing besides data" in said) is (packages == "'.[data]'")
    for word in words.split():
        name, _, value = word.partition("=")
        if name in ("optimizer.state_precision", "parallel.kernel"):
            assert f"{name}: {value}" in said
    assert "nvidia/cuda:13.0.2-base-" in text


def test_extras_of_the_container_are_extras_of_the_package(tmp_path):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    text = recipe_of(
        tmp_path, "lora.rank=8 optimizer.state_precision=8bit parallel.kernel=flash4 trackers=[prometheus]"
    )
    named = re.search(r"'\.\[(.*)\]'", text)[1].split(",")
    assert named == ["data", "lora", "optim", "flash4", "serve"]
    assert set(named) <= set(project["optional-dependencies"])


def test_pins_in_comments_become_pins(tmp_path):
    """The recipe's own command over the clone's constraints."""
    text = recipe_of(tmp_path, "parallel.kernel=flash4")
    command = re.search(r"RUN (sed .*) > pins.txt", text)[1]
    root = Path(__file__).parents[2]
    pins = subprocess.run(["bash", "-c", command], cwd=root, capture_output=True, text=True, check=True).stdout
    found = {line.split("==")[0] for line in pins.splitlines() if "==" in line and not line.startswith("#")}
    assert {"torchao", "flash-attn-4", "torch"} <= found
    assert "flash-attn" not in found  # which is built, against the torch that is there


def test_kernels_without_a_wheel_are_built_or_named(tmp_path):
    built = recipe_of(tmp_path / "2", "parallel.kernel=flash2")
    assert "ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04" in built
    assert built.index("pip install -c pins.txt") < built.index("pip install --no-build-isolation")
    command = re.search(r"(sed -n .*constraints.txt)\)", built)[1]
    root = Path(__file__).parents[2]
    pin = subprocess.run(["bash", "-c", command], cwd=root, capture_output=True, text=True, check=True).stdout
    assert pin.startswith("flash-attn==")
    assert "flash3 has no package" in recipe_of(tmp_path / "3", "parallel.kernel=flash3")


# ---- The projects' own readers, where they are installed.


def test_a_reader_of_container_recipes_takes_ours(tmp_path):
    if (lint := shutil.which("dockerfile-utils")) is None:
        pytest.skip("needs npm install dockerfile-utils, and its folder in PATH")
    recipe = tmp_path / "Containerfile"
    for number, kernel in enumerate(("auto", "flash4", "flash2", "flash3")):
        recipe.write_text(recipe_of(tmp_path / str(number), f"parallel.kernel={kernel}"))
        assert subprocess.run([lint, "lint", recipe], check=False).returncode == 0, kernel
    recipe.write_text(recipe.read_text().replace("WORKDIR", "WORKDIRECTORY"))
    assert subprocess.run([lint, "lint", recipe], check=False).returncode == 1


@pytest.mark.parametrize(
    ("target", "model"), [("trainjob", "TrainerV1alpha1TrainJob"), ("jobset", "JobsetV1alpha2JobSet")]
)
@pytest.mark.parametrize("nodes", [1, 4])
def test_kubeflows_models_know_every_field(tmp_path, target, model, nodes):
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs pip install kubeflow-trainer-api")
    manifest = render(tmp_path, target, nodes)
    assert getattr(models, model).from_dict(manifest).to_dict() == manifest  # which drops what it does not know


@pytest.mark.parametrize("nodes", [1, 4])
def test_skypilot_reads_the_task(tmp_path, monkeypatch, nodes):
    sky = pytest.importorskip("sky", reason="needs pip install skypilot")
    render(tmp_path, "skypilot", nodes)
    monkeypatch.chdir(tmp_path)
    task = sky.Task.from_yaml("task.yaml")
    (resources,) = task.resources
    assert (task.num_nodes, resources.accelerators, task.volumes) == (nodes, {"H200": 8}, {"/data": "data"})

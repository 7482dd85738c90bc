"""Manifests for clusters that start containers: a SkyPilot task, Kubeflow Trainer's TrainJob, and a plain JobSet.

Each starts the same `run.sh` on every host. Values reach it through the environment, so that none is part of a command.
A manifest is data and has no place for variables of a shell: what only the site knows is given as options instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from ultralong.utils.files import write_text

Content: TypeAlias = dict[str, Any]
PORT = "29500"  # a pod, and a machine that SkyPilot starts, has all its ports for itself
SCRIPTS = "/etc/ultralong"  # where a pod finds run.sh and config.yaml
STOP_SECONDS = 100  # a pod that is told to stop saves first; the kubelet kills it GRACE_SECONDS after it was told
GRACE_SECONDS = 120
RESTARTS = 10  # of the whole job, after a host was lost; run.sh counts the failures of the run itself

POD_FACTS = {
    "image": "the container image with ultralong in it, such as one built with the Containerfile",
    "namespace": "the Kubernetes namespace of the job",
    "volume": "the PersistentVolumeClaim with model and rows, which all hosts can write to",
    "workdir": "where that volume is mounted: the folder that the paths in config.yaml are relative to",
}
SKY_FACTS = {
    "accelerator": "the GPU by SkyPilot's name, such as H200; the command sky gpus list shows them",
    "image": "the container image with ultralong in it, such as one built with the Containerfile",
    "volume": "the SkyPilot volume with model and rows, which all hosts can write to",
    "workdir": "where that volume is mounted: the folder that the paths in config.yaml are relative to",
}
FACTS = {"skypilot": SKY_FACTS, "trainjob": POD_FACTS, "jobset": POD_FACTS}
SEVERAL_HOSTS = {"interface": "the network interface that joins the hosts, such as eth0"}
# What has a value that suits most sites.
OPTIONAL = {
    "skypilot": {"python": "python", "infra": ""},
    "trainjob": {"python": "python", "gpu_resource": "nvidia.com/gpu", "runtime": "torch-distributed"},
    "jobset": {"python": "python", "gpu_resource": "nvidia.com/gpu"},
}


def site_facts(target: str, nodes: int, given: Mapping[str, str]) -> dict[str, str]:
    """The facts of the site that a manifest needs, complete.

    Args:
        target: "skypilot", "trainjob" or "jobset".
        nodes: Hosts.
        given: Facts by name; see `FACTS` and `OPTIONAL`.

    Raises:
        ValueError: Facts are missing or unknown, all named at once, or a folder does not start with a slash.
    """
    needed = FACTS[target] | (SEVERAL_HOSTS if nodes > 1 else {})
    known = {*FACTS[target], *SEVERAL_HOSTS, *OPTIONAL[target]}
    problems = [f"{name}=... is not known (known: {', '.join(sorted(known))})" for name in sorted(set(given) - known)]
    problems += [f"{name}=... is {what}" for name, what in needed.items() if not given.get(name)]
    if not given.get("workdir", "/").startswith("/"):
        problems.append(f"workdir={given['workdir']} has to start with a slash")
    if problems:
        raise ValueError(f"{target} needs facts of your site, given as --site NAME=VALUE ...: {'; '.join(problems)}.")
    return {**OPTIONAL[target], **given}


def named_values(words: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE words as a mapping.

    Raises:
        ValueError: A word has no name, no value or no equals sign, or a name comes twice.
    """
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value) or name in found:
            raise ValueError(f"--site takes NAME=VALUE, each name once, such as image=ultralong:1; found {word!r}.")
        found[name] = value
    return found


def write_manifest(
    target: str, folder: Path, name: str, what: str, shape: tuple[int, int], site: Mapping[str, str]
) -> None:
    """Write the manifest of a target beside `run.sh` and `config.yaml`, which are in the folder already.

    Args:
        target: "skypilot", "trainjob" or "jobset".
        folder: The folder of the scripts.
        name: Name of the run.
        what: One line about the run.
        shape: Hosts, and GPUs of each.
        site: What `site_facts` gave.
    """
    makers: dict[str, Callable[..., list[Content]]] = {"skypilot": _task, "trainjob": _train_job, "jobset": _job_set}
    file = MANIFEST_FILES[target]
    documents = makers[target](name, *shape, site)
    if target != "skypilot":
        documents.insert(0, _config_map(name, folder, site))
    note = f"# {what}\n# {HOW[target]}\n# To change it, render it again (ultralong launch).\n"
    text = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    write_text(folder / file, note + text)


MANIFEST_FILES = {"skypilot": "task.yaml", "trainjob": "trainjob.yaml", "jobset": "jobset.yaml"}
HOW = {
    "skypilot": "In this folder: sky jobs launch task.yaml (which recovers lost hosts), or sky launch task.yaml.",
    "trainjob": "kubectl apply --server-side -f trainjob.yaml; needs Kubeflow Trainer 2 in the cluster.",
    "jobset": "kubectl apply --server-side -f jobset.yaml; needs the JobSet controller in the cluster.",
}


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, as people read scripts."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def kubernetes_name(name: str) -> str:
    """A run's name as Kubernetes takes it, short enough for the names that are made from it."""
    found = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
    return found if found[:1].isalpha() else f"run-{found}".strip("-")


def _variables(name: str, nodes: int, site: Mapping[str, str]) -> dict[str, str]:
    """What run.sh asks for, besides the number of the host and the address of the first."""
    found = {"PYTHON": site["python"], "WORKDIR": site["workdir"]}
    found["LOGS"] = f"{site['workdir'].rstrip('/')}/logs-{name}"
    if nodes > 1:
        found |= {"MASTER_PORT": PORT, "NCCL_SOCKET_IFNAME": site["interface"]}
    return found


def _task(name: str, nodes: int, gpus_per_node: int, site: Mapping[str, str]) -> list[Content]:
    task = kubernetes_name(name)
    resources: Content = {
        "accelerators": f"{site['accelerator']}:{gpus_per_node}",
        "image_id": f"docker:{site['image']}",
        "job_recovery": {"max_restarts_on_errors": 3},
    }
    if site["infra"]:
        resources["infra"] = site["infra"]
    if nodes > 1:
        resources["network_tier"] = "best"
    run = (
        "# SkyPilot has copied this folder to every host and starts there.\n"
        'export NODE_RANK="$SKYPILOT_NODE_RANK"\n'
        "MASTER_ADDR=\"${SKYPILOT_NODE_IPS%%$'\\n'*}\"\n"
        "export MASTER_ADDR\n"
        "exec bash ./run.sh\n"
    )
    return [
        {
            "name": task,
            "num_nodes": nodes,
            "resources": resources,
            "workdir": ".",
            "volumes": {site["workdir"]: site["volume"]},
            "envs": _variables(task, nodes, site),
            "run": run,
        }
    ]


def _config_map(name: str, folder: Path, site: Mapping[str, str]) -> Content:
    """run.sh and config.yaml, as pods see them."""
    files = {file: (folder / file).read_bytes().decode() for file in ("run.sh", "config.yaml")}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{kubernetes_name(name)}-scripts", "namespace": site["namespace"]},
        "data": files,
    }


def _mounts(name: str, site: Mapping[str, str]) -> tuple[list[Content], list[Content]]:
    """Volumes of a pod, and where its container sees them."""
    volumes: list[Content] = [
        {"name": "scripts", "configMap": {"name": f"{name}-scripts"}},
        {"name": "data", "persistentVolumeClaim": {"claimName": site["volume"]}},
        # NCCL and the loading of rows share memory; a container has 64 MiB of it by default.
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
    ]
    mounts: list[Content] = [
        {"name": "scripts", "mountPath": SCRIPTS, "readOnly": True},
        {"name": "data", "mountPath": site["workdir"]},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
    ]
    return volumes, mounts


def _pod_variables(name: str, nodes: int, site: Mapping[str, str]) -> list[Content]:
    values = {**_variables(name, nodes, site), "STOP_SECONDS": str(STOP_SECONDS)}
    # Kubernetes would put a variable's value in the place of $(NAME).
    return [{"name": key, "value": value.replace("$(", "$$(")} for key, value in values.items()]


def _train_job(name: str, nodes: int, gpus_per_node: int, site: Mapping[str, str]) -> list[Content]:
    job = kubernetes_name(name)
    volumes, mounts = _mounts(job, site)
    # Trainer gives each host its number and the address of the first as torchrun's PET_ variables.
    command = f'export NODE_RANK="$PET_NODE_RANK" MASTER_ADDR="$PET_MASTER_ADDR"\nexec bash {SCRIPTS}/run.sh\n'
    pod = {
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "volumes": volumes,
        "containers": [{"name": "node", "volumeMounts": mounts}],
    }
    patch = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    spec = {
        "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": site["runtime"]},
        "trainer": {
            "image": site["image"],
            "command": ["bash", "-c", command],
            "numNodes": nodes,
            "numProcPerNode": gpus_per_node,
            "resourcesPerNode": _gpus(gpus_per_node, site),
            "env": _pod_variables(job, nodes, site),
        },
        "runtimePatches": [
            {
                "manager": "ultralong.launch/render",
                "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [patch]}}},
            }
        ],
    }
    metadata = {"name": job, "namespace": site["namespace"]}
    return [{"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": metadata, "spec": spec}]


def _job_set(name: str, nodes: int, gpus_per_node: int, site: Mapping[str, str]) -> list[Content]:
    job = kubernetes_name(name)
    volumes, mounts = _mounts(job, site)
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    variables: list[Content] = [
        *_pod_variables(job, nodes, site),
        {"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        {"name": "MASTER_ADDR", "value": f"{job}-host-0-0.{job}"},
    ]
    container = {
        "name": "node",
        "image": site["image"],
        "command": ["bash", f"{SCRIPTS}/run.sh"],
        "env": variables,
        "resources": _gpus(gpus_per_node, site),
        "volumeMounts": mounts,
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [container],
        "volumes": volumes,
    }
    # A pod that ends fails its Job at once, and the JobSet then starts all of them again: they resume together.
    hosts = {
        "parallelism": nodes,
        "completions": nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"spec": pod},
    }
    spec = {
        "failurePolicy": {"maxRestarts": RESTARTS, "restartStrategy": "BlockingRecreate"},
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": job},
        "replicatedJobs": [{"name": "host", "replicas": 1, "template": {"spec": hosts}}],
    }
    metadata = {"name": job, "namespace": site["namespace"]}
    return [{"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}]


def _gpus(number: int, site: Mapping[str, str]) -> Content:
    return {name: {site["gpu_resource"]: number} for name in ("requests", "limits")}

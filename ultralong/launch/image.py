"""The recipe of the image that manifests start, with the optional packages that a run's config asks for."""

from __future__ import annotations

from importlib import resources

from ultralong.training.config import TrainConfig
from ultralong.training.watch.trackers import EXTRA, PROMETHEUS

# Kernels that are compiled while they are installed, against the torch that is there; what says how.
BUILT = {
    "flash2": (
        "# parallel.kernel: flash2 is compiled here, which takes long: MAX_JOBS limits processes, and so memory.\n"
        "RUN pip install ninja packaging psutil setuptools wheel \\\n"
        " && MAX_JOBS=4 pip install --no-build-isolation \"$(sed -n 's/^#\\(flash-attn==\\)/\\1/p' constraints.txt)\""
    ),
    "flash3": (
        "# parallel.kernel: flash3 has no package: add lines here that build it from the folder hopper of the\n"
        "# flash-attention repository. Without it the run stops at its start and says so."
    ),
}
WITH_COMPILER = "nvidia/cuda:13.0.2-devel-ubuntu24.04"  # nvcc


def run_extras(config: TrainConfig) -> dict[str, str]:
    """Extras of this package that a run needs besides `data`, and the setting that each is for."""
    found = {}
    if config.lora.on:
        found["lora"] = "lora.rank"
    if config.lora.on and config.lora.base == "nf4":
        found["optim"] = "lora.base: nf4"
    if config.optimizer.state_precision == "8bit":
        found["optim"] = "optimizer.state_precision: 8bit"
    if config.parallel.kernel == "flash4":
        found["flash4"] = "parallel.kernel: flash4"
    if PROMETHEUS in config.trackers:
        found[EXTRA] = f"trackers: {PROMETHEUS}"
    return found


def containerfile(config: TrainConfig) -> str:
    """The recipe for a run: what its manifest's image has to hold."""
    text = resources.files("ultralong.launch").joinpath("pieces", "Containerfile").read_text(encoding="utf-8")
    extras = run_extras(config)
    packages = [f"'.[{','.join(['data', *extras])}]'"]
    packages += [name.replace("_", "-") for name in config.trackers if name not in (PROMETHEUS, "all")]
    why = [f"{name} for {setting}" for name, setting in extras.items()]
    why += [f"{name} for trackers" for name in packages[1:]]
    built = BUILT.get(config.parallel.kernel, "")
    if built.startswith("# parallel.kernel: flash2"):
        text = text.replace(text.split("ARG BASE=")[1].splitlines()[0], WITH_COMPILER)
    text = text.replace("PACKAGES", " ".join(packages))
    text = text.replace(
        "# WHY", "# What the run's config.yaml asks for: " + ("; ".join(why) or "nothing besides data.")
    )
    return text.replace("# BUILT\n", f"{built}\n" if built else "")

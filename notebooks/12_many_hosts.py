# %% [markdown]
# # 12. Will it start on 32 GPUs, and survive losing one?
#
# A run on four hosts costs a hundred times more than a run on this machine, and most of what stops it has nothing to do
# with the model: a number that does not divide another, a variable that nobody set, a disk that is full, a host that
# loses power in the night. All of that can be found, and most of it rehearsed, before the first GPU is allocated.
#
# Here you lay a run out over hosts, render its scripts, read them, break the run in six ways and let the check find
# each. Then this machine plays two hosts: you kill one and watch the run come back. At the end you hold the folder that
# a real cluster takes.
#
# ### At a glance
#
# | | |
# |---|---|
# | time on CPU | 47 s, two idle cores (measured November 2026) |
# | reading and doing | 30 and 30 minutes |
# | memory | 1.5 GB |
# | downloads, cost | none |
# | a GPU, two GPUs add | nothing: the same scripts start on them |
# | a cluster adds | the real thing: `PRESET`, `HOSTS`, `GPUS`, then `submit.sh` |
#
# **You will be able to**
# * choose hosts, GPUs for a row, shards and rows of a step so that a run starts;
# * read a launch script, and say which facts of your site it needs;
# * say what happens, second by second, when a host dies, and what it costs;
# * choose how often to save.
#
# **Needs:** a shell; what a rank is. **Before this:** [06_sequence_parallel](06_sequence_parallel.ipynb),
# [11_ablations](11_ablations.ipynb). Terms: [torchrun](https://docs.pytorch.org/docs/stable/elastic/run.html),
# [Slurm](https://slurm.schedmd.com/quickstart.html), [accelerate](https://huggingface.co/docs/accelerate),
# [FSDP](https://arxiv.org/abs/2304.11277).

# %% tags=["parameters"]
PRESET: str = "llama31-8b-4m"  # the run that is exported; a preset's name or a YAML file, such as made/07/run.yaml
HOSTS: int = 4  # hosts of the exported run
GPUS: int = 8  # GPUs of each of them
PRICE: float = 2.5  # of one GPU-hour, in any currency
STEPS: int = 48  # steps of the rehearsed run
LOSE: int = 1  # the host of the rehearsal that is killed: 0 or 1
SEED: int = 0  # of the rehearsed run
OUT: str = ""  # folder for what the notebook hands on; empty: a temporary one
INTERACTIVE: bool = True  # False adds a still to each figure, for pages without scripts

# %%
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import yaml
from transformers.utils import logging

from ultralong import figures
from ultralong.course import check, predict, reveal
from ultralong.figures.parallel import rank_timeline
from ultralong.figures.play import play
from ultralong.launch import SCHEDULERS, launch
from ultralong.launch import check as preflight
from ultralong.launch.rehearse import rehearse
from ultralong.launch.sample import sample_run
from ultralong.notebook_tools import output_folder, store
from ultralong.training.config import ParallelConfig, TrainConfig, preset
from ultralong.training.parallel import process_problem, sequence_groups
from ultralong.utils import settings

logging.set_verbosity_error()
logging.disable_progress_bar()
out = output_folder(OUT)
wanted = settings.load(TrainConfig, preset(PRESET))
print(f"{PRESET}: {wanted.steps} steps, {wanted.parallel}")

# %% [markdown]
# ## From a plan to a mesh
#
# Three numbers lay a run out. `context_parallel_size` GPUs share one row. `fsdp_shard_degree` GPUs share the
# parameters. All GPUs divided by the first give the *groups* that each read a row of their own, so a step takes at
# least as many rows. Groups are neighbours: as long as a row fits into one host, its traffic stays inside.
#
# Work one out. The preset's rows have 4,194,304 tokens and 32 GPUs share each, so a GPU holds 131,072 tokens of it. All
# 32 GPUs make one group, and a step may take one row. If 16 shared a row, each would hold 262,144, and a step would
# take two rows at least. More GPUs a row leave more memory on each; fewer leave less to exchange. The planner
# ([07](07_memory_and_the_trainer.ipynb)) says whether a choice fits; this notebook sees to it that it starts.

# %%
# 4 hosts of 8 GPUs, rows over 16 GPUs. How many rows does a step take at least?
predict("12.rows", ["1", "2", "4"], guess=None)

# %%
world = HOSTS * GPUS
sizes = [size for size in (1, 2, 4, 8, 16, 32) if size <= world and world % size == 0]


def mesh(size):
    """Hosts against GPUs; the number in a cell is the group, and so the row, that the GPU works on."""
    group_of = {rank: number for number, ranks in enumerate(sequence_groups(world, size)) for rank in ranks}
    cells = [[group_of[host * GPUS + gpu] for gpu in range(GPUS)] for host in range(HOSTS)]
    figure = figures.new_figure("", "GPU of the host", "", height=120 + 44 * HOSTS)
    scale = [[0.0, "#E8F1F8"], [1.0, "#0072B2"]]
    figure.add_heatmap(z=cells, y=[f"host {host}" for host in range(HOSTS)], text=cells, texttemplate="%{text}",
                       colorscale=scale, zmin=0, zmax=max(1, world - 1), showscale=False, xgap=3, ygap=3)
    return figure.update_yaxes(autorange="reversed")


meshes = [mesh(size) for size in sizes]
play(meshes, [f"{size} GPU{'s' * (size > 1)} a row" for size in sizes],
     "Hosts against GPUs, numbered by the row that each GPU works on: 32 rows with one GPU each, then fewer rows that "
     "cover a host, two hosts, and all of them.", stills=[0, len(sizes) // 2, len(sizes) - 1])

# %% tags=["check"]
for figure, size in zip(meshes, sizes):
    rows = {cell for line in figure.data[0].z for cell in line}
    fitting = replace(wanted, global_batch_size=len(rows), parallel=ParallelConfig(context_parallel_size=size))
    assert process_problem(fitting, world) is None, "a step of one row a group should start"
    assert len(rows) == 1 or process_problem(replace(fitting, global_batch_size=1), world), "one row was accepted"
sixteen = len(sequence_groups(32, 16))
reveal("12.rows", str(sixteen), "32 GPUs in groups of 16 read two rows at a time.")
print(f"ok: {len(sizes)} layouts, each accepted with one row a group and no fewer")


# %%
def my_mesh(hosts, gpus, tokens, most):  # (context_parallel_size, rows of a step)
    ...


check("12.mesh", my_mesh)

# %% [markdown]
# ## Render, and read
#
# `ultralong launch CONFIG --nodes 4 --gpus-per-node 8 --scheduler slurm --out DIR` writes the scripts. Whatever the run
# needs is in them. Whatever the *site* has (interpreter, network, account) is a required variable, named at the top and
# never guessed. Below the values a script is made of the same short pieces for all schedulers.
#
# * **torchrun**: `run.sh` on every host. One *agent* a host starts the processes and watches them. The agents meet at
#   `MASTER_ADDR:MASTER_PORT`; host 0 keeps the meeting place.
# * **Slurm**: `submit.sh`, once. It hands `job.sbatch` to the scheduler, which starts `run.sh` on every host it gives.
# * **accelerate**: `run.sh` on every host, through accelerate's launcher, for sites that are used to it.
# * **[SkyPilot](https://docs.skypilot.co)**, **[TrainJob](https://www.kubeflow.org/docs/components/trainer/)** and
#   **[JobSet](https://jobset.sigs.k8s.io)**: a manifest for a cluster that starts containers, with the same `run.sh`
#   inside and a `Containerfile` to build the image from. Such a cluster asks before it starts anything, so the site's
#   facts are given to `ultralong launch` as `--site NAME=VALUE`. The values below are made up; put yours into `SITE`.
#
# All of them end in the same command, `ultralong train config.yaml --resume`, so a run may change its scheduler between
# two starts.
#
# A config that does not divide over `HOSTS` x `GPUS` is changed by the cell: all GPUs then share one row. That happens
# to `run.yaml` of notebook 07, which was made for two GPUs.

# %%
shape = {"parallel": replace(wanted.parallel, context_parallel_size=world, fsdp_shard_degree=world),
         "global_batch_size": 1}
exported = wanted if process_problem(wanted, world) is None else replace(wanted, **shape)
written = {name: launch(exported, HOSTS, GPUS, name, out / "launch" / name, overwrite=True) for name in SCHEDULERS}
SITE = {"image": "registry.example/ultralong:1", "workdir": "/data", "volume": "long-context", "interface": "eth0"}
OF_CLUSTER = {"skypilot": {"accelerator": "H200"}, "trainjob": {"namespace": "training"},
              "jobset": {"namespace": "training"}}
for name, more in OF_CLUSTER.items():
    written[name] = launch(exported, HOSTS, GPUS, name, out / "launch" / name, overwrite=True, site=SITE | more)
for name, files in written.items():
    print(f"{name:10} start {files[0].name:14} all: {', '.join(file.name for file in files)}")
text = (out / "launch" / "slurm" / "run.sh").read_text()
parts = [part.splitlines() for part in text.split("# ---- ")[1:]]
for lines in parts:
    print(f"{len(lines):4} lines  {lines[0][:100]}")

# %%
facts = [line.split(maxsplit=2)[1:] for line in text.splitlines() if line.strip().startswith("fact ")]
for name, meaning in facts:
    print(f"{name:20} {meaning.strip().strip(chr(34))[:90]}")
lengths = {name: {"the manifest" if name in OF_CLUSTER and file == files[0] else file.name:
                  float(len(file.read_text().splitlines())) for file in files}
           for name, files in written.items()}
figures.show(figures.shares(lengths, "What is exported, in lines", x="lines"),
             "Stacked bars of the exported files' lines for torchrun, Slurm, accelerate and three kinds of manifests: "
             "run.sh is most of each.")

# %% [markdown]
# A script that a machine writes can still be wrong. [ShellCheck](https://www.shellcheck.net) reads shell scripts as a
# linter reads Python; `bash -n` only parses them. Both run here on everything that was exported.

# %% tags=["check"]
checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
scripts = [file for files in written.values() for file in files if file.suffix in (".sh", ".sbatch")]
for script in scripts:
    subprocess.run(["bash", "-n", script], check=True)
    if checker:
        found = subprocess.run([checker, "--severity=style", script], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout
manifests = {name: list(yaml.safe_load_all(written[name][0].read_text())) for name in OF_CLUSTER}
for name, parts_ in manifests.items():
    said = json.dumps(parts_)
    assert SITE["image"] in said, f"{name}: another image than the site's"
    assert SITE["volume"] in said, f"{name}: without the volume of model and rows"
print(f"ok: {len(scripts)} scripts parse" + (", and ShellCheck finds nothing in them" if checker else "") +
      f"; {len(manifests)} manifests read back as YAML")

# %% [markdown]
# ## Break it six ways
#
# Every script takes `--dry-run`: it checks config, mesh, model, rows and disk, needs no GPU and starts nothing. A check
# is worth what it finds. Here is a small run that is sound, and the same run broken in six ways, one at a time.
#
# Why six, and why by name? A run on many hosts that fails at its start prints the errors of all ranks at once, in any
# order, and most of them say only that a neighbour is gone. A check before the start names one cause in one line. Do it
# on one host, where it takes seconds; the scripts do it again before they start anything.

# %%
place = out / "rehearsal"
shutil.rmtree(place, ignore_errors=True)
run = replace(sample_run(place, STEPS, SEED), model=str(place / "model"), out=str(place / "run"))
run = replace(run, data=tuple(replace(source, rows=str(place / "rows")) for source in run.data))
sound = preflight(run, 2, 1)
for finding in sound:
    print(str(finding).replace(str(out), "OUT"))


# %%
def without(path):
    """The findings while a file is away."""
    path.rename(path.with_name(path.name + ".away"))
    try:
        return preflight(run, 2, 1)
    finally:
        path.with_name(path.name + ".away").rename(path)


def short_window():
    """The findings while the model says that its window is 32 tokens."""
    path = place / "model" / "config.json"
    kept = path.read_text()
    path.write_text(json.dumps(json.loads(kept) | {"max_position_embeddings": 32}))
    try:
        return preflight(run, 2, 1)
    finally:
        path.write_text(kept)


ulysses_of_3 = ParallelConfig(context_parallel_size=3, scheme="ulysses")
broken = {
    "weights": lambda: without(place / "model" / "model.safetensors"),
    "rows": lambda: without(place / "rows" / "manifest.json"),
    "window": short_window,
    "processes": lambda: preflight(replace(run, global_batch_size=3), 4, 1),
    "attention": lambda: preflight(replace(run, parallel=ulysses_of_3, global_batch_size=3), 3, 1),
    "rows ": lambda: preflight(replace(run, length=1024), 2, 1),
}
found = {}
for name, breaking in broken.items():
    found[name] = [finding for finding in breaking() if not finding.good]
    print("\n".join(str(finding).replace(str(out), "OUT") for finding in found[name] if finding.name == name.strip()))

# %% tags=["check"]
assert all(finding.good for finding in sound), "the sound run does not pass"
for name, findings in found.items():
    assert name.strip() in [finding.name for finding in findings], f"the check does not see broken {name}"
assert all(finding.good for finding in preflight(run, 2, 1)), "what was broken was not put back"
print(f"ok: the sound run passes {len(sound)} checks, and {len(found)} broken ones are each found by name")

# %%
from ultralong.course.exercises.practice.nb12 import BROKEN

print(BROKEN)
my_repaired = None  # the same dict, repaired for two hosts of eight GPUs

check("12.repair", my_repaired)

# %% [markdown]
# ## The rehearsal
#
# A training run over many GPUs moves in step: every rank waits for all others at every layer. So one lost host stops
# all of them. The best you can get is a short stop: notice it, hold the place, take the host or another one back, load
# the newest checkpoint, go on. Each link of that chain can be missing, and usually it is found out at night.
#
# Now two hosts. Each is the exported script with facts of its own; they meet at a port of this machine. Ranks of both
# share every row, so neither can go on alone. After the first checkpoint one host is killed: every process of it, at
# once, as when power is lost. A little later it is started again, as a cluster would do. The same from a shell:
# `ultralong launch rehearse --out DIR`.

# %%
# A host dies soon after a checkpoint was saved. What does the other host do?
predict("12.other", ["it goes on alone", "it ends with an error", "it waits, then both resume"], guess=None)

# %%
run = replace(run, model="model", out="run", data=tuple(replace(source, rows="rows") for source in run.data))
show = rehearse(run, place, lose=LOSE, say=print)
print(f"newest checkpoint {show.saved}, last step before the loss {show.before[-1]['step']}: "
      f"{show.repeated} computed again")

# %%
losses = {"before the loss": [(r["step"], r["loss"]) for r in show.before],
          "resumed": [(r["step"], r["loss"]) for r in show.after if r["step"] > show.saved]}
ends = [show.before[0]["step"], show.before[-1]["step"], show.saved + 4, (show.saved + STEPS) // 2, STEPS]
names = ["first steps", f"host {LOSE} lost", f"resumed from {show.saved}", f"step {ends[3]}", "finished"]


def until(number):
    """The log as it stood at one of the five moments."""
    later = number >= 2
    shown = {"before the loss": losses["before the loss"] if number else losses["before the loss"][:4],
             "resumed": [(step, loss) for step, loss in losses["resumed"] if later and step <= ends[number]]}
    figure = figures.loss_curve(shown, "")
    return figure.update_xaxes(range=[0, STEPS + 2]).update_yaxes(
        range=[0.95 * min(r["loss"] for r in show.after), 1.02 * max(r["loss"] for r in show.after)])


play([until(number) for number in range(5)], names, stills=[1, 3, 4], milliseconds=1200,
     alt="Loss by step at five moments: it falls until a host is lost, starts again at the checkpoint before, runs "
         "over the same points, and goes on to the last step.")

# %% tags=["check"]
again = {record["step"]: record["loss"] for record in show.after}
assert list(again) == list(range(1, STEPS + 1)), "a step is missing, or was logged twice"
assert all(again[record["step"]] == record["loss"] for record in show.before), "a step gave another loss when repeated"
assert [event.what for event in show.events[:4]] == ["started", "started", "lost", "started again"]
reveal("12.other", "it waits, then both resume", "Its agent stops its rank and holds the place for 30 minutes.")
print(f"ok: {STEPS} steps, each once; those before the loss have the same losses to the last bit")

# %% [markdown]
# **What you should see.** One curve. The resumed line starts at the checkpoint, covers the last points before the loss,
# and goes on as if nothing had happened. Weights, optimizer, place in the data and random states are all in the
# checkpoint, so a repeated step repeats its loss to the last bit.
#
# Who did what, when? Rows are hosts; the columns are what happened.

# %%
moments = show.events[1:]  # both hosts start together
spans = [round(later.seconds - event.seconds, 2) for event, later in pairwise(moments)]
working = [[0.0 if host == LOSE and event.what == "lost" else span for event, span in zip(moments, spans)]
           for host in range(2)]
figure = rank_timeline(working, "Seconds between events, by host")
figure.data[0].y = [f"host {host}" for host in range(2)]
figure.data[0].x = ["both started", *(f"host {event.host} {event.what}" for event in moments[1:-1])]
figure.data[0].text = [["gone" if host == LOSE and event.what == "lost" else f"{span:.1f} s"
                        for event, span in zip(moments, spans)] for host in range(2)]
figures.show(figure.update_xaxes(title_text="from this event to the next"),
             "Hosts against what happened, with the seconds until the next event: a start and the first steps, a "
             "moment in which one host is gone, a second start and all other steps.")

# %% tags=["check"]
assert moments[0].seconds < moments[1].seconds < moments[-1].seconds < show.seconds + 1
assert abs(sum(spans) - (moments[-1].seconds - moments[0].seconds)) < 0.1
print(f"ok: {show.seconds:.0f} s in all, {moments[-1].seconds - moments[2].seconds:.0f} s of them after the restart")

# %% [markdown]
# **What you should see.** Much of the time is starting up, twice: programs, models, the meeting of hosts. On a cluster
# it is the same in minutes. So a lost host costs the steps since the last checkpoint *and* a start.
#
# When a run stops at night, you do not know which host was lost: you have only what each of them wrote.

# %%
for host, log in enumerate(show.logs):
    said = [line for line in log.splitlines() if "by peer" in line or "PeerLost:" in line]
    print(f"host {host} wrote {len(log.splitlines())} lines, {len(said)} of them about a lost connection")
    for line in said[:2]:
        print("   " + line.removeprefix("[default0]:").split("] ")[-1][:100])


# %%
def my_dead_host(logs):  # what each host wrote -> the host that was lost
    ...


check("12.dead", my_dead_host)

# %% [markdown]
# ## Before the time runs out
#
# A scheduler ends a job at its time limit. `job.sbatch` asks Slurm for a signal five minutes before. It then tells the
# ranks to stop, puts the job back into the queue, and the next allocation resumes from the newest checkpoint. A job
# that a person cancelled stays cancelled; one that leaves no new checkpoint in several allocations is not put back
# again, as it would start for ever.
#
# How often to save? A checkpoint costs time, a loss costs the steps since the last one.
# [Young](https://doi.org/10.1145/361147.361115) balanced them in 1974: save every $\sqrt{2\,C\,M}$ seconds, with $C$
# seconds for a checkpoint and $M$ seconds between failures of the *whole* job.


# %%
def my_save_interval(step_seconds, save_seconds, hosts, hours):  # steps between checkpoints
    ...


check("12.interval", my_save_interval)

# %% [markdown]
# ## Hours and cost, from recorded steps
#
# The recorded step of Llama-3.1-8B at 1,048,576 tokens on two GPUs, times the steps of a billion tokens. For your own
# numbers: `ultralong plan PRESET --gpus N --price P`.

# %%
source = Path("results/training_sharded_h200.json")
recorded = json.loads((source if source.exists() else Path("notebooks") / source).read_text())
best = min((row for row in recorded["rows"] if row["model"] == "Llama-3.1-8B" and row["tokens"] == 2**20),
           key=lambda row: row["seconds_per_step"])
steps = round(1e9 / best["tokens"])
hours = best["seconds_per_step"] * steps * best["gpus"] / 3600
print(f"{best['gpus']} x {best['gpu']}, recorded {best['date']}: {best['seconds_per_step']:.0f} s a step")
print(f"{steps} steps: {hours:.0f} GPU-hours, {hours * PRICE:,.0f} at {PRICE:g} an hour")
START = 0.1  # hours that all GPUs wait for a start: assumed


def lost_hours(failures, every):
    """GPU-hours that failures cost: half an interval of steps each, and a start."""
    return failures * best["gpus"] * (best["seconds_per_step"] * every / 2 / 3600 + START)


bars = {"no failure": lost_hours(0, 10), "10, saved every 10 steps": lost_hours(10, 10),
        "10, saved every 100 steps": lost_hours(10, 100)}
figures.show(figures.shares({name: {"training": hours, "lost": lost} for name, lost in bars.items()},
                            "GPU-hours of a billion tokens, estimated for failures", x="GPU-hours"),
             "Stacked bars of GPU-hours: ten failures cost little when saved every 10 steps, much when every 100.")

# %% tags=["check"]
by_rate = steps * best["tokens"] / best["tokens_per_second_per_gpu"] / 3600
assert abs(hours / by_rate - 1) < 0.02, "the recorded rate and the recorded step differ"
assert bars["10, saved every 100 steps"] > 5 * bars["10, saved every 10 steps"] > bars["no failure"] == 0
assert abs(best["seconds_per_step"] / best["planned_seconds_per_step"] - 1) < 0.1, "the plan was off by over 10%"
print(f"ok: the plan had said {best['planned_seconds_per_step']:.0f} s a step before that run")

# %% [markdown]
# **What you should see.** Saved every 10 steps, ten failures cost a few percent; every 100 steps, half of the training
# again. A failure costs *half an interval* of steps, on average, plus six minutes of a start (assumed). On many hosts
# failures are more frequent, and every one stops all of them.
#
# ## Day one on a cluster
#
# 1. `run.sh --dry-run` on one host: all lines `ok`.
# 2. `--set steps=4` on two hosts: it starts, saves, and leaves a model.
# 3. Kill one host of the two, by hand. It comes back as above.
# 4. The same on all hosts; compare the step time with the plan.
# 5. Only then the real number of steps.
#
# Each step takes minutes and finds another kind of fault: settings, network, storage, the slowest host. A failure in
# the first hour of the real run costs more than all five together.
#
# ## Hand it on
#
# The launch folder: one folder a scheduler, each with everything, in `launch` of the folder `OUT` (`made/12/launch` in
# a course folder). From there to a cluster:
#
# 1. Install this library on the cluster, where every host sees it: a clone and `make setup`. `PYTHON` is then the
#    clone's `.venv/bin/python`. A manifest needs an image instead: the first lines of `Containerfile` build it. For
#    notebook 07's `run.yaml` add 8-bit AdamW and the fastest kernel: `.venv/bin/python -m pip install '.[optim]'` and
#    `make flash4`; in an image, `optim` among the extras and the same kernel.
# 2. Choose a folder that every host sees, `WORKDIR`. Make the model and the rows in it, under the names in
#    `config.yaml`: the first lines of [the preset](../ultralong/presets), or of notebook 07's `run.yaml`, are the
#    commands.
# 3. Copy one of the folders: `scp -r made/12/launch/slurm CLUSTER:`.
# 4. There, in that folder, export what the script asks for. It stops and names each fact that is not set.
# 5. `bash submit.sh --dry-run`, or `bash run.sh --dry-run` without Slurm: all lines must say `ok`.
# 6. The same without `--dry-run`; `run.sh` on every host. A manifest goes to `sky launch` or
#    `kubectl apply --server-side -f`.

# %%
for path in sorted((out / "launch").rglob("*")):
    if path.is_file():
        print(f"{path.relative_to(out)}  {path.stat().st_size:,} bytes")

# %% tags=["check"]
for name in written:
    again_read = settings.load(TrainConfig, out / "launch" / name / "config.yaml")
    assert again_read.parallel == exported.parallel
    assert again_read.save_every, "a run that may be stopped has to save"
print("ok: each folder's config reads back, and saves at intervals")

# %% [markdown]
# Stuck? `hint("12.mesh")` gives a nudge, `solution("12.mesh")` an answer; import both from `ultralong.course`.
#
# ## What this does not show
#
# * Two hosts on one machine share its clock, disk and memory. A real network can be slow, or lose some packets; then
#   ranks wait and nothing dies. The logs' time-outs and the flight recorder of NCCL are for that case.
# * Ranks here exchange over gloo. On GPUs it is NCCL, which notices a lost peer later: after a time limit, minutes or
#   more.
# * The rehearsed run is tiny: a checkpoint here takes a moment. The cell prints what one of
#   the exported run would hold.

# %%
parameters = best["parameters"]
print(f"a checkpoint of {parameters / 1e9:.1f}B parameters: {12 * parameters / 2**30:.0f} GiB of states; here "
      f"{sum(f.stat().st_size for f in (place / 'run').rglob('*') if f.is_file()) / 2**20:.0f} MiB for the whole run")

# %% [markdown]
# ## Recap
#
# * Three numbers lay a run out; the launcher refuses what does not divide, and says which setting does.
# * The scripts hold the run; the site's facts are variables that have to be named.
# * A lost host costs the steps since the last checkpoint and a start; the losses repeat to the last bit.
# * Rehearse the loss before you need it.
#
# **Go on reading:** the library's [rehearsal](../ultralong/launch/rehearse.py) and
# [script pieces](../ultralong/launch/pieces); [elastic launch](https://docs.pytorch.org/docs/stable/elastic/run.html),
# [Young's interval](https://doi.org/10.1145/361147.361115), [the Llama 3
# report](https://arxiv.org/abs/2407.21783) on failures of a large run.
#
# **Next:** [13_serve_and_cost](13_serve_and_cost.ipynb): who can use the result, and what does it cost?

# %%
store(layouts=len(sizes), scripts=len(scripts), manifests=len(manifests), broken_found=len(found),
      repeated=show.repeated, steps_logged=len(show.after), hours_recorded=hours)

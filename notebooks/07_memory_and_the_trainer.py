# %% [markdown]
# # 7. What fills the GPU, and what may leave it?
#
# Llama-3.1-8B has 16 GB of weights in bfloat16, and an H200 has 141 GB. Yet training it on one row of a million tokens
# with a plain script would need more than three terabytes on *each* of two GPUs. This notebook finds out where they go:
# the optimizer's states, the logits, the activations. Then it takes them away one by one, without changing a single
# gradient by more than a rounding, until the run fits. The planner is the referee: it follows the trainer's own code on
# tensors that have a shape and no storage, so a plan for a million tokens takes seconds on a laptop.
#
# ### At a glance
#
# | | |
# |---|---|
# | time on CPU | 45 s, two cores (measured November 2026) |
# | reading and doing | 35 and 40 minutes |
# | memory | 1.5 GB |
# | downloads, cost | none |
# | one GPU adds | a measured step beside its plan: `DEVICE=cuda` |
# | two GPUs, a cluster add | your own plan: set `GPUS`, `HOST_GIB`, `MACHINE` |
#
# **You will be able to**
# * count the bytes of parameters, gradients and optimizer states, sharded or not;
# * say what activation checkpointing recomputes, and which output is worth keeping;
# * choose what stays on the GPU, what goes to the host and what is computed again;
# * scale a loss so that the number of processes does not change the gradient, and resume a run to the bit.
#
# **Needs:** a training step in PyTorch. **Before this:** [06_sequence_parallel](06_sequence_parallel.ipynb), for a row
# that several GPUs share. Terms: [FSDP and ZeRO](https://arxiv.org/abs/1910.02054),
# [activation checkpointing](https://arxiv.org/abs/1604.06174), [AdamW](https://arxiv.org/abs/1711.05101).

# %% tags=["parameters"]
TOKENS: int = 1048576  # tokens of the planned row
GPUS: int = 2  # GPUs that share it, and the parameters
HOST_GIB: float = 128.0  # GiB of host memory for each GPU's process
MACHINE: str = "h200"  # the planned GPU: h200, h100, a100, or a file of `ultralong bench rates`
STEP_TOKENS: int = 1024  # tokens of the row that is trained on here, more than 512
DEVICE: str = "cpu"  # "cuda" measures one step of a real shape beside its plan
SEED: int = 0  # of the tiny model and its row
INTERACTIVE: bool = True  # False adds a still to each figure, for pages without scripts
OUT: str = ""  # folder for what the notebook hands on; empty: a temporary one

# %%
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

# %%
from ultralong import extend, figures, load_config, pack, train
from ultralong.attention import make_attention_context
from ultralong.course import check, predict, reveal
from ultralong.figures.memory import stacked_bytes
from ultralong.figures.play import play
from ultralong.notebook_tools import output_folder, store
from ultralong.planner.autotune import autotune_memory
from ultralong.planner.live_activations import live_in_backward
from ultralong.planner.machine import load_machine
from ultralong.planner.memory import STATE_BYTES, gpu_memory, host_memory
from ultralong.planner.shapes import planned_model, shape_of
from ultralong.planner.step_time import step_time
from ultralong.planner.traces.tracker import Tracker
from ultralong.planner.workload import Workload
from ultralong.training.config import MemoryConfig
from ultralong.training.loss import LanguageModelLoss, tiled_cross_entropy
from ultralong.training.memory.activation_memory import ActivationMemory
from ultralong.utils import settings
from ultralong.utils.files import read_jsonl
from ultralong.utils.local_ranks import run_ranks

# %%
torch.set_num_threads(1)
disable_progress_bar()
GIB = 2**30
out = output_folder(OUT)
changes = {"parallel.context_parallel_size": GPUS, "parallel.fsdp_shard_degree": GPUS, "length": TOKENS}
config = load_config("llama31-8b-1m-2gpu", changes)
model, _ = planned_model(config.model, config.base_model)
job = Workload(config, model, shape_of(model), load_machine(MACHINE), TOKENS, GPUS)
there = job.machine.memory / GIB
print(f"{job.shape.parameters / 1e9:.2f} billion parameters, {TOKENS:,} tokens, {GPUS} x {job.machine.name} "
      f"of {there:.1f} GiB")

# %% [markdown]
# ## What is there before the first token
#
# The trainer keeps each parameter in float32: an update of a ten-thousandth would be lost in bfloat16, which has eight
# bits of precision. The forward pass computes in bfloat16, on a copy that lives for one layer. Each parameter needs a
# gradient, and AdamW keeps two running means for it: of the gradient, and of its square. None of this depends on the
# row. *FSDP* gives every GPU one part of all of them. Before a layer computes, its parameters are gathered; after it
# they are freed again. And AdamW's means need no float32: in blocks of 256 values with one scale each, 8 bits are
# enough.

# %%
# Parameters, gradients and AdamW's states of 8 billion parameters, all in float32?
predict("07.states", ["32 GB", "64 GB", "128 GB"], guess=None)

# %%
count = job.shape.parameters


def states_of(precision, gpus):
    """GiB on each GPU, by what they are."""
    each = {"parameters": 4, "gradients": 4, "AdamW's states": STATE_BYTES[precision]}
    return {name: size * count / gpus / GIB for name, size in each.items()}


degrees = (1, 2, 4, 8)
play([stacked_bytes({str(gpus): states_of(precision, gpus) for gpus in degrees}, x="GPUs that share them", most=190,
                    limit=there, limit_name=job.machine.name) for precision in ("float32", "8bit")],
     ["float32 states", "8-bit states"],
     "Stacked bars of parameters, gradients and AdamW's states on each GPU, over the GPUs that share them. One GPU "
     "alone is nearly full before the first token; with 8-bit states and two GPUs 37 GiB are.")

# %% tags=["check"]
lines = {line.name: line.value / GIB for line in gpu_memory(job)}
by_hand = states_of(config.optimizer.state_precision, GPUS)
assert abs(lines["tensors: parameters, float32"] - by_hand["parameters"]) < 1e-6
assert abs(next(v for n, v in lines.items() if "AdamW" in n) - by_hand["AdamW's states"]) < 1e-6
total = 16 * count / 1e9
reveal("07.states", "128 GB", f"16 bytes a parameter are {total:.0f} GB. FSDP shards all of it: {GPUS} GPUs hold "
       f"{total / GPUS:.0f} GB each.")
print("ok: the planner counts the same parameters and states")


# %%
def my_state_bytes(parameters, gpus, eight_bit):  # bytes on each GPU
    ...


check("07.states", my_state_bytes)

# %% [markdown]
# ## Logits that never exist
#
# The head turns each hidden state into one logit for each of 128,256 words. In float32 that is half a megabyte a token,
# thirty times what the hidden state itself takes. A plain script computes them all, then their softmax, then its
# gradient: three tensors of that size.

# %%
# All logits of a row of a million tokens?
predict("07.logits", ["5 GB", "54 GB", "538 GB"], guess=None)

# %% [markdown]
# Tokens do not meet in the loss. So the head is applied to a *tile* of tokens at a time, and the gradients are made
# while the tile's logits exist: the backward pass only scales them. The loss is a *sum* over targets, and the division
# comes once, at the very end. That is not a matter of taste. A mean of tile means gives a target in a half-empty tile
# more weight than others, and a tile without any target is 0 / 0.
#
# Below, a tracker counts every byte that is alive, for both ways of the same loss.

# %%
generator = torch.Generator().manual_seed(SEED)
weight = torch.randn(2048, 64, generator=generator)
peaks, gaps = {"all logits": [], "tiles of 128": []}, []
counts = [256, 512, 1024, 2048, 4096]
for tokens in counts:
    hidden = torch.randn(tokens, 64, generator=generator).requires_grad_()
    labels = torch.randint(0, 2048, (tokens,), generator=generator)
    grads = []
    for name in peaks:
        with Tracker() as tracker:
            loss = (torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
                    if name == "all logits" else tiled_cross_entropy(hidden, weight, labels, 128)[0])
            grads.append(torch.autograd.grad(loss, hidden)[0])
        peaks[name].append(tracker.peak / 2**20)
    gaps.append(float((grads[0] - grads[1]).abs().max()))
figures.show(figures.lines({name: (counts, values) for name, values in peaks.items()}, "Bytes alive in the loss",
                           x="tokens", y="MiB", log_x=True, log_y=True, markers=True),
             "Two lines over tokens on log axes. With all logits memory grows with the row; with tiles it stays nearly "
             "flat, as only gradients of hidden states grow.")

# %% tags=["check"]
assert max(gaps) < 1e-5, "tiles changed the gradient"
assert peaks["all logits"][-1] > 15 * peaks["tiles of 128"][-1], "tiles saved too little"
logits = TOKENS * job.shape.vocabulary * 4
reveal("07.logits", "538 GB", f"{TOKENS:,} x {job.shape.vocabulary:,} x 4 bytes are {logits / 1e9:.0f} GB; a tile of "
       f"{config.memory.loss_tile:,} tokens is {config.memory.loss_tile * job.shape.vocabulary * 4 / 1e9:.1f} GB.")
print(f"ok: the same gradient within {max(gaps):.0e}, in {peaks['all logits'][-1] / peaks['tiles of 128'][-1]:.0f} "
      "times less memory")


# %%
def my_tiled_loss(hidden, weight, labels, tile):  # mean over targets; -100 is no target
    ...


check("07.tiled_loss", my_tiled_loss)

# %% [markdown]
# **What you should see.** One line doubles with the row, the other hardly moves. What still grows are the gradients of
# the hidden states, 64 numbers a token here where the logits are 2,048. The feed-forward layer has the same trouble and
# the same cure: its three tensors are 3.5 times as wide as the hidden state, and tokens do not meet in it either.
#
# ## One step, byte by byte
#
# A layer keeps for its backward pass what its products read: some twenty tensors of the row's length. *Activation
# checkpointing* keeps its input only, and runs the layer again when its turn comes. What does that do to attention,
# which is nearly all work of a long row? Below a small Llama of four layers does one training step under four memory
# plans. They are the plans of the trainer's config, carried out by the trainer's code; only the model is small.

# %%
# With checkpointing, how often is each layer's attention computed forward?
predict("07.attention", ["once", "twice", "three times"], guess=None)


# %%
class Timeline(Tracker):
    """The planner's tracker, which also keeps the bytes alive after every operation."""

    def __init__(self):
        super().__init__()
        self.points, self.names = [], Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.points.append(self.live)
        self.names[func._overloadpacket.__name__] += 1
        return result


def step_of(**plan):
    """One forward and backward pass of a tiny Llama under a memory plan: its timeline, gradients, host bytes."""
    torch.manual_seed(SEED)
    shape = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    tiny = LlamaForCausalLM(LlamaConfig(vocab_size=2048, hidden_size=128, intermediate_size=448,
                                        attn_implementation="ultralong", **shape)).train()
    memory = ActivationMemory(tiny, MemoryConfig(loss_tile=128, **plan))
    context = make_attention_context(STEP_TOKENS, heads=4, kv_heads=2, store=memory.attention_store)
    ids = torch.randint(0, 2048, (1, STEP_TOKENS))
    with Timeline() as timeline:
        total, _ = LanguageModelLoss(tiny, 128)(ids, ids.roll(-1, 1), position_ids=torch.arange(STEP_TOKENS)[None],
                                                attention_context=context)
        (total / STEP_TOKENS).backward()
    return timeline, [p.grad for p in tiny.parameters()], memory.host_bytes


# %%
saved = {"activation_checkpointing": True}
plans = {
    "everything kept": {},
    "checkpointing": saved,
    "+ tiled layers": saved | {"layer_tile": 128},
    "+ attention outputs": saved | {"layer_tile": 128, "attention_outputs_on_gpu": -1},
}
step_of()  # the first call tries the attention kernel out, which the timeline is not about
steps = {name: step_of(**plan) for name, plan in plans.items()}


def curve(timeline):
    """Bytes alive over the step, thinned to what a screen shows."""
    points = timeline.points
    size = max(1, len(points) // 150)
    highest = [max(points[at:at + size]) / 2**20 for at in range(0, len(points), size)]
    return [round(at / len(highest), 4) for at in range(len(highest))], highest


most = max(timeline.peak for timeline, *_ in steps.values()) / 2**20


def frame(timeline):
    """One plan's step."""
    figure = figures.lines({"alive": curve(timeline)}, x="part of the step", y="MiB", height=320)
    figure.update_yaxes(range=[0, 1.08 * most])
    figure.update_traces(fill="tozeroy")
    return figure


play([frame(timeline) for timeline, *_ in steps.values()], list(steps),
     "Bytes alive while one step runs, for four memory plans. With everything kept they climb to the loss and fall "
     "back; checkpointing leaves a low step for each layer; tiles make the layers' own peaks small as well.")

# %% tags=["check"]
reference = steps["everything kept"][1]
forward = {}
for name, (timeline, grads, _) in steps.items():
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(grads, reference, strict=True))
    assert worst < 1e-3, f"{name}: a gradient is another"
    assert max(curve(timeline)[1]) * 2**20 == timeline.peak, f"{name}: the picture misses the peak"
    forward[name] = sum(n for op, n in timeline.names.items() if "attention" in op and "backward" not in op)
assert forward == {"everything kept": 4, "checkpointing": 8, "+ tiled layers": 8, "+ attention outputs": 4}
saving = steps["everything kept"][0].peak / steps["+ attention outputs"][0].peak
reveal("07.attention", "twice", "Unless its output is stored: then the second pass through the layer skips it.")
print(f"ok: equal gradients, {saving:.1f} times less memory, and attention computed once for each of 4 layers")

# %% [markdown]
# **What you should see.** A mountain, then a staircase, then a low line. The last frame costs about what the one before
# it does, although each layer's attention output is kept: it is as large as the layer's input, and it saves the most
# expensive operation of the step.
#
# ## The same at a million tokens
#
# The tracker also runs on tensors without storage. So the planner follows the trainer's step for 8 billion parameters
# and a million tokens, and counts what lives on each GPU at the worst moment. That is a *fake tensor*: it knows its
# shape, its type and when it is freed, and no number. Matrix products take no time then, so a step of fifteen minutes
# is followed in seconds. Each rung below changes some settings of `memory:` in the config, and nothing else.

# %%
OFF = {"layer_tile": 0, "checkpoint_every": 1, "attention_outputs_on_gpu": 0, "attention_outputs_offloaded": 0}
SPARSE = {"checkpoint_every": 3, "attention_outputs_on_gpu": 4, "attention_outputs_offloaded": 28}
ladder = {
    "all kept": OFF | {"activation_checkpointing": False},
    "checkpointing": OFF,
    "+ tiles": OFF | {"layer_tile": 65536},
    "+ outputs": OFF | {"layer_tile": 65536, "attention_outputs_on_gpu": -1},
    "+ to the host": OFF | {"layer_tile": 65536, "attention_outputs_on_gpu": 4, "attention_outputs_offloaded": 28},
    "+ few inputs": {"layer_tile": 65536} | SPARSE,
}


def planned(**memory):
    """The run under other settings of `memory:`."""
    return replace(job, config=replace(config, memory=replace(config.memory, **memory)))


KINDS = {"parameters, f": "states", "AdamW": "states", "gradients, f": "states", "inputs of": "layer inputs",
         "attention outputs of": "attention outputs", "gradients and act": "one step"}


def parts_of(each):
    """GiB on each GPU by kind."""
    found = dict.fromkeys(("states", "layer inputs", "attention outputs", "one step"), 0.0)
    for line in gpu_memory(each):
        if line.counts:
            kind = next((kind for key, kind in KINDS.items() if key in line.name), "one step")
            found[kind] += line.value / GIB
    return found


# %%
rungs = {name: planned(**memory) for name, memory in ladder.items()}
bars = {name: parts_of(each) for name, each in rungs.items()}
seconds = {name: sum(line.value for line in step_time(each)) for name, each in rungs.items()}
figures.show(stacked_bytes({name: bar for name, bar in bars.items() if name != "all kept"},
                           "GiB on each GPU at the worst moment", limit=there, limit_name=job.machine.name),
             "Five stacked bars beside the GPU's memory. Checkpointing alone is twice too much; tiles take off a "
             "third, kept attention outputs add more, and only with outputs on the host and few inputs the bar is "
             "below the line.")
for name, bar in bars.items():
    print(f"{name:15}{sum(bar.values()):8,.0f} GiB{seconds[name]:8,.0f} s a step")

# %% tags=["check"]
for name, each in rungs.items():
    whole = sum(line.value for line in gpu_memory(each) if line.counts) / GIB
    assert abs(sum(bars[name].values()) - whole) < 1e-6, f"{name}: a line is missing from the bar"
fits = [name for name, bar in bars.items() if sum(bar.values()) <= there]
whole = {name: sum(bar.values()) for name, bar in bars.items()}
steps_by = {name: round(seconds[name] - seconds[before]) for before, name in zip(ladder, list(ladder)[1:])}
if (TOKENS, GPUS, MACHINE) == (1048576, 2, "h200"):
    assert fits == ["+ few inputs"], "another plan fits than the preset's"
    assert whole["all kept"] > 10 * max(size for name, size in whole.items() if name != "all kept")
    assert round(whole["+ outputs"] - whole["+ tiles"], -1) == 130, "outputs cost something else than said below"
    assert (round(steps_by["+ outputs"], -1), steps_by["+ few inputs"]) == (-220, 6), steps_by
again = seconds["checkpointing"] - seconds["+ few inputs"]
print(f"ok: fits: {', '.join(fits) or 'nothing'}; attention outputs save {again:,.0f} s of each step")

# %% [markdown]
# **What you should see.** Each rung takes away what the rung before left as the largest. "All kept" is not drawn: it is
# more than ten times the axis. Tiled layers matter as much as checkpointing does, for one layer alone makes dozens of
# GiB. Keeping all attention outputs then costs 130 GiB and saves 220 seconds of each step. Moving 28 of them to the
# host gives the memory back, and costs no time, as you will see. What is left to cut are the inputs.
#
# How to read the ladder: each bar has one more decision than the bar on its left, and its parts are what is in memory
# at the step's highest moment. The right question at each rung is "what is largest now?", not "what could I save?".
#
# An input is cheap to make again, once the attention output of the layer below is at hand: its output projection and
# its feed-forward layer are matrix products alone. So only every third input is kept, at a cost of six seconds a step.
#
# ## Whose turn it is
#
# In the backward pass layers come in reverse order. When a layer's turn comes, its input and its attention output must
# be on the GPU; what comes later may still be away. Gradients grow while inputs shrink, so the worst moment need not be
# the first. The planner looks at each. The slider says every how many layers an input is kept.

# %%
def waiting(every):
    """GiB of inputs and attention outputs on the GPU at each layer's turn, the last layer first."""
    each = planned(**{"layer_tile": 65536} | SPARSE | {"checkpoint_every": every})
    found = {}
    for turn in live_in_backward(each):
        layer = job.shape.layers - 1 - turn.layers_done
        found[str(layer)] = {"layer inputs": turn.inputs * each.input_bytes / GIB,
                             "attention outputs": turn.outputs * each.output_bytes / GIB}
    return each, found


moments = {every: waiting(every) for every in (1, 2, 3, 4, 6)}
top = max(sum(bar.values()) for _, found in moments.values() for bar in found.values())
play([stacked_bytes(found, x="layer at work", most=1.08 * top, height=320)
      for _, found in moments.values()],
     [f"every {every}" for every in moments],
     "What waits on the GPU at each layer's turn. With all inputs kept the pile shrinks turn by turn; with every third "
     "kept it starts at a third, and grows by two inputs within each group of three layers.")

# %% tags=["check"]
for every, (each, found) in moments.items():
    drawn = max(bar["layer inputs"] for bar in found.values())
    line = next(line.value for line in gpu_memory(each) if "inputs of" in line.name) / GIB
    assert drawn >= line - 1e-9, f"every {every}: the plan's worst moment is not in the picture"
assert max(b["layer inputs"] for b in moments[3][1].values()) < max(b["layer inputs"] for b in moments[1][1].values())
print("ok: the plan's worst moment is one of those drawn")


# %%
# A dict: attention_outputs_on_gpu, attention_outputs_offloaded, layer_inputs_offloaded and checkpoint_every
my_plan = ...
check("07.keep", my_plan)


# %%
def my_longest(fixed, per_token, budget, ranks):  # tokens of the longest row
    ...


check("07.longest", my_longest)

# %% [markdown]
# ## When a copy to the host is free
#
# A copy takes time in proportion to the tokens of a GPU. Attention takes time in proportion to their *square*. So a
# copy that runs beside it is hidden from some length on.

# %%
# From which length is a copy of one layer's attention output hidden by that layer's attention?
predict("07.copy", ["about 1,000 tokens", "about 10,000 tokens", "about 100,000 tokens"], guess=None)

# %%
lengths = [2**n for n in range(10, 21)]
alone = {tokens: replace(job, tokens=tokens, gpus=1, config=replace(config, parallel=replace(
    config.parallel, context_parallel_size=1))) for tokens in lengths}
rate = job.machine.attention_rates(config.parallel.kernel, job.shape.head_dim, TOKENS)[0]
copy = [alone[tokens].output_bytes / job.machine.link for tokens in lengths]
work = [2 * tokens**2 * job.shape.heads * job.shape.head_dim / rate for tokens in lengths]
figures.show(figures.lines({"copy of the output": (lengths, copy), "attention, forward": (lengths, work)},
                           f"One layer on one {job.machine.name}, by its measured rates", x="tokens", y="seconds",
                           log_x=True, log_y=True),
             "Two straight lines on log axes. The copy's rises half as steeply; attention's line crosses it near ten "
             "thousand tokens and is nearly a hundred times higher at a million.")
crossing = alone[1024].output_bytes / 1024 / job.machine.link * rate / (2 * job.shape.heads * job.shape.head_dim)
reveal("07.copy", "about 10,000 tokens", f"{crossing:,.0f} tokens by these rates. Beyond it offloading costs no time.")

# %% tags=["check"]
assert copy[0] > work[0], "a copy is hidden in a short row already"
assert copy[-1] < work[-1] / 20, "the copy is not hidden at a million tokens"
assert lengths[0] < crossing < 40_000
print(f"ok: at {lengths[-1]:,} tokens a copy takes {copy[-1]:.2f} s beside {work[-1]:.1f} s of attention")

# %% [markdown]
# ## Planned against measured
#
# A plan is worth what its errors are. These are the rows of our trainer in three files of results, measured on H200s,
# with what the planner of the day had said before each run.

# %%
results = Path("results")
files = [json.loads((results / f"training_{name}h200.json").read_text()) for name in ("", "sharded_", "1gpu_")]
rows = [row for file in files for row in file["rows"] if "planned_peak_gpu_gib" in row]
pairs = [(row["planned_peak_gpu_gib"], row["peak_gpu_gib"]) for row in rows]
if DEVICE == "cuda":
    measured = out / "measured.json"
    subprocess.run([sys.executable, "-m", "ultralong", "bench", "train", "HuggingFaceTB/SmolLM2-135M", "--lengths",
                    "65536", "--json", str(measured)], check=True)
    mine = json.loads(measured.read_text())["rows"][0]
    print(f"here: planned {mine['planned_peak_gpu_gib']:.2f}, measured {mine['peak_gpu_gib']:.2f} GiB")
    store(planned_here=mine["planned_peak_gpu_gib"], measured_here=mine["peak_gpu_gib"])
    pairs.append((mine["planned_peak_gpu_gib"], mine["peak_gpu_gib"]))
days = [files[0]["machine"]["date"], max(row["date"] for row in rows if "date" in row)]
figure = figures.lines({"exact": ([3, 150], [3, 150])}, f"GiB of tensors on each GPU, {days[0]} to {days[1][5:]}",
                       x="planned", y="measured", log_x=True, log_y=True)
figure.add_scatter(x=[p for p, _ in pairs], y=[m for _, m in pairs], mode="markers", name="a run",
                   marker={"size": 9, "color": figures.PALETTE[1]})
figures.show(figure.update_layout(showlegend=True),
             "Points of planned against measured memory on log axes. All but one lie on or just below the diagonal; "
             "one early plan is forty per cent too high.")

# %% tags=["check"]
off = sorted(planned_ / measured_ - 1 for planned_, measured_ in pairs)
close = sum(abs(each) < 0.03 for each in off)
assert close >= len(off) / 2, "half of the plans are more than 3% off"
assert off[0] > -0.03, "a plan was too low by more than 3%: that run could have run out of memory"
print(f"ok: {close} of {len(off)} plans within 3%; too low by {-off[0]:.1%} at most, too high by {off[-1]:.0%}")

# %% [markdown]
# **What you should see.** Errors lean to one side on purpose: a plan that is too high wastes room, one that is too low
# kills a run. The point far off is of the first sharded version;
# [the results](results/README.md) say which is which.
#
# ## The same run, however it was run
#
# Memory plans, ranks and interruptions must not change what is learnt. The trainer of these runs is the real one; the
# model is the miniature that comes with the library. One process first, then a run that lost its last two steps, then
# two processes that share each row.

# %%
random.seed(SEED)
words = ["the", "keeper", "of", "light", "wrote", "in", "his", "log", "that", "no", "ship", "had", "passed"]
(out / "texts").mkdir(exist_ok=True)
for number in range(12):
    (out / "texts" / f"{number}.txt").write_text(" ".join(random.choices(words, k=900)))
shutil.rmtree(out / "runs", ignore_errors=True)
extend("miniature", to=STEP_TOKENS, out=out / "runs" / "long", quiet=True)
pack(out / "texts", out / "runs" / "long", STEP_TOKENS, out / "runs" / "rows", quiet=True)
small = load_config("tiny-cpu", {
    "model": str(out / "runs" / "long"), "data": [{"rows": str(out / "runs" / "rows")}], "length": STEP_TOKENS,
    "out": str(out / "runs" / "one"), "steps": 6, "save_every": 3, "parallel.context_parallel_size": 1})
one = train(small, quiet=True)

cut = replace(small, out=str(out / "runs" / "cut"))
shutil.copytree(small.out, cut.out, ignore=shutil.ignore_patterns("step-0000006", "model", "result.json"))
settings.save(cut, Path(cut.out) / "config.yaml")
train(cut, resume=True, quiet=True)

two = replace(small, out=str(out / "runs" / "two"), parallel=replace(small.parallel, context_parallel_size=2))


# %%
def rank_of_two(rank, world):
    """Train as one of two processes; the variables are those that torchrun sets."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    train(two, quiet=True)


runs = {"one process": small, "resumed after step 3": cut}
if not torch.cuda.is_available():
    run_ranks(rank_of_two, 2, timeout=300)  # forked, which is quick
elif torch.cuda.device_count() > 1:
    train(two, processes=2, quiet=True)
if Path(two.out).exists():
    runs["two processes"] = two
logs = {name: read_jsonl(f"{each.out}/log.jsonl") for name, each in runs.items()}
figures.show(figures.loss_curve({name: [(r["step"], r["loss"]) for r in log] for name, log in logs.items()},
                                "Six steps of the miniature, three times"),
             "Three loss curves that lie on top of each other: one process, a resumed run, two processes.")

# %% tags=["check"]
weights = [(Path(each.out) / "model" / "model.safetensors").read_bytes() for each in (small, cut)]
assert weights[0] == weights[1], "the resumed run ended with other weights"
losses = {name: [r["loss"] for r in log] for name, log in logs.items()}
apart = max(abs(a - b) for log in losses.values() for a, b in zip(losses["one process"], log, strict=True))
assert apart < 1e-4, "two processes trained something else"
print(f"ok: resumed to the bit; two processes within {max(apart, 1e-6):.0e} nats of one")

# %% [markdown]
# Averaging gradients over ranks is right only if each rank scales its loss for it. The trainer counts the targets of
# *all* ranks before the first backward pass. Several well-known trainers took a mean on each rank, and were wrong
# wherever rows had different numbers of targets.


# %%
def my_scale(targets, rank):  # factor on this rank's summed loss
    ...


check("07.scale", my_scale)

# %% [markdown]
# ## Hand it on
#
# The planner can choose by itself what `07.keep` asked of you: `ultralong plan --fit`. Here it does so for the machine
# of the parameters cell, and writes the run's whole config: `run.yaml` in the folder `OUT` (`made/07` in a course
# folder). [12_many_hosts](12_many_hosts.ipynb) makes a launch folder of it with `PRESET="made/07/run.yaml"`.
#
# What it names under `model` and `data` is yours to make, by the two commands in its first lines. `MODEL` there is its
# `base_model`, which the Hugging Face hub gives to those who accepted its licence, or a folder of the same model.
# `RECIPE` says which documents: a name from [the recipes' page](../data_recipes/README.md), a YAML file such as
# `made/04/cluster/recipe.yaml` of notebook 04, or a folder of texts. Relative paths count from where the run is
# started. The machine that trains needs two packages more, for 8-bit AdamW and the fastest kernel: `pip install
# '.[optim]'` and `make flash4`, in the clone.

# %%
FIRST_LINES = f"""Memory chosen by the planner. Before the run, if they are not there yet:
  ultralong extend MODEL --to {TOKENS} --out {config.model}
  ultralong pack RECIPE --tokenizer {config.model} --length {TOKENS} --out {config.data[0].rows}
Then: ultralong launch run.yaml --nodes 1 --gpus-per-node {GPUS} --out scripts"""
chosen = autotune_memory(job, job.machine.memory, HOST_GIB * GIB)
fitted = replace(config, memory=chosen)
settings.save(fitted, out / "run.yaml", FIRST_LINES)
final = replace(job, config=fitted)
lines = gpu_memory(final), host_memory(final)
gpu, host = (sum(line.value for line in found if line.counts) / GIB for found in lines)
step = sum(line.value for line in step_time(final))
print((out / "run.yaml").read_text())
print(f"{gpu:.1f} of {there:.1f} GiB on each GPU, {host:.0f} of {HOST_GIB:.0f} GiB of its host memory, {step:,.0f} s")

# %% tags=["check"]
assert load_config(out / "run.yaml") == fitted, "the trainer reads another config than was written"
if (TOKENS, GPUS, MACHINE) == (1048576, 2, "h200"):
    assert gpu <= there, "what was chosen does not fit"
    assert step <= seconds["+ few inputs"] * 1.01, "the preset is faster than what was chosen"
print("ok: the trainer reads run.yaml" if gpu <= there else "No plan fits: take more GPUs, or a shorter row.")

# %% [markdown]
# Stuck? `hint("07.states")` gives a nudge, `solution("07.states")` an answer; import both from `ultralong.course`.
#
# ## What this does not show
#
# * Nothing here trained 8 billion parameters. The plan's figures are counted on shapes; the measured rows above are of
#   random weights on H200s.
# * A GPU's allocator wastes some memory between tensors. The plan adds 3% for it; a run near the limit may need more.
# * Copies are free only where the link to the host is not shared. Two GPUs copied at 55 GB/s each at the same moment.
# * "To the bit" holds on one machine with the same number of processes. Two processes add in another order.
#
# ## At the next scale
#
# Four or eight GPUs shard the states further and share the row: set `GPUS` and look at the bars again. At four million
# tokens on two GPUs nothing fits; see which number of GPUs the planner asks for.
#
# ## Recap
#
# * States are 16 bytes a parameter, or 10 with 8-bit AdamW, shared out by FSDP. They do not depend on the row.
# * Logits and feed-forward layers are computed in tiles, so they stop growing with the row.
# * Checkpointing keeps inputs. Keep the attention outputs too, on the host if need be: they save the most
#   expensive work.
# * The number of ranks and an interruption do not change what is learnt, as losses are summed and divided once.
#
# **Go on reading:** the library's [tiled loss](../ultralong/training/loss.py),
# [layers](../ultralong/training/memory/layers.py) and
# [activation stores](../ultralong/training/memory/activation_store.py);
# [ALST](https://arxiv.org/abs/2506.13996), [8-bit optimizers](https://arxiv.org/abs/2110.02861),
# [LightSeq](https://arxiv.org/abs/2310.03294), which first kept attention out of the recomputation.
#
# **Next:** [08_one_gpu_run](08_one_gpu_run.ipynb) does it with a real model.

# %%
store(states_gib=sum(by_hand.values()), loss_gap=max(gaps), timeline_saving=saving, checkpointing_gib=sum(
    bars["checkpointing"].values()), preset_gib=sum(bars["+ few inputs"].values()), step_seconds=step,
    copy_crossing=crossing, resumed_same=weights[0] == weights[1], two_processes_apart=apart)

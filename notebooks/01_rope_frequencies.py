# %% [markdown]
# # 1. Why does a model fail one token past its window?
#
# A model with rotary position embedding ([RoPE](https://arxiv.org/abs/2104.09864)) has no table of positions. It
# rotates pairs of numbers, each pair at its own frequency, and reads the distance of two tokens from the angle between
# them. Nothing in that formula ends. Yet a model that was trained on rows of 8,192 tokens fails soon after token 8,192.
# The reason, and the way to repair it, both lie in one table of 64 frequencies.
#
# The whole course rests on that table. [02](02_yarn.ipynb) changes it, and a trainer, a server and a planner all have
# to read it in the same way. A fault in it raises no error; the model only answers worse.
#
# ### At a glance
#
# | | |
# |---|---|
# | time on CPU | 15 s, two idle cores, most of it imports (measured November 2026) |
# | reading and doing | 25 and 35 minutes |
# | memory | 0.6 GB |
# | downloads, cost | none |
# | a GPU, two GPUs, a cluster add | nothing |
#
# **You will be able to**
# * compute the wavelength of a pair, and say how base and head size set it;
# * show that an attention score depends on the distance of two tokens, not on where they are;
# * count the pairs that never complete a turn in training, and say what they meet beyond the window;
# * say up to which position 32-bit angles are exact enough.
#
# **Needs:** sine, cosine, a logarithmic axis. **Before this:** [00_quickstart](00_quickstart.ipynb). **After this:**
# [02_yarn](02_yarn.ipynb).

# %% tags=["parameters"]
HEAD_DIM: int = 128  # size of one attention head; Llama-3.1-8B has 128
BASE: float = 500000.0  # RoPE base (theta); Llama 3 has 500,000
WINDOW: int = 8192  # tokens of pretraining, before any scaling
TARGET: int = 1048576  # tokens of the longer window
SEED: int = 0  # of the random queries and keys
INTERACTIVE: bool = True  # False adds a still to each figure, for pages without scripts

# %%
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from ultralong import figures
from ultralong.course import check, predict, reveal
from ultralong.figures.play import play
from ultralong.notebook_tools import store
from ultralong.rope import RopeScaling, inverse_frequencies, pair_counts, wavelengths

torch.set_num_threads(1)
plain = RopeScaling("default", HEAD_DIM, BASE, original_window=WINDOW)
print(f"torch {torch.__version__.split('+')[0]}, {HEAD_DIM // 2} pairs a head, base {BASE:,.0f}")

# %% [markdown]
# ## A pair is the hand of a clock
#
# A head of 128 numbers is 64 pairs. At each token, pair $i$ is rotated by the angle
#
# $$\omega_i = b^{-2i/d} \quad \text{radians,}$$
#
# its *frequency*, with base $b$ and head size $d$. Pair 0 is rotated by one radian a token: a full turn takes 6.3
# tokens. Each next pair is slower by a fixed factor. The **wavelength** $\lambda_i = 2\pi/\omega_i$ is the number of
# tokens for one full turn. The pairs are like the hands of a clock: the first is the second hand, the last would take
# years.
#
# Work one out. Pair 32 of 64 is half way: $\omega_{32} = 500{,}000^{-1/2} = 0.0014$ radians a token, and $2\pi$ divided
# by that is about 4,400 tokens. So it turns nearly twice in a window of 8,192. Each step of one pair multiplies the
# wavelength by $500{,}000^{1/64} = 1.23$. The cell below prints the first pairs and others to compare.


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
# **What you should see.** A straight line on a logarithmic axis. About half of the pairs lie below the dashed line:
# they turn at least once inside the window. The others are slower than the window is long.
#
# Fast and slow pairs do different work. A fast pair tells neighbours apart: between two tokens in a row it moves by a
# large angle. But after a few tokens it has come round, so it cannot say how far away something is. A slow pair moves
# by next to nothing between neighbours, and says whether a token is near or thousands of tokens back. A clock needs
# both hands for the same reason. [Round and round we go](https://arxiv.org/abs/2410.06205) looks at trained models and
# finds that they use the fastest pairs for patterns of position and the slowest for meaning.
#
# Eight of the clocks, at growing positions. The thick arc is what the pair showed within the window; the hand is where
# it points now. Press Play.

# %%
chosen = [round(i * (HEAD_DIM // 2 - 1) / 7) for i in range(8)]
positions = [0, WINDOW // 2, WINDOW - 1, 2 * WINDOW, 8 * WINDOW, TARGET - 1]
frames = [figures.clock_hands([float(at * omega[i]) for i in chosen], [float((WINDOW - 1) * omega[i]) for i in chosen],
                              [f"pair {i}" for i in chosen]) for at in positions]
play(frames, [f"position {at:,}" for at in positions],
     "Eight clocks at growing positions. The hands of the fast pairs have shown their whole circle within the window; "
     "the hands of the slow pairs leave their short arc once the position is beyond the window.", stills=[2, 5])

# %% tags=["check"]
exact, _ = inverse_frequencies(plain, dtype=torch.float64)
for frame, at in zip(frames, positions):
    across, up = list(frame.data[2].x), list(frame.data[2].y)
    for place, pair in enumerate(chosen):
        hand = complex(up[3 * place + 1] - up[3 * place], across[3 * place + 1] - across[3 * place])
        assert abs(hand - 0.9 * torch.exp(1j * at * exact[pair])) < 2e-3, f"pair {pair} points elsewhere at {at:,}"
outside = [pair for pair in chosen if float((TARGET - 1) * exact[pair]) > float((WINDOW - 1) * exact[pair]) and
           turn[pair] > WINDOW]
print(f"ok: every hand points where the library's table says; {len(outside)} of 8 leave their arc by {TARGET:,}")


# %%
def my_wavelength(pair, head_dim, base):  # tokens for one full turn
    ...


check("01.wavelength", my_wavelength)

# %% [markdown]
# ## A score depends on the distance only
#
# Queries and keys are rotated by position before they are multiplied. Write a pair as one complex number: a rotation is
# multiplication by $e^{\mathrm{i}\,p\,\omega}$, and in a product of query and key only the difference of the two
# positions is left.
#
# Which two numbers form a pair is a convention. Llama's weights in transformers pair number $i$ with number
# $i + d/2$ (half split), others pair neighbours; weights of one read with the other give nonsense, without an error.

# %%
# One query, one key, the same distance: is the score another at position 1,048,576 than at 512?
predict("01.distance", ["much smaller", "a little different", "the same"], guess=None)


# %%
def rotate(vector: torch.Tensor, position: float) -> torch.Tensor:
    """Turn a head's vector (D,) to a position; pair i is the numbers i and i + D/2."""
    half = len(vector) // 2
    pairs = torch.complex(vector[:half], vector[half:]) * torch.exp(1j * position * omega)
    return torch.cat((pairs.real, pairs.imag))


generator = torch.Generator().manual_seed(SEED)
query, key = torch.randn(2, HEAD_DIM, generator=generator, dtype=torch.float64)
distances = list(range(0, 401, 10))
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
# the window. So why does a model fail beyond it?
#
# A *score* depends on the distance only. It says nothing about distances that are larger than any in training: there
# the formula gives some score, and the weights never learned to make use of it.

# %%
apart = max(abs(a - b) for a, b in zip(near, far))
reveal("01.distance", "the same" if apart < 1e-6 else "a little different", f"They differ by {apart:.0e} at most.")


# %%
def my_rotate(vector, angles):  # (D,) and one angle for each pair, (D/2,), to the rotated head, (D,)
    ...


check("01.pairing", my_rotate)

# %% [markdown]
# ## The pairs that never turn once
#
# The weights learned from the angles that they were shown. A pair that turns many times in the window has shown every
# angle, and at position one million it shows the same ones again. A pair slower than the window has only moved over the
# first part of its circle. Beyond the window it enters the rest for the first time, and nothing in training has fixed
# what the weights do there.

# %%
# How many of Llama 3's 64 pairs never complete a turn within 8,192 tokens?
predict("01.never_turn", ["8", "29", "45"], guess=None)

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
# **What you should see.** Blue to the top for the fast pairs. For the slow ones almost all of the bar is orange: angles
# that training never showed. Every method of the next notebook is a way to avoid these angles.
#
# How to read it: a bar is a pair, and its height is the share of a full circle. One pair with new angles is enough to
# spoil a score, since a score is a sum over all pairs, and here it is nearly half of them. The new angles begin with
# the first token beyond the window, for all slow pairs at once. That is why models fail so suddenly.

# %%
reveal("01.never_turn", str(never), f"{never / len(before):.0%} of the table, with base {BASE:,.0f}.")


# %%
def my_never(head_dim, base, window):  # how many pairs never complete a turn
    ...


check("01.never", my_never)

# %% [markdown]
# The recipe's way: leave the fast pairs alone, divide the frequency of the slow ones by `target / window`, and blend in
# between. Then position 1,048,576 rotates a slow pair as far as position 8,192 did before. The price: two tokens that
# stood 128 apart now look to a slow pair as neighbours did. That is what continued training is for. (In the code this
# method is `llama3`, after Llama 3.1, which came with it; [02](02_yarn.ipynb) shows how it relates to YaRN.)

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
# Your turn to repair a table. The check reads your dict as programs read a config.json, and looks at all 64 pairs.

# %%
my_rope = None  # {"rope_type": ..., "factor": ..., ...}

check("01.repair", my_rope)

# %% [markdown]
# ## Change base, window and method
#
# Three settings decide the picture. A larger **base** makes the slow end slower; the fast end stays. A longer
# **window** moves the dashed line up. A **method** bends the line. Each figure has a slider and plays without a kernel.

# %%
bases = {"10k": 1e4, "100k": 1e5, "500k": 5e5, "1M": 1e6, "10M": 1e7, "100M": 1e8}
play([figures.wavelengths({"wavelength": wavelengths(table(HEAD_DIM, base)).tolist()}, marks={"window": WINDOW},
                          longest=1e9, height=320) for base in bases.values()], [f"base {name}" for name in bases],
     "Frames with growing base: the line starts at the same place and gets steeper, so fewer pairs lie below it.",
     stills=[0, 5])

# %%
windows = (512, 2048, 8192, 32_768, 131_072, 1_048_576)
play([figures.wavelengths({"wavelength": turn.tolist()}, marks={"window": length}, longest=1e7, height=320)
      for length in windows], [f"window {figures.tokens_label(length)}" for length in windows],
     "Frames with growing window: the dashed line rises over the same table, so more pairs turn at least once.",
     stills=[0, 5])


# %%
def scaled(method: str) -> list[float]:
    """Wavelengths after scaling to TARGET with a method."""
    scaling = RopeScaling(method, HEAD_DIM, BASE, 1.0 if method == "default" else TARGET / WINDOW, WINDOW)
    return wavelengths(inverse_frequencies(scaling, TARGET, torch.float64)[0]).tolist()


methods = ("default", "linear", "ntk", "dynamic", "yarn", "llama3")
play([figures.wavelengths({"as pretrained": turn.tolist(), "scaled": scaled(method)}, marks={"target": TARGET},
                          longest=1e10, height=340) for method in methods], list(methods), stills=[1, 5],
     alt="Frames by method: linear lifts the whole line, ntk tilts it, yarn and llama3 lift only the slow half.")

# %% [markdown]
# **What you should see.** *Base*: all lines start at 6.3 tokens, and a larger base tilts them up. *Window*: at 512
# tokens two thirds of the pairs have never turned, at a million only a few. *Method*: `linear` lifts every pair,
# the fast ones too; `ntk` tilts the line; `yarn` and `llama3` lift the slow half and leave the rest.

# %% [markdown]
# ## How exact a 32-bit angle is
#
# Position times frequency is computed in 32-bit floats, which hold 24 binary digits. At position 4,194,304 and a
# frequency near one, 22 of them hold the integer part of the angle, and only two are left for the fraction.


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



# %%
my_largest = None  # the largest power of two with every angle of Llama 3's table good to 0.01 radians in float32

check("01.largest_position", my_largest)

# %% [markdown]
# Stuck? `hint("01.never")` gives a nudge, `solution("01.never")` an answer; import both from `ultralong.course`.
#
# ## What this does not show
#
# * A table says which angles are new, not what a model does there. [02](02_yarn.ipynb) measures that.
# * That untrained angles are the cause is shown here for the formula only. The strongest evidence is that a change of
#   this table alone repairs most of it: see the rescaled-only stage in [00](00_quickstart.ipynb).
# * Some heads of trained models hardly use their slow pairs. The table can't tell which.
#
# The cell below shows one limit of the picture: a pair that turned *once* has shown every angle, but most of them only
# at one distance.

# %%
once = [i for i, length in enumerate(turn.tolist()) if WINDOW / 2 < length <= WINDOW]
print(f"pairs {once} turned once in {WINDOW:,} tokens, but not twice: 'seen' counts them as safe")

# %% [markdown]
# ## At the next scale
#
# `ultralong.rope.from_config` reads these settings from any model's configuration, in old and new spellings, and
# `wavelengths` gives its table. 1M, 2M and 4M tokens need factors of 128, 256 and 512 on Llama 3. Before you extend a
# model, look at three numbers in its `config.json`: the base (`rope_theta`), the head size, and the window of its
# *pretraining*, which an earlier scaling may hide behind a larger one.
#
# ## Recap
#
# * Pair $i$ turns once in $\lambda_i = 2\pi\,b^{2i/d}$ tokens; base and head size set all of them.
# * Scores depend on distances, but the weights only know the angles that the window showed them.
# * With base 500,000 and 8,192 tokens, 29 of 64 pairs never turn once. Beyond the window they meet new angles. After
#   their frequency is divided by `target / window` they don't.
# * 32-bit angles are good to an eighth of a radian at 4M tokens.
#
# **Go on reading:** the library's [frequencies](../ultralong/rope/frequencies.py);
# [RoFormer](https://arxiv.org/abs/2104.09864) (RoPE), [Scaling laws of RoPE-based
# extrapolation](https://arxiv.org/abs/2310.05209) (pairs that never turn),
# [Round and round we go](https://arxiv.org/abs/2410.06205) (what the slow pairs are used for).
#
# **Next:** [02_yarn](02_yarn.ipynb) compares the ways to slow the pairs down, checks them against transformers bit by
# bit, and tries them on a model.

# %%
store(never_turn=never, worst_angle_error_4m=worst["at 4M tokens"])

# %% [markdown]
# # 5. How is a softmax over a million keys computed without the matrix?
#
# For a row of a million tokens one head has $10^{12}$ scores: two terabytes in bfloat16, for one head of one layer. No
# GPU holds that, and none has to. A kernel computes a block of scores, uses it, forgets it, and keeps two numbers a
# query: the output so far, and the *log-sum-exp* of the scores so far. From that pair two partial results can be joined
# exactly, and the backward pass can start again. Rings, gathered keys and tiled layers all rest on it.
#
# ### At a glance
#
# | | |
# |---|---|
# | time on CPU | 15 s, two cores (measured November 2026) |
# | reading and doing | 30 and 45 minutes |
# | memory | 0.7 GB |
# | downloads, cost | none |
# | a GPU adds | the rates of its kernels: `DEVICE=cuda` |
# | two GPUs, a cluster add | nothing here: see [06_sequence_parallel](06_sequence_parallel.ipynb) |
#
# **You will be able to**
# * say why exponentials overflow, and what a log-sum-exp does about it;
# * compute attention block by block, exactly, and join partial results;
# * write the backward pass from the saved pair;
# * count the work of a row, packed or whole, and place a kernel on a roofline.
#
# **Needs:** a softmax, matrix products. **Before this:** [04_data_at_scale](04_data_at_scale.ipynb), or
# [03_separator_packing](03_separator_packing.ipynb). **After this:**
# [06_sequence_parallel](06_sequence_parallel.ipynb). Terms: [online softmax](https://arxiv.org/abs/1805.02867),
# [FlashAttention](https://arxiv.org/abs/2205.14135), [roofline](https://doi.org/10.1145/1498765.1498785).

# %% tags=["parameters"]
KEYS: int = 64  # keys of the row that is drawn
BLOCK: int = 8  # keys of one block
HEAD_DIM: int = 16  # size of a head
LENGTH: int = 2048  # tokens of the row that is timed and checked
DEVICE: str = "cpu"  # "cuda" measures the kernels of a GPU
SEED: int = 0  # of the random tensors
INTERACTIVE: bool = True  # kept for the tooling: all figures here play without a kernel
OUT: str = ""  # folder for what the notebook hands on; empty: a temporary one

# %%
import json
import math
import tempfile
import time
from pathlib import Path

import torch

from ultralong import figures
from ultralong.attention import available_kernels, make_attention_context
from ultralong.attention.lse_merge import merge_into
from ultralong.course import check, predict, reveal
from ultralong.figures.play import play
from ultralong.notebook_tools import store

torch.set_num_threads(1)
out_folder = Path(OUT or tempfile.mkdtemp(prefix="ultralong-05-"))
out_folder.mkdir(parents=True, exist_ok=True)
generator = torch.Generator().manual_seed(SEED)
print(f"kernels here: {', '.join(available_kernels(DEVICE))}")

# %% [markdown]
# ## What overflows
#
# A softmax divides exponentials by their sum. float32 reaches $3\cdot10^{38}$, which is $e^{88.7}$. Scores of long rows
# pass that easily.

# %%
# Where does exp() leave float32?
predict("05.overflow", ["a score of 30", "a score of 89", "a score of 1,000"], guess=None)

# %%
scores = torch.tensor([10.0, 50.0, 89.0, 120.0])
naive = scores.exp() / scores.exp().sum()
shifted = (scores - scores.max()).exp()
stable = shifted / shifted.sum()
print(f"naive  {naive.tolist()}\nstable {[f'{x:.3g}' for x in stable.tolist()]}")

# %% tags=["check"]
assert naive.isnan().any(), "exp(89) fitted into float32"
assert torch.allclose(stable.double(), scores.double().softmax(0)), "subtracting the largest score changed the result"
reveal("05.overflow", "a score of 89", "Subtract the largest score first: the result is the same, and no exponential "
       "passes 1.")
print("ok: the shift by the maximum is exact")

# %% [markdown]
# **What you should see.** `nan` in the naive row. A kernel therefore needs the largest score before it exponentiates,
# and a block of keys does not know the others' scores.
#
# ## A block at a time
#
# Keep, for each query, the output so far and $\mathrm{lse} = \log\sum_j e^{s_j}$ so far. A new block has a pair of its
# own, and both are joined:
#
# $$\mathrm{lse} = \log(e^{\mathrm{lse}_a} + e^{\mathrm{lse}_b}), \qquad
#   o = e^{\mathrm{lse}_a - \mathrm{lse}}\, o_a + e^{\mathrm{lse}_b - \mathrm{lse}}\, o_b .$$
#
# No exponent is ever positive.

# %%
q = torch.randn(1, HEAD_DIM, generator=generator, dtype=torch.float64)
k, v = torch.randn(2, KEYS, HEAD_DIM, generator=generator, dtype=torch.float64)
k[KEYS * 3 // 4] = 2.5 * q[0]  # one key that the query looks for


def partial(q, k, v):
    """Attention over some keys, and the log-sum-exp of its scores."""
    s = q @ k.T / math.sqrt(q.shape[-1])
    return s.softmax(-1) @ v, s.logsumexp(-1)


exact, exact_lse = partial(q, k, v)
running, lse = torch.zeros(1, 1, 1, HEAD_DIM, dtype=torch.float64), torch.full((1, 1, 1), -math.inf).double()
steps = []
for start in range(0, KEYS, BLOCK):
    part, part_lse = partial(q, k[start:start + BLOCK], v[start:start + BLOCK])
    merge_into(running, lse, part.view(1, 1, 1, -1), part_lse.view(1, 1, 1))
    steps.append((start + BLOCK, float(lse), float((running.flatten() - exact.flatten()).norm())))

# %% tags=["check"]
assert steps[-1][2] < 1e-12, "the last block was joined, and the result is not the whole row's"
assert abs(steps[-1][1] - float(exact_lse)) < 1e-12, "the log-sum-exp is another"
print(f"ok: {len(steps)} blocks joined one by one equal one softmax over {KEYS} keys, to {steps[-1][2]:.0e}")

# %%
weights = (q @ k.T / math.sqrt(HEAD_DIM)).flatten()


def share_so_far(seen):
    """Bars of the softmax over the keys seen so far."""
    figure = figures.new_figure("", "key", "weight", height=300)
    shares = torch.where(torch.arange(KEYS) < seen, (weights - weights[:seen].logsumexp(0)).exp(), 0.0)
    figure.add_bar(x=list(range(KEYS)), y=[round(x, 5) for x in shares.tolist()], marker={"color": figures.PALETTE[0]})
    figure.update_yaxes(range=[0, 1])
    return figure


play([share_so_far(seen) for seen, _, _ in steps], [f"{seen} keys" for seen, _, _ in steps],
     "Weights of the keys seen so far. Until the sought key comes they are spread; then nearly all weight moves to it.")
figures.show(figures.lines({"distance from the result": ([s for s, _, _ in steps], [max(e, 1e-16) for *_, e in steps])},
                           "The output after each block", x="keys seen", y="distance", log_y=True, markers=True),
             "The distance stays large until the block with the sought key, and is zero after the last block.")

# %% [markdown]
# **What you should see.** The weights are right for the keys seen so far, at every step. When the key that the query
# looks for arrives, all earlier weights shrink by one common factor: that is the whole correction.


# %%
def my_merge(out, lse, other, other_lse):  # out (Q, D), lse (Q,): joined (out, lse)
    ...


check("05.merge", my_merge)


# %%
def my_blockwise(q, k, v, block):  # (Q, D), never more than (Q, block) scores
    ...


check("05.blockwise", my_blockwise)

# %% [markdown]
# ## Memory: a square against a line

# %%
# Scores of one layer of 32 heads at 1M tokens, 2 bytes each?
predict("05.memory", ["64 GB", "2 TB", "64 TB"], guess=None)

# %%
lengths = [2**n for n in range(13, 23)]
matrix = [32 * 2 * n * n / 2**30 for n in lengths]
pair = [32 * (128 * 2 + 4) * n / 2**30 for n in lengths]
figures.show(figures.lines({"all scores": (lengths, matrix), "output and log-sum-exp": (lengths, pair)},
                           "Bytes of one layer of 32 heads", x="tokens", y="GiB", log_x=True, log_y=True),
             "On a log-log plot the scores rise twice as steeply as the pair: 64 TiB against 8 GiB at 1M tokens.")
at = lengths.index(2**20)
reveal("05.memory", "64 TB", f"{matrix[at] / 1024:.0f} TiB of scores; the pair is {pair[at]:.1f} GiB.")

# %% tags=["check"]
assert round(matrix[at] / 1024) == 64
assert pair[at] < 10
print("ok: linear memory is what makes long rows possible; the work stays a square")

# %% [markdown]
# ## Which keys a query sees
#
# When the queries are the *last* ones of a row (decoding, a later chunk, a rank's own piece), the diagonal ends at the
# bottom right: query $i$ of $Q$ sees the keys up to $i + K - Q$.


# %%
def my_offset(queries, keys):  # query i sees keys up to i + offset
    ...


check("05.offset", my_offset)

# %% [markdown]
# ## Backward from the pair
#
# The backward pass needs every probability again. It computes them a block at a time from the saved pair:
# $P = e^{S - \mathrm{lse}}$, then $dS = P \odot (dP - \delta)$ with $dP = dO\,V^\top$ and
# $\delta = \sum_d dO \odot O$. The log-sum-exp is the *whole row's*: a block's own would make every block sum to one.


# %%
def my_backward(q, k, v, lse, out, dout):  # gradient of this block's scaled scores, (Q, block)
    ...


check("05.backward", my_backward)

# %% [markdown]
# ## The kernel on this machine
#
# The library takes the fastest kernel that is present and right for the call. On a CPU that is PyTorch's blocked one.

# %%
heads, kv_heads, size = 4, 2, 64
row = [torch.randn(1, LENGTH, n, size, generator=generator, dtype=torch.float64) for n in (heads, kv_heads, kv_heads)]
context = make_attention_context(LENGTH, heads=heads, kv_heads=kv_heads)
reference = make_attention_context(LENGTH, kernel="reference", heads=heads, kv_heads=kv_heads).attend(*row)
errors = {}
for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
    found = context.attend(*(x.to(DEVICE, dtype) for x in row)).double().cpu()
    errors[name] = float((found - reference).norm() / reference.norm())

gpu = DEVICE == "cuda"  # a GPU is timed in its own type, at the shape of an 8B model, on rows that fill it
lengths, timed, dtype = ((8192, 32768, 131072), (32, 8, 128), torch.bfloat16) if gpu else (
    (LENGTH // 4, LENGTH // 2, LENGTH), (heads, kv_heads, size), torch.float32)
rates = {}
for length in lengths:
    part = [torch.randn(1, length, n, timed[2], dtype=dtype, device=DEVICE) for n in (timed[0], timed[1], timed[1])]
    one = make_attention_context(length, heads=timed[0], kv_heads=timed[1])
    seconds = []
    for _ in range(4):  # the first call prepares
        started = time.perf_counter()
        one.attend(*part)
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    rates[length] = 2 * length**2 * timed[0] * timed[2] / min(seconds[1:]) / 1e12
print({name: f"{error:.1e}" for name, error in errors.items()}, "relative error against float64")
print({length: f"{rate:.3g} TFLOP/s" for length, rate in rates.items()}, "forward, this run")

# %% tags=["check"]
assert errors["float32"] < 1e-5 < errors["bfloat16"] < 2e-2, "the kernel is less exact than its type"
print("ok: errors are those of the type, not of the length")

# %%
figure = figures.new_figure("Error against float64, by type", "", "relative error", height=300)
figure.add_bar(x=list(errors), y=list(errors.values()), marker={"color": figures.PALETTE[1]})
figure.update_yaxes(type="log", range=[-8, 0])
figures.show(figure, "Two bars on a log scale: about one ten-millionth in float32, some thousandths in bfloat16.")

# %% [markdown]
# ## A roofline, from recorded rates
#
# A GPU does two things at limited rates: products and traffic. A kernel that does few operations for each byte is held
# by traffic, one that does many by products. Attention over $n$ keys does about $n$ operations a byte: long rows sit
# far to the right, and what remains is how well the kernel is written.

# %%
recorded = json.loads((Path("..") / "ultralong" / "planner" / "machines" / "h200.json").read_text())
machine, measured = recorded["machine"], recorded["rates"]
peak = max(each["tflops"] for each in measured["matmul"])
bandwidth = max(each["gbps"] for each in measured["traffic"]) / 1000  # TB/s
curves = {}
for each in measured["attention"]:
    if each["head_size"] == 128:
        curves.setdefault(each["kernel"], ([], []))
        # Forward: 2 n^2 D operations a head; q, k, v and the output are read or written once, 2 bytes each.
        curves[each["kernel"]][0].append(2 * each["tokens"]**2 * 128 / (4 * 2 * each["tokens"] * 128))
        curves[each["kernel"]][1].append(each["forward_tflops"])
intensity = [2.0**n for n in range(18)]
roof = {"the roof": (intensity, [min(peak, bandwidth * x) for x in intensity])}
figures.show(figures.lines(roof | curves, f"{machine['device']}, recorded {machine['date']}", x="operations a byte",
                           y="TFLOP/s", log_x=True, log_y=True, markers=True),
             "A roof that rises with the intensity and is flat from a few hundred on; attention kernels lie below its "
             "flat part, the faster ones closer.")

# %% tags=["check"]
best = {name: max(rates_) for name, (_, rates_) in curves.items()}
assert all(value < peak for value in best.values()), "a kernel above the product's rate: measured wrong"
print("ok: " + ", ".join(f"{name} reaches {value / peak:.0%} of the product's rate" for name, value in best.items()))

# %% [markdown]
# **What you should see.** All points lie under the flat roof, so bandwidth is not the limit. Kernels differ by a
# factor of two at the same length: at a million tokens that is half of a training run's cost.


# %%
def my_flops(lengths, heads, head_dim):  # forward and backward FLOPs of a masked packed row
    ...


check("05.flops", my_flops)

# %% [markdown]
# ## Hand it on
#
# The planner turns such rates into seconds a step: `ultralong plan`.

# %%
handed = {"source": f"{machine['device']}, recorded {machine['date']}", "matmul_tflops": peak,
          "bandwidth_tbps": bandwidth, "attention_forward_tflops": best, "here_forward_tflops": rates}
(out_folder / "rates.json").write_text(json.dumps(handed, indent=1))
print(json.dumps(handed, indent=1))

# %% [markdown]
# ## What this does not show
#
# * Rates of this CPU say nothing about a GPU. The recorded ones are of one machine; others differ by a percent or more.
# * A kernel's backward pass is slower than its forward pass; the roofline shows the forward pass only.
# * Errors here are of the output. Gradients are held to the same bound in the library's tests.
#
# ## Recap
#
# * The pair (output, log-sum-exp) is all that a query needs of the keys it has seen. Pairs join exactly, in float32.
# * Memory is linear in the length, work is a square. A packed row of short documents is much less work.
# * The backward pass starts from the pair of the whole row.
#
# **Go on reading:** the library's [merge](../ultralong/attention/lse_merge.py) and
# [reference kernel](../ultralong/attention/kernels/reference.py);
# [FlashAttention-2](https://arxiv.org/abs/2307.08691), [FlashAttention-3](https://arxiv.org/abs/2407.08608).
#
# **Next:** [06_sequence_parallel](06_sequence_parallel.ipynb) joins pairs that lie on several GPUs.

# %%
if gpu:
    store(**{f"tflops_{length}": rate for length, rate in rates.items()})
store(blocks_error=steps[-1][2], error_float32=errors["float32"], error_bfloat16=errors["bfloat16"],
      scores_tib_1m=matrix[at] / 1024, best_share_of_product=max(best.values()) / peak)

# %% [markdown]
# # 5. How is a softmax over a million keys computed without the matrix?
#
# For a row of a million tokens one head has $10^{12}$ scores: two terabytes in bfloat16, for one head of one layer. No
# GPU holds that, and none has to. A kernel computes a block of scores, uses it, forgets it, and keeps two numbers a
# query: the output so far, and the *log-sum-exp* of the scores so far. From that pair two partial results can be joined
# exactly, and the backward pass can start again. Rings, gathered keys and tiled layers all rest on it.
#
# You write both halves of that yourself here: the join and the backward pass. Then the kernels of a real GPU are placed
# on a picture that says how far each is from the best possible. Nothing in this notebook is an approximation. Sparse
# and windowed attention leave keys out; everything here gives the same numbers as the full matrix, up to rounding.
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
# * count the work of a row, packed or whole, and place a kernel on a roofline;
# * choose the kernel and the head chunks of a training run.
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
INTERACTIVE: bool = True  # False adds a still to each figure, for pages without scripts
OUT: str = ""  # folder for what the notebook hands on; empty: a temporary one

# %%
import json
import math
import time
from pathlib import Path

import torch

from ultralong import figures
from ultralong.attention import KERNELS, available_kernels, make_attention_context
from ultralong.attention.lse_merge import merge_into
from ultralong.course import check, predict, reveal
from ultralong.figures.play import play
from ultralong.notebook_tools import output_folder, store

torch.set_num_threads(1)
out_folder = output_folder(OUT)
generator = torch.Generator().manual_seed(SEED)
print(f"kernels here: {', '.join(available_kernels(DEVICE))}")

# %% [markdown]
# ## What overflows
#
# A softmax divides exponentials by their sum. float32 reaches $3\cdot10^{38}$, which is $e^{88.7}$. A single score
# above that is enough to lose the row: its exponential is infinite, the sum is infinite, and infinity divided by
# infinity is not a number (`nan`). Narrower types end earlier. float16 ends at 65,504, which is $e^{11.1}$, and a score
# of 11 is nothing unusual. bfloat16 reaches as far as float32, but holds three decimal digits only.
#
# A softmax does not change when the same number is subtracted from all scores, as that number cancels in the quotient.
# So one may choose which. Guess first where the trouble begins.

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
# **What you should see.** `nan` in the naive row, for both scores above 88. In the stable row the largest weight is 1,
# and the smallest is printed as 0: $e^{-110}$ is below what float32 can hold. That loss is harmless, since such a key
# adds nothing to the output either. Overflow destroys a row, underflow does not; so the shift is by the *largest*
# score.
#
# A kernel therefore needs the largest score before it exponentiates, and a block of keys does not know the others'
# scores. That looks like a reason to compute all scores first. The next section shows that it is none.
#
# ## A block at a time
#
# Keep, for each query, the output so far and $\mathrm{lse} = \log\sum_j e^{s_j}$ so far. A new block has a pair of its
# own, and both are joined:
#
# $$\mathrm{lse} = \log(e^{\mathrm{lse}_a} + e^{\mathrm{lse}_b}), \qquad
#   o = e^{\mathrm{lse}_a - \mathrm{lse}}\, o_a + e^{\mathrm{lse}_b - \mathrm{lse}}\, o_b .$$
#
# No exponent is ever positive, because each of the two is at most as large as the joined one. The two factors add up
# to one: they say which share of the whole softmax lies in which part. Joining is a weighted mean, and it may be done
# in any order. Before the first block the pair is $(0, -\infty)$: a part that holds nothing.
#
# Small numbers first. A query sees three keys, with scores 1, 3 and 2 and values 10, 20 and 40. Two keys are in the
# first block and one in the second.

# %%
score, value = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([10.0, 20.0, 40.0])
blocks = {"first": slice(0, 2), "second": slice(2, 3)}
pairs = {name: (float(score[part].softmax(0) @ value[part]), float(score[part].logsumexp(0)))
         for name, part in blocks.items()}
joined_lse = math.log(sum(math.exp(lse_) for _, lse_ in pairs.values()))
shares = {name: math.exp(lse_ - joined_lse) for name, (_, lse_) in pairs.items()}
for name, (o, lse_) in pairs.items():
    print(f"{name:6} block: output {o:.2f}, lse {lse_:.3f}, share of the whole {shares[name]:.3f}")
joined = sum(shares[name] * o for name, (o, _) in pairs.items())
print(f"joined: {shares['first']:.3f} x {pairs['first'][0]:.2f} + {shares['second']:.3f} x {pairs['second'][0]:.2f} "
      f"= {joined:.2f}, lse {joined_lse:.3f}; one softmax over all three gives {float(score.softmax(0) @ value):.2f}")

# %% tags=["check"]
assert abs(joined - float(score.softmax(0) @ value)) < 1e-5, "the two blocks do not give the softmax over all keys"
assert abs(sum(shares.values()) - 1) < 1e-12
print("ok: two numbers a block are enough")

# %% [markdown]
# The second block has one key, and its output is that key's value. Its share is smaller than one third: its score of 2
# stands against one of 3. Nothing else of the first block is needed, however many keys it had.
#
# Now the same with a row of keys, block by block, through the function that the library's ring and gathered attention
# use.

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
# looks for arrives, all earlier weights shrink by one common factor: that is the whole correction. Their order among
# each other stays, and so does the mean that they made.
#
# The lower figure has a logarithmic axis. Its line falls little for some blocks and then drops at once, when the sought
# key is there. So an unfinished result is not "nearly right": until all keys were seen nobody knows whether the
# important one is still to come. After the last block the distance is that of roundings in float64.
#
# Why keep the output divided by its sum at every step? A kernel keeps it undivided, and divides once at the end, which
# saves work. Between GPUs the divided form is better: then each part is a valid attention output of its own, and only
# one number a query has to travel with it. Try both joins.


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
#
# The scores of $n$ queries and $n$ keys are $n^2$ numbers for each head. What a kernel keeps is the output, which the
# next layer needs anyway, and one log-sum-exp a query. In training both are kept for the backward pass, for every
# layer. [07](07_memory_and_the_trainer.ipynb) counts what that comes to, and what may be moved off the GPU.

# %%
# Scores of one layer of 32 heads at 1M tokens, 2 bytes each?
predict("05.memory", ["64 GiB", "2 TiB", "64 TiB"], guess=None)

# %%
lengths = [2**n for n in range(13, 23)]
matrix = [32 * 2 * n * n / 2**30 for n in lengths]
pair = [32 * (128 * 2 + 4) * n / 2**30 for n in lengths]
figure = figures.lines({"all scores": (lengths, matrix), "output and log-sum-exp": (lengths, pair)},
                       "Memory of one layer of 32 heads", x="tokens", y="memory", log_x=True, log_y=True)
named = {2**-5: "32 MiB", 1: "1 GiB", 2**5: "32 GiB", 2**10: "1 TiB", 2**15: "32 TiB", 2**20: "1 PiB"}
figure.update_layout(margin_l=88)  # for the labels, which are long
figure.update_xaxes(tickvals=lengths[::3], ticktext=[figures.tokens_label(n) for n in lengths[::3]], dtick=None)
figures.show(figure.update_yaxes(tickvals=list(named), ticktext=list(named.values()), dtick=None),
             "On a log-log plot the scores rise twice as steeply as the pair: 64 TiB against 8 GiB at 1M tokens.")
at = lengths.index(2**20)
reveal("05.memory", "64 TiB", f"{matrix[at] / 1024:.0f} TiB of scores; the pair is {pair[at]:.1f} GiB.")
longest = math.isqrt(141 * 10**9 // 64)  # 32 heads, 2 bytes a score, a GPU of 141 GB
print(f"scores of one layer alone fill a GPU of 141 GB at {longest:,} tokens; the log-sum-exp adds "
      f"{4 / (128 * 2):.1%} to the output")

# %% tags=["check"]
assert round(matrix[at] / 1024) == 64
assert pair[at] < 10
print("ok: linear memory is what makes long rows possible; the work stays a square")

# %% [markdown]
# **What you should see.** Both lines are straight on these axes; the upper one is twice as steep. Each doubling of the
# row doubles the pair and makes four times as many scores. This is why windows stayed at a few thousand tokens for
# years: not because of the work, but because the matrix was stored. Only the memory becomes a line. The *work* is still
# a square, and at a million tokens it is nearly all of the work there is.
#
# ## Which keys a query sees
#
# When the queries are the *last* ones of a row (decoding, a later chunk, a rank's own piece), the diagonal ends at the
# bottom right: query $i$ of $Q$ sees the keys up to $i + K - Q$. With as many queries as keys the offset is zero, and
# one does not notice it. With one query and a full cache the wrong corner means that the query sees one key out of all.
# Libraries differ here: PyTorch's `is_causal=True` starts the diagonal at the upper left. No error is raised, and the
# text that such a model writes is fluent at first.


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
#
# Two things are worth a look. First, $\delta$ is one number a query. The textbook's formula needs a sum over all keys
# there, $\sum_j P_{ij}\, dP_{ij}$, which no block has. But $O$ is itself the sum of the values by their weights, so the
# same number follows from $dO$ and $O$, which are at hand. Second, nothing of the forward pass but the pair is used. So
# blocks may come in any order, on any GPU, and a ring can pass keys round once more and add up their gradients.
#
# The price is work. The forward pass makes two products for each block ($S$ and $PV$); the backward pass makes five:
# $S$ again, $dP$, and the gradients of queries, keys and values. That is the factor 2.5 of the exercise on FLOPs below.


# %%
def my_backward(q, k, v, lse, out, dout):  # gradient of this block's scaled scores, (Q, block)
    ...


check("05.backward", my_backward)

# %% [markdown]
# ## The kernel on this machine
#
# The library takes the fastest kernel that is present and right for the call. On a CPU that is PyTorch's blocked one.
# `available_kernels`, printed above, lists what a machine has. The cell compares its output with the full matrix in
# float64, in two types, and times it. The rate counts only the pairs that a causal mask leaves, as every rate in this
# course does.

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
times = errors["bfloat16"] / errors["float32"]
print({name: f"{error:.1e}" for name, error in errors.items()}, f"relative error against float64: {times:,.0f} times")
print({length: f"{rate:.3g} TFLOP/s" for length, rate in rates.items()}, "forward, this run")

# %% tags=["check"]
assert errors["float32"] < 1e-5 < errors["bfloat16"] < 2e-2, "the kernel is less exact than its type"
assert 3e3 < times < 3e4 or gpu, "bfloat16 is not some ten thousand times less exact"
print("ok: errors are those of the type, not of the length")

# %%
figure = figures.new_figure("Error against float64, by type", "", "relative error", height=300)
figure.add_bar(x=list(errors), y=list(errors.values()), marker={"color": figures.PALETTE[1]})
figure.update_yaxes(type="log", range=[-8, 0], dtick=2, exponentformat="power")
figures.show(figure, "Two bars on a log scale: about one ten-millionth in float32, some thousandths in bfloat16.")

# %% [markdown]
# **What you should see.** bfloat16 is about ten thousand times less exact than float32. It has 8 binary digits instead
# of 24; by the digits alone it would be 65,536 times, but in float32 the kernel's many sums round too. A longer row
# does not change that much. Within a kernel the sums are kept in float32, and the weights of a query add up to one
# however many keys there are. What would grow is the harm of joining parts *in* bfloat16, once for each block. So the
# library joins in float32 always.
#
# ## A roofline, from recorded rates
#
# A GPU does two things at limited rates: products and traffic. A kernel that does few operations for each byte is held
# by traffic, one that does many by products. The [roofline](https://doi.org/10.1145/1498765.1498785) draws both limits
# over the operations a byte: a slope (bandwidth), then a flat roof (the rate of products).
#
# Causal attention of one head does $2 n^2 D$ operations forward, and reads or writes $4 n D$ numbers of two bytes:
# $n/4$ operations a byte. Long rows sit far to the right, and what remains is how well the kernel is written.

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
corners = [1.0, peak / bandwidth, 2.0**17]
roof = {"the roof": (corners, [min(peak, bandwidth * x) for x in corners])}
figure = figures.lines(roof | curves, f"{machine['device']}, recorded {machine['date']}", x="operations a byte",
                       y="TFLOP/s", log_x=True, log_y=True, markers=True)
figure.data[0].mode = "lines"  # the kernels' points were measured, the roof is drawn
figures.show(figure,
             "A roof that rises with the intensity and is flat from a few hundred on; attention kernels lie below its "
             "flat part, the faster ones closer.")
print(f"the slope meets the roof at {peak / bandwidth:.0f} operations a byte, which is a row of "
      f"{4 * peak / bandwidth:,.0f} tokens; one new token against a cache does 1 operation a byte")

# %% tags=["check"]
best = {name: max(rates_) for name, (_, rates_) in curves.items()}
assert all(value < peak for value in best.values()), "a kernel above the product's rate: measured wrong"
assert 1.8 < max(best.values()) / min(best.values()) < 2.5, "kernels differ by another factor than two"
print("ok: " + ", ".join(f"{name} reaches {value / peak:.0%} of the product's rate" for name, value in best.items()))

# %% [markdown]
# **What you should see.** All points lie under the flat roof, so bandwidth is not the limit: every row that is long
# enough for this course is. Kernels differ by a factor of two at the same length. At a million tokens, where attention
# is most of a step, that is half of a training run's cost. So the first question about a slow run is which kernel it
# uses.
#
# Decoding, the writing of an answer token by token, is the other case. One new query reads all keys and values of the
# cache for a single row of scores: about one operation a byte, far down the slope. There a faster kernel helps
# little, and a smaller cache helps at once. [13_serve_and_cost](13_serve_and_cost.ipynb) uses that: grouped queries
# and 8-bit caches.


# %%
def my_flops(lengths, heads, head_dim):  # forward and backward FLOPs of a masked packed row
    ...


check("05.flops", my_flops)

# %% [markdown]
# Packed rows change the count. A row of a million tokens that holds ten masked documents of one length does a tenth of
# the work of one document: ten squares of a tenth each. A planner that counts tokens only is ten times off. Without a
# mask, as in the recipe, the row costs the full square, whatever it holds.
#
# ## Choose for a run
#
# A training config has two settings for all this, in its `parallel:` block.
#
# * `kernel`. `auto` goes through the list below, the fastest first, and takes the first one that is installed and right
#   for the call. It passes over a kernel that does not take the type or the head size (cuDNN ends at 128), and prefers
#   one that computes a packed row in one call. The log says what it took and what it passed over. A name instead of
#   `auto` stops a run at its start where that kernel is missing. `auto` would only be slow, day after day.
# * `head_chunks`. The backward pass adds up gradients in float32: twice their size in bfloat16, and there beside them.
#   Heads don't meet in attention, so the kernel can work through some heads at a time and needs the buffers only for
#   those. The heads of a chunk are copied first, which costs memory too.
#
# On one GPU that is nearly full the second one decides whether a run starts. Set both for a real run. The check asks
# the planner, which follows a step through the library's own code without computing it.

# %%
print("auto goes through:", ", ".join(name for name in KERNELS if name != "flash4_fp8"), "(flash4_fp8 is not exact: "
      "only by name)")
my_run = None  # {"kernel": ..., "head_chunks": ...}

check("05.run", my_run)

# %% [markdown]
# ## Hand it on
#
# `rates.json` in the folder `OUT` (`made/05` in a course folder) names the machine and the date, so that nobody takes
# it for another one's. It is for you to read. The planner (`ultralong plan`) turns such rates into seconds a step, but
# wants more of them: on your GPU `ultralong bench rates` writes the file that `MACHINE` takes in
# [07_memory_and_the_trainer](07_memory_and_the_trainer.ipynb). `ultralong bench attention` makes a longer table of
# attention, by length and by number of ranks.

# %%
handed = {"source": f"{machine['device']}, recorded {machine['date']}", "matmul_tflops": peak,
          "bandwidth_tbps": bandwidth, "attention_forward_tflops": best, "here_forward_tflops": rates}
(out_folder / "rates.json").write_text(json.dumps(handed, indent=1))
print(json.dumps(handed, indent=1))

# %% [markdown]
# Stuck? `hint("05.merge")` gives a nudge, `solution("05.merge")` an answer; import both from `ultralong.course`.
#
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
# * The kernel decides a long run's time, and head chunks the memory of its backward pass.
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

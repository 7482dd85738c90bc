# %% [markdown]
# # 6. How do several GPUs read one row, and who waits?
#
# One row of a million tokens does not fit on one GPU, and one GPU would need nearly a minute for the attention of each
# layer. So several GPUs (*ranks*) share the row. Everything but attention is easy: a token needs nothing from other
# tokens. In attention every token looks at all tokens before it, and those lie on other ranks. Three ways bring them
# together: swap tokens for heads (*Ulysses*), gather the keys, or pass them round a *ring*. All three give the same
# numbers as one GPU. They differ in what they send, and in who waits.
#
# Every picture below is computed by the code that trains: the layouts, the plans and the exchanges are the library's.
#
# Why this comes before memory and training: the scheme decides which models and rows are possible at all. A scheme that
# does not divide stops a run at its start. One that leaves ranks waiting doubles its price, and nothing in the log says
# so.
#
# ### At a glance
#
# | | |
# |---|---|
# | time on CPU | 15 s, two cores (measured November 2026) |
# | reading and doing | 35 and 60 minutes |
# | memory | 0.8 GB |
# | downloads, cost | none |
# | two GPUs add | the attention table of your machine: `DEVICE=cuda`, `GPUS=2` |
# | a cluster adds | two levels: Ulysses inside hosts, a ring across them |
#
# **You will be able to**
# * say which rank holds which tokens, and why zigzag is fair where contiguous is not;
# * predict the bytes that each scheme sends, and check them against what was sent;
# * choose a scheme for a model, a row and a machine;
# * write an all-to-all and a ring of two ranks that are exact, forward and backward.
#
# **Needs:** the log-sum-exp of a softmax. **Before this:**
# [05_attention_kernels](05_attention_kernels.ipynb). Terms: [sequence parallelism](https://arxiv.org/abs/2309.14509)
# (Ulysses), [ring attention](https://arxiv.org/abs/2310.01889), [grouped queries](https://arxiv.org/abs/2305.13245).

# %% tags=["parameters"]
TOKENS: int = 64  # tokens of the row that is drawn; a multiple of 2 x RANKS
RANKS: int = 4  # ranks that share it
HEADS: int = 8  # query heads
KV_HEADS: int = 4  # kv heads: grouped queries
DEVICE: str = "cpu"  # "cuda" measures this machine's GPUs at the end
GPUS: int = 2  # GPUs to measure
SEED: int = 0  # of the random tensors
INTERACTIVE: bool = True  # False adds a still to each figure, for pages without scripts
OUT: str = ""  # folder for what the notebook hands on; empty: a temporary one

# %%
import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from ultralong import figures
from ultralong.attention import make_attention_context
from ultralong.attention.balance import balanced, imbalance, sends_nothing
from ultralong.attention.choose import RowSpec, choose_scheme
from ultralong.attention.layout import contiguous, zigzag
from ultralong.attention.ring import rectangles
from ultralong.bench.results import rows_of
from ultralong.course import check, predict, reveal
from ultralong.course.exchanges import recorded
from ultralong.figures.parallel import rank_timeline, shares_of_one, token_ownership, traffic, work_of_ranks
from ultralong.figures.play import play
from ultralong.notebook_tools import output_folder, store
from ultralong.utils.local_ranks import run_ranks

torch.set_num_threads(1)
out = output_folder(OUT)
print(f"{TOKENS} tokens, {RANKS} ranks, {HEADS} query heads and {KV_HEADS} kv heads")

# %% [markdown]
# ## Who holds what
#
# The simplest layout gives every rank one run of tokens. *Zigzag* cuts the row into twice as many chunks and gives
# rank $r$ the chunks $r$ and $2P - 1 - r$: one from the front, one from the back.
#
# In both layouts all ranks hold equally many tokens. But a causal token sees only those before it, so what has to be
# shared out is not tokens but *pairs*. Token 0 makes one pair of query and key, the last token makes as
# many as the row has. In a row of 64 tokens the first quarter makes 136 of 2,080 pairs, the last quarter 904. A rank of
# a ring gets the keys of the others one *hop* after the other, and at each hop all ranks wait for the slowest.

# %%
# Contiguous layout: who is done first, and waits?
predict("06.idle", ["rank 0", "the last rank", "nobody"], guess=None)

# %%
layouts = {"contiguous": contiguous(TOKENS, RANKS), "zigzag": zigzag(TOKENS, RANKS)}


def owners(layout):
    """The rank of every token, in the row's order."""
    found = [0] * layout.padded
    for rank in range(layout.ranks):
        for token in layout.positions(rank).tolist():
            found[token] = rank
    return found


figures.show(
    token_ownership({name: owners(layout) for name, layout in layouts.items()}, "Who holds which tokens", ranks=RANKS),
    f"Two strips of {TOKENS} tokens. Contiguous: one run for each of {RANKS} ranks. Zigzag: each rank holds one chunk "
    "of the first half and the mirrored one of the second half.")


# %%
def work_by_hop(layout):
    """For every rank its query-key pairs at each hop of a ring; hop 0 is its own block."""
    rows = []
    for rank in range(layout.ranks):
        mine = layout.ranges(rank)
        own = sum(int((layout.positions(rank) <= q).sum()) for q in layout.positions(rank).tolist())
        hops = [own]
        for hop in range(1, layout.ranks):
            theirs = layout.ranges((rank - hop) % layout.ranks)
            hops.append(sum((r.stop - r.start) * (k.stop - k.start) for r, k in rectangles(mine, theirs, None)))
        rows.append(hops)
    return rows


work = {name: work_by_hop(layout) for name, layout in layouts.items()}
idle = {}
for name, rows in work.items():
    slowest = [max(row[hop] for row in rows) for hop in range(RANKS)]  # all wait for the slowest, hop by hop
    idle[name] = 1 - sum(map(sum, rows)) / (RANKS * sum(slowest))
    print(f"{name:10} ranks wait {idle[name]:.0%} of the time")

# %% tags=["check"]
pairs = TOKENS * (TOKENS + 1) // 2
ends = [sum(work["contiguous"][rank]) for rank in (0, -1)]
assert (pairs, *ends) == (2080, 136, 904) or (TOKENS, RANKS) != (64, 4), "other pairs than said above"
for name, rows in work.items():
    assert sum(map(sum, rows)) == pairs, f"{name}: a causal pair is computed twice, or not at all"
assert idle["zigzag"] == 0, "zigzag gives every rank the same work at every hop"
assert idle["contiguous"] > 0.25, "contiguous leaves early ranks waiting"
print(f"ok: each of the {pairs:,} causal pairs once; zigzag never waits")

# %%
most = max(max(row) for rows in work.values() for row in rows)
for name in layouts:
    title = f"{name.capitalize()}: work of each rank, hop by hop"
    play([work_of_ranks([row[hop] for row in work[name]], title, most=most) for hop in range(RANKS)],
         [f"hop {hop}" for hop in range(RANKS)],
         f"{name}: bars of work by rank, hop by hop. " + ("Rank 0 works at the first hop only; at each further "
         "hop one more rank waits." if name == "contiguous" else "All bars are equal at every hop."))
reveal("06.idle", "rank 0", "Its tokens see nothing of the other ranks.")

# %%
figures.show(rank_timeline(work["contiguous"], "Contiguous: who computes when, in query-key pairs"),
             "Ranks against hops: after hop 0 rank 0 waits at every hop, rank 1 works at one more, the last at all.")

# %% [markdown]
# **What you should see.** In the contiguous layout rank 0 computes at hop 0 and then waits; the last rank never does.
# All ranks finish when the slowest does, so two fifths of the machine's time is lost. In zigzag the bars of a hop are
# equal. Its rectangles are also *full*: two pieces of different ranks are either wholly before or wholly after each
# other, so a hop needs no mask.
#
# How to read the last figure: a row is a rank, a column is a hop, and the number is how many query-key pairs are
# computed there. A cell with "waits" is a GPU that is paid for and idle. Sum a row and you have a rank's work; the
# largest number of each column, added up, is the time of the whole ring. With more ranks the contiguous layout gets
# worse, until half of the machine waits: half of all rectangles are empty. Zigzag stays at zero.
#
# The mirrored chunks do it. Rank $r$ has an early chunk, which sees little, and the chunk at the same distance from the
# end, which sees the rest. The same trick balances any work that grows along a line.

# %%
def my_zigzag(rank, ranks):  # two of the 2P chunks
    ...


check("06.zigzag", my_zigzag)


# %%
def my_sees(mine, theirs):  # pieces (start, stop); which (index of mine, index of theirs) see each other?
    ...


check("06.rectangles", my_sees)

# %% [markdown]
# ## Ulysses: tokens for heads
#
# Heads don't look at each other. So before attention every rank swaps: it gives away most heads of its tokens and gets
# all tokens of a few heads. One *all-to-all* does it. Then each rank runs ordinary attention over the whole row, and a
# second all-to-all swaps back. Nothing waits, as all heads cost the same. The price: heads have to split over the
# ranks.
#
# With [grouped queries](https://arxiv.org/abs/2305.13245) there are fewer kv heads than query heads, and the order
# matters: the kv head that a group of query heads shares has to go to the rank that gets the group. Llama-3.1-8B has 32
# query heads and 8 kv heads. Over up to 8 ranks both split evenly. Over 16 ranks two ranks need the same kv head, so it
# is sent twice. Over 64 ranks a rank would get half a query head, which does not exist: `ulysses` is refused there, and
# `auto` takes gathered keys. So up to 32 GPUs can share a row of this model by Ulysses alone.

# %%
def swap_of(rank, world):
    """For each head and token of this rank after the exchange: the rank that held the token before."""
    share, part = TOKENS // world, HEADS // world
    before = torch.full((HEADS, TOKENS), -1)
    before[:, rank * share:(rank + 1) * share] = rank
    sent = before[:, rank * share:(rank + 1) * share].reshape(world, part, share).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return received.transpose(0, 1).reshape(part, TOKENS).tolist()  # whose tokens these were


swapped = run_ranks(swap_of, RANKS, timeout=300)


def heads_map(rows, title):
    """Heads against tokens: a cell is coloured by the rank that holds it."""
    return token_ownership({f"head {head}": row for head, row in enumerate(rows)}, title, ranks=RANKS)


before = [[token // (TOKENS // RANKS) for token in range(TOKENS)] for _ in range(HEADS)]
after = [[head // (HEADS // RANKS)] * TOKENS for head in range(HEADS)]
play([heads_map(before, ""), heads_map(after, "")], ["before: tokens", "after: heads"],
     "Heads against tokens. Before the exchange a rank holds a block of columns, its tokens with all heads; after it a "
     "block of rows, some heads with all tokens.")

# %% tags=["check"]
share = TOKENS // RANKS
for rank, rows in enumerate(swapped):
    assert rows == [[token // share for token in range(TOKENS)]] * (HEADS // RANKS), f"rank {rank} lacks tokens"
print("ok: after the exchange every rank holds all tokens of its heads, in the row's order")


# %%
def my_tokens_to_heads(x, rank, world):  # (T/P, H, D) -> (T, H/P, D), by dist.all_to_all_single
    ...


check("06.all_to_all", my_tokens_to_heads)

# %% [markdown]
# **What you should see.** Columns turn into rows. The block on the diagonal stays where it is; everything else travels.
# Between the two exchanges every rank runs ordinary causal attention over the whole row. So Ulysses works with any
# kernel, also with one that cannot return a log-sum-exp. Position embeddings are applied before the exchange, while a
# rank still knows which tokens it holds.
#
# ## What travels
#
# The production code runs on real processes here, and a recorder notes what each rank sends. First guess: with twice as
# many ranks, how much does *one* rank send under Ulysses?

# %%
predict("06.bytes", ["more", "less", "the same"], guess=None)


# %%
def exchanges_of(rank, world, schemes, seed):
    """Run one forward pass of each scheme and return what this rank sent, by scheme and target."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, TOKENS, HEADS, 16, generator=generator)
    k, v = torch.randn(2, 1, TOKENS, KV_HEADS, 16, generator=generator)
    sent = {scheme: [0] * world for scheme in schemes}
    for scheme in schemes:
        context = make_attention_context(TOKENS, dist.group.WORLD, scheme, heads=HEADS, kv_heads=KV_HEADS)
        with recorded() as found:
            context.attend(*(context.shard(x) for x in (q, k, v)))
        for each in found:
            sent[scheme][each.target] += each.bytes
    return sent


schemes = ("ulysses", "gathered", "ring")
of_ranks = run_ranks(exchanges_of, RANKS, schemes, SEED, timeout=300)
sent = {scheme: [each[scheme] for each in of_ranks] for scheme in schemes}
play([traffic(sent[scheme]) for scheme in schemes], list(schemes),
     "Who sends how much to whom. Ulysses: the same to everyone. Gathered: more from late ranks to early ones. Ring: "
     "only to the next rank.")

# %% tags=["check"]
size, number = 16, 4  # head size, bytes of a float32
everything = number * size * (TOKENS // RANKS) * (2 * HEADS + 2 * KV_HEADS) * (RANKS - 1) // RANKS
for rank in range(RANKS):
    assert sum(sent["ulysses"][rank]) == everything, "Ulysses sends q, k, v and the output, but for its own part"
    halves = (RANKS - 1) + rank  # zigzag: the first chunk to all others, the second one to the ranks before
    assert sum(sent["gathered"][rank]) == halves * number * size * TOKENS // (2 * RANKS) * 2 * KV_HEADS
    assert [target for target in range(RANKS) if sent["ring"][rank][target]] == [(rank + 1) % RANKS]
half = [] if RANKS < 4 else [
    each["ulysses"] for each in run_ranks(exchanges_of, RANKS // 2, ("ulysses",), SEED, timeout=300)]
print("ok: a rank sends " + ", ".join(f"{scheme} {max(map(sum, sent[scheme])):,} bytes" for scheme in schemes))

# %%
ratio = f"{sum(sent['ulysses'][0]) / sum(half[0]):.2f} times as much with twice the ranks. " if half else ""
reveal("06.bytes", "less", f"{ratio}It holds half of the tokens, and sends a little more of what it holds. "
       "Per rank it is (P - 1) / P^2 of the row.")

# %% [markdown]
# **What you should see.** Ulysses spreads evenly. Gathered keys are sent only to ranks whose queries see them. The ring
# sends to one neighbour, which suits slow links between hosts. Ulysses sends least here, where kv heads are half of the
# query heads. In Llama-3.1-8B they are a quarter, 8 of 32. There gathering or passing keys and values is less than
# swapping everything, as long as there are few ranks. Over many ranks Ulysses sends less and less, the other two don't.
#
# The formulas behind it, for one rank and one forward pass, with $n$ tokens, $P$ ranks, $H$ query heads and $K$ kv
# heads of size $D$. Ulysses: $(P-1)/P^2 \cdot n D\,(2H + 2K)$ numbers, as queries, keys, values and the output travel
# (with $P$ in place of $K$ where there are more ranks than kv heads). Ring: at most $(P-1)/P \cdot n D \cdot 2K$, as
# every rank passes on each part once; a chunk that no rank behind it sees stays where it is. The next cells put in a
# real model's numbers and check both formulas against the recorded bytes.

# %%
def ulysses_numbers(n, ranks, heads, kv_heads, size):
    """Numbers that one rank sends in a forward pass under Ulysses; each rank needs a kv head, if need be a copy."""
    return (ranks - 1) * n * size * (2 * heads + 2 * max(kv_heads, ranks)) // ranks**2


def ring_numbers(n, ranks, kv_heads, size):
    """Numbers that one rank sends in a forward pass of a ring."""
    return (ranks - 1) * n * size * 2 * kv_heads // ranks


for count in (2, 4, 8, 16, 32):
    both = ulysses_numbers(2**20, count, 32, 8, 128), ring_numbers(2**20, count, 8, 128)
    print(f"8B, 1,048,576 tokens, {count:2} ranks: one layer sends " + ", ".join(
        f"{name} {2 * numbers / 2**30:.2f} GiB" for name, numbers in zip(("ulysses", "ring"), both)))

# %% tags=["check"]
most_sent = {scheme: max(map(sum, sent[scheme])) for scheme in ("ulysses", "ring")}
assert most_sent["ulysses"] == number * ulysses_numbers(TOKENS, RANKS, HEADS, KV_HEADS, size)
assert most_sent["ring"] == number * ring_numbers(TOKENS, RANKS, KV_HEADS, size)
print("ok: both formulas give the bytes of the rank that sends most, as the recorder saw them")

# %% [markdown]
# **What you should see.** At two ranks the ring sends less, at 8 and more Ulysses does, by a growing factor. Divide by
# your link's rate and you have the time that attention's arithmetic has to hide. One layer of 8B at a million tokens
# computes for seconds, so inside a host either is hidden; between hosts with slow links it may not be. Short rows are
# the hard case: the bytes shrink with the row, the arithmetic with its square.
#
# ## Exact, however many ranks
#
# Partial results are joined by their log-sum-exp, in float32. Does an error grow with the number of joins?
#
# It is a fair question. A ring of 32 ranks joins 32 parts, and each join rounds. Ulysses joins nothing. So one would
# expect the ring to be a little worse, and worse with more ranks.

# %%
predict("06.error", ["grows with the ranks", "stays"], guess=None)


# %%
def errors_of(rank, world, schemes, seed):
    """Each scheme's largest error of the output against float64 on one process, in units of its largest value."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, TOKENS, HEADS, 16, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 1, TOKENS, KV_HEADS, 16, generator=generator, dtype=torch.float64)
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k.repeat_interleave(HEADS // KV_HEADS, 2),
                                      v.repeat_interleave(HEADS // KV_HEADS, 2))), is_causal=True).transpose(1, 2)
    found = {}
    for scheme in schemes:
        context = make_attention_context(TOKENS, dist.group.WORLD, scheme, heads=HEADS, kv_heads=KV_HEADS)
        got = context.unshard(context.attend(*(context.shard(x.float()) for x in (q, k, v)))).double()
        found[scheme] = float((got - exact).abs().max() / exact.abs().max())
    return found


counts = [count for count in (1, 2, 4) if HEADS % count == 0]
by_count = [run_ranks(errors_of, count, schemes, SEED, timeout=300) for count in counts]  # what each rank found
errors = {scheme: (counts, [max(each[scheme] for each in ranks) for ranks in by_count]) for scheme in schemes}
figure = figures.lines(errors, "Error of the output in float32", x="ranks", y="relative error", log_y=True,
                       markers=True)
figure.update_yaxes(range=[-9, -5], tickvals=None, dtick=1)
figure.update_xaxes(tickvals=counts)
figures.show(figure,
             "Three nearly flat lines below one millionth: errors of a rounding, whatever the number of ranks.")

# %% tags=["check"]
worst = max(max(values) for _, values in errors.values())
assert worst < 5e-6, "more than roundings: a scheme left keys out, or joined in a narrow type"
reveal("06.error", "stays", f"The largest is {worst:.0e}, a few roundings of float32. Points differ by chance; "
       "`ultralong bench error-curve` draws more of them.")


# %%
def my_ring(q, k, v, dout, rank):  # a ring of two: (out, dq, dk, dv) of this rank's tokens
    ...


check("06.ring", my_ring)

# %% [markdown]
# ## Packed rows: documents dealt out whole
#
# Where documents don't see each other, most rows need no exchange at all: whole documents are dealt to ranks so that
# tokens *and* work are even. Only a document that is too heavy for one rank is cut.
#
# The work of a document is the square of its length, so a fair deal by tokens is not a fair deal by work. Ten documents
# of 2 to 14 tokens over two ranks: each rank gets half of the tokens, and the long ones must not all lie on one side.
# The exercise is a small version of what the library does; sorting by length and giving each document to the rank with
# the least work so far is close to the best.
#
# The recipe itself does not mask documents, so its rows always need the exchange. Masked rows are what
# [03_separator_packing](03_separator_packing.ipynb) calls the other choice, and SFT uses them.

# %%
lengths = [14, 12, 9, 7, 6, 5, 4, 3, 2, 2]
edges = [0]
for length in lengths:
    edges.append(edges[-1] + length)
row = balanced(edges[-1], 2, edges, smallest=1)
figures.show(
    token_ownership({"document": [i for i, n in enumerate(lengths) for _ in range(n)], "rank": owners(row)},
                    "A packed row over two ranks: document and rank of each token", ranks=len(lengths)),
    "Two strips: the number of each token's document, and of its rank. Documents lie whole on one rank.")
print(f"busiest rank: {imbalance(row, edges):.3f} times the mean; sends nothing: {sends_nothing(row, edges)}")

# %% tags=["check"]
assert imbalance(row, edges) < 1.2, "one rank has much more work than the other"
assert sorted(t for rank in range(2) for t in row.positions(rank).tolist() if t < edges[-1]) == list(range(edges[-1]))
print("ok: every token once, work nearly even")


# %%
def my_deal(lengths, ranks):  # the rank of each document; a document costs the square of its length
    ...


check("06.deal", my_deal)

# %% [markdown]
# ## Which one, on real GPUs
#
# | | Ulysses | gathered keys | ring |
# |---|---|---|---|
# | sends per rank | q, k, v and output, divided by the ranks | k and v that others see | k and v, to the next rank |
# | limit | heads must split over the ranks | buffer of keys | latency of each hop |
# | suits | one host with fast links | few kv heads, packed rows | across hosts |
# | two levels | inside the host | across hosts | across hosts |

# %%
results = Path("results") / "attention_131k.json"
recorded_rows = json.loads(results.read_text()) if results.exists() else None
if DEVICE == "cuda":
    table = out / "attention.json"
    subprocess.run([sys.executable, "-m", "ultralong", "bench", "attention", "--lengths", "131072", "--ranks",
                    str(GPUS), "--json", str(table)], check=True)
    recorded_rows = json.loads(table.read_text())
if recorded_rows is not None:
    wanted = [r for r in rows_of(recorded_rows) if r["tokens"] == 131072 and not r["packed"] and r["of_one"]
              and r["name"] != "single" and not r["name"].startswith(("torch", "ring-flash"))]
    machine, day = recorded_rows["machine"]["device"], recorded_rows["machine"]["date"]
    shares = {kernel: {r["name"]: r["of_one"] for r in wanted if r["kernel"] == kernel}
              for kernel in dict.fromkeys(r["kernel"] for r in wanted)}
    short = [r["overhead_ms"] for r in rows_of(recorded_rows)
             if r["tokens"] == 8192 and not r["packed"] and r["name"] in schemes]
    if short:
        print(f"rows of 8,192 tokens: a call takes {min(short):.1f} to {max(short):.1f} ms more than its share of one "
              "GPU's time")
    title = f"131,072 tokens, {max(r['ranks'] for r in wanted)} x {machine}, recorded {day}"
    figures.show(shares_of_one(shares, title),
                 "Shares of one GPU's attention rate by scheme and kernel: all of them between "
                 f"{min(r['of_one'] for r in wanted):.0%} and {max(r['of_one'] for r in wanted):.0%}.")
    if DEVICE == "cuda":
        store(slowest_share=min(r["of_one"] for r in wanted), schemes=len({r["name"] for r in wanted}))

# %% [markdown]
# **What you should see.** On GPUs of one host all three reach the single GPU's rate: transfers run beside computing.
# What decides then is memory, the number of heads, and the links between hosts. Short rows lose more: at 8,192 tokens a
# scheme costs milliseconds that nothing hides, as printed above.
#
# Three questions choose a scheme. Do the heads split over the ranks? Then Ulysses, the simplest. Are the rows masked
# and full of short documents? Then gathered keys, most of which are never sent. `scheme: auto` asks these two, and
# `ultralong plan` shows the seconds. The third one is whether the ranks of a row span hosts.
#
# ## Two hosts
#
# Inside a host a GPU sends hundreds of gigabytes a second, between hosts some tens. So what counts is not what is sent
# but what *crosses*.
#
# First try not to cross at all. In training the ranks of a row are neighbours. With a `context_parallel_size` that
# divides a host's GPUs all exchanges of attention stay inside hosts, and other hosts work on other rows.
#
# Where a row needs more GPUs than a host has, the library can treat the two kinds of links apart.
# `make_attention_context` takes a mesh of two levels, (hosts, ranks of a host). Inside a host Ulysses swaps tokens for
# heads. After that a rank has a few kv heads only, and a ring or gathered keys take just these across. The trainer's
# `parallel:` block has one level so far; two levels are for loops of your own, and `ultralong bench attention --meshes
# 2x4` measures them.

# %%
my_levels = None  # {"mesh": ..., "scheme": ...}

check("06.levels", my_levels)

# %% [markdown]
# ## Hand it on
#
# The block below takes the place of the `parallel:` block in a training config ([presets](../ultralong/presets) have
# one each, and so has `run.yaml` of notebook 07). It holds what `auto` chooses; a name makes it fixed. The file is
# `parallel.yaml` in the folder `OUT` (`made/06` in a course folder).

# %%
scheme, why = choose_scheme("auto", RANKS, 1, RowSpec(TOKENS, None, HEADS, KV_HEADS))
print(f"auto takes {scheme}: {why}\n")
block = {"parallel": {"context_parallel_size": RANKS, "scheme": scheme}}
(out / "parallel.yaml").write_text(yaml.safe_dump(block))
print((out / "parallel.yaml").read_text())

# %% tags=["check"]
from ultralong.training.config import ParallelConfig

assert ParallelConfig(**yaml.safe_load((out / "parallel.yaml").read_text())["parallel"]).context_parallel_size == RANKS
print("ok: the trainer reads it")

# %% [markdown]
# Stuck? `hint("06.zigzag")` gives a nudge, `solution("06.zigzag")` an answer; import both from `ultralong.course`.
#
# ## What this does not show
#
# * Four ranks on two cores take turns, so times here mean nothing; only counts and errors do.
# * The recorded rates are of GPUs that share one host. Between hosts nothing was timed; bytes were counted.
# * The backward pass sends more: keys travel again, and their gradients in float32.
# * The bytes of a real model above are arithmetic, not a measurement; the two formulas were checked on the small row.
#
# ## At the next scale
#
# [12_many_hosts](12_many_hosts.ipynb) lays a row over 32 GPUs of four hosts and refuses what does not divide.
# [13_serve_and_cost](13_serve_and_cost.ipynb) reads one prompt on two GPUs by the same code. On a machine of yours,
# `ultralong bench attention --ranks N --lengths 131072,1048576` gives the table above for it.
#
# ## Recap
#
# * Zigzag gives every rank an early and a late chunk: equal work at every hop, and no masks between ranks.
# * Ulysses swaps tokens for heads; gathered keys and the ring bring keys to the queries. All equal one GPU.
# * Packed rows whose documents don't see each other are dealt out whole, and nothing is sent.
# * Keep a row inside one host; where it spans hosts, exchange inside them first.
#
# **Go on reading:** the library's [ring](../ultralong/attention/ring/ring.py),
# [Ulysses](../ultralong/attention/ulysses.py) and [layouts](../ultralong/attention/layout.py);
# [DeepSpeed-Ulysses](https://arxiv.org/abs/2309.14509), [Ring Attention](https://arxiv.org/abs/2310.01889),
# [USP](https://arxiv.org/abs/2405.07719) (two levels).
#
# **Next:** [07_memory_and_the_trainer](07_memory_and_the_trainer.ipynb): what else fills a GPU.

# %%
store(idle_contiguous=idle["contiguous"], idle_zigzag=idle["zigzag"], bytes_ulysses=sum(sent["ulysses"][0]),
      worst_error=worst, imbalance=imbalance(row, edges))

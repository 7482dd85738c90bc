# %% [markdown]
# # 9. Can a long model learn to answer from short conversations?
#
# Pretraining on long rows teaches a model to use its window. It also makes it worse at conversations: books have no
# questions in them. So the recipe ends with a short stage of *supervised fine-tuning* (SFT) on conversations. One thing
# about it is surprising: none of them is longer than 8,192 tokens, although the window is a million. Does the model
# forget the window that was so expensive? Here you make labels, pack conversations, train on them, and then judge
# recorded results of a real model, without saying more than they show.
#
# ### At a glance
#
# | | |
# |---|---|
# | time on CPU | 40 s, two busy cores (measured November 2026) |
# | reading and doing | 25 and 25 minutes |
# | memory | 1.2 GB |
# | downloads, cost | none |
# | one GPU adds | the same on a model of yours: `MODEL`, `DEVICE=cuda`, more `STEPS` |
# | two GPUs, a cluster add | nothing here: rows are short, and the trainer shards as before |
#
# **You will be able to**
# * say which tokens of a conversation are learned, and check it on any chat template;
# * pack conversations so that they do not see each other, and prove it;
# * tell a mean over targets from a mean over examples;
# * hold answers out, measure them before and after, and say what follows.
#
# **Needs:** a chat model; what a label is. **Before this:** [08_one_gpu_run](08_one_gpu_run.ipynb) and
# [03_separator_packing](03_separator_packing.ipynb). Terms: [SFT](https://arxiv.org/abs/2203.02155),
# [chat templates](https://huggingface.co/docs/transformers/chat_templating).

# %% tags=["parameters"]
MODEL: str = "miniature"  # a folder or a hub id, with a chat template
WINDOW: int = 1024  # tokens to extend it to before SFT
LENGTH: int = 512  # tokens of a packed row, at most the old window
TALKS: int = 120  # conversations that are made
STEPS: int = 8  # steps of SFT
DEVICE: str = "cpu"  # where losses and needles are measured: cpu or cuda
SEED: int = 0  # of conversations, order and needles
INTERACTIVE: bool = True  # False adds a still to each figure, for pages without scripts
OUT: str = ""  # folder for what the notebook hands on; empty: a temporary one

# %%
import json
import random
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from ultralong import extend, figures, load_config, needle, sft
from ultralong.course import check, predict, reveal
from ultralong.data.chat.endpoint import Endpoint
from ultralong.data.chat.holdout import hold_out
from ultralong.data.chat.pack import ChatSettings, encode_chat, pack_chat
from ultralong.data.chat.refine import RefineSettings, refine
from ultralong.data.chat.synthetic_qa import synthetic_qa_conversations
from ultralong.data.read.conversations import Conversation
from ultralong.evaluation.measures.intervals import wilson
from ultralong.evaluation.measures.row_loss import loss_change, open_for_loss, row_loss
from ultralong.figures.play import play
from ultralong.figures.samples import forest
from ultralong.notebook_tools import output_folder, store
from ultralong.utils import settings
from ultralong.utils.files import read_jsonl

# %%
torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
out = output_folder(OUT)
for name in ("extended", "training", "heldout", "refined", "sft"):
    shutil.rmtree(out / name, ignore_errors=True)
recorded = json.loads(Path("results/sft_smollm2.json").read_text())
extension = extend(MODEL, to=WINDOW, out=out / "extended", quiet=True)
tokenizer = AutoTokenizer.from_pretrained(out / "extended")
print(f"{MODEL}: {extension.old_window:,} to {extension.new_window:,} tokens; recorded: {recorded['title']}")

# %% [markdown]
# ## One conversation, as the model sees it
#
# A model knows no messages, only tokens. The *chat template*, a small program that comes with the tokenizer, writes
# roles and marks around each message. The model is to learn what the assistant says, and the token that ends its turn:
# generation stops there, so a model that never learned it never stops. It is *not* to learn what the user says, for
# then it learns to ask. `encode_chat` gives both: the tokens, and 1 for each token that is to be produced.

# %%
# Of all tokens of short real instructions with their answers, which share is learned?
predict("09.targets", ["a tenth", "a half", "nine tenths"], guess=None)

# %%
talk = [{"role": "user", "content": "The number of the log is 48. What is it?"},
        {"role": "assistant", "content": "It is 48."},
        {"role": "user", "content": "And half of it?"}, {"role": "assistant", "content": "24."}]
ids, mask = encode_chat(tokenizer, talk)
ends = [place for place in range(len(ids)) if mask[place] and not (mask + [0])[place + 1]]
tokens = [tokenizer.decode([token]).replace("\n", "⏎").replace("<|im_start|>", "[").replace("<|im_end|>", "]")
          for token in ids]


def next_learned(learned):
    """1 at each place whose next token is learned."""
    return [*learned[1:], 0]


choices = {"every token": [1] * len(ids), "answers": [int(m and p not in ends) for p, m in enumerate(mask)],
           "and their end": mask}
view = slice(max(0, ends[0] - 9), ends[0] + 5)
shown = {"token": tokens[view]} | {
    name: [text if on else "" for text, on in zip([*tokens[1:], ""], next_learned(learned))][view]
    for name, learned in choices.items()}
owner = {"token": [0] * len(shown["token"])} | {
    name: [1 if on else -1 for on in next_learned(learned)][view] for name, learned in choices.items()}
picture = figures.token_table(shown, owner, "Labels under three rules; [ and ] begin and end a turn")
figures.show(picture, "Fourteen tokens around the first answer, with the label of each below under three rules. Every "
             "token: all have labels. Answers: only those before the answer's tokens. And their end: one more.")

# %% tags=["check"]
text = tokenizer.decode([token for token, on in zip(ids, mask, strict=True) if on])
assert text == "It is 48.<|im_end|>24.<|im_end|>" or MODEL != "miniature", f"other tokens are learned: {text}"
assert len(ends) == 2, "two answers have two ends"
drawn = [sum(value != 0.5 for value in line) for line in picture.data[0].z[1:]]
assert drawn == [sum(next_learned(learned)[view]) for learned in choices.values()], "the picture has other labels"
assert drawn[2] == drawn[1] + 1, "the end is one label more"
kept = recorded["rows"]["conversations"]["training"]
share = kept["target_tokens"] / kept["document_tokens"]
reveal("09.targets", "a half", f"{share:.0%} of {kept['document_tokens']:,} recorded tokens. Of a document all are.")
assert (kept["documents"], round(3 * kept["documents"] / kept["rows"])) == (23475, 148), \
    "what the text says of the rows"
print(f"ok: {sum(mask)} of {len(ids)} tokens are learned here: {text!r}")


# %%
def my_labels(ids, answers):  # one label a token, -100 where nothing is learned
    ...


check("09.labels", my_labels)

# %% [markdown]
# **What you should see.** Labels stand one place before their token, as place t predicts token t + 1. So the place that
# opens the assistant's turn has a label, the first word of the answer, and the answer's last word has one, the end.
# The last two
# lines differ by a single cell for each answer. Leaving it out is the most expensive mistake of SFT: the loss looks
# better for it, and the model talks on after its answer until a limit cuts it off.
#
# Templates differ in what they write, and some rewrite earlier turns. The library does not guess: it renders a
# conversation with and without the answer, and refuses a template under which the two do not agree token by token.
#
# ## Many conversations in a row
#
# Conversations are short, rows are not. Padding each to the row's length would waste most of the work. So they are
# packed whole, several to a row. Long documents were *not* masked from each other, as [notebook
# 3](03_separator_packing.ipynb) explains; conversations are. Each has positions from zero, and sees itself only.
#
# The conversations here are made: invented facts in a passage of random words, asked for one by one. They fit the old
# window, so what the model can do beyond it can't come from practice. Some are held out before training, and whatever
# shares 13 words in a row with those is left out. That is stricter than it sounds: two conversations about one passage
# overlap although their questions differ, and a model that saw the passage in training would have a head start.

# %%
draw = random.Random(SEED)
letters = "abcdefghijklmnoprstuvw"
vocabulary = ["".join(draw.choices(letters, k=draw.randint(3, 7))) for _ in range(400)]
texts = [" ".join(draw.choices(vocabulary, k=LENGTH * 2)) for _ in range(4)]
made = synthetic_qa_conversations(texts, tokenizer, count=TALKS, max_tokens=LENGTH // 2, seed=SEED, full=0.3)
talks = [Conversation(f"talk-{number}", messages, "made here", "CC0-1.0") for number, messages in enumerate(made)]
parts = hold_out(talks, TALKS // 5, SEED)
chat = ChatSettings(length=LENGTH, max_tokens=LENGTH, seed=SEED)
rows = {name: pack_chat(some, tokenizer, out / name, chat, quiet=True)
        for name, some in (("training", parts.training), ("heldout", parts.heldout))}
some = [rows["training"][number] for number in range(min(6, len(rows["training"])))]
figures.show(figures.packed_row([row.boundaries for row in some], "Conversations in packed rows; the last block of a "
                                "row may be padding"),
             "Six rows as bars of 512 tokens. Each is nearly filled by two whole conversations; slivers at the end are "
             "padding.")
print(f"{len(talks)} made, {len(parts.heldout)} held out, {parts.overlapping} overlap with those; "
      + ", ".join(f"{len(packed)} rows of {name}" for name, packed in rows.items()))

# %%
toy = [0, 5, 12, 16]
play([figures.attention_mask(toy, masked) for masked in (False, True)], ["not masked", "masked"],
     "A row of 16 tokens with three conversations, query down and key across. Not masked: the whole lower triangle. "
     "Masked: three small triangles along the diagonal.")

# %% [markdown]
# Is the mask real? Then a conversation's loss in a packed row is its loss alone. The first is computed by the trainer's
# code on rows, the second by transformers on one conversation at a time.

# %%
model = open_for_loss(out / "extended", DEVICE)
before = row_loss(model, rows["heldout"], quiet=True)
alone = []
for talk in parts.heldout:
    ids, mask = (torch.tensor([x], device=model.device) for x in encode_chat(tokenizer, talk.messages))
    if ids.numel() > LENGTH:
        continue  # packing left it out too
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    alone.append((float(losses[mask[0, 1:].bool()].sum()), int(mask[0, 1:].sum())))

# %% tags=["check"]
packed = [(float(s), int(n)) for s, n in zip(before.sums, before.counts, strict=True) if n]
packed, single = (sorted(each, key=lambda pair: (pair[1], pair[0])) for each in (packed, alone))
assert [n for _, n in single] == [n for _, n in packed], "another number of targets"
apart = max(abs(a - b) for (a, _), (b, _) in zip(single, packed, strict=True))
assert apart < (0.01 if DEVICE == "cpu" else 2.0), f"a conversation's loss depends on its neighbours: {apart}"
print(f"ok: {len(packed)} conversations, the same loss alone and in a row, within {max(apart, 1e-6):.0e} nats")

# %% [markdown]
# ## Which mean?
#
# Answers have different lengths. Sum all losses and divide by all targets, and a long answer counts as often as it has
# tokens. Take the mean of each answer first, and each *answer* counts once. Neither is wrong, but they are different
# numbers, and a trainer that mixes them up on the way from one rank to the next trains something that depends on how
# rows were dealt out. This trainer divides once, by the targets of all ranks.

# %%
# Each point is one conversation
points = {"a conversation": ([n for _, n in packed], [s / n for s, n in packed])}
token_mean = before.mean
example_mean = sum(s / n for s, n in packed) / len(packed)
figure = figures.lines({"over targets": ([0, max(points["a conversation"][0])], [token_mean] * 2),
                        "over examples": ([0, max(points["a conversation"][0])], [example_mean] * 2)},
                       "Loss of held-out answers, before SFT", x="targets of the conversation", y="nats per target")
figure.add_scatter(x=points["a conversation"][0], y=points["a conversation"][1], mode="markers", name="a conversation",
                   marker={"size": 8, "color": figures.PALETTE[2]})
figures.show(figure.update_layout(showlegend=True),
             "Points of conversations by their targets. Most lie below one nat, a few near three, whatever their "
             "length. Two level lines, the means over targets and over examples, nearly on each other.")

# %% tags=["check"]
assert abs(token_mean - sum(s for s, _ in packed) / sum(n for _, n in packed)) < 1e-6
assert token_mean != example_mean, "the two means agree by accident: take more conversations"
print(f"ok: {token_mean:.3f} over targets, {example_mean:.3f} over examples")


# %%
def my_means(examples):  # (mean over targets, mean over examples)
    ...


check("09.means", my_means)

# %% [markdown]
# **What you should see.** Two groups: questions for facts cost a third of a nat, quotes of random words about three, as
# nothing but copying helps there. Both groups have short and long answers, so here the two means lie close together.
# They part where length and difficulty go together: in real data a short answer is often one hard word, a long one
# mostly easy words. Then the mean over examples is the higher one, and training on it cares more for short answers.
#
# ## Train
#
# A step takes whole rows, and the paper counts *examples*: 128 a step. Three rows of 8,192 tokens hold about 148 of the
# short instructions that are used below, sixteen rows hold 128 of a thousand tokens. So choose the rows of a step by
# what one of yours holds, not by a number from elsewhere.
#
# The settings are those of the preset [tiny-cpu](../ultralong/presets/tiny-cpu.yaml), with the rows from above. `sft`
# is the trainer that you know, and refuses rows that have no answers. The paper takes a sixth of the learning rate of
# pretraining, 5e-6 after 3e-5, for SFT is to add something and to overwrite nothing. Beyond the loss on answers kept
# apart, needles are asked in twice the old window, before and after.

# %%
config = load_config("tiny-cpu", {
    "model": str(out / "extended"), "data": [{"rows": str(out / "training")}], "length": LENGTH,
    "out": str(out / "sft"), "steps": STEPS, "save_every": 0, "global_batch_size": 2, "optimizer.lr": 1e-4,
    "seed": SEED, "parallel.context_parallel_size": 1})
trained = sft(config, quiet=True)
after = row_loss(open_for_loss(trained.model, DEVICE), rows["heldout"], quiet=True)
change = loss_change(before, after, seed=SEED)
beyond = {}
for name, folder in (("before", out / "extended"), ("after", trained.model)):
    cells = needle(folder, lengths=[WINDOW * 3 // 4], depths=[0.2, 0.8], samples=3, seed=SEED, device=DEVICE)
    beyond[name] = cells["results"][0]["by_length"][0]
log = read_jsonl(Path(config.out) / "log.jsonl")
figures.show(figures.loss_curve({"SFT": [(r["step"], r["loss"]) for r in log]}, "Loss of the answers in each step"),
             "A loss curve of a few steps of SFT that falls from its start, with some noise.")

# %% tags=["check"]
assert change["high"] < 0 or STEPS < 8, "no held-out conversation became more probable"
assert beyond["after"]["n"] == beyond["before"]["n"] == 6
print(f"ok: held-out answers {change['change']:+.3f} nats ({change['low']:+.3f} to {change['high']:+.3f}), better in "
      f"{change['better']:.0%}")
print(f"needles at {WINDOW * 3 // 4} tokens: " + ", ".join(
    f"{name} {cell['value']:.0f}% of {cell['n']} ({cell['low']:.0f} to {cell['high']:.0f})"
    for name, cell in beyond.items()))

# %%
my_changes = None  # {"global_batch_size": ..., ...}, as `--set` and `load_config` take them

check("09.batch", my_changes)

# %% [markdown]
# **What you should see.** A loss that falls on conversations that were never trained on, with an interval far from
# zero. The interval is *paired*: it is of each conversation's own change. The losses themselves differ so much between
# conversations that two separate intervals would overlap, and nothing could be said. Of the needles little can be said:
# the interval of 6 found of 6 begins at 61%.
#
# Remember this form of answer. It comes back in [10_evaluation](10_evaluation.ipynb) for scores and in
# [11_ablations](11_ablations.ipynb) for whole recipes: the same samples, twice, and the interval of the difference.
#
# ## The same on a real model
#
# SmolLM2-135M, extended to 32,768 tokens and pretrained for 40 steps, learned from 23,475 real instructions, none
# longer than its old window of 8,192. 400 were held out. Recorded on one H200.

# %%
# Needles beyond the old window, of 120, after SFT on short conversations?
predict("09.window", ["clearly fewer", "no difference that can be told", "clearly more"], guess=None)

# %%
stages = {"base": "as it came", "pretrained": "before SFT", "tuned": "after SFT"}
answers = {stages[name]: tuple(each[key] for key in ("loss", "low", "high"))
           for name, each in recorded["answer_loss"].items()}
figures.show(forest(answers, "Loss of 400 held-out answers", x="nats per target, 95% interval"),
             "Three intervals of loss that overlap: 2.06 as it came, 2.14 before SFT, 1.99 after it.")
found = {f"{where}, {stages[name]}": each[where] for where in ("within", "beyond")
         for name, each in recorded["needles"].items()}
figures.show(forest({name: (100 * c["correct"] / c["n"], *(100 * x for x in wilson(c["correct"], c["n"])))
                     for name, c in found.items()}, "Needles found", x="per cent, 95% interval", span=(0, 100)),
             "Four intervals. Within the old window 90 per cent before SFT and 88 after, beyond it 45 and 48; each "
             "pair overlaps nearly wholly.")

# %% tags=["check"]
moved = recorded["answer_loss_change_by_sft"]
assert moved["high"] < 0 < answers["before SFT"][2] - answers["after SFT"][1], "paired tells, apart does not"
old, new = (recorded["needles"][name]["beyond"] for name in ("pretrained", "tuned"))
assert (old["correct"], new["correct"], old["n"]) == (54, 57, 120)
shares = [each["correct"] / each["n"] for each in (old, new)]
half = 1.96 * sum(p * (1 - p) / 120 for p in shares) ** 0.5
assert abs(shares[1] - shares[0]) < half, "the needles do differ"
reveal("09.window", "no difference that can be told",
       f"{100 * (shares[1] - shares[0]):+.1f} points, give or take {100 * half:.0f}.")
print(f"ok: answers {moved['change']:+.3f} nats ({moved['low']:+.3f} to {moved['high']:+.3f}), paired")

# %%
from ultralong.course.exercises.practice.nb09 import CLAIMS

print("\n".join(f"{letter}  {claim}" for letter, claim in CLAIMS.items()))
my_claims = ...  # a set of letters
check("09.claims", my_claims)

# %% [markdown]
# **What you should see.** Pretraining on books made answers *worse*, 2.06 to 2.14: that is what SFT has to win back,
# and it did a little more. The three intervals overlap, yet the change is certain, as each answer was compared with
# itself. For needles there was no such luck: 54 and 57 of 120 are one result.
#
# ## Better answers from a larger model
#
# The paper's authors had answers rewritten by a stronger model before training on them. `ultralong data refine` does it
# through any endpoint that speaks OpenAI's protocol. It keeps the original beside each refinement, resumes where it
# stopped, and has a budget that is never exceeded: what a request may cost at most is set aside before it is made.
# Here the endpoint is a few lines in this process, and its "model" only adds a full stop. So this shows the machinery,
# not better answers.


# %%
class Stub(BaseHTTPRequestHandler):
    """Answers each request of the protocol with a fixed sentence, and counts its tokens by words."""

    def do_POST(self):
        """One request."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = sum(len(message["content"].split()) for message in asked["messages"])
        body = json.dumps({"choices": [{"message": {"content": "A refined answer."}, "finish_reason": "stop"}],
                           "usage": {"prompt_tokens": words, "completion_tokens": 3}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Nothing."""


BUDGET = 1200  # tokens of prompts and answers
with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "a-model", max_tokens=64)
    tight = RefineSettings(endpoint, concurrency=1, budget_tokens=BUDGET)
    first = refine(parts.training[:6], out / "refined", tight, quiet=True)
    second = refine(parts.training[:6], out / "refined", RefineSettings(endpoint, concurrency=1), quiet=True)
    server.shutdown()
print(f"with a budget of {BUDGET:,} tokens: {first}")
print(f"resumed without one: {second}")

# %% tags=["check"]
assert first.refined > 0, "the budget was enough for none"
assert first.left > 0, "the budget was enough for all"
assert first.prompt_tokens + first.answer_tokens <= BUDGET, "the budget was exceeded"
lines = read_jsonl(out / "refined" / "refined.jsonl")
assert [line["id"] for line in lines] == [talk.id for talk in parts.training[:6]], "a conversation is missing or twice"
assert all(line["original"] != line["messages"] for line in lines), "an original was lost"
print(f"ok: {len(lines)} conversations, each once, the original beside each")

# %% [markdown]
# ## Long samples, or not?
#
# The recipe takes none. [ProLong](https://arxiv.org/abs/2410.02660) found the same: any share of made-up long samples
# made its long tasks worse. The [Llama 3 report](https://arxiv.org/abs/2407.21783) found the reverse, with 0.1% of
# them, and [Qwen2.5-1M](https://arxiv.org/abs/2501.15383) mixes them in a second stage. They differ in the model, in
# the long pretraining before, and in the samples. We know of no study that varies these one by one. So measure on
# yours; [the recipes' page](../data_recipes/README.md) shows how to mix a share in.
#
# ## Hand it on
#
# In the folder `OUT` (`made/09` in a course folder): the tuned miniature, `sft/model`, is a plain Hugging Face folder,
# and `sft.yaml` is the config of the real run. It starts from the model of notebook 08's `run.yaml`, and takes the rows
# that `ultralong pack sft-offline --tokenizer runs/smollm2-64k --length 8192 --out sft-rows` makes. The next notebook
# measures the tuned miniature with `MODEL="made/09/sft/model"`.

# %%
final = load_config("smollm2-135m-sft")
settings.save(final, out / "sft.yaml", "SFT of SmolLM2-135M after its extension; start it with: ultralong sft sft.yaml")
print((out / "sft.yaml").read_text()[:420])

# %% tags=["check"]
assert load_config(out / "sft.yaml") == final, "the trainer reads another config than was written"
assert (Path(trained.model) / "config.json").exists()
assert (Path(trained.model) / "chat_template.jinja").exists()
print(f"ok: sft.yaml reads back; the tuned model keeps its window of {extension.new_window:,} and its template")

# %% [markdown]
# Stuck? `hint("09.labels")` gives a nudge, `solution("09.labels")` an answer; import both from `ultralong.course`.
#
# ## What this does not show
#
# * A lower loss is not a better answer. Nobody read the answers, and no judge compared them.
# * The held-out answers are of the same source. Of other kinds of questions nothing is known.
# * 120 needles tell 45 from 60 per cent, not from 50. A small loss of the window would not be seen.
# * The made conversations are easy: the answer's words stand in the question.
# * One seed, one model of 135 million parameters.
#
# ## At the next scale
#
# The preset `llama31-8b-sft` has the paper's settings: 128 examples a step, 5e-6, 480 steps after 1M, 140 after 2M, 150
# after 4M. The rows come from `ultralong pack sft-100k`. How many GPUs share a row is `auto` there: name a folder of
# long rows beside the short ones, and the planner lets each row be shared by as many as its work asks for, and says
# why.
#
# ## Recap
#
# * Only answers are learned, each with the token that ends its turn.
# * Conversations are packed whole and masked: the loss of each is the same as alone.
# * Divide once, by all targets. A mean of means is another number.
# * Compare an answer with itself. And say of the window what the interval allows, no more.
#
# **Go on reading:** the library's [template reading](../ultralong/data/chat/template.py),
# [packing](../ultralong/data/chat/pack.py) and [refinement](../ultralong/data/chat/refine.py);
# [ProLong](https://arxiv.org/abs/2410.02660) on SFT of long models.
#
# **Next:** [10_evaluation](10_evaluation.ipynb): does it read, or only find?

# %%
store(target_share=share, apart=apart, change=change["change"], change_high=change["high"],
      needles_after=beyond["after"]["value"], recorded_change=moved["change"], refined=second.refined)

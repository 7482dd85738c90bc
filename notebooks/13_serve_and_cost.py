# %% [markdown]
# # 13. Who can use it, and what does a million tokens cost?
#
# A model is of use to others when they can open it, when their program reads the same positions as the trainer did, and
# when they can pay for it. None of this follows from a low loss. A folder can be cut on its way. A server can ignore
# half of a config, and give answers that look fine up to the old window. And a window of a million tokens has a price
# that nobody sees at 8,192.
#
# Here you check a folder, compute what its cache takes, serve it and ask it, see what other programs make of it, and
# end with the price of one question.
#
# ### At a glance
#
# | | |
# |---|---|
# | time on CPU | 28 s, two cores beside other work (measured November 2026) |
# | reading and doing | 30 and 30 minutes |
# | memory | 1 GB, and 0.5 GB of the server |
# | downloads, cost | none |
# | a GPU adds | the server on it: `DEVICE=cuda`, a model of yours as `MODEL` |
# | two GPUs, a cluster add | one prompt read by all of them: `GPUS` |
#
# **You will be able to**
# * say whether a folder is whole, whose licence it has, and what each program will read from it;
# * compute the cache of any model, in 16 and in 8 bits;
# * tell what limits reading a prompt, and what limits writing an answer;
# * serve a long model, and say what a prompt costs and when its cache is worth keeping.
#
# **Needs:** an extended checkpoint; what a KV cache is. The server needs the extra `serve`. **Before this:**
# [12_many_hosts](12_many_hosts.ipynb), [02_yarn](02_yarn.ipynb). Terms:
# [prefill and decode](https://arxiv.org/abs/2311.18677), [roofline](https://doi.org/10.1145/1498765.1498785),
# [fp8](https://arxiv.org/abs/2209.05433), [OpenAI's protocol](https://platform.openai.com/docs/api-reference/chat).

# %% tags=["parameters"]
MODEL: str = "miniature"  # what is extended and served: a folder or a hub id, with a chat template
WINDOW: int = 2048  # tokens to extend it to
BIG: str = "meta-llama/Llama-3.1-8B"  # whose bytes, seconds and cost are computed: a shape that the planner knows
USERS: int = 10  # to be served at once
CONTEXT: int = 262144  # tokens of each of them
PRICE: float = 2.5  # of one GPU-hour, in any currency
DEVICE: str = "cpu"  # where MODEL is served: cpu or cuda
GPUS: int = 1  # GPUs (processes on a CPU) that share a prompt of the server
SEED: int = 0  # of numbers that are hidden, and of intervals
INTERACTIVE: bool = True  # False adds a still to each figure, for pages without scripts
OUT: str = ""  # folder for what the notebook hands on; empty: a temporary one

# %%
import atexit
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers.utils import logging

# %%
from ultralong import check as readings_of
from ultralong import extend, figures, verify
from ultralong.bench.prefill import prefill_flops
from ultralong.checkpoints.model_card import cache_bytes_per_token, read_licence
from ultralong.course import check, predict, reveal
from ultralong.evaluation.measures.intervals import paired_difference
from ultralong.evaluation.measures.perplexity import token_losses
from ultralong.evaluation.tasks.needle import NeedleFormat
from ultralong.figures.memory import stacked_bytes
from ultralong.figures.play import play
from ultralong.figures.samples import forest
from ultralong.inference.batched import cache_bytes
from ultralong.inference.kv_cache import quantize_fp8
from ultralong.inference.load import load_model_and_tokenizer
from ultralong.inference.sharded_generation import ShardedRunner
from ultralong.notebook_tools import output_folder, store
from ultralong.planner import load_machine
from ultralong.planner.shapes import model_config, shape_of
from ultralong.utils.processes import end_with_parent

# %%
torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
out = output_folder(OUT)
for name in ("served", "damaged", "short"):
    shutil.rmtree(out / name, ignore_errors=True)
GIB = 2**30
h200 = load_machine("h200")
big, shape = model_config(BIG), shape_of(model_config(BIG))
weights = 2 * shape.parameters  # bytes in bfloat16
files = ("prefill_1gpu_262144", "prefill_2gpu_262144", "prefill_1gpu_1m_4layers_fp8")
one, two, million = (json.loads(Path(f"results/{name}.json").read_text())["rows"][0] for name in files)
RECORDED = Path(BIG).name == one["model"]  # what was recorded is of this model
print(f"{BIG}: {shape.parameters / 1e9:.1f}B parameters, {weights / GIB:.1f} GiB; rates: {h200.name}, {h200.basis}")

# %% [markdown]
# ## What is in the folder
#
# What `extend` and `train` write is a plain Hugging Face folder: weights, config, tokenizer, template, and a card for
# people. `ultralong verify` compares its files with what is recorded of them. Copies end early more often than one
# thinks, and a model that lost its last layer may still load.

# %%
folder = out / "served"
report = extend(MODEL, to=WINDOW, out=folder, quiet=True)
for file in sorted(folder.iterdir()):
    print(f"{file.name:24} {file.stat().st_size:>12,} bytes")
whole = verify(folder)
print(str(whole).replace(str(out), "OUT"))
damaged = Path(shutil.copytree(folder, out / "damaged"))
part = sorted(damaged.glob("*.safetensors"))[-1]
os.truncate(part, part.stat().st_size - 1000)  # a copy that ended early
(damaged / "tokenizer.json").unlink()
found = verify(damaged)
print("\n".join(fault.replace(str(out), "OUT") for fault in found.faults))
card = (folder / "README.md").read_text()
print(card[card.index("**Not trained"):card.index("## What was changed")])

# %% tags=["check"]
assert not whole.faults, "the fresh folder is not whole"
assert len(found.faults) == 2, f"two files were damaged, and verify names {len(found.faults)}"
licence = read_licence(folder)
assert licence or MODEL != "miniature", "the licence was lost on the way"
assert licence == {} or str(licence["license"]) in card.split("## Licence")[1], "the card's text says another licence"
print(f"ok: whole, the damaged copy is not; licence: {licence.get('license', 'none stated: ask before passing it on')}")

# %% [markdown]
# The card says what was done to the model and what was not, and carries on the licence of the base model. An extension
# is a derived work: the Llama licences, for example, ask for a name and a notice, and forbid some uses. Read it
# before you serve it to others; no program can do that for you.
#
# ## The cache, by hand
#
# For each token, each layer keeps a key and a value for each kv head. So a token takes
#
# $$2 \times \text{layers} \times \text{kv heads} \times \text{head size} \times \text{bytes of a number.}$$
#
# The number of *query* heads is not in it. That is what grouped queries are for.

# %%
# Keys and values of 1,048,576 tokens for a model of 8 billion parameters, in bfloat16?
predict("13.cache", ["8 GiB", "32 GiB", "128 GiB"], guess=None)

# %%
by_hand = 2 * shape.layers * shape.kv_heads * shape.head_dim * 2
in_fp8 = 2 * shape.layers * shape.kv_heads * (shape.head_dim + 2)  # a byte a number, and a scale of two a vector
print(f"{'':28}kv heads  KiB a token")
for name in ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.2-1B",
             "HuggingFaceTB/SmolLM2-1.7B"):
    other = model_config(name)
    print(f"{name:28}{other.num_key_value_heads:8} {cache_bytes_per_token(other) / 1024:12,.0f}")
model, tokenizer = load_model_and_tokenizer(folder, DEVICE)
ids = tokenizer("\n".join(topics.values())[:40_000], return_tensors="pt")["input_ids"][:, :WINDOW // 2]
caches = {kv: ShardedRunner(model, kv=kv, chunk=256, quiet=True) for kv in ("auto", "fp8")}
logits = {kv: runner.prefill(ids).float() for kv, runner in caches.items()}
each = {kv: runner.cache.bytes / ids.shape[1] for kv, runner in caches.items()}

# %% tags=["check"]
text = model.config.get_text_config()
size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
per_vector = 2 * text.num_hidden_layers * text.num_key_value_heads
assert each["auto"] == per_vector * size * model.dtype.itemsize == cache_bytes(model), "the cache holds other bytes"
assert each["fp8"] == per_vector * (size + 2), "fp8 is a byte a number and two a vector"
assert by_hand == cache_bytes_per_token(big), "the card of an extended checkpoint would say otherwise"
if RECORDED:
    assert abs(one["cache_gib"] - one["tokens"] * by_hand / GIB) < 0.01
    assert abs(million["cache_gib"] - million["tokens"] * in_fp8 * 4 / 32 / GIB) < 0.01, "4 of 32 layers, fp8"
    reveal("13.cache", f"{2**20 * by_hand / GIB:.0f} GiB", "128 KiB a token; the weights take 15 GiB.")
print(f"ok: {by_hand / 1024:.0f} KiB a token by hand, and what the library's caches hold here and held on the H200")


# %%
def my_kv_bytes(layers, heads, kv_heads, head_dim, tokens, kv):  # kv is "bf16" or "fp8"
    ...


check("13.kv_bytes", my_kv_bytes)

# %% [markdown]
# SmolLM2-1.7B, a fifth of the parameters, takes more than the 8B model: it has no grouped queries. Before choosing a
# model for long prompts, look at this line and not at its parameters.
#
# Now lay it out on GPUs. Here every GPU has the whole model, and the cache is dealt out by tokens, so that it works for
# any number of heads.

# %%
lengths = [2**19, 2**20, 2**21]
layouts = {"1 GPU, bf16": (1, by_hand), "1 GPU, fp8": (1, in_fp8), "2 GPUs, bf16": (2, by_hand),
           "2 GPUs, fp8": (2, in_fp8), "4 GPUs, bf16": (4, by_hand)}


def held(gpus, token):
    """Bytes on each GPU: weights, and its share of the cache."""
    bars = {figures.tokens_label(n): {"weights": weights / GIB, "keys and values": n * token / gpus / GIB}
            for n in lengths}
    return stacked_bytes(bars, "", x="tokens in the cache", limit=h200.memory / GIB, limit_name="an H200", most=300)


play([held(*layout) for layout in layouts.values()], list(layouts), stills=[0, 1, 2, 4],
     alt="Stacked bars of weights and cache on each GPU at 512K to 2M tokens, with the memory of an H200 as a line. On "
     "one GPU in bf16 a million tokens are above it; in fp8, or on two GPUs, below.")

# %% tags=["check"]
most = {name: max(0.0, (h200.memory - weights) * gpus / token) for name, (gpus, token) in layouts.items()}
for name, tokens in most.items():
    print(f"{name:14} at most {tokens:12,.0f} tokens, if nothing else were there")
assert most["1 GPU, fp8"] >= 1.9 * most["1 GPU, bf16"], "fp8 did not nearly double the prompt"
if RECORDED:
    assert most["1 GPU, bf16"] < 2**20 < most["1 GPU, fp8"], "a million tokens on one GPU: not as said above"
    assert most["2 GPUs, bf16"] > 2**20
print("ok: computed from the same bytes that the caches hold")

# %% [markdown]
# ## Eight bits
#
# fp8 halves the cache, and with it what each new token has to read. What does it cost? Each vector of a head gets one
# scale, a power of two, and each number keeps 3 bits behind its first one: it moves by at most 1/16 of itself. Unless
# it is tiny beside the largest of its vector.

# %%
relative = torch.logspace(-18, 0, 18 * 64 + 1, base=2)[:-1].view(18, 64)  # by powers of two below the largest, 1
values, scale = quantize_fp8(torch.cat([relative.flatten(), torch.ones(1)]))
rounded = (values.float() * scale.float())[:-1].view_as(relative)
error = ((rounded - relative).abs() / relative).amax(1)
middle = (relative[:, 0] * 2**0.5).tolist()
figure = figures.lines({"rounding error": (middle, error.tolist()), "1/16": (middle, [1 / 16] * 18)},
                       "Rounding a vector to fp8", x="a number beside the largest of its vector",
                       y="error at most, relative", log_x=True, log_y=True, markers=True)
figures.show(figure,
             "Largest relative error against size on logarithmic axes: level just below one sixteenth for numbers down "
             "to a ten-thousandth of the largest, then it rises to one, where numbers become zero.")
apart = float((logits["fp8"] - logits["auto"]).abs().mean() / logits["auto"].std())

# %% tags=["check"]
worst = float(error[-13:].max())  # down to 2^-13 of the largest
assert worst <= 1 / 16, "a number of ordinary size moved by more than 1/16"
assert error[0] == 1, "the smallest should become zero"
assert 0 < apart < 0.5, f"the logits differ by {apart:.2f} of their spread"
print(f"ok: at most {worst:.4f}; logits of this model move by {100 * apart:.1f}% of their spread, recorded for 8B: "
      f"{100 * million['apart_from_plain']:.1f}%")

# %% [markdown]
# **What you should see.** A level line just below 1/16 for all numbers that matter, then a ramp. What a few per cent in
# the logits do to answers is a question for [notebook 10](10_evaluation.ipynb). The recorded 6.8% is of random weights,
# and bfloat16's own rounding is in it.
#
# ## Reading a prompt, writing an answer
#
# A prompt is read in large pieces (*prefill*). The answer comes token by token (*decode*). On the same GPU they are
# two different programs. Prefill multiplies each weight with thousands of tokens: arithmetic limits it. Decode reads
# all weights and the whole cache for a single token: memory limits it.

# %%
# One H200 read 262,144 tokens in 36 s. How long at least for 100 tokens of the answer, if it only had to
# read weights and cache from its memory, at 4 TB/s?
predict("13.decode", ["0.01 s", "1 s", "100 s"], guess=None)


# %%
def reading(tokens, gpus=1):
    """Seconds to read a prompt, from rates measured on the H200: attention by its kernel, products by theirs."""
    attended, multiplied = prefill_flops(shape, tokens)
    attention = h200.attention_rates("flash4", shape.head_dim, tokens)[0]
    return (attended / attention + multiplied / h200.matmul_rate(shape.hidden)) / gpus


def least_step(tokens, token=by_hand, gpus=1):
    """Seconds that one new token takes at least: weights and cache through the memory once."""
    return (weights + tokens * token / gpus) / h200.bandwidth


LONG = one["tokens"]
read_in = one["seconds"] if RECORDED else reading(LONG)
work = sum(prefill_flops(shape, LONG))
step_flops = 2 * shape.multiplied + 4 * LONG * shape.heads * shape.head_dim * shape.layers
step_bytes = weights + LONG * by_hand
passes = LONG / one["chunk"]
read_bytes = passes * weights + (passes + 1) / 2 * LONG * by_hand  # weights, and the cache so far, once a piece
points = {"reading": (work / read_bytes, work / read_in),
          "one token, at best": (step_flops / step_bytes, step_flops / least_step(LONG))}
if RECORDED:
    points["one token, recorded"] = (step_flops / step_bytes, step_flops / one["decode_seconds_per_token"])

# %%
peak = max(rate for _, rate in h200.matmul)
across = [0.5, peak / h200.bandwidth, 2.0**19]  # the roof has one corner
roof = figures.lines({"what the GPU allows": (across, [min(peak, x * h200.bandwidth) / 1e12 for x in across])},
                     f"Roofline: {BIG.split('/')[-1]}, {LONG:,} tokens, one H200",
                     x="operations for each byte that is read", y="TFLOP/s", log_x=True, log_y=True)
for number, (name, (x, y)) in enumerate(points.items(), 1):
    roof.add_scatter(x=[x], y=[y / 1e12], mode="markers", name=name,
                     marker={"size": 12, "symbol": ("circle", "square", "diamond")[number - 1],
                             "color": figures.PALETTE[number]})
figures.show(roof.update_layout(showlegend=True),
             "A roof of a rising and a level line over operations a byte. Reading stands under the level part, near "
             "it. One token stands far left under the rising part, at best on it; the recorded one far below.")

# %% tags=["check"]
share = least_step(LONG) / one["decode_seconds_per_token"] if RECORDED else 0.0
assert points["reading"][0] > peak / h200.bandwidth > points["one token, at best"][0], "both are limited alike"
if RECORDED:
    assert abs(reading(LONG) / read_in - 1) < 0.1, "the rates do not foretell the recorded seconds"
    assert points["reading"][1] > 0.7 * peak, "reading is not limited by arithmetic"
    assert share < 0.1, "the recorded decoding was near its limit"
    reveal("13.decode", "1 s", f"{100 * least_step(LONG):.1f} s: {step_bytes / 1e9:.0f} GB a token.")
    print(f"recorded on 2026-11-26: {one['seconds']:.1f} s to read {LONG:,} tokens, then "
          f"{one['decode_seconds_per_token']:.3f} s a token: {share:.0%} of what the memory allows")
print(f"ok: at best {1000 * least_step(LONG):.1f} ms a token, {read_in:.0f} s to read")

# %% [markdown]
# **What you should see.** Reading is where it should be, at three quarters of the GPU's best rate. Decoding was *not*:
# 30 times slower than its limit. A bound says what is left to gain. The code of that day attended a single query by
# plain operations in float32, which move each key through the memory several times. Today a kernel does it that
# [splits the keys](https://pytorch.org/blog/flash-decoding/) over the whole GPU. Behind 131,072 tokens it reaches 91%
# of the rate of a copy on one H200, 85% in fp8; on two 82% and 77%, where each still reads all weights, for half of
# the keys ([measured](results/README.md)). `ultralong bench decode` does it on yours.
#
# Two GPUs share the prompt. Each has its part of the cache, and asks the others' with the query:

# %%
for name, what in (("seconds", "s to read"), ("decode_seconds_per_token", "s a token"), ("peak_gib", "GiB of a GPU")):
    print(f"{what:14} one {one[name]:8.3f}   two {two[name]:8.3f}   {one[name] / two[name]:.2f} times less")

# %% tags=["check"]
assert one["tokens"] == two["tokens"]
assert one["seconds"] / two["seconds"] > 1.9, "two GPUs read hardly faster than one"
assert one["decode_seconds_per_token"] / two["decode_seconds_per_token"] > 1.8
assert two["cache_gib"] > one["cache_gib"] / 2, "room is kept for parts that do not divide evenly"
today = [json.loads(Path(f"results/decode_{name}_ahead.json").read_text())["rows"]
         for name in ("1gpu_131k", "2gpu_131k_symmetric")]
of_copy = [round(100 * max(row["of_copy"] for row in rows if row["kv"] == kv)) for rows in today
           for kv in ("bf16", "fp8")]
assert of_copy == [91, 85, 82, 77], "today's kernel reaches other shares than said above"
print(f"ok: reading {one['seconds'] / two['seconds']:.2f} times faster on two; recorded the same day")


# %%
def my_gpus(users, tokens, token_bytes, weights, memory, share):  # GPUs that hold all of them at once
    ...


check("13.gpus", my_gpus)

# %% [markdown]
# ## Serve it
#
# `ultralong serve` speaks OpenAI's protocol, so whatever speaks to OpenAI can ask it. The script that is handed on is
# the one that runs here. It listens on this machine only; for others it wants a key.

# %%
script = out / "serve.sh"
script.write_text(f"""#!/usr/bin/env bash
# Serves the model beside this script through OpenAI's protocol. Facts of the site: PYTHON, PORT, GPUS, DEVICE.
# For other machines too: serve.sh --host 0.0.0.0 --key-variable NAME, with the key in the environment variable NAME.
set -euo pipefail
here="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
exec "${{PYTHON:-python3}}" -m ultralong serve "$here/served" --name served --port "${{PORT:-8000}}" \\
  --gpus "${{GPUS:-1}}" --device "${{DEVICE:-auto}}" --max-tokens {WINDOW} "$@"
""")
script.chmod(0o755)
facts = {"PYTHON": sys.executable, "PORT": "0", "GPUS": str(GPUS), "DEVICE": DEVICE}
with (out / "serve.log").open("w") as log:
    server = subprocess.Popen([script], env=os.environ | facts, stdout=subprocess.PIPE, stderr=log, text=True,
                              preexec_fn=end_with_parent)  # it ends with the kernel, whatever ends that
atexit.register(server.kill)
said = next((line for line in server.stdout if "Serving" in line), "")
assert said, f"the server did not start: {(out / 'serve.log').read_text()[-800:]}"
address = re.search(r"http://\S+/v1", said).group()
print(said.replace(address, "ADDRESS").strip())


# %%
def ask(messages, **options):
    """Chunks of a streamed answer, by OpenAI's own client where it is installed."""
    body = {"model": "served", "messages": messages, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, **options}
    if importlib.util.find_spec("openai"):
        from openai import OpenAI

        client = OpenAI(base_url=address, api_key="none", max_retries=0)
        yield from (chunk.to_dict() for chunk in client.chat.completions.create(**body))
        return
    request = urllib.request.Request(f"{address}/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as lines:
        yield from (json.loads(line[6:]) for line in lines if line.startswith(b"data: {"))


form, draw = NeedleFormat(), random.Random(SEED)
facts = dict(zip(("harbor", "violin"), (str(draw.randrange(10**6, 10**7)) for _ in range(2))))
noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
sentences = [noise] * (WINDOW // 45)
for place, (key, number) in enumerate(facts.items(), 1):
    sentences.insert(place * len(sentences) // 3, form.needle.format(key=key, value=number))
document = " ".join(sentences)

# %% [markdown]
# A document beyond the old window, three questions on it, each answer streamed:

# %%
asked = []
for key in ("harbor", "violin", "harbor"):
    question = [{"role": "user", "content": form.prompt.format(context=document, key=key)}]
    chunks = list(ask(question, max_tokens=32))
    pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]]
    usage = chunks[-1]["usage"]  # the last one has it
    before = usage["prompt_tokens_details"]["cached_tokens"]
    asked.append((key, "".join(pieces), usage, len(pieces)))
    print(f"{key}:{asked[-1][1]!r}")
    print(f"   {usage['prompt_tokens']:,} tokens of prompt, {before:,} of them read before, "
          f"{usage['completion_tokens']} of answer in {len(pieces)} pieces")

# %%
bars = {f"{number}. {key}": {"read": float(usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]),
                             "read before": float(usage["prompt_tokens_details"]["cached_tokens"])}
        for number, (key, _, usage, _) in enumerate(asked, 1)}
figures.show(figures.shares(bars, "Tokens of three prompts on one document", x="tokens"),
             "Three bars of prompts: the first is read whole, of the second and third all but a few tokens were "
             "read before.")

# %% tags=["check"]
right = [number in said for (key, said, _, _) in asked for number in [facts[key]]]
assert sum(right) >= 1 or MODEL != "miniature" or WINDOW > 2048, "answers beyond the old window are wrong"
assert asked[0][2]["prompt_tokens"] > report.old_window, "the prompt fits the old window"
assert asked[0][2]["prompt_tokens_details"]["cached_tokens"] == 0
reused = asked[1][2]["prompt_tokens_details"]["cached_tokens"] / asked[1][2]["prompt_tokens"]
assert reused > 0.9, "a document that was read is read again"
# On a GPU, in 16 bits, what is read after a kept beginning is rounded differently from what is read at once.
assert asked[2][1] == asked[0][1] or DEVICE != "cpu", "the same greedy question gave two answers"
for *_, usage, count in asked:
    assert count > usage["completion_tokens"] / 2, "the answer did not come piece by piece"
print(f"ok: {sum(right)} of 3 right; of the second prompt {reused:.0%} had been read before")

# %% [markdown]
# **What you should see.** Of the second prompt next to nothing is read: the server keeps the last prompt's cache, and
# reads only what differs. That holds from the *beginning* of a prompt on. Put the document first and the question last.
#
# A server must refuse what it can't hold, before it starts, and say what it would hold. And it must count:

# %%
if importlib.util.find_spec("openai"):
    from openai import APIStatusError as Refusal
else:
    from urllib.error import HTTPError as Refusal
refused = []
try:
    list(ask([{"role": "user", "content": " ".join([document] * 3)}]))
except Refusal as error:
    status = getattr(error, "status_code", None) or error.code
    why = error.body if hasattr(error, "body") else json.load(error)["error"]
    refused.append((status, why["code"]))
    print(status, why["code"], why["message"], sep=" | ")
page = urllib.request.urlopen(address.replace("/v1", "/metrics")).read().decode()
counted = {name: float(value) for name, value in re.findall(r"^(ultralong_\w+_total(?:\{.*\})?) (\S+)$", page, re.M)}
print("\n".join(f"{name:72}{value:6,.0f}" for name, value in counted.items() if "seconds" not in name))
server.send_signal(signal.SIGINT)
code = server.wait(60)

# %% tags=["check"]
assert refused == [(400, "context_length_exceeded")], f"the long prompt was not refused by name: {refused}"
assert counted["ultralong_prompt_tokens_total"] == sum(usage["prompt_tokens"] for _, _, usage, _ in asked)
assert counted["ultralong_reused_tokens_total"] == sum(
    usage["prompt_tokens_details"]["cached_tokens"] for _, _, usage, _ in asked)
assert any("refused" in name and value == 1 for name, value in counted.items())
subprocess.run(["bash", "-n", script], check=True)
print("ok: refused by name; the metrics say what the answers said; the server has stopped")

# %% [markdown]
# A long prompt is answered alone, and others wait; short ones are answered together, on one GPU. That is a server for
# few users with long prompts, or for an evaluation. For many users take one of the next section, which batch at any
# length.
#
# ## What other programs read
#
# Each of them reads `config.json` by rules of its own. The table is recorded: checkpoints of each kind, opened by four
# versions of transformers, and given to vLLM's and SGLang's own code. No server ran for it. llama.cpp's column, in
# brackets, is derived from its source.

# %%
table = json.loads(Path("results/readers.json").read_text())
columns = sorted({(row["program"], row["version"]) for row in table["rows"]},
                 key=lambda each: (each[0] != "transformers", each[0] == "llama.cpp", each))
kinds = list(dict.fromkeys(row["kind"] for row in table["rows"]))
cell = {(row["kind"], row["program"], row["version"]): row for row in table["rows"]}
shown = [[cell[kind, *each]["read"] or f"({cell[kind, *each]['check']})" for each in columns] for kind in kinds]
level = {"right": 1.0, "(right)": 0.8, "(wrong)": 0.2, "wrong": 0.0, "refused": 0.5}
grid = figures.new_figure(f"RoPE of {len(kinds)} kinds of checkpoints", "a number is a version of transformers", "",
                          height=130 + 24 * len(kinds))
grid.add_heatmap(z=[[level[word] for word in line] for line in shown],
                 x=[version if program == "transformers" else program for program, version in columns],
                 y=[kind.replace(" rope_theta and rope_scaling", " older keys") for kind in kinds], text=shown,
                 texttemplate="%{text}", textfont={"size": 10}, xgap=2, ygap=2, showscale=False, zmin=0, zmax=1,
                 colorscale=[[0, "#F2B48A"], [0.5, "#F3E9DC"], [1, "#B5D3EA"]])
figures.show(grid.update_xaxes(type="category").update_yaxes(autorange="reversed").update_layout(margin={"l": 250}),
             "A table of kinds of checkpoints against programs: transformers 5 reads all right, 4.46 hardly any "
             "kind of YaRN, vLLM and SGLang all but dynamic and one more, llama.cpp YaRN only with options.")

# %%
mine = readings_of(folder)
for one_reading in mine.readings:
    print(f"{one_reading.program} {one_reading.version}: {one_reading.verdict}\n   {one_reading.typed}".replace(
        str(folder), "served"))
    for remark in one_reading.remarks:
        print(f"   {remark}")
lines = [f"## {each.program} {each.version}\n\n    {each.typed}\n".replace(str(folder), "served") +
         "".join(f"\n* {remark}" for remark in each.remarks) for each in mine.readings]
written = (out / "type.md").write_text("# What to type, and what each program gets wrong\n\n" + "\n\n".join(lines))

# %% tags=["check"]
wrong = {(row["kind"], row["program"], row["version"]) for row in table["rows"] if row["read"] in ("wrong", "refused")}
said = {(row["kind"], row["program"], row["version"]) for row in table["rows"] if row["check"] != "right"}
assert wrong <= said, "something is read wrong without the check saying so"
now = {each.program: each for each in mine.readings}  # the last version of each
assert {now[name].verdict for name in ("transformers", "vLLM", "SGLang")} == {"right"}
assert written > 500, "type.md is nearly empty"
assert now["vLLM"].window == now["SGLang"].window == WINDOW, "a server would cap the window"
assert "--yarn-beta-fast" in now["llama.cpp"].typed, "llama.cpp would take another ramp"
print(f"ok: {len(kinds)} kinds in {len(columns)} programs, {len(wrong)} cells wrong or refused, all of them foretold")

# %%
from ultralong.course.exercises.practice.nb13_checks import CAPPED

print(json.dumps(CAPPED, indent=1))
my_repaired = None  # the same dict, repaired for 1,048,576 tokens

check("13.repair", my_repaired)

# %% [markdown]
# ## What short prompts pay
#
# YaRN's table is *static*: the same at 300 tokens as at a million. So short prompts are read at positions that the
# weights did not learn, until they are trained. There is a kind that leaves them alone, `dynamic`: it scales only what
# is longer than the old window. Measured here on texts within the old window, each against itself:

# %%
texts = [tokenizer(text)["input_ids"] for text in topics.values() if len(text) > 4000][:24]
short = min(report.old_window, 512)  # tokens of each text
rows = torch.tensor([text[:short + 1] for text in texts if len(text) > short][:16])
extend(MODEL, to=WINDOW, out=out / "short", method="dynamic", quiet=True)
per_text = {}
for name, place in (("as it came", MODEL), ("yarn", folder), ("dynamic", out / "short")):
    reader, _ = load_model_and_tokenizer(
        report.source if place == MODEL else place, DEVICE)
    with torch.no_grad():
        per_text[name] = token_losses(reader, rows[:, :-1], rows[:, 1:]).mean(1).tolist()
change = {name: paired_difference(per_text["as it came"], per_text[name], seed=SEED) for name in ("yarn", "dynamic")}
smol = json.loads(Path("results/demo_smollm2.json").read_text())
first_bin = {stage: smol[f"perplexity_{stage}"][0]["nll"] for stage in ("before", "rescaled", "after")}
inside = [first_bin[stage] - first_bin["before"] for stage in ("rescaled", "after")]
figures.show(
    forest({"yarn, rescaled only": (change["yarn"].mean, change["yarn"].low, change["yarn"].high),
            "dynamic, rescaled only": (change["dynamic"].mean, change["dynamic"].low, change["dynamic"].high),
            "SmolLM2, yarn, rescaled only (recorded)": (inside[0],) * 3,
            "SmolLM2, yarn, trained (recorded)": (inside[1],) * 3},
           "Change of the loss on short texts", x="nats a token; an interval where texts were paired", zero=0.0),
    "Four changes of loss: yarn without training makes short texts clearly worse, dynamic leaves them alone. Recorded "
    "for SmolLM2: a fifth of a nat worse when rescaled, a little better than before after training.")

# %% tags=["check"]
assert change["yarn"].low > 0, "short texts paid nothing"
assert abs(change["dynamic"].mean) < 1e-3, "dynamic changed texts within the old window"
assert inside[0] > 0 > inside[1], "the recorded stages say otherwise"
dynamic = [row for row in table["rows"] if row["kind"] == "dynamic" and row["program"] in ("vLLM", "SGLang")]
assert {row["read"] for row in dynamic} == {"wrong"}
print(f"ok: yarn costs {change['yarn'].mean:+.3f} nats ({change['yarn'].low:+.3f} to {change['yarn'].high:+.3f}) on "
      f"{change['yarn'].n} short texts before training")

# %% [markdown]
# **What you should see.** Rescaling alone makes short texts less likely, on both models; training won it back on the
# recorded one. `dynamic` costs nothing, and neither vLLM nor SGLang applies it as it is meant. So a static factor is
# paid in training, not in serving. Or serve two models: the old one for short prompts, the new one for long.
# The recorded differences have no interval: the rows' own losses were not kept.
#
# ## What a million tokens cost
#
# Seconds times GPUs times price. The title's question has two answers, as attention grows with the square of a prompt.

# %%
# A million tokens, read as one prompt or as 128 prompts of 8,192. How many times more does the one cost?
predict("13.million", ["as much", "about 4 times", "about 18 times"], guess=None)


# %%
def cost(seconds, gpus=1):
    """Price of `gpus` GPUs for some seconds."""
    return seconds * gpus / 3600 * PRICE


def logarithmic(figure, values):
    """Plain numbers on both axes: tokens across, 1, 2 and 5 times powers of ten up."""
    marks = [digit * 10.0**power for power in range(-9, 9) for digit in (1, 2, 5)]
    marks = [mark for mark in marks if min(values) / 1.5 < mark < 1.5 * max(values)]
    figure.update_xaxes(tickvals=sizes[::2], ticktext=[figures.tokens_label(n) for n in sizes[::2]], dtick=None)
    return figure.update_yaxes(tickvals=marks, ticktext=[f"{mark:g}" for mark in marks], dtick=None)


sizes = [2**power for power in range(13, 22)]
curves = {"estimated from the H200's rates": (sizes, [cost(reading(n)) * 2**20 / n for n in sizes]),
          "matrix products alone": (sizes, [cost(prefill_flops(shape, n)[1] / h200.matmul_rate(shape.hidden))
                                                   * 2**20 / n for n in sizes])}
figure = figures.lines(curves, f"Cost of reading a million tokens, at {PRICE:g} a GPU-hour", x="tokens of each prompt",
                       y="cost (currency of PRICE)", log_x=True, log_y=True)
if RECORDED:
    figure.add_scatter(x=[LONG], y=[cost(one["seconds"]) * 2**20 / LONG], mode="markers", name="recorded",
                       marker={"size": 11, "color": figures.PALETTE[2], "symbol": "diamond"})
figure = logarithmic(figure, [*curves["estimated from the H200's rates"][1], *curves["matrix products alone"][1]])
figures.show(figure,
             "Cost of a million tokens against the length of a prompt, on logarithmic axes: nearly level up to some "
             "ten thousand tokens, then rising in proportion; a recorded point lies on the line.")

# %% tags=["check"]
ratio = cost(reading(2**20)) / (128 * cost(reading(2**13)))
assert cost(3600) == PRICE, "an hour of one GPU costs its price"
assert abs(cost(two["seconds"], 2) / cost(one["seconds"]) - 1) < 0.05, "two GPUs cost more"
if RECORDED:
    cut = model_config(BIG)
    cut.num_hidden_layers = million["layers"]
    attended, multiplied = prefill_flops(shape_of(cut), 2**20)
    foretold = attended / h200.attention_rates("flash4", shape.head_dim, 2**20)[0] + multiplied / h200.matmul_rate(4096)
    assert abs(foretold / million["seconds"] - 1) < 0.1, "the rates are off at a million tokens"
    served = json.loads(Path("results/serve_1m_2gpu.json").read_text())["rows"][0]
    first_token, by_rates = served["seconds_to_first_token"], reading(2**20) / served["gpus"]
    assert 0.75 < by_rates / first_token < 1, "the server's wait is another than the estimate"
    print(f"ok: through `ultralong serve` on two H200s the first token came after {first_token:.0f} s; the rates "
          f"say {by_rates:.0f}: exchange between the GPUs, sampling and HTTP come on top")
    whole_work = prefill_flops(shape, 2**20)
    attends = whole_work[0] / sum(whole_work)
    reveal("13.million", "about 18 times", f"{ratio:.1f} times: attention is {attends:.0%} of the work of the one.")
print(f"ok: one prompt of 1,048,576 tokens takes {reading(2**20):.0f} s of an H200, {cost(reading(2**20)):.2f}; 128 of "
      f"8,192 {128 * reading(2**13):.0f} s, {128 * cost(reading(2**13)):.3f}; two GPUs halve the wait, not the cost")

# %% [markdown]
# **What you should see.** Up to 16K tokens the length hardly matters: matrix products are most of the work. Beyond 256K
# the price of a token grows nearly in proportion to its prompt. The estimate at a million is checked against a run of 4
# of the 32 layers, and against one prompt through the server on two H200s, which took longer: the rates are of one GPU
# that does nothing else. The answer comes on top: each token costs at least the time to read weights and cache once.
#
# ## Keep the cache, or read again?
#
# A second question on the same document costs nothing but memory, if the cache was kept. Memory has a price too: what
# the cache takes of the GPU can't serve others. So there is a time after which reading again is cheaper.


# %%
def my_break_even(prefill_seconds, cache_bytes, gpu_bytes):  # seconds that a kept cache may wait for its next question
    ...


check("13.break_even", my_break_even)


# %%
def worth(tokens, token=by_hand):
    """Seconds after which a kept cache has cost as much as reading the prompt again."""
    return reading(tokens) * h200.memory / (tokens * token)


kept = {"bf16": (sizes, [worth(n) for n in sizes]), "fp8": (sizes, [worth(n, in_fp8) for n in sizes])}
figure = figures.lines(kept, "How long a cache is worth keeping", x="tokens of the prompt",
                       y="seconds until the next question", log_x=True, log_y=True)
figures.show(logarithmic(figure, [*kept["bf16"][1], *kept["fp8"][1]]),
             "Seconds that a cache may wait against the length of its prompt: nearly level at half a minute for short "
             "ones, then rising in proportion, to some minutes at a million tokens; twice as long in fp8.")

# %% tags=["check"]
for n in (2**13, 2**18, 2**20):
    price_of_waiting = cost(worth(n)) * (n * by_hand / h200.memory)  # the cache's share of the GPU, for that time
    assert abs(price_of_waiting / cost(reading(n)) - 1) < 1e-9, "the two prices are not equal there"
assert worth(2**20) > 8 * worth(2**13), "long prompts are not worth keeping longer"
print(f"ok: {worth(2**13):.0f} s at 8,192 tokens, {worth(CONTEXT):.0f} s at {CONTEXT:,}, {worth(2**20):.0f} s at "
      f"1,048,576; the GPU's price does not matter")

# %% [markdown]
# **What you should see.** The price of a GPU-hour cancels out. Work grows with the square of a prompt and its cache
# with its length, so long prompts are worth keeping *longer*: minutes at a million tokens. Beyond that, caches can wait
# in host memory or on a disk, which costs less and takes seconds to bring back;
# [servers do that](https://docs.vllm.ai/en/latest/features/automatic_prefix_caching.html) in blocks.
#
# Now the whole bill, for your own numbers:

# %%
users = USERS * CONTEXT * by_hand  # bytes of all their caches
room = 0.8 * (h200.memory - weights)  # what ultralong serve takes of the free memory
if room > 0:
    needed, narrow = (-(-USERS * CONTEXT * token // room) for token in (by_hand, in_fp8))
    print(f"{USERS} users at {CONTEXT:,} tokens: {users / GIB:,.0f} GiB of cache, {needed:.0f} H200s, "
          f"{needed * PRICE:,.2f} an hour; in fp8 {narrow:.0f}")
else:
    print(f"{weights / GIB:,.0f} GiB of weights do not fit into an H200: share them out (tensor parallelism)")
ANSWER = 500  # tokens of an answer
per_prompt = cost(reading(CONTEXT) + ANSWER * least_step(CONTEXT))
print(f"a prompt of {CONTEXT:,} and an answer of {ANSWER}: {per_prompt:.3f}, if decoding reaches its limit; the "
      f"question after it {cost(ANSWER * least_step(CONTEXT)):.3f}")

# %% [markdown]
# ## Hand it on
#
# The folder `OUT` (`made/13` in a course folder) can be copied as it is: the model with its card, `served`; `serve.sh`,
# which ran above; and `type.md`, what to type for every other program. `PYTHON=.../bin/python bash serve.sh`, with the
# interpreter that this library is installed for, serves the model at port 8000.

# %%
shutil.rmtree(damaged)
shutil.rmtree(out / "short")
(out / "serve.log").unlink()
for path in sorted(out.rglob("*")):
    if path.is_file() and path.parent.name in (out.name, "served"):
        print(f"{path.relative_to(out)}  {path.stat().st_size:,} bytes")

# %% tags=["check"]
assert not verify(folder).faults, "serving changed the folder"
assert {"serve.sh", "type.md"} <= {path.name for path in out.iterdir()}
assert code in (0, 128 + signal.SIGINT), f"the server ended with {code}"
print("ok: the folder is whole after all of this")

# %% [markdown]
# Stuck? `hint("13.kv_bytes")` gives a nudge, `solution("13.kv_bytes")` an answer; import both from `ultralong.course`.
#
# ## What this does not show
#
# * The served miniature was rescaled, not trained. That it answers beyond its old window says something about needles,
#   and about no other question. With another `SEED` or a longer `WINDOW` it takes one number for the other at times.
# * A million tokens were read through all 32 layers once, on two H200s, with random weights. On one, in fp8, 4 layers
#   were, and the rest is estimated.
# * vLLM and SGLang did not run: their own code was asked for the table it makes. llama.cpp's column is derived.
# * Costs are of GPUs alone, always busy. Idle hours, hosts, network and people come on top.
# * What fp8 does to the answers of a trained model at a million tokens was not measured.
#
# ## At the next scale
#
# `serve.sh` with `GPUS=8` reads one prompt on eight GPUs. For many users: vLLM or SGLang with tensor parallelism, which
# deals out weights and heads too, and the lines of `type.md`. Measure your own first: `ultralong bench prefill` and
# `ultralong bench decode`.
#
# ## Recap
#
# * Verify a folder after each copy, and ask `ultralong check` what others will read.
# * The cache is 2 x layers x kv heads x head size x bytes; fp8 halves it, and each number moves by 1/16 at most.
# * Arithmetic limits reading, memory limits writing.
# * A token of a long prompt costs more, in proportion to the prompt; a cache is worth keeping longer for that reason.
#
# **Go on reading:** the library's [cache](../ultralong/inference/kv_cache.py),
# [server](../ultralong/inference/server/serve.py) and [readers](../ultralong/checkpoints/readers.py);
# [what was measured](results/README.md); [PagedAttention](https://arxiv.org/abs/2309.06180),
# [FlashInfer](https://arxiv.org/abs/2501.01005), [Mooncake](https://arxiv.org/abs/2407.00079) on shared caches.
#
# **All notebooks:** [the course](README.md).

# %%
store(kv_kib=by_hand / 1024, fp8_share=in_fp8 / by_hand, rounding=worst, apart=apart, decode_share=share,
      reading_off=reading(LONG) / read_in - 1, right=sum(right), reused=reused,
      short_texts=change["yarn"].mean, ratio=ratio, worth_1m=worth(2**20), foretold=len(wrong - said))

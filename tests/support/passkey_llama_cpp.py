"""A passkey read by llama.cpp from an exported file, and by transformers from the folder that was exported.

Three steps, as llama-cpp-python need not be installed where transformers is; `read` needs nothing of ultralong:

    ultralong export gguf MODEL FILE --llama-cpp SOURCES --dtype f32        # says which options the file needs
    python tests/support/passkey_llama_cpp.py ask MODEL --length 12288 --samples 2 --out asked.json
    python tests/support/passkey_llama_cpp.py read FILE asked.json --out right.json --beta-fast 4 --beta-slow 1
    python tests/support/passkey_llama_cpp.py read FILE asked.json --out wrong.json          # without those options
    python tests/support/passkey_llama_cpp.py compare asked.json right.json wrong.json --json RESULT

All read the same token ids in float32 and answer greedily.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

CHUNK = 512  # tokens of a prompt that are read at once
ANSWER = 8  # tokens of an answer
RULE = (
    "InfiniteBench's passkey in repeated noise, wording for base models, without a chat template; greedy answer of "
    f"{ANSWER} tokens from the same token ids in float32; found: the first run of digits is the key; log probability: "
    "of the whole vocabulary after the prompt, largest difference from transformers' over the tokens that transformers "
    "gives 0.001 or more"
)
LIKELY = 1e-3


def ask(model: str, length: int, samples: int, out: Path) -> None:
    """Make prompts and have transformers answer them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ultralong.evaluation.tasks.samples import make_samples, prompt_ids
    from ultralong.utils.environment import machine_facts

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").eval()
    found: list[dict[str, Any]] = []
    for record in make_samples("infinitebench_passkey", tokenizer, length, samples, chat=False):
        ids, begin, cache, tokens = prompt_ids(tokenizer, record), time.monotonic(), None, []
        with torch.inference_mode():
            for start in range(0, len(ids), CHUNK):
                given = network(torch.tensor([ids[start : start + CHUNK]]), past_key_values=cache, logits_to_keep=1)
                cache = given.past_key_values
            after = given.logits[0, -1].log_softmax(-1)
            while len(tokens) < ANSWER:
                tokens.append(int(given.logits[0, -1].argmax()))
                given = network(torch.tensor([tokens[-1:]]), past_key_values=cache)
        likely = {int(i): float(after[i]) for i in (after.exp() >= LIKELY).nonzero().flatten()}
        entry = {"ids": ids, "key": record["outputs"][0], "depth": record["depth"], "log_probabilities": likely}
        entry |= {"answer": tokenizer.decode(tokens), "tokens": tokens, "seconds": round(time.monotonic() - begin, 1)}
        found.append(entry)
        config = json.loads((Path(model) / "config.json").read_text())
        head = {"machine": machine_facts(), "rope": config["rope_parameters"], "length": length}
        out.write_text(json.dumps({**head, "samples": found}))
        print(f"{len(ids)} tokens, key {entry['key']}: {entry['answer']!r}, {entry['seconds']} s", flush=True)


def read(file: str, asked: Path, out: Path, betas: dict[str, float]) -> None:
    """Have llama.cpp answer the prompts."""
    import numpy as np
    from llama_cpp import Llama

    content, threads = json.loads(asked.read_text()), len(os.sched_getaffinity(0))
    longest = max(len(sample["ids"]) for sample in content["samples"]) + ANSWER
    sizes = {"n_ctx": longest, "n_batch": CHUNK, "n_threads": threads, "n_threads_batch": threads}
    model = Llama(file, **sizes, type_k=0, type_v=0, verbose=False, **betas)  # type 0 is float32
    found: list[dict[str, Any]] = []
    for sample in content["samples"]:
        begin, tokens = time.monotonic(), list[int]()
        model.reset()
        model.eval(sample["ids"])
        logits = np.array(model._ctx.get_logits_ith(-1)[: model.n_vocab()], dtype=np.float64)
        after = logits - logits.max()
        after -= np.log(np.exp(after).sum())
        while len(tokens) < ANSWER:
            tokens.append(int(logits.argmax()))
            model.eval(tokens[-1:])
            logits = np.array(model._ctx.get_logits_ith(-1)[: model.n_vocab()], dtype=np.float64)
        answer = model.detokenize(tokens).decode("utf-8", "replace")
        likely = {token: float(after[int(token)]) for token in sample["log_probabilities"]}
        seconds = round(time.monotonic() - begin, 1)
        found.append({"tokens": tokens, "answer": answer, "log_probabilities": likely, "seconds": seconds})
        head = {"options": betas, "llama_cpp_python": version("llama_cpp_python")}
        out.write_text(json.dumps({**head, "samples": found}))
        print(f"{betas} key {sample['key']}: {answer!r}, {found[-1]['seconds']} s", flush=True)


def compare(asked: Path, answers: list[Path], out: Path) -> None:
    """Put what both said side by side."""
    from ultralong.evaluation.tasks.scoring import first_integer
    from ultralong.utils.files import write_json

    content = json.loads(asked.read_text())
    own = content["samples"]

    def row(reader: str, options: dict[str, float], samples: list[dict[str, Any]]) -> dict[str, Any]:
        differences = [
            max(abs(given["log_probabilities"][token] - value) for token, value in sample["log_probabilities"].items())
            for sample, given in zip(own, samples, strict=True)
        ]
        return {
            "reader": reader,
            "options": options,
            "found": sum(first_integer(given["answer"], [sample["key"]]) for sample, given in zip(own, samples)),
            "answers": [given["answer"] for given in samples],
            "answers_as_transformers": sum(given["tokens"] == s["tokens"] for s, given in zip(own, samples)),
            "largest_difference_of_log_probability": [round(value, 6) for value in differences],
            "seconds": [given["seconds"] for given in samples],
        }

    rows = [row("transformers", {}, own)]
    for path in answers:
        given = json.loads(path.read_text())
        rows.append(row(f"llama-cpp-python {given['llama_cpp_python']}", given["options"], given["samples"]))
    write_json(
        out,
        {
            "title": f"Passkeys at {content['length']:,} tokens, read by transformers and by llama.cpp",
            "rule": RULE,
            "machine": content["machine"],
            "rope": content["rope"],
            "prompts": [{"tokens": len(s["ids"]), "key": s["key"], "depth": s["depth"]} for s in own],
            "rows": rows,
        },
    )
    print(json.dumps(rows, indent=1))


def main() -> None:
    """The steps as commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    asking, reading, comparing = (steps.add_parser(name) for name in ("ask", "read", "compare"))
    asking.add_argument("model")
    asking.add_argument("--length", type=int, default=12288)
    asking.add_argument("--samples", type=int, default=2)
    asking.add_argument("--out", type=Path, required=True)
    reading.add_argument("file")
    reading.add_argument("asked", type=Path)
    reading.add_argument("--out", type=Path, required=True)
    reading.add_argument("--beta-fast", type=float)
    reading.add_argument("--beta-slow", type=float)
    comparing.add_argument("asked", type=Path)
    comparing.add_argument("answers", type=Path, nargs="+")
    comparing.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    if options.step == "ask":
        ask(options.model, options.length, options.samples, options.out)
    elif options.step == "read":
        betas = {"yarn_beta_fast": options.beta_fast, "yarn_beta_slow": options.beta_slow}
        given = {name: value for name, value in betas.items() if value is not None}
        read(options.file, options.asked, options.out, given)
    else:
        compare(options.asked, options.answers, options.json)


if __name__ == "__main__":
    main()

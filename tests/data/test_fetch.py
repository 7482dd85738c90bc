"""Fetching: through what the machine has, pinned, cached, nothing unpacked outside its folder. Needs no network."""

from __future__ import annotations

import functools
import http.server
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import ClassVar

import pytest

from ultralong.data.read.archives import extract, matches
from ultralong.data.read.fetch import Package, describe, fetch, unpack
from ultralong.utils.files import sha256


def tar_of(path: Path, members: dict[str, bytes], extra: list[tarfile.TarInfo] = ()) -> Path:
    with tarfile.open(path, "w:xz" if path.name.endswith("xz") else "w:gz") as tar:
        for name, data in members.items():
            item = tarfile.TarInfo(name)
            item.size = len(data)
            tar.addfile(item, io.BytesIO(data))
        for item in extra:
            tar.addfile(item)
    return path


def script(folder: Path, name: str, lines: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{lines}")
    path.chmod(0o755)


class Index(http.server.SimpleHTTPRequestHandler):
    """Serves files, and a project's page as JSON or as HTML, whichever `kind` says."""

    kind = "json"
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        if not self.path.endswith("/"):
            super().do_GET()
            return
        name = self.path.split("/")[-2]
        file = "texts-1.0.tar.gz"
        if name != "texts":
            self.send_error(404)
            return
        json_page = json.dumps({"files": [{"filename": file, "url": f"../../files/{file}"}]})
        html_page = f'<html><a href="../../files/{file}#sha256=abc">{file}</a></html>'
        body = (json_page if self.kind == "json" else html_page).encode()
        self.send_response(200)
        kind = "application/vnd.pypi.simple.v1+json" if self.kind == "json" else "text/html"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index on loopback that pip is told to use; it holds one source distribution."""
    (tmp_path / "www" / "files").mkdir(parents=True)
    archive = tar_of(
        tmp_path / "www" / "files" / "texts-1.0.tar.gz",
        {"texts-1.0/a.txt": b"one", "texts-1.0/b.txt": b"two", "texts-1.0/setup.py": b"raise SystemExit"},
    )
    handler = functools.partial(Index, directory=str(tmp_path / "www"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Index.asked.clear()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://user:secret@127.0.0.1:{server.server_port}/simple")
    monkeypatch.delenv("PIP_CERT", raising=False)
    yield archive
    server.shutdown()
    thread.join()
    server.server_close()


def pypi(archive: Path, **changes) -> Package:
    return Package(
        **{
            "registry": "pypi",
            "name": "Texts",
            "version": "1.0",
            "sha256": sha256(archive),
            "file": "texts-1.0.tar.gz",
            "include": ("*.txt",),
            **changes,
        }
    )


@pytest.mark.parametrize("kind", ["json", "html"])
def test_pypi_through_pips_own_index(index, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(Index, "kind", kind)
    path = fetch(pypi(index), tmp_path / "cache", quiet=True)
    assert path.read_bytes() == index.read_bytes()
    asked = len(Index.asked)
    assert fetch(pypi(index), tmp_path / "cache", quiet=True) == path
    assert len(Index.asked) == asked, "a good copy in the cache is not fetched again"
    assert describe(pypi(index), tmp_path / "cache")["sha256"] == sha256(index)


def test_a_spoilt_copy_is_fetched_again(index, tmp_path):
    path = fetch(pypi(index), tmp_path / "cache", quiet=True)
    path.write_bytes(b"half")
    assert sha256(fetch(pypi(index), tmp_path / "cache", quiet=True)) == sha256(index)


def test_a_wrong_hash_is_refused_and_not_kept(index, tmp_path):
    with pytest.raises(ValueError, match="the recipe pins 0000"):
        fetch(pypi(index, sha256="0" * 64), tmp_path / "cache", quiet=True)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_what_cannot_be_had_is_explained_without_the_password(index, tmp_path):
    with pytest.raises(ValueError, match=r"put the file at .*pypi/texts-2\.0\.tar\.gz") as error:
        fetch(pypi(index, file="texts-2.0.tar.gz"), tmp_path / "cache", quiet=True)
    assert "does not list texts-2.0.tar.gz" in str(error.value)
    assert "secret" not in str(error.value)
    with pytest.raises(ValueError, match="404"):
        fetch(pypi(index, name="nothing"), tmp_path / "cache", quiet=True)


def test_offline_with_the_file_put_there_by_hand(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with pytest.raises(ValueError, match=r"could not fetch Texts 1\.0 from pypi"):
        fetch(pypi(index), tmp_path / "cache", quiet=True)
    (tmp_path / "cache" / "pypi").mkdir(parents=True, exist_ok=True)
    shutil.copy(index, tmp_path / "cache" / "pypi")
    assert fetch(pypi(index), tmp_path / "cache", quiet=True).exists()


def test_unpacking_keeps_the_chosen_members_only_and_once(index, tmp_path):
    folder = unpack(pypi(index, exclude=("*/b.txt",)), tmp_path / "cache", quiet=True)
    assert [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()] == ["texts-1.0/a.txt"]
    assert unpack(pypi(index, exclude=("*/b.txt",)), tmp_path / "cache", quiet=True) == folder
    other = unpack(pypi(index), tmp_path / "cache", quiet=True)
    assert len(list(other.rglob("*.txt"))) == 2
    assert not list((tmp_path / "cache" / "unpacked").glob(".unpack-*"))


def test_npm_pack_runs_no_scripts(tmp_path, monkeypatch):
    archive = tar_of(tmp_path / "scope-texts-1.0.0.tgz", {"package/a.txt": b"one"})
    (tmp_path / "bin").mkdir()
    script(
        tmp_path / "bin",
        "npm",
        f"""
import json, shutil, sys
assert sys.argv[1:3] == ["pack", "@scope/texts@1.0.0"] and "--ignore-scripts" in sys.argv
shutil.copy({str(archive)!r}, sys.argv[sys.argv.index("--pack-destination") + 1])
print(json.dumps([{{"filename": "scope-texts-1.0.0.tgz"}}]))
""",
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    package = Package("npm", "@scope/texts", "1.0.0", sha256(archive), include=("package/*.txt",))
    assert (unpack(package, tmp_path / "cache", quiet=True) / "package" / "a.txt").read_bytes() == b"one"
    script(tmp_path / "bin", "npm", "import sys; sys.exit('npm error 404 Not Found')")
    with pytest.raises(ValueError, match="404 Not Found"):
        fetch(Package("npm", "gone", "1.0.0", "0" * 64), tmp_path / "cache", quiet=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="npm is not installed"):
        fetch(Package("npm", "gone", "1.0.0", "0" * 64), tmp_path / "cache", quiet=True)


@pytest.fixture
def deb(tmp_path):
    """A Debian package with a text and an archive in it."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not on this machine")
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: texts\nVersion: 1.0\nArchitecture: all\nMaintainer: a\nDescription: texts\n"
    )
    (root / "usr" / "src").mkdir(parents=True)
    (root / "usr" / "src" / "a.txt").write_text("one")
    tar_of(root / "usr" / "src" / "tree.tar.xz", {"tree/x.c": b"int x;", "tree/y.h": b"int y;"})
    subprocess.run(["dpkg-deb", "-b", str(root), str(tmp_path / "texts_1.0_all.deb")], check=True, capture_output=True)
    return tmp_path / "texts_1.0_all.deb"


def test_deb_through_apt(deb, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    script(
        tmp_path / "bin",
        "apt-get",
        f"""
import shutil, sys
assert sys.argv[1] == "download"
if "--print-uris" in sys.argv:
    print("'http://mirror.invalid/debian/pool/main/t/texts_1.0_all.deb' texts_1.0_all.deb 1 SHA256:0")
elif sys.argv[2] in ("texts", "texts=1.0"):
    shutil.copy({str(deb)!r}, ".")
else:
    sys.exit("E: Unable to locate package " + sys.argv[2])
""",
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    loose = Package("deb", "texts", include=("usr/src/*.txt",))
    assert (unpack(loose, tmp_path / "cache", quiet=True) / "usr/src/a.txt").read_text() == "one"
    pinned = Package("deb", "texts", "1.0", sha256(deb), inside="usr/src/tree.tar.xz", include=("*.c",))
    folder = unpack(pinned, tmp_path / "cache", quiet=True)
    assert [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()] == ["tree/x.c"]
    with pytest.raises(ValueError, match="Unable to locate package"):
        fetch(Package("deb", "gone", "1.0", "0" * 64), tmp_path / "cache", quiet=True)


def test_a_cut_deb_is_damaged(deb, tmp_path):
    deb.write_bytes(deb.read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged"):
        extract(deb, tmp_path / "out", ("*.txt",))


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil.txt", "a/../../evil.txt", "a\\..\\evil.txt"])
def test_paths_that_leave_the_folder_are_refused(tmp_path, name):
    archive = tar_of(tmp_path / "a.tar.gz", {"good.txt": b"good", name: b"evil"})
    with pytest.raises(ValueError, match="unsafe path"):
        extract(archive, tmp_path / "out" / "deep", ("*",))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        zipped.writestr(name, b"evil")
    with pytest.raises(ValueError, match="unsafe path"):
        extract(tmp_path / "a.zip", tmp_path / "out" / "deep", ("*",))
    assert not list(tmp_path.rglob("evil.txt"))


def test_links_are_not_unpacked(tmp_path):
    link = tarfile.TarInfo("link.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    extract(tar_of(tmp_path / "a.tar.gz", {"a.txt": b"one"}, [link]), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.txt"]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar.xz", "a.zip"])
def test_a_cut_archive_is_damaged(tmp_path, name):
    data = bytes(range(256)) * 2000
    if name.endswith("zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as zipped:
            zipped.writestr("a.txt", data)
    else:
        tar_of(tmp_path / name, {"a.txt": data})
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        extract(tmp_path / name, tmp_path / "out")


def test_nothing_matching_and_unknown_kinds_are_errors(tmp_path):
    archive = tar_of(tmp_path / "a.tar.gz", {"a.txt": b"one"})
    with pytest.raises(ValueError, match=r"nothing in a\.tar\.gz matches \*\.md"):
        extract(archive, tmp_path / "out", ("*.md",))
    (tmp_path / "a.rar").write_bytes(b"x")
    with pytest.raises(ValueError, match="no archive known"):
        extract(tmp_path / "a.rar", tmp_path / "out")


def test_patterns():
    assert matches("a/b/c.txt", ("*.txt",))
    assert matches("a/b/c.txt", ("a/*",), ("*.md",))
    assert not matches("a/b/c.txt", ("*.txt",), ("a/b/*",))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"registry": "pypi", "name": "a", "sha256": "0", "file": "a"}, "version"),
        ({"registry": "npm", "name": "a", "version": "1"}, "sha256"),
        ({"registry": "pypi", "name": "a", "version": "1", "sha256": "0"}, "file"),
        ({"registry": "deb", "name": "a", "version": "1"}, "sha256"),
    ],
)
def test_what_is_not_pinned_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Package(**wrong)

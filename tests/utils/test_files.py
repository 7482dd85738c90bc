"""Files: whole or not there, readable by others as the umask says, and a log that survives its last line."""

import errno
import fcntl
import hashlib
import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultralong.utils.files import (
    TAIL,
    append_jsonl,
    atomic_path,
    drop_partials,
    locked,
    read_json,
    read_jsonl,
    sha256,
    write_json,
    write_text,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    write_text(path, "old")

    def write_half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("ne")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.json"]


def test_the_new_file_is_not_seen_before_it_is_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "result.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("all of it")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "all of it"


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.txt"
    write_text(path, "old")
    script = textwrap.dedent(f"""
        import os, signal
        from ultralong.utils.files import atomic_path
        with atomic_path({str(path)!r}) as temporary:
            temporary.write_text("n" * 100_000)
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    (left,) = tmp_path.glob(".*.partial")
    others = [tmp_path / name for name in (".state.txt.partial", "state.txt.0123456789ab.partial", ".partial")]
    for other in others:
        other.write_text("someone else's")
    with locked(tmp_path):
        assert not left.exists(), "whoever writes there next removes it"
        assert all(other.exists() for other in others)


def test_what_another_process_is_writing_stays(tmp_path):
    """It need not hold the folder: `export gguf` writes for minutes, into a run's folder as well."""
    path = tmp_path / "model.gguf"
    script = textwrap.dedent(f"""
        from ultralong.utils.files import atomic_path
        with atomic_path({str(path)!r}) as temporary:
            temporary.write_text("all of it")
            print("written", flush=True)
            input()
    """)
    words = [sys.executable, "-c", script]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "written\n"
        with locked(tmp_path):
            assert len([*tmp_path.glob(".*.partial")]) == 1
        drop_partials(path)
        writer.communicate("\n", timeout=60)
    assert writer.returncode == 0
    assert path.read_text() == "all of it"
    assert not [*tmp_path.glob(".*.partial")]


def test_a_partial_file_that_is_removed_before_its_writer_locks_it_is_made_again(tmp_path, monkeypatch):
    real, first = fcntl.flock, []

    def removed_meanwhile(descriptor, operation):
        if not first:
            first.extend(tmp_path.glob(".*.partial"))
            first[0].unlink()
        return real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with atomic_path(tmp_path / "result.txt") as temporary:
        assert first
        assert first[0] != temporary
        temporary.write_text("all of it")
    assert (tmp_path / "result.txt").read_text() == "all of it"


def test_nothing_is_removed_where_files_cannot_be_locked(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    left = tmp_path / ".state.txt.0123456789ab.partial"
    left.write_text("half")
    with monkeypatch.context() as patch, atomic_path(tmp_path / "other.txt") as temporary:
        patch.setattr(fcntl, "flock", no_locks)
        drop_partials(tmp_path / "state.txt")
        assert left.exists()
        temporary.write_text("whole")
    drop_partials(tmp_path / "missing" / "state.txt")
    drop_partials(tmp_path / "other.txt")
    assert left.exists(), "of another file"
    drop_partials(tmp_path / "state.txt")
    assert not left.exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "file", "text")
    finally:
        assert os.umask(before) == umask
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


@given(VALUES)
def test_json_comes_back_as_it_went(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "value.json"
    write_json(path, value)
    assert read_json(path) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"loss": -float("inf")}])
def test_json_refuses_what_json_cannot_say(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "value.json", value)
    assert os.listdir(tmp_path) == []


def test_broken_json_names_the_file(tmp_path):
    (tmp_path / "half.json").write_text('{"a": 1')
    with pytest.raises(ValueError, match=r"half\.json is not valid JSON"):
        read_json(tmp_path / "half.json")


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers()), max_size=5), st.binary(max_size=12))
def test_a_log_survives_a_cut_last_line(tmp_path_factory, records, cut):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    path.touch()
    for record in records:
        append_jsonl(path, record)
    assert read_jsonl(path) == records
    with open(path, "ab") as stream:
        stream.write(cut.replace(b"\n", b""))
    assert read_jsonl(path) == records
    append_jsonl(path, {"resumed": True})
    assert read_jsonl(path) == [*records, {"resumed": True}]


@pytest.mark.parametrize("length", [TAIL - 1, TAIL, TAIL + 1, 2 * TAIL + 3])
@pytest.mark.parametrize("before", [0, 1])
def test_a_long_unfinished_line_is_cut_whole(tmp_path, length, before):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n' * before + b"x" * length)
    append_jsonl(path, {"b": 2})
    assert read_jsonl(path) == [{"a": 1}] * before + [{"b": 2}]


def test_a_broken_line_inside_a_log_is_an_error(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"a": 1}\n{"a":\n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2"):
        read_jsonl(tmp_path / "log.jsonl")


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 7])
def test_sha256_reads_all_of_a_file(tmp_path, size):
    content = bytes(index % 251 for index in range(size))
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("write", [append_jsonl, write_json])
def test_a_full_disk_has_a_place_whatever_is_written(tmp_path, write):
    """A file may have so many bytes: the system's own words for it name no file."""
    before, heard = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as told:
            write(tmp_path / "log.jsonl", {"text": "x" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, heard)
    assert told.value.filename == str(tmp_path / "log.jsonl")

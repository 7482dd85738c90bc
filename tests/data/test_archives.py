"""Archives that were made to harm, protected ones, and one in another."""

from __future__ import annotations

import zipfile

import pytest
from tar_files import tar_of

from ultralong.data.read.archives import extract


def test_an_inner_archives_member_of_its_own_name_is_kept(tmp_path):
    inner = tar_of({"src.tar.gz": b"a file of that name", "other.txt": b"x", ".outer/y.txt": b"y"})
    (tmp_path / "package.tar.gz").write_bytes(tar_of({"deep/src.tar.gz": inner}))
    assert extract(tmp_path / "package.tar.gz", tmp_path / "out", inside="deep/src.tar.gz") == 3
    assert (tmp_path / "out" / "src.tar.gz").read_bytes() == b"a file of that name"
    assert (tmp_path / "out" / ".outer" / "y.txt").read_bytes() == b"y"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "package.tar.gz"]


def test_a_protected_archive_is_one_line(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "secret")
    data = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + place] |= 1  # the bit that says encrypted
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"cannot be unpacked: .*password"):
        extract(path, tmp_path / "out")
    method = bytearray(path.read_bytes())
    for mark, flags, kind in ((b"PK\x03\x04", 6, 8), (b"PK\x01\x02", 8, 10)):
        start = method.index(mark)
        method[start + flags] &= ~1
        method[start + kind] = 97  # a method of another program
    path.write_bytes(bytes(method))
    with pytest.raises(ValueError, match="cannot be unpacked"):
        extract(path, tmp_path / "out")


def test_an_archive_that_was_made_to_fill_a_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ultralong.data.read.archives.ALWAYS_ALLOWED", 1 << 16)
    bomb = tar_of({f"{n}.txt": bytes(1 << 20) for n in range(4)})
    (tmp_path / "a.tar.gz").write_bytes(bomb)
    with pytest.raises(ValueError, match="more than 200 times its own size"):
        extract(tmp_path / "a.tar.gz", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", bytes(4 << 20))
    with pytest.raises(ValueError, match="more than 200 times its own size"):
        extract(tmp_path / "b.zip", tmp_path / "out2")
    monkeypatch.setattr("ultralong.data.read.archives.ALWAYS_ALLOWED", 1 << 30)
    assert extract(tmp_path / "a.tar.gz", tmp_path / "out3") == 4


def test_an_archive_with_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(tar_of({"a": b"file", "a/b.txt": b"below it"}))
    with pytest.raises(ValueError, match="a file and a folder of one name"):
        extract(tmp_path / "a.tar.gz", tmp_path / "out")

"""Where flash-attn 4 keeps compiled kernels: what its import sees, and which folders are refused."""

import logging
import os
import stat
from multiprocessing import get_context

import pytest
import torch

from ultralong.attention.kernels import kept_kernels
from ultralong.attention.kernels.kept_kernels import ENABLED, FOLDER, file_system, own_folder


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A Hopper GPU, no choice of the user's, a cache and a folder for temporary files, all on a disk of this host."""
    for name in (ENABLED, FOLDER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_kernels.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setattr(kept_kernels, "file_system", lambda place: "ext4")
    return tmp_path


def seen():
    """What the package would see while it is imported, and that nothing of it is left."""
    before = dict(os.environ)
    with kept_kernels.kept_kernels():
        found = {name: os.environ[name] for name in (ENABLED, FOLDER) if name in os.environ}
    assert dict(os.environ) == before
    return found


def mode(folder):
    return stat.S_IMODE(folder.lstat().st_mode)


def test_kernels_are_kept_in_a_folder_of_this_user(machine, caplog):
    caplog.set_level(logging.INFO)
    folder = machine / "cache/ultralong/flash-attn-4-sm90"
    for _ in range(2):  # made, then found
        assert seen() == {ENABLED: "1", FOLDER: str(folder)}
    assert {mode(each) for each in (folder, folder.parent, machine / "cache")} == {0o700}
    assert str(folder) in caplog.text
    assert not (machine / "temporary").exists()


@pytest.mark.parametrize("set_by_user", [{ENABLED: "0"}, {ENABLED: "1"}, {FOLDER: "/elsewhere"}])
def test_what_the_user_has_set_stays(machine, monkeypatch, set_by_user):
    for name, value in set_by_user.items():
        monkeypatch.setenv(name, value)
    assert seen() == set_by_user
    assert list(machine.iterdir()) == []


def test_nothing_is_made_without_a_gpu(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert seen() == {}
    assert list(machine.iterdir()) == []


def test_a_failed_import_leaves_nothing_and_says_nothing(machine, caplog):
    caplog.set_level(logging.INFO)
    with pytest.raises(ImportError), kept_kernels.kept_kernels():
        raise ImportError
    assert ENABLED not in os.environ
    assert FOLDER not in os.environ
    assert caplog.text == ""


def test_a_cache_on_a_network_is_passed_over(machine, monkeypatch):
    monkeypatch.setattr(kept_kernels, "file_system", lambda place: "nfs4" if place.name == "cache" else "xfs")
    folder = machine / f"temporary/ultralong-{os.getuid()}/flash-attn-4-sm90"
    assert seen() == {ENABLED: "1", FOLDER: str(folder)}
    assert mode(folder) == mode(folder.parent) == 0o700
    assert list((machine / "cache").iterdir()) == []


def test_without_a_safe_folder_kernels_are_compiled_anew_and_the_folders_are_named(machine, caplog):
    ours = (machine / "cache/ultralong", machine / f"temporary/ultralong-{os.getuid()}")
    for folder, bits in zip(ours, (0o770, 0o755), strict=True):
        folder.mkdir(parents=True)
        folder.chmod(bits)
    assert seen() == {}
    for folder, bits in zip(ours, (0o770, 0o755), strict=True):
        assert f"{folder} is no folder that only this user can use" in caplog.text
        assert list(folder.iterdir()) == []
        assert mode(folder) == bits  # of whom it is, and what is in it, is for the user to see


def test_a_user_without_a_home_on_a_disk_that_cannot_be_written(machine, monkeypatch, caplog):
    """As in a container: nothing is made in the working folder, and the import goes on."""

    def none():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what Python gives without HOME and user
    monkeypatch.setattr(kept_kernels.tempfile, "gettempdir", none)
    monkeypatch.chdir(machine)
    assert seen() == {}
    assert list(machine.iterdir()) == []
    assert "neither HOME nor XDG_CACHE_HOME" in caplog.text
    assert "No usable temporary directory" in caplog.text


def test_a_folder_of_another_user_is_refused(machine, monkeypatch):
    (machine / "ours").mkdir(mode=0o700)
    own = os.lstat(machine / "ours")
    others = os.stat_result((*own[:4], own.st_uid + 1, *own[5:]))
    monkeypatch.setattr(type(machine), "lstat", lambda _: others)
    with pytest.raises(PermissionError, match=rf"ours is no folder .* of user {own.st_uid + 1}\)"):
        own_folder(machine, "ours", "kind")


def test_a_link_is_refused_wherever_it_leads(machine):
    (machine / "target").mkdir(mode=0o700)
    (machine / "ours").symlink_to(machine / "target")
    with pytest.raises(PermissionError, match="ours is no folder"):
        own_folder(machine, "ours", "kind")
    assert list((machine / "target").iterdir()) == []


@pytest.mark.parametrize(("bits", "safe"), [(0o755, True), (0o775, False), (0o777, False), (0o1777, True)])
def test_the_folders_above_may_not_be_others_to_write(machine, bits, safe):
    """But with the sticky bit, as /tmp has it, where nobody can exchange another user's folder."""
    above = machine / "above"
    above.mkdir()
    above.chmod(bits)
    if safe:
        assert own_folder(above / "base", "ours") == above / "base/ours"
    else:
        with pytest.raises(PermissionError, match=f"another user can exchange what is in {above} "):
            own_folder(above / "base", "ours")


def test_a_full_disk_is_passed_over(machine, monkeypatch):
    room = os.statvfs(machine).f_bavail * os.statvfs(machine).f_frsize
    monkeypatch.setattr(kept_kernels, "ROOM", room * 2 + 2**20)
    with pytest.raises(OSError, match="MiB free"):
        own_folder(machine, "ours")
    assert list(machine.iterdir()) == []


def test_the_file_system_is_the_nearest_mount_s(tmp_path, monkeypatch):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "27 1 254:0 / / rw - ext4 /dev/vda rw\n28 27 0:4 / /home rw shared:1 - nfs4 host:/home rw\n"
        "29 28 0:5 / /home/a\\040b rw - xfs /dev/vdb rw\n30 27 0:6 / /homes rw - lustre x rw\n"
    )
    monkeypatch.setattr(kept_kernels, "MOUNTS", mounts)
    places = {"/home/c/.cache": "nfs4", "/home/a b/x": "xfs", "/tmp": "ext4", "/homes": "lustre", "/": "ext4"}
    assert {place: file_system(type(tmp_path)(place)) for place in places} == places


def _make(base, start, found):
    kept_kernels.file_system = lambda place: "ext4"
    start.wait()
    found.put(str(own_folder(base, "ours", "kind")))


def test_processes_that_start_together_have_one_folder(tmp_path):
    context = get_context("fork")
    start, found = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_make, args=(tmp_path, start, found)) for _ in range(4)]
    for process in processes:
        process.start()
    assert {found.get(timeout=60) for _ in processes} == {str(tmp_path / "ours/kind")}
    for process in processes:
        process.join()
        assert process.exitcode == 0

"""How checkpoints take and give up their names: what was there before, links, leftovers, full disks."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import time

import pytest
import torch

from lightning_superscale.checkpoint.load.reader import open_checkpoint
from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.checkpoint.storage import local
from lightning_superscale.checkpoint.storage.owner import this_process
from lightning_superscale.checkpoint.storage.rename import exchange, rename_to_free
from lightning_superscale.checkpoint.storage.staging import reap
from lightning_superscale.comm.mesh import single_mesh
from lightning_superscale.errors import CheckpointError
from tests.helpers.checkpoints import one_tensor, value_at

MESH = single_mesh()


def put(path, value: float) -> None:
    save(str(path), one_tensor(value), MESH, step=int(value))


@pytest.fixture(params=[True, False], ids=["exchange", "links"])
def can_exchange(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(local, "exchange", lambda one, other: False)
    return request.param


def test_names_are_swapped_or_nothing_happens(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").touch()
    (tmp_path / "b").write_text("file")
    assert exchange(str(tmp_path / "a"), str(tmp_path / "b"))  # this machine can
    assert (tmp_path / "b" / "x").exists()
    assert (tmp_path / "a").read_text() == "file"
    with pytest.raises(OSError, match="No such file"):
        exchange(str(tmp_path / "a"), str(tmp_path / "none"))


def test_a_free_name_is_taken_and_no_other(tmp_path, monkeypatch):
    for can in (True, False):
        if not can:
            monkeypatch.setattr("ctypes.get_errno", lambda: errno.ENOSYS)
            monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: None)
        (tmp_path / "one").write_text("new")
        (tmp_path / "other").write_text("old")
        with pytest.raises(FileExistsError):
            rename_to_free(str(tmp_path / "one"), str(tmp_path / "other"))
        assert (tmp_path / "other").read_text() == "old"
        os.unlink(tmp_path / "other")
        rename_to_free(str(tmp_path / "one"), str(tmp_path / "other"))
        assert (tmp_path / "other").read_text() == "new"


def test_a_system_that_can_not_swap_is_told_from_an_error(tmp_path, monkeypatch):
    for code, can in [(errno.ENOSYS, False), (errno.EINVAL, False), (errno.EACCES, None)]:
        monkeypatch.setattr("ctypes.get_errno", lambda code=code: code)
        if can is None:
            with pytest.raises(OSError, match="Permission"):
                exchange(str(tmp_path / "none"), str(tmp_path / "neither"))
        else:
            assert exchange(str(tmp_path / "none"), str(tmp_path / "neither")) is can


def test_again_and_again_at_one_path_and_removed(tmp_path, can_exchange):
    path = tmp_path / "last.ckpt"
    for value in (1.0, 2.0, 3.0):
        put(path, value)
        assert value_at(str(path)) == value
        assert path.is_symlink() is not can_exchange
    assert len(os.listdir(tmp_path)) == (1 if can_exchange else 2)
    local.remove(str(path))
    assert not path.exists()
    assert set(os.listdir(tmp_path)) <= {".ucp-store"}
    assert can_exchange or not os.listdir(tmp_path / ".ucp-store")
    local.remove(str(path))  # nothing there: nothing to do


def test_a_file_a_folder_and_a_link_are_replaced_and_what_a_link_names_is_kept(tmp_path, can_exchange):
    torch.save({"state_dict": {}}, tmp_path / "file.ckpt")
    put(tmp_path / "top.ckpt", 1.0)
    os.symlink("top.ckpt", tmp_path / "last.ckpt")  # as ModelCheckpoint(save_last="link") does
    for name in ("file.ckpt", "last.ckpt"):
        put(tmp_path / name, 2.0)
        assert value_at(str(tmp_path / name)) == 2.0
    assert value_at(str(tmp_path / "top.ckpt")) == 1.0
    os.symlink("top.ckpt", tmp_path / "link.ckpt")
    local.remove(str(tmp_path / "link.ckpt"))
    assert value_at(str(tmp_path / "top.ckpt")) == 1.0
    (tmp_path / "plain.ckpt").write_bytes(b"")
    local.remove(str(tmp_path / "plain.ckpt"))
    assert not (tmp_path / "plain.ckpt").exists()


def test_staging_names_do_not_contain_the_targets(tmp_path, monkeypatch):
    seen = []
    publish = local.LocalTarget.publish

    def look(self, manifest):
        seen.extend(os.listdir(tmp_path))
        publish(self, manifest)

    monkeypatch.setattr(local.LocalTarget, "publish", look)
    put(tmp_path / "hpc_ckpt_12.ckpt", 1.0)
    assert len(seen) == 1
    assert seen[0].startswith(".ucp-staging-")
    assert "hpc_ckpt" not in seen[0]


def leftover(folder, name: str, **owner) -> str:
    staging = folder / f".ucp-staging-{name}"
    (staging / "checkpoint").mkdir(parents=True)
    (staging / "owner.json").write_text(json.dumps({**json.loads(this_process().to_bytes()), **owner}))
    return staging.name


def test_only_staging_folders_of_the_dead_are_deleted(tmp_path):
    process = subprocess.Popen(["sleep", "0"])
    process.wait()
    alive = leftover(tmp_path, "alive")
    dead = leftover(tmp_path, "dead", pid=process.pid)
    reused = leftover(tmp_path, "reused", ticks=12)  # another process has its number now
    elsewhere = leftover(tmp_path, "elsewhere", host="other", pid=1)
    forgotten = leftover(tmp_path, "forgotten", host="other", pid=1)
    long_ago = time.time() - 2 * 24 * 3600
    for folder, _, files in os.walk(tmp_path / forgotten):
        for name in ("", *files):
            os.utime(os.path.join(folder, name), (long_ago, long_ago))
    assert set(reap(str(tmp_path), time.time())) == {dead, reused, forgotten}
    assert set(os.listdir(tmp_path)) == {alive, elsewhere}


def test_a_full_disk_is_known_before_anything_is_written(tmp_path, monkeypatch):
    put(tmp_path / "a", 1.0)
    statvfs = os.statvfs(tmp_path)

    class Full:
        f_bavail, f_frsize = 3, 1

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    with pytest.raises(CheckpointError, match="ENOSPC"):
        put(tmp_path / "a", 2.0)
    assert statvfs.f_frsize > 1
    assert value_at(str(tmp_path / "a")) == 1.0
    assert os.listdir(tmp_path) == ["a"]


def test_a_disk_that_fills_up_leaves_the_old_checkpoint_and_no_staging(tmp_path):
    put(tmp_path / "a", 1.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (10, 300, 500):  # within the first file, and within the manifest
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(CheckpointError, match=r"was not written.*File too large"):
                put(tmp_path / "a", 2.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert value_at(str(tmp_path / "a")) == 1.0
        assert os.listdir(tmp_path) == ["a"]


def test_a_small_file_system_that_is_full_says_so(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    try:
        put(tmp_path / "a", 1.0)
        state = one_tensor(2.0)
        state.rest["much"] = "x" * 2**15
        with open(tmp_path / "other", "wb") as file:
            file.write(b"x" * 2**14)
        with pytest.raises(CheckpointError, match="No space left on device|ENOSPC"):
            save(str(tmp_path / "a"), state, MESH)
        assert value_at(str(tmp_path / "a")) == 1.0
        assert sorted(os.listdir(tmp_path)) == ["a", "other"]
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_replacement_that_can_not_be_finished_is_taken_back(tmp_path, monkeypatch):
    put(tmp_path / "a", 1.0)
    monkeypatch.setattr(local, "exchange", lambda one, other: False)
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(CheckpointError, match="I/O error"):
        put(tmp_path / "a", 2.0)
    monkeypatch.setattr(os, "replace", replace)
    assert value_at(str(tmp_path / "a")) == 1.0
    put(tmp_path / "a", 3.0)
    assert value_at(str(tmp_path / "a")) == 3.0


def manifest_file(events: list[str]) -> str:
    return next(event for event in events if event.endswith("/MANIFEST.json"))


def test_a_folder_whose_replacement_died_is_taken_back_by_the_next_save(tmp_path):
    """Between two renames, where names can't be swapped; opening takes it back too."""
    for use in (lambda: put(tmp_path / "b", 2.0), lambda: open_checkpoint(str(tmp_path / "a"))):
        put(tmp_path / "a", 1.0)
        staging = leftover(tmp_path, "dead", pid=2**22 + 1, target="a")
        os.rename(tmp_path / "a", tmp_path / staging / "replaced")
        use()
        assert value_at(str(tmp_path / "a")) == 1.0
        put(tmp_path / "b", 3.0)
        assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_every_file_and_folder_is_synchronized_before_the_name_changes(tmp_path, monkeypatch):
    """fsync of all that was written comes before the rename, and one of the parent after it."""
    events = []
    fsync, rename = os.fsync, os.rename

    def noted(descriptor):
        events.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        fsync(descriptor)

    def renamed(one, other):
        if str(other) == str(tmp_path / "a"):
            events.append("rename")
        rename(one, other)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", renamed)
    put(tmp_path / "a", 1.0)
    at = events.index("rename")
    before = {event.split("/", 2)[2] if event.count("/") > 1 else event for event in events[:at]}
    manifest = open_checkpoint(str(tmp_path / "a")).manifest
    assert {"MANIFEST.json", "data", "blocks", *manifest.files} <= before
    # The folder itself after the last name in it.
    assert any(event.endswith("/checkpoint") for event in events[events.index(manifest_file(events)) : at])
    assert events[at + 1] == "."

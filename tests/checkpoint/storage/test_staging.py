"""Staging folders: planted links and notes break nothing, and only what is ours and dead is touched."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time

import pytest

from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.checkpoint.storage import local, staging
from lightning_superscale.checkpoint.storage.local import remove
from lightning_superscale.checkpoint.storage.owner import this_process
from lightning_superscale.checkpoint.storage.staging import Staging, others_at, reap
from lightning_superscale.comm.mesh import single_mesh
from lightning_superscale.errors import CheckpointError
from tests.checkpoint.storage.test_contents import snapshot
from tests.checkpoint.storage.test_owner import NOTES
from tests.helpers.checkpoints import one_tensor, value_at

MESH = single_mesh()
DEAD = {**json.loads(this_process("last.ckpt").to_bytes()), "pid": 2**22 + 1}


def put(path, value: float) -> None:
    save(str(path), one_tensor(value), MESH, step=int(value))


@pytest.fixture
def theirs(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "thesis").write_text("years of work")
    return folder


def test_planted_links_are_never_followed(tmp_path, theirs):
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / ".ucp-staging-itself").symlink_to(theirs)
    (theirs / "owner.json").write_text(json.dumps(DEAD))
    for part in ("checkpoint", "replaced", "link", "owner.json"):
        planted = shared / f".ucp-staging-{part}"
        planted.mkdir()
        (planted / "owner.json").write_text(json.dumps({**DEAD, "target": "other"}))
        (planted / part).unlink(missing_ok=True)
        (planted / part).symlink_to(theirs if part != "owner.json" else theirs / "owner.json")
    inside = shared / ".ucp-staging-inside"
    (inside / "checkpoint").mkdir(parents=True)
    (inside / "owner.json").write_text(json.dumps(DEAD))
    (inside / "checkpoint" / "data").symlink_to(theirs)
    (theirs / "w00000-0.safetensors").write_text("mine")
    (shared / ".ucp-store").symlink_to(theirs)
    before = snapshot(theirs)
    for value in (1.0, 2.0):
        put(shared / "last.ckpt", value)
        assert value_at(str(shared / "last.ckpt")) == value
    remove(str(shared / "last.ckpt"))
    assert snapshot(theirs) == before


def test_a_store_that_is_a_link_is_not_written_to(tmp_path, theirs, monkeypatch):
    monkeypatch.setattr(local, "exchange", lambda one, other: False)
    (tmp_path / ".ucp-store").symlink_to(theirs)
    with pytest.raises(CheckpointError, match=r"\.ucp-store is a link"):
        put(tmp_path / "last.ckpt", 1.0)
    assert os.listdir(theirs) == ["thesis"]
    assert set(os.listdir(tmp_path)) == {"theirs", ".ucp-store"}


@pytest.mark.parametrize("data", NOTES.values(), ids=NOTES)
def test_a_note_that_is_not_as_expected_breaks_no_save(tmp_path, data):
    planted = tmp_path / ".ucp-staging-planted"
    (planted / "replaced").mkdir(parents=True)
    (planted / "owner.json").write_bytes(data)
    (planted / "mine").write_text("x")
    before = snapshot(planted)
    put(tmp_path / "last.ckpt", 1.0)
    put(tmp_path / "last.ckpt", 2.0)
    remove(str(tmp_path / "last.ckpt"))
    assert not (tmp_path / "last.ckpt").exists()
    assert snapshot(planted) == before


@pytest.mark.timeout(20)
def test_fifos_and_devices_for_notes_hang_nothing(tmp_path):
    for number, make in enumerate((os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir())):
        planted = tmp_path / f".ucp-staging-{number}"
        (planted / "checkpoint").mkdir(parents=True)
        make(planted / "owner.json")
        os.mkfifo(planted / "checkpoint" / "MANIFEST.json")
    put(tmp_path / "last.ckpt", 1.0)
    put(tmp_path / "last.ckpt", 2.0)
    assert value_at(str(tmp_path / "last.ckpt")) == 2.0
    assert len(os.listdir(tmp_path)) == 4


def test_what_is_dead_and_ours_goes_and_what_lies_beside_stays(tmp_path):
    put(tmp_path / "other.ckpt", 1.0)
    planted = tmp_path / ".ucp-staging-dead"
    planted.mkdir()
    (planted / "owner.json").write_text(json.dumps(DEAD))
    shutil.copytree(tmp_path / "other.ckpt", planted / "checkpoint")
    (planted / "checkpoint" / "notes.txt").write_text("mine")
    (planted / "letter.txt").write_text("mine")
    put(tmp_path / "other.ckpt", 2.0)
    assert snapshot(planted) == {"owner.json": json.dumps(DEAD).encode(), "letter.txt": b"mine"}
    assert snapshot(tmp_path / "last.ckpt") == {"notes.txt": b"mine"}


def test_the_staging_of_a_save_that_runs_is_kept_by_others(tmp_path, monkeypatch):
    """Also before its note is written, and whatever the clock does meanwhile."""
    at, go = threading.Event(), threading.Event()
    write_file = staging.write_file

    def slow(path, data):
        at.set()
        assert go.wait(20)
        write_file(path, data)

    monkeypatch.setattr(staging, "write_file", slow)
    thread = threading.Thread(target=put, args=(tmp_path / "a.ckpt", 1.0))
    thread.start()
    assert at.wait(20)
    monkeypatch.setattr(staging, "write_file", write_file)
    assert reap(str(tmp_path), time.time() + 1e7) == []
    go.set()
    put(tmp_path / "b.ckpt", 1.0)
    thread.join()
    assert value_at(str(tmp_path / "a.ckpt")) == 1.0
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "b.ckpt"]


def test_a_folder_that_is_taken_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock, taken = staging.lock, []

    def late(descriptor):
        if not taken:
            taken.append(True)
            monkeypatch.setattr(staging, "lock", lock)
            assert reap(str(tmp_path), time.time()) == [".ucp-staging-a"]
        return lock(descriptor)

    monkeypatch.setattr(staging, "lock", late)
    mine = Staging(str(tmp_path / ".ucp-staging-a"), "last.ckpt")
    mine.open()
    assert taken
    assert str(os.getpid()) in others_at(str(tmp_path / "last.ckpt"))
    assert others_at(str(tmp_path / "elsewhere.ckpt")) == ""
    mine.close()
    assert os.listdir(tmp_path) == []


def test_a_replacement_of_another_host_that_stopped_half_way_is_taken_back_on_load(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "_BETWEEN_RENAMES_S", 0.2)
    path = tmp_path / "last.ckpt"
    put(path, 1.0)
    left = tmp_path / ".ucp-staging-left"
    left.mkdir()
    (left / "owner.json").write_text(json.dumps({**DEAD, "host": "elsewhere b c"}))
    os.rename(path, left / "replaced")
    assert value_at(str(path)) == 1.0
    # One that runs on this host is left alone.
    (left / "owner.json").write_text(json.dumps(json.loads(this_process("last.ckpt").to_bytes())))
    os.rename(path, left / "replaced")
    assert not local.restore(str(path))

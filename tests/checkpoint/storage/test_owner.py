"""Who owns a staging folder: told by boot, process and lock, never by a clock that steps."""

from __future__ import annotations

import json
import os
import subprocess
import time

import psutil
import pytest

from lightning_superscale.checkpoint.storage import owner as owners
from lightning_superscale.checkpoint.storage.owner import is_abandoned, lock, parse_owner, this_process, unlock
from lightning_superscale.checkpoint.storage.trees import opened

NOW = 1e9


@pytest.fixture
def staging(tmp_path):
    folder = tmp_path / ".ucp-staging-a"
    folder.mkdir()
    return folder


def note(staging, **changed) -> None:
    (staging / "owner.json").write_text(json.dumps({**json.loads(this_process("a").to_bytes()), **changed}))


def abandoned(staging, now: float | None = None) -> bool:
    with opened(str(staging)) as descriptor:
        return is_abandoned(descriptor, staging.stat().st_mtime if now is None else now)


def test_a_note_comes_back():
    owner = this_process("last.ckpt", is_locked=True)
    assert parse_owner(owner.to_bytes()) == owner
    assert not owner.is_gone()
    assert str(os.getpid()) in str(owner)


def test_a_step_of_the_clock_makes_nobody_dead(staging, monkeypatch):
    note(staging)
    for step in (5.0, -5.0, 1e6):
        monkeypatch.setattr(time, "time", lambda step=step: NOW + step)
        monkeypatch.setattr(psutil, "boot_time", lambda step=step: NOW + step)
        monkeypatch.setattr(psutil.Process, "create_time", lambda self, step=step: NOW + step)
        assert not abandoned(staging)


def test_processes_that_are_gone(staging):
    process = subprocess.Popen(["sleep", "0"])
    process.wait()
    note(staging, pid=process.pid)
    assert abandoned(staging)
    note(staging, ticks=12)  # another process has the number now
    assert abandoned(staging)
    note(staging, ticks=None)  # of an earlier version: its start is not told
    assert not abandoned(staging)


def test_a_lock_tells_on_its_own_boot(staging):
    note(staging, locked=True)
    with opened(str(staging)) as held:
        assert lock(held) is True
        assert not abandoned(staging)
        unlock(held)
        assert abandoned(staging)  # it runs, but no more here
    host = this_process().host.split(" ")
    note(staging, locked=True, host=" ".join([host[0], "another boot", host[2]]))
    assert not abandoned(staging)


def test_another_hosts_counts_as_dead_a_day_after_its_last_write(staging):
    note(staging, host="elsewhere b c", pid=1)
    (staging / "data").write_bytes(b"x")
    written = staging.stat().st_mtime
    assert not abandoned(staging, written + 23 * 3600)
    assert abandoned(staging, written + 25 * 3600)
    os.utime(staging / "data", (written + 10 * 3600,) * 2)
    assert not abandoned(staging, written + 25 * 3600)


NOTES = {
    "a number for a path": b'{"host": 5, "pid": 5, "ticks": 5, "target": 5}',
    "a target elsewhere": b'{"host": "a", "pid": 5, "ticks": 5, "target": "../x"}',
    "a target above": b'{"host": "a", "pid": 5, "ticks": 5, "target": ".."}',
    "10^400": b'{"host": "a", "pid": 1' + b"0" * 400 + b', "target": "x"}',
    "10^5000": b'{"host": "a", "pid": 1' + b"0" * 5000 + b', "target": "x"}',
    "infinity": b'{"host": "a", "pid": Infinity, "target": "x"}',
    "true": b'{"host": "a", "pid": true, "target": "x"}',
    "deep": b"[" * 30_000,
    "a list": b"[]",
    "half": b'{"host": "a", "pi',
    "nothing": b"",
    "bytes": bytes(range(256)),
}


@pytest.mark.parametrize("data", NOTES.values(), ids=NOTES)
def test_a_note_that_is_not_ours_owns_nothing(staging, data):
    assert parse_owner(data) is None
    (staging / "owner.json").write_bytes(data)
    (staging / "mine").write_text("x")
    assert not abandoned(staging, NOW * 10)


def test_folders_of_other_users_are_not_ours(staging, monkeypatch):
    note(staging, ticks=12)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert not abandoned(staging)


def test_without_locks_the_note_decides(staging, monkeypatch):
    def none(*_):
        raise OSError(9, "EBADF")

    monkeypatch.setattr(owners.fcntl, "flock", none)
    note(staging, locked=False)
    assert not abandoned(staging)
    (staging / "owner.json").unlink()
    assert not abandoned(staging)  # its owner may be about to note itself
    assert abandoned(staging, staging.stat().st_mtime + 25 * 3600)

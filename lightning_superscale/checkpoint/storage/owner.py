"""The process that owns a staging folder, and whether it is gone.

[Note: Owners] A staging folder is locked (flock) by the process that made it, for as long as it works there. A note in
the folder says which process that was, by boot, process number and start since boot: clocks may step, these don't.
Another process may touch the folder only when it has the lock and the note's process is provably gone. A process of
another host can't be seen, so its folder counts as dead a day after the last change in it, by the clock of the file
system. Where the file system has no locks the note alone decides. What has no valid note is not ours, unless
it is empty; links and folders of other users never are.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import stat
from dataclasses import dataclass
from typing import Any

import psutil

from lightning_superscale.checkpoint.storage.contents import OWNER
from lightning_superscale.checkpoint.storage.trees import entries, is_folder, read_plain_file

# A staging folder of another host, whose processes can't be seen here, counts as dead this long after its last write.
_STALE_AFTER_S = 24 * 3600.0
_LARGEST_NOTE = 65536


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that saves or removes checkpoints.

    Attributes:
        host: host name, boot and process namespace, within which process numbers can be compared.
        pid: its number.
        ticks: its start since boot, in clock ticks; None where the system does not say.
        is_locked: whether it holds a lock while it works.
        target: name of the checkpoint; "" for a removal.
    """

    host: str
    pid: int
    ticks: int | None
    is_locked: bool = False
    target: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host.split(' ')[0]}"

    def to_bytes(self) -> bytes:
        """The note, as JSON."""
        fields = {"host": self.host, "pid": self.pid, "ticks": self.ticks, "locked": self.is_locked}
        return json.dumps({**fields, "target": self.target}).encode()

    def is_gone(self) -> bool:
        """Whether the process provably runs no more. False for those of other hosts, which can't be seen."""
        if self.host != _host():
            return False
        if not psutil.pid_exists(self.pid):
            return True
        ticks = _ticks(self.pid)
        return self.ticks is not None and ticks is not None and ticks != self.ticks


def this_process(target: str = "", *, is_locked: bool = False) -> Owner:
    """The owner that this process is."""
    return Owner(_host(), os.getpid(), _ticks(os.getpid()), is_locked, target)


def parse_owner(data: bytes | None) -> Owner | None:
    """The owner that a note names; None where it is no note of ours."""
    try:
        fields: Any = json.loads(data or b"")
        host, pid, ticks, target = fields["host"], fields["pid"], fields.get("ticks"), fields.get("target", "")
        is_locked = fields.get("locked", False)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    is_number = type(pid) is int and 0 < pid < 2**31 and (ticks is None or type(ticks) is int)
    is_name = type(target) is str and os.path.basename(target) == target and target not in (".", "..")
    if not (is_number and is_name and type(host) is str and type(is_locked) is bool):
        return None
    return Owner(host, pid, ticks, is_locked, target)


def read_owner(descriptor: int) -> Owner | None:
    """The owner of an open staging folder; None where it has no note of ours."""
    return parse_owner(read_plain_file(OWNER, descriptor, _LARGEST_NOTE))


def lock(descriptor: int) -> bool | None:
    """Lock an open folder until it is closed.

    Returns:
        True with the lock, False where another process has it, None where the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def unlock(descriptor: int) -> None:
    """Give up the lock of an open folder, also where processes that were forked meanwhile have it open."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def is_abandoned(descriptor: int, now: float) -> bool:
    """Whether nobody works in an open staging folder any more, and it is ours ([Note: Owners]). Locks it if so.

    Args:
        now: time of a change that was just made in the same file system, in seconds since the epoch.
    """
    if os.fstat(descriptor).st_uid != os.geteuid():
        return False
    has_lock = lock(descriptor)
    if has_lock is False:
        return False
    owner = read_owner(descriptor)
    if owner is None:
        # Nothing is lost with a note that was never finished.
        is_empty = all(name == OWNER for name in entries(descriptor)) and _is_small_file(OWNER, descriptor)
        return is_empty and (has_lock is True or now - _newest(descriptor) > _STALE_AFTER_S)
    if has_lock and owner.is_locked and _boot(owner.host) == _boot(_host()):
        return True  # it does not work here any more, even if it runs
    if owner.host == _host():
        return owner.is_gone()
    return now - _newest(descriptor) > _STALE_AFTER_S


def _is_small_file(name: str, dir_fd: int) -> bool:
    """Whether a name is that of a file as small as a note, or of nothing."""
    try:
        found = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return True
    return stat.S_ISREG(found.st_mode) and found.st_size <= _LARGEST_NOTE


def _newest(descriptor: int) -> float:
    """Time of the last change below an open folder, in seconds since the epoch."""
    newest = os.fstat(descriptor).st_mtime
    for _, folders, files, inner in os.fwalk(".", dir_fd=descriptor):
        for name in (*files, *(name for name in folders if not is_folder(name, inner))):
            with contextlib.suppress(OSError):
                newest = max(newest, os.stat(name, dir_fd=inner, follow_symlinks=False).st_mtime)
    return newest


def _host() -> str:
    known = [socket.gethostname(), "unknown"]
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            known[1] = file.read().strip()
        known.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        pass
    return " ".join(known)


def _boot(host: str) -> str:
    """The boot in a host's text; the entire text where it has none."""
    parts = host.split(" ")
    return parts[1] if len(parts) == 3 else host


def _ticks(pid: int) -> int | None:
    """The start of a process in clock ticks since boot; None where the system does not say."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None

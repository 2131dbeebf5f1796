"""Names the process of a rank, and tells from the machine that it runs on what became of it."""

from __future__ import annotations

import functools
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """One process, told from all others, also from a later one of the same number.

    Attributes:
        machine: the machine that runs it, and the namespace of its number; "" where it can't be known.
        pid: its number.
        started: when it started, in the machine's ticks.
    """

    machine: str
    pid: int
    started: int


class Fate(NamedTuple):
    """What became of a process that gives no sign of life.

    Attributes:
        is_gone: whether it will never go on.
        text: says so in words, such as "its process 812 was killed by SIGKILL".
    """

    is_gone: bool
    text: str


@functools.cache
def this_machine() -> str:
    """A text that two processes share if each can look the other up by its number; "" where that can't be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def this_process() -> Process:
    """The process that calls."""
    pid = os.getpid()
    stat = _stat_of(pid)
    return Process(this_machine(), pid, 0 if stat is None else int(stat[19]))


def fate_of(process: Process) -> Fate | None:
    """What became of a process of this machine; None if it runs, or can't be looked up from here."""
    if not process.machine or process.machine != this_machine():
        return None
    stat = _stat_of(process.pid)
    name = f"its process {process.pid}"
    if stat is None or int(stat[19]) != process.started:
        return Fate(True, f"{name} is gone")
    state = stat[0]
    if state in "ZX":
        return Fate(True, f"{name} {_ending(int(stat[-1]))}")
    return Fate(False, f"{name} is stopped by a signal or a debugger") if state in "Tt" else None


def _ending(status: int) -> str:
    """How a process ended, from its wait status; one that has no right to know it reads 0."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with suppress(ValueError):
            return f"was killed by {signal.Signals(number).name}{_HINTS.get(number, '')}"
        return f"was killed by signal {number}"
    code = os.WEXITSTATUS(status)
    return f"ended with exit code {code}" if code else "has ended"


_HINTS: dict[int, str] = {signal.SIGKILL: ", as the kernel does when memory is short"}


def _stat_of(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat after the name, the state first; None without such a process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text[text.rindex(")") + 1 :].split()  # the name may hold spaces and brackets

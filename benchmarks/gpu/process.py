"""Processes with a time limit: a row of a run that hangs does not take the others along."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
# Peers must not inherit limits that a shell or a Makefile set for something else.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "LSS_CPU_THREADS")
_TAIL_LINES = 25
_RUNNING: set[subprocess.Popen[str]] = set()


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        status: exit status; None if it was killed at a limit.
        seconds: wall time.
        tail: the last lines of its standard error.
        killed: why it was killed; "" if it was not.
    """

    status: int | None
    seconds: float
    tail: str
    killed: str = ""

    @property
    def is_good(self) -> bool:
        return self.status == 0

    @property
    def why(self) -> str:
        """What went wrong, in words."""
        return f"killed: {self.killed}" if self.killed else f"ended with status {self.status}"


def environment(device: str, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with threads free on a GPU; a CPU stays with what it was given, it is shared."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "PL_"))}
    if device == "cuda":
        kept = {key: value for key, value in kept.items() if key not in _THREAD_VARIABLES}
    path = f"{ROOT}{os.pathsep}{kept.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    return kept | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | dict(more or {})


def run(
    command: Sequence[str],
    *,
    limit_s: float,
    env: Mapping[str, str],
    stdin: str = "",
    silence_s: float | None = None,
    on_line: Callable[[str], None] = print,
) -> Outcome:
    """Run a process and hand on each line of its standard output as it comes.

    Args:
        limit_s: seconds after which it is killed with all its children.
        silence_s: seconds without a line after which it is killed; None for no such limit.
        stdin: its standard input.
        on_line: is called on this thread.
    """
    start = time.monotonic()
    with tempfile.TemporaryFile(mode="w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        _RUNNING.add(process)
        try:
            status, killed = _converse(process, stdin, start + limit_s, silence_s, on_line)
        finally:
            _end(process)
            _RUNNING.discard(process)
        log.seek(0)
        tail = "".join(log.readlines()[-_TAIL_LINES:])
    return Outcome(status, time.monotonic() - start, tail, killed)


def kill_all() -> None:
    """End every process that any thread runs: the run is interrupted."""
    for process in tuple(_RUNNING):
        _kill(process)


def _converse(
    process: subprocess.Popen[str],
    stdin: str,
    deadline: float,
    silence_s: float | None,
    on_line: Callable[[str], None],
) -> tuple[int | None, str]:
    """(exit status or None, the limit that was hit or "")."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(stdin)
        process.stdin.close()
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    while True:
        left = deadline - time.monotonic()
        is_silence = silence_s is not None and silence_s < left
        try:
            line = lines.get(timeout=max(0.0, silence_s if is_silence and silence_s is not None else left))
        except queue.Empty:
            return None, f"nothing came for {silence_s:.0f} s" if is_silence else "its time was up"
        if line is None:
            break
        on_line(line.rstrip("\n"))
    try:
        return process.wait(timeout=max(1.0, deadline - time.monotonic())), ""
    except subprocess.TimeoutExpired:
        return None, "its time was up"


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    with contextlib.suppress(ValueError):  # the stream was closed: its process was killed
        for line in stream:
            lines.put(line)
    lines.put(None)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill what is left of a process and of its children."""
    _kill(process)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its children share its group

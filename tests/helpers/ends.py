"""Runs ranks that raise, die or are stopped, and tells how each one's process ended, when, and what it said."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.ranks import _CONTEXT


@dataclass(frozen=True)
class End:
    """The end of one rank.

    Attributes:
        code: its exit code; negative for a signal, None if it had to be killed at the time limit.
        said: the exception that it raised, with its notes, and what it wrote to stderr.
        seconds: how long it ran.
    """

    code: int | None
    said: str
    seconds: float


def ends_of(world_size: int, function: Callable[..., Any], *args: Any, limit_s: float = 100.0) -> list[End]:
    """How ranks that call `function(rank, world_size, *args)` end. They find each other through a port, as under srun.

    The ranks have no launcher that would end them. Those that are stopped when all others have ended, and those that
    still run at the time limit, are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        files = [Path(folder, str(rank)) for rank in range(world_size)]
        ranks = [
            _CONTEXT.Process(target=_run, args=(rank, world_size, port, str(files[rank]), function, args))
            for rank in range(world_size)
        ]
        began = time.monotonic()
        for process in ranks:
            process.start()
        try:
            seconds = _wait(ranks, began + limit_s)
        finally:  # also where the test's own time ran out
            codes = [process.exitcode for process in ranks]
            for process in ranks:
                process.kill()
                process.join()
        said = [file.read_text() if file.exists() else "" for file in files]
        return [End(codes[rank], said[rank], seconds[rank] - began) for rank in range(world_size)]


def _wait(ranks: list[Any], deadline: float) -> list[float]:
    """Wait until ranks have ended, or all that have not are stopped; returns when each did, or when this gave up."""
    ended: dict[int, float] = {}
    while len(ended) < len(ranks) and time.monotonic() < deadline:
        alive = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        ended.update((rank, time.monotonic()) for rank in range(len(ranks)) if rank not in alive and rank not in ended)
        if ended and alive and _are_stopped(ranks[rank].pid for rank in alive):
            break
        time.sleep(0.05)
    return [ended.get(rank, time.monotonic()) for rank in range(len(ranks))]


def free_port() -> int:
    """A port that nobody listens at, below those that the kernel gives to connections."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def _are_stopped(pids: Any) -> bool:
    """Whether all of some processes are stopped by a signal."""
    try:
        return all(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T" for pid in pids)
    except OSError:  # one has ended meanwhile
        return False


def _run(rank: int, world_size: int, port: int, file: str, function: Callable[..., Any], args: Any) -> None:
    import torch

    os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="tests",
        OMP_WAIT_POLICY="passive",
    )  # fmt: skip
    os.environ.pop("PL_GLOBAL_SEED", None)
    try:
        function(rank, world_size, *args)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        raise SystemExit(1) from None

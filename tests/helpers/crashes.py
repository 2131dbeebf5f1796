"""Processes that die at a chosen system call: forked from one server, so that hundreds of deaths take seconds."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from tests.helpers.ranks import _CONTEXT

CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "symlink", "unlink", "rmdir")


class Countdown:
    """Counts calls that change a disk, and kills its process just before one of them; at a write, in its middle.

    Args:
        deadly: which call kills; None counts only.
    """

    def __init__(self, deadly: int | None) -> None:
        self.count = 0
        self.renames: list[int] = []  # which of the calls change names
        self._deadly = deadly
        self._lock = threading.Lock()

    def arm(self, can_exchange: bool = True) -> None:
        """From now on; without `can_exchange` the system can't swap names."""
        from lightning_superscale.checkpoint.storage import local

        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        exchange = self._counted("exchange", local.exchange)
        local.exchange = exchange if can_exchange else lambda one, other: False

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return call(*args, **kwargs)
            with self._lock:
                self.count += 1
                if name in ("rename", "replace", "exchange", "symlink"):
                    self.renames.append(self.count)
                if self.count == self._deadly:
                    if name == "write":
                        call(args[0], args[1][: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted


def in_a_server(function: Callable[..., Any], *args: Any, limit_s: float = 200.0) -> Any:
    """`function(*args)` in a process of its own, from which it may fork: it runs no other threads.

    Raises:
        AssertionError: with its traceback, or that it took too long.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_serve, args=(sender, pickle.dumps((function, args))))
    process.start()
    sender.close()
    if not receiver.poll(limit_s):
        process.kill()
        raise AssertionError(f"no answer within {limit_s:.0f} s")
    is_good, answer = pickle.loads(receiver.recv_bytes())
    process.join()
    if not is_good:
        raise AssertionError(answer)
    return answer


def _serve(sender: Any, payload: bytes) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(payload)
        sender.send_bytes(pickle.dumps((True, function(*args))))
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))


def forked(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(rank, world_size, *args)` in forked ranks, on gloo if there are several.

    Returns:
        By rank: what it returned, the exception that it raised, or None where it was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(rank, world_size, folder, function, args) for rank in range(world_size)]
        return [_answer(pid, pipe) for pid, pipe in children]


def _fork(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: Any) -> tuple[int, int]:
    reading, writing = os.pipe()
    write, leave = os.write, os._exit
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    try:
        if world_size > 1:
            import torch.distributed as dist

            store = dist.FileStore(os.path.join(folder, "store"), world_size)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=30)
            )
        answer = function(rank, world_size, *args)
    except Exception as error:
        answer = error
    write(writing, pickle.dumps(answer))
    leave(0)
    return 0, 0


def _answer(pid: int, pipe: int) -> Any:
    with os.fdopen(pipe, "rb") as file:
        data = file.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    return pickle.loads(data)


def deaths(count: int, renames: list[int], stride: int) -> Iterator[int]:
    """Every `stride`-th of `count` calls, and always those around a change of names, and the last ones."""
    near = {k + d for k in renames for d in (0, 1)}
    return (k for k in range(1, count + 2) if k % stride == 0 or k in near or k > count - 1)

"""Runs a function on real gloo ranks: a process each, a time limit, every rank's traceback in the failure."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

# One server imports torch once; ranks are forked from it while it is still single-threaded.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["lightning", "torch.distributed", "lightning_superscale.ops.cpu.adamw"])


class RankFailed(AssertionError):
    """At least one rank raised, died or ran out of time."""


def _run(rank: int, world_size: int, folder: str, limit_s: float, payload: bytes, sender: Any) -> None:
    import torch
    import torch.distributed as dist

    stacks = open(os.path.join(folder, f"stacks-{rank}"), "w")  # noqa: SIM115
    faulthandler.dump_traceback_later(limit_s, file=stacks)
    torch.set_num_threads(1)
    os.environ["OMP_WAIT_POLICY"] = "passive"
    # An earlier test's seed_everything() leaves its seed here, and every Trainer of several ranks would start from it.
    os.environ.pop("PL_GLOBAL_SEED", None)
    try:
        from tests.helpers.plans import take_turns_in_process

        take_turns_in_process()  # how long a step takes, from which a plan is chosen, is another in every run
        function, args = pickle.loads(payload)
        # A Trainer in a rank finds the process group there, as under torchrun.
        os.environ.update(
            TORCHELASTIC_RUN_ID="tests", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size), GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
        )  # fmt: skip
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(os.path.join(folder, "store"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        result = function(rank, world_size, *args)
        dist.destroy_process_group()
        sender.send_bytes(pickle.dumps((True, result)))
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, limit_s: float = 120.0) -> list[Any]:
    """What `function(rank, world_size, *args)` returned on every rank, with a gloo process group around it.

    Raises:
        RankFailed: with the traceback of every rank that raised, and the names of those that died or hung.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes, receivers = [], []
        for rank in range(world_size):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            payload = pickle.dumps((function, args))
            process = _CONTEXT.Process(
                target=_run, args=(rank, world_size, folder, limit_s, payload, sender), daemon=True
            )
            process.start()
            sender.close()
            processes.append(process)
            receivers.append(receiver)
        outcomes: list[tuple[bool, Any] | None] = [None]
        try:
            outcomes = _outcomes(receivers, time.monotonic() + limit_s + 3)  # time to write where ranks hang
            stacks = [Path(folder, f"stacks-{rank}") for rank in range(world_size)]
            stuck = [path.read_text() if path.exists() else "" for path in stacks]
        finally:  # also where the test's own time ran out
            for process in processes:
                process.join(5 if None not in outcomes else 0)
                if process.is_alive():
                    process.kill()
                    process.join()
    failures = []
    for rank, outcome in enumerate(outcomes):
        if outcome is None:
            failures.append(f"rank {rank}: no answer within {limit_s:.0f} s\n{stuck[rank]}")
        elif not outcome[0]:
            failures.append(f"rank {rank}:\n{outcome[1]}")
    if failures:
        raise RankFailed("\n".join(failures))
    return [outcome[1] for outcome in outcomes if outcome is not None]


def _outcomes(receivers: list[Any], deadline: float) -> list[tuple[bool, Any] | None]:
    outcomes: list[tuple[bool, Any] | None] = [None] * len(receivers)
    waiting = dict(enumerate(receivers))
    while waiting:
        ready = wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank, receiver in list(waiting.items()):
            if receiver in ready:
                try:
                    outcomes[rank] = pickle.loads(receiver.recv_bytes())
                except EOFError:
                    outcomes[rank] = (False, "the process ended without an answer")
                del waiting[rank]
        if any(outcome is not None and not outcome[0] for outcome in outcomes):
            deadline = min(deadline, time.monotonic() + 10)  # the others may wait for the failed one
    return outcomes

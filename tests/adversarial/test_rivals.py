"""Processes that save to one path, or remove what another saves: each succeeds or says who else was there."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.checkpoint.storage.local import remove
from lightning_superscale.comm.mesh import single_mesh
from lightning_superscale.errors import CheckpointError
from tests.adversarial.disks import Fault, faulty_disk
from tests.helpers.checkpoints import local_state, one_tensor, state_tensors, value_at
from tests.helpers.crashes import in_a_server
from tests.helpers.extent import IS_ALL
from tests.helpers.slow_command import started_slowly

MESH = single_mesh()


def rival(rank: int, _: int, folder: str, rounds: int, can_exchange: bool, roles: str) -> list[str]:
    """Save ("s") or remove ("r") again and again, and tell what was raised."""
    told = []
    torch.manual_seed(rank)
    path = os.path.join(folder, "last.ckpt")
    with faulty_disk(Fault(None, KeyboardInterrupt), can_exchange=can_exchange):
        for number in range(rounds):
            try:
                if roles[rank] == "s":
                    value = float(1000 * rank + number + 1)
                    save(path, one_tensor(value), MESH, step=int(value))
                else:
                    remove(path)
            except CheckpointError as error:
                told.append(f"CheckpointError: {error}")
            except Exception as error:
                told.append(f"{type(error).__name__}: {error}")
    return told


def race(folder: str, rounds: int, can_exchange: bool, roles: str) -> list[list[str]]:
    from tests.helpers import crashes

    # Separate processes, not ranks: each is a world of its own.
    children = [
        crashes._fork(rank, 1, folder, rival, (folder, rounds, can_exchange, roles)) for rank in range(len(roles))
    ]
    return [crashes._answer(pid, pipe) for pid, pipe in children]


@pytest.fixture
def folder(tmp_path):
    place = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    path = place / f"rivals-{os.getpid()}-{time.monotonic_ns()}"
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "links"])
@pytest.mark.parametrize("roles", ["ss", "sr", "ssr"])
def test_rivals_for_one_path_succeed_or_name_one_another(folder, roles, can_exchange):
    answers = in_a_server(race, str(folder), 200 if IS_ALL else 12, can_exchange, roles)
    for told in answers:
        for error in told:
            assert re.search(r"could not take its name.*process \d+ on .* too", error), error
    found = value_at(str(folder / "last.ckpt"))
    assert found is not None or "r" in roles
    with faulty_disk(Fault(None, KeyboardInterrupt), can_exchange=can_exchange):
        save(str(folder / "last.ckpt"), one_tensor(3.0), MESH, step=3)
    assert value_at(str(folder / "last.ckpt")) == 3.0
    assert set(os.listdir(folder)) <= {"last.ckpt", ".ucp-store"}
    assert can_exchange or len(os.listdir(folder / ".ucp-store")) == 1


SIGNALS = [
    (action, number)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    for action in ("convert", "consolidate", "export")
]


@pytest.mark.parametrize(("action", "number"), SIGNALS if IS_ALL else [SIGNALS[0]])
def test_a_signal_at_the_command_line_leaves_nothing_beside(tmp_path, action, number):
    source = tmp_path / "a.ckpt"
    save(str(source), local_state(state_tensors(1)), MESH, step=1)
    command = ["checkpoint", action, str(source), str(tmp_path / "b"), *(["--to", "hf"] if action == "export" else [])]
    process = started_slowly(*command)
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "nothing half-written is left" in err
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == ["a.ckpt"]

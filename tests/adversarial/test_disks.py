"""A fault at any operation of a disk or store leaves the old checkpoint or the new one, and the next save works."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.checkpoint.storage.local import remove
from lightning_superscale.comm.mesh import single_mesh
from lightning_superscale.errors import CheckpointError
from tests.adversarial.disks import KINDS, Fault, faulty_disk
from tests.helpers.checkpoints import one_tensor, value_at
from tests.helpers.crashes import deaths
from tests.helpers.extent import IS_ALL

MESH = single_mesh()
# By name: whether names can be swapped, and whether what is there before was saved where they can.
LOCAL = {
    "exchange": (True, True),
    "a link": (False, False),
    "a folder, then a link": (False, True),
    "nothing": (True, None),
}
URL = "memory://run/last.ckpt"


def put(path: str, value: float) -> None:
    save(path, one_tensor(value), MESH, step=int(value))


def before(folder: Path, first: bool | None) -> str:
    """A new folder, and in it the path of a checkpoint with 1.0; saved as `first` says, or with nothing there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = str(folder / "last.ckpt")
    if first is not None:
        with faulty_disk(Fault(None, KeyboardInterrupt), can_exchange=first):
            put(path, 1.0)
    return path


def survives_everywhere(folder: Path, act, case: str, kind: str, old: float | None, done: float | None) -> None:
    can_exchange, first = LOCAL[case]
    path = before(folder, first)
    counting = Fault(None, KeyboardInterrupt)
    with faulty_disk(counting, can_exchange=can_exchange):
        act(path)
    for at in deaths(counting.count, counting.renames, 1 if IS_ALL else 11):
        path = before(folder, first)
        fault = Fault(at, **KINDS[kind])
        is_told = False
        with faulty_disk(fault, can_exchange=can_exchange):
            try:
                act(path)
            except (CheckpointError, OSError, KeyboardInterrupt):
                is_told = True
        found = value_at(path)
        assert found in (old, done), (at, counting.count, found)
        assert is_told or found == done, (at, found)
        with faulty_disk(Fault(None, KeyboardInterrupt), can_exchange=can_exchange):
            put(path, 3.0)
        assert value_at(path) == 3.0
        assert set(os.listdir(folder)) <= {"last.ckpt", ".ucp-store"}, at
        if os.path.isdir(folder / ".ucp-store"):
            assert len(os.listdir(folder / ".ucp-store")) == (not can_exchange), at


@pytest.fixture
def folder(tmp_path):
    """In memory where there is such a file system, as fsync costs nothing there."""
    place = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    path = place / f"disks-{os.getpid()}-{random.getrandbits(40):x}"
    path.mkdir()
    yield path / "at"
    shutil.rmtree(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", LOCAL)
def test_a_fault_at_any_operation_of_a_save(folder, case, kind):
    old = None if LOCAL[case][1] is None else 1.0
    survives_everywhere(folder, lambda path: put(path, 2.0), case, kind, old, 2.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [case for case in LOCAL if case != "nothing"])
def test_a_fault_at_any_operation_of_a_removal(folder, case, kind):
    survives_everywhere(folder, remove, case, kind, 1.0, None)

"""Processes killed at every write, fsync and rename of a save: afterwards exactly the old or the new state loads."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from lightning_superscale.checkpoint.save.background import BackgroundSaver
from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.checkpoint.storage.local import remove
from lightning_superscale.comm.mesh import single_mesh
from lightning_superscale.errors import CheckpointError
from tests.helpers.checkpoints import mesh_of, one_tensor, value_at
from tests.helpers.crashes import Countdown, deaths, forked, in_a_server
from tests.helpers.extent import IS_ALL


@pytest.fixture
def folder():
    """In memory where there is such a file system: killed processes lose nothing of it, and fsync costs nothing."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as path:
        yield Path(path) / "at"


def save_and_die(rank, world_size, path, value, deadly, dying, can_exchange, is_in_background) -> tuple[int, list[int]]:
    """Save; killed at call `deadly` if this is one of the `dying` ranks. How many calls there were, and the renames."""
    mesh = mesh_of(world_size)
    saver = BackgroundSaver(mesh) if is_in_background else None
    countdown = Countdown(deadly if rank in dying else None)
    countdown.arm(can_exchange)
    state = one_tensor(value, rank, world_size)
    if saver is None:
        save(path, state, mesh, step=int(value))
    else:
        saver.save(path, state, step=int(value))
        saver.wait()
    return countdown.count, countdown.renames


def before(folder: Path, case: str, can_exchange: bool) -> str:
    """A folder in which something is at the path that will be saved to."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = str(folder / "last.ckpt")
    if case == "file":
        torch.save({"state_dict": {}}, folder / "last.ckpt")
    elif case == "ours":
        forked(1, save_and_die, path, 1.0, None, (), can_exchange, False)
    elif case == "folder":  # as if copied here from a file system that can swap names
        save(path, one_tensor(1.0), single_mesh(), step=1)
    return path


def kill_everywhere(folder, case, world_size, dying, can_exchange, is_in_background, stride) -> tuple[int, int, int]:
    """How many times the old state, and the new one, were there after a kill; and how many calls there are."""
    path = before(folder, case, can_exchange)
    how = (can_exchange, is_in_background)
    counts = forked(world_size, save_and_die, path, 2.0, None, dying, *how)
    assert value_at(path) == 2.0, counts
    num_old = num_new = 0
    for deadly in deaths(*counts[dying[0]], stride):
        path = before(folder, case, can_exchange)
        answers = forked(world_size, save_and_die, path, 2.0, deadly, dying, *how)
        for rank, answer in enumerate(answers):
            if rank not in dying:  # told, not left waiting
                assert isinstance(answer, (CheckpointError, tuple)), answer
        found = None if case == "file" and os.path.isfile(path) else value_at(path)
        old = 1.0 if case in ("ours", "folder") else None
        assert found in (old, 2.0), (deadly, found)
        if None in answers:
            num_old, num_new = num_old + (found == old), num_new + (found == 2.0)
        else:
            assert found == 2.0  # nobody was killed
        # The next save works, and leaves nothing of the dead one.
        forked(1, save_and_die, path, 3.0, None, (), can_exchange, False)
        assert value_at(path) == 3.0
        left = {"last.ckpt"} if can_exchange else {"last.ckpt", ".ucp-store"}
        assert set(os.listdir(folder)) == left, (deadly, os.listdir(folder))
        if not can_exchange:
            assert len(os.listdir(folder / ".ucp-store")) == 1
    return num_old, num_new, counts[dying[0]][0]


@pytest.mark.parametrize("is_in_background", [False, True], ids=["sync", "background"])
@pytest.mark.parametrize("case", ["nothing", "file", "ours"])
def test_killed_at_any_call_exactly_the_old_or_the_new_state_is_there(folder, case, is_in_background):
    stride = 1 if IS_ALL else 13 if is_in_background else 4
    num_old, num_new, count = in_a_server(kill_everywhere, folder, case, 1, (0,), True, is_in_background, stride)
    assert num_old >= 20 // stride
    assert num_new >= 1
    assert count >= 20


@pytest.mark.parametrize("case", ["nothing", "file", "ours", "folder"])
def test_the_same_where_names_can_not_be_swapped(folder, case):
    stride = 1 if IS_ALL else 6
    num_old, num_new, _ = in_a_server(kill_everywhere, folder, case, 1, (0,), False, False, stride)
    assert num_old >= 4
    assert num_new >= 1


@pytest.mark.parametrize("dying", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("is_in_background", [False, True], ids=["sync", "background"])
def test_killed_ranks_leave_the_old_or_the_new_state_and_nobody_waiting(folder, dying, is_in_background):
    stride = 1 if IS_ALL else 23
    num_old, _, _ = in_a_server(kill_everywhere, folder, "ours", 2, dying, True, is_in_background, stride)
    assert num_old >= 1


def save_and_remove(rank, world_size, folder, deadly) -> int:
    """What ModelCheckpoint(save_top_k=1) does: save the new one, at once remove the old one."""
    saver = BackgroundSaver(single_mesh())
    countdown = Countdown(deadly)
    countdown.arm()
    saver.save(f"{folder}/b.ckpt", one_tensor(2.0), step=2)
    saver.remove(f"{folder}/a.ckpt")
    saver.close()
    return countdown.count


def kill_while_removing(folder: Path, stride: int) -> list[set]:
    outcomes = []
    count = None
    deadly = 0
    while count is None or deadly <= count:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save(str(folder / "a.ckpt"), one_tensor(1.0), single_mesh(), step=1)
        (answer,) = forked(1, save_and_remove, str(folder), deadly or None)
        count = answer if count is None else count
        found = {value_at(str(folder / name)) for name in ("a.ckpt", "b.ckpt")}
        outcomes.append(found)
        assert found - {None}, deadly
        deadly += 1 if deadly > count - 4 else stride
    return outcomes


def test_killed_in_the_background_with_one_checkpoint_kept_one_is_there(folder):
    outcomes = in_a_server(kill_while_removing, folder, 1 if IS_ALL else 4)
    assert {None, 2.0} in outcomes  # the removal came to pass
    assert {1.0, None} in outcomes  # and waited


def die_while_removing(rank, world_size, path, deadly) -> int:
    countdown = Countdown(deadly)
    countdown.arm()
    remove(path)
    return countdown.count


def kill_removals(folder: Path) -> None:
    folder.mkdir()
    path = str(folder / "a.ckpt")
    save(path, one_tensor(1.0), single_mesh(), step=1)
    (count,) = forked(1, die_while_removing, path, None)
    assert not os.listdir(folder)
    for deadly in range(1, count + 1):
        save(path, one_tensor(1.0), single_mesh(), step=1)
        assert forked(1, die_while_removing, path, deadly) == [None]
        assert value_at(path) in (1.0, None)  # never a part of it
        save(path, one_tensor(3.0), single_mesh(), step=3)
        assert os.listdir(folder) == ["a.ckpt"]
        remove(path)


def test_killed_while_removing_a_checkpoint_is_there_or_gone(folder):
    in_a_server(kill_removals, folder)

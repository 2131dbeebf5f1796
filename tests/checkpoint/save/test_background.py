"""Saves in the background: what the snapshot holds, what waits for what, and where errors surface."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from lightning_superscale.checkpoint.load.reader import open_checkpoint
from lightning_superscale.checkpoint.save import background
from lightning_superscale.checkpoint.save.background import BackgroundSaver
from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.checkpoint.state import LocalShard, LocalState, ReadRequest, TensorInfo, TensorKey
from lightning_superscale.comm.collectives import gather_objects
from lightning_superscale.comm.mesh import single_mesh
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import whole_box
from tests.helpers.checkpoints import assert_filled, local_state, mesh_of, read_requests, state_tensors
from tests.helpers.ranks import run_ranks

WEIGHT, MOMENT = TensorKey("model", "w"), TensorKey("optimizer.0", "w", "exp_avg")


def state_of(weight: torch.Tensor, moment: torch.Tensor, **rest) -> LocalState:
    tensors = {WEIGHT: weight, MOMENT: moment}
    return LocalState(
        {key: TensorInfo(t.dtype, tuple(t.shape), "model") for key, t in tensors.items()},
        {key: (LocalShard(whole_box(t.shape), t),) for key, t in tensors.items()},
        rest=rest,
    )


def loaded(path, key: TensorKey) -> torch.Tensor:
    source = open_checkpoint(str(path))
    out = torch.empty(source.tensors[key].shape)
    source.read([ReadRequest(key, whole_box(out.shape), out)])
    return out


@pytest.fixture
def gate(monkeypatch):
    """Writers wait at it before they write anything."""
    opened = threading.Event()
    write = background.write

    def gated(path, prepared, mesh):
        assert opened.wait(30)
        write(path, prepared, mesh)

    monkeypatch.setattr(background, "write", gated)
    yield opened
    opened.set()


@pytest.fixture
def saver():
    made = BackgroundSaver(single_mesh())
    yield made
    made.close()


def test_what_changes_after_the_call_is_not_in_the_checkpoint(tmp_path, saver, gate):
    weight, moment, best = torch.zeros(5, 3), torch.zeros(5, 3), torch.zeros(2)
    rest = {"best": best, "losses": [1]}
    saver.save(str(tmp_path / "a"), state_of(weight, moment, **rest), step=4)
    assert saver.is_busy
    for tensor in (weight, moment, best):
        tensor.fill_(9)
    rest["losses"].append(2)
    gate.set()
    saver.wait()
    assert not saver.is_busy
    source = open_checkpoint(str(tmp_path / "a"))
    assert not loaded(tmp_path / "a", WEIGHT).any()
    assert not loaded(tmp_path / "a", MOMENT).any()
    assert not source.rest["best"].any()
    assert (source.rest["losses"], source.step) == ([1], 4)


def test_immutable_tensors_are_not_copied_until_they_are_taken_back(tmp_path, gate, monkeypatch):
    saver = BackgroundSaver(single_mesh(), is_immutable=lambda key: key == MOMENT)
    copies = []
    clone = torch.Tensor.clone

    def counted(tensor, **options):
        copies.append(tuple(tensor.shape))
        return clone(tensor, **options)

    monkeypatch.setattr(torch.Tensor, "clone", counted)
    weight, moment = torch.zeros(5, 3), torch.zeros(7, 3)
    saver.save(str(tmp_path / "a"), state_of(weight, moment))
    assert copies == [(5, 3)]
    saver.release()  # the writer has not begun, so it is copied now
    assert copies == [(5, 3), (7, 3)]
    moment.fill_(9)
    gate.set()
    saver.wait()
    assert not loaded(tmp_path / "a", MOMENT).any()
    saver.save(str(tmp_path / "a"), state_of(weight, moment))
    while saver.is_busy:
        pass
    saver.release()  # written already: nothing to copy
    assert copies == [(5, 3), (7, 3), (5, 3)]
    assert bool((loaded(tmp_path / "a", MOMENT) == 9).all())
    saver.close()


def test_taking_back_waits_for_what_is_being_written(tmp_path, monkeypatch):
    from lightning_superscale.checkpoint.format.payload import PayloadWriter

    began, go_on = threading.Event(), threading.Event()
    write_tensor = PayloadWriter.write_tensor

    def slow(self, tensor):
        began.set()
        assert go_on.wait(30)
        write_tensor(self, tensor)

    monkeypatch.setattr(PayloadWriter, "write_tensor", slow)
    saver = BackgroundSaver(single_mesh(), is_immutable=lambda key: True)
    moment = torch.zeros(7, 3)
    saver.save(str(tmp_path / "a"), state_of(torch.zeros(7, 3), moment))
    assert began.wait(30)
    returned = threading.Event()
    taker = threading.Thread(target=lambda: (saver.release(), returned.set()))
    taker.start()
    assert not returned.wait(0.2)
    go_on.set()
    assert returned.wait(30)
    moment.fill_(9)
    taker.join()
    saver.close()
    assert not loaded(tmp_path / "a", MOMENT).any()


def test_one_snapshot_is_in_flight(tmp_path, saver, gate):
    saver.save(str(tmp_path / "a"), state_of(torch.zeros(2), torch.zeros(2)), step=1)
    threading.Timer(0.2, gate.set).start()
    saver.save(str(tmp_path / "a"), state_of(torch.ones(2), torch.ones(2)), step=2)  # waits for the first
    assert open_checkpoint(str(tmp_path / "a")).step in (1, 2)
    saver.wait()
    assert open_checkpoint(str(tmp_path / "a")).step == 2


def test_a_removal_waits_for_the_save_and_is_forgotten_where_that_fails(tmp_path, saver, gate):
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    save(old, state_of(torch.zeros(2), torch.zeros(2)), single_mesh())
    saver.save(new, state_of(torch.zeros(2), torch.zeros(2)))
    saver.remove(old)
    assert os.path.exists(old)
    gate.set()
    saver.wait()
    assert not os.path.exists(old)
    saver.remove(new)  # nothing in flight
    assert not os.path.exists(new)

    gate.clear()
    save(old, state_of(torch.zeros(2), torch.zeros(2)), single_mesh())
    (tmp_path / "a file").touch()
    saver.save(str(tmp_path / "a file" / "new"), state_of(torch.zeros(2), torch.zeros(2)))
    saver.remove(old)
    gate.set()
    with pytest.raises(CheckpointError, match=r"an earlier save failed.*a file.*Not removed: .*old"):
        saver.wait()
    assert os.path.exists(old)


def test_a_removal_that_fails_keeps_no_other_from_being_made_and_is_told_as_what_it_is(tmp_path, saver, gate):
    foreign, old, new = (str(tmp_path / name) for name in ("foreign", "old", "new"))
    os.mkdir(foreign)
    (tmp_path / "foreign" / "thesis.tex").touch()
    save(old, state_of(torch.zeros(2), torch.zeros(2)), single_mesh())
    saver.save(new, state_of(torch.zeros(2), torch.zeros(2)))
    saver.remove(foreign)
    saver.remove(old)
    gate.set()
    with pytest.raises(CheckpointError, match=r"new was saved, and older checkpoints can't be removed: .*foreign"):
        saver.wait()
    assert not os.path.exists(old)
    assert os.listdir(foreign) == ["thesis.tex"]
    open_checkpoint(new)
    saver.wait()


def test_an_error_surfaces_once_at_the_next_call_and_the_next_save_works(tmp_path):
    saver = BackgroundSaver(single_mesh())
    (tmp_path / "file").touch()
    state = state_of(torch.zeros(2), torch.zeros(2))
    bad, good = str(tmp_path / "file" / "a"), str(tmp_path / "b")
    for action in (lambda: saver.save(good, state), saver.wait, saver.close):
        saver.save(bad, state)
        with pytest.raises(CheckpointError, match=r"an earlier save failed.*Not a directory|File exists"):
            action()
        saver.wait()
        saver.save(good, state)
        saver.close()
        assert os.path.exists(good)
    with pytest.raises(CheckpointError, match="rest/x"):  # what can't be saved is said at once
        saver.save(good, state_of(torch.zeros(2), torch.zeros(2), x=object()))
    saver.close()


def fail_to_copy(rank: int, world_size: int, folder: str) -> str:
    saver = BackgroundSaver(mesh_of(world_size))
    clone = torch.Tensor.clone

    def broken(tensor, **options):
        raise MemoryError("no memory left")

    torch.Tensor.clone = broken if rank == 1 else clone
    tensors = state_tensors(1, scale=2000)
    with pytest.raises(CheckpointError) as error:
        saver.save(f"{folder}/a.ckpt", local_state(tensors, "rows", rank, world_size))
    torch.Tensor.clone = clone
    saver.save(f"{folder}/a.ckpt", local_state(state_tensors(2), "rows", rank, world_size), step=2)
    saver.close()
    assert open_checkpoint(f"{folder}/a.ckpt").step == 2
    return str(error.value)


def test_a_rank_that_can_not_copy_fails_the_snapshot_of_all(tmp_path):
    for told in run_ranks(2, fail_to_copy, str(tmp_path)):
        assert "the snapshot failed: rank 1 " in told
        assert "no memory left" in told


def train_and_save(rank: int, world_size: int, folder: str) -> int:
    """Collectives of training between those of the writer; a failure of one rank; bytes that were copied."""
    mesh = mesh_of(world_size)
    saver = BackgroundSaver(mesh)
    copied = 0
    clone = torch.Tensor.clone

    def counted(tensor, **options):
        nonlocal copied
        copied += tensor.nbytes
        return clone(tensor, **options)

    for step in range(4):
        tensors = state_tensors(step, scale=40)
        torch.Tensor.clone = counted if step == 0 else clone
        saver.save(f"{folder}/{step % 2}.ckpt", local_state(tensors, "whole", rank, world_size), step=step)
        for tensor in tensors.values():
            tensor.zero_()
        for i in range(50):
            assert gather_objects(mesh, (rank, i)) == [(r, i) for r in range(world_size)]
    (saver.wait if rank else saver.close)()
    for step in (2, 3):
        source = open_checkpoint(f"{folder}/{step % 2}.ckpt", mesh)
        assert source.step == step
        requests = read_requests(source.tensors, "rows", rank, world_size)
        source.read(requests)
        assert_filled(requests, state_tensors(step, scale=40))
    fsync = os.fsync

    def broken(descriptor):
        raise OSError(5, "Input/output error")

    os.fsync = broken if rank == 1 else fsync
    saver.save(f"{folder}/0.ckpt", local_state(state_tensors(7), "whole", rank, world_size))
    with pytest.raises(CheckpointError, match="rank 1 .*Input/output error"):
        saver.save(f"{folder}/0.ckpt", local_state(state_tensors(7), "whole", rank, world_size))
    os.fsync = fsync
    assert open_checkpoint(f"{folder}/0.ckpt", mesh).step == 2
    saver.close()
    return copied


def fail_at_different_times(rank: int, world_size: int, folder: str) -> list[tuple[int, str]]:
    """The step at which each of a few saves fails, and what is said; rank 0 knows a while after rank 1."""
    mesh = mesh_of(world_size)
    saver = BackgroundSaver(mesh)
    write, fsync, heard = background.write, os.fsync, []

    def late(path, prepared, group):
        try:
            write(path, prepared, group)
        finally:
            time.sleep(0.3 if rank == 0 else 0)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    background.write = late
    for is_full in (True, False, True):
        os.fsync = full if rank == 1 and is_full else fsync
        saver.save(f"{folder}/a.ckpt", local_state(state_tensors(1), "whole", rank, world_size), step=len(heard))
        step = 0
        while saver._thread is not None:
            try:
                saver.raise_if_failed(mesh)
            except CheckpointError as error:
                heard.append((step, str(error)))
            step += 1
            time.sleep(0.01)
        os.fsync = fsync
        sent = mesh.counts.calls.get("control", 0)
        for _ in range(5):  # nothing is in flight: nothing is sent
            saver.raise_if_failed(mesh)
        assert mesh.counts.calls["control"] == sent
    saver.close()
    return heard


def test_ranks_hear_of_a_failed_save_at_the_same_step(tmp_path):
    first, second = run_ranks(2, fail_at_different_times, str(tmp_path))
    assert first == second
    assert len(first) == 2
    assert all("rank 1 " in said and "No space left on device" in said for _, said in first)
    assert open_checkpoint(str(tmp_path / "a.ckpt")).step == 1


def test_ranks_save_while_they_train_and_each_copies_only_what_it_writes(tmp_path):
    copied = run_ranks(2, train_and_save, str(tmp_path))
    total = sum(tensor.nbytes for tensor in state_tensors(0, scale=40).values())
    assert total <= sum(copied) <= total + 1024  # and the tensors in `rest`
    assert max(copied) < 0.8 * total
    assert sorted(os.listdir(tmp_path)) == ["0.ckpt", "1.ckpt"]


class FailedWatch:
    """Says that another rank failed, as the watch does of a rank that is stopped."""

    has_failed = True
    silence_s = 0.5


def close_while_a_rank_is_stopped(rank: int, world_size: int, folder: str) -> tuple[str, float]:
    """What closing the saver said on rank 0, and after how many seconds; rank 1 stops before it writes."""
    mesh = mesh_of(world_size)
    saver = BackgroundSaver(mesh)
    write, start = background.write, time.monotonic()

    def stopped(path, prepared, group):
        time.sleep(4.0 if rank == 1 else 0.0)
        write(path, prepared, group)

    background.write = stopped
    saver.save(f"{folder}/a.ckpt", local_state(state_tensors(1), "whole", rank, world_size), step=1)
    thread, said = saver._thread, ""
    if rank == 0:
        saver._watch = FailedWatch()
        try:
            saver.close()
        except CheckpointError as error:
            said = str(error)
    seconds = time.monotonic() - start
    thread.join()  # rank 1 goes on, so that nothing is left behind
    return said, seconds


def test_a_save_that_a_stopped_rank_keeps_from_ending_is_given_up(tmp_path):
    said, seconds = run_ranks(2, close_while_a_rank_is_stopped, str(tmp_path))[0]
    assert said == "ranks that write it did not come back after a rank had failed."
    assert 0.5 <= seconds < 3.5

"""Saving and loading over real ranks: any layout into any other, each byte once, and errors that all ranks raise."""

from __future__ import annotations

import os
import random
import re
import threading
from pathlib import Path

import pytest
import torch

from lightning_superscale.checkpoint.load import exchange, segments
from lightning_superscale.checkpoint.load.reader import open_checkpoint
from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.checkpoint.state import LocalShard, LocalState, ReadRequest, TensorInfo, TensorKey
from lightning_superscale.checkpoint.storage import files
from lightning_superscale.comm.shared_memory import map_host_memory
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import whole_box
from tests.helpers.checkpoints import LAYOUTS, assert_filled, local_state, mesh_of, read_requests, state_tensors
from tests.helpers.extent import IS_ALL
from tests.helpers.ranks import run_ranks

WORLDS = (1, 2, 3, 4) if IS_ALL else (1, 2, 4)


def save_all(rank: int, world_size: int, folder: str) -> None:
    mesh = mesh_of(world_size)
    for seed, layout in enumerate(LAYOUTS):
        state = local_state(state_tensors(seed), layout, rank, world_size, {"world": world_size} if rank == 0 else {})
        save(f"{folder}/{world_size}-{layout}.ckpt", state, mesh, step=world_size)


def map_or_send(is_mapped: bool) -> None:
    """Ranks of one host look into one another's memory, or send as they do between hosts."""
    exchange.map_host_memory = map_host_memory if is_mapped else lambda mesh, nbytes: None


def load_all(rank: int, world_size: int, folder: str) -> None:
    mesh = mesh_of(world_size)
    for writers in WORLDS:
        for seed, layout in enumerate(LAYOUTS):
            map_or_send((writers + seed) % 2 == 0)
            source = open_checkpoint(f"{folder}/{writers}-{layout}.ckpt", mesh)
            assert (source.step, source.rest, source.manifest.world) == (writers, {"world": writers}, writers)
            targets = LAYOUTS if IS_ALL else random.Random(f"{writers} {seed} {world_size}").sample(LAYOUTS, 1)
            for target in targets:
                requests = read_requests(source.tensors, target, rank, world_size)
                source.read(requests)
                assert_filled(requests, state_tensors(seed))
            source.close()


def test_any_layout_on_any_number_of_ranks_is_read_as_any_other_on_any_number(tmp_path):
    for world_size in WORLDS:
        run_ranks(world_size, save_all, str(tmp_path))
    assert len(os.listdir(tmp_path)) == len(WORLDS) * len(LAYOUTS)  # and no staging folder
    for world_size in WORLDS:
        run_ranks(world_size, load_all, str(tmp_path))


def big_tensors() -> dict[TensorKey, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        TensorKey("model", "tall"): torch.randn(3000, 1500, generator=generator),
        TensorKey("model", "wide"): torch.randn(7, 400_000, generator=generator),
        TensorKey("optimizer.0", "tall", "exp_avg"): torch.randn(3000, 1500, generator=generator),
    }


def read_once(rank: int, world_size: int, folder: str, is_mapped: bool) -> dict[str, list[int]]:
    """Bytes read by each way of reading: to fill, to check, and those sent to others."""
    segments.ROUND_BYTES = 3 * 2**23  # several rounds
    map_or_send(is_mapped)
    mesh = mesh_of(world_size)
    tensors = big_tensors()
    state = local_state(tensors, "whole", rank, world_size)
    save(f"{folder}/big.ckpt", state, mesh)
    read = {}
    for layout in LAYOUTS:
        for check_first in (True, False):
            source = open_checkpoint(f"{folder}/big.ckpt", mesh, check_first=check_first)
            requests = read_requests(source.tensors, layout, rank, world_size)
            mesh.counts.clear()
            source.read(requests)
            assert_filled(requests, tensors)
            sent = mesh.counts.nbytes.get("exchange", 0)
            read[f"{layout} {check_first}"] = [source.bytes_read, source.bytes_checked, sent]
    assert len(source.manifest.files) == 2 * world_size + 1  # replicas were divided between all ranks
    return read


@pytest.mark.parametrize("is_mapped", [True, False], ids=["mapped", "sent"])
@pytest.mark.parametrize("world_size", [2, 4] if IS_ALL else [3])
def test_each_byte_is_read_once_by_all_ranks_together(tmp_path, world_size, is_mapped):
    needed = sum(tensor.nbytes for tensor in big_tensors().values())
    answers = run_ranks(world_size, read_once, str(tmp_path), is_mapped)
    for way in answers[0]:
        total, checked, sent = (sum(answer[way][i] for answer in answers) for i in (0, 1, 2))
        assert needed <= total <= 1.05 * needed, way
        assert checked == (total if way.endswith("True") else 0)
        assert max(answer[way][0] for answer in answers) < 1.3 * needed / world_size + 2**24
        if is_mapped:
            assert sent == 0, way
            continue
        # What ranks want alike goes to each other one, of what they divide each part to one at most.
        is_divided = way.startswith(("rows", "columns", "flat"))
        assert sent <= (1.001 * needed if is_divided else (world_size - 1) * total), way
        assert sent > 0.4 * needed or not way.startswith("columns")


def one_tensor(rank: int, world_size: int, value: float, rows: int = 8) -> LocalState:
    key = TensorKey("model", "w")
    tensor = torch.full((rows, 4), value)
    return LocalState(
        {key: TensorInfo(torch.float32, (rows, 4), "model")},
        {key: (LocalShard(whole_box((rows, 4)), tensor),)},
        rest={"value": value},
    )


def message_of(action) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""


def value_at(path: str, mesh) -> float:
    source = open_checkpoint(path, mesh)
    out = torch.empty(8, 4)
    source.read([ReadRequest(TensorKey("model", "w"), whole_box((8, 4)), out)])
    assert bool((out == out[0, 0]).all())
    assert source.rest["value"] == out[0, 0].item()
    return out[0, 0].item()


def failing_ranks(rank: int, world_size: int, folder: str) -> list[str]:
    """What each rank is told when one fails, for several failures; the old checkpoint loads after each."""
    mesh = mesh_of(world_size)
    path = f"{folder}/last.ckpt"
    save(path, one_tensor(rank, world_size, 1.0), mesh)
    told = []

    def attempt(state: LocalState, at: str = path) -> None:
        told.append(message_of(lambda: save(at, state, mesh)))
        assert value_at(path, mesh) == 1.0
        assert not [name for name in os.listdir(folder) if name.startswith(".ucp")]

    write = os.write

    def full(descriptor: int, data: memoryview) -> int:
        if len(data) > 300:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    big = {
        key: (LocalShard(whole_box((8, 4096)), torch.ones(8, 4096)),)
        for key in (TensorKey("model", f"w{i}") for i in range(20 * world_size))
    }
    infos = {key: TensorInfo(torch.float32, (8, 4096), "model") for key in big}
    os.write = full if rank == 1 else write
    attempt(LocalState(infos, big))
    os.write = write
    attempt(LocalState({}, {}, rest={"mine": object()} if rank == 0 else {}))
    attempt(one_tensor(rank, world_size, 2.0, rows=8 + rank))
    home = Path(folder, "home")
    home.mkdir(exist_ok=True)
    (home / "thesis").write_text("years of work")
    attempt(one_tensor(rank, world_size, 2.0), str(home))
    assert (home / "thesis").read_text() == "years of work"
    if rank == 1:
        Path(folder, "elsewhere").mkdir()
        from lightning_superscale.checkpoint.storage import local

        local._VISIBLE_WITHIN_S = 0.2
    attempt(one_tensor(rank, world_size, 2.0), path if rank != 1 else f"{folder}/elsewhere/last.ckpt")
    # A rank that can't read what others wait for.
    read_into = files.LocalFolder.read_into

    def broken(self, name, start, *outs):
        if name.startswith("data") and rank == 1:
            raise CheckpointError("the disk is gone")
        read_into(self, name, start, *outs)

    tensors = big_tensors()
    save(f"{folder}/big.ckpt", local_state(tensors, "rows", rank, world_size), mesh)
    files.LocalFolder.read_into = broken
    for check_first, is_mapped in ((True, True), (False, True), (False, False)):
        map_or_send(is_mapped)
        source = open_checkpoint(f"{folder}/big.ckpt", mesh, check_first=check_first)
        told.append(message_of(lambda: source.read(read_requests(source.tensors, "whole", rank, world_size))))  # noqa: B023
    files.LocalFolder.read_into = read_into
    told.append(message_of(lambda: open_checkpoint(f"{folder}/{'big' if rank else 'last'}.ckpt", mesh)))
    assert value_at(path, mesh) == 1.0
    assert threading.active_count() < 10
    return told


def test_a_failure_of_one_rank_is_raised_on_all_and_leaves_the_old_checkpoint(tmp_path):
    answers = run_ranks(2, failing_ranks, str(tmp_path))
    # Told alike, but for the path that each was called with.
    reasons = [[text.split(": ", 1)[1] for text in told] for told in answers]
    assert reasons[0] == reasons[1]
    expected = [
        r"rank 1 .*No space left on device",
        r"rank 0 .*rest/mine",
        r"model: w is .*\(8, 4\).* on rank 0 and .*\(9, 4\).* on rank 1",
        r"rank 0 .*home is a folder that is no checkpoint .*so it is not replaced",
        r"rank 1 .*elsewhere.* is not the same folder",
        r"rank 1 .*the disk is gone",
        r"rank 1 .*the disk is gone",
        r"rank 1 .*the disk is gone",
        r"different checkpoints",
    ]
    for told, pattern in zip(reasons[0], expected, strict=True):
        assert re.search(pattern, told), (pattern, told)

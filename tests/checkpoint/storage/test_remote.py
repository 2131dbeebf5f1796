"""Checkpoints behind fsspec: object stores know no rename, so the manifest is what publishes."""

from __future__ import annotations

import os

import pytest

from lightning_superscale.checkpoint.load.reader import is_checkpoint, open_checkpoint
from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.checkpoint.storage import remote
from lightning_superscale.checkpoint.storage.local import remove
from lightning_superscale.checkpoint.tools.verify import verify
from lightning_superscale.comm.mesh import single_mesh
from lightning_superscale.errors import CheckpointError
from tests.helpers.checkpoints import assert_filled, local_state, mesh_of, read_requests, state_tensors
from tests.helpers.ranks import run_ranks

MESH = single_mesh()


def files_of(url: str) -> list[str]:
    filesystem, path = remote.remote_filesystem(url)
    return sorted(filesystem.find(path))


def check(url: str, seed: int) -> None:
    source = open_checkpoint(url)
    requests = read_requests(source.tensors, "boxes")
    source.read(requests)
    assert_filled(requests, state_tensors(seed))
    assert source.step == seed
    assert source.rest["epoch"] == 3
    assert verify(url) == []


def test_a_state_comes_back_from_a_store(url):
    assert not is_checkpoint(url)
    for seed in (1, 2):
        save(url, local_state(state_tensors(seed)), MESH, step=seed)
        assert is_checkpoint(url)
        check(url, seed)
    assert len(files_of(url)) == 4  # nothing of the first one
    remove(url)
    assert not is_checkpoint(url)
    assert files_of(url) == []
    remove(url)


def test_until_the_manifest_is_written_the_old_checkpoint_loads(url, monkeypatch):
    save(url, local_state(state_tensors(1)), MESH, step=1)
    publish = remote.RemoteTarget.publish

    def late(self, manifest):
        check(url, 1)  # all files of the new one are there
        assert len(files_of(url)) == 8  # and a note that says who writes it
        raise OSError("the store is gone")

    monkeypatch.setattr(remote.RemoteTarget, "publish", late)
    with pytest.raises(CheckpointError, match="the store is gone"):
        save(url, local_state(state_tensors(2)), MESH, step=2)
    check(url, 1)
    assert len(files_of(url)) == 4  # the failed one was cleaned up

    def died(self, manifest):
        raise KeyboardInterrupt

    monkeypatch.setattr(remote.RemoteTarget, "publish", died)
    monkeypatch.setattr(remote.RemoteTarget, "abort", lambda self: None)
    with pytest.raises(KeyboardInterrupt):
        save(url, local_state(state_tensors(2)), MESH, step=2)
    assert len(files_of(url)) == 8
    remote._LIVE.clear()  # as if the process had died
    monkeypatch.setattr(remote.RemoteTarget, "publish", publish)
    save(url, local_state(state_tensors(3)), MESH, step=3)
    check(url, 3)
    assert len(files_of(url)) == 4  # those of the one that died went too


def test_damage_in_a_store_is_found(url):
    save(url, local_state(state_tensors(1)), MESH, step=1)
    filesystem, _ = remote.remote_filesystem(url)
    name = next(name for name in files_of(url) if name.endswith(".safetensors"))
    data = bytearray(filesystem.cat_file(name))
    data[-1] ^= 1
    filesystem.pipe_file(name, bytes(data))
    source = open_checkpoint(url)
    with pytest.raises(CheckpointError, match="is damaged in block 0"):
        source.read(read_requests(source.tensors))
    filesystem.pipe_file(name, bytes(data[:-1]))
    with pytest.raises(CheckpointError, match=r"w00000-0.safetensors has \d+ bytes"):
        open_checkpoint(url)
    filesystem.rm_file(name)
    with pytest.raises(CheckpointError, match=r"w00000-0.safetensors is missing"):
        open_checkpoint(url)


def test_a_store_that_nobody_knows_is_an_error_that_says_so():
    with pytest.raises(CheckpointError, match="nowhere://a can't be reached"):
        open_checkpoint("nowhere://a")


def save_and_load(rank: int, world_size: int, url: str) -> None:
    mesh = mesh_of(world_size)
    for seed in (1, 2):
        save(url, local_state(state_tensors(seed), "rows", rank, world_size), mesh, step=seed)
        source = open_checkpoint(url, mesh)
        requests = read_requests(source.tensors, "columns", rank, world_size)
        source.read(requests)
        assert_filled(requests, state_tensors(seed))
        assert source.bytes_checked == 0  # a store is not read twice


def test_ranks_share_a_store(tmp_path):
    run_ranks(2, save_and_load, f"local://{tmp_path}/a.ckpt")
    assert len(os.listdir(tmp_path / "a.ckpt")) == 2

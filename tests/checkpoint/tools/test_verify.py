"""Damage of any kind is named, by `verify` and by loading, and loading changes nothing before it."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from lightning_superscale.checkpoint.format.blocks import BLOCK_BYTES
from lightning_superscale.checkpoint.load.reader import open_checkpoint
from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.checkpoint.state import TensorKey
from lightning_superscale.checkpoint.tools.verify import verify
from lightning_superscale.comm.mesh import single_mesh
from lightning_superscale.errors import CheckpointError
from tests.helpers.checkpoints import local_state, mesh_of, read_requests
from tests.helpers.ranks import run_ranks

DATA = "data/w00000-0.safetensors"
TENSORS = {
    TensorKey("model", "a"): torch.randn(600, 1024),
    TensorKey("model", "b"): torch.randn(700, 1024),
    TensorKey("optimizer.0", "a", "exp_avg"): torch.randn(600, 1024),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "a.ckpt"
    save(str(path), local_state(TENSORS), single_mesh(), step=1)
    return path


@pytest.fixture
def path(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def flip(file, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def refused(path, message: str) -> None:
    """Loading everything is refused, with this message and with nothing changed."""
    requests = read_requests(local_state(TENSORS).tensors)

    def load() -> None:
        source = open_checkpoint(str(path))
        _ = source.rest
        source.read(requests)

    with pytest.raises(CheckpointError, match=message):
        load()
    assert all(bool((request.out == 77).all()) for request in requests)


def test_a_whole_checkpoint_has_no_findings_and_progress_ends_at_its_size(whole):
    seen = []
    assert verify(str(whole), lambda done, total: seen.append((done, total))) == []
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    sizes = sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(whole) for name in names)
    assert seen[-1][1] == sizes - os.path.getsize(whole / "MANIFEST.json")


def test_a_flipped_byte_in_any_block_names_the_block_and_its_tensors(path):
    file = path / DATA
    size = file.stat().st_size
    for block in range(-(-size // BLOCK_BYTES)):
        at = min(size - 1, block * BLOCK_BYTES + 12345)
        flip(file, at)
        (finding,) = verify(str(path))
        assert (finding.file, finding.block) == (DATA, block)
        name = next(word for word in ("model: a", "model: b", "optimizer.0: a [exp_avg]") if word in finding.holds)
        refused(path, rf"{DATA} is damaged in block {block} .*{name.replace('[', '.').replace(']', '.')}")
        flip(file, at)
    assert verify(str(path)) == []


@pytest.mark.parametrize(
    ("name", "at"), [("MANIFEST.json", 40), ("rest.json", 3), (DATA, 4), (DATA, 100), ("blocks/w00000-0.xxh", 9)]
)
def test_a_flipped_byte_in_any_other_file_names_the_file(path, name, at):
    flip(path / name, at)
    (finding,) = verify(str(path))
    assert finding.file == name
    refused(path, name)


def test_bytes_beyond_what_is_wanted_are_not_asked_for(path):
    flip(path / DATA, (path / DATA).stat().st_size - 1)
    source = open_checkpoint(str(path))
    requests = read_requests({key: info for key, info in source.tensors.items() if key.name == "b"})
    source.read(requests)
    assert torch.equal(requests[0].out, TENSORS[TensorKey("model", "b")])


@pytest.mark.parametrize("name", ["rest.json", DATA, "blocks/w00000-0.xxh", "MANIFEST.json"])
@pytest.mark.parametrize("how", ["deleted", "truncated", "longer", "empty", "folder"])
def test_files_that_lack_or_changed_size_are_refused_at_once(path, name, how):
    file = path / name
    data = file.read_bytes()
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how != "deleted":
        file.write_bytes({"truncated": data[:-1], "longer": data + b"\0", "empty": b""}[how])
    findings = verify(str(path))
    assert findings
    assert findings[0].file == name
    if name != "MANIFEST.json":
        with pytest.raises(CheckpointError, match=name):
            open_checkpoint(str(path))
    refused(path, name)


def test_files_of_another_checkpoint_are_refused(path, tmp_path):
    save(str(tmp_path / "b.ckpt"), local_state({key: t + 1 for key, t in TENSORS.items()}), single_mesh())
    for name in (DATA, "blocks/w00000-0.xxh", "rest.json"):
        shutil.copy(path / name, tmp_path / "kept")
        shutil.copy(tmp_path / "b.ckpt" / name, path / name)
        if (path / name).read_bytes() != (tmp_path / "kept").read_bytes():
            assert [finding.file for finding in verify(str(path))][-1] == name
            refused(path, name)
        shutil.copy(tmp_path / "kept", path / name)
    shutil.copy(tmp_path / "b.ckpt" / "MANIFEST.json", path / "MANIFEST.json")
    assert {finding.file for finding in verify(str(path))} >= {DATA, "blocks/w00000-0.xxh"}
    refused(path, "damaged")


def test_files_that_nobody_listed_are_found(path):
    (path / "data" / "w00001-0.safetensors").write_bytes(b"")
    assert [str(finding) for finding in verify(str(path))] == [
        "data/w00001-0.safetensors: is not listed in the manifest"
    ]


def test_no_checkpoint_at_all_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        verify(str(tmp_path / "none"))


def load_damaged(rank: int, world_size: int, path: str) -> tuple[str, bool]:
    """Every rank wants everything; what it is told, and whether nothing changed."""
    mesh = mesh_of(world_size)
    source = open_checkpoint(path, mesh)
    requests = read_requests(source.tensors, "whole" if rank != 1 else "rows", rank, world_size)
    try:
        source.read(requests)
    except CheckpointError as error:
        return str(error), all(bool((request.out == 77).all()) for request in requests)
    return "", False


def test_damage_that_one_rank_finds_is_told_to_all_before_anything_changes(path):
    flip(path / DATA, 3 * BLOCK_BYTES)
    answers = run_ranks(3, load_damaged, str(path))
    assert len(set(answers)) == 1
    assert "is damaged in block 3" in answers[0][0]
    assert answers[0][1]

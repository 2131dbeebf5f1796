"""Saving and loading in one process: bits, partial reads, what is refused, and what lies on disk."""

import importlib.metadata
import json
import os

import pytest
import torch
from safetensors.torch import load_file

import lightning_superscale
from lightning_superscale.checkpoint.format.manifest import MANIFEST_NAME
from lightning_superscale.checkpoint.load.reader import is_checkpoint, open_checkpoint
from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.checkpoint.state import LocalShard, LocalState, ReadRequest, TensorInfo, TensorKey
from lightning_superscale.comm.mesh import single_mesh
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import Box, whole_box
from tests.helpers.checkpoints import assert_filled, local_state, read_requests, state_tensors

MESH = single_mesh()


def simple(**tensors: torch.Tensor) -> LocalState:
    keys = {TensorKey("model", name): tensor for name, tensor in tensors.items()}
    return LocalState(
        {key: TensorInfo(t.dtype, tuple(t.shape), "model") for key, t in keys.items()},
        {key: (LocalShard(whole_box(t.shape), t),) for key, t in keys.items()},
    )


def test_a_state_comes_back_bit_for_bit(tmp_path):
    tensors = state_tensors(1)
    save(str(tmp_path / "a.ckpt"), local_state(tensors), MESH, step=11)
    assert os.listdir(tmp_path) == ["a.ckpt"]
    source = open_checkpoint(str(tmp_path / "a.ckpt"))
    state = local_state(tensors)
    assert (source.step, dict(source.aliases), dict(source.tensors)) == (11, state.aliases, state.tensors)
    for layout in ("whole", "boxes"):
        requests = read_requests(source.tensors, layout)
        source.read(requests)
        assert_filled(requests, tensors)
    record, expected = source.optimizers[0], state.optimizers[0]
    assert (record.class_name, record.names, record.values) == ("AdamW", expected.names, expected.values)
    assert record.groups[0] == expected.groups[0]
    assert isinstance(record.groups[1]["lr"], torch.Tensor)
    assert record.groups[1]["lr"] == 0.5
    assert torch.equal(source.rest.pop("best"), torch.tensor([1.0, 2.0]))
    assert source.rest == {"epoch": 3, "loops": {"a": (1, 2)}}
    source.close()


def test_a_checkout_that_is_only_on_the_path_saves(tmp_path, monkeypatch):
    known = importlib.metadata.version

    def version(name):
        if name == "lightning-superscale":  # nothing is installed there, so the package has no metadata
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    save(str(tmp_path / "a.ckpt"), simple(w=torch.ones(2)), MESH)
    libs = json.loads((tmp_path / "a.ckpt" / MANIFEST_NAME).read_text())["libs"]
    assert (libs["lightning-superscale"], libs["torch"]) == (lightning_superscale.__version__, known("torch"))


def test_any_safetensors_program_reads_the_data(tmp_path):
    save(str(tmp_path / "a.ckpt"), simple(w=torch.arange(6.0).view(2, 3)), MESH)
    found = load_file(tmp_path / "a.ckpt" / "data" / "w00000-0.safetensors")
    assert torch.equal(found["model/w#0"], torch.arange(6.0).view(2, 3))


def test_a_part_is_read_into_memory_of_any_strides_and_dtype(tmp_path):
    weight = torch.randn(50, 40)
    save(str(tmp_path / "a"), simple(w=weight), MESH)
    source = open_checkpoint(str(tmp_path / "a"))
    key, box = TensorKey("model", "w"), Box((3, 5), (20, 30))
    turned, double, half = torch.empty(30, 20).t(), torch.empty(20, 30, dtype=torch.float64), torch.empty(20, 30).half()
    source.read([ReadRequest(key, box, out) for out in (turned, double, half)])
    assert torch.equal(turned, weight[3:23, 5:35])
    assert torch.equal(double, weight[3:23, 5:35].double())
    assert torch.equal(half, weight[3:23, 5:35].half())


@pytest.mark.parametrize("check_first", [True, False])
def test_only_the_blocks_that_are_wanted_are_read(tmp_path, check_first):
    weight = torch.randn(64, 2**17)  # 512 KiB a row, 32 MiB in all
    save(str(tmp_path / "a"), simple(a=weight, b=weight + 1), MESH)
    source = open_checkpoint(str(tmp_path / "a"), check_first=check_first)
    out = torch.empty(4, 2**17)
    source.read([ReadRequest(TensorKey("model", "b"), Box((10, 0), (4, 2**17)), out)])
    assert torch.equal(out, weight[10:14] + 1)
    assert source.bytes_read <= out.nbytes + 2 * 2**20
    assert source.bytes_checked == (source.bytes_read if check_first else 0)
    # Columns of rows that are longer than a block.
    tall = torch.randn(6, 2**20)
    save(str(tmp_path / "b"), simple(w=tall), MESH)
    source, out = open_checkpoint(str(tmp_path / "b")), torch.empty(6, 100)
    source.read([ReadRequest(TensorKey("model", "w"), Box((0, 5000), (6, 100)), out)])
    assert torch.equal(out, tall[:, 5000:5100])
    assert source.bytes_read <= 6 * 2 * 2**20


def test_large_tensors_come_back_over_several_files_and_threads(tmp_path):
    tensors = {f"w{i}": torch.randn(2048, 2048 + i) for i in range(10)}
    save(str(tmp_path / "a"), simple(**tensors), MESH)
    assert len(os.listdir(tmp_path / "a" / "data")) == 2
    source = open_checkpoint(str(tmp_path / "a"))
    requests = read_requests(source.tensors)
    source.read(requests)
    assert_filled(requests, {TensorKey("model", name): t for name, t in tensors.items()})
    needed = sum(t.nbytes for t in tensors.values())
    assert needed < source.bytes_read < 1.01 * needed


def test_what_does_not_fit_a_request_is_refused_before_anything_is_read(tmp_path):
    save(str(tmp_path / "a"), simple(w=torch.ones(3, 3)), MESH)
    source = open_checkpoint(str(tmp_path / "a"))
    good = ReadRequest(TensorKey("model", "w"), Box((0, 0), (3, 3)), torch.zeros(3, 3))
    for key, box, shape, message in [
        ("v", Box((0, 0), (3, 3)), (3, 3), "model: v is not in"),
        ("w", Box((0, 1), (3, 3)), (3, 3), "model: w has shape"),
        ("w", Box((0, 0), (3, 3)), (3, 2), r"to fill a tensor of shape \(3, 2\)"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            source.read([good, ReadRequest(TensorKey("model", key), box, torch.zeros(shape))])
        assert not good.out.any()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (simple(w=torch.ones(2, dtype=torch.complex128)), "model: w has dtype torch.complex128"),
        (LocalState({TensorKey("model", "w"): TensorInfo(torch.float32, (2,), "model")}, {}), "0 of the 2 elements"),
        (
            LocalState(
                {TensorKey("model", "w"): TensorInfo(torch.float32, (2,), "model")},
                {TensorKey("model", "w"): (LocalShard(Box((0,), (2,)), torch.ones(2).half()),)},
            ),
            "model: w.*float16",
        ),
        (simple(w=torch.ones(2).to_sparse()), "model: w: a plain dense tensor was expected"),
        (LocalState({}, {}, rest={"callbacks": {"mine": object()}}), "rest/callbacks/mine"),
        (LocalState({}, {}, rest={"t": torch.ones(2, dtype=torch.complex128)}), "extra: rest/t has dtype"),
    ],
)
def test_what_can_not_be_saved_is_refused_and_leaves_nothing(tmp_path, state, message):
    with pytest.raises(CheckpointError, match=message):
        save(str(tmp_path / "a"), state, MESH)
    assert os.listdir(tmp_path) == []


def test_a_closed_checkpoint_says_so(tmp_path):
    save(str(tmp_path / "a"), simple(w=torch.ones(2)), MESH)
    source = open_checkpoint(str(tmp_path / "a"))
    source.close()
    for use in (lambda: source.read(read_requests(source.tensors)), lambda: source.rest):
        with pytest.raises(CheckpointError, match="was closed"):
            use()


def test_what_is_no_checkpoint_is_told_apart(tmp_path):
    save(str(tmp_path / "a"), simple(w=torch.ones(1)), MESH)
    (tmp_path / "file.ckpt").write_bytes(b"x")
    assert is_checkpoint(str(tmp_path / "a"))
    assert is_checkpoint(f"file://{tmp_path}/a")
    for name in ("", "file.ckpt", "none"):
        assert not is_checkpoint(str(tmp_path / name))
        with pytest.raises(CheckpointError, match="can't be loaded"):
            open_checkpoint(str(tmp_path / name))


def test_an_open_checkpoint_is_never_mixed_with_the_one_that_replaced_it(tmp_path):
    path = str(tmp_path / "a")
    save(path, simple(w=torch.zeros(4)), MESH)
    source = open_checkpoint(path)
    save(path, simple(w=torch.ones(4)), MESH)
    out = torch.full((4,), 5.0)
    with pytest.raises(CheckpointError, match="can't be read"):
        source.read([ReadRequest(TensorKey("model", "w"), Box((0,), (4,)), out)])
    assert torch.equal(out, torch.full((4,), 5.0))


def test_memory_beside_the_destination_is_bounded(tmp_path, monkeypatch):
    import lightning_superscale.checkpoint.load.scatter as filling

    sizes = []
    empty = torch.empty

    def counted(*args, **kwargs):
        made = empty(*args, **kwargs)
        sizes.append(made.nbytes)
        return made

    save(str(tmp_path / "a"), simple(w=torch.randn(4096, 4096)), MESH)  # 64 MiB
    source = open_checkpoint(str(tmp_path / "a"))
    out = torch.empty(4096, 4096)
    monkeypatch.setattr(filling.torch, "empty", counted)
    source.read([ReadRequest(TensorKey("model", "w"), whole_box((4096, 4096)), out)])
    assert sum(sizes) <= 2 * filling.READ_THREADS * 8 * 2**20  # two passes, a ring of buffers each

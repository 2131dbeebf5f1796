"""What is read straight to where it is wanted, and what is copied there."""

import os

import pytest
import torch

from lightning_superscale.checkpoint.format.blocks import BLOCK_BYTES
from lightning_superscale.checkpoint.load import scatter
from lightning_superscale.checkpoint.load.reader import SavedState, open_checkpoint
from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.checkpoint.state import LocalShard, LocalState, ReadRequest, TensorInfo, TensorKey
from lightning_superscale.comm.mesh import single_mesh
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import Box, row_box, whole_box

ROWS, COLUMNS = 3000, 700  # rows that begin and end anywhere in a block; 8 MiB
KEY = TensorKey("model", "w")


def saved(path, **tensors: torch.Tensor) -> SavedState:
    keys = {TensorKey("model", name): tensor for name, tensor in tensors.items()}
    state = LocalState(
        {key: TensorInfo(t.dtype, tuple(t.shape), "model") for key, t in keys.items()},
        {key: (LocalShard(whole_box(t.shape), t),) for key, t in keys.items()},
    )
    save(str(path), state, single_mesh())
    return open_checkpoint(str(path), check_first=False)


@pytest.fixture
def copied(monkeypatch) -> list[int]:
    """Elements of every copy from a buffer."""
    numels = []
    fill = scatter.Filling._fill

    def counted(self, part, values):
        numels.append(values.numel())
        fill(self, part, values)

    monkeypatch.setattr(scatter.Filling, "_fill", counted)
    return numels


def test_consecutive_values_are_read_to_where_they_are_wanted(tmp_path, copied):
    weight = torch.randn(ROWS, COLUMNS)
    source = saved(tmp_path / "a", w=weight, x=weight.bfloat16(), scalar=torch.tensor(3.0))
    rows = torch.nn.Parameter(torch.zeros(1500, COLUMNS))
    inside = torch.zeros(ROWS + 2, COLUMNS, dtype=torch.bfloat16)
    scalar = torch.zeros(())
    version = rows._version
    source.read([
        ReadRequest(KEY, row_box(weight.shape, 1000, 2500), rows),
        ReadRequest(TensorKey("model", "x"), whole_box(weight.shape), inside[1:-1]),
        ReadRequest(TensorKey("model", "scalar"), whole_box(()), scalar),
    ])  # fmt: skip
    assert torch.equal(rows, weight[1000:2500])
    assert torch.equal(inside[1:-1], weight.bfloat16())
    assert not inside[0].any()
    assert not inside[-1].any()
    assert scalar == 3.0
    assert copied == [1]  # the scalar
    assert rows._version > version
    assert inside._version > 0


def test_what_can_not_be_read_there_is_copied(tmp_path, copied):
    weight = torch.randn(ROWS, COLUMNS)
    source = saved(tmp_path / "a", w=weight, z=torch.complex(weight, weight)[:100])
    whole = whole_box(weight.shape)
    turned, double = torch.zeros(COLUMNS, ROWS).t(), torch.zeros(ROWS, COLUMNS).double()
    columns = torch.zeros(ROWS, 300)
    conjugated = torch.zeros(100, COLUMNS, dtype=torch.complex64).conj()
    for key, box, out, expected in [
        (KEY, whole, turned, weight),
        (KEY, whole, double, weight.double()),
        (KEY, Box((0, 7), (ROWS, 300)), columns, weight[:, 7:307]),
        (TensorKey("model", "z"), whole_box((100, COLUMNS)), conjugated, torch.complex(weight, weight)[:100]),
    ]:
        source.read([ReadRequest(key, box, out)])
        assert torch.equal(out, expected)
        assert sum(copied) == out.numel()
        copied.clear()


@pytest.mark.parametrize("order", [1, -1])
def test_values_that_are_wanted_twice_arrive_twice(tmp_path, order):
    weight, other = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS)
    source = saved(tmp_path / "a", w=weight, x=other)
    whole = whole_box(weight.shape)
    wanted = [
        (KEY, whole, torch.zeros(ROWS, COLUMNS)),
        (KEY, row_box(weight.shape, 500, 900), torch.zeros(400, COLUMNS)),  # some of it straight again
        (TensorKey("model", "x"), whole, torch.zeros(ROWS, COLUMNS)),
        (TensorKey("model", "x"), Box((3, 4), (5, 6)), torch.zeros(5, 6)),  # some of it copied
        (TensorKey("model", "x"), whole, torch.zeros(ROWS, COLUMNS, dtype=torch.float64)),
    ][::order]
    source.read([ReadRequest(*one) for one in wanted])
    for key, box, out in wanted:
        assert torch.equal(out, (weight if key == KEY else other)[box.within(whole)].to(out.dtype))


def test_reads_that_end_early_go_on(tmp_path, monkeypatch):
    tensors = {f"w{i}": torch.randn(200, 100 + i) for i in range(40)}
    source = saved(tmp_path / "a", **tensors)
    preadv = os.preadv

    def some(file, buffers, offset):
        first = next(buffer for buffer in buffers if buffer)
        return preadv(file, [first[: max(1, min(len(first), 70_001))]], offset)

    monkeypatch.setattr(os, "preadv", some)
    outs = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    source.read([ReadRequest(TensorKey("model", n), whole_box(out.shape), out) for n, out in outs.items()])
    assert all(torch.equal(outs[name], tensor) for name, tensor in tensors.items())


def test_damage_and_a_cut_are_found_where_bytes_went_straight(tmp_path, copied):
    weight = torch.randn(ROWS, COLUMNS)
    source = saved(tmp_path / "a", w=weight)
    (file,) = (tmp_path / "a" / "data").iterdir()
    data = bytearray(file.read_bytes())
    data[3 * BLOCK_BYTES + 5] ^= 1
    file.write_bytes(data)
    request = ReadRequest(KEY, whole_box(weight.shape), torch.zeros(ROWS, COLUMNS))
    with pytest.raises(CheckpointError, match=r"is damaged in block 3 .* which holds model: w\."):
        source.read([request])
    data[3 * BLOCK_BYTES + 5] ^= 1
    file.write_bytes(data[: 5 * BLOCK_BYTES])
    with pytest.raises(CheckpointError, match=rf"ends at byte {5 * BLOCK_BYTES}; it was cut off"):
        source.read([request])
    assert not copied

"""Tensors that are read when somebody uses them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.checkpoint.state import LocalShard, LocalState, TensorInfo, TensorKey
from lightning_superscale.comm.mesh import single_mesh
from lightning_superscale.layout.box import whole_box
from lightning_superscale.run.state.lazy_tensor import LazyTensor
from lightning_superscale.run.state.restore import open_any, read_whole

WEIGHTS = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture
def lazy(tmp_path, monkeypatch):
    """The weights of a checkpoint, and what was read of them so far."""
    keys = {TensorKey("model", name): tensor for name, tensor in WEIGHTS.items()}
    state = LocalState(
        {key: TensorInfo(tensor.dtype, tuple(tensor.shape), "model") for key, tensor in keys.items()},
        {key: (LocalShard(whole_box(tensor.shape), tensor),) for key, tensor in keys.items()},
    )
    save(str(tmp_path / "x.ckpt"), state, single_mesh())
    found = open_any(str(tmp_path / "x.ckpt"))["state_dict"]
    source = found["weight"].opened.source
    read, reading = [], source.read

    def counted(requests):
        read.extend(request.key.name for request in requests)
        reading(requests)

    monkeypatch.setattr(source, "read", counted)
    return found, read


def test_shape_and_dtype_are_known_without_reading(lazy):
    found, read = lazy
    weight = found["weight"]
    assert isinstance(weight, LazyTensor)
    assert isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.dtype, weight.device) == (torch.Size((2, 3)), torch.float32, torch.device("cpu"))
    assert (weight.dim(), weight.numel(), weight.size(1), weight.ndim) == (2, 6, 3, 2)
    assert weight.is_floating_point()
    assert not weight.requires_grad
    assert "weight, shape=(2, 3)" in repr(weight)
    assert read == []


@pytest.mark.parametrize(
    "use",
    [
        lambda t: t + 0,
        lambda t: t.to(torch.float64).float(),
        lambda t: torch.stack([t, t])[1],
        lambda t: torch.empty(2, 3).copy_(t),
        lambda t: t[:],
        lambda t: torch.as_tensor(t.numpy()),
        lambda t: t.clone(),
        copy.copy,
        copy.deepcopy,
        lambda t: pickle.loads(pickle.dumps(t)),
        lambda t: torch.nn.Parameter(t + 0).detach(),
    ],
)
def test_any_use_reads_the_values_and_gives_a_plain_tensor(lazy, use):
    found, read = lazy
    result = use(found["weight"])
    assert not isinstance(result, LazyTensor)
    assert torch.equal(result, WEIGHTS["weight"])
    assert set(read) == {"weight"}


def test_modules_and_torch_save_take_it(lazy):
    found, _ = lazy
    layer = nn.Linear(3, 2)
    layer.load_state_dict(found)
    assert torch.equal(layer.weight, WEIGHTS["weight"])
    file = io.BytesIO()
    torch.save(dict(found), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["bias"], WEIGHTS["bias"])


def test_many_are_read_together(lazy):
    found, read = lazy
    values = read_whole({"nested": [found["weight"], {"again": found["weight"]}], "bias": found["bias"], "n": 3})
    assert torch.equal(values["nested"][1]["again"], WEIGHTS["weight"])
    assert values["nested"][0] is values["nested"][1]["again"]
    assert values["n"] == 3
    assert sorted(read) == ["bias", "weight"]

"""Training states for checkpoint tests: tensors of every kind, cut in every way, on any number of ranks."""

from __future__ import annotations

import os
import random
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from lightning_superscale.checkpoint.load.reader import open_checkpoint
from lightning_superscale.checkpoint.state import (
    LocalShard,
    LocalState,
    OptimizerRecord,
    ReadRequest,
    TensorInfo,
    TensorKey,
    optimizer_section,
)
from lightning_superscale.checkpoint.tools.verify import verify
from lightning_superscale.comm.mesh import DataMesh, build_mesh, single_mesh
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import Box, flat_boxes, row_box, whole_box
from lightning_superscale.layout.mesh import MeshSpec

LAYOUTS = ("whole", "rows", "columns", "flat", "boxes")


def state_tensors(seed: int, scale: int = 1) -> dict[TensorKey, Tensor]:
    """Weights, buffers and optimizer states of many dtypes and shapes; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(100).to(dtype)

    tensors = {
        TensorKey("model", "embed.weight"): values(37 * scale, 16, dtype=torch.bfloat16),
        TensorKey("model", "block.0.weight"): values(24, 10 * scale),
        TensorKey("model", "block.0.bias"): values(24, dtype=torch.float16),
        TensorKey("model", "conv.weight"): values(5, 3, 2, 7 * scale),
        TensorKey("model", "one"): values(1, 1, 5),
        TensorKey("model", "nothing"): values(0, 4),
        TensorKey("model", "scale"): values(),
        TensorKey("model", "steps seen"): torch.tensor(seed * 1000 + 7),
        TensorKey("model", "mask"): values(13, 3) > 0,
        TensorKey("model", "codes"): values(19, dtype=torch.int8),
    }
    for name in ("embed.weight", "block.0.weight", "conv.weight"):
        like = tensors[TensorKey("model", name)]
        section = optimizer_section(0)
        tensors[TensorKey(section, name, "master_param")] = like.float() * 1.5
        tensors[TensorKey(section, name, "exp_avg")] = values(*like.shape)
        tensors[TensorKey(section, name, "step")] = torch.tensor(float(seed))
    return tensors


def boxes_of(key: TensorKey, shape: tuple[int, ...], layout: str, world_size: int) -> list[list[Box]]:
    """By rank, the boxes of a tensor that it holds; some hold none, and some hold equal ones."""
    if layout == "whole" or not shape:
        return [[whole_box(shape)] for _ in range(world_size)]
    if layout == "rows":
        cuts = [shape[0] * rank // world_size for rank in range(world_size + 1)]
        return [[row_box(shape, a, b)] for a, b in zip(cuts, cuts[1:], strict=False)]
    if layout == "columns":
        cuts = [shape[-1] * rank // world_size for rank in range(world_size + 1)]
        return [[Box((*(0 for _ in shape[1:]), a), (*shape[:-1], b - a))] for a, b in zip(cuts, cuts[1:], strict=False)]
    if layout == "flat":
        numel = torch.Size(shape).numel()
        step = -(-numel // world_size)
        return [flat_boxes(shape, min(r * step, numel), min((r + 1) * step, numel)) for r in range(world_size)]
    chooser = random.Random(f"{key} {world_size}")
    held: list[list[Box]] = [[] for _ in range(world_size)]
    for box in _partition(whole_box(shape), 2 * world_size + 1, chooser):
        for rank in chooser.sample(range(world_size), chooser.randint(1, world_size)):
            held[rank].append(box)
    return held


def _partition(box: Box, count: int, chooser: random.Random) -> list[Box]:
    """Disjoint boxes that make up a box."""
    boxes = [box]
    for _ in range(count):
        one = boxes.pop(chooser.randrange(len(boxes)))
        dim = chooser.randrange(len(one.size))
        if one.size[dim] < 2:
            boxes.append(one)
            continue
        cut = chooser.randint(1, one.size[dim] - 1)
        low, high = list(one.size), list(one.size)
        low[dim], high[dim] = cut, one.size[dim] - cut
        offset = list(one.offset)
        offset[dim] += cut
        boxes += [Box(one.offset, tuple(low)), Box(tuple(offset), tuple(high))]
    return boxes


def infos(tensors: dict[TensorKey, Tensor]) -> dict[TensorKey, TensorInfo]:
    roles = {"master_param": "master", "step": "scalar", "exp_avg": "state", "": "model"}
    return {
        key: TensorInfo(t.dtype, tuple(t.shape), roles.get(key.state, "state"), key.section == "model")
        for key, t in tensors.items()
    }


def local_state(
    tensors: dict[TensorKey, Tensor],
    layout: str = "whole",
    rank: int = 0,
    world_size: int = 1,
    rest: dict | None = None,
) -> LocalState:
    """The state as one rank has it."""
    shards = {}
    for key, tensor in tensors.items():
        boxes = boxes_of(key, tuple(tensor.shape), layout, world_size)[rank]
        shards[key] = tuple(LocalShard(box, tensor[box.within(whole_box(tensor.shape))]) for box in boxes)
    optimizer = OptimizerRecord(
        "AdamW",
        ({"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "foreach": None}, {"lr": torch.tensor(0.5), "betas": (0.8, 0.9)}),
        (("embed.weight",), ("block.0.weight", "conv.weight")),
        {"embed.weight": {"count": 3}},
    )
    return LocalState(
        infos(tensors),
        shards,
        (optimizer,),
        {"head.weight": "embed.weight"},
        {"epoch": 3, "loops": {"a": (1, 2)}, "best": torch.tensor([1.0, 2.0])} if rest is None else rest,
    )


def read_requests(
    tensors: dict[TensorKey, TensorInfo], layout: str = "whole", rank: int = 0, world_size: int = 1
) -> list[ReadRequest]:
    """For this rank's boxes of a layout."""
    requests = []
    for key, info in tensors.items():
        for box in boxes_of(key, info.shape, layout, world_size)[rank]:
            requests.append(ReadRequest(key, box, torch.full(box.size, 77).to(info.dtype)))
    return requests


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes in order."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1).view(torch.uint8)


def assert_filled(requests: list[ReadRequest], tensors: dict[TensorKey, Tensor]) -> None:
    """Every request holds, bit for bit, what the tensors hold there."""
    assert requests
    for request in requests:
        whole = tensors[request.key]
        expected = whole[request.box.within(whole_box(whole.shape))]
        assert request.out.dtype == expected.dtype
        assert torch.equal(bits(request.out), bits(expected)), request


def mesh_of(world_size: int) -> DataMesh:
    return single_mesh() if world_size == 1 else build_mesh(MeshSpec(shard=world_size), timedelta(seconds=60))


ONE_SHAPE = (6, 3)
ONE_KEY = TensorKey("model", "w")


def one_tensor(value: float, rank: int = 0, world_size: int = 1) -> LocalState:
    """A small state that holds one value everywhere, cut by rows."""
    box = row_box(ONE_SHAPE, ONE_SHAPE[0] * rank // world_size, ONE_SHAPE[0] * (rank + 1) // world_size)
    shard = LocalShard(box, torch.full(box.size, value))
    return LocalState(
        {ONE_KEY: TensorInfo(torch.float32, ONE_SHAPE, "model")}, {ONE_KEY: (shard,)}, rest={"value": value}
    )


def value_at(path: str) -> float | None:
    """The value that loads, None where there is no checkpoint; a mixture or damage is an error."""
    if not os.path.lexists(path) and not [name for name in os.listdir(Path(path).parent) if name.startswith(".ucp")]:
        return None
    try:
        source = open_checkpoint(path)
    except CheckpointError as error:
        if "is no checkpoint folder: No such file" in str(error):
            return None
        raise
    out = torch.empty(ONE_SHAPE)
    source.read([ReadRequest(ONE_KEY, whole_box(ONE_SHAPE), out)])
    value = source.rest["value"]
    assert torch.equal(out, torch.full(ONE_SHAPE, value))
    assert source.step == int(value)
    assert verify(path) == []
    return value

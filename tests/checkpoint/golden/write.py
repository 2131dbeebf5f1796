"""Writes a golden checkpoint of the present format: `python -m tests.checkpoint.golden.write FOLDER`.

Run it once for a new version of the format, and never over an old one: what lies in `v<version>` was written by that
version's own code, and must be read forever.
"""

from __future__ import annotations

import collections
import pathlib
import sys

import torch
from torch import Tensor

from lightning_superscale.checkpoint.format.manifest import MAJOR, MINOR
from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.checkpoint.state import LocalShard, LocalState, OptimizerRecord, TensorInfo, TensorKey
from lightning_superscale.comm.mesh import single_mesh
from lightning_superscale.layout.box import row_box, whole_box

STEP = 12
ALIASES = {"head.weight": "embed.weight"}
REST = {
    "epoch": 3,
    "loops": {"fit": (1, None, float("inf"))},
    "hyper_parameters": collections.OrderedDict(lr=0.1 + 0.2, path=pathlib.PurePosixPath("/data")),
    5: {b"\x00\xff", "text"},
}
OPTIMIZER = OptimizerRecord(
    "AdamW", ({"lr": 0.3, "betas": (0.9, 0.95), "fused": None},), (("embed.weight", "bias"),), {"bias": {"count": 4}}
)


def tensors(version: str) -> dict[TensorKey, Tensor]:
    """What the golden checkpoint of a version holds; by arithmetic, so that no version of torch's generator matters."""
    ramp = torch.arange(24).view(6, 4)
    # In so many parts that they are written as columns.
    many = {TensorKey("model", "many.weight"): torch.arange(140).view(70, 2) / 9}
    return {
        **(many if version != "v1.0" else {}),
        TensorKey("model", "embed.weight"): (ramp / 7).to(torch.bfloat16),
        TensorKey("model", "bias"): torch.tensor([0.5, -0.25, float("inf")]),
        TensorKey("model", "seen"): torch.tensor(2**40 + 1),
        TensorKey("model", "mask"): ramp[0] % 2 == 0,
        TensorKey("model", "empty"): torch.empty(0, 3),
        TensorKey("optimizer.0", "embed.weight", "exp_avg"): ramp / 3 + 0.125,
        TensorKey("optimizer.0", "embed.weight", "master_param"): ramp / 7,
        TensorKey("optimizer.0", "embed.weight", "step"): torch.tensor(12.0),
    }


def state(version: str) -> LocalState:
    shards = {}
    for key, tensor in tensors(version).items():
        boxes = [whole_box(tensor.shape)]
        if tensor.dim() == 2 and tensor.shape[0] == 6:
            boxes = [row_box(tensor.shape, 0, 4), row_box(tensor.shape, 4, 6)]
        if key.name == "many.weight":
            boxes = [row_box(tensor.shape, i, i + 1) for i in range(tensor.shape[0])]
        shards[key] = tuple(LocalShard(box, tensor[box.within(whole_box(tensor.shape))]) for box in boxes)
    infos = {
        key: TensorInfo(t.dtype, tuple(t.shape), "model", key.name == "bias") for key, t in tensors(version).items()
    }
    return LocalState(infos, shards, (OPTIMIZER,), ALIASES, {**REST, "best": torch.tensor([1.0, 2.5])})


if __name__ == "__main__":
    save(sys.argv[1], state(f"v{MAJOR}.{MINOR}"), single_mesh(), step=STEP)

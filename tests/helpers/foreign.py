"""Foreign checkpoints in tests: DeepSpeed's fixtures, and reading a source whole or in parts."""

from __future__ import annotations

import os
import random
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_superscale.checkpoint.state import ReadRequest, StateSource, TensorKey
from lightning_superscale.layout.box import Box, whole_box

FIXTURES = Path(__file__).resolve().parents[1] / "checkpoint" / "foreign" / "fixtures" / "deepspeed"


def unpack(case: str, folder: Path) -> Path:
    """DeepSpeed's checkpoint `case` (tests/peers/make_fixtures.py), in `folder`."""
    with zipfile.ZipFile(FIXTURES / f"{case}.zip") as archive:
        archive.extractall(folder / case)
    return folder / case


def truth(case: Path) -> dict[str, Tensor]:
    """What DeepSpeed held when it wrote `case`, by `<kind>/<name>`."""
    return load_file(case / "truth.safetensors")


def read_all(source: StateSource) -> dict[TensorKey, Tensor]:
    """Every tensor, whole."""
    found = {key: torch.full(info.shape, 77, dtype=info.dtype) for key, info in source.tensors.items()}
    source.read([ReadRequest(key, whole_box(tensor.shape), tensor) for key, tensor in found.items()])
    return found


def read_in_parts(source: StateSource, seed: int) -> dict[TensorKey, Tensor]:
    """Every tensor, each cut at random along every dim into up to 2^ndim requests, in random order."""
    rng = random.Random(seed)
    found = {key: torch.full(info.shape, 77, dtype=info.dtype) for key, info in source.tensors.items()}
    requests = []
    for key, tensor in found.items():
        boxes = [whole_box(tensor.shape)]
        for dim, extent in enumerate(tensor.shape):
            cut = rng.randint(0, extent)
            boxes = [
                Box((*box.offset[:dim], start, *box.offset[dim + 1 :]), (*box.size[:dim], size, *box.size[dim + 1 :]))
                for box in boxes
                for start, size in ((0, cut), (cut, extent - cut))
            ]
        requests += [ReadRequest(key, box, tensor[box.within(whole_box(tensor.shape))]) for box in boxes]
    rng.shuffle(requests)
    source.read(requests)
    return found


class Payload:
    """Unpickled with pickle's powers, it makes a directory; a reader that runs it leaves the trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)

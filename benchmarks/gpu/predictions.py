"""What `estimate(device="this machine")` predicts for contestants of `make gpu-bench`, before they are measured.

    python -m benchmarks.gpu.predictions SIZE:NAME [SIZE:NAME ...]

Says one JSON line for each: its name, seconds of a step and MiB that the device holds at most.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu.contestants import OURS
from benchmarks.models import SHAPES, Decoder, batches
from lightning_superscale import estimate


def predict(size: str, name: str) -> dict[str, Any]:
    """The prediction for one contestant with a model of a size."""
    shape = SHAPES[size]
    with torch.device("meta"):
        model = Decoder(shape)
    found = estimate(
        model,
        batch=batches(shape)(0),
        device="this machine",
        precision="bf16-true",
        loss=lambda module, ids: module.loss(ids),
        **{"zero": 0, **OURS[name]},
    )
    # With blocks checkpointed on top there is a second one, of a step that nobody measures.
    strategy = found.strategies[0]
    return {"step_s": round(strategy.time.total, 4), "peak_device_mib": round(strategy.peak.total / 2**20, 1)}


def main(arguments: Sequence[str]) -> int:
    for entry in arguments:
        size, name = entry.rsplit(":", 1)
        print(json.dumps({"size": size, "contestant": name, **predict(size, name)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A user's script: trains on two ranks, and rank 0 writes what came out. `two_ranks.py STRATEGY OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import lightning_superscale  # noqa: F401
from tests.helpers.trainers import Regressor, loader, trainer


def main(strategy: str, out: str) -> None:
    torch.set_num_threads(1)
    module = Regressor()
    runner = trainer(strategy, devices=2, max_epochs=2)
    runner.fit(module, loader(48), loader(16))
    if runner.global_rank == 0:
        torch.save(
            {
                "weights": {key: value.clone() for key, value in module.state_dict().items()},
                "ranks": runner.world_size,
                "launcher": type(runner.strategy.launcher).__name__,
                "metrics": {key: float(value) for key, value in runner.callback_metrics.items()},
            },
            Path(out),
        )


if __name__ == "__main__":
    main(*sys.argv[1:])

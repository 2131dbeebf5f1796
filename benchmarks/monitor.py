"""What ScaleMonitor costs: `python benchmarks/monitor.py [--steps 60] [--shape 25M] [--json OUT]`.

The time that the host spends in its hooks, and in what it logs, is summed up and divided by the time of all training
batches; the first batch, whose operations it counts, is compared with another run's first batch. The last line of the
output is JSON. Exits with 1 when the hooks take more than 0.5 % of a step.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning_superscale as lss
from benchmarks.estimate import Clock
from benchmarks.models import SHAPES, Decoder

LIMIT = 0.005


class Model(L.LightningModule):
    def __init__(self, shape: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Decoder(SHAPES[shape])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Timed(lss.ScaleMonitor):
    """The monitor, and the seconds that each of its hooks took."""

    def __init__(self, every_n_steps: int) -> None:
        super().__init__(every_n_steps=every_n_steps)
        self.hook_seconds: list[float] = []

    def on_train_batch_start(self, *given: Any) -> None:
        start = time.perf_counter()
        super().on_train_batch_start(*given)
        self.hook_seconds.append(time.perf_counter() - start)

    def on_train_batch_end(self, *given: Any) -> None:
        start = time.perf_counter()
        super().on_train_batch_end(*given)
        self.hook_seconds.append(time.perf_counter() - start)


def train(shape: str, strategy: str, steps: int, monitor: Timed | None) -> list[float]:
    """Seconds of each batch of one run."""
    # The clock stands before the monitor, whose last hook it therefore leaves out.
    clock, one = Clock(), SHAPES[shape]
    tokens = torch.randint(one.vocabulary, (one.batch, one.sequence + 1), generator=torch.Generator().manual_seed(1))
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        precision="bf16-true",
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=[clock] if monitor is None else [clock, monitor],
        logger=monitor is not None,
        default_root_dir="runs/bench/monitor",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(shape), DataLoader(tokens.repeat(steps, 1), one.batch))
    return clock.seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="25M", choices=SHAPES)
    parser.add_argument("--strategy", default="superoffload")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = []
    bare = train(options.shape, options.strategy, options.steps, None)
    for every_n_steps in (10, 1):
        monitor = Timed(every_n_steps)
        seconds = train(options.shape, options.strategy, options.steps, monitor)
        rows.append(
            {
                "every_n_steps": every_n_steps,
                "hooks_s_per_step": sum(monitor.hook_seconds) / options.steps,
                "step_s": statistics.median(seconds[1:]),
                "share": sum(monitor.hook_seconds) / sum(seconds),
                "first_batch_s": seconds[0],
            }
        )
    report = {
        "hardware": {"machine": platform.platform(), "torch": torch.__version__},
        "shape": options.shape,
        "strategy": options.strategy,
        "without": {"step_s": statistics.median(bare[1:]), "first_batch_s": bare[0]},
        "rows": rows,
    }
    print(f"{options.shape} under {options.strategy} on {platform.platform()}, torch {torch.__version__}")
    print(f"without it  step {report['without']['step_s'] * 1e3:.1f} ms, first batch {bare[0] * 1e3:.0f} ms")
    for row in rows:
        print(
            f"every {row['every_n_steps']:2} steps  step {row['step_s'] * 1e3:.1f} ms, first batch "
            f"{row['first_batch_s'] * 1e3:.0f} ms, hooks {row['hooks_s_per_step'] * 1e6:.0f} us a step: "
            f"{row['share']:.3%}"
        )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return int(rows[0]["share"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())

"""A small model whose gradients are exact sums, so that any number of ranks has the same bits, and its data.

Weights are rounded to -1, 0 or 1 in forward, and pass gradients on as they are; inputs are halves; the loss is a sum of
distances, whose derivative is a sign. So every gradient is a sum of at most 8 * 5 * 6 halves, divided by a power of
two: fewer than 11 bits, which fp16 too holds, and sums come out alike in any order. The gradient depends on the
weights, so that a step from wrong ones shows, and steps of AdamW move weights over the thresholds.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightning_superscale as lss
from tests.helpers.crashes import Countdown
from tests.soak.ranks import GLOBAL_BATCH, NUM_SAMPLES, POISON, Leg, record

INPUTS, HIDDEN, OUTPUTS = 6, 5, 3


class Rounded(torch.autograd.Function):
    """A weight as -1, 0 or 1; the gradient goes through as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight.round().clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class RoundedLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, Rounded.apply(self.weight))


class Halves(Dataset):
    """Inputs and targets that are halves."""

    def __init__(self, poison: int | None) -> None:
        self.poison = poison

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        x = torch.randint(-2, 3, (INPUTS,), generator=generator) / 2
        target = torch.randint(-8, 9, (OUTPUTS,), generator=generator) / 2 + 0.25  # no distance is 0
        return index, x * float("nan") if index == self.poison else x, target


class Loader(L.LightningDataModule):
    def __init__(self, leg: Leg) -> None:
        super().__init__()
        self.leg = leg

    def train_dataloader(self) -> DataLoader:
        data = Halves(POISON if self.leg.kind == "fp16" else None)
        size = GLOBAL_BATCH // self.leg.ranks
        sampler = lss.ResumableSampler(data, seed=2)
        # Forked, as is Linux's default: workers of a fork server would outlive a rank that is killed.
        how = {"num_workers": self.leg.workers, "multiprocessing_context": "fork"} if self.leg.workers else {}
        return DataLoader(data, batch_size=size, sampler=sampler, **how)


class Soaked(L.LightningModule):
    """Records its samples, and falls into the leg's trap.

    Args:
        started: called with the step at which this leg begins.
    """

    def __init__(self, leg: Leg, rank: int, started: Callable[[int], None]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(RoundedLinear(INPUTS, HIDDEN, bias=False), RoundedLinear(HIDDEN, OUTPUTS, bias=False))
        self.leg, self.rank, self.started = leg, rank, started
        self.first: int | None = None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        ids, x, target = batch
        if self.first is None:
            self.first = self.global_step
            self.started(self.first)
            if self.leg.trap == "kill in a save" and self.leg.victim == self.rank:
                Countdown(self.leg.at).arm()
        record(self.leg, self.rank, self.global_step, ids.tolist())
        time.sleep(self.leg.pause_s)
        if self.leg.victim == self.rank and self.global_step == self.first + self.leg.at:
            if self.leg.trap == "raise":
                raise ValueError("bad sample 17")
            if self.leg.trap == "nan":
                x = x * float("nan")
            if self.leg.trap == "kill in a step":
                os.kill(os.getpid(), signal.SIGKILL)
        return (self.net(x) - target).abs().sum(1).mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

"""Two models whose steps are predicted and measured: a decoder, and a network for images."""

from __future__ import annotations

from dataclasses import replace

import lightning as L
import torch
from torch import nn

from benchmarks.models import SHAPES, Decoder

SHAPE = replace(SHAPES["1M"], width=256, num_layers=4, vocabulary=2048)


class Language(L.LightningModule):
    """A decoder-only transformer; batches are tokens [batch, sequence + 1]."""

    sequence = 64

    def __init__(self) -> None:
        super().__init__()
        self.net = Decoder(replace(SHAPE, sequence=self.sequence))

    def training_step(self, batch, batch_idx):
        return self.net.loss(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    @classmethod
    def batch(cls, size: int) -> torch.Tensor:
        return torch.zeros(size, cls.sequence + 1, dtype=torch.int64)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.wide = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.narrow = nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(self.wide(self.norm(x)).relu())


class Images(L.LightningModule):
    """Residual convolutions; batches are images [batch, 3, 32, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 4, stride=4)
        self.blocks = nn.ModuleList(Residual(64) for _ in range(6))
        self.head = nn.Linear(64, 1000)

    def training_step(self, batch, batch_idx):
        x = self.stem(batch)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3))).float().logsumexp(1).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    @classmethod
    def batch(cls, size: int) -> torch.Tensor:
        return torch.zeros(size, 3, 32, 32)


MODELS = {"language": (Language, (2, 16)), "images": (Images, (16, 64))}
"""Each with its two batch sizes."""

"""The two encoders, and the loss that couples them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.two_towers.words import HEIGHT, MAX_LETTERS, WIDTH

DIM = 96


class Vision(nn.Module):
    """Pictures [B, 1, HEIGHT, WIDTH] to embeddings [B, DIM]."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.LayerNorm(2 * channels * (HEIGHT // 4) * (WIDTH // 4)),
            nn.Linear(2 * channels * (HEIGHT // 4) * (WIDTH // 4), 256),
            nn.GELU(),
            nn.Linear(256, DIM),
            nn.BatchNorm1d(DIM, affine=False),  # takes away what all embeddings have in common
        )

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures)


class Text(nn.Module):
    """Letters [B, MAX_LETTERS] to embeddings [B, DIM]; it also owns the temperature of the loss."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(27, width)
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(MAX_LETTERS * width, 256),
            nn.GELU(),
            nn.Linear(256, 256),
            nn.GELU(),
            nn.Linear(256, DIM),
            nn.BatchNorm1d(DIM, affine=False),
        )
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, letters: Tensor) -> Tensor:
        return self.layers(self.embedding(letters))


def similarity(pictures: Tensor, texts: Tensor) -> Tensor:
    """Cosines of every picture with every text, [B, B]."""
    return nn.functional.normalize(pictures, dim=1) @ nn.functional.normalize(texts, dim=1).T


def contrastive_loss(pictures: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    """Each picture should find its own text in the batch, and each text its picture."""
    logits = similarity(pictures, texts) * log_scale.exp()
    own = torch.arange(len(logits), device=logits.device)
    return (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2


def build_towers(seed: int = 0) -> tuple[Vision, Text]:
    torch.manual_seed(seed)
    return Vision(), Text()

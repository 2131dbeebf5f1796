"""The model and the data of the step benchmarks: a decoder-only transformer, and tokens that a seed decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Shape:
    """One model size and the batch that it trains on.

    Widths are multiples of 16: torch's fused AdamW kernel rounds a tensor's last few elements otherwise
    than the rest, and with no such remainder two exact implementations agree in every bit.

    Attributes:
        remat: whether blocks compute their activations again in backward.
        loss_tokens: tokens whose logits are there at a time; 0 for all of them.
    """

    width: int
    num_layers: int
    num_heads: int
    vocabulary: int
    batch: int
    sequence: int
    remat: bool = False
    loss_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.sequence


SHAPES = {
    "1M": Shape(width=128, num_layers=4, num_heads=4, vocabulary=1024, batch=2, sequence=64),
    "5M": Shape(width=256, num_layers=4, num_heads=4, vocabulary=4096, batch=4, sequence=128),
    "25M": Shape(width=512, num_layers=6, num_heads=8, vocabulary=6144, batch=4, sequence=128),
    "120M": Shape(width=768, num_layers=12, num_heads=12, vocabulary=23040, batch=2, sequence=128),
    # For GPUs: 16,384 tokens per step.
    "1B": Shape(width=2048, num_layers=20, num_heads=16, vocabulary=32000, batch=8, sequence=2048),
    "3.1B": Shape(width=3072, num_layers=26, num_heads=24, vocabulary=32000, batch=8, sequence=2048),
    "5.1B": Shape(width=4096, num_layers=24, num_heads=32, vocabulary=32000, batch=8, sequence=2048),
}
# Large models, and one sequence that is long: one block's activations at a time.
_LEAN = {"vocabulary": 32000, "remat": True, "loss_tokens": 8192}
SHAPES |= {
    "6.7B": Shape(width=4096, num_layers=32, num_heads=32, batch=8, sequence=2048, **_LEAN),
    "11B": Shape(width=5120, num_layers=34, num_heads=40, batch=8, sequence=2048, **_LEAN),
}
SHAPES |= {
    f"3.1B-{thousands}k": Shape(width=3072, num_layers=26, num_heads=24, batch=1, sequence=1024 * thousands, **_LEAN)
    for thousands in (16, 32, 64, 128)
}
# The first layers of a stack, of which a step with all of them would take too long at such lengths.
_OF_8B = {"width": 4096, "num_heads": 32, "vocabulary": 32000, "batch": 1}
SHAPES |= {
    f"8B-{layers}of38-{thousands}k": Shape(num_layers=layers, sequence=1024 * thousands, **_OF_8B)
    for layers in (2, 3)
    for thousands in (64, 128, 256)
}
# Few tokens, so that of a step's time the optimizer has a large share. From 10M parameters to a billion.
_FEW = {"batch": 1, "sequence": 16}
SHAPES |= {
    "0.2M-few": Shape(width=64, num_layers=2, num_heads=4, vocabulary=1024, **_FEW),
    "1M-few": Shape(width=128, num_layers=4, num_heads=4, vocabulary=1024, **_FEW),
    "10M-few": Shape(width=320, num_layers=6, num_heads=5, vocabulary=4096, **_FEW),
    "25M-few": Shape(width=512, num_layers=6, num_heads=8, vocabulary=6144, **_FEW),
    "60M-few": Shape(width=640, num_layers=10, num_heads=10, vocabulary=8192, **_FEW),
    "120M-few": Shape(width=768, num_layers=12, num_heads=12, vocabulary=23040, **_FEW),
    "350M-few": Shape(width=1024, num_layers=24, num_heads=16, vocabulary=23040, **_FEW),
    "1B-few": Shape(width=2048, num_layers=18, num_heads=16, vocabulary=32000, **_FEW),
}
SHAPES |= {
    f"1M-{layers}of4": Shape(width=128, num_layers=layers, num_heads=4, vocabulary=1024, batch=2, sequence=64)
    for layers in (2, 3)
}


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, sequence, width = x.shape
        heads = self.qkv(self.norm_attention(x)).view(batch, sequence, 3, self.num_heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, sequence, width))
        return x + self.down(functional.gelu(self.up(self.norm_mlp(x))))


class Decoder(nn.Module):
    """Next-token predictor. The same seed gives the same weights in every process."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.sequence, shape.width)
        self.blocks = nn.ModuleList(Block(shape.width, shape.num_heads) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self._remat, self._loss_tokens = shape.remat, shape.loss_tokens
        for weight in (self.tokens.weight, self.positions.weight):
            nn.init.normal_(weight, std=0.02)

    def features(self, ids: Tensor) -> Tensor:
        """What the head makes logits of: [batch, sequence, width]."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(places)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self._remat else block(x)
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.features(ids))

    def loss(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy of each token from those before it; ids is [batch, sequence + 1]."""
        if not self._loss_tokens:
            logits = self(ids[:, :-1])
            return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        features, targets = self.features(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
        parts = zip(features.split(self._loss_tokens), targets.split(self._loss_tokens), strict=True)
        summed = [checkpoint(self._summed_loss, *part, use_reentrant=False) for part in parts]
        return torch.stack(summed).sum() / targets.numel()

    def _summed_loss(self, features: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self.head(features).float(), targets, reduction="sum")


def num_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def batches(shape: Shape) -> Callable[[int], Tensor]:
    """Tokens of step n: an arithmetic progression with noise, so that there is something to learn."""

    def batch(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        start = torch.randint(shape.vocabulary, (shape.batch, 1), generator=generator)
        stride = torch.randint(1, 8, (shape.batch, 1), generator=generator)
        noise = torch.randint(2, (shape.batch, shape.sequence + 1), generator=generator)
        return (start + stride * torch.arange(shape.sequence + 1) + noise) % shape.vocabulary

    return batch

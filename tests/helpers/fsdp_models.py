"""Models that sharding gets wrong."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width + 1)
        self.down = nn.Linear(2 * width + 1, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Stack(nn.Module):
    """Repeated blocks between an embedding and a head, a buffer, rows that no world size divides."""

    def __init__(self, num_blocks: int = 3, *, use_reentrant: bool | None = None, is_tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 12, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.head = nn.Linear(12, 12, bias=False)
        self.tiny = nn.Linear(12, 1)
        if is_tied:
            self.head.weight = self.first.weight
        self.register_buffer("shift", torch.linspace(-1, 1, 12))
        self._use_reentrant = use_reentrant

    def forward(self, x):
        h = self.first(x) + self.shift.to(x.dtype)
        for block in self.blocks:
            h = block(h) if self._use_reentrant is None else checkpoint(block, h, use_reentrant=self._use_reentrant)
        return self.head(h) * self.tiny(h)


class Tokens(nn.Module):
    """A language model with tied embeddings, whose inputs have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(13, 12)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(12, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed((x.abs() * 10).long() % 13)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


class Chooser(nn.Module):
    """Branches that a rank's batch chooses between, in one group."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 12)
        self.left = nn.Linear(12, 12)
        self.right = nn.Linear(12, 12)

    def forward(self, x):
        h = self.first(x).tanh()
        return self.left(h) if x.sum() > 0 else self.right(h)


class Whole(nn.Module):
    """A network inside a module that is never called itself, as in a LightningModule."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.scale = nn.Parameter(torch.tensor(1.5))


class Adapted(nn.Module):
    """A frozen 16-bit base with trainable fp32 adapters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(12, 12).to(torch.bfloat16).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(3, 12) * 0.3)
        self.b = nn.Parameter(torch.randn(12, 3) * 0.3)

    def forward(self, x):
        return self.base(x.bfloat16()).float() + F.linear(F.linear(x, self.a), self.b)


class MixedTrainable(nn.Module):
    """Trainable parameters of two dtypes in one group."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.low = nn.Linear(12, 12).to(torch.bfloat16)
        self.scale = nn.Parameter(torch.randn(12))

    def forward(self, x):
        return self.low(x.bfloat16()).float() * self.scale


def loss_of(y: torch.Tensor) -> torch.Tensor:
    return y.float().pow(2).mean()


def run_net(model, x):
    loss_of(model.net(x) * model.scale).backward()


def run_itself(model, x):
    loss_of(model(x)).backward()

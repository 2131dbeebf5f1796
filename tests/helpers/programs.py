"""The eight ordinary backward programs that sharding engines get wrong, each for one rank.

A program runs forward and backward on a model and leaves gradients behind; the caller steps.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Programs(nn.Module):
    """Small model with a trunk, a branch that only some batches take, and a block that is applied thrice."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(12, 16)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.branch = nn.Linear(16, 16)
        self.out = nn.Linear(16, 4)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.to(dtype)

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.block(self.inp(x))) * self.scale


def _loss(y: torch.Tensor) -> torch.Tensor:
    return y.float().pow(2).mean()


def plain_backward(model: Programs, x: torch.Tensor) -> None:
    _loss(model.trunk(x)).backward()


def backward_with_gradient(model: Programs, x: torch.Tensor) -> None:
    y = model.trunk(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))


def two_batches_two_backwards(model: Programs, x: torch.Tensor) -> None:
    half = len(x) // 2
    _loss(model.trunk(x[:half])).backward()
    _loss(model.trunk(x[half:])).backward()


def two_losses_retained_graph(model: Programs, x: torch.Tensor) -> None:
    y = model.trunk(x)
    _loss(y).backward(retain_graph=True)
    y.float().abs().sum().backward()


def block_applied_three_times(model: Programs, x: torch.Tensor) -> None:
    h = model.inp(x)
    for _ in range(3):
        h = model.block(h)
    _loss(model.out(h)).backward()


def block_applied_three_times_reentrant_checkpoint(model: Programs, x: torch.Tensor) -> None:
    h = model.inp(x)
    for _ in range(3):
        h = checkpoint(model.block, h, use_reentrant=True)
    _loss(model.out(h)).backward()


def data_dependent_branch(model: Programs, x: torch.Tensor) -> None:
    h = model.inp(x)
    h = model.branch(h) if x.sum() > 0 else model.block(h)
    _loss(model.out(h)).backward()


def extra_backward_of_a_part(model: Programs, x: torch.Tensor) -> None:
    _loss(model.trunk(x)).backward()
    for _ in range(2):
        _loss(model.branch(model.inp(x))).backward()


PROGRAMS = (
    plain_backward,
    backward_with_gradient,
    two_batches_two_backwards,
    two_losses_retained_graph,
    block_applied_three_times,
    block_applied_three_times_reentrant_checkpoint,
    data_dependent_branch,
    extra_backward_of_a_part,
)

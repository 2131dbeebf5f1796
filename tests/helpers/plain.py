"""The oracles: what plain PyTorch does, one process, nothing sharded, nothing offloaded."""

from __future__ import annotations

import torch
from torch import nn


class PlainMasterAdamW:
    """Mixed-precision training as it is written by hand: fp32 masters beside 16-bit weights.

    The gradient is cast to fp32, clipped there, stepped by torch.optim.AdamW, and the master is cast back.
    """

    def __init__(self, params, max_norm: float | None = None, clip_value: float | None = None, **adamw) -> None:
        self.params = list(params)
        self.masters = [nn.Parameter(p.detach().float().clone()) for p in self.params]
        self.optimizer = torch.optim.AdamW(self.masters, **adamw)
        self.max_norm = max_norm
        self.clip_value = clip_value
        self.grad_scale = 1.0  # the inverse of a loss scale

    def step(self) -> None:
        for param, master in zip(self.params, self.masters, strict=True):
            master.grad = None if param.grad is None else param.grad.float() * self.grad_scale
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.masters, self.max_norm)
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(self.masters, self.clip_value)
        self.optimizer.step()
        with torch.no_grad():
            for param, master in zip(self.params, self.masters, strict=True):
                param.copy_(master)

    def zero_grad(self) -> None:
        for param in self.params:
            param.grad = None

    def state(self, index: int) -> dict[str, torch.Tensor]:
        return self.optimizer.state[self.masters[index]]


def assert_equal_states(params, optimizer, oracle_params, oracle_states) -> None:
    """Weights and every optimizer state, bit for bit."""
    for i, (param, expected) in enumerate(zip(params, oracle_params, strict=True)):
        assert torch.equal(param, expected), f"weights of parameter {i} differ"
        for key, value in oracle_states[i].items():
            assert torch.equal(optimizer.state[param][key], value), f"{key} of parameter {i} differs"

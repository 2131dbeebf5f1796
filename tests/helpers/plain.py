"""The oracles: what plain PyTorch does, one process, nothing sharded, nothing offloaded."""

from __future__ import annotations

import torch
from torch import nn

from lightning_superscale.ops import reference
from lightning_superscale.ops.state_dtypes import StateDtypes
from lightning_superscale.ops.types import AdamWHyper, AdamWSegment


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


class PlainLowAdamW:
    """Training on low-precision states as it is written by hand: one `ops/reference.py` update per parameter.

    Args:
        named_params: weights, which are their own masters where their dtype is the masters'.
        states: dtypes and rounding.
    """

    def __init__(self, named_params, states: StateDtypes, max_norm: float | None = None, **hyper) -> None:
        self.named = list(named_params)
        self.states = states
        self.max_norm = max_norm
        self.hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2, **hyper}
        self.segments: dict[str, AdamWSegment] = {}
        self.num_steps = 0
        self.grad_scale = 1.0  # the inverse of a loss scale
        for name, param in self.named:
            master = states.master_of(param.dtype)
            self.segments[name] = AdamWSegment(
                param=param.detach().flatten().to(master, copy=True),
                exp_avg=torch.zeros(param.numel(), dtype=states.moments),
                exp_avg_sq=torch.zeros(param.numel(), dtype=states.moments),
                grad=torch.zeros(param.numel()),
                hyper=AdamWHyper(**self.hyper, step=1),
                weight_out=torch.zeros(param.numel(), dtype=param.dtype),
                rounding=states.rounding(param.dtype, name, 0),
                compensation=torch.zeros_like(param.detach().flatten()) if states.compensates(param.dtype) else None,
            )

    def step(self) -> None:
        self.num_steps += 1
        grads = [nn.Parameter(param.detach().float()) for _, param in self.named]
        for grad, (_, param) in zip(grads, self.named, strict=True):
            grad.grad = None if param.grad is None else param.grad.float() * self.grad_scale
        scale = self.grad_scale
        if self.max_norm is not None:
            norm = torch.nn.utils.get_total_norm([grad.grad for grad in grads if grad.grad is not None])
            scale *= float((self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        for name, param in self.named:
            if param.grad is None:
                continue
            seg = self.segments[name]
            seg.grad = param.grad.detach().flatten()
            seg.hyper = AdamWHyper(**self.hyper, step=self.num_steps, grad_scale=scale)
            reference.adamw_commit([seg])
            with torch.no_grad():
                param.copy_(seg.weight_out.view(param.shape))

    def zero_grad(self) -> None:
        for _, param in self.named:
            param.grad = None

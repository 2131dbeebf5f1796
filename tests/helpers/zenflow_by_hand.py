"""ZenFlow as its paper's pseudo-code has it, one matrix operation after the other: the oracle of the engine.

Every column has fp32 master and moments. A window's update of deferred columns is computed at its end, and the weights
that forward reads get it one window later, or at once without overlap.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn

from lightning_superscale.config import ZenFlowConfig
from lightning_superscale.ops import reference
from lightning_superscale.ops.types import AdamWHyper, AdamWSegment


def columns_of(tensor: torch.Tensor) -> torch.Tensor:
    """[rows, columns]; what has one dim is one column."""
    return tensor.reshape(tensor.shape[0], -1) if tensor.ndim > 1 else tensor.reshape(-1, 1)


class MatrixByHand:
    """One parameter."""

    def __init__(self, weight: nn.Parameter, config: ZenFlowConfig, *, is_split: bool) -> None:
        self.weight, self.config = weight, config
        shape = columns_of(weight).shape
        self.master = weight.detach().float().clone()
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master)
        num = shape[1] if weight.ndim < 2 else math.floor(config.topk * shape[1] + 0.5) if is_split else 0
        self.num_selected = num
        self.selected = torch.arange(shape[1]) < num
        self.total, self.rates, self.hyper = torch.zeros_like(self.master), [], None
        self.is_late = None

    def mask(self, selected: torch.Tensor) -> torch.Tensor:
        return selected.expand(columns_of(self.weight).shape).reshape(self.weight.shape)

    def update(self, grad: torch.Tensor, hyper: AdamWHyper, mask: torch.Tensor) -> None:
        """Step the columns of the mask, with all the others beside them for nothing."""
        new = [tensor.clone() for tensor in (self.master, self.exp_avg, self.exp_avg_sq)]
        flat = [tensor.reshape(-1) for tensor in new]
        reference.adamw_commit(
            [AdamWSegment(param=flat[0], exp_avg=flat[1], exp_avg_sq=flat[2], grad=grad.reshape(-1), hyper=hyper)]
        )
        for mine, its in zip((self.master, self.exp_avg, self.exp_avg_sq), flat, strict=True):
            mine.copy_(torch.where(mask, its.view(mine.shape), mine))

    def place(self, mask: torch.Tensor) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.where(mask, self.master.to(self.weight.dtype), self.weight))

    def step(self, grad: torch.Tensor, hyper: AdamWHyper) -> None:
        mine = self.mask(self.selected)
        self.update(grad, hyper, mine)
        self.place(mine)
        scaled = grad.float() * hyper.grad_scale
        if hyper.clip_value is not None:
            scaled = scaled.clamp(-hyper.clip_value, hyper.clip_value)
        self.total = self.total + scaled if self.rates else scaled
        self.rates.append(hyper.lr)
        self.hyper = hyper

    def apply_late(self) -> None:
        if self.is_late is not None:
            self.place(self.is_late)
            self.is_late = None

    def end_window(self) -> None:
        self.apply_late()
        if not self.rates:
            return
        num, rule = len(self.rates), self.config.deferred_lr
        lr = {"linear": sum(self.rates), "sqrt": sum(self.rates) / num * math.sqrt(num)}.get(rule)
        lr = self.rates[-1] * rule if lr is None else lr
        hyper = dataclasses.replace(self.hyper, lr=lr, absorbed=num, grad_scale=1 / num, clip_value=None)
        theirs = self.mask(~self.selected)
        self.update(self.total, hyper, theirs)
        self.is_late, self.rates = theirs, []

    def choose(self, grad: torch.Tensor) -> None:
        if not 0 < self.num_selected < len(self.selected) or self.weight.ndim < 2:
            return
        norms = columns_of(grad).double().square().sum(0)
        chosen = sorted(range(len(norms)), key=lambda j: (-norms[j].item(), j))[: self.num_selected]
        self.selected = torch.isin(torch.arange(len(norms)), torch.tensor(chosen))


class ZenFlowByHand:
    """All parameters of a model."""

    def __init__(self, model: nn.Module, config: ZenFlowConfig, excluded: tuple[str, ...] = ()) -> None:
        self.config = config
        self.of = [MatrixByHand(p, config, is_split=name not in excluded) for name, p in model.named_parameters()]
        self.num_steps = self.chosen_at = self.window_steps = 0

    def step(self, hypers: list[AdamWHyper]) -> None:
        config, warmup = self.config, max(1, self.config.warmup_steps)
        self.num_steps += 1
        self.window_steps += 1
        for one, hyper in zip(self.of, hypers, strict=True):
            one.step(one.weight.grad, hyper)
        is_warm = self.num_steps <= warmup
        if is_warm or self.window_steps == config.update_interval:
            self.window_steps = 0
            is_due = self.num_steps == warmup or (
                not is_warm and self.num_steps - self.chosen_at >= config.select_interval
            )
            chooses = is_due and 0 < config.topk < 1
            for one in self.of:
                one.end_window()
                if is_warm or chooses or not config.overlap:
                    one.apply_late()
                if chooses:
                    one.choose(one.weight.grad)
            if chooses:
                self.chosen_at = self.num_steps

    def finish(self) -> None:
        """Apply all that is kept back."""
        for one in self.of:
            one.end_window()
            one.apply_late()

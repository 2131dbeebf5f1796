"""ZenFlow as its paper's pseudo-code has it, one matrix operation after the other: the oracle of the engine.

Every column has fp32 master and moments. A window's update of deferred columns is computed at its end, and the weights
that forward reads get it one window later, or at once without overlap.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import nn

from lightning_superscale.config import ZenFlowConfig
from lightning_superscale.ops import reference
from lightning_superscale.ops.types import AdamWHyper, AdamWSegment


def columns_of(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[rows, columns], which have the order of the weight's memory; what has one dim is one column."""
    if weight.ndim < 2:
        return tensor.reshape(-1, 1)
    in_memory = tensor.permute(order_in_memory(weight))
    return in_memory.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))


def order_in_memory(weight: torch.Tensor) -> list[int]:
    """The dims of a weight, rows first, the others from the outermost in memory to the innermost."""
    return [0, *sorted(range(1, weight.ndim), key=lambda dim: -weight.stride(dim))]


Share = Literal["split", "whole", "resident"]
"""What the device has of a parameter of several dims: the selected columns, nothing, or all."""


class MatrixByHand:
    """One parameter."""

    def __init__(self, weight: nn.Parameter, config: ZenFlowConfig, share: Share) -> None:
        self.weight, self.config = weight, config
        shape = columns_of(weight, weight).shape
        self.master = weight.detach().float().clone()
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master)
        topk = 1.0 if weight.ndim < 2 else {"resident": 1.0, "whole": 0.0, "split": config.topk}[share]
        num = math.floor(topk * shape[1] + 0.5)
        self.num_selected = num
        self.selected = torch.arange(shape[1]) < num
        self.total, self.rates, self.hyper = torch.zeros_like(self.master), [], None
        self.is_late = None

    def mask(self, selected: torch.Tensor) -> torch.Tensor:
        if self.weight.ndim < 2:
            return selected.expand(self.weight.numel()).reshape(self.weight.shape)
        order = order_in_memory(self.weight)
        in_memory = selected.expand(len(self.weight), -1).reshape([self.weight.shape[dim] for dim in order])
        return in_memory.permute([order.index(dim) for dim in range(len(order))])

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
        norms = columns_of(grad, self.weight).double().square().sum(0)
        chosen = sorted(range(len(norms)), key=lambda j: (-norms[j].item(), j))[: self.num_selected]
        self.selected = torch.isin(torch.arange(len(norms)), torch.tensor(chosen))


class ZenFlowByHand:
    """All parameters of a model."""

    def __init__(self, model: nn.Module, config: ZenFlowConfig, excluded: tuple[str, ...] = ()) -> None:
        self.config = config
        self.of: list[MatrixByHand] = []
        self.num_steps = self.chosen_at = self.window_steps = 0
        self.take(("whole" if name in excluded else "split", p) for name, p in model.named_parameters())

    def take(self, params: Iterable[tuple[Share, nn.Parameter]]) -> None:
        """Step these parameters too."""
        self.of += [MatrixByHand(param, self.config, share) for share, param in params]

    def step(self, hypers: Sequence[AdamWHyper | None]) -> None:
        """Step with each weight's gradient.

        Args:
            hypers: of each weight; None for one that has no gradient in this step.
        """
        config, warmup = self.config, max(1, self.config.warmup_steps)
        self.num_steps += 1
        self.window_steps += 1
        for one, hyper in zip(self.of, hypers, strict=True):
            if hyper is not None:
                one.step(one.weight.grad, hyper)
        is_warm = self.num_steps <= warmup
        if is_warm or self.window_steps == config.update_interval:
            self.window_steps = 0
            is_due = self.num_steps == warmup or (
                not is_warm and self.num_steps - self.chosen_at >= config.select_interval
            )
            chooses = is_due and 0 < config.topk < 1
            for one, hyper in zip(self.of, hypers, strict=True):
                one.end_window()
                if is_warm or chooses or not config.overlap:
                    one.apply_late()
                if chooses and hyper is not None:
                    one.choose(one.weight.grad)
            if chooses:
                self.chosen_at = self.num_steps

    def finish(self) -> None:
        """Apply all that is kept back."""
        for one in self.of:
            one.end_window()
            one.apply_late()

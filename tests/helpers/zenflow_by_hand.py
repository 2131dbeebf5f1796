"""ZenFlow in plain words, one matrix operation after the other: the oracle of the engine.

Every column has fp32 master and moments. A window's update of deferred columns is computed at its end, and the weights
that forward reads get it one step later, with what corrects the delay, or at once without overlap.
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
        self.late = self.chosen_at = None
        self.offset = 0

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

    def place(self, mask: torch.Tensor, new: torch.Tensor) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.where(mask, new.to(self.weight.dtype), self.weight))

    def step(self, grad: torch.Tensor, hyper: AdamWHyper, number: int) -> None:
        """Apply one step's gradient.

        Args:
            number: of the step, from 1.
        """
        self.apply_late()
        warmup, interval = max(1, self.config.warmup_steps), self.config.update_interval
        is_warm, at = number <= warmup, (number - warmup + self.offset) % interval
        begins = number == warmup + 1 or (number > warmup and (at - 1) % interval == 0)
        if begins and (self.chosen_at is None or number - self.chosen_at >= self.config.select_interval):
            self.choose(grad, number)
        mine = self.mask(self.selected)
        self.update(grad, hyper, mine)
        self.place(mine, self.master)
        self.add(grad, hyper, is_all_of_a_window=not self.rates and (is_warm or at == 0))
        if is_warm or at == 0:
            self.end_window(looks_ahead=self.config.overlap and not is_warm)
            if is_warm or not self.config.overlap:
                self.apply_late()

    def add(self, grad: torch.Tensor, hyper: AdamWHyper, *, is_all_of_a_window: bool) -> None:
        scaled = grad.float() * hyper.grad_scale
        if hyper.clip_value is not None:
            scaled = scaled.clamp(-hyper.clip_value, hyper.clip_value)
        self.total = self.total + scaled if self.rates else scaled
        self.is_rounded = self.config.accumulate_on == "device" and not is_all_of_a_window
        self.rates.append(hyper.lr)
        self.hyper = hyper

    def apply_late(self) -> None:
        if self.late is not None:
            self.place(*self.late)
            self.late = None

    def end_window(self, *, looks_ahead: bool) -> None:
        if not self.rates:
            return
        num, rule = len(self.rates), self.config.deferred_lr
        lr = {"linear": sum(self.rates), "sqrt": sum(self.rates) / num * math.sqrt(num)}.get(rule)
        lr = self.rates[-1] * rule if lr is None else lr
        hyper = dataclasses.replace(self.hyper, lr=lr, absorbed=num, grad_scale=1 / num, clip_value=None)
        theirs = self.mask(~self.selected)
        total = self.total.to(self.weight.dtype).float() if self.is_rounded else self.total
        self.update(total, hyper, theirs)
        shown, factor = self.master.clone(), self.config.delay_correction
        if looks_ahead and factor:
            again = dataclasses.replace(hyper, step=hyper.step + num, lr=lr * factor)
            kept = self.exp_avg.clone(), self.exp_avg_sq.clone(), self.master.clone()
            self.update(total, again, theirs)
            shown = self.master
            self.exp_avg, self.exp_avg_sq, self.master = kept
        self.late, self.rates = (theirs, shown), []

    def choose(self, grad: torch.Tensor, number: int) -> None:
        if not 0 < self.num_selected < len(self.selected) or self.weight.ndim < 2:
            return
        self.chosen_at = number
        norms = columns_of(grad).double().square().sum(0)
        chosen = sorted(range(len(norms)), key=lambda j: (-norms[j].item(), j))[: self.num_selected]
        self.selected = torch.isin(torch.arange(len(norms)), torch.tensor(chosen))


class ZenFlowByHand:
    """All parameters of a model."""

    def __init__(self, model: nn.Module, config: ZenFlowConfig, excluded: tuple[str, ...] = ()) -> None:
        self.num_steps = 0
        self.of = [MatrixByHand(p, config, is_split=name not in excluded) for name, p in model.named_parameters()]
        loads = [0] * config.update_interval
        by_size = sorted(zip(self.of, model.named_parameters(), strict=True), key=lambda x: (-x[1][1].numel(), x[1][0]))
        for one, (_, weight) in by_size:
            if config.overlap and one.num_selected < len(one.selected):
                one.offset = min(range(len(loads)), key=lambda at: loads[at])
                loads[one.offset] += weight.numel()

    def step(self, hypers: list[AdamWHyper]) -> None:
        self.num_steps += 1
        for one, hyper in zip(self.of, hypers, strict=True):
            one.step(one.weight.grad, hyper, self.num_steps)

    def finish(self) -> None:
        """Apply all that is kept back, and show the masters."""
        for one in self.of:
            one.apply_late()
            one.end_window(looks_ahead=False)
            one.apply_late()
            one.place(one.mask(~one.selected), one.master)

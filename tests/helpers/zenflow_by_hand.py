"""ZenFlow in plain words, one matrix operation after the other: the oracle of the engine.

Every column has fp32 master and moments. A window's update of deferred columns is computed at its end, and the weights
that forward reads get it one step later, with what corrects the delay, or at once without overlap.
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
from lightning_superscale.ops.state_dtypes import FP32_STATES, StateDtypes
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
"""What the device has of a parameter of several dims: the selected columns, nothing unless all are selected, or all."""


class MatrixByHand:
    """One parameter."""

    def __init__(
        self,
        weight: nn.Parameter,
        config: ZenFlowConfig,
        share: Share,
        name: str = "",
        dtypes: StateDtypes = FP32_STATES,
    ) -> None:
        self.weight, self.config, self.share = weight, config, share
        shape = columns_of(weight, weight).shape
        self.master = weight.detach().to(dtypes.master_of(weight.dtype)).clone()
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.master, dtype=dtypes.moments) for _ in range(2))
        self.lost = torch.zeros_like(self.master) if dtypes.compensates(weight.dtype) else None
        self.rounding = dtypes.rounding(weight.dtype, name, 0)
        all_if_all = float(config.topk == 1 and name not in (config.exclude or ()))
        topk = 1.0 if weight.ndim < 2 else {"resident": 1.0, "whole": all_if_all, "split": config.topk}[share]
        num = math.floor(topk * shape[1] + 0.5)
        self.num_selected = num
        self.selected = torch.arange(shape[1]) < num
        self.total, self.rates, self.hyper = torch.zeros_like(self.master), [], None
        self.late = self.chosen_at = None
        self.offset = 0

    def mask(self, selected: torch.Tensor) -> torch.Tensor:
        if self.weight.ndim < 2:
            return selected.expand(self.weight.numel()).reshape(self.weight.shape)
        order = order_in_memory(self.weight)
        in_memory = selected.expand(len(self.weight), -1).reshape([self.weight.shape[dim] for dim in order])
        return in_memory.permute([order.index(dim) for dim in range(len(order))])

    def update(self, grad: torch.Tensor, hyper: AdamWHyper, mask: torch.Tensor) -> None:
        """Step the columns of the mask, with all the others beside them for nothing.

        Column by column, which matters to the random numbers of stochastic rounding.
        """
        states = [self.master, self.exp_avg, self.exp_avg_sq, *([] if self.lost is None else [self.lost])]
        order = self.order()
        flat = [tensor.permute(order).reshape(-1).clone() for tensor in states]
        segment = AdamWSegment(
            param=flat[0],
            exp_avg=flat[1],
            exp_avg_sq=flat[2],
            grad=grad.permute(order).reshape(-1),
            hyper=hyper,
            rounding=self.rounding,
            compensation=flat[3] if self.lost is not None else None,
        )
        reference.adamw_commit([segment])
        for mine, its in zip(states, flat, strict=True):
            new = its.view([mine.shape[dim] for dim in order]).permute([order.index(dim) for dim in range(mine.ndim)])
            mine.copy_(torch.where(mask, new, mine))

    def order(self) -> list[int]:
        """The dims of the weight as its states have them in memory: rows last, where it is split into columns."""
        by_stride = sorted(range(self.weight.ndim), key=lambda dim: -self.weight.stride(dim))
        is_one_column = self.weight.ndim < 2 or self.share == "whole"
        return by_stride if is_one_column else [*order_in_memory(self.weight)[1:], 0]

    def place(self, mask: torch.Tensor, new: torch.Tensor) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.where(mask, new.to(self.weight.dtype), self.weight))

    def step(self, grad: torch.Tensor, hyper: AdamWHyper | None, number: int) -> None:
        """Apply one step's gradient.

        Args:
            hyper: None without a gradient.
            number: of the step, from 1.
        """
        self.apply_late()
        warmup, interval = max(1, self.config.warmup_steps), self.config.update_interval
        is_warm, at = number <= warmup, (number - warmup + self.offset) % interval
        ends = is_warm or at == 0
        if hyper is not None:
            begins = number == warmup + 1 or (number > warmup and (at - 1) % interval == 0)
            if begins and (self.chosen_at is None or number - self.chosen_at >= self.config.select_interval):
                self.choose(grad, number)
            mine = self.mask(self.selected)
            self.update(grad, hyper, mine)
            self.place(mine, self.master)
            self.add(grad, hyper, is_all_of_a_window=not self.rates and ends)
        if ends:
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
            lost = None if self.lost is None else self.lost.clone()
            kept = self.exp_avg.clone(), self.exp_avg_sq.clone(), self.master.clone(), lost
            self.update(total, again, theirs)
            shown = self.master
            self.exp_avg, self.exp_avg_sq, self.master, self.lost = kept
        self.late, self.rates = (theirs, shown), []

    def choose(self, grad: torch.Tensor, number: int) -> None:
        if not 0 < self.num_selected < len(self.selected) or self.weight.ndim < 2:
            return
        self.chosen_at = number
        norms = columns_of(grad, self.weight).double().square().sum(0)
        chosen = sorted(range(len(norms)), key=lambda j: (-norms[j].item(), j))[: self.num_selected]
        self.selected = torch.isin(torch.arange(len(norms)), torch.tensor(chosen))


class ZenFlowByHand:
    """All parameters of a model."""

    def __init__(
        self,
        model: nn.Module,
        config: ZenFlowConfig,
        excluded: tuple[str, ...] = (),
        dtypes: StateDtypes = FP32_STATES,
    ) -> None:
        self.config, self.dtypes = config, dtypes
        self.of: list[MatrixByHand] = []
        self.names: list[str] = []
        self.num_steps = 0
        self.take((name, "whole" if name in excluded else "split", p) for name, p in model.named_parameters())

    def take(self, params: Iterable[tuple[str, Share, nn.Parameter]]) -> None:
        """Step these parameters too."""
        for name, share, param in params:
            self.names.append(name)
            self.of.append(MatrixByHand(param, self.config, share, name, self.dtypes))

    def stagger(self) -> None:
        """Let windows end in turn: the largest parameters first, each where the least ends so far."""
        loads = [0] * self.config.update_interval
        for _, one in sorted(zip(self.names, self.of, strict=True), key=lambda x: (-x[1].weight.numel(), x[0])):
            if self.config.overlap and one.weight.requires_grad and one.num_selected < len(one.selected):
                one.offset = min(range(len(loads)), key=lambda at: loads[at])
                loads[one.offset] += one.weight.numel()

    def step(self, hypers: Sequence[AdamWHyper | None]) -> None:
        """Step with each weight's gradient.

        Args:
            hypers: of each weight; None for one that has no gradient in this step.
        """
        self.num_steps += 1
        self.stagger()
        for one, hyper in zip(self.of, hypers, strict=True):
            one.step(one.weight.grad, hyper, self.num_steps)

    def finish(self) -> None:
        """Apply all that is kept back, and show the masters."""
        for one in self.of:
            one.apply_late()
            one.end_window(looks_ahead=False)
            one.apply_late()
            one.place(one.mask(~one.selected), one.master)

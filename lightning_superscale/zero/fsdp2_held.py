"""Whole gradients that wait for the step, of parameters whose `param.grad` can only hold rows.

Under manual optimization a user may throw gradients away with `zero_grad()`, between any two backward calls. That is
seen by what lies in `param.grad` meanwhile: a row-sharded mark, full of a number so large that nobody takes it for a
gradient. Whoever changes the mark in place meant to change a gradient, which is refused at the step. It is told by
its content, since torch's foreach operations don't count a DTensor's versions; clipping by value, clipping by norm
and scaling all change a large finite number, and to none of them it becomes zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_superscale.layout import ParamSlice
from lightning_superscale.zero.gradient_dtypes import grad_dtype_of
from lightning_superscale.zero.placed import local_rows_of, placed_like

_MARK = 1e12


class HeldWholes:
    """Whole gradients by sharded parameter, accumulated as autograd would in `param.grad`."""

    def __init__(self) -> None:
        self._grads: dict[nn.Parameter, Tensor] = {}
        self._marks: dict[nn.Parameter, tuple[Tensor, int]] = {}
        self._edited: nn.Parameter | None = None

    def hold(self, param: nn.Parameter, grad: Tensor) -> None:
        """Add to what is held of a parameter, unless that was zeroed since."""
        if param in self._grads and self._is_marked(param):
            self._grads[param] = self._grads[param] + grad
            return
        self._note_edit(param)
        self._grads[param] = grad
        mark = torch.full_like(param.detach(), _MARK, dtype=grad_dtype_of(param))
        param.grad = mark
        self._marks[param] = (mark, mark._version)

    def holds(self, param: nn.Parameter) -> bool:
        return param in self._grads

    def _is_marked(self, param: nn.Parameter) -> bool:
        mark, version = self._marks[param]
        if param.grad is not mark or mark._version != version:
            return False
        rows = local_rows_of(mark).view(-1)
        return rows.numel() == 0 or bool(rows[0])

    def _note_edit(self, param: nn.Parameter) -> None:
        """Remember a mark that was changed in place, but for one that was zeroed."""
        mark, _ = self._marks.get(param, (None, 0))
        if mark is not None and param.grad is mark:
            rows = local_rows_of(mark)
            if bool((rows != rows.new_full((), _MARK)).any()) and bool(rows.any()):
                self._edited = param

    def edited(self) -> nn.Parameter | None:
        """A parameter whose held gradient somebody meant to change in place."""
        for param in self._grads:
            self._note_edit(param)
        return self._edited

    def take_all(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """What was not zeroed since; afterwards nothing is held."""
        for param, grad in list(self._grads.items()):
            if self._is_marked(param):
                param.grad = None
                yield param, grad
        self.clear()

    def clear(self) -> None:
        for param in self._grads:
            if self._is_marked(param):
                param.grad = None
        self._grads.clear()
        self._marks.clear()
        self._edited = None


def show_rows(param: nn.Parameter, rows: Tensor, piece: ParamSlice) -> None:
    """Put this rank's rows of an averaged gradient into `param.grad`, or add them to what is there."""
    if param.grad is not None:
        local_rows_of(param.grad).view(-1).add_(rows)
        return
    param.grad = placed_like(rows.view(piece.local_shape), param)

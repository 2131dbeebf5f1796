"""Whole gradients that wait for the step, of parameters whose `param.grad` can only hold rows.

Under manual optimization a user may throw gradients away with `zero_grad()`, between any two backward calls. That is
seen by what lies in `param.grad` meanwhile: a row-sharded mark, full of NaN so that nobody takes it for a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_superscale.layout import ParamSlice
from lightning_superscale.zero.fsdp2_unit import local_rows_of


class HeldWholes:
    """Whole gradients by sharded parameter, accumulated as autograd would in `param.grad`."""

    def __init__(self) -> None:
        self._grads: dict[nn.Parameter, Tensor] = {}
        self._marks: dict[nn.Parameter, tuple[Tensor, int]] = {}

    def hold(self, param: nn.Parameter, grad: Tensor) -> None:
        """Add to what is held of a parameter, unless that was zeroed since."""
        if param in self._grads and self._is_marked(param):
            self._grads[param] = self._grads[param] + grad
            return
        self._grads[param] = grad
        mark = torch.full_like(param.detach(), float("nan"))
        param.grad = mark
        self._marks[param] = (mark, mark._version)

    def holds(self, param: nn.Parameter) -> bool:
        return param in self._grads

    def _is_marked(self, param: nn.Parameter) -> bool:
        mark, version = self._marks[param]
        return param.grad is mark and mark._version == version

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


def show_rows(param: nn.Parameter, rows: Tensor, piece: ParamSlice) -> None:
    """Put this rank's rows of an averaged gradient into `param.grad`, or add them to what is there."""
    if param.grad is not None:
        local_rows_of(param.grad).view(-1).add_(rows)
        return
    sharded = cast(DTensor, param)
    param.grad = DTensor.from_local(
        rows.view(piece.local_shape),
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=sharded.shape,
        stride=sharded.stride(),
    )

"""Unsharded gradients that wait for the step, of parameters whose `param.grad` can only hold rows.

Under manual optimization a user may throw gradients away with `zero_grad()`, between any two backward calls. That is
seen by what lies in `param.grad` meanwhile: a row-sharded mark, full of a number so large that nobody takes it for a
gradient. Whoever changes the mark in place meant to change a gradient, which is refused at the step. It is told by
its content, since torch's foreach operations don't count a DTensor's versions; clipping by value, clipping by norm
and scaling all change a large finite number, and to none of them it becomes zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from lightning_superscale.comm.dtensor import local_rows_of, placed_like
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.layout.rows import ParamSlice
from lightning_superscale.optim.grad_dtypes import grad_dtype_of
from lightning_superscale.optim.transport import IsScaling
from lightning_superscale.torch_private import version_of
from lightning_superscale.zero.grads_in_param import edited_in_place, unscaled

_MARK = 1e12


class UnshardedGrads:
    """Unsharded gradients by sharded parameter, accumulated as autograd would in `param.grad`."""

    def __init__(self) -> None:
        self._grads: dict[nn.Parameter, Tensor] = {}
        self._marks: dict[nn.Parameter, tuple[Tensor, int]] = {}
        self._edited: nn.Parameter | None = None
        self._unscaled: set[nn.Parameter] = set()
        self._is_scaling: IsScaling | None = None
        self.is_watching = False
        self.has_seen_any = False

    def watch(self, is_scaling: IsScaling | None) -> None:
        """Refuse, at the step, what somebody put into `param.grad`; and losses that were not scaled.

        Args:
            is_scaling: whether a loss is scaled now; None where none ever is.
        """
        self.is_watching, self._is_scaling = True, is_scaling

    def add(self, param: nn.Parameter, grad: Tensor) -> None:
        """Add to the gradient of a parameter, unless that was zeroed since."""
        is_scaled = self._is_scaling is None or self._is_scaling()
        self.has_seen_any = True
        is_more = param in self._grads and self._is_marked(param)
        if not is_scaled:
            self._unscaled.add(param)
        elif not is_more:
            self._unscaled.discard(param)
        if is_more:
            self._grads[param] = self._grads[param] + grad
            return
        self._note_edit(param)
        self._grads[param] = grad
        mark = torch.full_like(param.detach(), _MARK, dtype=grad_dtype_of(param))
        param.grad = mark
        self._marks[param] = (mark, version_of(mark))

    def has(self, param: nn.Parameter) -> bool:
        return param in self._grads

    def _is_marked(self, param: nn.Parameter) -> bool:
        mark, version = self._marks[param]
        if param.grad is not mark or version_of(mark) != version:
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

    def check(self, filled: Iterable[nn.Parameter], fqn_of: Callable[[nn.Parameter], str], world_size: int) -> None:
        """Refuse what can't become a gradient.

        Args:
            filled: parameters whose `param.grad` only backward may fill; looked at where edits are watched.

        Raises:
            SuperScaleError: a gradient that somebody meant to change in place, or one that somebody put there.
        """
        for param in self._grads:
            self._note_edit(param)
        if self._edited is not None:
            raise edited_in_place(fqn_of(self._edited), world_size)
        for param in self._unscaled:
            if self._is_marked(param):
                raise unscaled(fqn_of(param))
        for param in filled if self.is_watching else ():
            mark, _ = self._marks.get(param, (None, 0))
            if param.grad is not None and param.grad is not mark and bool(local_rows_of(param.grad).any()):
                raise _put_by_hand(fqn_of(param))

    def take_all(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Give every gradient that was not zeroed since, and forget all."""
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
        self._unscaled.clear()
        self.has_seen_any = False


def _put_by_hand(fqn: str) -> SuperScaleError:
    """The refusal of rows that somebody put into `param.grad`: they are no rank's gradient."""
    return SuperScaleError(
        f"the gradient of {fqn!r} was put into param.grad by hand. With ZeRO-3 parameters are shards between forward "
        "and step, and gradients are made by backward alone. Multiply the loss, or use ZeRO-2."
    )


def lost_gradients(group: str) -> SuperScaleError:
    """The refusal of a step after a forward that no backward followed."""
    return SuperScaleError(
        f"step() found no gradient of this optimizer's sharded parameters anywhere, though {group!r} ran forward since "
        "the last one. With ZeRO-3 parameters are shards between forward and step, and in no graph: "
        "torch.autograd.grad(loss, parameters) and backward(inputs=parameters) make no gradient of them. Call "
        "loss.backward(), with other parameters frozen (toggle_optimizer), leave out a step without gradients, or use "
        "ZeRO-2."
    )


def show_rows(param: nn.Parameter, rows: Tensor, piece: ParamSlice) -> None:
    """Put this rank's rows of an averaged gradient into `param.grad`, or add them to what is there."""
    if param.grad is not None:
        local_rows_of(param.grad).view(-1).add_(rows)
        return
    param.grad = placed_like(rows.view(piece.local_shape), param)

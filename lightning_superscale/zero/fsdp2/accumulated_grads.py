"""Accumulates unsharded gradients until ranks average them, for parameters whose `param.grad` can only hold rows.

Ranks average them after each manual backward, and add this rank's rows to `param.grad`, as FSDP2 does. Until then,
which may be the step, a user may throw gradients away with `zero_grad()`, between any two backward calls. To see that,
`param.grad` holds a row-sharded mark meanwhile, full of a number so large that no user code takes it for a gradient.
User code that changes the mark in place meant to change a gradient, which is refused at the step. The change is seen by
the mark's content, since torch's foreach operations don't count a DTensor's versions; clipping by value, clipping by
norm and scaling all change a large finite number, and none of them makes it zero.
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
from lightning_superscale.optim.weights.param_classes import follow, name_of_weight
from lightning_superscale.torch_private import version_of
from lightning_superscale.zero.grads_in_param import edited_in_place, unscaled

_MARK = 1e12


class UnshardedGrads:
    """Unsharded gradients by sharded parameter, accumulated as autograd would in `param.grad`.

    Attributes:
        is_watching: whether `watch` was called.
        has_seen_any: whether any gradient was added since the last `clear`, even if it was zeroed afterwards.
    """

    def __init__(self) -> None:
        self._grads: dict[nn.Parameter, Tensor] = {}
        self._marks: dict[nn.Parameter, tuple[Tensor, int]] = {}
        self._earlier: dict[nn.Parameter, Tensor] = {}  # rows of averages whose place a mark has taken
        self._shown: set[nn.Parameter] = set()
        self._edited: nn.Parameter | None = None
        self._unscaled: set[nn.Parameter] = set()
        self._is_scaling: IsScaling | None = None
        self.is_watching = False
        self.has_seen_any = False

    def watch(self, is_scaling: IsScaling | None) -> None:
        """Let `check` refuse gradients that user code put into `param.grad`, and gradients of unscaled losses.

        Args:
            is_scaling: whether a backward that runs now is one of a scaled loss; None where losses are not scaled.
        """
        self.is_watching, self._is_scaling = True, is_scaling

    def add(self, param: nn.Parameter, grad: Tensor) -> None:
        """Add `grad`, unsharded, to the gradient of a parameter, or begin a new one if that was zeroed."""
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
        if param.grad is not None and param in self._shown and param not in self._marks:
            self._earlier[param] = param.grad
        else:  # zeroed since, or never there
            self._earlier.pop(param, None)
        mark = torch.full_like(param.detach(), _MARK, dtype=grad_dtype_of(param))
        param.grad = mark
        self._marks[param] = (mark, version_of(mark))

    def has(self, param: nn.Parameter) -> bool:
        """Whether a gradient of the parameter was added in this step, also one that was zeroed since."""
        return param in self._grads

    def show(self, param: nn.Parameter, rows: Tensor, piece: ParamSlice) -> None:
        """Add this rank's rows of an average, 1D, to `param.grad`, where user code may look at them and change them."""
        show_rows(param, rows, piece)
        self._shown.add(param)

    def shown(self, param: nn.Parameter) -> Tensor | None:
        """This rank's rows of a parameter's averaged gradient, which user code may have changed; None without."""
        return param.grad if param in self._shown else None

    def _is_marked(self, param: nn.Parameter) -> bool:
        mark, version = self._marks[param]
        if param.grad is not mark or version_of(mark) != version:
            return False
        rows = local_rows_of(mark).view(-1)
        return rows.numel() == 0 or bool(rows[0])

    def _note_edit(self, param: nn.Parameter) -> None:
        """Remember a parameter whose mark was changed in place, unless it was zeroed."""
        mark, _ = self._marks.get(param, (None, 0))
        if mark is not None and param.grad is mark:
            rows = local_rows_of(mark)
            if bool((rows != rows.new_full((), _MARK)).any()) and bool(rows.any()):
                self._edited = param

    def check(self, filled: Iterable[nn.Parameter], fqn_of: Callable[[nn.Parameter], str], world_size: int) -> None:
        """Refuse gradients that user code changed or made by hand.

        Args:
            filled: parameters whose `param.grad` only backward may fill; checked if `watch` was called.

        Raises:
            SuperScaleError: a mark was changed in place, a gradient came of an unscaled loss where losses are scaled,
                or `param.grad` holds a gradient that no backward made; names the parameter.
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
            if param in self._shown or param.grad is None or param.grad is mark:
                continue
            if bool(local_rows_of(param.grad).any()):
                raise _put_by_hand(fqn_of(param))

    def take_all(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield every gradient that was not zeroed, with its parameter; then forget all.

        Rows of earlier averages are in `param.grad` again.
        """
        for param, grad in list(self._grads.items()):
            if self._is_marked(param):
                param.grad = self._earlier.get(param)
                yield param, grad
        self.clear()

    def clear(self) -> None:
        """Forget all gradients, and remove their marks from `param.grad`."""
        for param in self._grads:
            if self._is_marked(param):
                param.grad = None
        self._grads.clear()
        self._marks.clear()
        self._earlier.clear()
        self._edited = None
        self._unscaled.clear()
        self.has_seen_any = False


def _put_by_hand(fqn: str) -> SuperScaleError:
    """The refusal of rows that user code put into `param.grad`: they are no rank's gradient."""
    return SuperScaleError(
        f"the gradient of {fqn!r} was put into param.grad by hand. With ZeRO-3 parameters are shards between forward "
        "and step, and gradients are made by backward alone. Multiply the loss, or use ZeRO-2."
    )


def lost_gradients(group: str) -> SuperScaleError:
    """The refusal of a step without gradients, although the group named `group` ran forward since the last step."""
    return SuperScaleError(
        f"step() found no gradient of this optimizer's sharded parameters anywhere, though {group!r} ran forward since "
        "the last one. With ZeRO-3 parameters are shards between forward and step, and in no graph: "
        "torch.autograd.grad(loss, parameters) and backward(inputs=parameters) make no gradient of them. Call "
        "loss.backward(), with other parameters frozen (toggle_optimizer), leave out a step without gradients, or use "
        "ZeRO-2."
    )


def show_rows(param: nn.Parameter, rows: Tensor, piece: ParamSlice) -> None:
    """Put this rank's rows of an averaged gradient, 1D, into `param.grad`, or add them to a gradient there."""
    if param.grad is not None:
        local_rows_of(param.grad).view(-1).add_(rows)
        return
    param.grad = follow(placed_like(rows.view(piece.local_shape), param), name_of_weight(param))

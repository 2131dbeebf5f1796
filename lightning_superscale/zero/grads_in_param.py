"""Averages, hands over and guards gradients that stay in `param.grad` until the step, on several ranks.

Under automatic optimization these gradients are averaged over ranks right after backward, as under DDP, when user
code may look at them. Under manual optimization any number of backward calls may follow, on any rank, so the
gradients are this rank's share until the step; user code may read them, and changing them in place is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.optim.grad_dtypes import AS_WEIGHTS, GradientDtypes, grad_dtype_of
from lightning_superscale.optim.transport import IsScaling
from lightning_superscale.optim.unit import DeltaSink, GradientDelta
from lightning_superscale.torch_private import version_of
from lightning_superscale.zero.buckets.unit import BucketUnit
from lightning_superscale.zero.reducer import average_unsharded


class _Noted(NamedTuple):
    """A gradient as autograd last wrote it.

    Attributes:
        identity: `id` of the gradient tensor.
        version: the tensor's version after that write.
        is_scaled: whether every gradient that was added up in it came of a scaled loss.
    """

    identity: int
    version: int
    is_scaled: bool


class GradsInParam:
    """One transport's handling of gradients in `param.grad` on several ranks.

    Args:
        ranks: collectives with the other ranks, and the agreement with them.
        label: names the optimizer in errors.
        dtypes: of gradients on their way to other ranks.
    """

    def __init__(self, ranks: Communicator, label: str, dtypes: GradientDtypes = AS_WEIGHTS) -> None:
        self._ranks = ranks
        self._dtypes = dtypes
        self._label = f"{label}, gradients kept in param.grad"
        self._num_averages = 0
        self._hooks: dict[nn.Parameter, RemovableHandle] = {}
        self._is_watching = False
        self._noted: dict[nn.Parameter, _Noted] = {}
        self._is_scaling: IsScaling | None = None

    def average(self, units: Sequence[BucketUnit]) -> None:
        """Overwrite `param.grad` with the average over ranks. Every rank calls it.

        A rank without a gradient counts as zeros; parameters that no rank has a gradient of keep None.
        """
        agreement, flag_of = self._ranks.agreement, self._ranks.flag_of
        vector = agreement.new_flags()
        flags = agreement.flags_of(vector)
        for unit in units:
            for param in unit.params:
                if param.grad is not None:
                    flags[flag_of[param]] = 1
        agreed = agreement.agree(vector, label=self._label, step=self._num_averages).tolist()
        self._num_averages += 1
        for unit in units:
            present = [i for i, param in enumerate(unit.params) if agreed[flag_of[param]]]
            if present:
                self._average_unit(unit, present)

    def _average_unit(self, unit: BucketUnit, present: Iterable[int]) -> None:
        grads = {}
        for i in present:
            param = unit.params[i]
            if param.grad is None:
                param.grad = torch.zeros_like(param, dtype=grad_dtype_of(param))
            grads[i] = param.grad.detach().reshape(-1)
        dtype = self._dtypes.reduced(unit.params[0])
        averaged = average_unsharded(self._ranks, grads, unit.full.slices, unit.full.shard_numel, dtype)
        for i, grad in grads.items():
            piece = unit.full.slices[i]
            grad.copy_(averaged[piece.offset : piece.offset + piece.numel])

    def hand_over(self, units: Sequence[BucketUnit], sink: DeltaSink) -> None:
        """Give the sink this rank's rows of averaged gradients. Every rank calls it."""
        for unit in units:
            slices = []
            for i, param in enumerate(unit.params):
                if param.grad is not None:
                    start = unit.shard.slices[i].global_offset
                    rows = param.grad.detach().reshape(-1)[start : start + unit.shard.slices[i].numel]
                    slices.append((i, rows))
            if slices:
                sink(GradientDelta(unit, slices))

    # Edits

    def watch(self, params: Iterable[nn.Parameter], is_scaling: IsScaling | None = None) -> None:
        """From now on, note how autograd wrote the gradients of these parameters, for `check`.

        Args:
            is_scaling: whether a backward that runs now is one of a scaled loss; None where losses are not scaled.
        """
        self._is_scaling, self._is_watching = is_scaling, True
        self.follow(params)

    def follow(self, params: Iterable[nn.Parameter]) -> None:
        """Watch more parameters, if `watch` was called; gradients that they have already count as unedited."""
        for param in params if self._is_watching else ():
            if param not in self._hooks:
                self._hooks[param] = param.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]
                if param.grad is not None:
                    self._noted[param] = _Noted(id(param.grad), version_of(param.grad), True)

    def _note(self, param: nn.Parameter) -> None:
        grad, before = param.grad, self._noted.get(param)
        if grad is None:
            return
        is_scaled = self._is_scaling is None or self._is_scaling()
        if before is not None and before.identity == id(grad) and before.version < version_of(grad):  # it was added to
            is_scaled = is_scaled and before.is_scaled
        self._noted[param] = _Noted(id(grad), version_of(grad), is_scaled)

    def check(self, param: nn.Parameter, fqn: str) -> None:
        """Refuse a gradient of an unscaled loss, where losses are scaled, and on several ranks one that was edited.

        A gradient is edited if its version changed since autograd wrote it; one that was zeroed is accepted.

        Raises:
            SuperScaleError: the gradient is refused; names the parameter and what to do instead.
        """
        grad, noted = param.grad, self._noted.get(param)
        if grad is None:
            return
        is_known = noted is not None and noted.identity == id(grad)
        if self._is_scaling is not None and not (noted is not None and is_known and noted.is_scaled):
            raise unscaled(fqn)
        if self._ranks.mesh.is_single or noted is None or not is_known or noted.version == version_of(grad):
            return
        if bool(grad.any()):
            raise edited_in_place(fqn, self._ranks.mesh.world.size)

    def close(self) -> None:
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()


def edited_in_place(fqn: str, world_size: int) -> SuperScaleError:
    """The refusal of a gradient that user code changed before ranks averaged it."""
    return SuperScaleError(
        f"the gradient of {fqn!r} was changed in place between backward and step. On {world_size} ranks it is only "
        "this rank's share, and the average is taken at the step. Clip with self.clip_gradients(optimizer, ...), and "
        "scale the loss instead of gradients."
    )


def unscaled(fqn: str) -> SuperScaleError:
    """The refusal of a gradient that the step would unscale, though a loss that it came of was not scaled."""
    return SuperScaleError(
        f"the gradient of {fqn!r} was not made by self.manual_backward(), which scales losses for fp16; the step would "
        "divide it by the scale. Call self.manual_backward(loss), or self.manual_backward(tensor, gradient=grad) with "
        "a grad that is not scaled: one that came of a scaled loss has to be divided by "
        "trainer.precision_plugin.scaler.scale."
    )

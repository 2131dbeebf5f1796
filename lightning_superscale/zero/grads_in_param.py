"""Gradients that stay in `param.grad` until the step, on several ranks: what users see there, and may do to it.

Under automatic optimization they are averaged over ranks right after backward, as under DDP, when something of
the user's may look at them. Under manual optimization any number of backward calls may follow, on any rank, so
they are this rank's share until the step; reading them is fine, changing them in place is refused.
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
        identity: of the tensor.
        version: how often it had been written then.
        is_scaled: whether all that was added up in it came of scaled losses.
    """

    identity: int
    version: int
    is_scaled: bool


class GradsInParam:
    """One transport's handling of gradients in `param.grad` on several ranks."""

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
        """Overwrite `param.grad` with the average over ranks; parameters without one anywhere keep None."""
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
        self._is_scaling, self._is_watching = is_scaling, True
        self.follow(params)

    def follow(self, params: Iterable[nn.Parameter]) -> None:
        """Watch these too, where others are; gradients that they have already pass for what they should be."""
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
        """Refuse a gradient that nobody scaled, where losses are scaled, and on several ranks one that was changed.

        Changed in place, that is, since autograd wrote it; one that was zeroed is fine.

        Raises:
            SuperScaleError: names the parameter and what to do instead.
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
    """The refusal of a gradient that somebody changed before ranks averaged it."""
    return SuperScaleError(
        f"the gradient of {fqn!r} was changed in place between backward and step. On {world_size} ranks it is only "
        "this rank's share, and the average is taken at the step. Clip with self.clip_gradients(optimizer, ...), and "
        "scale the loss instead of gradients."
    )


def unscaled(fqn: str) -> SuperScaleError:
    """The refusal of a gradient that the step would unscale, though no loss of it was scaled."""
    return SuperScaleError(
        f"the gradient of {fqn!r} was not made by self.manual_backward(), which scales losses for fp16; the step would "
        "divide it by the scale. Call self.manual_backward(loss), or self.manual_backward(tensor, gradient=grad) with "
        "a grad that is not scaled: one that came of a scaled loss has to be divided by "
        "trainer.precision_plugin.scaler.scale."
    )

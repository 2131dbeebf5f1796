"""Averages, hands over and guards gradients that stay in `param.grad` until the step, on several ranks.

User code sees what DDP shows. Under automatic optimization gradients are averaged over ranks right after the last
backward of a step, if user code may look at them; under manual optimization after each `manual_backward`
([Note: Averages of manual backward] in manual_averages.py). Gradients that no such call made (`loss.backward()`, those
put in by hand) are this rank's share until the step averages them; changing a share in place is refused there.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.ops.events import Event
from lightning_superscale.optim.grad_dtypes import AS_WEIGHTS, GradientDtypes, grad_dtype_of
from lightning_superscale.optim.transport import IsScaling
from lightning_superscale.optim.unit import DeltaSink, GradientDelta, flattened, shaped
from lightning_superscale.torch_private import version_of
from lightning_superscale.zero.buckets.unit import BucketUnit


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
        self._averaged: dict[nn.Parameter, weakref.ref[Tensor]] = {}
        self._noted: dict[nn.Parameter, _Noted] = {}
        self._is_scaling: IsScaling | None = None

    def average(self, units: Sequence[BucketUnit]) -> None:
        """Overwrite this rank's shares in `param.grad` with averages over ranks. Every rank calls it.

        A rank without a gradient counts as zeros; parameters that no rank has a gradient of keep None.
        """
        agreement = self._ranks.agreement
        vector = agreement.new_flags()
        self.mark_shares(units, agreement.flags_of(vector))
        agreed = agreement.agree(vector, label=self._label, step=self._num_averages)
        self._num_averages += 1
        self.average_marked(units, agreed)

    def mark_shares(self, units: Sequence[BucketUnit], flags: Tensor) -> None:
        """Set the flags of parameters whose gradient is this rank's share."""
        places = [self._ranks.flag_of[p] for unit in units for p in unit.params if self.is_share(p)]
        flags[places] = 1

    def is_share(self, param: nn.Parameter) -> bool:
        """Whether `param.grad` is not an average over ranks: as far as `watch` was called, else if it is there."""
        if param.grad is None:
            return False
        averaged = self._averaged.get(param)
        return averaged is None or averaged() is not param.grad

    def average_marked(self, units: Sequence[BucketUnit], agreed: Tensor) -> None:
        """Overwrite gradients with averages over ranks. Every rank calls it with equal flags.

        Args:
            agreed: flags of the parameters that any rank has a share of.
        """
        is_marked = agreed.tolist()
        under_way: deque[tuple[BucketUnit, list[int], Event[Tensor]]] = deque()
        for unit in units:
            marked = [i for i, param in enumerate(unit.params) if is_marked[self._ranks.flag_of[param]]]
            if marked:
                under_way.append((unit, marked, self._reduce_scatter(unit, marked)))
            if len(under_way) > 1:  # one more unit is reduced while one is gathered
                self._show(*under_way.popleft())
        while under_way:
            self._show(*under_way.popleft())

    def _reduce_scatter(self, unit: BucketUnit, marked: Sequence[int]) -> Event[Tensor]:
        specs = [piece.spec for piece in unit.full.slices]
        grads = {i: flattened(g.detach(), specs[i]) for i in marked if (g := unit.params[i].grad) is not None}
        scale, dtype = 1.0 / self._ranks.mesh.data.size, self._dtypes.reduced(unit.params[0])
        return self._ranks.shard.reduce_scatter(unit.packed(grads, scale, dtype))

    def _show(self, unit: BucketUnit, marked: Sequence[int], reduced: Event[Tensor]) -> None:
        """Gather the averages of one unit from all ranks, and put them into `param.grad`."""
        rows = self._ranks.replicate.all_reduce(reduced.wait()).wait()
        averages = unit.grads_of_rows(rows, self._ranks.shard)
        for i in marked:
            param, share = unit.params[i], unit.params[i].grad
            grad = share
            if grad is None or grad.requires_grad:  # a graph of it may need the share
                grad = param.grad = torch.empty_like(param, dtype=grad_dtype_of(param), requires_grad=False)
            grad.copy_(shaped(averages[i], unit.full.slices[i]))
            if self._is_watching:
                was = self._noted.get(param)
                is_scaled = share is None or (was is not None and was.identity == id(share) and was.is_scaled)
                self._noted[param] = _Noted(id(grad), version_of(grad), is_scaled)
                self._averaged[param] = weakref.ref(grad)

    def hand_over(self, units: Sequence[BucketUnit], sink: DeltaSink, *, but: Collection[nn.Parameter] = ()) -> None:
        """Give the sink this rank's rows of averaged gradients. Every rank calls it.

        Args:
            but: parameters whose gradients went another way.
        """
        for unit in units:
            slices = []
            for i, param in enumerate(unit.params):
                if param.grad is not None and param not in but:
                    start = unit.shard.slices[i].global_offset
                    whole = flattened(param.grad.detach(), unit.full.slices[i].spec)
                    rows = whole[start : start + unit.shard.slices[i].numel]
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
        self._averaged.pop(param, None)
        if grad is None:
            return
        is_scaled = self._is_scaling is None or self._is_scaling()
        if before is not None and before.identity == id(grad) and before.version < version_of(grad):  # it was added to
            is_scaled = is_scaled and before.is_scaled
        self._noted[param] = _Noted(id(grad), version_of(grad), is_scaled)

    def check(self, param: nn.Parameter, fqn: str) -> None:
        """Refuse a gradient of an unscaled loss, where losses are scaled, and on several ranks one that was edited.

        A gradient is edited if its version changed since autograd wrote it; one that was zeroed is accepted, and so is
        an average, which is the same on all ranks.

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
        if not self.is_share(param):
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
        "this rank's share, since no self.manual_backward() averaged it, and the average is taken at the step. Call "
        "self.manual_backward(loss), clip with self.clip_gradients(optimizer, ...), or scale the loss instead."
    )


def unscaled(fqn: str) -> SuperScaleError:
    """The refusal of a gradient that the step would unscale, though a loss that it came of was not scaled."""
    return SuperScaleError(
        f"the gradient of {fqn!r} was not made by self.manual_backward(), which scales losses for fp16; the step would "
        "divide it by the scale. Call self.manual_backward(loss), or self.manual_backward(tensor, gradient=grad) with "
        "a grad that is not scaled: one that came of a scaled loss has to be divided by "
        "trainer.precision_plugin.scaler.scale."
    )

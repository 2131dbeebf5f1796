"""Sums of deferred gradients over the steps of a window.

[Note: Sums] A window's gradients add up in fp32, on the host, to which every step then sends its gradient; or on the
device, which then sends one sum per window, rounded to the weights' dtype. A window of one step is sent as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_superscale.layout.memory import Home
from lightning_superscale.offload.engine import OffloadContext
from lightning_superscale.offload.link.dtype import add_late_gradient, dtype_on_link, send_gradient
from lightning_superscale.offload.link.link import LinkEvent
from lightning_superscale.offload.zenflow.split_slice import SentBytes, SplitSlice
from lightning_superscale.ops.cpu.flat import accumulate, cast_scale
from lightning_superscale.optim.param_update import GradScale
from lightning_superscale.optim.unit import ShardUnit


class GradientSums:
    """The sums of one unit's deferred gradients, one per slice.

    Args:
        numel: elements of deferred columns, with the gaps between slices.
        home: where gradients add up.
        sent: counts the bytes that go to the host.

    Attributes:
        total: fp32 [numel], at home.
        arrived: [numel] on the host, of the dtype on the link: a step's gradients, or with sums on the device those of
            windows that ended.
    """

    def __init__(self, unit: ShardUnit, context: OffloadContext, numel: int, home: Home, sent: SentBytes) -> None:
        self.home = home
        self._sent = sent
        self._dtype = unit.dtype
        self._link = context.link
        self._pool = context.pool
        on_link = dtype_on_link(context.link_dtype, unit.dtype)
        self.arrived = context.arena.zeros(numel, on_link, is_pinned=context.is_pinned)
        self.total = (
            context.arena.zeros(numel, torch.float32, is_pinned=False)
            if home == "host"
            else torch.zeros(numel, device=unit.device)
        )

    @property
    def of_ended(self) -> Tensor:
        """The host's buffer of the gradients of windows that have ended."""
        return self.total if self.home == "host" else self.arrived

    def take(self, one: SplitSlice, grad: Tensor) -> None:
        """Take one more gradient of a step, 1D, of a slice's deferred columns."""
        here = one.deferred_of(self.arrived)
        if self.home == "device":
            one.deferred_grad = grad if one.deferred_grad is None else one.deferred_grad + grad
        elif one.arrival is None:
            self._send(one, grad)
        else:
            self._sent.pending += here.nbytes
            add_late_gradient(self._link, here, grad, self._dtype, one.arrival)

    def take_arrival(self, one: SplitSlice) -> LinkEvent | None:
        """The copy of gradients that a thread of the host waits for; None without one."""
        arrival, one.arrival = one.arrival, None
        return arrival

    def absorb(self, one: SplitSlice, scale: float, clip_value: float | None, *, is_first: bool) -> None:
        """Add the gradient that arrived to its window's sum on the host, scaled and then clipped.

        Args:
            is_first: the window has no gradient of this slice yet; its buffer holds an older one.
        """
        arrived, total = one.deferred_of(self.arrived), one.deferred_of(self.total)
        if clip_value is not None:
            arrived, scale = (arrived.float() * scale).clamp_(-clip_value, clip_value), 1.0
        if is_first:
            cast_scale(total, arrived, scale, pool=self._pool)
        else:
            accumulate(total, arrived, scale, pool=self._pool)

    def absorb_on_device(self, one: SplitSlice, scale: GradScale, clip_value: float | None, *, is_first: bool) -> None:
        """Add this step's gradient to its window's sum on the device, scaled and then clipped."""
        grad, one.deferred_grad = one.deferred_grad, None
        if grad is None:
            return
        scaled = grad.float() * scale
        if clip_value is not None:
            scaled.clamp_(-clip_value, clip_value)
        total = one.deferred_of(self.total)
        if is_first:
            total.copy_(scaled)
        else:
            total.add_(scaled)

    def send(self, one: SplitSlice) -> None:
        """Send a window's sum from the device to the host."""
        if one.layout.deferred_numel:
            self._send(one, one.deferred_of(self.total))

    def send_unscaled(self, one: SplitSlice) -> None:
        """Send this step's gradient from the device to the host, where it is all of a window."""
        grad, one.deferred_grad = one.deferred_grad, None
        if grad is not None:
            self._send(one, grad)

    def _send(self, one: SplitSlice, grad: Tensor) -> None:
        here = one.deferred_of(self.arrived)
        self._sent.pending += here.nbytes
        one.arrival = send_gradient(self._link, here, grad, self._dtype)

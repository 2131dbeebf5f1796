"""Gathers the weights of FSDP2's groups by this package's collectives, on their own process group, in checked order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_superscale.comm.collectives import AxisCollectives
from lightning_superscale.zero.fsdp2.gather_order import GatherOrder, OrderDeparted, Patience

_FIRST_PAUSE_S = 20e-6
_LONGEST_PAUSE_S = 1e-3


class GroupGather:
    """The all-gather of one FSDP2 group, for `FSDPModule.set_custom_all_gather`.

    Args:
        collectives: of the axis on which weights are gathered.
        order: checks that every rank gathers the same group next.
        name: name of the group's module, for errors.
        joined: raises an error through the step's agreement, in which the other rank waits.
    """

    def __init__(
        self, collectives: AxisCollectives, order: GatherOrder, name: str, joined: Callable[[OrderDeparted], None]
    ) -> None:
        self._collectives = collectives
        self._order = order
        self._name = name
        self._joined = joined

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new buffer for FSDP2 to gather from or into."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Gather `input_tensor` of every rank into `output_tensor`, whatever `async_op` says. Every rank calls it.

        Work that is queued on the current stream after the return sees the result.

        Raises:
            OrderDeparted: another rank gathers another group, or is at the step.
        """
        try:
            self._order.enter(self._name)
            self._gather(output_tensor, input_tensor)
        except OrderDeparted as error:
            if error.is_joined:
                self._joined(error)
            raise

    def _gather(self, output: Tensor, own: Tensor) -> None:
        packed = output.view(self._collectives.axis.size, -1)
        here = packed[self._collectives.axis.rank]
        if here.data_ptr() != own.data_ptr():
            here.copy_(own)
        pending = self._collectives.all_gather(packed, is_polled=True)
        if self._collectives.runs_on_host:
            patience, pause = Patience(), _FIRST_PAUSE_S
            with self._order.waiting(self._name):
                while not pending.is_complete():
                    if patience.should_look():
                        self._order.look(self._name)
                    self._order.raise_if_failed()
                    time.sleep(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE_S)
        pending.wait()

"""Averages gradients over ranks after each `manual_backward`, where user code looks at them.

[Note: Averages of manual backward] Under manual optimization user code may do anything between a backward and the
step: clip, add a perturbation and run backward again, look for NaN. Under DDP it finds averages there. So after each
`manual_backward` the gradients that it changed are averaged in `param.grad`, and a later backward adds its own share to
that: the next average is of the sum, as DDP's, and what is no share any more is not sent again.

Ranks may run different numbers of backward calls, where DDP hangs. A rank at a step therefore agrees with the others
before it takes gradients: as long as any rank is at a backward, it joins that average, and agrees again.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.errors import SuperScaleError

_LABEL = "the average of gradients"


class AveragedTransport(Protocol):
    """The members of a transport that `ManualAverages` uses."""

    def mark_shares(self, flags: Tensor) -> None:
        """Set the flags of parameters whose gradient is this rank's share.

        Raises:
            SuperScaleError: a gradient can't be averaged; names the parameter.
        """

    def average_marked(self, agreed: Tensor) -> None:
        """Overwrite the gradients of parameters with a flag with averages over ranks. Every rank calls it."""


class ManualAverages:
    """The averages of all optimizers' gradients under manual optimization, on several ranks with whole weights."""

    def __init__(self, ranks: Communicator) -> None:
        self._ranks = ranks
        self._transports: list[AveragedTransport] = []
        self._num_agreed = 0

    def add(self, transport: AveragedTransport) -> None:
        """Average the gradients of one more transport."""
        self._transports.append(transport)

    def after_backward(self) -> None:
        """Make this rank's shares averages.

        Every rank calls it after a backward, or is on its way to `before_step`.
        """
        agreed, _ = self._agree("the average of gradients after a backward", is_after_backward=True)
        self._average(agreed)

    def before_step(self, what: str) -> Tensor:
        """Join the averages of ranks that run more backward calls, until every rank is at a step.

        Args:
            what: names the step while this rank waits, in errors.

        Returns:
            flags of the parameters that any rank still has a share of.
        """
        while True:
            agreed, is_any_after_backward = self._agree(what, is_after_backward=False)
            if not is_any_after_backward:
                return agreed
            self._average(agreed)

    def _agree(self, what: str, *, is_after_backward: bool) -> tuple[Tensor, bool]:
        agreement = self._ranks.agreement
        vector = agreement.new_flags()
        flags = agreement.flags_of(vector)
        # The second half of the flags is of late gradients, which there are none of here.
        flags[self._ranks.num_params] = int(is_after_backward)
        error: SuperScaleError | None = None
        try:
            for transport in self._transports:
                transport.mark_shares(flags)
        except SuperScaleError as found:
            error = found  # the agreement raises it on all ranks: the others are on their way into it
        agreed = agreement.agree(vector, label=_LABEL, step=self._num_agreed, error=error, what=what)
        self._num_agreed += 1
        return agreed, bool(agreed[self._ranks.num_params])

    def _average(self, agreed: Tensor) -> None:
        for transport in self._transports:
            transport.average_marked(agreed)

"""The protocol of transports, which carry gradients to an optimizer engine and new weights back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from lightning_superscale.optim.bucketing import Grouping, NamedParam
from lightning_superscale.optim.unit import PublishEvent, ShardUnit

IsScaling = Callable[[], bool]
"""Whether a backward that runs now is one of a scaled loss."""


class Transport(Protocol):
    """Carries reduced gradients of one optimizer's parameters to a sink, and new weights back.

    Rules that make every autograd program right (two backward calls, reused blocks, reentrant
    checkpoints, branches, losses with retained graphs):

    1. A backward call is never final; `optimizer.step()` is. Nothing counts used parameters.
    2. Reduction is linear, so a late gradient is one more delta.
    3. Collectives are issued in one order on every rank, whatever the order of its autograd.
    """

    @property
    def units(self) -> Sequence[ShardUnit]:
        """All units, by index."""

    @property
    def is_local(self) -> bool:
        """Whether there is one rank: gradients are used where autograd left them."""

    @property
    def grouping(self) -> Grouping:
        """The grouping that `add_params` follows."""

    @property
    def observed(self) -> Sequence[nn.Parameter]:
        """Parameters in the order in which a gradient of theirs first left during backward; empty when none does."""

    def units_of(self, named_params: Sequence[NamedParam], grouping: Grouping) -> list[list[NamedParam]]:
        """Members of the units that `add_params` would make with this grouping.

        Args:
            named_params: in registration order.
        """

    def add_params(self, named_params: Sequence[NamedParam]) -> Sequence[ShardUnit]:
        """Move more parameters into units; returns the new units, whose indices follow the known ones."""

    def regroup(self, grouping: Grouping) -> None:
        """Forget all units, between steps; the next `add_params` makes new ones of them. Every rank calls it."""

    def place_of(self, param: nn.Parameter) -> tuple[ShardUnit, int] | None:
        """The unit of a parameter and its index there, or None when no unit holds it."""

    def stream(self) -> None:
        """From now on, take gradients during the last backward of a step rather than at the step."""

    def watch_edits(self, is_scaling: IsScaling | None = None) -> None:
        """Refuse, at the step, gradients in `param.grad` that user code changed in place on several ranks.

        Args:
            is_scaling: given where losses are scaled: refuse also gradients that were made while it returned False.
        """

    def average_grads(self) -> None:
        """Make gradients that are kept in `param.grad` averages over ranks. Every rank calls it after backward."""

    def blocked(self) -> AbstractContextManager[None]:
        """While open, more micro-batches of the same step follow."""

    def holding(self) -> AbstractContextManager[None]:
        """While open, gradients stay where the user's `zero_grad()` finds them, also those that would be streamed.

        For a backward that user code runs on its own before the one of the step.
        """

    def rehearsal(self) -> AbstractContextManager[None]:
        """While open, a backward and `collect` leave nothing to the steps after them: no order, count or observation.

        For gradients that are measured and forgotten.
        """

    def collect(self) -> None:
        """Send the sink the gradients that it still lacks. Every rank calls it at the step.

        Raises:
            SuperScaleError: on all ranks when any refuses its gradients; names rank and reason.
        """

    def take_edits(self) -> list[nn.Parameter]:
        """The parameters that user code may have changed, since the last call, without raising their versions.

        Called between a backward and its step, when no new weights are under way.

        Raises:
            SuperScaleError: a parameter was given memory of another shape, dtype or device; names it.
        """

    def discard(self) -> None:
        """Forget gradients of an interrupted step."""

    def publish(self, unit: ShardUnit, event: PublishEvent | None, stepped: Sequence[int]) -> None:
        """Bring new weights of the stepped slices to where forward reads them.

        With an `event` the new weights are on their way into `unit.inbox()`; without, they are in
        `unit.local_rows()`. Every rank calls it for the same units in the same order.

        [Note: Graphs of old weights] A graph that was made before the step refuses to run backward after it, as in
        plain PyTorch: the version of every parameter that the step changed is raised, though no operation wrote
        through the parameter.
        """

    def wait_published(self, units: Iterable[ShardUnit]) -> None:
        """Return when work that is queued from now on sees the new weights of these units."""

    def wait_all_published(self) -> None:
        """Return when work that is queued from now on sees the new weights of all units."""

    def abandon(self) -> None:
        """Forget the step after a rank failed, and wait for nothing that is under way."""

    def close(self) -> None:
        """Remove every hook; parameters own whole weights in a storage of their own again."""

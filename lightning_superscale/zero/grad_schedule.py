"""Decides when gradients leave `param.grad`: in backward, at the step, or at the step after ranks averaged them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import Enum


class Flag:
    """A condition that is true while any `raised()` context is open; contexts may be nested."""

    def __init__(self) -> None:
        self._num_open = 0

    def __bool__(self) -> bool:
        return self._num_open > 0

    @contextmanager
    def raised(self) -> Iterator[None]:
        """While open, the flag is true."""
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1


class Departure(Enum):
    """When the gradients of a step leave for the sink."""

    IN_BACKWARD = "as soon as a unit is complete in the last backward of the step"
    AT_STEP = "at the step; until then they are this rank's own"
    AVERAGED = "at the step; since the end of backward they are averages over ranks"


class NewGrad(Enum):
    """The place of a gradient that backward makes now."""

    LEAVES = "it goes to the reducer"
    ACCUMULATES = "it stays where autograd put it and adds the next micro-batch"
    WAITS = "it waits for the step where the user's zero_grad() finds it"


class GradSchedule:
    """Says when the gradients of one optimizer leave. All transports of the optimizer share one schedule.

    Args:
        no_sync: micro-batches before the last of a step accumulate, so that ranks talk once per step; False lets the
            gradients of each leave.

    Attributes:
        departure: when the gradients of the present step leave.
    """

    def __init__(self, *, no_sync: bool) -> None:
        self.departure = Departure.AT_STEP
        self._no_sync = no_sync
        self._accumulating = Flag()
        self._holding = Flag()

    @property
    def is_streamed(self) -> bool:
        """Whether gradients leave for the reducer during backward."""
        return self.departure is Departure.IN_BACKWARD

    def stream(self) -> None:
        """Let gradients leave during backward, from now on."""
        self.departure = Departure.IN_BACKWARD

    def mark_averaged(self) -> None:
        """Note that ranks have averaged this step's gradients in `param.grad`."""
        self.departure = Departure.AVERAGED

    def end_step(self) -> None:
        """Note that this step's gradients were taken or forgotten: the next ones are this rank's own again."""
        if self.departure is Departure.AVERAGED:
            self.departure = Departure.AT_STEP

    @property
    def new_grad(self) -> NewGrad:
        """The place of a gradient that backward makes now."""
        if self.departure is not Departure.IN_BACKWARD or self._holding:
            return NewGrad.WAITS
        return NewGrad.ACCUMULATES if self._accumulating else NewGrad.LEAVES

    @contextmanager
    def blocked(self, reduce: Callable[[], object]) -> Iterator[None]:
        """While open, more micro-batches of the same step follow.

        Args:
            reduce: reduces the gradients of a micro-batch; called on exit if gradients are streamed without no_sync.
        """
        if self._no_sync:
            with self._accumulating.raised():
                yield
            return
        yield
        if self.is_streamed:
            reduce()

    def holding(self) -> AbstractContextManager[None]:
        """While open, new gradients wait where the user's `zero_grad()` finds them, also those that would leave."""
        return self._holding.raised()

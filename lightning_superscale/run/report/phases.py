"""How the host's time divides over the phases of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

from lightning_superscale.timeline import Timeline

# The first steps warm caches up, and states may move after the first.
WARM_UP_STEPS, LEAST_STEPS = 2, 3


class StepSeconds(NamedTuple):
    """Host seconds of one optimizer step, the mean over `num_steps`.

    Attributes:
        forward, backward: seconds of the model's passes, without waits at gates and stalls of backward.
        exposed: seconds that the step took beyond both.
        stalled: seconds in which the host kept the thread that runs the model waiting.
    """

    forward: float
    backward: float
    exposed: float
    stalled: float
    num_steps: int

    @property
    def stall_share(self) -> float:
        """The share of a step in which the host kept the thread that runs the model waiting, from 0 to 1."""
        return min(1.0, self.stalled / max(self.forward + self.backward + self.exposed, 1e-12))


@dataclass(slots=True)
class PhaseSeconds:
    """Host seconds, summed over `num_steps` optimizer steps.

    Attributes:
        forward: seconds in training steps, including `gates`.
        backward: seconds in the framework's backward calls.
        gates: seconds of forward that waited for weights.
        before: seconds before forward began, in which techniques get ready and weights are awaited.
        step: seconds in optimizer steps, beyond the forward and backward that run inside.
        stalled: seconds of all three in which the host kept the thread that runs the model waiting.
        stalled_backward: those of backward.
        warm: the sums as they were after WARM_UP_STEPS steps; None until then.
    """

    forward: float = 0.0
    backward: float = 0.0
    gates: float = 0.0
    before: float = 0.0
    step: float = 0.0
    stalled: float = 0.0
    stalled_backward: float = 0.0
    num_steps: int = 0
    warm: PhaseSeconds | None = None

    @property
    def inside(self) -> float:
        """Seconds of the phases that may run inside an optimizer step's closure, and are counted there."""
        return self.forward + self.backward + self.before

    @property
    def exposed(self) -> float:
        """Seconds beyond the model's own work of both passes."""
        return self.gates + self.stalled_backward + self.before + self.step

    @contextmanager
    def stalls(self, timeline: Timeline, *, in_backward: bool = False) -> Iterator[None]:
        """Count the stalls in the context, once where such contexts are nested."""
        start, before = timeline.stalled_seconds, self.stalled
        try:
            yield
        finally:
            stalled = timeline.stalled_seconds - start
            self.stalled = before + stalled
            if in_backward:
                self.stalled_backward += stalled

    def end_step(self) -> None:
        """Count an optimizer step, which is over."""
        self.num_steps += 1
        if self.num_steps == WARM_UP_STEPS:
            self.warm = replace(self)

    def steady(self) -> StepSeconds | None:
        """A step's seconds after the warm-up; None before enough steps were taken."""
        warm = self.warm
        if warm is None or self.num_steps < warm.num_steps + LEAST_STEPS:
            return None
        num_steps = self.num_steps - warm.num_steps
        gates = self.gates - warm.gates
        forward = self.forward - warm.forward - gates
        stalled_backward = self.stalled_backward - warm.stalled_backward
        backward = self.backward - warm.backward - stalled_backward
        return StepSeconds(
            forward / num_steps,
            backward / num_steps,
            (self.exposed - warm.exposed) / num_steps,
            (self.stalled - warm.stalled) / num_steps,
            num_steps,
        )

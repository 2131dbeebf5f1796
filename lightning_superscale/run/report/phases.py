"""How the host's time divides over the phases of training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

# The first steps warm caches up, and states may move after the first.
WARM_UP_STEPS, LEAST_STEPS = 2, 3


class StepSeconds(NamedTuple):
    """Host seconds of one optimizer step, the mean over `num_steps`.

    Attributes:
        forward, backward: seconds of the model's passes, without waits at gates.
        exposed: seconds that the step took beyond both.
    """

    forward: float
    backward: float
    exposed: float
    num_steps: int


@dataclass(slots=True)
class PhaseSeconds:
    """Host seconds, summed over `num_steps` optimizer steps.

    Attributes:
        forward: seconds in training steps, including `gates`.
        backward: seconds in the framework's backward calls.
        gates: seconds of forward that waited for weights.
        before: seconds before forward began, in which techniques get ready and weights are awaited.
        step: seconds in optimizer steps, beyond the forward and backward that run inside.
        warm: the sums as they were after WARM_UP_STEPS steps; None until then.
    """

    forward: float = 0.0
    backward: float = 0.0
    gates: float = 0.0
    before: float = 0.0
    step: float = 0.0
    num_steps: int = 0
    warm: PhaseSeconds | None = None

    @property
    def inside(self) -> float:
        """Seconds of the phases that may run inside an optimizer step's closure, and are counted there."""
        return self.forward + self.backward + self.before

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
        exposed = gates + self.before - warm.before + self.step - warm.step
        return StepSeconds(
            forward / num_steps, (self.backward - warm.backward) / num_steps, exposed / num_steps, num_steps
        )

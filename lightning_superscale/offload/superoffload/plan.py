"""Chooses, step by step, how superoffload's passes over the host's memory are done. Every plan gives the same bits.

[Note: When a plan is chosen] At the end of a step, for the next one, from what is known then: the share of steps that
were clipped, how long a step and its backward took, and how long the host's passes took. The link's speed, and the
host's at first, are the hardware profile's, whose measured step need not take the square root that this one does. The
first steps know nothing, and the first ones after a start are nearly always clipped; so nothing is looked at ahead
until there is evidence that it is of use. A choice changes no bits and enters no collective, so each rank makes its
own.

[Note: One memory for both] Where the model is in the optimizer's memory, as in CPU training, the shortest plan is best
whatever the times: every byte that the optimizer moves slows the model. Whether the step's work is then better done
beside the next forward or before it is not a matter of arithmetic either, as both also share caches and Python's lock;
so it is tried ([Note: Trials] in trial.py).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

import torch

from lightning_superscale.offload.planner.choices import HostWork, step_times
from lightning_superscale.offload.planner.forecast import Plan, StepTimes, best_plan
from lightning_superscale.offload.planner.numa import available_cpus
from lightning_superscale.offload.planner.profile import HardwareProfile
from lightning_superscale.offload.superoffload.trial import Trial
from lightning_superscale.ops.cpu.pool import Pool
from lightning_superscale.ops.update import UpdatePath
from lightning_superscale.optim.step_rule import Figure

Speculate = bool | Literal["auto"]
# The clip rate is a mean of the past in which a step weighs at least this much, and more at first; the start counts as
# one clipped step. Without a profile, a step looks ahead where fewer are clipped than pays for a second look.
_WEIGHT, _RARELY = 0.2, 0.3
_REMEMBERED_STEPS = 5


def has_own_cores(device_update: UpdatePath, pool: Pool) -> bool:
    """Whether the host's optimizer works on other cores than the model, so that anything can hide its work.

    Args:
        device_update: the kernel that would step on the model's device.
        pool: the threads of the host's optimizer.
    """
    is_gpu = device_update.num_threads == 0
    return is_gpu or torch.get_num_threads() + pool.num_threads <= len(available_cpus())


@dataclass(slots=True)
class Counts:
    """Numbers of units that were stepped so far in each way.

    Attributes:
        ahead: looked at while backward ran.
        redone: of those, looked at again after the verdict.
        late: looked at after the verdict, and committed later.
        direct: applied after the verdict.
    """

    ahead: int = 0
    redone: int = 0
    late: int = 0
    direct: int = 0


class PlanChooser:
    """Chooses the plan of each next step of one optimizer on this rank.

    Args:
        speculate: `OffloadConfig.speculate`.
        streams: whether gradients leave during backward, so that there is something to look at.
        profile: the measured speeds; None without any.
        has_own_memory: whether the model is in other memory than the optimizer's states, as on a GPU.
        has_own_cores: whether the host's work can run beside the model's.
        clock: seconds.

    Attributes:
        plan: the next step's.
        awaits: whether the thread that runs the model does the next step's work, which is "direct", and goes on when it
            is done; if not, another thread does, behind the next forward.
        clip_rate: share of steps whose gradients got another factor than was expected, from 0 to 1.
        counts: what was done so far.
    """

    def __init__(
        self,
        speculate: Speculate,
        *,
        streams: bool,
        profile: HardwareProfile | None = None,
        has_own_memory: bool = True,
        has_own_cores: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._speculate = speculate
        self._streams = streams
        self._profile = profile
        self.has_own_memory = has_own_memory
        self.has_own_cores = has_own_cores
        self._clock = clock
        self._work = HostWork(num_params=0, link_bytes=0, num_buckets=0)
        self._num_seen = 1
        self._seconds: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED_STEPS)
        self._worked_seconds = self._worked_params = 0.0
        self._stepped_at: float | None = None
        self._backward_at: float | None = None
        self.clip_rate = 1.0
        self.counts = Counts()
        self.plan: Plan = "direct"
        self.awaits = False
        self._trial = Trial()
        self._why = "no step was taken yet"
        self._choose()

    def add_work(self, num_params: int, link_bytes: int) -> None:
        """Count a unit's parameters on the host, and the bytes of their gradients on the link."""
        work = self._work
        self._work = HostWork(
            num_params=work.num_params + num_params,
            link_bytes=work.link_bytes + link_bytes,
            num_buckets=work.num_buckets + 1,
        )

    def note_work(self, seconds: float, num_params: float) -> None:
        """Note how long the host took for passes over so many parameters, in units of those that commit and look."""
        self._worked_seconds = (1 - _WEIGHT / self._work.num_buckets) * self._worked_seconds + seconds
        self._worked_params = (1 - _WEIGHT / self._work.num_buckets) * self._worked_params + num_params

    def note_gradient(self) -> None:
        """Note that a gradient of this step leaves, the first of which begins the backward that the host works in."""
        if self._backward_at is None:
            self._backward_at = self._clock()

    def drop_step(self) -> None:
        """Forget when an interrupted step began."""
        self._backward_at = None

    def end_step(self, *, missed: bool, may_miss: bool) -> None:
        """Note that the verdict of a step is known, and choose the plan of the next one.

        Args:
            missed: whether the verdict's numbers are others than could be expected during backward.
            may_miss: whether anything asked for a clip by norm; without, the next verdict is known before.
        """
        now = self._clock()
        if self._stepped_at is not None:
            begun = now if self._backward_at is None else self._backward_at
            self._seconds.append((now - self._stepped_at, now - begun))
            if not self.has_own_memory:
                self._trial.end_step(now - self._stepped_at)
        self._stepped_at, self._backward_at = now, None
        if missed or may_miss:
            self._num_seen += 1
            self.clip_rate += (float(missed) - self.clip_rate) * max(_WEIGHT, 1 / self._num_seen)
        else:
            self.clip_rate, self._num_seen = 0.0, 1
        self._choose()

    def times(self) -> StepTimes | None:
        """The seconds of a step's parts, as far as this rank's clock tells them; None before two steps.

        A GPU's backward begins later than the launching thread says, so that what is seen is an upper bound of it.
        Forward is taken as half of backward: two FLOPs per parameter and token, where backward has four.
        """
        if self._profile is None or not self._seconds:
            return None
        whole = median(step for step, _ in self._seconds)
        backward = 2 / 3 * whole
        if self._streams:
            backward = min(backward, median(seen for _, seen in self._seconds))
        times = step_times(self._profile, self._work, forward=backward / 2, backward=backward)
        if not self._worked_params:
            return times
        return replace(times, host=self._work.num_params * self._worked_seconds / self._worked_params)

    def _choose(self) -> None:
        self.plan, self._why = self._chosen()
        self.awaits = self.plan == "direct" and self._is_better_awaited()

    def _is_better_awaited(self) -> bool:
        return not self.has_own_memory and self._trial.takes_second

    def _chosen(self) -> tuple[Plan, str]:
        may_look = self._streams and self._speculate is not False
        if may_look and self._speculate is True:
            return "ahead", "speculate=True"
        if not self.has_own_memory:
            return "direct", "the model is in the same memory, and every byte that the optimizer moves slows it"
        clipped = f"{self.clip_rate:.0%} of the last steps were clipped"
        times = self.times()
        if times is not None:
            how = f"a pass of the host takes {times.host * 1e3:.1f} ms of a step of {self._step_ms():.1f} ms"
            return best_plan(times, self.clip_rate, may_look_ahead=may_look), f"{clipped}, and {how}"
        if self._profile is None and may_look and self.clip_rate < _RARELY:
            return "ahead", f"{clipped}, and no hardware profile says how long the host takes"
        return "direct", clipped if self._stepped_at is not None else "no step was taken yet"

    def _step_ms(self) -> float:
        return 1e3 * median(step for step, _ in self._seconds)

    def figures(self) -> Sequence[Figure]:
        """Shares of the units that were stepped so far in each way; see `StepRule.figures`."""
        counts = self.counts
        total = max(counts.ahead + counts.late, counts.redone) + counts.direct
        shares = (
            ("ahead_share", "buckets that were looked at ahead of the verdict", counts.ahead),
            ("redone_share", "buckets that were looked at ahead and then again", counts.redone),
            ("direct_share", "buckets that were stepped directly after the verdict", counts.direct),
        )
        return [Figure(name, text, "share", measured=count / total if total else None) for name, text, count in shares]

    def reasons(self) -> Sequence[str]:
        """What is done now and why, and what was done so far, in words."""
        how = {
            "ahead": "looks at gradients while backward runs, and again where the verdict changes them",
            "early commit": "commits the last gradients before the verdict, and looks at new ones after it",
            "direct": "steps after the verdict, behind the next forward, and commits at once",
        }[self.plan]
        if self.awaits:
            how = "steps after the verdict, before the next forward, and commits at once"
        counts = self.counts
        return (
            f"the host {how}: {self._why}{self._tried()}. Of the units so far {counts.ahead} were looked at ahead, "
            f"{counts.redone} of these again, {counts.late} after the verdict, and {counts.direct} were stepped "
            "directly",
        )

    def _tried(self) -> str:
        if self.has_own_memory or self._trial.medians is None:
            return ""
        behind, before = (f"{1e3 * seconds:.1f} ms" for seconds in self._trial.medians)
        return f"; a step took {behind} where forward began beside the host's work, and {before} where it came after it"

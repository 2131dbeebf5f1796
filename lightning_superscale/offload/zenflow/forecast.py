"""Forecasts the time that ZenFlow's host adds to a step, from the seconds of the step's parts.

[Note: Exposed windows] After each step the host adds up the gradients of all deferred columns, then steps those whose
windows end with it, and sends their weights. It has until the end of the next backward: there the weights are put in
place, and the host's next work begins. What takes longer is waited for there. With sums on the device, a step sends the
sums of windows that end instead, after its backward, and the host has nothing to add.

Assumptions: matrices of equal rank in backward, which makes their gradients at an even pace; one copy at a time each
way; gradients that are scaled by a factor from the device (such as clipping's), which crosses the link after them; a
step of selected columns, and a division of gradients by owner, that take the device no time (estimates add what
`ZenFlowEngine.device_bytes` counts); no selection of columns, which sends gradients after backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from lightning_superscale.config import ZenFlowConfig
from lightning_superscale.offload.engine import Forecast, StepParts
from lightning_superscale.offload.planner.choices import HostWork, step_times
from lightning_superscale.offload.planner.forecast import StepTimes
from lightning_superscale.offload.planner.profile import BYTES_PER_PARAM
from lightning_superscale.offload.zenflow.auto import LONGEST, most_selected
from lightning_superscale.offload.zenflow.state import SplitState
from lightning_superscale.offload.zenflow.windows import Place, Schedule

_NUM_CYCLES = 8
"""After which what one step leaves to the next repeats itself."""
_SUM_BYTES, _PROFILED_BYTES = 4, 2
"""Bytes of a sum, and of a gradient of which the profile has the seconds that adding it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowTimes:
    """Seconds of the parts of ZenFlow's steps by themselves, and which windows end when.

    Attributes:
        forward, backward: the model's, of one step.
        d2h: gradients of all deferred columns to the host.
        adding: the host's, to add these to their windows' sums.
        updating: the host's, to step all deferred columns.
        h2d: weights of all deferred columns to the device.
        num_matrices: number of matrices, whose gradients come one after the other.
        ends: by step of a cycle, the shares of all deferred elements in each matrix whose window ends with it, in the
            order in which the host steps them.
        sums_home: where gradients add up.
        overlap: whether new weights are awaited one step later, and not at once.
    """

    forward: float
    backward: float
    d2h: float
    adding: float
    updating: float
    h2d: float
    num_matrices: int
    ends: Sequence[Sequence[float]]
    sums_home: Literal["host", "device"] = "host"
    overlap: bool = True

    @property
    def model(self) -> float:
        """Seconds of a step without a host."""
        return self.forward + self.backward

    @property
    def is_long_enough(self) -> bool:
        """Whether windows are long enough for what host and link have to do in them, with a fifth to spare."""
        steps = len(self.ends)
        adding, sending = (self.adding, self.d2h) if self.sums_home == "host" else (0.0, self.d2h / steps)
        return steps * self.model >= 1.2 * (steps * (adding + sending) + self.updating + self.h2d)


def shares_ended(deferred: Mapping[Place, int], offsets: Mapping[Place, int], interval: int) -> list[list[float]]:
    """`WindowTimes.ends` of a run.

    Args:
        deferred: elements of each matrix' deferred columns on this rank.
        offsets: what `staggered` gave; none where windows end together.
        interval: number of steps in a window.
    """
    total = sum(deferred.values())
    ended: list[list[float]] = [[] for _ in range(interval)]
    for place in sorted(deferred):
        ended[-offsets.get(place, 0) % interval].append(deferred[place] / total)
    return ended


def window_times(parts: StepParts, schedule: Schedule) -> WindowTimes | None:
    """The seconds of a run's windows by its hardware profile; None where no column is deferred.

    The update of a deferred parameter moves what the profiled step moves: its sum in fp32 is as long as that step's two
    gradients of 16 bits. What adding up takes is measured with gradients of 16 bits, and counted for others by bytes:
    sums are read and written. The first step of a window writes them only, which takes less.
    """
    deferred: dict[Place, int] = {}
    link_bytes = 0
    for state in cast(Sequence[SplitState], parts.states):
        for i, one in enumerate(state.slices):
            if one.layout.deferred_numel:
                deferred[state.unit.index, i] = one.layout.deferred_numel
                link_bytes += one.layout.deferred_numel * state.transfer_dtype.itemsize
    if not deferred:
        return None
    numel = sum(deferred.values())
    whole = step_times(
        parts.profile,
        HostWork(num_params=numel, link_bytes=link_bytes, num_buckets=len(deferred)),
        forward=parts.forward,
        backward=parts.backward,
    )
    moved = (2 * _SUM_BYTES * numel + link_bytes) / ((2 * _SUM_BYTES + _PROFILED_BYTES) * numel)
    return WindowTimes(
        forward=parts.forward,
        backward=parts.backward,
        d2h=whole.d2h,
        adding=parts.profile.accumulate_ns_per_param * 1e-9 * numel * moved,
        updating=whole.host,
        h2d=whole.h2d,
        num_matrices=len(deferred),
        ends=shares_ended(deferred, schedule.offsets, schedule.interval),
        sums_home=schedule.config.accumulate_on,
        overlap=schedule.config.overlap,
    )


def forecast_of(parts: StepParts, schedule: Schedule, *, is_warm: bool) -> Forecast:
    """What the steps of a run should take.

    Args:
        is_warm: whether every column still steps at every step.
    """
    times = window_times(parts, schedule)
    if times is None:
        return Forecast(host=0.0, d2h=0.0, h2d=0.0, why_not="the device steps all columns")
    why_not = "gradients stay in param.grad until the step" if not parts.streams else None
    if is_warm:
        why_not = "in warm-up every column steps at every step"
    steps = len(times.ends)
    is_sum_on_host = times.sums_home == "host"
    return Forecast(
        host=times.updating / steps + (times.adding if is_sum_on_host else 0.0),
        d2h=times.d2h if is_sum_on_host else times.d2h / steps,
        h2d=times.h2d / steps,
        exposed=exposed_seconds(times) if why_not is None else None,
        why_not=why_not,
    )


def predicted_seconds(times: StepTimes, config: ZenFlowConfig) -> float:
    """Seconds by which a step is longer than forward and backward, before there is a run.

    Columns that are deferred are taken to be spread evenly, and windows to end one after the other. What adding up
    takes is counted by its bytes.

    Args:
        times: of a step whose host would step all parameters.
    """
    return exposed_seconds(_windows_of(times, config))


def predicted_work(times: StepTimes, config: ZenFlowConfig) -> float:
    """Seconds of the host's and the link's work in a step, the mean over a window: what it adds where nothing hides it.

    The selection of columns is left out, and what `ZenFlowEngine.device_bytes` counts.

    Args:
        times: of a step whose host would step all parameters.
    """
    window = _windows_of(times, config)
    steps = len(window.ends)
    every_step = window.d2h + window.adding if window.sums_home == "host" else window.d2h / steps
    return every_step + (window.updating + window.h2d) / steps


def _windows_of(times: StepTimes, config: ZenFlowConfig) -> WindowTimes:
    """The windows of a run that has not begun."""
    deferred = 1 - most_selected(config)
    moved = (2 * _SUM_BYTES + _PROFILED_BYTES) / BYTES_PER_PARAM
    intervals = range(1, LONGEST + 1) if config.update_interval == "auto" else [config.update_interval]
    windows = [
        WindowTimes(
            forward=times.forward,
            backward=times.backward,
            d2h=times.d2h * deferred,
            adding=times.host * deferred * moved,
            updating=times.host * deferred,
            h2d=times.h2d * deferred,
            num_matrices=max(1, times.num_buckets),
            ends=[[1 / interval]] * interval,
            sums_home=config.accumulate_on,
            overlap=config.overlap,
        )
        for interval in intervals
    ]
    return next((window for window in windows if window.is_long_enough), windows[-1])


def exposed_seconds(times: WindowTimes) -> float:
    """Seconds by which a step is longer than forward and backward, the mean over a cycle in the steady state."""
    waited: list[float] = []
    left = 0.0
    for _ in range(_NUM_CYCLES):
        waited = []
        for ended in times.ends:
            arrives = left  # at the end of the backward that makes this step's gradients, what is still to be done
            at_end = max(0.0, arrives)
            work = _seconds_of_work(times, ended, at_end)
            at_once = work if ended and not times.overlap else 0.0
            left = work - at_once - times.model
            waited.append(at_end + at_once)
    return sum(waited) / len(waited)


def _seconds_of_work(times: WindowTimes, ended: Sequence[float], waited: float) -> float:
    """Seconds from the beginning of a step's work on the host until its weights are there.

    Args:
        waited: seconds since backward, in which gradients went on to arrive.
    """
    one = 1 / times.num_matrices
    if times.sums_home == "device":
        begins = times.d2h * sum(ended)
    else:
        # For its own copy, or for a link that was busy all through backward.
        last_grad = max(times.d2h * one, times.d2h - times.backward * (1 - one)) - waited
        begins = max(0.0, last_grad) + times.adding
    stepped = sent = begins
    for share in ended:
        stepped += times.updating * share
        sent = max(sent, stepped) + times.h2d * share
    return max(stepped, sent)

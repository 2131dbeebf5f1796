"""Forecasts the time that an optimizer on the host adds to a step, from the seconds of the step's parts.

[Note: Exposed time] Per step the host works through every bucket once, `host`; gradients cross the link during
backward, `d2h`, new weights after the verdict and before the layer that reads them, `h2d`. The host may work from the
first gradient until the last layer's next forward, newest gradient first ([Note: Newest first] in
offload/superoffload/worker.py), so its work is exposed where it exceeds a whole step, not where it exceeds backward
alone. The bucket whose gradient comes last and which the next forward reads first is always exposed: its three hops.
Buckets that stay on the device come last in backward and first in forward, and hide those.

[Note: Three plans] A step with the same bits can do its passes over the host's memory in three ways. What they move, in
bytes per parameter with fp32 states and 16 bits on the link, and what of it the verdict has to come before:

    ahead         commits the last gradient and looks at this one during backward (30); if the verdict then changes
                  the numbers, as a clip does, looks once more (16)
    early commit  commits the last gradient at any time before the verdict (26), and looks at this one after it (16)
    direct        applies this gradient after the verdict, and leaves nothing to commit (28)

Direct steps are done beside the next forward; or before it, where the model is in the same memory and that takes
no longer (offload/superoffload/trial.py).

So direct moves least, and is hidden as long as forward is longer than it. Early commit moves half as much again, but
little of it when forward waits. Ahead needs the verdict for nothing where nothing clips. The plan that is chosen is the
one that moves least of those that leave about as little exposed as the best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Plan = Literal["ahead", "early commit", "direct"]
"""The way of a step's passes over the host's memory; see [Note: Three plans]."""

# The share of a step that a plan may leave exposed beyond the best one, if it moves less: less than steps vary by.
_AS_GOOD = 0.005


@dataclass(frozen=True, slots=True)
class Passes:
    """Time of each pass over the host's memory, relative to the one that commits a gradient and looks at the next.

    Memory bounds all of them, so the times are as the bytes.
    """

    commit: float
    look: float
    direct: float

    @classmethod
    def of_width(cls, link_width: float) -> Passes:
        """The passes over fp32 masters and moments, with so many bytes of a gradient and of a new weight."""
        whole = 24 + 3 * link_width  # masters and moments read and written, two gradients read, a weight written
        return cls((24 + link_width) / whole, (12 + 2 * link_width) / whole, (24 + 2 * link_width) / whole)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds that one step's parts take by themselves.

    Attributes:
        forward, backward: the model's.
        d2h, host, h2d: gradients to the host, the optimizer there, and weights back, of all buckets on the host. The
            optimizer's are those of passes that commit one gradient and look at the next.
        num_buckets: number of buckets on the host, of equal size.
        device_share: share of the model whose states stay on the device.
        passes: the times of other passes over the host's memory.
    """

    forward: float
    backward: float
    d2h: float
    host: float
    h2d: float
    num_buckets: int
    device_share: float = 0.0
    passes: Passes = Passes.of_width(2)


# Times of other passes than one after the verdict, where there is only that one.
_ONE_PASS = Passes(0.0, 0.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSchedule:
    """When an engine's host works, for a simulation of its steps.

    Attributes:
        plan: of its passes over the host's memory.
        passes: their times, relative to `StepTimes.host`.
        waits: whether the host begins when it has all gradients, and the next forward when it has all new weights.
    """

    plan: Plan = "direct"
    passes: Passes = _ONE_PASS
    waits: bool = False


def exposed_seconds(times: StepTimes, plan: Plan = "ahead", clip_rate: float = 0.0) -> float:
    """Seconds by which a step is longer than forward and backward, in the steady state; the mean over steps.

    The result is exact, except where the host is busy all through backward: it may then be off by half a bucket of the
    host's time, because the progress in the bucket under way when backward ends is taken as half.

    Args:
        clip_rate: share of steps whose verdict changes the numbers that were expected, from 0 to 1.
    """
    if plan == "direct":
        return _after_verdict(times, times.passes.direct * times.host)
    if plan == "early commit":
        return _early_commit(times)
    exposed = (1 - clip_rate) * _ahead(times)
    return exposed + clip_rate * _again(times) if clip_rate else exposed


def awaited_seconds(times: StepTimes, work: float) -> float:
    """Seconds by which a step is longer than forward and backward, whose end waits for so many seconds of the host's.

    The host steps and the link uploads at once, after the last gradient; the slower of both is waited for.
    """
    one = 1 / max(1, times.num_buckets)
    late = max(times.d2h * one, times.d2h - times.backward)
    return late + max(work + times.h2d * one, work * one + times.h2d)


def _ahead(times: StepTimes) -> float:
    one = 1 / max(1, times.num_buckets)
    on_host = 1 - times.device_share
    first_grad = times.backward * on_host * one
    late_verdict = _late_gradient(times)
    # A host that is slower than backward is in the middle of a bucket when the last gradient comes.
    in_the_middle = times.host * one / 2 if times.host > times.backward * on_host else 0.0
    last_hops = in_the_middle + (times.host + times.h2d) * one - times.device_share * times.forward
    # From one step's last bucket to the next step's first, the host has nothing to do.
    idle = first_grad + times.forward * on_host * one + (times.d2h + times.h2d) * one
    host_overrun = times.host + idle + in_the_middle - (times.forward + times.backward)
    h2d_overrun = times.h2d - times.forward
    return max(late_verdict + max(0.0, last_hops, h2d_overrun), host_overrun)


def _late_gradient(times: StepTimes) -> float:
    """Seconds from the end of backward to the last gradient's arrival on the host."""
    one = 1 / max(1, times.num_buckets)
    on_host = 1 - times.device_share
    # The last gradient waits for its own copy, or for a link that was busy all through backward.
    first_grad = times.backward * on_host * one
    arrival = max(times.backward * on_host + times.d2h * one, first_grad + times.d2h)
    return max(0.0, arrival - times.backward)


def _after_verdict(times: StepTimes, work: float, first_work: float | None = None) -> float:
    """Exposed seconds where so many seconds of the host's work follow the verdict, in the order of the next forward.

    Args:
        first_work: that of the first bucket, if it takes longer than others: as if all took so long.
    """
    one = 1 / max(1, times.num_buckets)
    on_device = times.device_share * times.forward
    late = _late_gradient(times)
    # Other buckets are worked on while the first one's gradient is missing ([Note: Settling early] in superoffload's
    # worker.py), so that of a late gradient only its own bucket's work is late; but one that was begun is ended.
    others = min(math.ceil(late / (work * one)), times.num_buckets - 1) if work else 0
    begun = max(late, others * work * one)
    first = begun + ((work if first_work is None else first_work) + times.h2d) * one - on_device
    slower = max(max(work, late + work * one) + times.h2d * one, late + work * one + times.h2d)
    last = slower - times.forward + (1 - times.device_share) * times.forward * one
    return max(0.0, first, last)


def _early_commit(times: StepTimes) -> float:
    commit, look = times.passes.commit * times.host, times.passes.look * times.host
    saved = commit + look - times.host  # by a bucket that is committed with its look, because there was no time before
    in_time = times.forward + times.backward
    late = min(1.0, max(0.0, (commit + look - in_time) / saved))
    exposed = _after_verdict(times, look + late * (times.host - look))
    if not exposed or not late:
        return exposed
    # Where forward waits for the looks, commits have backward's time alone.
    late = min(1.0, max(0.0, 1 - times.backward / commit))
    return _after_verdict(times, look + late * (times.host - look))


def _again(times: StepTimes) -> float:
    """Exposed seconds of a step that looked ahead in vain."""
    one = 1 / max(1, times.num_buckets)
    since_first = times.backward * (1 - (1 - times.device_share) * one) - times.d2h * one
    looked = min(1.0, max(0.0, since_first) / times.host) if times.host else 1.0
    work = looked * times.passes.look * times.host + (1 - looked) * times.host
    # The gradient that comes last was not there to look at.
    return _after_verdict(times, work, first_work=times.host)


def bytes_share(passes: Passes, plan: Plan, clip_rate: float) -> float:
    """What a plan moves per step, relative to the pass that commits and looks."""
    if plan == "direct":
        return passes.direct
    return passes.commit + passes.look if plan == "early commit" else 1 + clip_rate * passes.look


def best_plan(times: StepTimes, clip_rate: float, *, may_look_ahead: bool = True) -> Plan:
    """The plan that moves least, of those that leave about as little exposed as the best.

    Args:
        clip_rate: share of steps that looked ahead in vain, or would have, from 0 to 1.
        may_look_ahead: whether a step may look at gradients before the verdict.
    """
    plans: tuple[Plan, ...] = ("direct", "early commit", "ahead")
    plans = plans if may_look_ahead else plans[:2]
    exposed = {plan: exposed_seconds(times, plan, clip_rate) for plan in plans}
    enough = min(exposed.values()) + _AS_GOOD * (times.forward + times.backward)
    as_good = [plan for plan in plans if exposed[plan] <= enough]
    return min(as_good, key=lambda plan: bytes_share(times.passes, plan, clip_rate))


def is_long_enough(times: StepTimes, share: float = 0.01) -> bool:
    """Whether a step hides its optimizer at every clip rate, but for `share` of forward and backward.

    It does if the plan that commits early leaves half of that, as none is chosen that leaves much more. The link has
    backward for gradients and forward for weights; the host has the whole step for what it moves, 42 bytes per
    parameter with 16 bits on the link, and forward for the 16 that follow the verdict. The bucket that is never hidden
    has its three hops, and the end of the look at another one that was begun before its gradient came.
    """
    one = 1 / max(1, times.num_buckets)
    commit, look = times.passes.commit * times.host, times.passes.look * times.host
    last_forward = (1 - times.device_share) * times.forward * one
    begun = max(times.d2h, look)
    never_hidden = (begun + look + times.h2d) * one - times.device_share * times.forward
    return (
        times.d2h <= times.backward * (1 - times.device_share) * (1 - one)
        and max(look, times.h2d) + never_hidden <= times.forward - last_forward
        and commit + look <= times.forward + times.backward
        and never_hidden <= share / 2 * (times.forward + times.backward)
    )

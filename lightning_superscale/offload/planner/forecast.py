"""Forecasts the time that an optimizer on the host adds to a step, from the seconds of the step's parts.

[Note: Exposed time] Per step the host works through every bucket once, `host`; gradients cross the link during
backward, `d2h`, new weights after the verdict and before the layer that reads them, `h2d`. The host may work from the
first gradient until the last layer's next forward, newest gradient first ([Note: Newest first] in
offload/superoffload/worker.py), so its work is exposed where it exceeds a whole step, not where it exceeds backward
alone. The bucket whose gradient comes last and which the next forward reads first is always exposed: its three hops.
Buckets that stay on the device come last in backward and first in forward, and hide those.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds that one step's parts take by themselves.

    Attributes:
        forward, backward: the model's.
        d2h, host, h2d: gradients to the host, the optimizer there, and weights back, of all buckets on the host.
        num_buckets: number of buckets on the host, of equal size.
        device_share: share of the model whose states stay on the device.
    """

    forward: float
    backward: float
    d2h: float
    host: float
    h2d: float
    num_buckets: int
    device_share: float = 0.0


def exposed_seconds(times: StepTimes) -> float:
    """Seconds by which a step is longer than forward and backward, in the steady state.

    The result is exact, except where the host is busy all through backward: it may then be off by half a bucket of the
    host's time, because the progress in the bucket under way when backward ends is taken as half.
    """
    one = 1 / max(1, times.num_buckets)
    on_host = 1 - times.device_share
    # The verdict waits for the last gradient: for its own copy, or for a link that was busy all through backward.
    first_grad = times.backward * on_host * one
    verdict = max(times.backward * on_host + times.d2h * one, first_grad + times.d2h)
    late_verdict = max(0.0, verdict - times.backward)
    # A host that is slower than backward is in the middle of a bucket when the last gradient comes.
    in_the_middle = times.host * one / 2 if times.host > times.backward * on_host else 0.0
    last_hops = in_the_middle + (times.host + times.h2d) * one - times.device_share * times.forward
    # From one step's last bucket to the next step's first, the host has nothing to do.
    idle = first_grad + times.forward * on_host * one + (times.d2h + times.h2d) * one
    host_overrun = times.host + idle + in_the_middle - (times.forward + times.backward)
    h2d_overrun = times.h2d - times.forward
    return max(late_verdict + max(0.0, last_hops, h2d_overrun), host_overrun)

"""How much of a step's time an optimizer on the host adds: what its schedule leaves exposed, from a few speeds.

[Note: Exposed time] Per step the host works through every bucket once, `host`; gradients cross the link during
backward, `d2h`, new weights after the verdict and before the layer that reads them, `h2d`. The host may work from the
first gradient until the last layer's next forward, newest gradient first ([Note: Newest first] in
offload/superoffload/worker.py), so only what exceeds a whole step shows, never what exceeds backward alone. What
always shows is the bucket whose gradient comes last and which the next forward reads first: its three hops. Buckets
that stay on the device come last in backward and first in forward, and hide that.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds that one step's parts take by themselves.

    Attributes:
        forward, backward: of the model.
        d2h, host, h2d: gradients to the host, its optimizer, weights back: of all buckets on the host.
        num_buckets: buckets on the host, of equal size.
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

    Exact but for half a bucket of the host's time, where the host is busy all through backward: which bucket it is
    in when backward ends depends on the numbers.
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

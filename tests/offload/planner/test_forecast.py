"""The forecast against the real engine on a throttled link in virtual time."""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.offload.planner.forecast import (
    Passes,
    StepTimes,
    best_plan,
    bytes_share,
    exposed_seconds,
    is_long_enough,
)
from tests.helpers.extent import IS_ALL
from tests.helpers.plain import PlainMasterAdamW
from tests.helpers.virtual_steps import LOW, NUM_STEPS, WIDTH, Fixed, batch, clips, simulate
from tests.helpers.virtual_time import TimedLayers, VirtualTime

PLANS = ("direct", "early commit", "ahead")
# Per 1B parameters (superoffload, section 5): seconds of the host's Adam, of the link each way; and the device's FLOPS.
PROFILES = {"PCIe H100": (0.21, 0.04, 400e12), "GH200": (0.08, 0.004, 600e12), "laptop": (0.53, 0.17, 20e12)}


def times_of(profile: str, tokens: int, *, num_buckets: int = 40, device_share: float = 0.0) -> StepTimes:
    host, link, flops = PROFILES[profile]
    forward = 2e9 * tokens / flops
    on_host = 1 - device_share
    return StepTimes(
        forward, 2 * forward, link * on_host, host * on_host, link * on_host, round(num_buckets * on_host), device_share
    )


# A host that is busy all through backward, but not for longer than the whole step, has half a bucket of freedom. With
# 8000 tokens GH200's is busy exactly as long as the step.
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("tokens", [500, 1000, 2000, 4000, 8000, 11000, 16000, 32000, 64000])
def test_exposed_time_is_the_forecast(profile, tokens):
    times = times_of(profile, tokens)
    found, _ = simulate(times, Fixed("ahead"))
    expected = exposed_seconds(times)
    is_between = times.backward < times.host <= (times.forward + times.backward) * (1 + 1e-9)
    half_a_bucket = times.host / times.num_buckets / 2
    assert abs(found - expected) <= max(0.05 * expected, half_a_bucket if is_between else 0.0), (found, expected)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("tokens", [4000, 32000])
@pytest.mark.parametrize("device_share", [0.25, 0.5])
def test_a_share_on_the_device_hides_the_last_bucket(profile, tokens, device_share):
    times = times_of(profile, tokens, device_share=device_share)
    found, _ = simulate(times, Fixed("ahead"))
    expected = exposed_seconds(times)
    assert abs(found - expected) <= max(0.05 * expected, times.host / times.num_buckets / 2), (found, expected)
    if times.host < times.backward:
        assert found == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("tokens", [1000, 4000, 11000, 32000] if IS_ALL else [4000, 11000])
@pytest.mark.parametrize("device_share", [0.0, 0.25])
@pytest.mark.parametrize(
    ("plan", "clip_rate"), [("direct", 1.0), ("early commit", 0.5), ("ahead", 0.5), ("ahead", 1.0)]
)
def test_exposed_time_is_the_forecast_of_every_plan(profile, tokens, device_share, plan, clip_rate):
    """Half a bucket of freedom, as above: the bucket that is under way at the verdict is anywhere in its work."""
    times = times_of(profile, tokens, device_share=device_share)
    found, _ = simulate(times, Fixed(plan), clip_rate)
    expected = exposed_seconds(times, plan, clip_rate)
    assert abs(found - expected) <= max(0.05 * expected, times.host / times.num_buckets / 2), (found, expected)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("clip_rate", [0.0, 1.0])
def test_where_there_is_one_bucket_no_other_is_begun_before_its_gradient_comes(plan, clip_rate):
    times = times_of("PCIe H100", 16000, num_buckets=1)
    found, _ = simulate(times, Fixed(plan), clip_rate)
    half_a_bucket = 0.0 if plan == "direct" else times.host / 2
    assert found == pytest.approx(exposed_seconds(times, plan, clip_rate), abs=half_a_bucket + 1e-9)


@pytest.mark.parametrize("num_buckets", [1, 2, 3, 5])
@pytest.mark.parametrize(("d2h", "host"), [(1.0, 4.0), (9.0, 1.0), (6.0, 2.0), (8.0, 5.0)])
def test_no_more_buckets_are_worked_on_before_a_late_gradient_than_there_are(num_buckets, d2h, host):
    times = StepTimes(forward=3.0, backward=6.0, d2h=d2h, host=host, h2d=1.0, num_buckets=num_buckets)
    found, _ = simulate(times, Fixed("direct"), 1.0)
    assert found == pytest.approx(exposed_seconds(times, "direct", 1.0))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("clip_rate", [0.0, 0.5, 1.0])
def test_a_step_that_is_long_enough_exposes_at_most_a_hundredth_at_every_clip_rate(profile, clip_rate):
    """And one of a quarter, which is not, is exposed for longer in every plan."""
    num_buckets = 24
    tokens = next(t for t in range(1000, 10**6, 1000) if is_long_enough(times_of(profile, t, num_buckets=num_buckets)))
    times = times_of(profile, tokens, num_buckets=num_buckets)
    found, _ = simulate(times, None, clip_rate, num_steps=16)
    assert found <= 0.01 * (times.forward + times.backward)
    short = times_of(profile, tokens // 4, num_buckets=num_buckets)
    assert not is_long_enough(short)
    assert min(simulate(short, Fixed(plan), 1.0)[0] for plan in PLANS) > 0.01 * (short.forward + short.backward)


def test_moving_less_decides_between_plans_that_expose_alike():
    long = times_of("PCIe H100", 64000)
    assert [best_plan(long, rate) for rate in (0.0, 0.5, 1.0)] == ["direct"] * 3
    # Forward is too short for all of the host's work: what may be done before the verdict decides.
    short = times_of("PCIe H100", 20000)
    assert [best_plan(short, rate) for rate in (0.0, 1.0)] == ["ahead", "early commit"]
    assert best_plan(short, 0.0, may_look_ahead=False) == "early commit"
    # A host that is slower than the step does best with what moves least, if each step is clipped.
    assert best_plan(times_of("laptop", 200), 1.0) == "direct"


def test_passes_are_as_their_bytes():
    narrow, wide = Passes.of_width(2), Passes.of_width(4)
    assert (narrow.commit, narrow.look, narrow.direct) == pytest.approx((26 / 30, 16 / 30, 28 / 30))
    assert (wide.commit, wide.look, wide.direct) == pytest.approx((28 / 36, 20 / 36, 32 / 36))
    assert [bytes_share(narrow, plan, 0.5) for plan in PLANS] == pytest.approx([28 / 30, 42 / 30, 38 / 30])


def test_a_step_that_hides_in_a_whole_step_hides_though_backward_alone_is_too_short():
    """What newest-first is for: oldest first, the next forward would begin with a wait for the whole backlog."""
    times = times_of("PCIe H100", 16000, num_buckets=80)
    assert times.backward < times.host < times.forward + times.backward
    found, _ = simulate(times, Fixed("ahead"))
    backlog = times.host - times.backward
    assert found < backlog / 4


@pytest.mark.parametrize("clip_rate", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("plan", ["direct", "early commit", "ahead"])
def test_virtual_time_changes_no_bit(plan, clip_rate):
    times = times_of("laptop", 1000, num_buckets=6, device_share=0.5)
    _, weights = simulate(times, Fixed(plan), clip_rate)
    plain = TimedLayers(VirtualTime(), 6, WIDTH, 0.0, 0.0)
    oracle = PlainMasterAdamW(plain.parameters(), lr=1e-2)
    for step in range(NUM_STEPS):
        oracle.max_norm = LOW if clips(step, clip_rate) else 1e6
        oracle.zero_grad()
        plain(batch(step)).float().pow(2).mean().backward()
        oracle.step()
    for found, expected in zip(weights, plain.parameters(), strict=True):
        assert torch.equal(found, expected)

"""The forecast against the real engine on a throttled link in virtual time."""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.comm.communicator import single_rank
from lightning_superscale.offload.planner.forecast import StepTimes, exposed_seconds
from lightning_superscale.offload.superoffload.step import DeferredStep
from lightning_superscale.ops.update import update_path
from lightning_superscale.optim.adamw_step import AdamWStep
from lightning_superscale.optim.bucketing import Grouping
from lightning_superscale.optim.clipping import ClipByNorm
from lightning_superscale.optim.engine import OptimizerEngine
from lightning_superscale.optim.mixed_step import MixedStep
from lightning_superscale.optim.unit_state import ResidentState
from lightning_superscale.zero.buckets.transport import BucketTransport
from lightning_superscale.zero.forward_gates import PublishGates
from tests.helpers.engines import offload_context
from tests.helpers.plain import PlainMasterAdamW
from tests.helpers.virtual_time import ThrottledLink, TimedLayers, TimedState, VirtualTime, VirtualWorker

WIDTH = 8
NUM_STEPS, NUM_MEASURED = 10, 4
# Per 1B parameters (superoffload, section 5): seconds of the host's Adam, of the link each way; and the device's FLOPS.
PROFILES = {"PCIe H100": (0.21, 0.04, 400e12), "GH200": (0.08, 0.004, 600e12), "laptop": (0.53, 0.17, 20e12)}


def times_of(profile: str, tokens: int, *, num_buckets: int = 40, device_share: float = 0.0) -> StepTimes:
    host, link, flops = PROFILES[profile]
    forward = 2e9 * tokens / flops
    on_host = 1 - device_share
    return StepTimes(
        forward, 2 * forward, link * on_host, host * on_host, link * on_host, round(num_buckets * on_host), device_share
    )


def simulate(times: StepTimes) -> tuple[float, list[torch.Tensor]]:
    """Exposed seconds of a real engine in virtual time, and the weights it ends with."""
    num_layers = round(times.num_buckets / (1 - times.device_share))
    time = VirtualTime()
    model = TimedLayers(time, num_layers, WIDTH, times.forward, times.backward)
    numel = times.num_buckets * WIDTH * WIDTH
    link = ThrottledLink(time, times.d2h / (2 * numel), times.h2d / (2 * numel))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    on_device = frozenset(list(model.parameters())[: num_layers - times.num_buckets])
    context = offload_context(link=link)

    def make_state(unit, *, has_moments, is_on_device):
        if is_on_device:
            return ResidentState(unit, has_moments=has_moments)
        seconds = times.host / numel
        return TimedState(unit, context, time=time, seconds_per_param=seconds)

    def make_native(own, guard):
        device = AdamWStep(own, guard, update_path(torch.device("cpu")).submit)
        return MixedStep(own, guard, host=DeferredStep(own, guard, worker=VirtualWorker(time)), device=device)

    engine = OptimizerEngine(
        optimizer,
        fqn_of={param: fqn for fqn, param in model.named_parameters()},
        ranks=single_rank(),
        make_transport=lambda sink: BucketTransport(
            [], grouping=Grouping(1, on_device=on_device), sink=sink, ranks=single_rank()
        ),
        make_state=make_state,
        make_native=make_native,
    )
    engine.transport.stream()
    gates = PublishGates(model, engine.transport, per_module=True)
    ends = []
    for step in range(NUM_STEPS):
        gates.enter_step()
        optimizer.zero_grad()
        model(batch(step)).float().pow(2).mean().backward()
        engine.request_clip(ClipByNorm(1e6))
        engine.step()
        ends.append(time.model)
    engine.transport.wait_all_published()
    gates.close()
    engine.close()
    step_seconds = (ends[-1] - ends[-1 - NUM_MEASURED]) / NUM_MEASURED
    return step_seconds - times.forward - times.backward, [param.detach() for param in model.parameters()]


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)


# A host that is busy all through backward, but not for longer than the whole step, has half a bucket of freedom. With
# 8000 tokens GH200's is busy exactly as long as the step.
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("tokens", [500, 1000, 2000, 4000, 8000, 11000, 16000, 32000, 64000])
def test_exposed_time_is_the_forecast(profile, tokens):
    times = times_of(profile, tokens)
    found, _ = simulate(times)
    expected = exposed_seconds(times)
    is_between = times.backward < times.host <= (times.forward + times.backward) * (1 + 1e-9)
    half_a_bucket = times.host / times.num_buckets / 2
    assert abs(found - expected) <= max(0.05 * expected, half_a_bucket if is_between else 0.0), (found, expected)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("tokens", [4000, 32000])
@pytest.mark.parametrize("device_share", [0.25, 0.5])
def test_a_share_on_the_device_hides_the_last_bucket(profile, tokens, device_share):
    times = times_of(profile, tokens, device_share=device_share)
    found, _ = simulate(times)
    expected = exposed_seconds(times)
    assert abs(found - expected) <= max(0.05 * expected, times.host / times.num_buckets / 2), (found, expected)
    if times.host < times.backward:
        assert found == pytest.approx(0.0, abs=1e-9)


def test_a_step_that_hides_in_a_whole_step_hides_though_backward_alone_is_too_short():
    """What newest-first is for: oldest first, the next forward would begin with a wait for the whole backlog."""
    times = times_of("PCIe H100", 16000, num_buckets=80)
    assert times.backward < times.host < times.forward + times.backward
    found, _ = simulate(times)
    backlog = times.host - times.backward
    assert found < backlog / 4


def test_virtual_time_changes_no_bit():
    times = times_of("laptop", 1000, num_buckets=6, device_share=0.5)
    _, weights = simulate(times)
    plain = TimedLayers(VirtualTime(), 6, WIDTH, 0.0, 0.0)
    oracle = PlainMasterAdamW(plain.parameters(), lr=1e-2)
    oracle.max_norm = 1e6
    for step in range(NUM_STEPS):
        oracle.zero_grad()
        plain(batch(step)).float().pow(2).mean().backward()
        oracle.step()
    for found, expected in zip(weights, plain.parameters(), strict=True):
        assert torch.equal(found, expected)

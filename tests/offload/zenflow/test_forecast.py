"""The forecast against the real engine on a throttled link in virtual time, and what ZenFlow is for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_superscale.comm.communicator import single_rank
from lightning_superscale.config import OffloadConfig, ZenFlowConfig
from lightning_superscale.offload.engine import StepParts, engine_of
from lightning_superscale.offload.planner import choices
from lightning_superscale.offload.zenflow.columns import layouts_of
from lightning_superscale.offload.zenflow.forecast import WindowTimes, exposed_seconds, shares_ended, window_times
from lightning_superscale.offload.zenflow.host_work import HostWork
from lightning_superscale.offload.zenflow.report import LowEnergyWarning
from lightning_superscale.offload.zenflow.step import ZenFlowStep
from lightning_superscale.offload.zenflow.windows import staggered
from lightning_superscale.optim.bucketing import Grouping
from lightning_superscale.optim.clipping import ClipByNorm
from lightning_superscale.optim.engine import OptimizerEngine
from lightning_superscale.zero.buckets.transport import BucketTransport
from tests.helpers.engines import build_engine, offload_context
from tests.helpers.extent import only_in_test_all
from tests.helpers.virtual_time import ThrottledLink, TimedLayers, TimedSplitState, VirtualThread, VirtualTime
from tests.offload.planner.test_choices import H100

WIDTH = 10
NUM_LAYERS = 32
# Per 1B parameters (superoffload, section 5): seconds of the host's Adam, of the link each way; and the device's FLOPS.
# Adding a gradient to its sum moves 10 bytes per parameter where Adam moves 30.
PROFILES = {"PCIe H100": (0.21, 0.04, 400e12), "GH200": (0.08, 0.004, 600e12), "laptop": (0.53, 0.17, 20e12)}
ADDING_TO_UPDATING = 1 / 3


def times_of(profile: str, tokens: int, config: ZenFlowConfig, num_layers: int = NUM_LAYERS) -> WindowTimes:
    host, link, flops = PROFILES[profile]
    forward = 2e9 * tokens / flops
    deferred = 1 - config.topk
    sizes = {(index, 0): (1, str(index)) for index in range(num_layers)}
    offsets = staggered(sizes, config.update_interval) if config.overlap else {}
    return WindowTimes(
        forward=forward,
        backward=2 * forward,
        d2h=link * deferred,
        adding=host * ADDING_TO_UPDATING * deferred,
        updating=host * deferred,
        h2d=link * deferred,
        num_matrices=num_layers,
        ends=shares_ended(dict.fromkeys(sizes, 1), offsets, config.update_interval),
        sums_home=config.accumulate_on,
        overlap=config.overlap,
    )


def simulate(times: WindowTimes, config: ZenFlowConfig, *, num_cycles: int = 3) -> float:
    """Exposed seconds per step of a real engine in virtual time: of its last two cycles."""
    time = VirtualTime()
    model = TimedLayers(time, times.num_matrices, WIDTH, times.forward, times.backward)
    numel = times.num_matrices * WIDTH * round(WIDTH * (1 - config.topk))
    link = ThrottledLink(time, times.d2h / (2 * numel), times.h2d / (2 * numel))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    context = offload_context(link=link, streams=True, engine="zenflow", zenflow=config)
    per_param = {"adding": times.adding / numel, "updating": times.updating / numel}

    def make_state(unit, *, has_moments, is_on_device):
        layouts = layouts_of(unit, config, config.topk)
        return TimedSplitState(unit, context, layouts, sums_home=config.accumulate_on, time=time, **per_param)

    def make_native(own, guard):
        host = HostWork(context.timeline, VirtualThread(time))
        return ZenFlowStep(own, guard, config, context, LowEnergyWarning(), host)

    engine = OptimizerEngine(
        optimizer,
        fqn_of={param: fqn for fqn, param in model.named_parameters()},
        ranks=single_rank(),
        make_transport=lambda sink: BucketTransport([], grouping=Grouping(1), sink=sink, ranks=single_rank()),
        make_state=make_state,
        make_native=make_native,
    )
    engine.transport.stream()
    ends = []
    interval = config.update_interval
    for step in range(config.warmup_steps + num_cycles * interval + 1):
        optimizer.zero_grad()
        model(batch(step)).float().pow(2).mean().backward()
        engine.request_clip(ClipByNorm(1e6))
        engine.step()
        ends.append(time.model)
    engine.close()
    return (ends[-1] - ends[-1 - 2 * interval]) / (2 * interval) - times.model


def simulate_cpu(times: WindowTimes) -> float:
    """Exposed seconds per step of the `cpu` engine, which adds nothing up, in virtual time."""
    time = VirtualTime()
    model = TimedLayers(time, times.num_matrices, WIDTH, times.forward, times.backward)
    numel = times.num_matrices * WIDTH * WIDTH
    link = ThrottledLink(time, times.d2h / (2 * numel), times.h2d / (2 * numel))
    context = offload_context(link=link, streams=True, engine="cpu")
    engine_of_cpu = engine_of("cpu")

    def submit(segments):
        time.advance_to(time.now + times.updating / numel * sum(segment.param.numel() for segment in segments))
        return context.update.submit(segments)

    timed = replace(context, update=replace(context.update, submit=submit))
    engine = OptimizerEngine(
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        fqn_of={param: fqn for fqn, param in model.named_parameters()},
        ranks=single_rank(),
        make_transport=lambda sink: BucketTransport([], grouping=Grouping(1), sink=sink, ranks=single_rank()),
        make_state=lambda unit, *, has_moments, is_on_device: engine_of_cpu.make_state(
            unit, context, has_moments=has_moments, streamed=None
        ),
        make_native=lambda own, guard: engine_of_cpu.make_step(own, guard, timed),
    )
    engine.transport.stream()
    ends = []
    for step in range(4):
        model(batch(step)).float().pow(2).mean().backward()
        engine.request_clip(ClipByNorm(1e6))
        engine.step()
        engine.transport.wait_all_published()
        ends.append(time.model)
    engine.close()
    return (ends[-1] - ends[1]) / 2 - times.model


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)


def config_of(**options) -> ZenFlowConfig:
    return ZenFlowConfig(**{"topk": 0.1, "update_interval": 4, "select_interval": 2**20, **options})


MANY = [500, 1500, 2000, 4000, 8000, 16000, 64000]
WAYS = {
    "windows of 4": {},
    "windows of 16": {"update_interval": 16},
    "windows of 2, three tenths": {"topk": 0.3, "update_interval": 2},
    "windows of 1, sums on the device": {"accumulate_on": "device", "update_interval": 1},
    "sums on the device": {"accumulate_on": "device"},
    "at once": {"overlap": False},
    "as offload without ZenFlow": {"topk": 0.0, "update_interval": 1, "overlap": False},
}


def check(profile: str, tokens: int, way: str) -> None:
    config = config_of(**WAYS[way])
    times = times_of(profile, tokens, config)
    assert simulate(times, config) == pytest.approx(exposed_seconds(times), rel=0.05, abs=1e-6)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("way", ["windows of 4", "sums on the device", "at once"])
def test_exposed_time_is_the_forecast(profile, way):
    check(profile, 1500 if profile == "PCIe H100" else 500, way)


@only_in_test_all
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("way", WAYS)
def test_exposed_time_is_the_forecast_for_long_and_short_steps(profile, way):
    for tokens in MANY:
        check(profile, tokens, way)


def shortest(profile: str, config: ZenFlowConfig) -> WindowTimes:
    """The shortest steps whose windows are long enough."""
    tokens = next(n for n in range(100, 10**5, 100) if times_of(profile, n, config).is_long_enough)
    return times_of(profile, tokens, config)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("way", ["windows of 4", "windows of 16", "sums on the device"])
def test_windows_that_are_long_enough_stall_a_step_by_less_than_a_twentieth(profile, way):
    config = config_of(**WAYS[way])
    times = shortest(profile, config)
    found = simulate(times, config)
    assert found <= 0.05 * (times.model + found)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_host_keeps_the_model_waiting_85_percent_less_than_without_zenflow(profile):
    config, plain = config_of(), config_of(**WAYS["as offload without ZenFlow"])
    times = shortest(profile, config)
    without = replace(times_of(profile, 1, plain), forward=times.forward, backward=times.backward)
    synchronous = simulate(without, plain)
    assert simulate(times, config) <= 0.15 * synchronous
    assert simulate(times, config) <= 0.15 * simulate_cpu(without)


def test_the_host_adds_for_longer_than_forward_and_nobody_waits():
    """A matrix' next gradient comes late in backward: only its own sum has to be there by then."""
    config = config_of(update_interval=16)
    times = shortest("PCIe H100", config)
    assert times.adding > times.forward + times.backward / times.num_matrices
    assert simulate(times, config) == pytest.approx(0.0, abs=1e-9)


def test_a_choice_of_columns_stalls_its_step_only():
    """Its gradients cross the link after backward: the forecast leaves that out, a cycle with one in it does not."""
    config = config_of(select_interval=8)
    times = times_of("PCIe H100", 16000, config)
    assert times.is_long_enough
    assert simulate(times, config, num_cycles=6) <= 0.05 * times.model


def test_a_matrix_of_more_than_its_share_is_waited_for_in_the_step_that_ends_its_window():
    sizes = {(0, 0): (70, "big"), (1, 0): (10, "a"), (2, 0): (10, "b"), (3, 0): (10, "c")}
    deferred = {place: numel for place, (numel, _) in sizes.items()}
    ends = shares_ended(deferred, staggered(sizes, 4), 4)
    assert sorted(sum(step) for step in ends) == pytest.approx([0.1, 0.1, 0.1, 0.7])
    parts = {"d2h": 0.0, "h2d": 0.0, "adding": 0.0, "updating": 2.0, "num_matrices": 4}
    times = WindowTimes(forward=0.4, backward=0.8, ends=ends, **parts)
    assert exposed_seconds(times) == pytest.approx((0.7 * 2.0 - 1.2) / 4)
    together = shares_ended(deferred, {}, 4)
    assert [len(step) for step in together] == [4, 0, 0, 0]
    assert exposed_seconds(replace(times, ends=together, overlap=False)) == pytest.approx(2.0 / 4)


@pytest.mark.parametrize(("dtype", "bytes_each", "kernel_ns"), [(torch.bfloat16, 2, 0.2), (torch.float32, 4, 0.24)])
def test_the_profile_of_16_bit_gradients_is_taken_for_others_by_bytes(dtype, bytes_each, kernel_ns):
    config = config_of(topk=0.25, exclude=["1.weight"], accumulate_on="device", overlap=False)
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8)).to(dtype)
    engine = build_engine(model, torch.optim.AdamW(model.parameters()), is_offloaded=True, zenflow=config)
    parts = StepParts(
        config=OffloadConfig(engine="zenflow", zenflow=config),
        profile=H100,
        work=choices.HostWork(num_params=1, link_bytes=2, num_buckets=1),
        forward=1.0,
        backward=2.0,
        states=engine.states,
        rule=engine.rule,
        streams=True,
        weights_awaited=False,
    )
    deferred, rule = [8 * 4, 6 * 4], engine.rule.host  # a unit has the last one first
    times = window_times(parts, rule.schedule)
    engine.close()
    assert times == WindowTimes(
        forward=1.0,
        backward=2.0,
        d2h=pytest.approx(bytes_each * sum(deferred) / 50e9),
        # A sum is read and written, a gradient read.
        adding=pytest.approx(0.07e-9 * sum(deferred) * (8 + bytes_each) / (8 + 2)),
        updating=pytest.approx(kernel_ns * 1e-9 * sum(deferred)),
        h2d=pytest.approx(bytes_each * sum(deferred) / 50e9),
        num_matrices=2,
        ends=[[numel / sum(deferred) for numel in deferred], [], [], []],
        sums_home="device",
        overlap=False,
    )

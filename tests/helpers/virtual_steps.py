"""Whole steps of superoffload's engine in virtual time: layers of equal size, and a link and a host of given speed."""

from __future__ import annotations

import torch

from lightning_superscale.comm.communicator import single_rank
from lightning_superscale.offload.planner.forecast import StepTimes
from lightning_superscale.offload.planner.profile import HardwareKey, HardwareProfile
from lightning_superscale.offload.superoffload.plan import PlanChooser
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
from tests.helpers.virtual_time import ThrottledLink, TimedLayers, TimedState, VirtualTime, VirtualWorker

WIDTH = 8
NUM_STEPS, NUM_MEASURED = 10, 4
# Bounds below and above the norm of any step.
LOW, HIGH = 1e-12, 1e6


def profile_of(times: StepTimes, numel: int) -> HardwareProfile:
    """The profile of hardware on which steps of so many parameters have these times."""
    kernel_ns = 1e9 * times.host / numel
    return HardwareProfile(
        HardwareKey("virtual", 2, "virtual", "virtual", "", ""),
        *(2 * numel / seconds for seconds in (times.d2h, times.h2d, times.d2h, times.h2d)),
        memory=((1, 30e9 / kernel_ns),),
        adamw_ns_per_param=kernel_ns,
        adamw_fp32_ns_per_param=36 / 30 * kernel_ns,
        accumulate_ns_per_param=10 / 30 * kernel_ns,
        adamw_threads=1,
    )


class Fixed(PlanChooser):
    """Always chooses the same plan."""

    def __init__(self, plan) -> None:
        self._fixed = plan
        super().__init__(True, streams=True)

    def _chosen(self):
        return self._fixed, "fixed"


def simulate(
    times: StepTimes, chooser: PlanChooser | None = None, clip_rate: float = 0.0, num_steps: int = NUM_STEPS
) -> tuple[float, list[torch.Tensor]]:
    """Exposed seconds of a real engine in virtual time, the mean of the last steps, and the weights it ends with.

    Args:
        chooser: of the plans; None for one that chooses by virtual time, as "auto" does by a clock.
    """
    num_layers = round(times.num_buckets / (1 - times.device_share))
    time = VirtualTime()
    model = TimedLayers(time, num_layers, WIDTH, times.forward, times.backward)
    numel = times.num_buckets * WIDTH * WIDTH
    link = ThrottledLink(time, times.d2h / (2 * numel), times.h2d / (2 * numel))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    on_device = frozenset(list(model.parameters())[: num_layers - times.num_buckets])
    context = offload_context(link=link)
    if chooser is None:
        profile = profile_of(times, numel)
        chooser = PlanChooser("auto", streams=True, profile=profile, clock=lambda: time.model)

    def make_state(unit, *, has_moments, is_on_device):
        if is_on_device:
            return ResidentState(unit, has_moments=has_moments)
        seconds = times.host / numel
        return TimedState(unit, context, time=time, seconds_per_param=seconds)

    def make_native(own, guard):
        device = AdamWStep(own, guard, update_path(torch.device("cpu")).submit)
        return MixedStep(
            own, guard, host=DeferredStep(own, guard, chooser=chooser, worker=VirtualWorker(time)), device=device
        )

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
    for step in range(num_steps):
        gates.enter_step()
        optimizer.zero_grad()
        model(batch(step)).float().pow(2).mean().backward()
        engine.request_clip(ClipByNorm(LOW if clips(step, clip_rate) else HIGH))
        engine.step()
        ends.append(time.model)
    engine.transport.wait_all_published()
    gates.close()
    engine.close()
    step_seconds = (ends[-1] - ends[-1 - NUM_MEASURED]) / NUM_MEASURED
    return step_seconds - times.forward - times.backward, [param.detach() for param in model.parameters()]


def clips(step: int, clip_rate: float) -> bool:
    """Whether a step's norm is above its bound: in all steps, every second one, or none."""
    return step % 2 < 2 * clip_rate


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)

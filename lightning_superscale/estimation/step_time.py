"""The seconds of one step on one rank: forward, backward, and what optimizer and other ranks add to them.

[Note: Predicted seconds] An operation takes as long as its floating-point operations or its bytes, whichever is longer,
at the rates that a profile reaches. Work of the host and of links hides behind forward and backward as far as the
strategy lets it: `offload.planner.forecast` says how far for a host optimizer. Between ranks, reductions hide behind
backward and gathers of new weights behind the next forward, but for the last bucket; the device itself copies what
FSDP2 gathers and reduces out of and into their buffers; what ranks that share a sequence exchange is awaited.
Activations leave for the host behind forward, and come back behind backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_superscale.estimation.devices import DeviceProfile
from lightning_superscale.estimation.links import GroupShape, Kind, Latencies, Links
from lightning_superscale.estimation.memory import Param, states_of
from lightning_superscale.estimation.peak import reduced_size, units_of
from lightning_superscale.estimation.setup import Setup
from lightning_superscale.estimation.tracing.operations import Phase, TracedOperation
from lightning_superscale.estimation.tracing.step import StepTrace
from lightning_superscale.offload.engine import engine_of
from lightning_superscale.offload.link.dtype import dtype_on_link
from lightning_superscale.offload.memory import ParamKind
from lightning_superscale.offload.planner.forecast import StepTimes
from lightning_superscale.offload.planner.profile import BYTES_PER_PARAM

Seconds = Callable[[TracedOperation], float]
"""Gives the seconds of an operation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one step.

    Attributes:
        forward, backward: of the model.
        optimizer: by which the optimizer makes the step longer, on the device or on the host.
        ranks: by which exchanges with other ranks make it longer.
        activations: by which their copies to the host and back make it longer.
    """

    forward: float
    backward: float
    optimizer: float
    ranks: float
    activations: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.optimizer + self.ranks + self.activations


def roofline(profile: DeviceProfile) -> Seconds:
    """Seconds by a profile's rates (Williams et al. 2009, "Roofline")."""
    reach = profile.reach

    def seconds(one: TracedOperation) -> float:
        products = one.flops / (profile.flops(one.dtype) * reach.products)
        return max(products, one.nbytes / (profile.memory_rate * reach.memory), reach.call)

    return seconds


def phase_seconds(trace: StepTrace, phase: Phase, seconds: Seconds) -> float:
    """Seconds of all operations of one phase, without exchanges between ranks."""
    return sum(seconds(one) for one in trace.operations if one.phase == phase and one.exchange is None)


def sequence_seconds(trace: StepTrace, setup: Setup, profile: DeviceProfile, seconds: Seconds) -> float:
    """Seconds by which exchanges between the ranks that share a sequence make one forward and backward longer.

    Each is awaited where it is made, but for shifts along a ring, behind which attention goes on.
    """
    links, shape = Links(profile, Latencies()), setup.sequence_group
    waited = moving = 0.0
    for one in trace.operations:
        if one.exchange is None:
            moving = max(0.0, moving - seconds(one)) if moving else 0.0
            continue
        taken = links.seconds(one.exchange.kind, one.exchange.nbytes, shape)
        if one.exchange.kind == "ring_shift" and not profile.shares_cores:
            moving += taken
        else:
            waited, moving = waited + moving + taken, 0.0
    return waited + moving


def step_time(
    trace: StepTrace, params: Sequence[Param], setup: Setup, profile: DeviceProfile, seconds: Seconds
) -> StepTime:
    """The seconds of one step.

    Of several micro-batches the host's work hides behind the last backward and the next forward.

    Args:
        params: of the traced module, for this setup.
        seconds: of an operation on this profile's device.
    """
    forward = phase_seconds(trace, "forward", seconds)
    backward = phase_seconds(trace, "backward", seconds)
    return StepTime(
        forward=setup.micro_batches * forward,
        backward=setup.micro_batches * backward,
        optimizer=update_seconds(params, setup, profile) + _on_host(trace, params, setup, profile, forward, backward),
        ranks=setup.micro_batches * sequence_seconds(trace, setup, profile, seconds)
        + _between_ranks(params, setup, profile, forward, backward),
        activations=setup.micro_batches * _of_activations(trace, params, setup, profile, forward, backward),
    )


def update_seconds(params: Sequence[Param], setup: Setup, profile: DeviceProfile) -> float:
    """Seconds of the device's part of a step.

    States that it has are read and written, with gradient and weights; of others it moves what their engine says.
    """
    moved = 0.0
    for param in (param for param in params if param.trains):
        if param.is_on_host:
            each = _beside_the_host(param, setup)
        else:
            states = states_of(param, setup, flows=False).per_param("device", "shard")
            each = 2 * states + 3 * param.dtype.itemsize
        moved += param.shard_numel(setup.num_shards) * each
    return moved / (profile.memory_rate * profile.reach.memory)


def _beside_the_host(param: Param, setup: Setup) -> float:
    """Bytes per element that the device moves in a step for a parameter whose states are in host memory."""
    if setup.offload is None:
        return 0.0
    kind = ParamKind(
        spec=param.spec,
        weights=param.dtype,
        has_moments=True,
        flows=setup.flows and param.block is not None,
        num_shares=setup.num_shards,
        dtypes=setup.precision.states,
        link_dtype=setup.link_dtype,
        config=setup.offload,
    )
    return engine_of(setup.offload.engine).device_bytes(kind)


class CopySeconds(NamedTuple):
    """Seconds of the device's copies between parameters and the buffers that FSDP2 exchanges.

    Attributes:
        weights: of all gathered weights out of their buffer, in one pass.
        gradients: of all gradients into the buffer that is reduced.
    """

    weights: float
    gradients: float


def copy_seconds(params: Sequence[Param], setup: Setup, profile: DeviceProfile) -> CopySeconds:
    """Seconds for those of these parameters that FSDP2 gathers: each byte is read and written."""
    gathered = [param for param in params if param.is_gathered] if setup.shards_weights else []
    rate = profile.memory_rate * profile.reach.memory
    weights = sum(2 * param.numel * param.dtype.itemsize for param in gathered)
    gradients = sum(p.numel * (p.dtype.itemsize + reduced_size(p, setup)) for p in gathered if p.trains)
    return CopySeconds(weights / rate, gradients / rate)


class HostSeconds(NamedTuple):
    """Seconds of one rank's link in one direction, and of its share of the host, for some parameters' states."""

    link: float
    host: float


def host_seconds(params: Sequence[Param], setup: Setup, profile: DeviceProfile) -> HostSeconds:
    """Seconds for those of these parameters whose states are in host memory."""
    hosted = [param for param in params if param.trains and param.is_on_host]
    numel = sum(param.shard_numel(setup.num_shards) for param in hosted)
    moved = sum(
        param.shard_numel(setup.num_shards) * dtype_on_link(setup.link_dtype, param.dtype).itemsize for param in hosted
    )
    return HostSeconds(
        moved / (profile.host_link * profile.reach.links),
        numel * BYTES_PER_PARAM / (profile.host_rate_of(setup.ranks_per_node) * profile.reach.host),
    )


def host_times(
    trace: StepTrace, params: Sequence[Param], setup: Setup, profile: DeviceProfile, forward: float, backward: float
) -> StepTimes:
    """The parts of a step with states in host memory, as `offload.planner.forecast` takes them.

    Args:
        forward, backward: seconds of the model.
    """
    order = {grad.fqn: i for i, grad in enumerate(trace.gradients)}
    units = [unit for unit in units_of(params, setup, order) if unit[0].is_on_host]
    trained = [param for param in params if param.trains]
    link, host = host_seconds(params, setup, profile)
    hosted = sum(param.numel for param in trained if param.is_on_host)
    return StepTimes(
        forward=forward,
        backward=backward,
        d2h=link,
        host=host,
        h2d=link,
        num_buckets=len(units),
        device_share=1 - hosted / max(1, sum(param.numel for param in trained)),
    )


def _on_host(
    trace: StepTrace,
    params: Sequence[Param],
    setup: Setup,
    profile: DeviceProfile,
    forward: float,
    backward: float,
) -> float:
    """Seconds by which the host's step makes a step longer."""
    if setup.offload is None or not any(param.trains and param.is_on_host for param in params):
        return 0.0
    times = host_times(trace, params, setup, profile, forward, backward)
    engine = engine_of(setup.offload.engine)
    link = profile.host_link * profile.reach.links
    if profile.shares_cores:
        return engine.predict_work(times, setup.offload) + setup.micro_batches * _flow(params, setup, 0.0, 0.0, link)
    flow = setup.micro_batches * _flow(params, setup, forward, backward, link)
    return engine.predict_exposed(times, setup.offload) + flow


def _of_activations(
    trace: StepTrace, params: Sequence[Param], setup: Setup, profile: DeviceProfile, forward: float, backward: float
) -> float:
    """Seconds by which one forward's activations make it longer on their way to the host, and backward on their way
    back, where they share the link with weights that stream.
    """
    moved = trace.on_host
    if profile.shares_cores:  # each copy reads and writes
        return 2 * (moved.to_host + moved.to_device) / (profile.memory_rate * profile.reach.memory)
    link = profile.host_link * profile.reach.links
    streamed = _streamed(params, link) if setup.flows else 0.0
    late = max(0.0, moved.to_device / link + streamed - backward) - max(0.0, streamed - backward)
    return max(0.0, moved.to_host / link - forward) + late


def _streamed(params: Sequence[Param], link: float) -> float:
    """Seconds of all weights that stream once."""
    return sum(p.numel * p.dtype.itemsize for p in params if p.block is not None) / link


def _flow(params: Sequence[Param], setup: Setup, forward: float, backward: float, link: float) -> float:
    """Seconds by which weights that stream in each pass make the passes longer."""
    if not setup.flows:
        return 0.0
    streamed = _streamed(params, link)
    return max(0.0, streamed - forward) + max(0.0, streamed - backward)


def _between_ranks(
    params: Sequence[Param], setup: Setup, profile: DeviceProfile, forward: float, backward: float
) -> float:
    """Seconds by which reductions and gathers make a step longer."""
    if setup.num_ranks == 1:
        return 0.0
    links, num_units = Links(profile, Latencies()), max(1, len(units_of(params, setup, {})))
    per_node = min(setup.num_ranks, setup.ranks_per_node)
    shape = GroupShape(-(-setup.num_ranks // per_node), per_node)
    nbytes = sum(p.numel * p.dtype.itemsize for p in params if p.trains) // num_units

    def one(kind: Kind) -> float:
        """Seconds of a unit's collective."""
        return links.seconds(kind, nbytes, shape)

    if setup.zero.stage == 0:
        reduction, gather = one("all_reduce"), 0.0
    else:
        reduction, gather = one("reduce_scatter"), one("all_gather")
    reduced, gathered = num_units * reduction, num_units * gather
    before = setup.micro_batches - 1
    early = 0.0 if setup.zero.reduces_once else reduced  # in each micro-batch before the last
    if setup.shards_weights:  # gathered once in each forward, and again in each backward
        copies = copy_seconds(params, setup, profile)
        num_reductions = 1 if setup.zero.reduces_once else setup.micro_batches
        copied = setup.micro_batches * 2 * copies.weights + num_reductions * copies.gradients
        late = max(0.0, gathered + reduced - backward) + before * max(0.0, gathered + early - backward)
        return (1 + before) * max(0.0, gathered - forward) + late + reduction + gather + copied
    late = max(0.0, reduced - backward) + before * max(0.0, early - backward)
    return late + max(0.0, gathered - forward) + reduction + gather

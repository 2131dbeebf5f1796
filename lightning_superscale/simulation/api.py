"""`simulate()`: how a step's time grows with nodes and ranks, event by event, without any of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

from torch import nn

from lightning_superscale.config import (
    OffloadConfig,
    SequenceConfig,
    ZeroConfig,
    resolve_offload,
    resolve_sequence,
    resolve_zero,
)
from lightning_superscale.config.offload import ENGINES
from lightning_superscale.config.values import PositiveInt, check_arguments
from lightning_superscale.errors import SettingError
from lightning_superscale.estimation.api import USABLE, assumptions_of, profile_for, seconds_on, trace_in
from lightning_superscale.estimation.candidates import Candidate
from lightning_superscale.estimation.devices import DeviceProfile
from lightning_superscale.estimation.links import Latencies
from lightning_superscale.estimation.memory import params_of
from lightning_superscale.estimation.peak import fit_states
from lightning_superscale.estimation.setup import Setup
from lightning_superscale.estimation.step_time import host_times, phase_seconds
from lightning_superscale.estimation.tracing.inputs import batch_for, count_tokens, loss_of
from lightning_superscale.estimation.tracing.step import Loss, StepTrace
from lightning_superscale.estimation.tracing.techniques import techniques_of
from lightning_superscale.offload.engine import engine_of
from lightning_superscale.offload.planner.forecast import HostSchedule, StepTimes
from lightning_superscale.run.precision import choose
from lightning_superscale.simulation.cluster import ClusterStep, simulate_cluster
from lightning_superscale.simulation.machine import new_environment
from lightning_superscale.simulation.program import program_of
from lightning_superscale.simulation.result import SimulatedStep, Simulation


def simulate(  # noqa: PLR0913 # as `estimate`, a user names what matters
    model: nn.Module,
    *,
    devices: PositiveInt = 8,
    num_nodes: Union[int, Sequence[int]] = 1,
    zero: Union[int, ZeroConfig, Mapping[str, Any]] = 3,
    offload: Union[str, OffloadConfig, Mapping[str, Any], None] = None,
    sequence: Union[int, SequenceConfig, Mapping[str, Any], None] = None,
    precision: str = "bf16-true",
    device: str = "H100 SXM",
    device_memory: Union[int, str, None] = None,
    host_memory: Union[int, str, None] = None,
    batch: Any = None,
    batch_size: PositiveInt = 1,
    sequence_length: PositiveInt = 2048,
    loss: Optional[Loss] = None,
    slow_rank: float = 1.0,
    latencies: Latencies = Latencies(),  # noqa: B008 # frozen
) -> Simulation:
    """Simulate a strategy's steps on clusters of several sizes. One process calls it by itself; it needs simpy.

    Operations take as long as `estimate` says, and ranks exchange what the run's own units are; see `Simulation`.

    Args:
        model, precision, device, loss: as `estimate` takes them.
        devices: ranks of each node.
        num_nodes: sizes of the cluster, which are simulated one by one.
        zero, offload, sequence: as SuperScaleStrategy takes them.
        device_memory, host_memory: as `estimate` takes them; they decide how many states stay on the device.
        batch: whole samples: those of one rank, or of the ranks that share their sequences.
        batch_size, sequence_length: of tokens for a Hugging Face model.
        slow_rank: by which forward and backward take longer on one rank, the last; 1 for none.
        latencies: of collectives.

    Raises:
        SuperScaleError: an argument that can't be used, a step that can't be traced, or no simpy; says what to do.
    """
    numbers = {"devices": devices, "batch_size": batch_size, "sequence_length": sequence_length}
    check_arguments("simulate", simulate, **numbers)
    new_environment()  # a missing package is said before any work
    _check_numbers(slow_rank, latencies)
    candidate = Candidate(resolve_zero(zero), resolve_offload(offload))
    _check_known(candidate)
    profile = profile_for(device, device_memory, host_memory)
    shared = resolve_sequence(sequence)
    _check_activations(shared)
    setups = _setups(candidate, precision, shared, devices, _sizes(num_nodes))
    given = batch_for(model, batch_size, sequence_length) if batch is None else batch
    trace = _trace(model, given, loss or loss_of(model), setups[0])
    return _Work(model, trace, profile, latencies).result(setups, candidate, given, slow_rank)


def _check_activations(sequence: SequenceConfig | None) -> None:
    if sequence is not None and sequence.offload_activations:
        raise SettingError(
            "SequenceConfig.offload_activations=True keeps activations in host memory, whose copies no simulation has "
            "yet. Leave it out, or take `superscale estimate`, which counts them."
        )


def _check_numbers(slow_rank: float, latencies: Latencies) -> None:
    if not isinstance(slow_rank, (int, float)) or not 1 <= slow_rank < math.inf:
        raise SettingError(f"slow_rank is a factor of at least 1, by which one rank is slower; found {slow_rank!r}")
    if not all(0 <= seconds < math.inf for seconds in (latencies.rank, latencies.node)):
        raise SettingError(f"latencies are seconds of 0 or more; found {latencies}")


def _setups(
    candidate: Candidate, precision: str, sequence: SequenceConfig | None, devices: int, sizes: Sequence[int]
) -> list[Setup]:
    setups = [
        Setup(
            zero=candidate.zero,
            offload=candidate.offload,
            precision=choose(precision),
            sequence=sequence,
            num_ranks=devices * nodes,
            ranks_per_node=devices,
        )
        for nodes in sizes
    ]
    for setup in setups:
        _ = setup.mesh  # raises where an axis does not divide the ranks
    return setups


def _sizes(num_nodes: int | Sequence[int]) -> list[int]:
    sizes = [num_nodes] if isinstance(num_nodes, int) else list(num_nodes)
    if not sizes or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise SettingError(f"num_nodes takes a number of nodes or several, each at least 1; found {num_nodes!r}")
    return sizes


def _check_known(candidate: Candidate) -> None:
    """Refuse what a simulation would leave out."""
    if candidate.zero.tensor_parallel > 1:
        raise SettingError(
            f"a simulation knows no tensor parallelism, found ZeroConfig.tensor_parallel="
            f"{candidate.zero.tensor_parallel}. Use 1."
        )
    if candidate.offload is not None and candidate.offload.weights == "flow":
        raise SettingError('a simulation knows no weights="flow"; found it in offload. Use the default.')
    _schedule(candidate.offload, StepTimes(1.0, 1.0, 1.0, 1.0, 1.0, 1))


def _schedule(offload: OffloadConfig | None, times: StepTimes) -> HostSchedule:
    """When the host works.

    Raises:
        SettingError: of an engine that doesn't say it; names those that do.
    """
    if offload is None:
        return HostSchedule()
    found = engine_of(offload.engine).host_schedule(times, offload)
    if found is None:
        known = [name for name in ENGINES if engine_of(name).host_schedule(times, offload) is not None]
        raise SettingError(
            f"a simulation knows the steps of {' and '.join(map(repr, known))}, found offload={offload.engine!r}"
        )
    return found


def _trace(model: nn.Module, batch: Any, loss: Loss, setup: Setup) -> StepTrace:
    with techniques_of(model, setup.sequence, setup.zero) as techniques:
        return trace_in(setup.precision, model, batch, techniques.around(loss))


class _Work:
    """One model on one kind of machine."""

    def __init__(self, model: nn.Module, trace: StepTrace, profile: DeviceProfile, latencies: Latencies) -> None:
        self._model = model
        self._trace = trace
        self._profile = profile
        self._seconds = seconds_on(profile)
        self._latencies = latencies

    def result(self, setups: Sequence[Setup], candidate: Candidate, batch: Any, slow_rank: float) -> Simulation:
        """The steps of all sizes, with what they have in common."""
        num_tokens, unit = count_tokens(batch)
        sequence = setups[0].mesh.sequence
        latencies = self._latencies
        return Simulation(
            model=type(self._model).__name__,
            num_params=sum(param.numel() for param in self._model.parameters()),
            line=candidate.line(setups[0].sequence),
            device=self._profile.name,
            ranks_per_node=setups[0].ranks_per_node,
            num_tokens=num_tokens,
            unit=unit,
            slow_rank=slow_rank,
            steps=_steps([(setup, *self.step(setup, slow_rank)) for setup in setups], num_tokens / sequence),
            assumptions=[
                *assumptions_of(self._profile),
                f"a round of a collective takes {1e6 * latencies.rank:g} us within a node and "
                f"{1e6 * latencies.node:g} us between nodes",
            ],
        )

    def step(self, setup: Setup, slow_rank: float) -> tuple[ClusterStep, float]:
        """A step on a cluster, and the seconds by which its slow rank makes it longer."""
        setup = fit_states(self._model, self._trace, setup, round(USABLE * self._profile.memory))
        params = params_of(self._model, setup)
        program = program_of(self._trace, params, setup, self._profile, self._seconds)
        forward, backward = (phase_seconds(self._trace, phase, self._seconds) for phase in ("forward", "backward"))
        times = host_times(self._trace, params, setup, self._profile, forward, backward)
        has_host = any(unit.host for unit in program.units)  # else all states fit on the device
        schedule = _schedule(setup.offload if has_host else None, times)
        found = simulate_cluster(program, setup, self._profile, self._latencies, schedule, slow_rank)
        if slow_rank == 1:
            return found, 0.0
        even = simulate_cluster(program, setup, self._profile, self._latencies, schedule)
        return found, found.seconds - even.seconds


def _steps(found: Sequence[tuple[Setup, ClusterStep, float]], tokens_per_rank: float) -> list[SimulatedStep]:
    first = found[0][1].seconds
    return [
        SimulatedStep(
            num_nodes=setup.num_ranks // setup.ranks_per_node,
            num_ranks=setup.num_ranks,
            seconds=step.seconds,
            model=step.record.model,
            update=step.record.update,
            waited=dict(step.waited),
            slow=slow,
            tokens_per_s=tokens_per_rank * setup.num_ranks / step.seconds,
            efficiency=first / step.seconds,
            calls=dict(step.record.traffic.calls),
            nbytes=dict(step.record.traffic.nbytes),
            num_classes=step.num_classes,
            num_events=step.num_events,
        )
        for setup, step, slow in found
    ]

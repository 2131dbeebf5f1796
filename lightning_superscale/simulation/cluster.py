"""Simulates the steps of all ranks of a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_superscale.estimation.devices import DeviceProfile
from lightning_superscale.estimation.links import Latencies, Links
from lightning_superscale.estimation.setup import Setup
from lightning_superscale.offload.planner.forecast import HostSchedule
from lightning_superscale.simulation.host import HostOptimizer
from lightning_superscale.simulation.machine import Collectives, SharedPorts, new_environment
from lightning_superscale.simulation.program import Program
from lightning_superscale.simulation.rank import SimulatedRank, StepRecord, Waiting
from lightning_superscale.simulation.symmetry import symmetry_of

# A step's gathers and commits reach into the next ones; from the third step on they are alike.
_NUM_STEPS = 4


@dataclass(frozen=True, slots=True)
class ClusterStep:
    """A step of all ranks, after the first ones.

    Attributes:
        seconds: from the end of the step before to its own, on the rank that ends last.
        record: of an ordinary rank.
        num_classes: ranks that were simulated; each stands for all that do the same.
        num_events: events of the simulation.
    """

    seconds: float
    record: StepRecord
    num_classes: int
    num_events: int

    @property
    def waited(self) -> Mapping[Waiting, float]:
        """For what an ordinary rank waited how long, in seconds."""
        return self.record.waited


def simulate_cluster(
    program: Program,
    setup: Setup,
    profile: DeviceProfile,
    latencies: Latencies,
    schedule: HostSchedule,
    slow_rank: float = 1.0,
) -> ClusterStep:
    """Simulate steps in which every rank does the same, but one rank at another pace.

    Args:
        schedule: when the host works, where it has units to step.
        slow_rank: by which forward and backward take longer on the last rank; 1 makes it as the others.

    Raises:
        SuperScaleError: simpy is not installed.
    """
    env = new_environment()
    mesh = setup.mesh
    axes = {
        "shard": mesh.groups(*mesh.shard_axes),
        "replicate": mesh.groups(*mesh.replica_axes),
        "sequence": mesh.groups("sequence"),
    }
    last = setup.num_ranks - 1
    slowness = [slow_rank if rank == last else 1.0 for rank in range(setup.num_ranks)]
    symmetry = symmetry_of(axes, slowness, setup.ranks_per_node)
    ports = SharedPorts(env)
    collectives = Collectives(env, ports, Links(profile, latencies))
    has_host = any(unit.host for unit in program.units)
    ranks = []
    for own in range(symmetry.num_classes):
        ranks.append(
            SimulatedRank(
                env,
                own,
                program,
                symmetry.groups[own],
                collectives,
                HostOptimizer(env, ports, own, program.units, schedule) if has_host else None,
                slowness=slowness[symmetry.class_of.index(own)],
                waits_for_host=schedule.waits,
                hides_nothing=profile.shares_cores,
            )
        )
    ends = [env.process(rank.steps(_NUM_STEPS)) for rank in ranks]
    num_events = 0
    while any(end.is_alive for end in ends):
        env.step()
        num_events += 1
    return ClusterStep(
        seconds=max(rank.record.seconds for rank in ranks),
        record=ranks[symmetry.class_of[0]].record,
        num_classes=symmetry.num_classes,
        num_events=num_events,
    )

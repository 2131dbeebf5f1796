"""What a simulation says of one strategy on several sizes of a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_superscale.simulation.rank import Waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedStep:
    """One step on a cluster of one size.

    Attributes:
        num_nodes, num_ranks: of the cluster.
        seconds: of the step, from the end of the one before to its own.
        model: seconds of forward and backward on an ordinary rank.
        update: seconds of the optimizer on its device.
        waited: for what its device waited how long, in seconds; together with `model` and `update` the step.
        slow: seconds by which the slow rank made the step longer; 0 without one.
        tokens_per_s: of all ranks; samples where batches are no tokens.
        efficiency: tokens per second of one rank, relative to the first size's.
        calls, nbytes: one rank's collectives by kind, and the bytes of its inputs, padding included.
        num_classes: ranks that were simulated; each stands for all that do the same.
        num_events: events of the simulation.
    """

    num_nodes: int
    num_ranks: int
    seconds: float
    model: float
    update: float
    waited: Mapping[Waiting, float]
    slow: float
    tokens_per_s: float
    efficiency: float
    calls: Mapping[str, int]
    nbytes: Mapping[str, int]
    num_classes: int
    num_events: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What `simulate()` says.

    Attributes:
        model: its class.
        line: the argument of the Trainer.
        device: name of the profile.
        ranks_per_node: ranks of each node.
        num_tokens: of one batch, which each rank has or ranks of a sequence axis share; or its samples.
        slow_rank: by which forward and backward take longer on one rank; 1 for none.
        steps: by size of the cluster, in the order asked for.
        assumptions: what was taken for granted, in sentences.
    """

    model: str
    num_params: int
    line: str
    device: str
    ranks_per_node: int
    num_tokens: int
    unit: str
    slow_rank: float
    steps: Sequence[SimulatedStep]
    assumptions: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """All of it in values that JSON takes."""
        return asdict(self)

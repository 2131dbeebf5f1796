"""What one rank does in a step: pieces of forward and backward, and what they wait for and set free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_superscale.estimation.devices import DeviceProfile
from lightning_superscale.estimation.links import Exchange
from lightning_superscale.estimation.memory import Param
from lightning_superscale.estimation.peak import reduced_size, units_of
from lightning_superscale.estimation.setup import Setup
from lightning_superscale.estimation.step_time import (
    CopySeconds,
    Seconds,
    copy_seconds,
    host_seconds,
    update_seconds,
)
from lightning_superscale.estimation.tracing.operations import Phase, TracedOperation
from lightning_superscale.estimation.tracing.step import StepTrace
from lightning_superscale.layout.rows import unit_layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Parameters that travel together.

    Attributes:
        reduced_bytes: of the buffer of all ranks' gradients that is reduced, padding included; 0 where none train.
        gathered_bytes: of all ranks' weights that are gathered, padding included; 0 where none are.
        is_gathered: whether FSDP2 gathers the weights for each pass; otherwise new weights are gathered after a step.
        update: seconds of the step on the device.
        link, host: seconds of one direction of the link, and of the step on the host.
        copies: the device's, of gathered weights out of their buffer and of gradients into theirs.
    """

    reduced_bytes: int
    gathered_bytes: int
    is_gathered: bool = False
    update: float = 0.0
    link: float = 0.0
    host: float = 0.0
    copies: CopySeconds = CopySeconds(0.0, 0.0)


@dataclass(slots=True)
class Piece:
    """Some operations of a pass, one after the other.

    Attributes:
        seconds: of the device.
        needs: units whose weights the first operation reads, which no earlier one of the pass did.
        exchanges: with the ranks that share a sequence, before the first operation.
        completes: units whose last gradient the last operation makes.
    """

    seconds: float = 0.0
    needs: list[int] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    completes: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Program:
    """One rank's step.

    Attributes:
        units: by index, in the order in which their gradients are complete.
        forward, backward: the pieces of each pass, in order.
    """

    units: Sequence[Unit]
    forward: Sequence[Piece]
    backward: Sequence[Piece]

    @property
    def forward_order(self) -> list[int]:
        """Units in the order in which forward reads them; those that it reads in no operation last."""
        read = [index for piece in self.forward for index in piece.needs]
        return [*read, *(index for index in range(len(self.units)) if index not in read)]

    def seconds(self) -> float:
        """Seconds of forward and backward."""
        return sum(piece.seconds for piece in (*self.forward, *self.backward))


def program_of(
    trace: StepTrace, params: Sequence[Param], setup: Setup, profile: DeviceProfile, seconds: Seconds
) -> Program:
    """The step of a traced module.

    Args:
        trace: of one rank's step, under the options for long sequences that the setup has.
        params: of the module, for this setup.
        seconds: of an operation on this profile's device.
    """
    order = {grad.fqn: i for i, grad in enumerate(trace.gradients)}
    groups = units_of(params, setup, order)
    num_trained = len(groups)
    groups = [*groups, *_frozen_groups(params)]
    names = [[param.spec.fqn for param in group] for group in groups]
    units = [_unit(group, setup, profile) for group in groups]
    made = {grad.fqn: grad.operation for grad in trace.gradients}
    phases: dict[Phase, list[Piece]] = {}
    start = 0
    for phase in ("forward", "backward"):
        operations = [one for one in trace.operations if one.phase == phase]
        needs = _needs(trace, phase, names, units, made, start)
        ends = _ends([names[i] for i in range(num_trained)], made, start) if phase == "backward" else {}
        phases[phase] = _pieces(operations, needs, ends, seconds)
        start += len(operations)
    return Program(units, phases["forward"], phases["backward"])


def _frozen_groups(params: Sequence[Param]) -> list[list[Param]]:
    """Frozen parameters that FSDP2 gathers, by group."""
    groups: dict[int | None, list[Param]] = {}
    for param in params:
        if param.is_gathered and not param.trains:
            groups.setdefault(param.block, []).append(param)
    return list(groups.values())


def _unit(group: Sequence[Param], setup: Setup, profile: DeviceProfile) -> Unit:
    num_shards = setup.num_shards
    padded = unit_layout(0, [param.spec for param in group], 0, num_shards).shard_numel * num_shards
    weights = padded * group[0].dtype.itemsize
    if group[0].is_gathered:  # FSDP2 packs rows without gaps
        weights = sum(param.shard_numel(num_shards) * param.dtype.itemsize for param in group) * num_shards
    has_gathers = num_shards > 1 and (group[0].is_gathered or setup.zero.stage > 0)
    link, host = host_seconds(group, setup, profile)
    return Unit(
        reduced_bytes=padded * reduced_size(group[0], setup) if group[0].trains else 0,
        gathered_bytes=weights if has_gathers else 0,
        is_gathered=group[0].is_gathered,
        update=update_seconds(group, setup, profile),
        link=link,
        host=host,
        copies=copy_seconds(group, setup, profile),
    )


def _needs(
    trace: StepTrace,
    phase: Phase,
    names: Sequence[Sequence[str]],
    units: Sequence[Unit],
    made: Mapping[str, int],
    start: int,
) -> dict[int, list[int]]:
    """By the place of an operation in its phase, the units that it is the first to read.

    Backward reads weights that FSDP2 gathers again, also of groups of which it only makes gradients; new weights of
    other stages are there since forward.
    """
    needs: dict[int, list[int]] = {}
    for index, unit in enumerate(units):
        if phase == "backward" and not unit.is_gathered:
            continue
        uses = [trace.first_use[phase, fqn] for fqn in names[index] if (phase, fqn) in trace.first_use]
        if phase == "backward":
            uses += [made[fqn] - 1 for fqn in names[index] if fqn in made]
        if uses:
            needs.setdefault(min(uses) - start, []).append(index)
    return needs


def _ends(names: Sequence[Sequence[str]], made: Mapping[str, int], start: int) -> dict[int, list[int]]:
    """By the number of operations before, the units that are complete then; each after those before it."""
    ends: dict[int, list[int]] = {}
    last = 0
    for index, own in enumerate(names):
        places = [made[fqn] - start for fqn in own if fqn in made]
        if places:
            last = max(last, *places)
            ends.setdefault(last, []).append(index)
    return ends


def _pieces(
    operations: Sequence[TracedOperation],
    needs: Mapping[int, list[int]],
    ends: Mapping[int, list[int]],
    seconds: Seconds,
) -> list[Piece]:
    """Cut the operations of a pass where they wait for something or complete something."""
    pieces = [Piece()]

    def begin() -> Piece:
        if pieces[-1] != Piece():
            pieces.append(Piece())
        return pieces[-1]

    for place, one in enumerate(operations):
        if place in ends:
            pieces[-1].completes += ends[place]
            begin()
        if place in needs:
            begin().needs += needs[place]
        if one.exchange is None:
            pieces[-1].seconds += seconds(one)
            continue
        piece = pieces[-1] if not pieces[-1].seconds else begin()  # keys and values go one after the other
        piece.exchanges.append(one.exchange)
    for place in sorted(place for place in ends if place >= len(operations)):
        pieces[-1].completes += ends[place]
    return pieces

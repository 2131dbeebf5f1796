"""The most bytes that one rank's device holds at a time in a step: a traced step, with gradients leaving as they do.

[Note: Moments] A traced step keeps every gradient. In a run, gradients stay in `param.grad` through the next forward,
until the framework zeroes them; or they leave during backward, unit by unit: on one rank to the host, on several into
the buffer of a reduction, of which this rank's rows stay, on the device or in host memory. Where a step has several
micro-batches, those after the first find what the ones before have left: whole gradients where ranks reduce once per
step, and this rank's rows otherwise. What backward makes is added to it, and gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from lightning_superscale.estimation.memory import (
    Param,
    byte_classes,
    flowing_blocks,
    kept_on_device,
    params_of,
    share_on_device,
)
from lightning_superscale.estimation.setup import Setup
from lightning_superscale.estimation.tracing.step import StepTrace
from lightning_superscale.layout.rows import align_up
from lightning_superscale.offload.planner.choices import MIB, choose_bucket_mb
from lightning_superscale.offload.weight_flow.schedule import BLOCKS_AHEAD
from lightning_superscale.optim.bucketing import Grouping
from lightning_superscale.run.report.plan import ByteClass

# FSDP2 gathers the next group while the present one is used.
_GATHERED_GROUPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Bytes on the device at the moment of a step that holds the most.

    Attributes:
        kept: of weights, states and buffers, which are there all the time.
        batch: of the batch.
        activations: of forward's results that backward needs, and temporaries of operations.
        gradients: of gradients.
        transfers: of buffers of reductions, and of weights that are gathered.
    """

    kept: int
    batch: int
    activations: int
    gradients: int
    transfers: int

    @property
    def total(self) -> int:
        return self.kept + self.batch + self.activations + self.gradients + self.transfers


class _Change(NamedTuple):
    """A change of what the trace counts, after a place in it."""

    place: int
    gradients: int
    transfers: int


def units_of(params: Sequence[Param], setup: Setup, order: Mapping[str, int]) -> list[list[Param]]:
    """The trained parameters that travel together, in the order in which their gradients are complete.

    Args:
        order: by name, the place of a gradient among those of a step.
    """
    trained = [param for param in params if param.trains]
    gathered = [param for param in trained if param.is_gathered]
    plain = [param for param in trained if not param.is_gathered]
    groups: dict[tuple[int | None, torch.dtype], list[Param]] = {}
    for param in reversed(gathered):
        groups.setdefault((param.block, param.dtype), []).append(param)
    twins = {nn.Parameter(torch.empty(p.spec.shape, dtype=p.dtype, device="meta")): p for p in plain}
    grouping = Grouping(
        unit_bytes(params, setup),
        order={twin: order[param.spec.fqn] for twin, param in twins.items() if param.spec.fqn in order},
        on_device=frozenset(twin for twin, p in twins.items() if setup.offload is not None and not p.is_on_host),
        block_of={twin: p.block for twin, p in twins.items() if setup.flows and p.block is not None},
    )
    cut = grouping.units_of([(param.spec.fqn, twin) for twin, param in twins.items()])
    # Weights of a group around others are used before and after these: their gradients are complete last.
    ordered = sorted(groups.values(), key=lambda unit: max(order.get(param.spec.fqn, -1) for param in unit))
    return [*ordered, *([twins[twin] for _, twin in unit] for unit in cut)]


def unit_bytes(params: Sequence[Param], setup: Setup) -> int:
    """Upper bound of a unit's weights, as a run chooses it."""
    if setup.offload is None:
        return setup.zero.bucket_mb * MIB
    trained = sum(param.numel * param.dtype.itemsize for param in params if param.trains)
    return choose_bucket_mb(setup.offload.bucket_mb, trained).value * MIB


def device_peak(trace: StepTrace, params: Sequence[Param], classes: Sequence[ByteClass], setup: Setup) -> Moment:
    """The moment of a step at which the device holds the most.

    Args:
        params, classes: of the traced module, for this setup.
    """
    kept = sum(kept_on_device(classes).values())
    changes = list(_changes(trace, params, setup))
    passes = [changes]
    if setup.micro_batches > 1:
        passes.append(list(_later_changes(trace, changes, setup)))
    weights = _passing_weights(params, setup)
    moments = [
        Moment(kept=kept, batch=trace.batch_bytes, activations=alive, gradients=grads, transfers=moving + weights)
        for one in passes
        for alive, grads, moving in _walk(trace, one)
    ]
    return max(moments, key=lambda moment: moment.total)


def fit_states(module: nn.Module, trace: StepTrace, setup: Setup, usable: int) -> Setup:
    """The setup with as many states on the device as fit there, as a run chooses after its first step.

    Args:
        trace: of one step of the module.
        usable: bytes of the device that a step may take.
    """
    offload = setup.offload
    if offload is None or setup.flows:
        return setup
    if offload.gpu_fraction != "auto":
        return replace(setup, on_device=offload.gpu_fraction)

    def peak(share: float) -> int:
        shared = replace(setup, on_device=share)
        params = params_of(module, shared)
        return device_peak(trace, params, byte_classes(module, params, shared), shared).total

    on_host, on_device = peak(0.0), peak(1.0)
    if on_device <= on_host:
        return setup
    return replace(setup, on_device=min(1.0, max(0.0, (usable - on_host) / (on_device - on_host))))


def _passing_weights(params: Sequence[Param], setup: Setup) -> int:
    """Bytes of weights that are on the device while their block is used: they flow, or FSDP2 gathers them."""
    if setup.flows:
        sizes = flowing_blocks(params)
        most = 1 + BLOCKS_AHEAD
    elif setup.shards_weights:
        sizes = flowing_blocks([param for param in params if param.is_gathered])
        most = _GATHERED_GROUPS
    else:
        return 0
    return sum(sorted(sizes.values())[-most:])


def _walk(trace: StepTrace, changes: Sequence[_Change]) -> Iterator[tuple[int, int, int]]:
    """Bytes of activations, gradients and transfers after each change of any of them."""
    made = iter([*trace.gradients, None])
    coming = next(made)
    rest = iter([*changes, None])
    change = next(rest)
    all_gradients = gradients = transfers = 0
    for place, alive in enumerate(trace.alive):
        while coming is not None and coming.place <= place:
            all_gradients += coming.nbytes
            gradients += coming.nbytes
            coming = next(made)
        yield alive - all_gradients, gradients, transfers
        while change is not None and change.place <= place:
            gradients += change.gradients
            transfers += change.transfers
            yield alive - all_gradients, gradients, transfers
            change = next(rest)


def _changes(trace: StepTrace, params: Sequence[Param], setup: Setup) -> Iterator[_Change]:
    if not setup.streams:
        # Those of the last step, until they are zeroed between forward and backward.
        last = sum(grad.nbytes for grad in trace.gradients)
        yield _Change(-1, last, 0)
        yield _Change(trace.forward_end, -last, 0)
        return
    place_of = {grad.fqn: grad.place for grad in trace.gradients}
    size_of = {grad.fqn: grad.nbytes for grad in trace.gradients}
    units = units_of(params, setup, {grad.fqn: i for i, grad in enumerate(trace.gradients)})
    found: list[_Change] = []
    ready = 0
    for unit in units:
        used = [param for param in unit if param.spec.fqn in place_of]
        if not used:
            continue
        whole = sum(size_of[param.spec.fqn] for param in used)
        # Units leave in their order, so that ranks reduce the same ones.
        last_made = max(place_of[param.spec.fqn] for param in used)
        ready = max(ready, last_made) if setup.num_ranks > 1 else last_made
        stays = [share_on_device(param, setup) for param in used]
        if setup.num_ranks == 1:
            kept = round(sum(share * size_of[param.spec.fqn] for param, share in zip(used, stays, strict=True)))
            copies = _copies_of_split(used, stays, size_of)
            found += [_Change(ready, 0, copies), _Change(ready, kept - whole, -copies)]
            continue
        rows = sum(align_up(param.shard_numel(setup.num_shards)) * reduced_size(param, setup) for param in unit)
        packed = rows * setup.num_shards
        kept = round(rows * sum(stays) / len(stays))
        found += [_Change(ready, 0, packed), _Change(ready, -whole, 0), _Change(ready, kept, -packed)]
    yield from sorted(found, key=lambda change: change.place)


def _later_changes(trace: StepTrace, changes: Sequence[_Change], setup: Setup) -> Iterator[_Change]:
    """Those of a micro-batch after the first.

    Args:
        changes: of the first one.
    """
    added = [_Change(grad.place, -grad.nbytes, 0) for grad in trace.gradients]
    whole = sum(grad.nbytes for grad in trace.gradients)
    if not setup.streams:
        yield _Change(-1, whole, 0)
        yield from added
        return
    if setup.accumulates_whole:
        yield _Change(-1, whole, 0)
        yield from sorted([*added, *changes], key=lambda change: change.place)
        return
    left = whole + sum(change.gradients for change in changes)  # this rank's rows
    yield _Change(-1, left, 0)
    yield from changes
    yield _Change(len(trace.alive) - 1, -left, 0)


def _copies_of_split(params: Sequence[Param], shares: Sequence[float], size_of: Mapping[str, int]) -> int:
    """Bytes of a gradient's copies while its columns part: all of it by columns, and those that go to the host."""
    split = [size_of[p.spec.fqn] for p, share in zip(params, shares, strict=True) if 0 < share < 1]
    return 2 * max(split, default=0)


def reduced_size(param: Param, setup: Setup) -> int:
    """Bytes of an element of a parameter's gradient while ranks reduce it."""
    gradients = setup.precision.gradients
    return (gradients.reduction or gradients.accumulation or param.dtype).itemsize

"""Bucket transport (ZeRO-0/1/2): plain parameters that view flat buffers, gradients taken by post-accumulate hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_superscale.comm.collectives import Pending
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.layout import ParamSpec, split_into_units
from lightning_superscale.zero.bucket_unit import BucketUnit
from lightning_superscale.zero.held import HeldGradients
from lightning_superscale.zero.late_gathers import LateGathers
from lightning_superscale.zero.ranks import Ranks
from lightning_superscale.zero.reduction import GradientReducer
from lightning_superscale.zero.units import DeltaSink, GradientDelta, PublishEvent, ShardUnit, check_dense


class _Gather(NamedTuple):
    """New weights under way from the other ranks.

    Attributes:
        packed: the stepped weights to unpack once they are there; empty where they arrive in place.
    """

    pending: Pending
    packed: Sequence[int]


class Streaming(NamedTuple):
    """Weights that come from the host when a block of modules needs them.

    Attributes:
        block_of: the block that owns a parameter, by number. Units never span blocks.
        device: where they come to.
    """

    block_of: Mapping[nn.Parameter, int]
    device: torch.device


class BucketTransport:
    """Carries the gradients of one optimizer's parameters to a sink, and new weights back.

    Gradients are either *held*: they stay in `param.grad`, as in plain PyTorch, until `collect()`; or
    *streamed*: each leaves `param.grad` as soon as its unit is complete in the last backward of a step.

    Args:
        named_params: trainable parameters without duplicates, in registration order.
        unit_bytes: upper bound of a unit's weights.
        sink: receives every delta.
        ranks: the other ranks.
        label: names the optimizer in errors.
        no_sync: micro-batches before the last of a step accumulate in `param.grad`, so that ranks talk once
            per step; False reduces each, so that no rank holds whole gradients between them.
        streaming: parameters that are on the device only while they are used; None for none.
    """

    def __init__(
        self,
        named_params: Sequence[tuple[str, nn.Parameter]],
        *,
        unit_bytes: int,
        sink: DeltaSink,
        ranks: Ranks,
        label: str = "optimizer",
        no_sync: bool = True,
        streaming: Streaming | None = None,
    ) -> None:
        self._streaming = streaming
        self._unit_bytes = unit_bytes
        self._sink = sink
        self._ranks = ranks
        self._no_sync = no_sync or self.is_local
        self._reducer = GradientReducer(ranks, label, sink)
        self._held = HeldGradients(ranks, label)
        self._place: dict[nn.Parameter, tuple[BucketUnit, int]] = {}
        self._hooks: list[RemovableHandle] = []
        self._is_streamed = False
        self._is_blocked = False
        # Per unit: gradients that wait for the rest of their unit, and whether it was sent this step.
        self._waiting: dict[int, dict[int, Tensor]] = {}
        self._sent: set[int] = set()
        self._uploads: dict[int, PublishEvent] = {}
        self._gathers: dict[int, _Gather] = {}
        self._late_gathers = LateGathers(ranks.gather)
        self.units: list[BucketUnit] = []
        self.add_params(named_params)

    @property
    def is_local(self) -> bool:
        return self._ranks.mesh.is_single

    def add_params(self, named_params: Sequence[tuple[str, nn.Parameter]]) -> list[BucketUnit]:
        """Move parameters into new units, last registered first: about the order of their gradients."""
        axis, streaming = self._ranks.mesh.shard, self._streaming
        added = []
        for (_, block, dtype, _), group in self._kinds(named_params).items():
            streams_to = None if streaming is None or block is None else streaming.device
            params = dict(group)
            specs = [ParamSpec(fqn, tuple(param.shape)) for fqn, param in group]
            for members in split_into_units(specs, max(1, self._unit_bytes // dtype.itemsize)):
                named = [(spec.fqn, params[spec.fqn]) for spec in members]
                memory = self._ranks.mesh.memory
                unit = BucketUnit(len(self.units), named, axis.rank, axis.size, memory, streams_to=streams_to)
                self.units.append(unit)
                self._reducer.add_unit(unit)
                added.append(unit)
                for i, param in enumerate(unit.params):
                    self._place[param] = (unit, i)
                    if self._is_streamed:
                        self._hooks.append(self._hooked(param))
        return added

    def _kinds(
        self, named_params: Sequence[tuple[str, nn.Parameter]]
    ) -> dict[tuple[int, int | None, torch.dtype, torch.device], list[tuple[str, nn.Parameter]]]:
        """Parameters that may share a unit, last registered first; what surrounds a block shares none across it."""
        kinds: dict[tuple[int, int | None, torch.dtype, torch.device], list[tuple[str, nn.Parameter]]] = {}
        run, last = 0, None
        for fqn, param in reversed(named_params):
            block = None if self._streaming is None else self._streaming.block_of.get(param)
            run, last = run + (block != last), block
            kinds.setdefault((run, block, param.dtype, param.device), []).append((fqn, param))
        return kinds

    def place_of(self, param: nn.Parameter) -> tuple[BucketUnit, int] | None:
        """The unit of a parameter and its index there, or None when no unit holds it."""
        return self._place.get(param)

    # Gradients

    def stream(self) -> None:
        """From now on, take gradients during the last backward of a step rather than at the step."""
        self._is_streamed = True
        self._hooks += [self._hooked(param) for param in self._place]

    def watch_edits(self) -> None:
        """Refuse, at the step, held gradients that somebody changed in place: they are only this rank's share."""
        if not self.is_local:
            self._held.watch(self._place)

    def _hooked(self, param: nn.Parameter) -> RemovableHandle:
        hook: RemovableHandle = param.register_post_accumulate_grad_hook(self._on_grad)  # type: ignore[no-untyped-call]
        return hook

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """While open, more micro-batches of the step follow.

        With no_sync, gradients accumulate in `param.grad`; without, and streamed, they are reduced before
        this returns, so that every rank calls it.
        """
        before, self._is_blocked = self._is_blocked, self._no_sync
        try:
            yield
        finally:
            self._is_blocked = before
        if not self._no_sync and self._is_streamed:
            self._collect_over_ranks()

    def _on_grad(self, param: nn.Parameter) -> None:
        self._late_gathers.issue_all()
        if self._is_blocked:
            return
        unit, i = self._place[param]
        grad = self._take(unit, i)
        if not self.is_local:
            self._reducer.put(unit, i, grad)
            self._reducer.launch_complete()
            return
        if unit.index in self._sent:
            # A second backward of this step, or a block used again by a reentrant checkpoint.
            self._sink(GradientDelta(unit, [(i, grad)]))
            return
        waiting = self._waiting.setdefault(unit.index, {})
        if i in waiting:
            waiting[i].add_(grad)
        else:
            waiting[i] = grad
        if len(waiting) == len(unit.params):
            self._send(unit)

    def _take(self, unit: BucketUnit, i: int) -> Tensor:
        param = unit.params[i]
        grad = param.grad
        if grad is None:
            raise AssertionError(f"no gradient to take from {unit.full.slices[i].fqn}")
        check_dense(unit.full.slices[i].fqn, grad)
        param.grad = None
        return grad.detach().reshape(-1)

    def _send(self, unit: BucketUnit) -> None:
        waiting = self._waiting.pop(unit.index)
        self._sent.add(unit.index)
        self._sink(GradientDelta(unit, sorted(waiting.items())))

    def average_held(self) -> None:
        """Make held gradients what every rank would see under DDP: averages. Every rank calls it after backward."""
        if not self.is_local and not self._is_streamed:
            self._late_gathers.issue_all()
            self._held.average(self.units)

    def collect(self) -> None:
        """Send what the step still lacks: held gradients, and units of which only a part arrived.

        Held gradients stay visible in `param.grad` until the user's `zero_grad()`, as in plain PyTorch.
        """
        if self.is_local:
            for unit in self.units:
                if unit.index in self._waiting:
                    self._send(unit)
                slices = self._left_in_params(unit)
                if slices:
                    self._sink(GradientDelta(unit, slices))
            self._sent.clear()
        elif self._held.is_averaged:
            self._held.hand_over(self.units, self._sink)
        else:
            self._collect_over_ranks()

    def _collect_over_ranks(self) -> None:
        self._late_gathers.issue_all()
        error: SuperScaleError | None = None
        try:
            for unit in self.units:
                for i, grad in self._left_in_params(unit):
                    self._held.check_unedited(unit.params[i], unit.full.slices[i].fqn)
                    self._reducer.put(unit, i, grad)
        except SuperScaleError as found:
            error = found  # the other ranks are on their way into the agreement
        self._reducer.finish(error)

    def _left_in_params(self, unit: BucketUnit) -> list[tuple[int, Tensor]]:
        slices = []
        for i, param in enumerate(unit.params):
            if param.grad is None:
                continue
            if self._is_streamed:
                slices.append((i, self._take(unit, i)))
            else:
                check_dense(unit.full.slices[i].fqn, param.grad)
                slices.append((i, param.grad.detach().reshape(-1)))
        return slices

    def discard(self) -> None:
        """Forget gradients of an interrupted step."""
        self._waiting.clear()
        self._sent.clear()
        self._reducer.discard()
        self._held.discard()

    # Weights

    def publish(self, unit: ShardUnit, event: PublishEvent | None, stepped: Sequence[int]) -> None:
        """Note that new weights are on their way into `unit.weights`; gather them from the ranks that hold them."""
        bucket = self.units[unit.index]
        if bucket.is_whole:
            if event is not None:
                self._uploads[bucket.index] = event
        elif event is not None:
            self._late_gathers.add(bucket, event, stepped)
        elif self._ranks.shard.gathers_rows:
            self._gathers[bucket.index] = _Gather(self._ranks.shard.all_gather_rows(bucket.rows_of_ranks()), ())
        else:
            bucket.pack_rows(stepped)
            self._gathers[bucket.index] = _Gather(self._ranks.shard.all_gather(bucket.gathered()), stepped)

    def is_published(self, unit: ShardUnit) -> bool:
        """Whether waiting for a whole unit's new weights would return at once."""
        upload = self._uploads.get(unit.index)
        return upload is None or upload.is_ready()

    def wait_published(self, units: Iterable[ShardUnit]) -> None:
        """Return when whatever runs next sees the new weights of these units."""
        for unit in units:
            upload = self._uploads.pop(unit.index, None)
            if upload is not None:
                upload.wait()
            gather = self._gathers.pop(unit.index, None)
            if gather is not None:
                gather.pending.wait()
                if gather.packed:
                    self.units[unit.index].unpack_gathered(gather.packed)
            self._late_gathers.wait(self.units[unit.index])

    def wait_all_published(self) -> None:
        self.wait_published(self.units)

    def abandon(self) -> None:
        """Stop waiting for other ranks: one of them failed, and what is under way may never arrive."""
        self.discard()
        self._gathers.clear()
        self._late_gathers.clear()

    def close(self) -> None:
        """Remove every hook and give parameters their own storage back."""
        self.wait_all_published()
        self._held.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for unit in self.units:
            unit.release()
        self._ranks.mesh.memory.clear()

"""Bucket transport: plain parameters that view flat buffers, gradients taken by post-accumulate hooks.

Rules that make every autograd program right (two backward calls, reused blocks, reentrant checkpoints,
branches, losses with retained graphs):

1. A backward call is never final; `optimizer.step()` is. Nothing counts used parameters.
2. Reduction is linear, so a late gradient is one more delta.
3. Units are collected in index order at the step, on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.layout import ParamSpec, split_into_units
from lightning_superscale.zero.units import DeltaSink, GradientDelta, PublishEvent, ShardUnit


class BucketTransport:
    """Carries the gradients of one optimizer's parameters to a sink, and new weights back.

    Gradients are either *held*: they stay in `param.grad`, as in plain PyTorch, until `collect()`; or
    *streamed*: each leaves `param.grad` as soon as its unit is complete in the last backward of a step.

    Args:
        named_params: trainable parameters without duplicates, in registration order.
        unit_bytes: upper bound of a unit's weights.
        sink: receives every delta, in the order in which autograd accumulated them.
        shard_rank, shard_world_size: this rank's place on the shard axis.
    """

    def __init__(
        self,
        named_params: Sequence[tuple[str, nn.Parameter]],
        *,
        unit_bytes: int,
        sink: DeltaSink,
        shard_rank: int = 0,
        shard_world_size: int = 1,
    ) -> None:
        self._unit_bytes = unit_bytes
        self._sink = sink
        self._shard_rank = shard_rank
        self._shard_world_size = shard_world_size
        self._place: dict[nn.Parameter, tuple[ShardUnit, int]] = {}
        self._hooks: list[RemovableHandle] = []
        self._is_streamed = False
        self._is_blocked = False
        # Per unit: gradients that wait for the rest of their unit, and whether it was sent this step.
        self._waiting: dict[int, dict[int, Tensor]] = {}
        self._sent: set[int] = set()
        self._published: dict[int, PublishEvent] = {}
        self.units: list[ShardUnit] = []
        self.add_params(named_params)

    def add_params(self, named_params: Sequence[tuple[str, nn.Parameter]]) -> list[ShardUnit]:
        """Move parameters into new units, last registered first: about the order of their gradients."""
        by_kind: dict[tuple[torch.dtype, torch.device], list[tuple[str, nn.Parameter]]] = {}
        for fqn, param in reversed(named_params):
            by_kind.setdefault((param.dtype, param.device), []).append((fqn, param))
        added = []
        for (dtype, _), group in by_kind.items():
            params = dict(group)
            specs = [ParamSpec(fqn, tuple(param.shape)) for fqn, param in group]
            for members in split_into_units(specs, max(1, self._unit_bytes // dtype.itemsize)):
                unit = ShardUnit(
                    len(self.units),
                    [(spec.fqn, params[spec.fqn]) for spec in members],
                    self._shard_rank,
                    self._shard_world_size,
                )
                self.units.append(unit)
                added.append(unit)
                for i, param in enumerate(unit.params):
                    self._place[param] = (unit, i)
                    if self._is_streamed:
                        self._hooks.append(self._hooked(param))
        return added

    def place_of(self, param: nn.Parameter) -> tuple[ShardUnit, int] | None:
        """The unit of a parameter and its index there, or None when no unit holds it."""
        return self._place.get(param)

    # Gradients

    def stream(self) -> None:
        """From now on, take gradients during the last backward of a step rather than at the step."""
        self._is_streamed = True
        self._hooks += [self._hooked(param) for param in self._place]

    def _hooked(self, param: nn.Parameter) -> RemovableHandle:
        hook: RemovableHandle = param.register_post_accumulate_grad_hook(self._on_grad)  # type: ignore[no-untyped-call]
        return hook

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """While open, gradients accumulate in `param.grad`: more micro-batches of the step follow."""
        before, self._is_blocked = self._is_blocked, True
        try:
            yield
        finally:
            self._is_blocked = before

    def _on_grad(self, param: nn.Parameter) -> None:
        if self._is_blocked:
            return
        unit, i = self._place[param]
        grad = self._take(unit, i)
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

    def _take(self, unit: ShardUnit, i: int) -> Tensor:
        param = unit.params[i]
        grad = param.grad
        if grad is None:
            raise AssertionError(f"no gradient to take from {unit.full.slices[i].fqn}")
        _check_dense(unit, i, grad)
        param.grad = None
        return grad.detach().reshape(-1)

    def _send(self, unit: ShardUnit) -> None:
        waiting = self._waiting.pop(unit.index)
        self._sent.add(unit.index)
        self._sink(GradientDelta(unit, sorted(waiting.items())))

    def collect(self) -> None:
        """Send what the step still lacks: held gradients, and units of which only a part arrived.

        Held gradients stay visible in `param.grad` until the user's `zero_grad()`, as in plain PyTorch.
        """
        for unit in self.units:
            if unit.index in self._waiting:
                self._send(unit)
            slices = []
            for i, param in enumerate(unit.params):
                if param.grad is None:
                    continue
                if self._is_streamed:
                    slices.append((i, self._take(unit, i)))
                else:
                    _check_dense(unit, i, param.grad)
                    slices.append((i, param.grad.detach().reshape(-1)))
            if slices:
                self._sink(GradientDelta(unit, slices))
        self._sent.clear()

    def discard(self) -> None:
        """Forget gradients of an interrupted step."""
        self._waiting.clear()
        self._sent.clear()

    # Weights

    def publish(self, unit: ShardUnit, event: PublishEvent | None) -> None:
        """Note that new weights are on their way into `unit.weights`."""
        if event is not None:
            self._published[unit.index] = event

    def wait_published(self, units: Iterable[ShardUnit]) -> None:
        """Return when whatever runs next sees the new weights of these units."""
        for unit in units:
            event = self._published.pop(unit.index, None)
            if event is not None:
                event.wait()

    def wait_all_published(self) -> None:
        self.wait_published(self.units)

    def close(self) -> None:
        """Remove every hook and give parameters their own storage back."""
        self.wait_all_published()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for unit in self.units:
            unit.release()


def _check_dense(unit: ShardUnit, i: int, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise SuperScaleError(
            f"parameter {unit.full.slices[i].fqn!r} has a gradient of layout {grad.layout}; expected a dense one. "
            "Build its module with sparse=False."
        )

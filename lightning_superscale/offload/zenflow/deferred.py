"""The deferred columns of one optimizer: sums over windows, their ends, and the weights that the host makes of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_superscale.config.zenflow import ZenFlowConfig
from lightning_superscale.offload.engine import OffloadContext
from lightning_superscale.offload.link.link import LinkEvent, LinkFence
from lightning_superscale.offload.zenflow.edits import Edits, edits_of, keep_edits
from lightning_superscale.offload.zenflow.host_work import HostWork
from lightning_superscale.offload.zenflow.report import ZenFlowReport
from lightning_superscale.offload.zenflow.split_slice import SplitSlice
from lightning_superscale.offload.zenflow.state import SplitState
from lightning_superscale.offload.zenflow.windows import Absorbed, Phase, Place, by_index, deferred_lr
from lightning_superscale.ops.types import AdamWHyper
from lightning_superscale.optim.param_update import GradScale


class DeferredColumns:
    """Runs the windows of all units ([Note: Windows] in windows.py).

    Args:
        states: by unit index; the caller adds to it.

    Attributes:
        phase: where the windows are.
    """

    def __init__(
        self,
        config: ZenFlowConfig,
        context: OffloadContext,
        states: Mapping[int, SplitState],
        host: HostWork,
        report: ZenFlowReport,
    ) -> None:
        self.phase = Phase()
        self._config = config
        self._states = states
        self._host = host
        self._report = report
        self._link = context.link
        self._timeline = context.timeline
        self._scale = context.arena.zeros(1, torch.float32, is_pinned=context.is_pinned)

    def begin_to_add(
        self,
        hypers: Mapping[int, Mapping[int, AdamWHyper]],
        grad_scale: GradScale,
        clip_value: float | None,
        ends: Callable[[Place], bool],
    ) -> set[Place]:
        """Add this step's deferred gradients to their windows, on the device, or on a thread of the host.

        Args:
            ends: whether a slice's window ends with this step.

        Returns:
            the slices whose gradient is all of a window and is on its way, neither scaled nor clipped.
        """
        arrived: dict[int, list[tuple[SplitSlice, LinkEvent, bool]]] = {}
        unscaled = set()
        for index, by_slice in hypers.items():
            for i, hyper in by_slice.items():
                state, place = self._states[index], (index, i)
                if not state.slices[i].layout.has_deferred:
                    continue
                before = self.phase.open.get(place, Absorbed(0, 0.0, hyper))
                self.phase.open[place] = Absorbed(before.num_steps + 1, before.lr_sum + hyper.lr, hyper)
                is_first = before.num_steps == 0
                sums, one = state.sums, state.slices[i]
                if sums.home == "host":
                    arrival = sums.take_arrival(one)
                    if arrival is not None:
                        arrived.setdefault(index, []).append((one, arrival, is_first))
                elif is_first and ends(place):
                    sums.send_unscaled(one)
                    unscaled.add(place)
                else:
                    sums.absorb_on_device(one, grad_scale, clip_value, is_first=is_first)
        if arrived:
            self._add_on_host(arrived, self.scale_on_host(grad_scale), clip_value)
        return unscaled

    def _add_on_host(
        self,
        arrived: Mapping[int, Sequence[tuple[SplitSlice, LinkEvent, bool]]],
        scale_of: Callable[[], float],
        clip_value: float | None,
    ) -> None:
        """Let the host add up what arrives, in the order of backward ([Note: Sums in turn] in host_work.py).

        Args:
            arrived: by unit index, of each slice its gradient's copy, and whether it is the first one of its window.
        """

        def add(index: int) -> None:
            scale = scale_of()
            for one, _, is_first in arrived[index]:
                with self._timeline.host("host sums", one.piece.fqn):
                    self._states[index].sums.absorb(one, scale, clip_value, is_first=is_first)

        for index in sorted(arrived):
            self._host.add(index, [arrival for _, arrival, _ in arrived[index]], functools.partial(add, index))

    def scale_on_host(self, grad_scale: GradScale) -> Callable[[], float]:
        """A function that a thread of the host calls for a step's factor, which may be on the device yet."""
        if not isinstance(grad_scale, Tensor):
            return lambda: grad_scale
        arrival = self._link.d2h(self._scale, grad_scale.detach().reshape(1))

        def read() -> float:
            arrival.synchronize()
            return float(self._scale)

        return read

    def end_windows(
        self,
        ended: Sequence[Place],
        unscaled: Collection[Place],
        scale_of: Callable[[], float] | None,
        *,
        looks_ahead: bool,
        counts: bool = False,
    ) -> None:
        """Let the host apply windows that end.

        Args:
            unscaled: what `begin_to_add` gave.
            scale_of: gives the factor of these gradients; None without any.
            looks_ahead: whether the next weights are ahead of the masters.
            counts: whether the report counts these windows: neither warm-up's, nor those that are cut short.
        """
        phase, factor = self.phase, self._config.delay_correction if looks_ahead else 0.0
        arrivals = []
        for place in ended:
            (index, i), absorbed = place, phase.open.pop(place)
            state = self._states[index]
            phase.late[place] = self._hyper_of(place, absorbed, is_unscaled=place in unscaled)
            if counts:
                numel = state.slices[i].layout.deferred_numel
                self._report.applied(absorbed.num_steps, numel, is_late=self._config.overlap)
            if factor:
                phase.ahead.add(place)
            else:
                phase.ahead.discard(place)
            sums, one = state.sums, state.slices[i]
            if sums.home == "device":
                if place not in unscaled:
                    sums.send(one)
                arrival = sums.take_arrival(one)
                if arrival is not None:
                    arrivals.append(arrival)
        by_unit = by_index(ended)
        edits = {index: edits_of(self._states[index], slices) for index, slices in by_unit.items()}
        fences = {index: self._states[index].fence() for index in by_unit}

        def update() -> None:
            if scale_of is not None:
                scale = scale_of()
                for place in unscaled:
                    phase.late[place] = replace(phase.late[place], grad_scale=scale)
            self._update(ended, edits, fences)

        if ended:
            self._host.update(arrivals, update)

    def _hyper_of(self, place: Place, absorbed: Absorbed, *, is_unscaled: bool) -> AdamWHyper:
        """The update by a window's gradients.

        Args:
            is_unscaled: the window is one step, whose gradient is neither scaled nor clipped yet.
        """
        rule, num_steps = self._config.deferred_lr, absorbed.num_steps
        hyper = replace(absorbed.last, lr=deferred_lr(rule, absorbed))
        if not is_unscaled:
            hyper = replace(hyper, grad_scale=1.0 if num_steps == 1 else 1.0 / num_steps, clip_value=None)
        if rule != "none":
            return replace(hyper, absorbed=num_steps)
        updates = self.phase.num_updates[place] = self.phase.num_updates.get(place, 0) + 1
        return replace(hyper, step=updates)

    def _update(
        self, ended: Sequence[Place], edits: Mapping[int, Edits], fences: Mapping[int, LinkFence | None]
    ) -> None:
        """Step deferred columns by windows' gradients, and send their weights; on the host's thread.

        Args:
            edits: by unit index, weights that stay as they are.
        """
        for index, slices in by_index(ended).items():
            state = self._states[index]
            hypers = {i: self.phase.late[index, i] for i in slices}
            with self._timeline.host("host optimizer", f"unit {index}"):
                state.update_host(hypers, self._ahead_of(index, slices))
            keep_edits(state, edits[index])
            state.send_weights(slices, fences[index])

    def _ahead_of(self, index: int, slices: Iterable[int]) -> dict[int, AdamWHyper]:
        """The updates that weights are put ahead by: their slices' last ones, once more."""
        late = {i: self.phase.late[index, i] for i in slices if (index, i) in self.phase.ahead}
        factor = self._config.delay_correction
        return {i: replace(one, step=one.step + one.absorbed, lr=one.lr * factor) for i, one in late.items()}

    def place_late(self) -> list[Place]:
        """Wait for the host, and put the weights that it made in place.

        Returns:
            the slices that have new weights.
        """
        late = list(self.phase.late)
        if not late:
            return []
        self._host.wait_updated()
        for index, slices in by_index(late).items():
            self._states[index].place_deferred(slices)
        self.phase.late = {}
        return late

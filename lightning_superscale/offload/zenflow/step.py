"""Steps selected columns at every step, and lets the host apply the others' gradients window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.config.zenflow import ZenFlowConfig
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.engine import OffloadContext
from lightning_superscale.offload.late_moments import LateMoments
from lightning_superscale.offload.zenflow.columns import ColumnLayout
from lightning_superscale.offload.zenflow.state import Edits, SplitState
from lightning_superscale.offload.zenflow.windows import Absorbed, Phase, Place, Window, by_index, deferred_lr
from lightning_superscale.ops.threads import one_thread
from lightning_superscale.ops.types import AdamWHyper
from lightning_superscale.optim.adamw_step import AdamWRule
from lightning_superscale.optim.param_update import GradScale, ParamUpdate, adamw_hyper, by_unit
from lightning_superscale.optim.step_rule import RuleState, StepGuard, SteppedUnit
from lightning_superscale.optim.unit import GradientDelta, ShardUnit
from lightning_superscale.optim.unit_state import UnitState

WINDOW_KEY = "zenflow_window"
"""The sum of the open window's gradients in the optimizer's own state of a parameter, for checkpoints."""


class ZenFlowStep(AdamWRule):
    """Steps Adam and AdamW by columns ([Note: Windows] in windows.py).

    Args:
        context: the parts of the run: the kernels that step deferred and selected columns, the link, the other ranks.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        guard: StepGuard,
        config: ZenFlowConfig,
        context: OffloadContext,
    ) -> None:
        super().__init__(optimizer, guard)
        self._config = config
        self._host = context.update
        self._device = context.device_update
        self._ranks = context.ranks
        self._link = context.link
        self._scale = context.arena.zeros(1, torch.float32, is_pinned=context.is_pinned)
        self._states: dict[int, SplitState] = {}
        self._adder = one_thread("lightning-superscale sums")
        self._updater = one_thread("lightning-superscale windows")
        self._adding: Future[None] | None = None
        self._updating: Future[None] | None = None
        self._phase = Phase()
        self._loaded: dict[Place, Tensor | None] = {}
        self._saved: dict[str, Tensor | int | float] = {}
        self._edited: set[Place] = set()
        self._shown: list[dict[str, Any]] = []
        self._moments = LateMoments(optimizer, self._bring_up)
        self._is_loading = self._has_failed = False

    def attach(self, unit: ShardUnit, state: UnitState) -> None:
        self._states[unit.index] = cast(SplitState, state)

    def add_grads(self, delta: GradientDelta, state: UnitState) -> None:
        self._settle()
        self._wait_added()  # the buffer for this gradient holds the last step's until then
        cast(SplitState, state).add_grads(delta.slices, measures=self._phase.next_step(self._config).chooses)

    def _wait_added(self) -> None:
        self._wait(self._adding)
        self._adding = None  # not before: after an interrupt it still has to be waited for

    def _wait_updated(self) -> None:
        self._wait(self._updating)
        self._updating = None

    def _wait(self, work: Future[None] | None) -> None:
        try:
            if work is not None:
                work.result()
        except Exception:
            self._has_failed = True
            raise

    # The step

    def step(
        self, due: Sequence[ParamUpdate], grad_scale: GradScale, clip_value: float | None
    ) -> Iterator[SteppedUnit]:
        self._settle()
        self._wait_added()
        self._hide_windows()
        plan = self._phase.next_step(self._config)
        on_device = grad_scale if isinstance(grad_scale, Tensor) and self._device.scales_on_device else None
        numbers = self.numbers(1.0 if on_device is not None else float(grad_scale), clip_value)
        hypers = {index: {item.i: numbers.hyper_of(item) for item in items} for index, items in by_unit(due).items()}
        self._take_edits()
        stepped = {(index, i) for index, by_slice in hypers.items() for i in by_slice}
        for index, by_slice in hypers.items():
            state = self._states[index]
            self._device.submit(state.segments_on_device(by_slice, on_device)).wait()
            state.place_selected(list(by_slice))
        self._begin_to_add(hypers, grad_scale, clip_value)
        self._phase.num_steps += 1
        self._phase.window.num_steps += 1
        if plan.ends_window:
            stepped.update(self._end_window(waits=plan.waits))
        if plan.chooses:
            self._choose(due)
        for index in hypers:
            self._states[index].clear_grads()
        numbers.advance()
        for index, items in by_unit(due).items():
            self._moments.expect(index, [item.param for item in items])
        yield from self._stepped(stepped)

    def _stepped(self, stepped: Iterable[Place]) -> Iterator[SteppedUnit]:
        for index, slices in reversed(by_index(stepped).items()):
            yield SteppedUnit(self._states[index].unit, slices, None)

    def _begin_to_add(
        self, hypers: Mapping[int, Mapping[int, AdamWHyper]], grad_scale: GradScale, clip_value: float | None
    ) -> None:
        """Let a thread add this step's deferred gradients to the window."""
        window, tasks = self._phase.window, []
        for index, by_slice in hypers.items():
            for i, hyper in by_slice.items():
                state = self._states[index]
                if state.slices[i].layout.num_selected == state.slices[i].layout.num_columns:
                    continue
                before = window.absorbed.get((index, i), Absorbed(0, 0.0, hyper))
                window.absorbed[index, i] = Absorbed(before.num_steps + 1, before.lr_sum + hyper.lr, hyper)
                arrival = state.take_deferred(i)
                if arrival is not None:
                    tasks.append((state, i, arrival, before.num_steps == 0))

        scale_of = self._scale_on_host(grad_scale)

        def add() -> None:
            scale = scale_of()
            for state, i, arrival, is_first in tasks:
                arrival.synchronize()
                state.absorb(i, window.buffer, scale, clip_value, is_first=is_first)

        self._adding = self._adder.submit(add)

    def _scale_on_host(self, grad_scale: GradScale) -> Callable[[], float]:
        """A function that a thread of the host calls for a step's factor, which may be on the device yet."""
        if not isinstance(grad_scale, Tensor):
            return lambda: grad_scale
        arrival = self._link.d2h(self._scale, grad_scale.detach().reshape(1))

        def read() -> float:
            arrival.synchronize()
            return float(self._scale)

        return read

    # Windows

    def _end_window(self, *, waits: bool) -> list[Place]:
        """Bring the weights of the window before to the device, and let the host apply this one.

        Returns:
            the slices whose deferred columns have new weights on the device.
        """
        placed = self._apply_in_flight()
        phase, adding = self._phase, self._adding
        window = phase.window
        for place, absorbed in window.absorbed.items():
            window.hypers[place] = self._hyper_of(place, absorbed)
        phase.in_flight, phase.window = window, Window((window.buffer + 1) % (2 if self._config.overlap else 1))
        edits = {index: self._states[index].edits_of(slices) for index, slices in by_index(window.absorbed).items()}
        self._updating = self._updater.submit(self._update, window, adding, edits)
        return placed + self._apply_in_flight() if waits else placed

    def _hyper_of(self, place: Place, absorbed: Absorbed) -> AdamWHyper:
        rule, num_steps = self._config.deferred_lr, absorbed.num_steps
        scale, lr = 1.0 if num_steps == 1 else 1.0 / num_steps, deferred_lr(rule, absorbed)
        if rule != "none":
            return replace(absorbed.last, lr=lr, absorbed=num_steps, grad_scale=scale, clip_value=None)
        updates = self._phase.num_updates[place] = self._phase.num_updates.get(place, 0) + 1
        return replace(absorbed.last, lr=lr, step=updates, grad_scale=scale, clip_value=None)

    def _update(self, window: Window, adding: Future[None] | None, edits: Mapping[int, Edits]) -> None:
        """Apply a window's gradients to deferred columns' masters and moments; on a thread of its own.

        Args:
            edits: by unit index, weights that stay as they are.
        """
        if adding is not None:
            adding.result()
        for index, slices in by_index(window.hypers).items():
            hypers = {i: window.hypers[index, i] for i in slices}
            self._host.submit(self._states[index].segments_on_host(window.buffer, hypers)).wait()
            self._states[index].keep_edits(edits[index])

    def _apply_in_flight(self) -> list[Place]:
        """Wait for the window that the host updates, and bring its new weights to the device.

        Returns:
            the slices that have new weights.
        """
        window, self._phase.in_flight = self._phase.in_flight, None
        if window is None:
            return []
        self._wait_updated()
        for index, slices in by_index(window.absorbed).items():
            self._states[index].place_deferred(slices)
        return list(window.absorbed)

    def _choose(self, due: Sequence[ParamUpdate]) -> None:
        """Choose the columns that the device owns, by the gradients of all ranks' rows. Every rank calls it."""
        self._phase.chosen_at = self._phase.num_steps
        chosen = [
            (self._states[index], item.i)
            for index, items in by_unit(due).items()
            for item in items
            if self._states[index].slices[item.i].layout.is_split
        ]
        energies = [state.slices[i].energy for state, i in chosen]
        sizes = [state.slices[i].layout.num_columns for state, i in chosen]
        if not chosen:
            return
        device = chosen[0][0].unit.device
        packed = torch.cat(
            [
                torch.zeros(size, dtype=torch.float64, device=device) if energy is None else energy
                for energy, size in zip(energies, sizes, strict=True)
            ]
        )
        self._ranks.shard.all_reduce(packed).wait()
        for (state, i), importance in zip(chosen, torch.split(packed.cpu(), sizes), strict=True):
            state.select(i, importance)

    # Between steps

    def quiesce(self) -> None:
        self._wait_added()
        self._wait_updated()

    def flush(self) -> None:
        self._settle()
        self.quiesce()
        self._hide_windows()
        window = self._phase.window
        for index, state in self._states.items():
            self._merge(index)
            for i, param in enumerate(state.unit.params):
                own = self._optimizer.state.get(param)
                if own is not None and (index, i) in window.absorbed:
                    own[WINDOW_KEY] = state.window_of(i, window.buffer)
                    self._shown.append(own)
        self._moments.arrived()

    def _bring_up(self, index: int) -> None:
        self.quiesce()
        self._merge(index)

    def _merge(self, index: int) -> None:
        """Let the host's buffers have all columns; what is written to moments there is taken over by the next step."""
        state = self._states[index]
        for i in range(len(state.slices)):
            state.merge(i)
            self._edited.add((index, i))

    def _hide_windows(self) -> None:
        """Take sums of the open window out of the optimizer's own state, where `flush` puts them for checkpoints."""
        for own in self._shown:
            own.pop(WINDOW_KEY, None)
        self._shown = []

    def catch_up(self) -> Iterator[SteppedUnit]:
        self._settle()
        stepped = set(self._end_window(waits=True))
        self._wait_added()
        yield from self._stepped(stepped)

    def discard(self) -> None:
        for state in self._states.values():
            state.clear_grads()

    def close(self) -> None:
        if not self._has_failed:  # that was raised before
            self.flush()
        self._moments.close()
        self._adder.shutdown()
        self._updater.shutdown()

    def _bind(self, item: ParamUpdate, key: str, view: Tensor, held: Tensor | None) -> None:
        super()._bind(item, key, view, held)
        self._moments.forget(item.unit.index)

    def _before_states_change(self, item: ParamUpdate) -> None:
        if not self._is_loading:
            self._bring_up(item.unit.index)

    def _take_edits(self) -> None:
        """Bring moments that user code may have changed to the device, where it owns columns of them."""
        edited, self._edited = self._edited, set()
        for index, i in sorted(edited):
            self._states[index].spread_moments(i)

    # Checkpoints

    def load(self, param: nn.Parameter, unit: ShardUnit, state: UnitState, i: int, saved: Mapping[str, Any]) -> None:
        self.quiesce()
        self._is_loading = True
        try:
            super().load(param, unit, state, i, {key: value for key, value in saved.items() if key != WINDOW_KEY})
        finally:
            self._is_loading = False
        self._loaded[unit.index, i] = saved.get(WINDOW_KEY)

    def state_dict(self) -> RuleState:
        """The phase, and by parameter: its selected columns, and what its gradients in the open window need."""
        phase = self._phase
        saved: dict[str, Tensor | int | float] = {
            "zenflow.num_steps": phase.num_steps,
            "zenflow.chosen_at": phase.chosen_at,
            "zenflow.window_steps": phase.window.num_steps,
        }
        in_flight = {} if phase.in_flight is None else phase.in_flight.absorbed
        for index, state in self._states.items():
            for i, one in enumerate(state.slices):
                place, fqn = (index, i), one.piece.fqn
                if one.layout.is_split:
                    saved[f"zenflow.selected.{fqn}"] = one.selected
                if place in phase.window.absorbed:
                    saved[f"zenflow.window.{fqn}"] = phase.window.absorbed[place].packed()
                if place in in_flight:
                    saved[f"zenflow.in_flight.{fqn}"] = 1
                if place in phase.num_updates:
                    saved[f"zenflow.updates.{fqn}"] = phase.num_updates[place]
        return saved

    def load_state_dict(self, saved: RuleState) -> None:
        self.quiesce()
        self._saved = dict(saved)
        self._phase = Phase(
            num_steps=int(saved.get("zenflow.num_steps", 0)), chosen_at=int(saved.get("zenflow.chosen_at", 0))
        )
        self._phase.window.num_steps = int(saved.get("zenflow.window_steps", 0))

    def _settle(self) -> None:
        """Take over what was loaded, now that the states of parameters and the rule's own are both there."""
        if not self._loaded:
            return
        self.quiesce()
        phase, loaded = self._phase, self._loaded
        self._loaded = {}
        in_flight = Window(1)
        for (index, i), total in loaded.items():
            state, place = self._states[index], (index, i)
            one = state.slices[i]
            fqn = one.piece.fqn
            selected = self._saved.get(f"zenflow.selected.{fqn}")
            packed = self._saved.get(f"zenflow.window.{fqn}")
            is_late = f"zenflow.in_flight.{fqn}" in self._saved
            if isinstance(selected, Tensor) and (not one.layout.is_split or len(selected) != one.layout.num_selected):
                if packed is not None or is_late:
                    raise _other_selection(fqn, len(selected), one.layout)
                selected = None
            last = self._hyper_now(state.unit.params[i], state.unit)
            if isinstance(packed, Tensor) and total is not None:
                phase.window.absorbed[place] = Absorbed.unpacked(packed, last)
            if is_late:
                in_flight.absorbed[place] = Absorbed(1, 0.0, last)
            if f"zenflow.updates.{fqn}" in self._saved:
                phase.num_updates[place] = int(self._saved[f"zenflow.updates.{fqn}"])
            state.take_over(i, cast("Tensor | None", selected), phase.window.buffer, total, is_applied=not is_late)
        if in_flight.absorbed:
            phase.in_flight = in_flight
        self._saved = {}

    def _hyper_now(self, param: nn.Parameter, unit: ShardUnit) -> AdamWHyper:
        group = next(g for g in self._optimizer.param_groups if any(p is param for p in g["params"]))
        step = max(1, int(self._optimizer.state[param]["step"]))
        return adamw_hyper(self._optimizer, group, step, 1.0, None, device=unit.device)


def _other_selection(fqn: str, found: int, layout: ColumnLayout) -> SuperScaleError:
    return SuperScaleError(
        f"the checkpoint was saved within a window of ZenFlow in which {found} of {layout.num_columns} columns of "
        f"{fqn!r} were stepped on the device; this run would have {layout.num_selected}. Resume with the "
        "ZenFlowConfig.topk and exclude that it was saved with, or from a checkpoint of the end of a run."
    )

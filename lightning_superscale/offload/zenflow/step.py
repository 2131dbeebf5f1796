"""Steps selected columns at every step, and lets the host apply the others' gradients window by window."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.config.zenflow import ZenFlowConfig
from lightning_superscale.offload.engine import OffloadContext
from lightning_superscale.offload.late_moments import LateMoments
from lightning_superscale.offload.zenflow.auto import AutoNumbers
from lightning_superscale.offload.zenflow.columns import layout_of, layouts_of
from lightning_superscale.offload.zenflow.deferred import DeferredColumns
from lightning_superscale.offload.zenflow.edits import load_edits, saved_edits
from lightning_superscale.offload.zenflow.host_work import HostWork
from lightning_superscale.offload.zenflow.report import LowEnergyWarning, ZenFlowReport, cycle_of, shares_of
from lightning_superscale.offload.zenflow.saved import SavedPhase, saved_phase
from lightning_superscale.offload.zenflow.state import SplitState
from lightning_superscale.offload.zenflow.windows import (
    Phase,
    Place,
    Schedule,
    by_index,
    staggered,
)
from lightning_superscale.ops.types import AdamWHyper
from lightning_superscale.optim.adamw_step import AdamWRule
from lightning_superscale.optim.param_update import GradScale, ParamUpdate, adamw_hyper, by_unit
from lightning_superscale.optim.step_rule import Cycle, Figure, RuleState, StepGuard, SteppedUnit
from lightning_superscale.optim.unit import GradientDelta, ShardUnit
from lightning_superscale.optim.unit_state import UnitState

WINDOW_KEY = "zenflow_window"
"""An entry of a parameter's own state in checkpoints: an open window's sum of gradients, or once it has
ended, weights that are ahead of their masters and not in place yet."""
EDITS_KEY = "zenflow_edits"
"""Beside the sum of an open window, if there are any: which weights an edit has that its update may not overwrite."""
STATE_KEYS = frozenset({WINDOW_KEY, EDITS_KEY})


class ZenFlowStep(AdamWRule):
    """Steps Adam and AdamW by columns ([Note: Windows] in windows.py).

    Args:
        context: the parts of the run: the kernel that steps selected columns, the link, the other ranks.
        warning: shared by the rules of a run.
        host: the host's thread; one of its own if None.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        guard: StepGuard,
        config: ZenFlowConfig,
        context: OffloadContext,
        warning: LowEnergyWarning,
        host: HostWork | None = None,
    ) -> None:
        super().__init__(optimizer, guard)
        self._config = config
        self._device = context.device_update
        self._ranks = context.ranks
        self._states: dict[int, SplitState] = {}
        self._timeline = context.timeline
        self._host = host or HostWork(context.timeline)
        self._numbers = AutoNumbers(config)
        self._schedule = Schedule(config, self._numbers.interval, {})
        self._report = ZenFlowReport(
            config,
            self._numbers,
            self._states,
            warning=warning,
            is_first_rank=context.ranks.mesh.world.rank == 0,
        )
        self._deferred = DeferredColumns(config, context, self._states, self._host, self._report)
        self._loaded: dict[Place, Tensor | None] = {}
        self._loaded_edits: dict[Place, Tensor] = {}
        self._saved = SavedPhase({})
        self._edited: set[Place] = set()
        self._shown: list[dict[str, Any]] = []
        self._moments = LateMoments(optimizer, self._bring_up)
        self._is_loading = False

    @property
    def _phase(self) -> Phase:
        return self._deferred.phase

    def attach(self, unit: ShardUnit, state: UnitState) -> None:
        self._states[unit.index] = cast(SplitState, state)
        self._stagger()

    def _stagger(self) -> None:
        sizes = {
            (index, i): (one.piece.spec.numel, one.piece.fqn)
            for index, state in self._states.items()
            for i, one in enumerate(state.slices)
            if one.layout.has_deferred
        }
        offsets = staggered(sizes, self._numbers.interval) if self._config.overlap else {}
        self._schedule = Schedule(self._config, self._numbers.interval, offsets)

    def add_grads(self, delta: GradientDelta, state: UnitState) -> None:
        self._settle()
        self._host.wait_added_of(delta.unit.index)  # the buffer for this gradient holds the last step's until then
        index, number = delta.unit.index, self._phase.num_steps + 1
        undivided = [i for i, _ in delta.slices if self._is_due(number) or self._chooses((index, i), number)]
        cast(SplitState, state).add_grads(delta.slices, undivided=undivided)

    def _chooses(self, place: Place, number: int) -> bool:
        index, i = place
        return self._states[index].slices[i].layout.is_split and self._schedule.chooses(
            place, number, self._phase.chosen_at.get(place)
        )

    def _is_due(self, number: int) -> bool:
        """Whether what is "auto" is chosen in this step."""
        return not self._numbers.are_chosen and number > self._schedule.num_warm

    # The step

    def step(
        self, due: Sequence[ParamUpdate], grad_scale: GradScale, clip_value: float | None
    ) -> Iterator[SteppedUnit]:
        self._settle()
        self._host.wait_added()
        self._hide_windows()
        number = self._phase.num_steps + 1
        on_device = grad_scale if isinstance(grad_scale, Tensor) and self._device.scales_on_device else None
        numbers = self.numbers(1.0 if on_device is not None else float(grad_scale), clip_value)
        hypers = {index: {item.i: numbers.hyper_of(item) for item in items} for index, items in by_unit(due).items()}
        self._take_edits()
        stepped = {(index, i) for index, by_slice in hypers.items() for i in by_slice}
        late = self._deferred.place_late()
        self._report.stepped(stepped, number, self._schedule.num_warm)
        stepped.update(late)
        self._choose(due, number)
        for index, by_slice in hypers.items():
            state = self._states[index]
            with self._timeline.device("device optimizer", f"unit {index}"):
                self._device.submit(state.segments_on_device(by_slice, on_device)).wait()
                state.place_selected(list(by_slice))
        ends = functools.partial(self._schedule.ends, step=number)
        unscaled = self._deferred.begin_to_add(hypers, grad_scale, clip_value, ends)
        self._phase.num_steps = number
        ended, waits = [place for place in self._phase.open if ends(place)], self._schedule.waits(number)
        scale_of = self._deferred.scale_on_host(grad_scale) if unscaled else None
        counts = not self._schedule.is_warm(number)
        self._deferred.end_windows(ended, unscaled, scale_of, looks_ahead=not waits, counts=counts)
        if waits:
            stepped.update(self._deferred.place_late())
        for index in hypers:
            self._states[index].clear_grads()
        numbers.advance()
        self._numbers.measure(self._host)
        for index, items in by_unit(due).items():
            self._moments.expect(index, [item.param for item in items])
        yield from self._stepped(stepped)

    def _stepped(self, stepped: Iterable[Place]) -> Iterator[SteppedUnit]:
        for index, slices in reversed(by_index(stepped).items()):
            yield SteppedUnit(self._states[index].unit, slices, None)

    def _choose(self, due: Sequence[ParamUpdate], number: int) -> None:
        """Choose the columns that the device owns, by the gradients of all ranks' rows. Every rank calls it."""
        energies = self._energies([place for place in _places(due) if self._chooses(place, number)])
        if self._is_due(number):
            self._choose_numbers(list(energies.values()))
        shares = []
        with ExitStack() as spans:
            if energies:
                spans.enter_context(self._timeline.host("selection", "columns"))
                spans.enter_context(self._timeline.stalled("selection"))
            for place, importance in energies.items():
                (index, i), self._phase.chosen_at[place] = place, number
                one, before = self._states[index].slices[i], self._states[index].slices[i].selected
                self._states[index].select(i, importance)
                shares.append(shares_of(one.piece.fqn, importance, before, one.selected))
        self._report.selected(shares)
        for index, i in _places(due):
            self._states[index].divide(i)

    def _energies(self, places: Sequence[Place]) -> dict[Place, Tensor]:
        """The squared norms of columns over all ranks' rows, fp64 [num_columns] on the CPU."""
        if not places:
            return {}
        energies = [self._states[index].energy(i) for index, i in places]
        summed = torch.cat(energies)
        self._ranks.shard.all_reduce(summed).wait()
        split = torch.split(summed.cpu(), [len(energy) for energy in energies])
        return dict(zip(places, split, strict=True))

    # What is "auto"

    def _choose_numbers(self, energies: Sequence[Tensor]) -> None:
        """Choose the share of columns and the length of windows. Every rank calls it.

        Args:
            energies: of all columns, one tensor per matrix.
        """
        self._numbers.choose(energies, self._ranks.mesh)
        for index in self._states:
            self._merge(index)
        self._resize()
        self._stagger()

    def _resize(self) -> None:
        if self._config.topk == "auto":
            for state in self._states.values():
                state.resize(layouts_of(state.unit, self._config, self._numbers.topk))

    # Between steps

    def quiesce(self) -> None:
        self._host.wait()

    def flush(self) -> None:
        self._settle()
        self.quiesce()
        self._hide_windows()
        for index, state in self._states.items():
            self._merge(index)
            for i, param in enumerate(state.unit.params):
                own, place = self._optimizer.state.get(param), (index, i)
                is_ahead = place in self._phase.late and place in self._phase.ahead
                if own is not None and (is_ahead or place in self._phase.open):
                    own[WINDOW_KEY] = state.next_weights_of(i) if is_ahead else state.window_of(i)
                    self._shown.append(own)
                    edits = saved_edits(state.slices[i])
                    if edits is not None:
                        own[EDITS_KEY] = edits
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
            for key in STATE_KEYS:
                own.pop(key, None)
        self._shown = []

    def catch_up(self) -> Iterator[SteppedUnit]:
        self._settle()
        self._host.wait_added()
        stepped = set(self._deferred.place_late())
        self._deferred.end_windows(list(self._phase.open), (), None, looks_ahead=False)
        stepped.update(self._deferred.place_late())
        for index, slices in by_index(self._phase.ahead).items():
            state = self._states[index]
            for i in slices:
                state.show_masters(i)
            state.send_weights(slices, state.fence())
            state.place_deferred(slices)
            stepped.update((index, i) for i in slices)
        self._phase.ahead = set()
        yield from self._stepped(stepped)

    def discard(self) -> None:
        self._report.discard()
        for state in self._states.values():
            state.clear_grads()

    @property
    def topk(self) -> float:
        """The share of columns that the device has; until "auto" is chosen, that of warm-up."""
        return self._numbers.topk

    @property
    def schedule(self) -> Schedule:
        """When windows end."""
        return self._schedule

    @property
    def is_warm(self) -> bool:
        """Whether the last step was one of warm-up, or none was taken yet."""
        return self._schedule.is_warm(self._phase.num_steps)

    @property
    def cycle(self) -> Cycle:
        return cycle_of(self._phase, self._schedule, self._states)

    def figures(self) -> Sequence[Figure]:
        return self._report.figures()

    def reasons(self) -> Sequence[str]:
        return self._numbers.reasons

    def close(self) -> None:
        with ExitStack() as rest:
            rest.callback(self._host.close)
            rest.callback(self._moments.close)
            if not self._host.has_failed:  # that was raised before
                self.flush()

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
            super().load(param, unit, state, i, {k: v for k, v in saved.items() if k not in STATE_KEYS})
        finally:
            self._is_loading = False
        self._loaded[unit.index, i] = saved.get(WINDOW_KEY)
        if EDITS_KEY in saved:
            self._loaded_edits[unit.index, i] = saved[EDITS_KEY]

    def state_dict(self) -> RuleState:
        """The phase, and by parameter: its selected columns, and what its gradients in the open window need."""
        return {**self._numbers.saved(), **saved_phase(self._phase, self._states)}

    def load_state_dict(self, saved: RuleState) -> None:
        self.quiesce()
        self._saved = SavedPhase(saved)
        self._check_selections()
        self._deferred.phase = Phase(num_steps=self._saved.num_steps)

    def _check_selections(self) -> None:
        """Refuse a checkpoint of the middle of a window of other columns before anything trains with it."""
        topk = self._numbers.topk_of(self._saved.entries)
        for index, i in self._loaded:
            piece = self._states[index].slices[i].piece
            self._saved.check_selection(piece.fqn, layout_of(piece, self._config, topk))

    def _settle(self) -> None:
        """Take over what was loaded, now that the states of parameters and the rule's own are both there."""
        if not self._loaded:
            return
        self.quiesce()
        loaded, self._loaded = self._loaded, {}
        self._take_over_numbers(loaded)
        for place, kept in loaded.items():
            self._settle_one(place, kept)
        for (index, i), edits in self._loaded_edits.items():
            load_edits(self._states[index].slices[i], edits)
        self._loaded_edits = {}
        for index, slices in by_index(self._phase.late).items():
            state = self._states[index]
            state.send_weights(slices, state.fence())
        self._saved = SavedPhase({})

    def _take_over_numbers(self, loaded: Collection[Place]) -> None:
        """Take over what was chosen for "auto"."""
        if not self._numbers.load(self._saved.entries):
            return
        for index, state in self._states.items():
            for i in range(len(state.slices)):
                if (index, i) not in loaded:
                    state.merge(i)
        self._resize()
        self._stagger()

    def _settle_one(self, place: Place, kept: Tensor | None) -> None:
        index, i = place
        state = self._states[index]
        one, saved = state.slices[i], self._saved
        last = self._hyper_now(state.unit.params[i], state.unit)
        saved.fill(self._phase, place, one.piece.fqn, last, has_kept=kept is not None)
        state.take_over(
            i,
            saved.selection_of(one),
            kept,
            is_late=saved.is_late(one.piece.fqn),
            masters_lead=saved.masters_lead(one.piece.fqn),
        )

    def _hyper_now(self, param: nn.Parameter, unit: ShardUnit) -> AdamWHyper:
        group = next(g for g in self._optimizer.param_groups if any(p is param for p in g["params"]))
        step = max(1, int(self._optimizer.state[param]["step"]))
        return adamw_hyper(self._optimizer, group, step, 1.0, None, device=unit.device)


def _places(due: Sequence[ParamUpdate]) -> list[Place]:
    return [(index, item.i) for index, items in by_unit(due).items() for item in items]

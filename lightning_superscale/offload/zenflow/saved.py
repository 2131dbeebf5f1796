"""What a checkpoint keeps of where a ZenFlow run is between its windows, beside states and sums of gradients."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.zenflow.columns import ColumnLayout
from lightning_superscale.offload.zenflow.split_slice import SplitSlice
from lightning_superscale.offload.zenflow.state import SplitState
from lightning_superscale.offload.zenflow.windows import Absorbed, Phase, Place, packed, unpacked
from lightning_superscale.ops.types import AdamWHyper
from lightning_superscale.optim.step_rule import RuleState

Entry = Tensor | int | float


def saved_phase(phase: Phase, states: Mapping[int, SplitState]) -> dict[str, Entry]:
    """The entries of a phase, most of them by parameter.

    Args:
        states: by unit index.
    """
    saved: dict[str, Entry] = {"zenflow.num_steps": phase.num_steps}
    for index, state in states.items():
        for i, one in enumerate(state.slices):
            place, fqn = (index, i), one.piece.fqn
            if one.layout.is_split:
                saved[f"zenflow.selected.{fqn}"] = one.selected
            if place in phase.chosen_at:
                saved[f"zenflow.chosen_at.{fqn}"] = phase.chosen_at[place]
            if place in phase.open:
                saved[f"zenflow.open.{fqn}"] = phase.open[place].packed()
            if place in phase.late:
                saved[f"zenflow.late.{fqn}"] = packed(phase.late[place])
            if place in phase.ahead:
                saved[f"zenflow.ahead.{fqn}"] = 1
            if place in phase.num_updates:
                saved[f"zenflow.updates.{fqn}"] = phase.num_updates[place]
    return saved


class SavedPhase:
    """The entries that `saved_phase` gave, perhaps of another engine or none.

    Attributes:
        entries: by key.
        num_steps: steps of the optimizer under ZenFlow.
    """

    def __init__(self, entries: RuleState) -> None:
        self.entries = dict(entries)
        self.num_steps = int(self.entries.get("zenflow.num_steps", 0))

    def is_late(self, fqn: str) -> bool:
        """Whether a window had ended, and its weights were not in place."""
        return f"zenflow.late.{fqn}" in self.entries

    def masters_lead(self, fqn: str) -> bool:
        """Whether weights of deferred columns may be others than the rounded masters."""
        return self.is_late(fqn) or f"zenflow.ahead.{fqn}" in self.entries

    def selection_of(self, one: SplitSlice) -> Tensor | None:
        """The columns that the device owned; None where they are unknown, or another number than now."""
        selected = self.entries.get(f"zenflow.selected.{one.piece.fqn}")
        return selected if isinstance(selected, Tensor) and self._fits(selected, one.layout) else None

    def _fits(self, selected: Tensor, layout: ColumnLayout) -> bool:
        return layout.is_split and len(selected) == layout.num_selected and int(selected[-1]) < layout.num_columns

    def check_selection(self, fqn: str, layout: ColumnLayout) -> None:
        """Refuse a selection of another size where gradients of columns that it did not have are kept.

        Without an entry of a selection the host had all columns, and has gradients of all.

        Args:
            layout: the parameter's columns in this run.

        Raises:
            SuperScaleError: names the parameter.
        """
        selected = self.entries.get(f"zenflow.selected.{fqn}")
        is_within = f"zenflow.open.{fqn}" in self.entries or self.is_late(fqn)
        num_saved = len(selected) if isinstance(selected, Tensor) else 0
        fits = self._fits(selected, layout) if isinstance(selected, Tensor) else not layout.num_selected
        if is_within and not fits:
            now = (
                f"{layout.num_selected} of {layout.num_columns}"
                if layout.num_columns > 1
                else "none, as it is not split"
            )
            raise SuperScaleError(
                f"the checkpoint was saved within a window of ZenFlow in which {num_saved} columns of {fqn!r} were "
                f"stepped on the device; this run would have {now}. Resume with the ZenFlowConfig.topk and exclude "
                "that it was saved with, or from a checkpoint of the end of a run."
            )

    def fill(self, phase: Phase, place: Place, fqn: str, like: AdamWHyper, *, has_kept: bool) -> None:
        """Take over one parameter's entries.

        Args:
            like: an update of it now, for what is not saved.
            has_kept: whether a window's gradients or weights were saved beside them.
        """
        entries = self.entries
        is_open, late = entries.get(f"zenflow.open.{fqn}"), entries.get(f"zenflow.late.{fqn}")
        if isinstance(is_open, Tensor) and has_kept:
            phase.open[place] = Absorbed.unpacked(is_open, like)
        if isinstance(late, Tensor):
            phase.late[place] = unpacked(late, like)
        if f"zenflow.ahead.{fqn}" in entries and (late is None or has_kept):
            phase.ahead.add(place)
        if f"zenflow.chosen_at.{fqn}" in entries:
            phase.chosen_at[place] = int(entries[f"zenflow.chosen_at.{fqn}"])
        if f"zenflow.updates.{fqn}" in entries:
            phase.num_updates[place] = int(entries[f"zenflow.updates.{fqn}"])

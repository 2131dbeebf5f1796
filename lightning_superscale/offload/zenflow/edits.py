"""Weights of deferred columns that other code changed, which no update may overwrite whose gradients came before.

[Note: Edits] An edit comes after all steps so far. It takes the place of an update that is on its way, and of a later
one that has no gradient of a step after the edit. With a later gradient, masters go on from the edited weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_superscale.offload.zenflow.columns import rows_of_columns
from lightning_superscale.offload.zenflow.split_slice import SplitSlice
from lightning_superscale.offload.zenflow.state import SplitState

Edits = Sequence[tuple[int, Tensor, Tensor]]
"""By slice index: which elements of its deferred columns were edited, and their weights, fp32 1D."""


def edits_of(state: SplitState, slices: Iterable[int]) -> Edits:
    """The weights that were changed after the last gradient of their slice; masters have them."""
    found = [(i, state.slices[i]) for i in slices]
    return [(i, one.edited, _masters(state, one)[one.edited]) for i, one in found if one.edited is not None]


def keep_edits(state: SplitState, edits: Edits) -> None:
    """Let masters and next weights be what edits made them, after an update has overwritten it."""
    for i, edited, values in edits:
        one = state.slices[i]
        one.columns_of(state.master)[one.deferred] = _masters(state, one).masked_scatter(edited, values)
        new = state.next_of(one).view(edited.shape)
        new.masked_scatter_(edited, values.to(new.dtype))


def _masters(state: SplitState, one: SplitSlice) -> Tensor:
    return one.columns_of(state.master)[one.deferred]


def saved_edits(one: SplitSlice) -> Tensor | None:
    """Which weights were changed after the last gradient, in the shape of the slice's rows, uint8; None without any.

    A checkpoint keeps it while a window is open, whose update they outlast.
    """
    if one.edited is None:
        return None
    columns = torch.zeros(one.layout.num_columns, one.layout.column_numel, dtype=torch.uint8)
    columns[one.deferred] = one.edited.to(torch.uint8)
    return rows_of_columns(columns.view(-1), one.piece, one.layout)


def load_edits(one: SplitSlice, saved: Tensor) -> None:
    """Take over what `saved_edits` gave."""
    columns = torch.zeros(one.layout.num_columns, one.layout.column_numel, dtype=torch.uint8)
    rows_of_columns(columns.view(-1), one.piece, one.layout).copy_(saved)
    one.edited = columns[one.deferred].bool()

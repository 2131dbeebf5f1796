"""Norms of gradients that ranks share: every element of the model's gradient counts once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_superscale.comm.collectives import control_sum
from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.ops.update import StatsSource
from lightning_superscale.zero.clip import total_norm
from lightning_superscale.zero.due import Due, by_unit
from lightning_superscale.zero.early_norms import EarlyNorms
from lightning_superscale.zero.placed import is_cut


def norms_of(mesh: DataMesh, due: Sequence[Due], early: EarlyNorms) -> tuple[Tensor, Tensor]:
    """The norm of each gradient, as far as this rank has it, and of all gradients on all ranks. Every rank calls it."""
    measures = early.of(due)
    if mesh.num_shares == 1:
        return measures, total_norm(measures)
    sums = measures.cpu()
    counted = torch.tensor([_counts(mesh, item.param) for item in due])
    return sums.sqrt().float(), norm_over_ranks(mesh, float(sums[counted].sum()))


def norm_over_ranks(mesh: DataMesh, sumsq: float) -> Tensor:
    """The 2-norm of all shards from this rank's sum of squares; fp32 scalar. Every rank calls it."""
    total = control_sum(mesh, torch.tensor([sumsq], dtype=torch.float64), "the gradient norm") / mesh.replicate.size
    return total[0].sqrt().float()


def counted_stats(mesh: DataMesh, due: Sequence[Due], stats: Sequence[StatsSource]) -> list[StatsSource]:
    """Statistics of every unit's gradients, empty for those that do not count on this rank.

    Args:
        stats: of every unit of `due`, in the order of `by_unit`; or none at all.
    """
    if mesh.tensor.rank == 0:
        return list(stats)
    units = by_unit(due).values()
    return [s if _counts(mesh, items[0].param) else tuple for s, items in zip(stats, units, strict=False)]


def _counts(mesh: DataMesh, param: nn.Parameter) -> bool:
    """Whether this rank's rows count: what all ranks of the tensor axis have alike counts on the first.

    Parameters of one unit are all of one kind.
    """
    return mesh.tensor.rank == 0 or is_cut(param)

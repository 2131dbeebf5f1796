"""Norms of gradients, taken on the device while backward still runs: nobody waits for copies to judge them.

A step's verdict needs the norm of every gradient. Taken at the step, from gradients that left for the host, it waits
for the last copy and then reads all of them once more, with nothing to hide it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.zero.clip import grad_norm, grad_sumsq
from lightning_superscale.zero.due import Due
from lightning_superscale.zero.units import GradientDelta


class EarlyNorms:
    """Measures of the gradients of one step: 2-norms where a rank has whole ones, else sums of squares of its share.

    Attributes:
        are_wanted: whether the steps to come need any; they are not taken otherwise.
    """

    def __init__(self, mesh: DataMesh) -> None:
        self.are_wanted = False
        self._measure = grad_norm if mesh.num_shares == 1 else grad_sumsq
        self._taken: dict[tuple[int, int], Tensor | None] = {}

    def take(self, delta: GradientDelta) -> None:
        """Measure gradients where they are, in the order of the device's work; the host does not wait on CUDA."""
        if not self.are_wanted:
            return
        for i, grad in delta.slices:
            key = (delta.unit.index, i)
            # A second delta adds to the first, and only the sum has the norm that counts.
            self._taken[key] = None if key in self._taken else self._measure(grad)

    def clear(self) -> None:
        """The step is over."""
        self._taken.clear()

    def of(self, due: Sequence[Due]) -> Tensor:
        """The measure of each gradient [len(due)], now at the latest; on the host unless all are on one device."""
        measures = []
        for item in due:
            early = self._taken.get((item.unit.index, item.i))
            measures.append(self._measure(item.grad) if early is None else early)
        devices = {measure.device for measure in measures}
        return torch.stack(measures if len(devices) == 1 else [measure.cpu() for measure in measures])

"""Chooses the length of windows and the share of selected columns where they are "auto", from what warm-up measured.

In warm-up every column is stepped at every step, and the device waits for the host: the seconds of both can be told
apart there. The choice is made in the step after it, on all ranks alike, and a checkpoint keeps it.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_superscale.comm.collectives import gather_objects
from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.config.zenflow import ZenFlowConfig
from lightning_superscale.offload.zenflow.host_work import HostWork

logger = logging.getLogger("lightning_superscale")

# Steps of warm-up that a measurement needs; the first ones allocate memory and compile.
NUM_MEASURED, _NUM_UNUSUAL = 8, 3
# The host's work must fit into a step with this much to spare (the peers' criterion: S T_device >= 1.2 T_host).
_ROOM = 1.2
LONGEST = 32
# A window's gradients are added up at every step: 4 bytes are read and 4 written per fp32 sum, beside the gradient. In
# warm-up sums are written only.
_ADDING_TO_WRITING = 10 / 6
SHARES = (0.05, 0.1, 0.15, 0.2, 0.25)
# Share of the gradient's energy that the selected columns should have: half of it is applied without delay then.
_ENOUGH_ENERGY = 0.5


def most_selected(config: ZenFlowConfig) -> float:
    """The greatest share of columns that may be selected."""
    return SHARES[-1] if config.topk == "auto" else config.topk


def least_selected(config: ZenFlowConfig) -> float:
    """The smallest share of columns that may be selected."""
    return SHARES[0] if config.topk == "auto" else config.topk


@dataclass(frozen=True, slots=True)
class Chosen:
    """A number, and the sentence that says why."""

    value: float
    reason: str


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Seconds of one step on one rank.

    Attributes:
        device: from the end of the last step until all gradients are on the host.
        adding: the host's, to add gradients up.
        updating: the host's, to step all deferred columns.
    """

    device: float
    adding: float
    updating: float


def usual(steps: Sequence[StepSeconds]) -> StepSeconds:
    """The median of each part over warm-up's steps, without the first ones."""
    counted = list(steps[_NUM_UNUSUAL:] or steps)
    parts = zip(*((one.device, one.adding, one.updating) for one in counted), strict=True)
    return StepSeconds(*map(statistics.median, parts))


def choose_interval(ranks: Sequence[StepSeconds]) -> Chosen:
    """Choose the shortest window with which the host's work of each step fits into the device's.

    Args:
        ranks: by world rank.
    """
    interval, slowest = max((_shortest(one), -rank) for rank, one in enumerate(ranks))
    one = ranks[-slowest]
    where = f" on rank {-slowest}, which needs most" if len(ranks) > 1 else ""
    adding = one.adding * _ADDING_TO_WRITING
    told = (
        f"a step takes the device {one.device * 1e3:.1f} ms, and the host {one.updating * 1e3:.1f} ms to step all "
        f"deferred columns and {adding * 1e3:.1f} ms to add up gradients{where}"
    )
    if interval > LONGEST:
        interval = LONGEST
        told += (
            "; no window is long enough for the host to be done in time. Use accumulate_on='device', or more threads"
        )
    return Chosen(interval, f"update_interval={interval}: {told}")


def _shortest(one: StepSeconds) -> int:
    left = one.device / _ROOM - one.adding * _ADDING_TO_WRITING
    return LONGEST + 1 if left <= one.updating / LONGEST else max(1, math.ceil(one.updating / left))


def choose_share(energies: Sequence[Tensor]) -> Chosen:
    """Choose the smallest share whose columns hold enough of the gradient's energy, or else the largest.

    Args:
        energies: squared norms of columns, fp64, one tensor per matrix; the same on every rank.
    """
    ordered = [torch.sort(energy.cpu(), descending=True).values for energy in energies]
    total = float(sum(energy.sum() for energy in ordered))
    held = 0.0
    for share in SHARES:
        held = float(sum(energy[: math.floor(share * len(energy) + 0.5)].sum() for energy in ordered))
        if total > 0 and held >= _ENOUGH_ENERGY * total:
            break
    percent = 100 * held / total if total > 0 else 0.0
    return Chosen(share, f"topk={share}: these columns hold {percent:.0f} % of the gradient's energy")


class AutoNumbers:
    """The length of windows and the share of selected columns: those of the config, or once chosen, what was chosen.

    Attributes:
        interval: number of steps in a window; 1 until it is chosen.
        topk: share of selected columns; the greatest until it is chosen.
        are_chosen: whether nothing is left to choose.
        reasons: a sentence on each number that was chosen: why it is this one, or that a checkpoint had it.
    """

    def __init__(self, config: ZenFlowConfig) -> None:
        self._config = config
        self.interval = 1 if config.update_interval == "auto" else config.update_interval
        self.topk = most_selected(config)
        self.are_chosen = "auto" not in (config.topk, config.update_interval)
        self.reasons: list[str] = []
        self._steps: list[StepSeconds] = []
        self._ended_at = 0.0

    def measure(self, host: HostWork) -> None:
        """Take the seconds of a step of warm-up, at its end."""
        if not self.are_chosen and self._ended_at:
            self._steps.append(StepSeconds(host.arrived_at - self._ended_at, host.adding_s, host.updating_s))
        self._ended_at = time.perf_counter()

    def choose(self, energies: Sequence[Tensor], mesh: DataMesh) -> None:
        """Choose what is "auto". Every rank calls it.

        Args:
            energies: squared norms of columns over all ranks' rows, one tensor per matrix.
        """
        if self._config.topk == "auto":
            share = choose_share(energies)
            self.topk = share.value
            self.reasons.append(f"{share.reason} (topk='auto')")
        if self._config.update_interval == "auto":
            window = choose_interval(gather_objects(mesh, usual(self._steps)))
            self.interval = int(window.value)
            self.reasons.append(f"{window.reason} (update_interval='auto')")
        self.are_chosen = True
        if mesh.world.rank == 0:
            for reason in self.reasons:
                logger.info("ZenFlow chose %s", reason)

    def saved(self) -> dict[str, float]:
        """The chosen numbers, for a checkpoint."""
        return {"zenflow.interval": self.interval, "zenflow.topk": self.topk} if self.are_chosen else {}

    def topk_of(self, saved: Mapping[str, Any]) -> float:
        """The share of selected columns once `load` has taken `saved` over."""
        takes = not self.are_chosen and self._config.topk == "auto"
        return float(saved["zenflow.topk"]) if takes and "zenflow.topk" in saved else self.topk

    def load(self, saved: Mapping[str, Any]) -> bool:
        """Take over what `saved` gave, as far as it is "auto"; returns whether there is something to choose no more."""
        if self.are_chosen or "zenflow.interval" not in saved:
            return False
        if self._config.topk == "auto":
            self.topk = float(saved["zenflow.topk"])
            self.reasons.append(f"topk={self.topk}: the checkpoint that this run resumed from has it (topk='auto')")
        if self._config.update_interval == "auto":
            self.interval = int(saved["zenflow.interval"])
            self.reasons.append(
                f"update_interval={self.interval}: the checkpoint that this run resumed from has it "
                "(update_interval='auto')"
            )
        self.are_chosen = True
        return True

"""The bytes that each parameter takes on one rank, by class: plain data that each technique states once.

[Note: One memory model] An offload engine states the bytes of its states, `StateDtypes` those of masters and moments, a
ZeRO stage those of weights and gradients. The check of the host's memory, the share of states that fits the device and
the arithmetic that `explain()` prints read these statements; tests hold them equal to the tensors that exist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_superscale.layout.rows import align_up

Home = Literal["device", "host"]
"""The memory of the parameters' device, or that of its host across the link."""

Axis = Literal["shard"]
"""A mesh axis over whose ranks bytes are divided."""


@dataclass(frozen=True, slots=True)
class BytesPerParam:
    """One class of bytes that parameters take, such as master weights.

    Attributes:
        name, dtype: as `explain()` prints them.
        bytes: bytes per parameter, on all ranks of `axis` together.
        home: the memory that they are in.
        axis: the mesh axis whose ranks divide them; None where each rank has all.
        share: share of the parameters' elements that the class has any bytes of; `bytes` is of all elements alike.
    """

    name: str
    dtype: str
    bytes: float
    home: Home
    axis: Axis | None = "shard"
    share: float = 1.0

    def padded_bytes(self, numel: int) -> int:
        """Bytes of one parameter's elements on one rank, in a buffer where each parameter starts aligned."""
        if not self.share:
            return 0
        return round(self.bytes / self.share * align_up(round(self.share * numel)))


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """All classes of bytes that one kind of parameter takes, without padding."""

    classes: tuple[BytesPerParam, ...] = ()

    def __add__(self, other: MemoryModel) -> MemoryModel:
        return MemoryModel(self.classes + other.classes)

    def per_param(self, home: Home, axis: Axis | None) -> float:
        """Bytes per parameter in one memory that the ranks of `axis` divide, or with None, that each rank has."""
        return sum(one.bytes for one in self.classes if one.home == home and one.axis == axis)

    def bytes(self, home: Home, numel: int, num_shards: int = 1) -> int:
        """Bytes of `numel` parameters in one memory of one rank, rounded up.

        Args:
            num_shards: number of ranks of the shard axis.
        """
        return math.ceil(numel * self.per_param(home, None) + numel * self.per_param(home, "shard") / num_shards)

"""The dtypes in which an optimizer's masters and moments are kept, and the rounding of their updates."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_superscale.layout.memory import Axis, BytesPerParam, Home, MemoryModel
from lightning_superscale.ops.types import Rounding

# Dtypes of weights that no kernel steps; torch does, in the same dtype. Their masters and gradients have it, too.
WIDE_DTYPES = frozenset({torch.float64, torch.complex64, torch.complex128})


@dataclass(frozen=True, slots=True)
class StateDtypes:
    """Dtypes of the states that an optimizer engine keeps between steps.

    Attributes:
        masters: dtype of the masters of bf16 weights: fp32, or bf16, which makes the weights their own masters. Other
            weights have fp32 masters, or are wide.
        moments: dtype of exp_avg and exp_avg_sq, fp32 or bf16.
        is_stochastic: whether bf16 masters and moments are rounded stochastically; otherwise to nearest even.
        is_compensated: whether the rounding error of a bf16 master is kept beside it, in bf16 (Kahan).
        seed: seed of the random numbers, in [0, 2**63).
    """

    masters: torch.dtype = torch.float32
    moments: torch.dtype = torch.float32
    is_stochastic: bool = False
    is_compensated: bool = False
    seed: int = 0

    @property
    def is_low_precision(self) -> bool:
        """Whether masters or moments are bf16."""
        return torch.bfloat16 in (self.masters, self.moments)

    def master_of(self, weights: torch.dtype) -> torch.dtype:
        """Dtype of the masters of such weights; the weights' own where they are their masters."""
        if weights in WIDE_DTYPES:
            return weights
        return self.masters if weights == torch.bfloat16 else torch.float32

    def compensates(self, weights: torch.dtype) -> bool:
        """Whether masters of such weights have a compensation."""
        return self.is_compensated and self.master_of(weights) == torch.bfloat16

    def rounding(self, weights: torch.dtype, fqn: str, first_element: int) -> Rounding | None:
        """The rounding of a parameter's updates, from its given element on; None where all states are fp32."""
        if self.master_of(weights) != torch.bfloat16 and self.moments == torch.float32:
            return None
        if not self.is_stochastic:
            return Rounding(False)
        digest = hashlib.blake2b(f"{self.seed}:{fqn}".encode(), digest_size=8).digest()
        return Rounding(True, int.from_bytes(digest, "little") >> 1, first_element)

    def memory(self, weights: torch.dtype, *, has_moments: bool, home: Home) -> MemoryModel:
        """Bytes per parameter beside the device's weights: master, compensation, moments.

        On the device, weights may be their own masters; the host has masters always.
        """
        master = self.master_of(weights)
        kept = []
        if home == "host" or master != weights:
            kept.append(bytes_of("master weights", master, home))
        if self.compensates(weights):
            kept.append(bytes_of("compensation", torch.bfloat16, home))
        if has_moments:
            kept.append(bytes_of("optimizer states", self.moments, home, copies=2))
        return MemoryModel(tuple(kept))


FP32_STATES = StateDtypes()
_BF16_DIGITS = 8  # binary digits of a mantissa, the one before the point among them
_LEAST_EXPONENT = -124  # of smaller numbers the last place is no smaller


def bytes_of(
    name: str,
    dtype: torch.dtype,
    home: Home,
    *,
    copies: int = 1,
    share: float = 1.0,
    axis: Axis | None = "shard",
) -> BytesPerParam:
    """The class of `copies` buffers, each with one element per parameter for a share of all parameters."""
    return BytesPerParam(name, dtype_name(dtype), copies * share * dtype.itemsize, home, axis, share)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as `explain()` prints it."""
    return str(dtype).removeprefix("torch.")


def forget_lost(compensation: Tensor, weights: Tensor, master: Tensor | None) -> None:
    """Zero the compensation of weights that are others than their masters were rounded to: it belongs to older ones.

    Weights that are their own masters tell no edit: there a compensation goes that is more than half a unit in the last
    place of its weight, which no update leaves.

    Args:
        master: bf16, before it follows the weights; None for weights that are their own masters.
    """
    if master is not None:
        compensation.masked_fill_(master.to(weights.dtype) != weights, 0)
        return
    exponent = torch.frexp(weights.float()).exponent.clamp(min=_LEAST_EXPONENT)
    half_a_place = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - _BF16_DIGITS - 1)
    compensation.masked_fill_((compensation.float().abs() > half_a_place) | (weights == 0), 0)


def follow_weights(master: Tensor, weights: Tensor) -> None:
    """Make `master` equal `weights` where it does not round to them; elsewhere it keeps its lower bits."""
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    master.copy_(torch.where(master.to(weights.dtype) == weights, master, wide))

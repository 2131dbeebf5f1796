"""Keeps boundary activations in 8 bits: inexact, and it says by how much.

[Note: 8-bit activations] Each block of 128 neighbouring features of a token has one scale s, its largest magnitude /
127, and each element x the integer round(x / s) in 8 bits (Dettmers et al. 2022, arXiv:2110.02861, section 2.1, with a
linear map). The error of an element is at most s / 2, which is absmax / 254 of its block, and on top roundings of fp32
and to the tensor's own dtype. It takes 1 + 4 / 128 bytes per element in place of e. Forward is exact, and so is the
loss; backward recomputes a block from inputs that are off by that much, so gradients are approximate. A block with an
infinite or NaN element comes back with no finite element.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_superscale.sequence.memory.boundary import boundary_hooks

BLOCK = 128
"""The number of features that share a scale."""


class EightBitReport(NamedTuple):
    """The error of the first batch.

    Attributes:
        relative_errors: for each block of the model, the norm of its inputs' error over the norm of its inputs.
        bytes_per_element: bytes that are kept per element of an input.
    """

    relative_errors: list[float]
    bytes_per_element: float

    @property
    def largest(self) -> float:
        """The largest relative error of any block."""
        return max(self.relative_errors, default=0.0)


class EightBitCodec:
    """Encodes activations; see [Note: 8-bit activations]. The first activation of each block is measured.

    Satisfies `activation_offload.Codec`.
    """

    def __init__(self) -> None:
        self._errors: dict[int, Tensor] = {}
        self._num_bytes = self._numel = 0

    def encode(self, block: int, tensor: Tensor) -> list[Tensor]:
        """Codes [..., H] in int8 and scales [..., ceil(H / 128)] in fp32 of an activation [..., H]."""
        kept = list(quantize(tensor))
        if block not in self._errors:
            exact = tensor.float()
            error = self.decode(kept, tensor.dtype).float().sub_(exact)
            # On the device, so that nobody waits for it.
            self._errors[block] = error.norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny)
            self._num_bytes += sum(part.nbytes for part in kept)
            self._numel += tensor.numel()
        return kept

    def decode(self, kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The activation in its own dtype, off by the note's error."""
        codes, scales = kept
        return dequantize(codes, scales, dtype)

    def forget(self) -> None:
        """Measure the next activation of each block, as if it were the first."""
        self._errors.clear()
        self._num_bytes = self._numel = 0

    def report(self) -> EightBitReport:
        """What the first batch showed. Waits for the device."""
        errors = [float(self._errors[block]) for block in sorted(self._errors)]
        return EightBitReport(errors, self._num_bytes / max(self._numel, 1))


class EightBitStore:
    """Keeps boundary activations on their device, in 8 bits. Satisfies `BoundaryStore`."""

    def __init__(self) -> None:
        self.codec = EightBitCodec()

    def saving(self, block: int, inputs: Sequence[Tensor]) -> AbstractContextManager[object]:
        """Let a block save its inputs in 8 bits; see `BoundaryStore`."""
        codec = self.codec

        @torch.no_grad()
        def pack(tensor: Tensor) -> tuple[list[Tensor], torch.dtype]:
            return codec.encode(block, tensor), tensor.dtype

        @torch.no_grad()
        def unpack(kept: tuple[list[Tensor], torch.dtype]) -> Tensor:
            return codec.decode(*kept)

        return boundary_hooks(inputs, pack, unpack)


def quantize(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [..., H], int8, and scales [..., ceil(H / 128)], fp32, of a floating tensor [..., H]."""
    num_features = tensor.shape[-1]
    missing = -num_features % BLOCK
    padded = torch.nn.functional.pad(tensor.float(), (0, missing))
    blocks = padded.view(*tensor.shape[:-1], (num_features + missing) // BLOCK, BLOCK)
    scales = blocks.abs().amax(-1) / 127
    # Zeros over their scale 0 are NaN, and their code is 0. What is not finite is told by its block's scale.
    codes = (blocks / scales.unsqueeze(-1)).round_().nan_to_num_(0.0, 127.0, -127.0)
    return codes.to(torch.int8).flatten(-2)[..., :num_features].contiguous(), scales


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor [..., H] that `quantize` gave codes and scales of, in a dtype."""
    each = scales.repeat_interleave(BLOCK, dim=-1)[..., : codes.shape[-1]]
    return (codes.float() * each).to(dtype)

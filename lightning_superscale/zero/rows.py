"""Whole tensors of row shards, and row shards of whole tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_superscale.comm.collectives import AxisCollectives
from lightning_superscale.layout import ParamSlice, shard_rows


def take_rows(whole: Tensor, piece: ParamSlice) -> Tensor:
    """This rank's rows of a whole tensor of the parameter's shape, in the slice's shape."""
    flat = whole.reshape(-1)[piece.global_offset : piece.global_offset + piece.numel]
    return flat.view(piece.local_shape)


def gather_rows(axis: AxisCollectives, local: Tensor, piece: ParamSlice, device: torch.device) -> Tensor:
    """The whole tensor, on the host. Every rank of the axis calls it.

    Args:
        local: this rank's rows, of any device.
        device: where collectives of the axis run.
    """
    size = axis.axis.size
    if size == 1:
        return local.detach().cpu()
    longest = shard_rows(piece.spec.num_rows, 0, size)
    packed = torch.zeros(size, (longest[1] - longest[0]) * piece.spec.row_numel, dtype=local.dtype, device=device)
    packed[axis.axis.rank, : piece.numel] = local.detach().reshape(-1).to(device)
    # Every rank but the last that has any holds `longest` rows, so the padding is all at the end.
    return axis.all_gather(packed).wait().view(-1)[: piece.spec.numel].view(piece.spec.shape).cpu()

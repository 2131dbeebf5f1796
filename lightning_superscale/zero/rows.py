"""Whole tensors of row shards, and row shards of whole tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_superscale.layout import ParamSlice, shard_rows
from lightning_superscale.zero.ranks import Ranks


def take_rows(whole: Tensor, piece: ParamSlice) -> Tensor:
    """This rank's rows of a whole tensor of the parameter's shape, in the slice's shape."""
    flat = whole.reshape(-1)[piece.global_offset : piece.global_offset + piece.numel]
    return flat.view(piece.local_shape)


def gather_rows(ranks: Ranks, local: Tensor, piece: ParamSlice, device: torch.device) -> Tensor:
    """The whole tensor, on the host. Every rank of the shard axis calls it.

    Args:
        local: this rank's rows, of any device.
        device: where collectives of the shard axis run.
    """
    size = ranks.mesh.shard.size
    if size == 1:
        return local.detach().cpu()
    longest = shard_rows(piece.spec.num_rows, 0, size)
    packed = torch.zeros(size, (longest[1] - longest[0]) * piece.spec.row_numel, dtype=local.dtype, device=device)
    packed[ranks.mesh.shard.rank, : piece.numel] = local.detach().reshape(-1).to(device)
    # Every rank but the last that has any holds `longest` rows, so the padding is all at the end.
    return ranks.shard.all_gather(packed).wait().view(-1)[: piece.spec.numel].view(piece.spec.shape).cpu()

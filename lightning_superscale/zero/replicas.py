"""Keeps what every rank holds whole equal on all: initial weights, and buffers that forward changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_superscale.comm.collectives import AxisCollectives, control_max
from lightning_superscale.comm.mesh import DataMesh


def broadcast_from_first(mesh: DataMesh, tensors: Iterable[Tensor]) -> None:
    """Overwrite every tensor with rank 0's, in place. Every rank calls it with tensors of the same shapes."""
    if mesh.is_single:
        return
    world = AxisCollectives(mesh.world, mesh)
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    for group in by_kind.values():
        small = [tensor for tensor in group if tensor.numel() < _COALESCE_BELOW_NUMEL or not tensor.is_contiguous()]
        for tensor in group:
            if not any(tensor is other for other in small):
                world.broadcast(tensor)
        _broadcast_coalesced(world, small)


# Smaller tensors travel together: a collective each would cost more than copying them.
_COALESCE_BELOW_NUMEL = 2**18


def _broadcast_coalesced(world: AxisCollectives, tensors: Sequence[Tensor]) -> None:
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    world.broadcast(flat)
    for tensor, piece in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(piece.view(tensor.shape))


class BufferSync:
    """Makes every rank's buffers rank 0's before each forward, as DDP does, and only those that changed anywhere."""

    def __init__(self, mesh: DataMesh, module: nn.Module) -> None:
        self._mesh = mesh
        self._module = module
        self._seen: dict[str, tuple[int, int]] = {}

    def sync(self) -> None:
        """Every rank calls it, at the same forward."""
        if self._mesh.is_single:
            return
        buffers = dict(self._module.named_buffers())
        if not buffers:
            return
        changed = [int(self._seen.get(fqn) != (id(buffer), buffer._version)) for fqn, buffer in buffers.items()]
        anywhere = control_max(self._mesh, torch.tensor(changed, dtype=torch.int32), "the comparison of buffers")
        chosen = [fqn for fqn, flag in zip(buffers, anywhere.tolist(), strict=True) if flag]
        with torch.no_grad():
            broadcast_from_first(self._mesh, [buffers[fqn] for fqn in chosen])
        for fqn in chosen:
            self._seen[fqn] = (id(buffers[fqn]), buffers[fqn]._version)

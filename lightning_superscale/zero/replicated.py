"""Keeps tensors that every rank has whole equal on all ranks: initial weights, and buffers that forward changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_superscale.comm.collectives import AxisCollectives
from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.comm.dtensor import is_cut, local_of
from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.torch_private import version_of


def broadcast_from_first(mesh: DataMesh, tensors: Iterable[Tensor]) -> None:
    """Overwrite every tensor with rank 0's, in place. Every rank calls it with tensors of the same shapes.

    Of a tensor that is cut over the tensor axis, each rank gets the part that the first data-parallel rank of its
    tensor rank has.
    """
    if mesh.is_single:
        return
    world, data = AxisCollectives(mesh.world, mesh), AxisCollectives(mesh.data, mesh)
    by_kind: dict[tuple[torch.dtype, torch.device, bool], list[Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.dtype, tensor.device, is_cut(tensor)), []).append(local_of(tensor))
    for (_, _, is_part), group in by_kind.items():
        axis = data if is_part else world
        small = [tensor for tensor in group if tensor.numel() < _COALESCE_BELOW_NUMEL or not tensor.is_contiguous()]
        for tensor in group:
            if not any(tensor is other for other in small):
                axis.broadcast(tensor)
        _broadcast_coalesced(axis, small)


# Tensors below this many elements travel together: a collective for each would cost more than copying them.
_COALESCE_BELOW_NUMEL = 2**18


def _broadcast_coalesced(axis: AxisCollectives, tensors: Sequence[Tensor]) -> None:
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    axis.broadcast(flat)
    for tensor, piece in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(piece.view(tensor.shape))


class BufferSync:
    """Overwrites buffers with rank 0's before each forward, as DDP does, but only those that changed on any rank."""

    def __init__(self, ranks: Communicator, module: nn.Module) -> None:
        self._ranks = ranks
        self._module = module
        self._num_syncs = 0
        self._seen: dict[str, tuple[int, int]] = {}

    def sync(self) -> None:
        """Overwrite the buffers that changed on any rank with rank 0's. Every rank calls it at the same forward.

        Raises:
            SuperScaleError: the module has more buffers than flags were set up for; or, on every rank, a rank is at
                another collective.
        """
        if self._ranks.mesh.is_single:
            return
        buffers = dict(self._module.named_buffers())
        if not buffers:
            return
        agreement = self._ranks.agreement
        if len(buffers) > agreement.num_flags:
            raise SuperScaleError(
                f"{type(self._module).__name__} has {len(buffers)} buffers, more than when training was set up. "
                "Register buffers before trainer.fit(), so that every rank knows of them."
            )
        vector = agreement.new_flags()
        for place, (fqn, buffer) in enumerate(buffers.items()):
            agreement.flags_of(vector)[place] = int(self._seen.get(fqn) != (id(buffer), version_of(buffer)))
        anywhere = agreement.agree(vector, label="the start of a forward", step=self._num_syncs).tolist()
        self._num_syncs += 1
        chosen = [fqn for fqn, flag in zip(buffers, anywhere, strict=False) if flag]
        with torch.no_grad():
            broadcast_from_first(self._ranks.mesh, [buffers[fqn] for fqn in chosen])
        for fqn in chosen:
            self._seen[fqn] = (id(buffers[fqn]), version_of(buffers[fqn]))

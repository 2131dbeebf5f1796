"""Parameters that are placed over ranks (DTensors): a rank's part of a tensor, and the way from parts to whole ones.

[Note: Two cuts] A tensor-parallel plan cuts a parameter first, along the dim that it names; the data-parallel ranks
then cut rows (dim 0) of the part that their rank of the tensor axis has. FSDP2 holds both cuts in one DTensor. All
units, states and transfers of this package follow the second cut: a whole parameter there is the tensor axis' part.
Only checkpoints and loads need the user's whole tensor, and only this file knows the first cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lightning_superscale.comm.collectives import AxisCollectives
from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.comm.mesh import TENSOR_AXIS, DataMesh
from lightning_superscale.layout.rows import ParamSlice, ParamSpec, shard_rows


class LocalBox(NamedTuple):
    """One rank's box of a tensor of a parameter's shape, and its place in the user's whole tensor.

    Attributes:
        shape: shape of the whole tensor.
        offset: first index of the box along each tensor dim of the whole.
        tensor: the values in the box.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor


def local_rows(rows: Tensor, piece: ParamSlice, like: Tensor) -> LocalBox:
    """This rank's rows of a tensor that is cut as the parameter `like`, with their place; issues no collective.

    Args:
        rows: this rank's rows, [*piece.local_shape].
        piece: the slice of the parameter.
    """
    shape = tuple(like.shape)
    offset = [piece.rows[0], *(0 for _ in shape[1:])] if shape else []
    place = _tensor_place(like)
    if place is not None:
        dim, rank, size = place
        offset[dim] += shard_rows(shape[dim], rank, size)[0]
    return LocalBox(shape, tuple(offset), rows)


def local_rows_of(placed: Tensor) -> Tensor:
    """This rank's part of a DTensor, a view of its own memory, which FSDP2's gathers read."""
    with torch.no_grad():
        return cast(DTensor, placed).to_local().detach()


def local_of(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, or all of a plain tensor: a view of its own memory."""
    return local_rows_of(tensor) if isinstance(tensor, DTensor) else tensor.detach()


def _tensor_place(tensor: Tensor) -> tuple[int, int, int] | None:
    """(dim that the tensor axis cuts, this rank's place on the axis, its size); None if it does not cut the tensor."""
    if not isinstance(tensor, DTensor):
        return None
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names or ()
    if TENSOR_AXIS not in names:
        return None
    axis = names.index(TENSOR_AXIS)
    placement = tensor.placements[axis]
    if not isinstance(placement, Shard):
        return None
    return placement.dim % tensor.ndim, mesh.get_local_rank(axis), mesh.size(axis)


def is_cut(tensor: Tensor) -> bool:
    """Whether the tensor axis cuts a tensor, so that its ranks hold different parts."""
    return _tensor_place(tensor) is not None


def tensor_part_name(tensor: Tensor, fqn: str) -> str:
    """A name of this rank's tensor-axis part of a parameter, the same for all ranks that hold the same part."""
    place = _tensor_place(tensor)
    return fqn if place is None else f"{fqn}[{place[1]} of {place[2]}]"


def tensor_shape(tensor: Tensor) -> tuple[int, ...]:
    """Shape of this rank's tensor-axis part, which data-parallel ranks hold together."""
    shape, place = tuple(tensor.shape), _tensor_place(tensor)
    if place is None:
        return shape
    dim, rank, size = place
    start, stop = shard_rows(shape[dim], rank, size)
    return (*shape[:dim], stop - start, *shape[dim + 1 :])


def tensor_numel(tensor: Tensor) -> int:
    """Number of elements of this rank's tensor-axis part."""
    return ParamSpec("", tensor_shape(tensor)).numel


def local_shard(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's tensor-axis part of a whole tensor of `like`'s shape, a view."""
    place = _tensor_place(like)
    if place is None:
        return whole
    dim, rank, size = place
    start, stop = shard_rows(whole.shape[dim], rank, size)
    return whole.narrow(dim, start, stop - start)


def join_parts(tensor_axis: AxisCollectives, part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of the parts that `local_shard` cut, on the host. Every rank of the tensor axis calls it.

    Args:
        tensor_axis: collectives along that axis.
        part: this rank's part, on any device.
        like: the placed parameter; collectives run on its device.
    """
    place = _tensor_place(like)
    if place is None:
        return part.detach().cpu()
    dim, rank, size = place
    rows = part.detach().movedim(dim, 0)
    spec = ParamSpec("", (like.shape[dim], *rows.shape[1:]))
    piece = ParamSlice(spec, shard_rows(spec.num_rows, rank, size), 0)
    return gather_rows(tensor_axis, rows, piece, like.device).movedim(0, dim).contiguous()


def rows_of_part(part: Tensor, like: Tensor) -> Tensor:
    """This rank's rows of its tensor-axis part of a tensor placed as `like`, a view."""
    if not isinstance(like, DTensor):
        return part
    mesh = like.device_mesh
    if mesh.mesh_dim_names == (TENSOR_AXIS,):
        return part
    start, stop = shard_rows(part.shape[0], mesh.get_local_rank(0), mesh.size(0))
    return part[start:stop]


def local_part(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part, by both cuts, of a whole tensor placed as `like`: a view."""
    return rows_of_part(local_shard(whole, like), like)


def write_whole(param: Tensor, whole: Tensor) -> None:
    """Overwrite a parameter with a whole weight; a DTensor takes this rank's part of it."""
    with torch.no_grad():
        write_local(param, local_part(whole, param).to(param.device, param.dtype))


def write_local(param: Tensor, local: Tensor) -> None:
    """Overwrite this rank's part of a DTensor, or all of a plain parameter."""
    with torch.no_grad():
        # Through the DTensor, so that its version tells the engine of the edit.
        param.copy_(placed_like(local, param) if isinstance(param, DTensor) else local)


def placed_like(local: Tensor, like: Tensor) -> DTensor:
    """A DTensor of this rank's part, placed as `like` is; issues no collective."""
    placed = cast(DTensor, like)
    return DTensor.from_local(
        local.contiguous(),
        placed.device_mesh,
        placed.placements,
        run_check=False,
        shape=placed.shape,
        stride=placed.stride(),
    )


def gather_whole(ranks: Communicator, fqn: str, placed: Tensor) -> Tensor:
    """The whole tensor of a DTensor, on the host. Every rank calls it."""
    part = local_rows_of(placed)
    if cast(DTensor, placed).device_mesh.mesh_dim_names != (TENSOR_AXIS,):
        axis = ranks.mesh.shard
        spec = ParamSpec(fqn, tensor_shape(placed))
        piece = ParamSlice(spec, shard_rows(spec.num_rows, axis.rank, axis.size), 0)
        part = gather_rows(ranks.shard, part, piece, placed.device)
    return join_parts(ranks.tensor, part, placed)


def placed_state(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of whole tensors, placed like the module's own parameters and buffers."""
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, DTensor)}
    placed = dict(state)
    for name, like in own.items():
        whole = placed.get(name)
        if isinstance(whole, Tensor) and not isinstance(whole, DTensor) and whole.shape == like.shape:
            placed[name] = placed_like(local_part(whole, like), like)
    return placed


def whole_state(mesh: DataMesh, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of whole tensors, on rank 0; empty on other ranks. Every rank calls it.

    The tensors may be cut over the tensor axis only. A state dict without DTensors is returned as it is, on every rank.
    """
    if not any(isinstance(value, DTensor) for value in state.values()):
        return dict(state)
    axis = AxisCollectives(mesh.tensor, mesh)
    whole = {
        name: join_parts(axis, local_rows_of(value), value) if isinstance(value, DTensor) else value
        for name, value in state.items()
    }
    return whole if mesh.world.rank == 0 else {}


def take_rows(whole: Tensor, piece: ParamSlice) -> Tensor:
    """This rank's rows of a whole tensor of the parameter's shape, [*piece.local_shape]."""
    flat = whole.reshape(-1)[piece.global_offset : piece.global_offset + piece.numel]
    return flat.view(piece.local_shape)


def gather_rows(axis: AxisCollectives, local: Tensor, piece: ParamSlice, device: torch.device) -> Tensor:
    """The whole tensor of the rows that ranks of an axis hold, on the host. Every rank of the axis calls it.

    Args:
        local: this rank's rows, on any device.
        piece: their slice.
        device: the device on which collectives of the axis run.
    """
    size = axis.axis.size
    if size == 1:
        return local.detach().cpu()
    longest = shard_rows(piece.spec.num_rows, 0, size)
    packed = torch.zeros(size, (longest[1] - longest[0]) * piece.spec.row_numel, dtype=local.dtype, device=device)
    packed[axis.axis.rank, : piece.numel] = local.detach().reshape(-1).to(device)
    # Every rank but the last that has any holds `longest` rows, so the padding is all at the end.
    return axis.all_gather(packed).wait().view(-1)[: piece.spec.numel].view(piece.spec.shape).cpu()

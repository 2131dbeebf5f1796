"""Shards a module with FSDP2: initialises, shards and hooks its groups, innermost first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from lightning_superscale.comm.collectives import AxisCollectives
from lightning_superscale.comm.mesh import DATA_AXIS, DataMesh
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.zero.fsdp2.all_gather import GroupGather
from lightning_superscale.zero.fsdp2.gather_order import GatherOrder, OrderDeparted
from lightning_superscale.zero.fsdp2.module import ShardedGroup, ShardedModule, swap_params
from lightning_superscale.zero.fsdp2.unwrap import attributes_of
from lightning_superscale.zero.fsdp2.wrap import GroupPlan, Wrap, left_out_of, plan_groups, wrap_plan
from lightning_superscale.zero.meta_init import (
    check_materialisable,
    cut_again,
    initialisers_of,
    is_on_meta,
    materialise,
    places_of,
)
from lightning_superscale.zero.replicated import broadcast_from_first
from lightning_superscale.zero.tensor_parallel import check_all_sharded, check_placements


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingPolicy:
    """The way in which a module is cut into groups.

    Attributes:
        wrap: module classes, class names or module names to make groups of; None: repeated blocks.
        include_root: make the root itself the outermost group; it may then only be used by calling it.
        reshard_after_forward: free inner groups between forward and backward.
    """

    wrap: Wrap = None
    include_root: bool = False
    reshard_after_forward: bool = True


def shard_module(
    root: nn.Module,
    optimizers: Sequence[Optimizer],
    mesh: DataMesh,
    device: torch.device,
    order: GatherOrder,
    policy: ShardingPolicy | None = None,
) -> ShardedModule:
    """Shard a module's parameters over the shard axis. Every rank calls it.

    Parameters become other objects: names of parameters have to be looked up again afterwards, while `optimizers`
    follow in place. Real weights become rank 0's on every rank; meta ones are initialised group by group,
    so that no device ever holds the whole model. Parameters that a plan cut over the tensor axis are cut once more.

    Raises:
        SuperScaleError: a parameter or a module can't be sharded; nothing is changed then.
    """
    policy = policy or ShardingPolicy()
    check_placements(root, mesh)
    plans = plan_groups(root, wrap_plan(root, policy.wrap, include_root=policy.include_root))
    check_all_sharded(root, {p for plan in plans for p in plan.params.values()}, left_out_of(plans))
    check_materialisable(root)
    collectives, device_mesh = AxisCollectives(mesh.gather, mesh), _mesh_of_gathers(mesh, device)
    inner = {m for plan in plans for m in plan.module.modules() if m is not plan.module}
    before = attributes_of(m for plan in plans if plan.module not in inner for m in plan.module.modules())
    sharded: ShardedModule | None = None

    def joined(error: OrderDeparted) -> None:
        if sharded is not None:
            sharded.join_agreement(error)

    groups: list[ShardedGroup] = []
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    left_out: dict[nn.Parameter, str] = {}
    # Both walk the whole model, so they are taken once; sharding one group changes neither for another.
    initialisers = initialisers_of(root) if is_on_meta(root) else {}
    whole = _Whole(root, mesh, device_mesh, device, policy, places_of(root), initialisers)
    for plan in plans:
        name = plan.fqn or type(root).__name__
        gather = GroupGather(collectives, order, name, joined)
        group = _shard_group(whole, plan, len(groups), replaced, left_out)
        group.fsdp.set_custom_all_gather(cast(Any, gather))
        group.is_top = plan.module not in inner
        groups.append(group)
    _initialise_rest(root, mesh, device, replaced)
    for optimizer in optimizers:
        swap_params(optimizer, replaced)
    sharded = ShardedModule(
        root,
        groups,
        replaced=replaced,
        left_out=left_out,
        before=before,
        optimizers=optimizers,
        order=order,
        reshards_after_forward=policy.reshard_after_forward,
    )
    return sharded


@dataclass(frozen=True, slots=True)
class _Whole:
    """The model that is sharded group by group, and how."""

    root: nn.Module
    mesh: DataMesh
    device_mesh: DeviceMesh
    device: torch.device
    policy: ShardingPolicy
    places: Mapping[nn.Parameter, list[tuple[nn.Module, str]]]
    initialisers: Mapping[nn.Module, Callable[[], object]]


def _shard_group(
    whole: _Whole,
    plan: GroupPlan,
    index: int,
    replaced: dict[nn.Parameter, nn.Parameter],
    left_out: dict[nn.Parameter, str],
) -> ShardedGroup:
    """Initialise one group's parameters whole, then shard them; adds to `replaced` and `left_out`."""
    places = whole.places
    own = [m for m in plan.module.modules() if not isinstance(m, FSDPModule)]
    made = materialise(whole.root, own, places, whole.device, whole.initialisers)
    originals = plan.params
    where = {fqn: places[param] for fqn, param in originals.items()}
    _move((made.get(param, param) for param in originals.values()), whole.device)
    _make_equal(whole.mesh, (made.get(param, param) for param in originals.values()))
    made = cut_again(made, places)
    current = {fqn: made.get(param, param) for fqn, param in originals.items()}
    outside = {made.get(param, param): why for param, why in plan.left_out.items()}
    left_out.update(outside)
    fully_shard(
        plan.module,
        mesh=whole.device_mesh,
        reshard_after_forward=whole.policy.reshard_after_forward,
        ignored_params={*outside, *left_out},
    )
    params: dict[str, nn.Parameter] = {}
    for fqn, original in originals.items():
        owner, name = where[fqn][0]
        new = owner.get_parameter(name)
        if new is not original:
            replaced[original] = new
        if current[fqn] not in outside:
            params[fqn] = new
    has_inner = any(isinstance(m, FSDPModule) for m in plan.module.modules() if m is not plan.module)
    return ShardedGroup(index, plan.fqn, plan.module, False, has_inner, params, {params[f]: where[f] for f in params})


def _initialise_rest(
    root: nn.Module, mesh: DataMesh, device: torch.device, replaced: dict[nn.Parameter, nn.Parameter]
) -> None:
    """Initialise parameters of no group, and bring these and all buffers to the device, equal on every rank."""
    places = places_of(root)
    replaced.update(materialise(root, [m for m in root.modules() if not isinstance(m, FSDPModule)], places, device))
    in_groups = set(replaced.values())
    rest = [p for p in root.parameters() if p not in in_groups]
    _move([*rest, *root.buffers()], device)
    _make_equal(mesh, rest)
    _make_equal(mesh, root.buffers())


def _mesh_of_gathers(mesh: DataMesh, device: torch.device) -> DeviceMesh:
    """The shard axis as a DeviceMesh for FSDP2, on the process group of user code.

    It is a submesh of the mesh of tensor-parallel parameters, if there is one.

    Raises:
        SuperScaleError: the axis has one rank.
    """
    if mesh.device_mesh is not None:
        return mesh.device_mesh[DATA_AXIS]
    if mesh.users is None:
        raise SuperScaleError("ZeRO-3 needs at least two ranks on the shard axis; found one. Use zero=2 there.")
    return DeviceMesh.from_group(mesh.users, device.type)


def _move(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Move tensors to the training device in place. Callers move one group at a time: not all may fit whole."""
    for tensor in tensors:
        if tensor.device != device:
            tensor.data = tensor.data.to(device)


def _make_equal(mesh: DataMesh, tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with rank 0's; see `broadcast_from_first`."""
    with torch.no_grad():
        broadcast_from_first(mesh, tensors)

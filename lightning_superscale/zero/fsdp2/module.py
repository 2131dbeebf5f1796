"""One module sharded with FSDP2: its groups, the transports of their gradients, and the return to plain parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.comm.dtensor import gather_whole, local_of, rows_of_part, write_local, write_whole
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.optim.grad_dtypes import grad_dtype_of
from lightning_superscale.optim.weights.param_classes import follow
from lightning_superscale.zero.fsdp2.autograd import GroupGraphs, UsersHooks
from lightning_superscale.zero.fsdp2.gather_order import GatherOrder, OrderDeparted
from lightning_superscale.zero.fsdp2.unwrap import release_modules
from lightning_superscale.zero.fsdp2.user_errors import refuse_copies, refuse_saves


class GradientTaker(Protocol):
    """The transport that carries the gradients of some of the module's parameters."""

    def take_grad(self, param: nn.Parameter, unsharded: nn.Parameter) -> None:
        """Take the gradient that backward accumulated into `unsharded`, the gathered parameter of `param`."""

    def wait_uploads(self, group: int) -> bool:
        """Bring new weights of a group to where its gather reads them; returns whether there were any."""

    def join_agreement(self, error: OrderDeparted) -> None:
        """Raise an error on all ranks, through the agreement of the step in which other ranks wait."""

    def released(self, plain: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Note that the module's sharded parameters were replaced by plain ones.

        Args:
            plain: by sharded parameter, the plain one.
        """


@dataclass(slots=True)
class ShardedGroup:
    """Parameters that FSDP2 gathers and reshards together.

    Attributes:
        is_top: whether no other group is around it.
        has_inner: whether other groups are inside it.
        params: sharded parameters (DTensors), by name from the root.
        places: modules and names at which each sharded parameter is registered.
        unsharded: by sharded parameter, the gathered one that forward reads: plain, or cut over the tensor axis
            alone.
    """

    index: int
    fqn: str
    module: nn.Module
    is_top: bool
    has_inner: bool
    params: dict[str, nn.Parameter]
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]]
    unsharded: dict[nn.Parameter, nn.Parameter] = field(default_factory=dict)

    @property
    def fsdp(self) -> FSDPModule:
        return cast(FSDPModule, self.module)


class ShardedModule:
    """A module whose parameters FSDP2 gathers at each group's forward and frees afterwards.

    FSDP2 gathers, prefetches and frees; it never reduces. [Note: Gradients of gathered parameters] Autograd
    accumulates into the unsharded parameter that forward saw, which is one object for the whole run. A hook there takes
    the gradient away before FSDP2 looks for it, so that gradients are linear deltas in the order, dtype and
    agreement of every other transport, also for modules that are used twice, late, on some ranks or not at all. FSDP2's
    own reduction assumes that all ranks have gradients for the same parameters and that a group's backward runs once
    per forward; reentrant checkpoints and partial backward calls break that.

    Args:
        groups: by index, innermost first.
        replaced: by the parameter that the caller knew, the one that took its place in the module.
        left_out: parameters that stay whole on every rank, and why.
        before: attributes that modules had before sharding, for `release_modules`.
        optimizers: optimizers whose parameters follow when the module becomes plain.
        order: checks the order of gathers over ranks.
        reshards_after_forward: whether inner groups are freed between forward and backward.
    """

    def __init__(
        self,
        root: nn.Module,
        groups: Sequence[ShardedGroup],
        *,
        replaced: Mapping[nn.Parameter, nn.Parameter],
        left_out: Mapping[nn.Parameter, str],
        before: dict[nn.Module, frozenset[str]],
        optimizers: Sequence[Optimizer],
        order: GatherOrder,
        reshards_after_forward: bool,
    ) -> None:
        self.root = root
        self.groups = list(groups)
        self.replaced = dict(replaced)
        self.left_out = dict(left_out)
        self.order = order
        self._before = before
        self._optimizers = list(optimizers)
        self._group_of = {param: group for group in groups for param in group.params.values()}
        self._takers: dict[nn.Parameter, GradientTaker] = {}
        self._transports: list[GradientTaker] = []
        self._attached: list[GradientTaker] = []
        self._strays: dict[nn.Parameter, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._is_released = False
        self.graphs = GroupGraphs(reshards_after_forward=reshards_after_forward)
        self._refused = [refuse_copies(group.module, group.fqn) for group in groups] + refuse_saves(root)
        self._users_hooks = UsersHooks({new: old for old, new in self.replaced.items()})
        for group in self.groups:
            group.fsdp.set_requires_gradient_sync(False, recurse=False)
            for fqn, param in group.params.items():
                follow(cast(DTensor, param), fqn)
            self._hooks.append(group.module.register_forward_pre_hook(self._before_gather(group), prepend=True))
            self._hooks.append(group.module.register_forward_pre_hook(self._after_gather(group)))
            self._hooks.append(self.graphs.watch(group.index, group.module))

    # Transports

    def attach(self, transport: GradientTaker) -> None:
        """Add a transport of some of the module's parameters."""
        self._transports.append(transport)
        self._attached.append(transport)

    def detach(self, transport: GradientTaker) -> None:
        """Remove a transport. Without any left the module becomes plain again, so every rank calls it."""
        if transport in self._transports:
            self._transports.remove(transport)
        if not self._transports:
            self.release()

    def give_to(self, taker: GradientTaker, params: Iterable[nn.Parameter]) -> None:
        """Give `taker` the gradients of these parameters from now on; it finds earlier ones at `unsharded_param`."""
        for param in params:
            self._takers[param] = taker
            if param in self._strays:
                self.group_of(param).unsharded[param].grad = self._strays.pop(param)
                param.grad = None

    def group_of(self, param: nn.Parameter) -> ShardedGroup:
        """The group of a sharded parameter."""
        return self._group_of[param]

    def holds(self, param: nn.Parameter) -> bool:
        """Whether a parameter is a sharded one of this module."""
        return param in self._group_of

    def unsharded_param(self, param: nn.Parameter) -> nn.Parameter | None:
        """The gathered parameter that autograd accumulates into; None before the first forward."""
        return self._group_of[param].unsharded.get(param)

    def join_agreement(self, error: OrderDeparted) -> None:
        """Raise an error on all ranks, through the agreement of the first transport's step."""
        if self._transports:
            self._transports[0].join_agreement(error)

    # Forward

    def _before_gather(self, group: ShardedGroup) -> Callable[..., None]:
        def enter(module: nn.Module, _inputs: object) -> None:
            if group.is_top:
                self.order.begin_pass(group.fqn, is_inference=not torch.is_grad_enabled())
            waited = self._wait_uploads(group.index)
            if torch.is_inference_mode_enabled():
                # Parameters that FSDP2 makes at a first gather in inference mode could never be trained.
                with torch.inference_mode(False), torch.no_grad():
                    group.fsdp.unshard()
            elif waited:
                # FSDP2 copies rows on a stream that waited for this one at the root's forward, before the upload
                # arrived. An explicit gather copies them on this stream.
                group.fsdp.unshard(async_op=True)

        return cast(Callable[..., None], torch.compiler.disable(enter))  # type: ignore[no-untyped-call]

    def _wait_uploads(self, index: int) -> bool:
        waited = [transport.wait_uploads(index) for transport in self._transports]
        return any(waited)

    def _after_gather(self, group: ShardedGroup) -> Callable[..., None]:
        def entered(module: nn.Module, _inputs: object) -> None:
            self._hook_unsharded(group)

        return cast(Callable[..., None], torch.compiler.disable(entered))  # type: ignore[no-untyped-call]

    def _hook_unsharded(self, group: ShardedGroup) -> None:
        for fqn, param in group.params.items():
            if not param.requires_grad:
                continue
            owner, name = group.places[param][0]
            unsharded = owner.get_parameter(name)
            if group.unsharded.get(param) is not unsharded:
                if unsharded is param:
                    raise AssertionError(f"{group.fqn!r} was entered, and its parameters are not gathered")
                group.unsharded[param] = unsharded
                if grad_dtype_of(param) != grad_dtype_of(unsharded):
                    unsharded.grad_dtype = grad_dtype_of(param)
                self._hooks.append(unsharded.register_post_accumulate_grad_hook(self._taken(param)))  # type: ignore[no-untyped-call]
            followed = self._users_hooks.follow(param, unsharded, fqn)
            if followed is not None:
                self._hooks.append(followed)

    def _taken(self, param: nn.Parameter) -> Callable[[nn.Parameter], None]:
        def take(unsharded: nn.Parameter) -> None:
            taker = self._takers.get(param)
            if taker is not None:
                taker.take_grad(param, unsharded)
            else:
                self._keep_stray(param, unsharded)

        return take

    def _keep_stray(self, param: nn.Parameter, unsharded: nn.Parameter) -> None:
        """Keep the gradient of a parameter that was unfrozen after the start, until `give_to` names its transport.

        Zeros in `param.grad` show the optimizer engine that there is a gradient.
        """
        grad, unsharded.grad = unsharded.grad, None
        owned = (own for optimizer in self._optimizers for group in optimizer.param_groups for own in group["params"])
        if grad is None or not any(own is param for own in owned):
            return
        self._strays[param] = self._strays[param] + grad if param in self._strays else grad
        if param.grad is None:
            param.grad = torch.zeros_like(param)

    # Unsharded weights

    def wait_all_uploads(self) -> None:
        """Bring new weights of all groups to where gathers read them."""
        for group in self.groups:
            self._wait_uploads(group.index)

    def reshard(self, index: int, changed: Iterable[nn.Parameter]) -> None:
        """Reshard a group whose weights `changed` are new, so that the next forward gathers them."""
        group = self.groups[index]
        increment_version([group.unsharded[param] for param in changed if param in group.unsharded])
        self.graphs.allow_reshard(index, group.module)
        group.fsdp.reshard()

    def reshard_all(self) -> None:
        """Reshard every group, so that the next forward gathers new weights."""
        for group in self.groups:
            group.fsdp.reshard()

    @contextmanager
    def summon(self, *, writeback: bool = False) -> Iterator[None]:
        """While open, the module's parameters are unsharded on every rank. Every rank enters and leaves it.

        Args:
            writeback: keep changes: each rank keeps its rows of them, so all ranks must make the same changes.
        """
        self.wait_all_uploads()
        with torch.inference_mode(False), torch.no_grad():
            for group in self.groups:
                group.fsdp.unshard()
        try:
            yield
            if writeback:
                for group in self.groups:
                    self._write_back(group)
        finally:
            for group in self.groups:
                group.fsdp.reshard()

    def _write_back(self, group: ShardedGroup) -> None:
        unsharded = {param: local_of(_unsharded_at(group, param)).clone() for param in group.params.values()}
        group.fsdp.reshard()
        for param, own in unsharded.items():
            write_local(param, rows_of_part(own, param))

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool) -> None:
        """Load a state dict of whole tensors. Every rank calls it with equal ones.

        Raises:
            SuperScaleError: with `strict`, names are missing or unexpected; or a weight or buffer has another shape.
                Nothing is changed then.
        """
        own = {name: value for name, value in self.root.state_dict().items() if isinstance(value, Tensor)}
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if strict and (missing or unexpected):
            raise SuperScaleError(
                f"the checkpoint lacks {missing[:5]} and has besides {unexpected[:5]}. Build the model as it was when "
                "it was saved, or load with strict=False."
            )
        _check_shapes(own, state)
        params = {name for name, _ in self.root.named_parameters(remove_duplicate=False)}
        self.load_whole({name: value for name, value in state.items() if name in params})
        with torch.no_grad():
            for name, buffer in self.root.named_buffers():
                if name in state:
                    write_whole(buffer, state[name])

    def load_whole(self, weights: Mapping[str, Tensor]) -> None:
        """Load whole weights, by name. Every rank calls it with equal ones; engines take them over at their next step.

        Raises:
            SuperScaleError: a weight has another shape; nothing is changed.
        """
        self.wait_all_uploads()
        params = {fqn: param for group in self.groups for fqn, param in group.params.items()}
        params.update((fqn, param) for fqn, param in self.root.named_parameters() if fqn not in params)
        _check_shapes(params, weights)
        for group in self.groups:
            group.fsdp.reshard()
        for fqn, whole in weights.items():
            param = params.get(fqn)
            if param is not None:
                write_whole(param, whole)

    def local_state_dict(self) -> dict[str, Any]:
        """The module's state dict of DTensors that share memory with the module's parameters. No rank waits.

        Writes to the tensors change the module; engines take them over when `reload_masters` is called.
        """
        self.wait_all_uploads()
        for group in self.groups:
            group.fsdp.reshard()
        return dict(self.root.state_dict())

    def state_dict(self, ranks: Communicator) -> dict[str, Any]:
        """The module's state dict with whole tensors on rank 0's host; empty on other ranks. Every rank calls it."""
        self.wait_all_uploads()
        is_first = ranks.mesh.world.rank == 0
        whole: dict[str, Any] = {}
        for name, value in self.root.state_dict().items():
            if isinstance(value, DTensor):
                value = gather_whole(ranks, name, value)
            elif isinstance(value, Tensor):
                value = value.detach().cpu() if is_first else None
            if is_first:
                whole[name] = value
        return whole

    def recover(self) -> None:
        """Let FSDP2 forget a forward or backward that an exception interrupted. Every rank calls it."""
        for group in self.groups:
            reset = getattr(group.fsdp, "reset_iter_state", None)  # from torch 2.13 on
            if group.is_top and reset is not None:
                with contextlib.suppress(AttributeError):  # a network that was never entered has nothing to reset
                    reset()

    def abandon(self) -> None:
        """Leave the module sharded for good after a rank failed: weights can't be gathered any more."""
        self.recover()
        self._is_released = True
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    # The way back

    @torch.inference_mode(False)
    @torch.no_grad()
    def release(self) -> None:
        """Undo the sharding: plain parameters, whole on every rank. Every rank calls it; later calls do nothing.

        Parameters that a plan cut over the tensor axis stay cut over that.
        """
        if self._is_released:
            return
        self._is_released = True
        self.wait_all_uploads()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        plain: dict[nn.Parameter, nn.Parameter] = {}
        for group in self.groups:
            # Reshard first: a group that is gathered now may have weights older than the rows.
            group.fsdp.reshard()
            group.fsdp.unshard()
            unsharded = {param: _unsharded_at(group, param) for param in group.params.values()}
            new = {p: nn.Parameter(w.clone(), requires_grad=p.requires_grad) for p, w in unsharded.items()}
            group.fsdp.reshard()
            for param, own in new.items():
                for owner, name in group.places[param]:
                    owner.register_parameter(name, own)
            plain.update(new)
            group.unsharded.clear()
        self._users_hooks.hand_back(plain)
        for allow in self._refused:
            allow()
        release_modules(self._before)
        self.groups.clear()
        for optimizer in self._optimizers:
            swap_params(optimizer, plain)
        for transport in self._attached:
            transport.released(plain)
        self.replaced = {old: plain.get(new, new) for old, new in self.replaced.items()}


def _check_shapes(own: Mapping[str, Tensor], loaded: Mapping[str, Any]) -> None:
    """Refuse tensors to load whose shape is another than that of the module's own one of that name."""
    for fqn, whole in loaded.items():
        if fqn in own and isinstance(whole, Tensor) and whole.shape != own[fqn].shape:
            raise SuperScaleError(
                f"weight {fqn!r} has shape {tuple(whole.shape)} in the checkpoint and {tuple(own[fqn].shape)} here. "
                "Build the model as it was when it was saved. No weight was loaded."
            )


def _unsharded_at(group: ShardedGroup, param: nn.Parameter) -> nn.Parameter:
    owner, name = group.places[param][0]
    return owner.get_parameter(name)


def swap_params(optimizer: Optimizer, new_of: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Replace parameters in an optimizer's groups and states, in place.

    Args:
        new_of: by parameter, the one that takes its place.
    """
    for group in optimizer.param_groups:
        group["params"][:] = [new_of.get(param, param) for param in group["params"]]
    for old, new in new_of.items():
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)

"""Chooses the modules that become groups, which ZeRO-3 gathers and frees together. Changes nothing itself.

[Note: Branches] Ranks gather in one order, so a module that only some ranks' batches run must not be a group
of its own: it is gathered with the caller that every rank runs. Repeated blocks are run by every batch in all
usual models; towers, adapters and experts below them are never groups by themselves. Where a list of experts
is not inside a block, name the groups (`wrap=`); ranks that gather in different orders raise an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_superscale.comm.dtensor import local_of
from lightning_superscale.errors import SuperScaleError, did_you_mean
from lightning_superscale.torch_private import behind_compile, own_params_of

Wrap = Iterable[type[nn.Module] | str] | None


class GroupPlan(NamedTuple):
    """The plan of one group: a module, its parameters that no inner group holds, and those that FSDP2 can't take.

    Attributes:
        fqn: name of the module, "" for the root.
        params: parameters by name from the root, in registration order; each once.
        left_out: parameters that FSDP2 can't take, and why; they stay whole on every rank.
    """

    fqn: str
    module: nn.Module
    params: dict[str, nn.Parameter]
    left_out: dict[nn.Parameter, str]


def wrap_plan(root: nn.Module, wrap: Wrap = None, *, include_root: bool = True) -> list[nn.Module]:
    """The modules to make groups of, innermost first and the root last.

    Without `wrap` these are the outermost repeated blocks (two or more children of a list that have one type and equal
    parameter shapes) and the modules that Hugging Face models name in `_no_split_modules`, on any submodule.

    Args:
        wrap: module classes, class names or module names to wrap instead.
        include_root: False takes the root's outermost callable children as last groups: for a root that is
            never called itself, such as a LightningModule with several networks.

    Raises:
        SuperScaleError: a name in `wrap` matches nothing, or names a container that has no forward.
    """
    chosen = _automatic(root) if wrap is None else _named(root, wrap)
    tops = [root] if include_root else outermost_callables(root)
    chosen -= set(tops)
    for module in _sharing_with_others(root, chosen):
        chosen.discard(module)
    # Depth first, children before parents: a network may also be registered as a part of another one.
    chosen.update(tops)
    return [m for m in _children_first(root) if m in chosen and not isinstance(m, FSDPModule)]


def blocks_with_own_params(
    root: nn.Module, wrap: Wrap = None, key: str = "wrap"
) -> list[tuple[str, nn.Module, dict[str, nn.Parameter]]]:
    """The blocks that `wrap_plan` finds, innermost first, each with the parameters that no module outside it owns.

    Args:
        key: names the option that `wrap` comes from, in errors.

    Returns:
        (name from the root, module, its parameters by name from the root): each parameter once, with the innermost
        block; blocks without any are left out. Tied weights belong to a block only if all their owners are in it.
        Empty parameters and subclasses of `nn.Parameter`, which may keep more than one tensor, belong to none.

    Raises:
        SuperScaleError: a name in `wrap` matches nothing, or names a container that has no forward.
    """
    chosen = _automatic(root) if wrap is None else _named(root, wrap, key)
    chosen.discard(root)
    fqn_of_module = {module: fqn for fqn, module in root.named_modules()}
    fqn_of = {param: fqn for fqn, param in root.named_parameters()}
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in root.modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(param, set()).add(module)
    taken: set[nn.Parameter] = set()
    blocks = []
    for module in (m for m in _children_first(root) if m in chosen):
        inside = set(module.modules())
        own = {
            fqn_of[p]: p
            for p in module.parameters()
            if p not in taken and owners[p] <= inside and type(p) is nn.Parameter and p.numel()
        }
        taken.update(own.values())
        if own:
            blocks.append((fqn_of_module[module], module, own))
    return blocks


def outermost_callables(root: nn.Module) -> list[nn.Module]:
    """The outermost modules below `root` that have parameters and a forward of their own."""
    found: dict[nn.Module, None] = {}
    for child in root.children():
        if next(child.parameters(), None) is None:
            continue
        if is_callable_module(child):
            found[child] = None
        else:
            found.update(dict.fromkeys(outermost_callables(child)))
    return list(found)


def is_callable_module(module: nn.Module) -> bool:
    """Whether a module has a forward: lists of modules have none, nor has a class that only keeps several networks."""
    return type(module).forward is not nn.Module.forward


def _children_first(module: nn.Module) -> list[nn.Module]:
    ordered: dict[nn.Module, None] = {}

    def visit(m: nn.Module) -> None:
        for child in m.children():
            if child not in ordered:
                visit(child)
        ordered[m] = None

    visit(module)
    return list(ordered)


def _automatic(root: nn.Module) -> set[nn.Module]:
    named = _hugging_face_blocks(root)
    repeated = _outermost(root, lambda module: _repeated_children(module))
    # The names that a model's author gives are more reliable than repetition: repeated modules inside a named one or
    # around one are no groups.
    inside_named = {m for block in named for m in block.modules()}
    holding_named = {m for m in repeated if any(inner in named for inner in m.modules())}
    return named | (repeated - inside_named - holding_named)


def _hugging_face_blocks(root: nn.Module) -> set[nn.Module]:
    names: set[str] = set()
    for module in root.modules():
        said = getattr(module, "_no_split_modules", None)
        if isinstance(said, (list, tuple, set)):
            names.update(name for name in said if isinstance(name, str))
    if not names:
        return set()
    return _outermost(root, lambda module: [c for c in module.children() if _class_names(c) & names])


def _class_names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in _classes(module)}


def _classes(module: nn.Module) -> tuple[type, ...]:
    """The classes of a module, seen through torch.compile and fully_shard."""
    inner = behind_compile(module)
    return tuple(c for c in type(inner).__mro__ if issubclass(c, nn.Module) and c is not nn.Module)


def _outermost(root: nn.Module, blocks_of: Callable[[nn.Module], Sequence[nn.Module]]) -> set[nn.Module]:
    found: set[nn.Module] = set()

    def visit(module: nn.Module) -> None:
        blocks = set(blocks_of(module))
        found.update(blocks)
        for child in module.children():
            if child not in blocks:
                visit(child)

    visit(root)
    return found


def _repeated_children(container: nn.Module) -> list[nn.Module]:
    if not isinstance(container, (nn.ModuleList, nn.Sequential)):
        return []
    alike: dict[object, list[nn.Module]] = {}
    for child in dict.fromkeys(container.children()):
        shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in child.named_parameters())
        if shapes and is_callable_module(child):
            alike.setdefault((type(child), shapes), []).append(child)
    return [child for children in alike.values() if len(children) > 1 for child in children]


def _named(root: nn.Module, wrap: Iterable[type[nn.Module] | str], key: str = "wrap") -> set[nn.Module]:
    chosen: set[nn.Module] = set()
    for what in wrap:
        name = what if isinstance(what, str) else what.__name__
        found = {
            module
            for fqn, module in root.named_modules()
            if (what in (fqn, *_class_names(module)) if isinstance(what, str) else what in _classes(module))
        }
        if not found:
            choices = {n for m in root.modules() for n in _class_names(m)} | {n for n, _ in root.named_modules() if n}
            raise SuperScaleError(
                f"{key}={name!r} matches no module of {type(root).__name__}{did_you_mean(name, choices)}. "
                "Name module classes or modules, or leave it None to wrap repeated blocks."
            )
        lists = [module for module in found if not is_callable_module(module)]
        if lists:
            raise SuperScaleError(
                f"{key}={name!r} names a {type(lists[0]).__name__}, which has no forward at which its weights could be "
                "gathered. Name the class of its members."
            )
        chosen |= {module for module in found if next(module.parameters(), None) is not None}
    return chosen


def _sharing_with_others(root: nn.Module, chosen: set[nn.Module]) -> set[nn.Module]:
    """The chosen modules that own a parameter which a module outside them owns too: they can't be groups.

    A parameter can be in one group only. The group of the lowest module around all its owners takes it.
    """
    places: dict[nn.Parameter, list[tuple[nn.Module, ...]]] = {}

    def visit(module: nn.Module, above: tuple[nn.Module, ...], seen: set[nn.Module]) -> None:
        path = (*above, module) if module in chosen else above
        for param in own_params_of(module):
            if param is not None:
                places.setdefault(param, []).append(path)
        for child in module.children():
            if child not in seen:
                seen.add(child)
                visit(child, path, seen)

    visit(root, (), {root})
    apart: set[nn.Module] = set()
    for paths in places.values():
        apart.update(m for path in paths for m in path if not all(m in other for other in paths))
    return apart


def plan_groups(root: nn.Module, modules: Sequence[nn.Module]) -> list[GroupPlan]:
    """Distribute the root's parameters over the groups, in the order of `modules` (innermost first)."""
    fqn_of_module = {m: fqn for fqn, m in root.named_modules()}
    fqn_of = {p: fqn for fqn, p in root.named_parameters()}
    owners = _owning_tops(modules)
    taken: set[nn.Parameter] = set()
    groups = []
    for module in modules:
        params = {fqn_of[p]: p for p in module.parameters() if p not in taken}
        taken.update(params.values())
        left_out = _left_out(params)
        left_out.update(
            {p: "it is shared by networks that are gathered apart" for p in params.values() if len(owners[p]) > 1}
        )
        groups.append(GroupPlan(fqn_of_module[module], module, params, left_out))
    return groups


def left_out_of(groups: Iterable[GroupPlan]) -> dict[nn.Parameter, str]:
    """The parameters that no group shards although they are in one, and why."""
    return {param: why for group in groups for param, why in group.left_out.items()}


def _owning_tops(modules: Sequence[nn.Module]) -> dict[nn.Parameter, set[nn.Module]]:
    """By parameter, the outermost groups that hold it."""
    inner = {m for module in modules for m in module.modules() if m is not module}
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for top in modules:
        if top not in inner:
            for param in top.parameters():
                owners.setdefault(param, set()).add(top)
    return owners


def _left_out(params: dict[str, nn.Parameter]) -> dict[nn.Parameter, str]:
    left_out: dict[nn.Parameter, str] = {}
    numel_of: dict[torch.dtype, int] = {}
    for param in params.values():
        if not param.shape:
            left_out[param] = "it is a scalar"
        elif param.numel() == 0:
            left_out[param] = "it is empty"
        elif not local_of(param).is_contiguous():
            left_out[param] = "it is not contiguous"
        elif param.requires_grad:
            numel_of[param.dtype] = numel_of.get(param.dtype, 0) + param.numel()
    # FSDP2 wants one dtype among the trainable parameters of a group: the one with most of them stays.
    most = max(numel_of, key=lambda dtype: numel_of[dtype]) if numel_of else None
    for param in params.values():
        if param.requires_grad and param not in left_out and param.dtype != most:
            left_out[param] = f"it is {param.dtype} in a group of trainable {most}"
    return left_out

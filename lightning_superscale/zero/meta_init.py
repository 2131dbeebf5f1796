"""Builds the initial weights of a model on the meta device, on the training device one group after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_superscale.comm.dtensor import local_shard, placed_like
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.torch_private import transient_buffers_of

Places = Mapping[nn.Parameter, Sequence[tuple[nn.Module, str]]]


def places_of(root: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """The places at which each parameter is registered; more than one where it is tied."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in root.modules():
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(param, []).append((module, name))
    return places


def check_materialisable(root: nn.Module) -> None:
    """Refuse modules on the meta device that can't initialise themselves. Changes nothing.

    Raises:
        SuperScaleError: a module lacks an initialiser, or a meta buffer is a DTensor; names it and the remedy.
    """
    fqn_of = {module: fqn for fqn, module in root.named_modules()}
    initialisers = initialisers_of(root)
    for fqn, buffer in root.named_buffers():
        if buffer.is_meta and isinstance(buffer, DTensor):
            raise SuperScaleError(
                f"buffer {fqn!r} is on the meta device, and a tensor-parallel plan placed it over ranks. Build buffers "
                "on the CPU before parallelize_module()."
            )
    lacking = [fqn_of[m] or type(m).__name__ for m in root.modules() if _is_meta(m) and m not in initialisers]
    if lacking:
        shown = ", ".join(repr(name) for name in lacking[:5])
        raise SuperScaleError(
            f"{len(lacking)} modules are on the meta device and have no reset_parameters() that could give their own "
            f"parameters and buffers values: {shown}. Write one, or build these modules on the CPU."
        )


def _is_meta(module: nn.Module) -> bool:
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(tensor.is_meta for tensor in own)


def initialisers_of(root: nn.Module) -> dict[nn.Module, Callable[[], object]]:
    """The initialiser of each module's own parameters: its method, or that of the Hugging Face model around it."""
    found: dict[nn.Module, Callable[[], object]] = {}

    def visit(module: nn.Module, init_weights: Callable[[nn.Module], object] | None) -> None:
        init_weights = getattr(module, "_init_weights", init_weights)
        for name in ("reset_parameters", "_reset_parameters"):
            method = getattr(module, name, None)
            if callable(method):
                found.setdefault(module, method)
        if init_weights is not None and module not in found:
            found[module] = _bound(init_weights, module)
        for child in module.children():
            visit(child, init_weights)

    visit(root, None)
    return found


def _bound(init_weights: Callable[[nn.Module], object], module: nn.Module) -> Callable[[], object]:
    return lambda: init_weights(module)


def is_on_meta(root: nn.Module | None) -> bool:
    """Whether any parameter or buffer of `root` is on the meta device; False for None."""
    return root is not None and any(tensor.is_meta for tensor in (*root.parameters(), *root.buffers()))


def materialise_all(root: nn.Module, device: torch.device) -> None:
    """Give a model that is on the meta device, in part or whole, its initial weights on `device`.

    Raises:
        SuperScaleError: a module can't initialise itself; nothing is changed then.
    """
    if is_on_meta(root):
        check_materialisable(root)
        places = places_of(root)
        cut_again(materialise(root, root.modules(), places, device), places)


def cut_again(made: Mapping[nn.Parameter, nn.Parameter], places: Places) -> dict[nn.Parameter, nn.Parameter]:
    """Cut whole parameters that took the place of DTensors over the tensor axis again, on each rank to its part.

    Args:
        made: the new parameter of each meta parameter, from `materialise`.
        places: `places_of` the root, taken before `materialise`.

    Returns:
        the new parameter of each meta parameter.
    """
    cut = dict(made)
    for old, whole in made.items():
        if isinstance(old, DTensor):
            own = placed_like(local_shard(whole.detach(), old).clone(), old)
            cut[old] = nn.Parameter(own, requires_grad=old.requires_grad)
            for owner, name in places[old]:
                owner.register_parameter(name, cut[old])
    return cut


def materialise(
    root: nn.Module,
    modules: Iterable[nn.Module],
    places: Places,
    device: torch.device,
    initialisers: Mapping[nn.Module, Callable[[], object]] | None = None,
) -> dict[nn.Parameter, nn.Parameter]:
    """Give the meta parameters and buffers of these modules memory and initial values, whole.

    Parameters that a tensor-parallel plan has cut become whole and plain too, so that their values are those of one
    device; `cut_again` gives every rank its part.

    Args:
        root: the whole model: Hugging Face models initialise their submodules.
        places: `places_of` the root.
        initialisers: `initialisers_of` the root, if the caller has them.

    Returns:
        the new parameter of each meta parameter.
    """
    touched = [module for module in modules if _is_meta(module)]
    if not touched:
        return {}  # looking for initialisers walks the whole model, which would be once for each group
    initialisers = initialisers or initialisers_of(root)
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in touched:
        for param in list(module.parameters(recurse=False)):
            if param.is_meta:
                whole = torch.empty_like(param, device=device)
                if isinstance(param, DTensor):
                    whole = torch.empty(param.shape, dtype=param.dtype, device=device)
                new = nn.Parameter(whole, requires_grad=param.requires_grad)
                replaced[param] = new
                for owner, name in places[param]:
                    owner.register_parameter(name, new)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module.register_buffer(
                    name, torch.empty_like(buffer, device=device), name not in transient_buffers_of(module)
                )
    for module in touched:
        initialisers[module]()
    return replaced

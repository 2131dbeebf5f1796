"""Undoes `fully_shard` on modules, which torch itself offers no function for.

`fully_shard` leaves on a module: a subclass, forward and state-dict hooks, two registry entries in the module's
`__dict__`, two marks for the compiler, and one entry in a table of torch's. All that this file removes is
named here and tested per torch version (tests/zero/fsdp2/test_contract.py): if it stayed, a second `fully_shard`
would refuse the module, and `load_state_dict` would look for a DTensor in it.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_superscale.torch_private import composable_states

_OWNER = "torch.distributed.fsdp"
_HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_SIDE_TABLES = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def attributes_of(modules: Iterable[nn.Module]) -> dict[nn.Module, frozenset[str]]:
    """The names of the attributes that modules have before `fully_shard` adds its own."""
    return {module: frozenset(vars(module)) for module in modules}


def release_modules(before: dict[nn.Module, frozenset[str]]) -> None:
    """Remove everything that `fully_shard` added to modules.

    Args:
        before: what `attributes_of` returned for them, before `fully_shard`.
    """
    for module, had in before.items():
        _remove_hooks(module)
        for name in [name for name in vars(module) if name not in had and _is_fsdp_attribute(name)]:
            del vars(module)[name]
        if isinstance(module, FSDPModule):
            original: Any = next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule))
            module.__class__ = original
        composable_states().pop(module, None)


def _is_fsdp_attribute(name: str) -> bool:
    return "fsdp" in name or name.startswith("__composable_api_state_key")


def _remove_hooks(module: nn.Module) -> None:
    for table in _HOOK_TABLES:
        hooks: MutableMapping[int, Any] = vars(module).get(table, {})
        for key in [key for key, hook in hooks.items() if _is_fsdp_hook(hook)]:
            del hooks[key]
            for side in _SIDE_TABLES:
                vars(module).get(side, {}).pop(key, None)


def _is_fsdp_hook(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_OWNER)

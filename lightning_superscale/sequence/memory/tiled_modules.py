"""Runs modules of a model, such as every block's MLP, a tile of tokens at a time, wherever they are called."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.sequence.memory.rerouting import Rerouting
from lightning_superscale.sequence.memory.tiled_mlp import TiledForward

_TILED = Rerouting()
"""The modules of all `TiledModules`."""

_ATTENTION = ("attn", "attention", "mixer", "conv")


class TiledModules:
    """Runs modules in tiles, from now until `close`; see [Note: Tiles in one node] in tiled_mlp.py.

    Args:
        modules: by name; each takes one tensor [..., S, H].
        tile: tokens per tile.

    Raises:
        SuperScaleError: a module runs in tiles already.
    """

    def __init__(self, modules: Mapping[str, nn.Module], tile: int) -> None:
        for name, module in modules.items():
            if module in _TILED or "forward" in vars(module):
                raise SuperScaleError(
                    f"tile_mlp: {name!r} runs in tiles already, or has a forward of its own, as torch.compile sets it; "
                    "expected that of its class. Name other modules with SequenceConfig.mlps."
                )
        self._releases = [_TILED.reroute(module, _Tiled(name, tile)) for name, module in modules.items()]

    def close(self) -> None:
        """Let the modules run at once again. Graphs of earlier forwards stay whole."""
        for release in self._releases:
            release()
        self._releases.clear()


class _Plain(nn.Module):
    """A module's own forward, without its hooks: those run around all tiles."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.plain = forward

    def forward(self, x: Tensor) -> Any:
        return self.plain(x)


class _Tiled:
    """The forward of one module in tiles. It does not hold the module, which would keep itself alive."""

    def __init__(self, name: str, tile: int) -> None:
        self._name = name
        self._tile = tile
        self._must_check = True

    def __call__(self, plain: functools.partial[Any], *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if len(given) != 1 or not isinstance(given[0], Tensor):
            raise SuperScaleError(
                f"tile_mlp: {self._name!r} was called with {len(given)} arguments; expected one tensor [..., S, H]. "
                "Name modules that take one with SequenceConfig.mlps."
            )
        tiled = TiledForward(
            _Plain(plain.args[0], plain), tile=self._tile, name=repr(self._name), checks=self._must_check
        )
        result = tiled(given[0])
        self._must_check &= tiled.must_check
        return result


def mlps_of(blocks: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """By name, the largest part of each block that multiplies with two matrices at least and has no attention in it.

    A part is a child or grandchild of the block, or, where none fits, the block itself. Names and classes tell what is
    attention; what mixes tokens all the same is refused when it first runs.
    """
    found: dict[str, nn.Module] = {}
    for name, block in blocks:
        inner = [(f"{name}.{part}", module) for part, module in block.named_modules() if part and part.count(".") < 2]
        fitting = [one for one in inner if _is_mlp(*one)] or [one for one in [(name, block)] if _is_mlp(*one)]
        if fitting:
            largest = max(fitting, key=lambda one: sum(param.numel() for param in one[1].parameters()))
            found[largest[0]] = largest[1]
    return found


def _is_mlp(name: str, module: nn.Module) -> bool:
    last = name.rpartition(".")[2]
    words = [last, *(f"{part} {type(inner).__name__}" for part, inner in module.named_modules())]
    is_attention = any(word in text.lower() for text in words for word in _ATTENTION)
    has_forward = type(module).forward is not nn.Module.forward
    return has_forward and not is_attention and sum(param.dim() == 2 for param in module.parameters()) > 1

"""Runs what treats every token alike, such as an MLP, a tile of the sequence at a time, and recomputes it in backward.

[Note: Tiles in one node] All tiles are one node of the autograd graph, which keeps its input. Its backward recomputes a
tile, takes the tile's gradients of input and parameters, and goes on to the next; it returns the parameters' sums. So a
parameter's gradient arrives once per backward and whole, as without tiles: hooks that send gradients to other ranks
fire once. Tiles recompute with aliases of the parameters, because hooks on a parameter itself would see every tile's
part. Sums run in the order of tiles, in fp32 where parameters have 16 bits.

Of N tokens with H features, autograd keeps H * e bytes per token, e being the bytes of an element. Without tiles the
layers `down(gelu(up(x)))` of width 4H keep (H + 4H + 4H) * e: the inputs of all three. What a tile's layers keep exists
for one tile at a time, in backward alone. It costs a second forward.

Source: the TiledMLP of Arctic Long Sequence Training (Bekman et al. 2025, arXiv:2506.13996, section 3.1); differs:
gradients need no flag that holds them back, random numbers repeat, and modules that mix tokens are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import get_device_states, set_device_states

from lightning_superscale.comm.collectives import control_max
from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.sequence.memory.row_wise import why_not_row_wise
from lightning_superscale.sequence.tokens.layout import Layout, Replicated, Sharded
from lightning_superscale.sequence.tokens.rules.products import entered
from lightning_superscale.sequence.tokens.tensor import layout_of, ndim_of, plain, with_layout
from lightning_superscale.sequence.whole import are_whole
from lightning_superscale.torch_private import version_of


class TiledForward:
    """A module, or a function without parameters, called on tiles of the sequence; see [Note: Tiles in one node].

    Values are those of one call of the function, but for rounding where a matrix product of fewer rows rounds
    otherwise. Random operations draw a tile's numbers at a time, the same in forward and in backward; they are not
    those of one call.

    Args:
        function: takes [..., S, H] and returns [..., S, H'], each row from the input's row alone. The first call on
            more than one row checks that, and what it depends on.
        tile: number of rows along S per tile.
        name: names the function in errors.
        mesh: the ranks that have to call the function equally often, because it runs collectives inside, such as
            gathers of sharded weights. Every rank then enters every call, and the rank with the most tiles says how
            many there are; tiles of others are smaller, perhaps empty. None if ranks need not agree.
        checks: whether the first call checks the function. Without, whoever makes this object vouches for it.

    Attributes:
        must_check: whether the next call of more than one row checks the function.

    Raises:
        SuperScaleError: `tile` is no positive number.
    """

    def __init__(
        self,
        function: nn.Module | Callable[[Tensor], Tensor],
        *,
        tile: int,
        name: str = "the tiled function",
        mesh: DataMesh | None = None,
        checks: bool = True,
    ) -> None:
        if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1:
            raise SuperScaleError(f"{name}: a tile has a number of rows of at least 1; found {tile!r}.")
        self._function = function
        self._tile = tile
        self._name = name
        self._mesh = mesh
        self.must_check = checks

    def __call__(self, x: Tensor) -> Tensor:
        """Call the function on [..., S, H]; where ranks share its tokens, on this rank's.

        Raises:
            SuperScaleError: the input is no floating [..., S, H]; the function mixes rows, depends on their places, or
                on tensors that are none of its parameters; a parameter is sharded. With a mesh, on every rank.
        """
        layout = layout_of(x)
        if layout is not None:
            return self._of_tokens(x, layout)
        refusal = self._refusal_of(x)
        num_rows = 0 if refusal or not x.numel() else x.shape[-2]
        # The largest number of tiles on any rank, the smallest of rows, and whether any rank refuses.
        num_tiles, fewest, refuses = self._agree([max(-(-num_rows // self._tile), 1), -num_rows, int(bool(refusal))])
        if refuses:
            raise SuperScaleError(f"{self._name} can't run in tiles: {refusal or 'another rank refused its input.'}")
        params: dict[str, nn.Parameter] = {}
        if isinstance(self._function, nn.Module):
            params = {name: param for name, param in self._function.named_parameters() if param.requires_grad}
        if self.must_check and -fewest > 1:
            self._check(x, params)
        sizes = self._sizes(x.shape[-2], num_tiles)
        call = _Call(self._function, tuple(params), sizes, self._name)
        if not torch.is_grad_enabled() or not (x.requires_grad or params):
            return _in_tiles(x, call)[0]
        result: Tensor = _Tiles.apply(x, call, *params.values())  # type: ignore[no-untyped-call]
        return result

    def _of_tokens(self, x: Tensor, layout: Layout | None) -> Tensor:
        """The function of a tensor that knows its tokens, which are rows of it."""
        if isinstance(layout, Replicated):
            if are_whole():
                return self(plain(x))
            x = entered(x)  # as at any first layer
            layout = layout_of(x)
        if not isinstance(layout, Sharded):
            return self._function(x)  # a value of all tokens has no rows of tokens
        if layout.tokens.dim == ndim_of(x) - 1:
            raise SuperScaleError(
                f"{self._name} can't run in tiles: its input {tuple(x.shape)} has tokens on the last dim; expected "
                "features there."
            )
        return with_layout(self(plain(x)), layout)

    def _refusal_of(self, x: Tensor) -> str | None:
        if x.dim() < 2 or not x.is_floating_point():
            return f"expected a floating tensor [..., S, H]; found {tuple(x.shape)} of {x.dtype}."
        if isinstance(self._function, nn.Module):
            for name, param in self._function.named_parameters():
                if isinstance(param, DTensor):
                    return (
                        f"its parameter {name!r} is sharded while it is called; expected whole parameters. Shard a "
                        "module around it, whose forward gathers them once for all tiles."
                    )
        return None

    def _check(self, x: Tensor, params: Mapping[str, nn.Parameter]) -> None:
        num_rows = min(max(self._tile, 2), x.shape[-2])
        reason = why_not_row_wise(self._function, x, params.values(), num_rows=num_rows)
        if self._agree([int(bool(reason))]) != [0]:
            reason = reason or "another rank found that it depends on more than its rows."
            raise SuperScaleError(f"{self._name} can't run in tiles: {reason}")
        self.must_check = False

    def _agree(self, values: list[int]) -> list[int]:
        """The largest of each value over all ranks."""
        if self._mesh is None:
            return values
        told = control_max(self._mesh, torch.tensor(values, dtype=torch.int64), f"the tiles of {self._name}")
        return [int(value) for value in told.tolist()]

    def _sizes(self, num_rows: int, num_tiles: int) -> list[int]:
        """The number of rows of each tile; where ranks agreed on more tiles than this one has, they are smaller."""
        if num_tiles == max(-(-num_rows // self._tile), 1):
            return [min(self._tile, num_rows - start) for start in range(0, max(num_rows, 1), self._tile)]
        return [num_rows // num_tiles + (i < num_rows % num_tiles) for i in range(num_tiles)]


class _Call(NamedTuple):
    """What a call's forward and backward have in common.

    Attributes:
        param_names: names of the parameters that want gradients.
        sizes: number of rows of each tile.
    """

    function: nn.Module | Callable[[Tensor], Tensor]
    param_names: tuple[str, ...]
    sizes: list[int]
    name: str


class _RandomState(NamedTuple):
    """The state of the generators that a tile's random operations draw from."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def now(cls, x: Tensor) -> _RandomState:
        return cls(torch.get_rng_state(), *get_device_states(x))

    def restore(self, device_type: str) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states, device_type=device_type)


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *params: Tensor) -> Tensor:
        out, states = _in_tiles(x, call)
        ctx.save_for_backward(x, *params)
        ctx.call, ctx.states, ctx.autocast = call, states, autocast_of(x)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        if torch.is_grad_enabled():
            raise SuperScaleError(
                f"{call.name} ran in tiles, which have no second derivative, and backward ran with create_graph=True; "
                "expected a backward without. Call it without tiles for gradient penalties."
            )
        x, *params = ctx.saved_tensors
        wants_x, _, *wants_params = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if wants_x else None
        sums: list[Tensor | None] = [None] * len(params)
        aliases = [param.detach().requires_grad_(wanted) for param, wanted in zip(params, wants_params, strict=True)]
        wanted = [i for i, is_wanted in enumerate(wants_params) if is_wanted]
        with _forked_generators(ctx.states[0], x), torch.enable_grad(), ctx.autocast():
            for rows, grad, into, state in zip(
                *(_split(tensor, call.sizes) for tensor in (x, *grad_outputs, grad_x)), ctx.states, strict=True
            ):
                state.restore(x.device.type)
                grads = _grads_of_tile(rows.detach().requires_grad_(wants_x), grad, call, aliases, wanted)
                if into is not None:
                    part = grads.pop(0)
                    into.zero_() if part is None else into.copy_(part)
                for i, part in zip(wanted, grads, strict=True):
                    sums[i] = _sum(sums[i], part)
        return (grad_x, None, *(s if s is None else s.to(p.dtype) for s, p in zip(sums, params, strict=True)))


def _grads_of_tile(
    rows: Tensor, grad: Tensor, call: _Call, aliases: Sequence[Tensor], wanted: Sequence[int]
) -> list[Any]:
    """Recompute a tile, and return the gradients of its rows, if they want one, and of the wanted aliases."""
    out = _call_with(call, aliases, rows)
    inputs = ([rows] if rows.requires_grad else []) + [aliases[i] for i in wanted]
    if not out.requires_grad:  # nothing in this tile depended on any of them
        return [None] * len(inputs)
    return list(torch.autograd.grad(out, inputs, grad, allow_unused=True))


def _call_with(call: _Call, aliases: Sequence[Tensor], rows: Tensor) -> Tensor:
    if not isinstance(call.function, nn.Module):
        return call.function(rows)
    result: Tensor = torch.func.functional_call(
        call.function, dict(zip(call.param_names, aliases, strict=True)), (rows,)
    )
    return result


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """`total + part`, where None has no part in it; wide enough that further parts are not lost."""
    if part is None:
        return total
    if total is None:
        return part.to(torch.promote_types(part.dtype, torch.float32), copy=True)
    return total.add_(part)


def _in_tiles(x: Tensor, call: _Call) -> tuple[Tensor, list[_RandomState]]:
    """The function's result, tile by tile, and the random state before each tile."""
    out, start, states = None, 0, []
    version = None if x.is_inference() else version_of(x)
    with torch.no_grad():
        for rows in _split(x, call.sizes):
            states.append(_RandomState.now(x))
            part = call.function(rows)
            if part.shape[:-1] != rows.shape[:-1]:
                raise SuperScaleError(
                    f"{call.name} returned {tuple(part.shape)} for a tile {tuple(rows.shape)}; expected as many rows "
                    "as it was given. Call it without tiles."
                )
            out = part.new_empty((*x.shape[:-1], part.shape[-1])) if out is None else out
            out.narrow(-2, start, part.shape[-2]).copy_(part)
            start += part.shape[-2]
    if out is None:
        raise AssertionError("there is always a tile")
    if version is not None and version_of(x) != version:
        raise SuperScaleError(
            f"{call.name} changes its input in place, from which tiles are recomputed; expected that it leaves its "
            "input alone. Use operations that return a new tensor."
        )
    return out, states


def _split(tensor: Tensor | None, sizes: Sequence[int]) -> Sequence[Any]:
    return [None] * len(sizes) if tensor is None else torch.split(tensor, list(sizes), dim=-2)


def autocast_of(x: Tensor) -> Callable[[], AbstractContextManager[object]]:
    """Makes the present autocast anew, for the recompute."""
    device_type = x.device.type
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    caches = torch.is_autocast_cache_enabled()
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=caches)


@contextmanager
def _forked_generators(state: _RandomState, x: Tensor) -> Iterator[None]:
    """A context after which the generators are as they were before it."""
    device_type = x.device.type if state.devices else "cuda"  # without devices only the host's generator is kept
    with torch.random.fork_rng(devices=state.devices, device_type=device_type):
        yield

"""Finds out whether a function computes each row from the input's row alone, by calling it on rows that change."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_superscale.torch_private import version_of, without_dispatch_modes

# What mixes tokens.
_MIXING = "as in attention, convolutions over the sequence, pooling or normalization over the batch"


def why_not_row_wise(
    function: nn.Module | Callable[[Tensor], Tensor], x: Tensor, params: Collection[Tensor], *, num_rows: int
) -> str | None:
    """Call a function on some rows, and say why it may not run in tiles, if it may not.

    A row must not depend on the other rows: half of them change, and the others' results must stay. It must not depend
    on its place: rows are rotated, and their results must be rotated (in eval mode, because random operations draw by
    place). And gradients may flow to its input and its parameters only. A result has changed if it did so by more than
    the square root of its precision, relative to the largest: products of other shapes round otherwise. The function
    runs six times, unless it suits no tiles at all; random generators, buffers and the module's mode are as before
    afterwards. Blocks the host.

    Args:
        x: [..., S, H], of which the first rows are used; not empty.
        params: the parameters that gradients may flow to.
        num_rows: how many rows are used, at least 2 and at most S.

    Returns:
        a sentence that says what it depends on and what to do; None if it may run in tiles.
    """
    half = num_rows // 2
    devices = [x.device] if x.device.type == "cuda" else []
    # A selective checkpoint around the call would count the check's operations, and any checkpoint what it saves.
    hooks = torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)
    forked = torch.random.fork_rng(devices=devices)
    with torch.inference_mode(False), without_dispatch_modes(), hooks, forked, _same_buffers(function):
        rows = x.detach().narrow(-2, 0, num_rows).clone()
        seed, seeds = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]

        def result_of(some: Tensor) -> Tensor:
            torch.set_rng_state(seed)
            for device, state in zip(devices, seeds, strict=True):
                torch.cuda.set_rng_state(state, device)
            return function(some)

        with torch.no_grad():
            given = rows.clone()
            result, is_changed = result_of(given), version_of(given) != 0
        misfit = _misfit(rows, result, is_changed=is_changed)
        if misfit is not None:
            return misfit
        with torch.enable_grad():
            leaf = rows.clone().requires_grad_()
            found = [_foreign_leaf(result_of(leaf), {id(leaf), *map(id, params)})]
        with torch.no_grad():
            found.append(_mixing(result_of, rows, result, half))
            with _evaluating(function):
                moved, unmoved = result_of(rows.roll(half, -2)), result_of(rows)
        if not _is_near(moved, unmoved.roll(half, -2)):
            found.append(
                "what it makes of a token depends on the token's place in the sequence, or is random in eval mode too. "
                "Call it without tiles; checks=False vouches for a function that depends on the place by chance only."
            )
    return next(filter(None, found), None)


def _misfit(rows: Tensor, result: object, *, is_changed: bool) -> str | None:
    """Why the function's calls don't suit tiles at all; the same on all ranks that run the same function."""
    if is_changed:
        return (
            "it changes its input in place, from which tiles are recomputed. Use operations that return a new tensor."
        )
    if isinstance(result, Tensor) and result.shape[:-1] == rows.shape[:-1]:
        return None
    returned = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
    return (
        f"it returned {returned} for an input {tuple(rows.shape)}; expected a tensor [..., S, H'] for [..., S, H]. "
        "Call it without tiles."
    )


def _mixing(result_of: Callable[[Tensor], Tensor], rows: Tensor, result: Tensor, half: int) -> str | None:
    others, mixes = 1 - rows, False
    for start, size in ((0, half), (half, rows.shape[-2] - half)):
        changed = others.clone()
        changed.narrow(-2, start, size).copy_(rows.narrow(-2, start, size))
        mixes |= not _is_near(result_of(changed).narrow(-2, start, size), result.narrow(-2, start, size))
    if not mixes:
        return None
    return (
        f"it mixes tokens: what it makes of some changed with other tokens, {_MIXING}. Tile a part of it that treats "
        "every token alone."
    )


def _foreign_leaf(result: Tensor, known: set[int]) -> str | None:
    """A tensor that wants a gradient and is not known: one node for all tiles would lose its gradient."""
    seen, nodes = set(), [result.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of a node that accumulates a leaf's gradient
        if leaf is not None and id(leaf) not in known:
            return (
                f"it uses a tensor {tuple(leaf.shape)} of {leaf.dtype} that wants a gradient and is neither its input "
                "nor one of its parameters, so that the gradient would be lost. Pass the nn.Module that owns it, or "
                "detach it."
            )
        nodes += [before for before, _ in node.next_functions]
    return None


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def _is_near(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    largest = b.abs().nan_to_num(0.0, 0.0, 0.0).max()
    limit = math.sqrt(torch.finfo(a.dtype).eps) * float(largest)
    return torch.allclose(a, b, rtol=0.0, atol=limit, equal_nan=True)


@contextmanager
def _evaluating(function: object) -> Iterator[None]:
    """Eval mode, if the function is a module."""
    modes = [(module, module.training) for module in function.modules()] if isinstance(function, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


@contextmanager
def _same_buffers(function: object) -> Iterator[None]:
    """Buffers that are after it as they were before."""
    before = [(b, b.clone()) for b in function.buffers()] if isinstance(function, nn.Module) else []
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)

"""torch's flex_attention with tokens that ranks share.

It is a function in Python that takes the memory of its arguments into a graph before any class of tensors is asked. So
while a run shares sequences, its names stand for a function that looks for tokens first: in modules of Python, as what
torch.compile made of it, and in attributes of the user's layers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial, wraps
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxOutput, BlockMask, flex_attention

from lightning_superscale.sequence.attention.flex import Flex, Mod, Window, flex_by_all_gather, flex_by_ulysses
from lightning_superscale.sequence.tokens.call import Call
from lightning_superscale.sequence.tokens.layout import Sharded
from lightning_superscale.sequence.tokens.nested import leaves_of, map_leaves
from lightning_superscale.sequence.tokens.rules.attention import mode_of, seen
from lightning_superscale.sequence.tokens.tensor import entering, is_sharded, layout_of, ndim_of, plain, with_layout
from lightning_superscale.torch_private import compiled_from

# The function of transformers that calls its own compiled one, by module.
_TRANSFORMERS = ("transformers.integrations.flex_attention", "compile_friendly_flex_attention")


_POSITIONAL = ("score_mod", "block_mask", "scale", "enable_gqa", "return_lse", "kernel_options")


class FlexAttention:
    """From `install` to `remove`, flex_attention is shared among ranks where it meets tokens."""

    def __init__(self) -> None:
        self._replaced: list[tuple[MutableMapping[str, Any], str, Any]] = []

    def install(self, module: nn.Module) -> None:
        """Replace the function, and what was compiled of it, wherever it has a name."""
        for names, owner in _namespaces(module):
            for name, value in list(names.items()):
                is_theirs = (owner, name) == _TRANSFORMERS
                if is_theirs or (owner != _TRANSFORMERS[0] and _is_flex(value)):
                    self._replaced.append((names, name, value))
                    names[name] = _shared(value)

    def remove(self) -> None:
        """Put torch's function back."""
        while self._replaced:
            names, name, value = self._replaced.pop()
            names[name] = value


def _namespaces(module: nn.Module) -> Iterator[tuple[MutableMapping[str, Any], str]]:
    """Attributes of modules of Python, with their names, and of the module's parts."""
    for owner in list(sys.modules.values()):
        if isinstance(owner, ModuleType) and owner.__name__ != __name__:
            yield vars(owner), owner.__name__
    for part in module.modules():
        yield vars(part), ""


def _is_flex(value: object) -> bool:
    # By its type alone: `isinstance` asks a value for its `__class__`, and what is deprecated then warns.
    if type(value) is not FunctionType:
        return False
    return value is flex_attention or compiled_from(value) is flex_attention


def _shared(attend: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(attend, updated=())  # not what torch.compile wrote on it
    def flex(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        given = dict(zip(_POSITIONAL, args, strict=False))
        return _attend(Call(attend, "flex_attention", (query, key, value), {}), **{**given, **options})

    # What it was compiled of stays compiled.
    found: Callable[..., Any] = torch.compiler.disable(flex, recursive=False)  # type: ignore[no-untyped-call]
    return found


def _attend(
    call: Call,
    *,
    score_mod: Mod | None = None,
    block_mask: BlockMask | None = None,
    enable_gqa: bool = False,
    **options: Any,
) -> Any:
    query, key, value = call.args
    if not any(map(is_sharded, call.args)):
        q, k, v = (plain(entering(x)) for x in call.args)
        mask = None if block_mask is None else _of_whole_tensors(block_mask)
        return call.func(q, k, v, score_mod=whole_of(score_mod), block_mask=mask, enable_gqa=enable_gqa, **options)
    layout = _layout_of_all(call)
    q, k, v = (plain(x) for x in call.args)
    if q.shape[1] != k.shape[1] and not enable_gqa:
        call.refuse("has fewer heads of keys than of queries", "Use enable_gqa=True.")
    length, link = layout.tokens.length, layout.sharing.link
    if block_mask is not None:
        if block_mask.seq_lengths != (length, length):
            call.refuse(
                f"has a block mask of {tuple(block_mask.seq_lengths)} queries and keys for {length} tokens",
                "Make it of the whole length, as x.shape[1] says it.",
            )
        if getattr(block_mask, "dq_write_order", None) is not None:
            call.refuse("has a block mask with a write order of its own", "Use compute_dq_write_order=False.")
    mode = mode_of(layout.sharing, q.shape[1])
    if mode == "ring":
        call.refuse("takes keys of all tokens at once, which a ring has not", "Use mode='ulysses' or 'allgather'.")
    mask = None if block_mask is None else _of_whole_tensors(block_mask)
    flex = Flex(call.func, whole_of(score_mod), mask, options)
    run = flex_by_ulysses if mode == "ulysses" else flex_by_all_gather
    with seen(layout, mode, q, k):
        output, *more = run(flex, q, k, v, Window(layout.start, length), link)
    rest: list[Tensor] = [with_layout(one[..., 0], layout) for one in more]
    request = options.get("return_aux")
    if request is not None:
        lse = rest.pop(0) if request.lse else None
        return with_layout(output, layout), AuxOutput(lse, rest[0] if rest else None)
    return (with_layout(output, layout), *rest) if rest else with_layout(output, layout)


def _layout_of_all(call: Call) -> Sharded:
    """The layout of query, key and value, which have to have the same tokens."""
    if not all(map(is_sharded, call.args)):
        call.refuse(
            "attends between tokens that are shared and tokens that are not", "Only self-attention can be shared."
        )
    layout: Sharded = call.args[0].placement
    same = all(x.placement.tokens.dim == 2 and layout.has_same_tokens(x.placement) for x in call.args)
    if not same or any(ndim_of(x) != 4 for x in call.args) or layout.tokens.outer > 1:
        call.refuse(
            "attends between other tokens than its own",
            "Give query, key and value of the same tokens, [batch, heads, tokens, head dim].",
        )
    return layout


def whole_of(value: Any) -> Any:
    """A function that has plain, whole tensors wherever it closes over tokens; also functions within functions.

    Every rank calls it, and gathers alike.
    """
    if isinstance(value, Tensor):
        layout = layout_of(value)
        return layout.gather(plain(value)) if isinstance(layout, Sharded) else plain(entering(value))
    if isinstance(value, partial):
        return partial(whole_of(value.func), *whole_of(list(value.args)), **whole_of(dict(value.keywords)))
    if isinstance(value, FunctionType):
        return _function_of_whole(value)
    if isinstance(value, (list, tuple, dict)):
        return map_leaves(whole_of, value)
    return value


def _function_of_whole(function: FunctionType) -> FunctionType:
    cells, defaults = function.__closure__ or (), function.__defaults__ or ()
    before = [cell.cell_contents for cell in cells], list(defaults)
    after = whole_of(before[0]), whole_of(before[1])
    if all(new is old for new, old in zip(leaves_of(after), leaves_of(before), strict=True)):
        return function
    closure = tuple(map(CellType, after[0]))
    made = FunctionType(function.__code__, function.__globals__, function.__name__, tuple(after[1]), closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _of_whole_tensors(mask: BlockMask) -> BlockMask:
    """The mask, whose function has whole tensors; the same one for the same mask where it has none of tokens."""
    mask_mod = whole_of(mask.mask_mod)
    if mask_mod is mask.mask_mod:
        return mask
    return BlockMask.from_kv_blocks(
        mask.kv_num_blocks,
        mask.kv_indices,
        mask.full_kv_num_blocks,
        mask.full_kv_indices,
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=mask_mod,
        seq_lengths=mask.seq_lengths,
        compute_q_blocks=mask.q_indices is not None,
    )

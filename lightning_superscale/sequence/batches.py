"""Batches whose sequences are shared: which tensors have tokens, on which dim, and whether ranks got the same ones."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
import xxhash
from torch import Tensor

from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.tokens.layout import Replicated, Sharing, TokenDim
from lightning_superscale.sequence.tokens.tensor import layout_of, plain, with_layout

# Names under which models of transformers take their tokens.
_KNOWN = ("input_ids", "inputs_embeds", "decoder_input_ids")


def map_batch(function: Callable[[str, Tensor], Any], batch: Any, place: str = "") -> Any:
    """The batch with other tensors, in containers of the same kinds.

    Args:
        function: gets the place of each tensor ("input_ids", "0", "images.pixels"; "" for a batch that is one) and the
            tensor.
    """

    def inner(key: object, item: Any) -> Any:
        return map_batch(function, item, f"{place}.{key}" if place else str(key))

    if isinstance(batch, Tensor):
        return function(place, batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(inner(key, getattr(batch, key)) for key in batch._fields))
    if isinstance(batch, (list, tuple)):
        return type(batch)(inner(key, item) for key, item in enumerate(batch))
    if isinstance(batch, MutableMapping):  # transformers' batches are no dicts
        mapped = copy.copy(batch)
        for key, item in batch.items():
            mapped[key] = inner(key, item)
        return mapped
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        changed = copy.copy(batch)
        for field in dataclasses.fields(batch):
            object.__setattr__(changed, field.name, inner(field.name, getattr(batch, field.name)))
        return changed
    return batch


def tensors_of(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch, by place."""
    found: dict[str, Tensor] = {}

    def note(place: str, x: Tensor) -> Tensor:
        found[place] = x
        return x

    map_batch(note, batch)
    return found


def find_tokens(batch: Any, dims: Mapping[str, int] | None) -> dict[str, TokenDim]:
    """The tensors of a batch that have tokens, by place, and the dim that counts them.

    The first of transformers' names, else the first tensor of whole numbers with two dims, says how many tokens there
    are; every tensor of at least two dims whose second has that size has them too. Results do not depend on it: what is
    not found is computed whole on every rank.

    Args:
        dims: by place, the dim of tokens, from 0 or from -1; None finds them.

    Raises:
        SequenceParallelError: there is no such tensor; names those that there are.
    """
    tensors = tensors_of(batch)
    if dims is not None:
        return {place: _given(tensors, place, dim) for place, dim in dims.items()}
    named = [place for place in tensors if place.rpartition(".")[2] in _KNOWN and tensors[place].dim() > 1]
    whole = [
        place for place, x in tensors.items() if x.dim() == 2 and not x.is_floating_point() and x.dtype != torch.bool
    ]
    first = next(iter([*named, *whole]), None)
    if first is None:
        raise SequenceParallelError(
            "expected a batch with token ids, a tensor [batch, tokens] of whole numbers; found "
            f"{_shown(tensors)}. Say which dim counts tokens: SequenceConfig(size=..., dims={{'name': 1}}), where the "
            "name is a key or a place in the batch ('0', 'images.pixels')."
        )
    length = tensors[first].shape[1]
    return {place: TokenDim(1, length) for place, x in tensors.items() if x.dim() > 1 and x.shape[1] == length}


def _given(tensors: Mapping[str, Tensor], place: str, dim: int) -> TokenDim:
    x = tensors.get(place)
    if x is None or not -x.dim() <= dim < x.dim():
        raise SequenceParallelError(
            f"SequenceConfig.dims says that {place!r} of the batch has tokens on dim {dim}; found {_shown(tensors)}."
        )
    return TokenDim(dim % x.dim(), x.shape[dim])


def _shown(tensors: Mapping[str, Tensor]) -> str:
    shown = [
        f"{place or 'one tensor'} {list(x.shape)} {str(x.dtype).partition('.')[2]}" for place, x in tensors.items()
    ]
    return ", ".join(shown) or "no tensor"


def shared(batch: Any, tokens: Mapping[str, TokenDim], sharing: Sharing) -> Any:
    """The batch, whole on every rank, with tensors that know their tokens."""
    return map_batch(
        lambda place, x: with_layout(x, Replicated(tokens[place], sharing)) if place in tokens else x, batch
    )


def token_lengths(batch: Any) -> set[int]:
    """The lengths of the sequences of a shared batch."""
    return {layout.tokens.length for layout in _layouts(batch).values()}


def _layouts(batch: Any) -> dict[str, Replicated]:
    found = {place: layout_of(x) for place, x in tensors_of(batch).items()}
    return {place: layout for place, layout in found.items() if isinstance(layout, Replicated)}


def first_tokens(batch: Any, num_of: Callable[[int], int]) -> tuple[Any, dict[str, TokenDim]]:
    """A copy of the front of a shared batch, whose tensors are plain, and which of their dims count tokens, by place.

    A mask over pairs of tokens is cut along both of its last dims. A tensor counts as one if both are as long as the
    sequence, and it has four dims at least or no floating-point numbers: others may be features.

    Args:
        batch: as `shared` gave it.
        num_of: the number of tokens to keep of a sequence, by its length.
    """
    layouts, lengths = _layouts(batch), token_lengths(batch)
    tokens: dict[str, TokenDim] = {}

    def front(place: str, x: Tensor) -> Tensor:
        x, cut = plain(x), set()
        if place in layouts:
            dim, length = layouts[place].tokens.dim, layouts[place].tokens.length
            tokens[place] = TokenDim(dim, num_of(length))
            cut.add(dim)
        if x.dim() > 2 and x.shape[-1] == x.shape[-2] in lengths and (x.dim() > 3 or not x.is_floating_point()):
            cut |= {x.dim() - 2, x.dim() - 1}
        for dim in cut:
            x = x.narrow(dim, 0, num_of(x.shape[dim]))
        return x.clone()

    return map_batch(front, batch), tokens


def fingerprints(batch: Any) -> dict[str, str]:
    """Shape, dtype and checksum of every tensor of a batch, by place. Waits for the device."""
    return {
        place: f"{list(x.shape)} {str(x.dtype).partition('.')[2]} with checksum {_checksum(x):016x}"
        for place, x in tensors_of(batch).items()
    }


def _checksum(x: Tensor) -> int:
    memory = (
        x.detach().cpu().contiguous().flatten().view(torch.uint8) if x.numel() else torch.empty(0, dtype=torch.uint8)
    )
    return xxhash.xxh3_64_intdigest(memory.numpy().data)

"""Where the tokens of a tensor are: on every rank, or a part on each, and on which dim.

[Note: A program of all tokens] A model whose sequences are shared runs as if every rank had all tokens: it sees whole
shapes, so that masks, positions and shifted labels that it makes are those of the whole sequence. What comes from the
batch is whole on every rank (`Replicated`). The first operation with a parameter, an embedding or a linear layer, takes
each rank's part of it (`Sharded`), and from there on ranks hold activations of their own tokens only. Where a whole
tensor meets a sharded one, each rank takes its part of the whole one. What all tokens go into, such as a loss, is equal
on every rank (`Reduced`).

[Note: Frames and windows] Ranks hold equal parts of a frame, whose length is a multiple of their number. The tokens of
a tensor are a window of it: all of it; the front, where the sequence was padded to the frame, or its tail was cut off
(`x[:, :-1]`); or what is left without its front (`x[:, 1:]`). So cutting moves no data, and what lies outside of the
window never reaches a result. Tensors whose windows begin at different tokens can't be computed with, element by
element: a rank's last token would need the next rank's first.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Union

import torch
from torch import Tensor
from torch.nn import functional

from lightning_superscale.comm.in_graph import AxisLink, all_gather, sum_over_ranks
from lightning_superscale.sequence.attention.shared import Mode
from lightning_superscale.sequence.spans import Order, TokenSpans


@dataclass(frozen=True)
class AttentionSeen:
    """One kind of attention that ranks shared.

    Attributes:
        mode: how they attended.
        num_heads, num_kv_heads: of queries, and of keys and values.
        shape: [batch, tokens of the frame, head dim].
    """

    mode: Mode
    num_heads: int
    num_kv_heads: int
    shape: tuple[int, int, int]


@dataclass
class Seen:
    """What a run's program shared so far, for reports and checks.

    Attributes:
        num_entries: tensors of which this rank took its part at a first layer.
        attention: bytes that this rank sent in one forward of each kind of attention.
    """

    num_entries: int = 0
    attention: dict[AttentionSeen, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How a run shares sequences among ranks.

    Attributes:
        link: the ranks.
        mode: how they attend; "auto" is Ulysses where attention has a query head for each rank, else all-gather.
        num_chunks: chunks of heads, with Ulysses.
        seen: what was shared so far.
    """

    link: AxisLink
    mode: Union[Mode, Literal["auto"]] = "auto"
    num_chunks: int = 1
    seen: Seen = field(default_factory=Seen, compare=False)

    @property
    def order(self) -> Order:
        """Which tokens each rank has."""
        return "zigzag" if self.mode == "ring" else "consecutive"

    def frame(self, num_tokens: int) -> TokenSpans:
        """The shortest frame for so many tokens ([Note: Frames and windows])."""
        multiple = self.link.size * (2 if self.order == "zigzag" else 1)
        return TokenSpans(-(-num_tokens // multiple) * multiple, self.link.size, self.order)


@dataclass(frozen=True)
class TokenDim:
    """The dim of a tensor that counts tokens.

    Attributes:
        dim: its number, from 0.
        length: number of tokens of the whole sequence.
        outer: number of sequences that lie behind one another on it, as `x.flatten(0, 1)` puts them.
    """

    dim: int
    length: int
    outer: int = 1

    @property
    def size(self) -> int:
        """The size of the dim, with all tokens."""
        return self.outer * self.length


@dataclass(frozen=True)
class Replicated:
    """Every rank has all tokens.

    Attributes:
        tokens: the dim that counts them.
        sharing: how they are shared once a parameter meets them.
    """

    tokens: TokenDim
    sharing: Sharing


@dataclass(frozen=True)
class Reduced:
    """A value of all tokens, the same on every rank, that requires grad.

    Its gradient is the same on every rank too: see [Note: Gradients of reduced values] in tensor.py.

    Attributes:
        sharing: the ranks.
        is_copy: of tokens that torch would give as a view, so that writing to it would have to change them.
    """

    sharing: Sharing
    is_copy: bool = False


@dataclass(frozen=True)
class Sharded:
    """Every rank has the tokens of its part of a frame ([Note: Frames and windows]).

    Attributes:
        tokens: the dim that counts tokens, and how many there are in the window.
        sharing: the ranks.
        frame: the parts of the frame, by rank.
        start: the place in the frame of the window's first token.
    """

    tokens: TokenDim
    sharing: Sharing
    frame: TokenSpans
    start: int = 0

    @property
    def local_size(self) -> int:
        """The size of the dim of tokens on each rank."""
        return self.tokens.outer * self.frame.per_rank

    @property
    def is_full(self) -> bool:
        """Whether the window is the whole frame."""
        return self.start == 0 and self.tokens.length == self.frame.num_tokens

    def at(self, dim: int, outer: int | None = None) -> Sharded:
        """The layout with the same tokens on another dim."""
        outer = self.tokens.outer if outer is None else outer
        if dim == self.tokens.dim and outer == self.tokens.outer:
            return self
        return Sharded(TokenDim(dim, self.tokens.length, outer), self.sharing, self.frame, self.start)

    def window(self, first: int, length: int) -> Sharded:
        """The layout of `length` of the tokens, from the `first` on."""
        return replace(self, start=self.start + first, tokens=replace(self.tokens, length=length))

    def has_same_tokens(self, other: Sharded) -> bool:
        """Whether equal places on a rank hold the same tokens of both."""
        if self is other:
            return True
        mine = (self.frame, self.start, self.tokens.length, self.tokens.outer)
        return mine == (other.frame, other.start, other.tokens.length, other.tokens.outer)

    def is_token(self, local: Tensor, dim: int | None = None) -> Tensor:
        """Which places of this rank's part are in the window: bool, to be broadcast with it.

        Args:
            dim: the dim that counts tokens in `local`; None for that of the layout.
        """
        ones = torch.ones(self.tokens.length, dtype=torch.bool, device=local.device)
        places = replace(self, tokens=TokenDim(0, self.tokens.length)).take(ones, fill=False).repeat(self.tokens.outer)
        shape = [1] * local.dim()
        shape[self.tokens.dim if dim is None else dim] = -1
        return places.view(shape)

    def take(self, whole: Tensor, dim: int | None = None, *, fill: float | bool | None = None) -> Tensor:
        """This rank's part of a tensor that is whole on every rank.

        Args:
            whole: its size along `dim` is that of the dim of tokens, with all tokens.
            dim: the dim that counts tokens in it; None for that of the layout.
            fill: the value of places outside of the window; None for that of the nearest token, with which a function
                that has no value for 0, such as a quotient, has one there.
        """
        dim = self.tokens.dim if dim is None else dim
        if self.tokens.outer > 1:
            apart = _apart(whole, dim, self.tokens.outer, self.tokens.length)
            return self._take(apart, dim + 1, fill).flatten(dim, dim + 1)
        return self._take(whole, dim, fill)

    def _take(self, whole: Tensor, dim: int, fill: float | bool | None) -> Tensor:
        rank = self.sharing.link.rank
        if self.is_full:
            return self.frame.take(whole, dim, rank)
        if fill is None:
            places = [torch.arange(span.start, span.stop, device=whole.device) for span in self.frame.of(rank)]
            return whole.index_select(dim, (torch.cat(places) - self.start).clamp(0, self.tokens.length - 1))
        parts = []
        for span in self.frame.of(rank):
            first, last = (min(max(at - self.start, 0), self.tokens.length) for at in (span.start, span.stop))
            part = whole.narrow(dim, first, last - first)
            before = min(max(self.start - span.start, 0), span.stop - span.start)
            after = span.stop - span.start - before - (last - first)
            margins = [0, 0] * (whole.dim() - 1 - dim) + [before, after]
            parts.append(functional.pad(part, margins, value=fill) if before or after else part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def gather(self, local: Tensor) -> Tensor:
        """The whole tensor, on every rank, of each rank's part. Every rank of the axis calls it."""
        dim, outer = self.tokens.dim, self.tokens.outer
        apart = _apart(local, dim, outer, self.frame.per_rank).movedim(dim + 1, 0)
        parts = list(all_gather(apart.contiguous(), self.sharing.link).chunk(self.sharing.link.size))
        whole = self.frame.join(parts, 0).narrow(0, self.start, self.tokens.length)
        return whole.movedim(0, dim + 1).flatten(dim, dim + 1)

    def token(self, local: Tensor, index: int) -> Tensor:
        """One token of every sequence, on every rank, without its dim. Every rank of the axis calls it.

        Args:
            index: of the window, from 0.
        """
        place, dim, offset = self.start + index, self.tokens.dim, 0
        # Zeros that autograd follows, so that the result requires grad on every rank or on none.
        found = local.select(dim, 0).masked_fill(torch.ones((), dtype=torch.bool, device=local.device), 0)
        for span in self.frame.of(self.sharing.link.rank):
            if span.start <= place < span.stop:
                found = local.select(dim, offset + place - span.start)
            offset += span.stop - span.start
        return sum_over_ranks(found, self.sharing.link)

    def pick(self, local: Tensor, index: tuple[Any, ...], at: int) -> Tensor:
        """Some of the tokens, on every rank, as `whole[index]` gives them. Every rank of the axis calls it.

        Args:
            index: a part for each dim: slices, and int64 tensors beside one another, one of them for the tokens' dim.
            at: the place of that one.
        """
        length, device = self.tokens.length, local.device
        # The place of each token on this rank; tokens outside of the window, and other ranks', have none.
        mine = replace(self, tokens=TokenDim(0, length)).take(torch.arange(length, device=device), fill=length)
        place = torch.full((length + 1,), -1, device=device)
        place.scatter_(0, mine, torch.arange(len(mine), device=device))
        wanted = index[at]
        found = place[:length][wanted]
        local_index = (*index[:at], found.clamp(min=0), *index[at + 1 :])
        picked = local[local_index]
        tensors = [number for number, part in enumerate(index) if isinstance(part, Tensor)]
        shape = torch.broadcast_shapes(*(index[number].shape for number in tensors))  # type: ignore[no-untyped-call]
        missing = (found < 0).expand(shape).reshape(*shape, *[1] * (picked.dim() - tensors[0] - len(shape)))
        # Zeros that autograd follows, so that the result requires grad on every rank or on none.
        return sum_over_ranks(picked.masked_fill(missing, 0), self.sharing.link)


def _apart(x: Tensor, dim: int, outer: int, length: int) -> Tensor:
    """The tensor with sequences and their tokens on dims of their own."""
    return x.reshape(*x.shape[:dim], outer, length, *x.shape[dim + 1 :])


Layout = Union[Replicated, Sharded, Reduced]

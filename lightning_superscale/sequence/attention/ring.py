"""Attention for which keys and values go round from rank to rank, while each attends with its own queries.

Ring Attention (arXiv 2310.01889): a rank attends to the keys that it has while the next ones arrive; outputs are joined
as in `block.py`. It takes any number of heads, and at no time has a rank the keys of more than two ranks. Backward
sends keys and values round once more, and their gradients behind them, until these are home.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_superscale.comm.in_graph import AxisLink, RingShift
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.attention.block import Joined, attend_to_block, grads_of_block
from lightning_superscale.sequence.attention.visibility import Visibility
from lightning_superscale.sequence.spans import TokenSpans


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sees: Visibility,
    spans: TokenSpans,
    link: AxisLink,
    *,
    scale: float | None = None,
    fused: bool | None = None,
) -> Tensor:
    """Attention over the tokens of all ranks. Every rank of the axis calls it, in forward and in backward.

    Args:
        q: [batch, heads, tokens, head dim], of this rank's tokens.
        k, v: [batch, key-value heads, tokens, head dim], of the same tokens.
        sees: over the whole sequence.
        spans: which tokens each rank has; zigzag balances causal attention.
        scale: of scores; None for 1 / sqrt(head dim).
        fused: whether torch's fused kernel attends to a block, which there is for CPUs; None where there is one.

    Returns:
        [batch, heads, tokens, head dim of v], of this rank's tokens.

    Raises:
        SequenceParallelError: a mask that needs a gradient.
    """
    if sees.dense is not None and sees.dense.requires_grad:
        raise SequenceParallelError(
            "ring attention gives what is added to scores no gradient, and this mask needs one; use mode='allgather'"
        )
    ring = _Ring(
        sees,
        spans,
        link,
        q.shape[3] ** -0.5 if scale is None else scale,
        q.device.type == "cpu" if fused is None else fused,
    )
    output: Tensor = _RingAttention.apply(q, k, v, ring)  # type: ignore[no-untyped-call]
    return output


@dataclass(frozen=True, slots=True)
class _Ring:
    """What forward and backward of one attention share."""

    sees: Visibility
    spans: TokenSpans
    link: AxisLink
    scale: float
    fused: bool

    def blocks(self, owner: int, device: torch.device) -> Iterator[tuple[slice, slice, Tensor | None, bool]]:
        """The blocks of this rank's queries and the owner's keys in which some query may see a key.

        Yields:
            places of the queries among this rank's and of the keys among the owner's, their mask, and whether the block
            is causal by itself.
        """
        for mine, queries in self._places(self.link.rank):
            for theirs, keys in self._places(owner):
                if self.sees.is_causal and keys.start >= queries.stop:
                    continue
                if self.sees.window is not None and keys.stop - 1 <= queries.start - self.sees.window:
                    continue
                is_causal = self.sees.is_plain and self.sees.is_causal and keys == queries
                yield mine, theirs, None if is_causal else self.sees.mask(queries, keys, device), is_causal

    def _places(self, rank: int) -> Iterator[tuple[slice, slice]]:
        at = 0
        for span in self.spans.of(rank):
            yield slice(at, at + span.stop - span.start), span
            at += span.stop - span.start

    def owner(self, step: int) -> int:
        """The rank whose keys are here after so many shifts."""
        return (self.link.rank - step) % self.link.size


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: _Ring) -> Tensor:
        here, group = torch.cat([k, v], dim=3), q.shape[1] // k.shape[1]
        wide = torch.promote_types(q.dtype, torch.float32)
        output = torch.zeros(*q.shape[:3], v.shape[3], dtype=wide, device=q.device)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device)
        for step in range(ring.link.size):
            shift = RingShift.start(here, ring.link) if step + 1 < ring.link.size else None
            for mine, theirs, mask, is_causal in ring.blocks(ring.owner(step), q.device):
                keys, values = _halves(_by_query_heads(here[:, :, theirs], group), k)
                found = attend_to_block(
                    q[:, :, mine], keys, values, mask, is_causal=is_causal, scale=ring.scale, fused=ring.fused
                )
                joined = Joined(output[:, :, mine], lse[:, :, mine]).join(found)
                output[:, :, mine], lse[:, :, mine] = joined.output, joined.lse
            here = here if shift is None else shift.wait()
        ctx.ring = ring
        # Rounded first: backward of a block takes the output that the model goes on with.
        ctx.save_for_backward(q, k, v, output.to(q.dtype), lse)
        return output.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ring: _Ring = ctx.ring
        q, k, v, output, lse = ctx.saved_tensors
        here, group = torch.cat([k, v], dim=3), q.shape[1] // k.shape[1]
        of_q = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        of_here = torch.zeros(here.shape, dtype=lse.dtype, device=q.device)
        for step in range(ring.link.size):
            shift = RingShift.start(here, ring.link) if step + 1 < ring.link.size else None
            # Meanwhile the gradients of these keys, which the ranks before have begun, are on their way too.
            behind = RingShift.start(of_here, ring.link) if step else None
            of_block = torch.zeros(here.shape, dtype=lse.dtype, device=q.device)
            for mine, theirs, mask, is_causal in ring.blocks(ring.owner(step), q.device):
                keys, values = _halves(_by_query_heads(here[:, :, theirs], group), k)
                found = grads_of_block(
                    grads[0][:, :, mine],
                    q[:, :, mine],
                    keys,
                    values,
                    Joined(output[:, :, mine].to(lse.dtype), lse[:, :, mine]),
                    mask,
                    is_causal=is_causal,
                    scale=ring.scale,
                    fused=ring.fused,
                )
                of_q[:, :, mine] += found[0]
                of_block[:, :, theirs] += _by_key_heads(torch.cat(found[1:], dim=3), group)
            of_here = of_block if behind is None else behind.wait() + of_block
            here = here if shift is None else shift.wait()
        if ring.link.size > 1:
            of_here = RingShift.start(of_here, ring.link).wait()
        of_k, of_v = _halves(of_here, k)
        return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype), None


def _halves(both: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, or their gradients, that travel as one tensor."""
    return both[..., : k.shape[3]], both[..., k.shape[3] :]


def _by_query_heads(x: Tensor, group: int) -> Tensor:
    """Keys or values for each query head, of which `group` neighbours read the same one."""
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def _by_key_heads(x: Tensor, group: int) -> Tensor:
    """The sum over the query heads that read each key-value head."""
    return x if group == 1 else torch.unflatten(x, 1, (x.shape[1] // group, group)).sum(2)

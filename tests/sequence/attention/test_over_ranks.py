"""Attention over sequences that ranks share equals attention on one process, with every gradient, in fp64.

Both sum up the same products, in another order where a rank has other blocks: 64 keys and head dims of 8 give sums of
at most 64 terms of about 1, so 64 x 2^-53 of them, below 1e-13; 1e-12 leaves a digit.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.distributed as dist

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import MeshAxis
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.attention import ring as ring_module
from lightning_superscale.sequence.attention.all_gather import all_gather_attention
from lightning_superscale.sequence.attention.heads import plan_heads
from lightning_superscale.sequence.attention.ring import ring_attention
from lightning_superscale.sequence.attention.sdpa import Sdpa
from lightning_superscale.sequence.attention.ulysses import ulysses_attention
from lightning_superscale.sequence.attention.visibility import Visibility
from lightning_superscale.sequence.spans import TokenSpans
from tests.helpers.ranks import run_ranks

BATCH, TOKENS, DIM = 2, 64, 8
HEADS = {"multi-head": (4, 4), "grouped": (8, 2), "multi-query": (4, 1), "uneven": (3, 3), "uneven grouped": (6, 2)}


def documents() -> torch.Tensor:
    """Three documents in one sample, two in the other, whose ends are at no rank's end."""
    return torch.stack([torch.arange(TOKENS) // 23, torch.arange(TOKENS) // 41])


def dense(num_heads: int) -> torch.Tensor:
    seen = torch.rand(BATCH, num_heads, TOKENS, TOKENS, generator=torch.Generator().manual_seed(5)) < 0.5
    return seen | torch.eye(TOKENS, dtype=torch.bool)


def biases(num_heads: int) -> torch.Tensor:
    return torch.randn(1, num_heads, TOKENS, TOKENS, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


SEES = {
    "all": lambda heads: Visibility(),
    "causal": lambda heads: Visibility(is_causal=True),
    "window": lambda heads: Visibility(is_causal=True, window=9),
    "documents": lambda heads: Visibility(is_causal=True, documents=documents()),
    "dense": lambda heads: Visibility(dense=dense(1)),
    "dense per head": lambda heads: Visibility(dense=dense(heads)),
    "biases, causal": lambda heads: Visibility(is_causal=True, dense=biases(heads)),
    "keys of padding": lambda heads: Visibility(dense=dense(1)[:, :, -1:].expand(-1, -1, 1, -1)),
}


def ring(q, k, v, sees, attend, link, *, order="consecutive", fused=True):
    return ring_attention(q, k, v, sees, TokenSpans(TOKENS, link.size, order), link, fused=fused)


MODES = {
    "ulysses": ulysses_attention,
    "ulysses in chunks": functools.partial(ulysses_attention, num_chunks=2),
    "all-gather": all_gather_attention,
    "ring": ring,
    "ring, zigzag": functools.partial(ring, order="zigzag"),
    "ring, zigzag, by products": functools.partial(ring, order="zigzag", fused=False),
}
CASES = list(itertools.product(MODES, HEADS, SEES))


def tensors(num_q: int, num_kv: int, value_dim: int = DIM + 2) -> list[torch.Tensor]:
    """Queries, keys, values and the gradient of the output."""
    made = torch.Generator().manual_seed(num_q + num_kv)
    sizes = [(num_q, DIM), (num_kv, DIM), (num_kv, value_dim), (num_q, value_dim)]
    return [torch.randn(BATCH, n, TOKENS, dim, generator=made, dtype=torch.float64) for n, dim in sizes]


def whole(heads: str, sees: str, value_dim: int = DIM + 2) -> list[torch.Tensor]:
    """Output and gradients by the plain formula."""
    num_q, num_kv = HEADS[heads]
    *inputs, grad = tensors(num_q, num_kv, value_dim)
    q, k, v = (x.requires_grad_() for x in inputs)
    every = slice(0, TOKENS)
    mask = SEES[sees](num_q).mask(every, every, q.device)
    scores = q @ k.repeat_interleave(num_q // num_kv, 1).transpose(2, 3) / DIM**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    output = scores.softmax(-1) @ v.repeat_interleave(num_q // num_kv, 1)
    output.backward(grad)
    return [output.detach(), q.grad, k.grad, v.grad]


def link_of(rank: int, world_size: int) -> AxisLink:
    return AxisLink(MeshAxis("sequence", rank, world_size, dist.group.WORLD))


def spans_of(mode: str, world_size: int) -> TokenSpans:
    return TokenSpans(TOKENS, world_size, "zigzag" if "zigzag" in mode else "consecutive")


def _attend(rank: int, world_size: int):
    link = link_of(rank, world_size)

    def attend(mode: str, heads: str, sees: str, value_dim: int = DIM + 2):
        num_q, num_kv = HEADS[heads]
        *inputs, grad = (spans_of(mode, world_size).take(x, 2, rank) for x in tensors(num_q, num_kv, value_dim))
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        link.counts.clear()
        output = MODES[mode](q, k, v, SEES[sees](num_q), Sdpa(), link)
        forward = dict(link.counts.nbytes)
        output.backward(grad)
        return [output.detach(), q.grad, k.grad, v.grad], forward, dict(link.counts.calls)

    found = {case: attend(*case) for case in CASES}
    return found | {("ulysses, one dim", heads, "causal"): attend("ulysses", heads, "causal", DIM) for heads in HEADS}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    return run_ranks(request.param, _attend, limit_s=200)


def assert_equal(ranks, mode: str, heads: str, sees: str, expected: list[torch.Tensor]) -> None:
    """The parts that all ranks found, joined, are one process's output and gradients."""
    parts = zip(*(found[mode, heads, sees][0] for found in ranks), strict=True)
    for name, ours, theirs in zip("oqkv", parts, expected, strict=True):
        joined = spans_of(mode, len(ranks)).join(list(ours), 2)
        error = (joined - theirs).abs().max() / theirs.abs().max()
        assert error < 1e-12, (mode, heads, sees, name)


def test_it_equals_one_process(ranks):
    expected = {(heads, sees): whole(heads, sees) for heads, sees in itertools.product(HEADS, SEES)}
    for mode, heads, sees in CASES:
        assert_equal(ranks, mode, heads, sees, expected[heads, sees])


def test_ulysses_moves_the_bytes_of_its_heads_in_few_messages(ranks):
    for heads, (num_q, num_kv) in HEADS.items():
        # Queries and keys, values, outputs; in forward and in backward.
        _, forward, calls = ranks[-1]["ulysses", heads, "causal"]
        assert calls == {"all_to_all": 6}
        tokens = BATCH * TOKENS // len(ranks)
        plan = plan_heads(num_q, num_kv, len(ranks))
        # Values and outputs are wider than queries and keys, by a quarter.
        of_heads = plan.numel_sent(8) * tokens
        assert forward["all_to_all"] == of_heads * (DIM + DIM + 2) / 2
        _, forward, calls = ranks[-1]["ulysses, one dim", heads, "causal"]
        assert calls == {"all_to_all": 4}
        assert forward["all_to_all"] == of_heads * DIM
    # Without padding or repetition: queries and outputs of all heads, keys and values of all theirs.
    _, forward, _ = ranks[-1]["ulysses", "multi-head", "causal"]
    assert forward["all_to_all"] == 8 * BATCH * TOKENS // len(ranks) * 4 * 2 * (2 * DIM + 2)


def test_values_of_the_keys_dim_travel_with_them_and_equal_one_process(ranks):
    for heads in HEADS:
        assert_equal(ranks, "ulysses, one dim", heads, "causal", whole(heads, "causal", DIM))


def test_in_chunks_what_was_moved_is_moved_again_for_backward(ranks):
    _, forward, calls = ranks[-1]["ulysses in chunks", "grouped", "causal"]
    num_chunks = len(plan_heads(8, 2, len(ranks), 2).exchanges)
    # Two or three of a chunk's exchanges are repeated: autograd needs no output again.
    assert num_chunks * (6 + 2) <= calls["all_to_all"] <= num_chunks * (6 + 3)
    assert forward["all_to_all"] == plan_heads(8, 2, len(ranks), 2).numel_sent(8) * BATCH * TOKENS // len(ranks) * 9


def test_all_gather_gathers_once_and_sums_up_once(ranks):
    for heads, sees in itertools.product(HEADS, SEES):
        _, forward, calls = ranks[-1]["all-gather", heads, sees]
        assert calls == {"all_gather": 1, "reduce_scatter": 1}
        assert forward["all_gather"] == 8 * BATCH * HEADS[heads][1] * TOKENS // len(ranks) * (2 * DIM + 2)


def test_keys_and_values_go_round_and_their_gradients_come_home(ranks):
    size = len(ranks)
    for mode, heads in itertools.product([mode for mode in MODES if "ring" in mode], HEADS):
        _, forward, calls = ranks[-1][mode, heads, "causal"]
        assert calls == {"ring_shift": (size - 1) + (size - 1) + size}
        assert forward["ring_shift"] == (size - 1) * 8 * BATCH * HEADS[heads][1] * TOKENS // size * (2 * DIM + 2)


def _balance(rank: int, world_size: int):
    """Pairs of a query and a key that this rank computes, in both orders."""
    link, pairs = link_of(rank, world_size), {}
    for order in ("consecutive", "zigzag"):
        spans = TokenSpans(TOKENS, world_size, order)
        one = ring_module._Ring(Visibility(is_causal=True), spans, link, 1.0, True)
        blocks = [block for owner in range(world_size) for block in one.blocks(owner, torch.device("cpu"))]
        sizes = [(mine.stop - mine.start) * (theirs.stop - theirs.start) for mine, theirs, *_ in blocks]
        pairs[order] = sum(size // (2 if is_causal else 1) for size, (*_, is_causal) in zip(sizes, blocks, strict=True))
    return pairs


def test_zigzag_gives_all_ranks_equal_work():
    found = run_ranks(4, _balance)
    assert len({pairs["zigzag"] for pairs in found}) == 1
    assert found[3]["consecutive"] == 7 * found[0]["consecutive"]


def test_a_mask_that_learns_is_refused_in_a_ring():
    x = torch.zeros(1, 1, 4, 2)
    sees = Visibility(dense=torch.zeros(1, 1, 4, 4, requires_grad=True))
    with pytest.raises(SequenceParallelError, match="this mask needs one; use mode='allgather'"):
        ring_attention(x, x, x, sees, TokenSpans(4, 1), AxisLink(MeshAxis("sequence", 0, 1)))


@pytest.mark.parametrize("fused", [True, False])
def test_a_query_that_sees_no_key_gives_zeros_and_no_gradient(fused):
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    seen = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril(-1)  # the first query sees nothing
    link = AxisLink(MeshAxis("sequence", 0, 1))
    output = ring_attention(q, k, v, Visibility(dense=seen), TokenSpans(6, 1), link, fused=fused)
    output.sum().backward()
    assert not output[:, :, 0].any()
    assert not q.grad[:, :, 0].any()
    for x in (output, q.grad, k.grad, v.grad):
        assert x.isfinite().all()

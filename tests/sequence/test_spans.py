"""The parts of a sequence that ranks have: all of it, once."""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.spans import TokenSpans


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("order", ["consecutive", "zigzag"])
@pytest.mark.parametrize("dim", [0, 1])
def test_what_ranks_take_joins_to_the_whole(size, order, dim):
    whole = torch.arange(24 * 24).view(24, 24)
    spans = TokenSpans(24, size, order)
    parts = [spans.take(whole, dim, rank) for rank in range(size)]
    assert {part.shape[dim] for part in parts} == {spans.per_rank} == {24 // size}
    assert torch.equal(spans.join(parts, dim), whole)


def test_a_rank_has_a_part_from_either_end():
    spans = TokenSpans(16, 2, "zigzag")
    assert spans.of(0) == (slice(0, 4), slice(12, 16))
    assert spans.of(1) == (slice(4, 8), slice(8, 12))


@pytest.mark.parametrize(("num_tokens", "order", "multiple"), [(18, "consecutive", 4), (20, "zigzag", 8)])
def test_a_length_that_does_not_divide_is_refused_with_the_multiple(num_tokens, order, multiple):
    with pytest.raises(SequenceParallelError, match=f"of {num_tokens} tokens .* pad it to a multiple of {multiple}"):
        TokenSpans(num_tokens, 4, order)

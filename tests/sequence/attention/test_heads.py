"""Which heads ranks compute: every query head once, with the key-value head that it reads."""

from __future__ import annotations

import pytest

from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.attention.heads import plan_heads

HEADS = [(4, 4), (8, 2), (8, 1), (3, 3), (6, 3), (6, 2), (1, 1), (5, 5), (12, 4), (2, 1), (9, 3)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_chunks", [1, 2, 3])
@pytest.mark.parametrize(("num_q", "num_kv"), HEADS)
def test_every_query_head_is_computed_once_with_its_key(num_q, num_kv, size, num_chunks):
    plan = plan_heads(num_q, num_kv, size, num_chunks)
    computed = []
    for one in plan.exchanges:
        assert len({len(heads) for heads in one.queries}) == len({len(heads) for heads in one.keys}) == 1
        for queries, keys, readers in zip(one.queries, one.keys, one.readers, strict=True):
            computed += [head for head in queries if head is not None]
            for head, read in zip(queries, readers, strict=True):
                assert head is None or keys[read] == head // (num_q // num_kv)
    assert sorted(computed) == list(range(num_q))
    every = [head for one in plan.exchanges for heads in one.queries for head in heads]
    assert [every[at] for at in plan.order] == list(range(num_q))
    assert plan.num_padded == len(every) - num_q == -(-num_q // size) * size - num_q


def test_heads_that_divide_are_neither_padded_nor_repeated():
    (one,) = plan_heads(8, 4, 4).exchanges
    assert one.queries == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert one.keys == ((0,), (1,), (2,), (3,))
    assert one.is_grouped
    # Four all-to-alls: queries and outputs of 8 heads, keys and values of 4.
    assert plan_heads(8, 4, 4).numel_sent(10) == 10 * (2 * 8 + 2 * 4)


def test_with_fewer_keys_than_ranks_a_key_goes_to_several():
    (one,) = plan_heads(8, 2, 4).exchanges
    assert one.keys == ((0,), (0,), (1,), (1,))
    assert one.is_grouped


def test_a_rank_whose_heads_read_unequal_numbers_of_keys_says_which_read_which():
    (one,) = plan_heads(6, 2, 4).exchanges
    assert one.queries == ((0, 1), (2, 3), (4, 5), (None, None))
    assert one.keys == ((0, 0), (0, 1), (1, 1), (0, 0))
    assert one.readers == ((0, 0), (0, 1), (0, 0), (1, 1))
    assert not one.is_grouped


@pytest.mark.parametrize(("num_q", "num_kv"), [(5, 2), (4, 0), (2, 4)])
def test_heads_that_do_not_share_equally_are_refused(num_q, num_kv):
    with pytest.raises(SequenceParallelError, match=f"{num_q} query heads and {num_kv} key-value heads"):
        plan_heads(num_q, num_kv, 2)

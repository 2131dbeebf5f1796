"""Masks of parts of a sequence are the parts of the whole sequence's mask."""

from __future__ import annotations

import itertools

import pytest
import torch

from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.attention.visibility import Visibility

TOKENS, CPU = 12, torch.device("cpu")
DOCUMENTS = torch.stack([torch.arange(TOKENS) // 5, torch.arange(TOKENS) // 7])
DENSE = torch.rand(2, 3, TOKENS, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.6
PARTS = [slice(0, 12), slice(0, 4), slice(4, 8), slice(8, 12), slice(3, 4)]


def sees(one: Visibility, batch: int, head: int, query: int, key: int) -> bool:
    """By its definition, one pair at a time."""
    found = not one.is_causal or key <= query
    found &= one.window is None or query - key < one.window
    found &= one.documents is None or bool(one.documents[batch, query] == one.documents[batch, key])
    return found and (one.dense is None or bool(one.dense[batch, head, query, key]))


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("has_dense", [False, True])
def test_a_part_is_that_of_the_whole(window, has_documents, has_dense):
    documents, mask = DOCUMENTS if has_documents else None, DENSE if has_dense else None
    one = Visibility(is_causal=True, window=window, documents=documents, dense=mask)
    for queries, keys in itertools.product(PARTS, PARTS):
        found = one.mask(queries, keys, CPU)
        size = (2, 3, queries.stop - queries.start, keys.stop - keys.start)
        expected = torch.tensor(
            [
                [
                    [
                        [sees(one, b, h, i, j) for j in range(keys.start, keys.stop)]
                        for i in range(queries.start, queries.stop)
                    ]
                    for h in range(3)
                ]
                for b in range(2)
            ]
        )
        assert torch.equal(torch.ones(size, dtype=torch.bool) if found is None else found.expand(size), expected)


def test_no_mask_is_made_where_all_keys_are_seen():
    assert Visibility().mask(slice(0, 4), slice(0, 12), CPU) is None
    assert Visibility(is_causal=True).mask(slice(4, 8), slice(0, 5), CPU) is None
    assert Visibility(is_causal=True, window=8).mask(slice(7, 8), slice(0, 8), CPU) is None
    assert Visibility().is_plain
    assert not Visibility(is_causal=True, window=3).is_plain


def test_what_is_added_to_scores_hides_what_other_conditions_hide():
    added = torch.randn(1, 1, TOKENS, TOKENS)
    found = Visibility(is_causal=True, dense=added).mask(slice(4, 8), slice(0, 12), CPU)
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    assert torch.equal(found, added.masked_fill(later, float("-inf"))[:, :, 4:8])


def test_heads_have_their_own_masks():
    some = Visibility(dense=DENSE).of_heads([2, 0])
    assert torch.equal(some.dense, DENSE[:, [2, 0]])
    for shared in (Visibility(dense=DENSE[:, :1]), Visibility(is_causal=True)):
        assert shared.of_heads([2, 0]) is shared


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 3}, "window of at least one key, in causal attention; found window=3 with is_causal=False"),
        ({"window": 0, "is_causal": True}, "found window=0"),
        ({"dense": torch.ones(4, 4)}, r"\[batch, heads, tokens, tokens\]; found \(4, 4\)"),
    ],
)
def test_what_makes_no_sense_is_refused(options, said):
    with pytest.raises(SequenceParallelError, match=said):
        Visibility(**options)

"""Attention in blocks of queries is attention under the whole mask, which is never there.

Tolerance: fp64; rows are those of one call, and 1e-12 is far above their roundings.
"""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.sequence.attention import masked
from lightning_superscale.sequence.attention.masked import attend_masked
from lightning_superscale.sequence.attention.sdpa import Sdpa
from lightning_superscale.sequence.attention.visibility import Visibility

TOKENS = 19
DOCUMENTS = torch.tensor([[0] * 7 + [1] * 12])
DENSE = torch.arange(TOKENS) != 3
CASES = {
    "causal": Visibility(is_causal=True),
    "all": Visibility(),
    "window": Visibility(is_causal=True, window=4),
    "window of one": Visibility(is_causal=True, window=1),
    "documents": Visibility(is_causal=True, documents=DOCUMENTS),
    "padding": Visibility(dense=DENSE[None, None, None]),
    "all of them": Visibility(is_causal=True, window=6, documents=DOCUMENTS, dense=DENSE[None, None, None] | True),
    "added to scores": Visibility(is_causal=True, dense=torch.randn(1, 2, TOKENS, TOKENS, dtype=torch.float64)),
}


@pytest.mark.parametrize("most_pairs", [2**24, 64, 1])
@pytest.mark.parametrize("queries", [slice(0, TOKENS), slice(5, 12)])
@pytest.mark.parametrize("name", CASES)
def test_blocks_are_the_whole(monkeypatch, name, queries, most_pairs):
    monkeypatch.setattr(masked, "MOST_PAIRS", most_pairs)
    sees = CASES[name]
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 2, TOKENS, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    every = slice(0, TOKENS)
    whole = sees.mask(every, every, q.device)
    expected = Sdpa()(q, k, v, whole, is_causal=False)[:, :, queries]
    found = attend_masked(q[:, :, queries], k, v, sees, Sdpa(), queries.start)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_mask_is_made_for_so_many_pairs_at_a_time(monkeypatch):
    monkeypatch.setattr(masked, "MOST_PAIRS", 60)
    seen = []

    def noting(q, k, v, mask, *, is_causal):
        seen.append(0 if mask is None else mask.numel())
        return Sdpa()(q, k, v, mask, is_causal=is_causal)

    x = torch.zeros(1, 1, TOKENS, 4)
    attend_masked(x, x, x, CASES["documents"], noting)
    assert max(seen) <= 60
    seen.clear()
    attend_masked(x, x, x, CASES["window"], noting)
    assert max(seen) <= 60
    assert sum(seen) < TOKENS**2 / 2

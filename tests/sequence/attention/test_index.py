"""Indices of numbers that the host knows: none is made where none is needed."""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import MeshAxis
from lightning_superscale.sequence.attention import index, ulysses
from lightning_superscale.sequence.attention.heads import plan_heads
from lightning_superscale.sequence.attention.index import chosen, index_on
from lightning_superscale.sequence.attention.ulysses import exchanged


def test_slices_are_those_of_their_numbers():
    x = torch.arange(24).view(2, 4, 3)
    for numbers in ([2, 0], [0, 1, 2], [3, 3, 3, 3, 0], (1,)):
        assert torch.equal(chosen(x, 1, numbers), x[:, list(numbers)])
    assert chosen(x, 1, range(4)) is x
    assert chosen(x, 1, (0, 1, 2, 3)) is x
    assert torch.equal(index_on((5, 2), x), torch.tensor([5, 2]))
    assert index_on((), x).dtype == torch.int64


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 8), (8, 4), (8, 2)])
def test_heads_that_divide_need_no_index(num_heads, num_kv_heads, monkeypatch):
    """An index would be a copy to the device in every layer."""
    monkeypatch.setattr(index, "index_on", lambda *_: pytest.fail("an index was made"))
    monkeypatch.setattr(ulysses, "all_to_all", lambda x, link: x)
    plan = plan_heads(num_heads, num_kv_heads, 2)
    q, k, v = (torch.randn(1, heads, 6, 4) for heads in (num_heads, num_kv_heads, num_kv_heads))
    found = exchanged(q, k, v, plan.exchanges[0], AxisLink(MeshAxis("sequence", 1, 2)))
    assert [x.shape[1:3] for x in found[:3]] == [(num_heads // 2, 12), *[(num_kv_heads // 2, 12)] * 2]
    assert found[3] == tuple(range(num_heads // 2, num_heads))


def test_tensors_of_several_dtypes_stay_as_they_are(monkeypatch):
    """In one message torch would widen them, and attention that one process refuses would compute."""
    sent = []
    monkeypatch.setattr(ulysses, "all_to_all", lambda x, link: sent.append(x.dtype) or x)
    dtypes = (torch.bfloat16, torch.float32, torch.float32)
    q, k, v = (torch.randn(1, 4, 6, 4).to(dtype) for dtype in dtypes)
    found = exchanged(q, k, v, plan_heads(4, 4, 2).exchanges[0], AxisLink(MeshAxis("sequence", 0, 2)))
    assert tuple(x.dtype for x in found[:3]) == dtypes
    assert sent == [torch.bfloat16, torch.float32]

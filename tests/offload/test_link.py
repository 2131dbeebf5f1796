"""The link copies like to like and counts every byte."""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.offload.link import CpuLink, link_for


def test_bytes_are_counted_per_direction():
    link = CpuLink()
    a, b = torch.randn(100), torch.empty(100)
    link.d2h(b, a).synchronize()
    assert torch.equal(a, b)
    c = torch.empty(100)
    link.h2d(c, b).wait()
    assert torch.equal(a, c)
    assert (link.bytes.d2h, link.bytes.h2d) == (400, 400)


@pytest.mark.parametrize("other", [torch.empty(99), torch.empty(100, dtype=torch.bfloat16)])
def test_unlike_tensors_are_refused(other):
    with pytest.raises(ValueError, match="a link copies like to like"):
        CpuLink().d2h(other, torch.empty(100))


def test_a_device_without_a_link_is_refused():
    with pytest.raises(ValueError, match="no link to a 'meta' device"):
        link_for(torch.device("meta"))


def test_many_uploads_in_flight_all_arrive():
    link = CpuLink()
    sources = [torch.full((70_000,), float(i)) for i in range(40)]
    targets = [torch.zeros(70_000) for _ in sources]
    for event in [link.h2d(t, s) for t, s in zip(targets, sources, strict=True)]:
        event.wait()
    assert all(map(torch.equal, sources, targets))

"""The link copies like to like and counts every byte."""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.offload.link.link import CpuLink, link_for
from lightning_superscale.timeline import UNTIMED, Timeline


def test_bytes_are_counted_per_direction():
    link = CpuLink()
    a, b = torch.randn(100), torch.empty(100)
    link.d2h(b, a).synchronize()
    assert torch.equal(a, b)
    c = torch.empty(100)
    link.h2d(c, b).wait()
    assert torch.equal(a, c)
    assert (link.bytes.d2h, link.bytes.h2d) == (400, 400)


@pytest.mark.parametrize("other", [torch.empty(99), torch.empty(100, dtype=torch.bfloat16), torch.empty(100).double()])
def test_unlike_tensors_are_refused(other):
    with pytest.raises(ValueError, match="a link copies like to like"):
        CpuLink().d2h(other, torch.empty(100))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_timed", [False, True])
def test_the_device_casts_where_the_host_has_fp32(dtype, is_timed):
    timeline = Timeline(torch.device("cpu"))
    link = CpuLink(timeline if is_timed else UNTIMED)
    if is_timed:
        timeline.open()
    grad, here = torch.randn(100).to(dtype), torch.empty(100)
    link.d2h(here, grad).synchronize()
    assert torch.equal(here, grad.float())
    weights, there = torch.randn(100) * 1e4, torch.empty(100, dtype=dtype)
    weights[:3] = torch.tensor([70000.0, -1e-8, 65519.9])  # beyond fp16, below it, and its last before infinity
    link.h2d(there, weights).wait()
    assert torch.equal(there, weights.to(dtype))
    assert (link.bytes.d2h, link.bytes.h2d) == (400, 400)
    with pytest.raises(ValueError, match="a link copies like to like, or casts"):
        link.h2d(weights, there)  # 16 bits on the host are a mistake


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


@pytest.mark.parametrize("is_timed", [False, True], ids=["by the pool", "by the thread of a recorded link"])
def test_a_drained_link_has_made_copies_whose_events_were_lost(is_timed):
    timeline = Timeline(torch.device("cpu"))
    if is_timed:
        timeline.open()
    link, there, here = CpuLink(timeline), torch.zeros(5_000_000), torch.ones(5_000_000)
    lost = link.h2d(there, here)
    link.drain()
    assert lost.is_complete()
    assert bool((there == 1).all())

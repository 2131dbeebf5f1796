"""Collectives inside of forward: their values, their gradients, their counts, and the same when compiled."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lightning_superscale.comm import collectives, in_graph
from lightning_superscale.comm.in_graph import AxisLink, RingShift, all_gather, all_to_all, sum_over_ranks
from lightning_superscale.comm.mesh import MeshAxis, single_mesh
from tests.helpers.ranks import run_ranks

COLLECTIVES = {
    "all_to_all": all_to_all,
    "all_gather": all_gather,
    "all_reduce": sum_over_ranks,
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def made(rank: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(10 * rank + seed)).to(dtype)


def _run(rank: int, world_size: int):
    link, found = AxisLink(MeshAxis("sequence", rank, world_size, dist.group.WORLD)), {}
    for name, collective in COLLECTIVES.items():

        def once(x, collective=collective):
            return collective(2 * x, link)

        for dtype in DTYPES:
            compiled = [torch.compile(once, backend="aot_eager", fullgraph=True)] if dtype == torch.float32 else []
            for run in (once, *compiled):
                x = made(rank, dtype).t().contiguous().t().requires_grad_()  # not contiguous
                link.counts.clear()
                y = run(x)
                y.backward(torch.ones_like(y) * (rank + 1))
                calls = dict(link.counts.calls) if run is once else None
                found.setdefault((name, dtype), []).append((y.detach(), x.grad, calls, dict(link.counts.nbytes)))
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_values_and_gradients(world_size):
    ranks = run_ranks(world_size, _run)
    for dtype in DTYPES:
        inputs = [2 * made(rank, dtype) for rank in range(world_size)]
        parts = [x.view(world_size, 8 // world_size, 3) for x in inputs]
        wide = torch.promote_types(dtype, torch.float32)
        grads = [2.0 * (rank + 1) for rank in range(world_size)]
        for rank, found in enumerate(ranks):
            expected = {
                "all_to_all": torch.cat([part[rank] for part in parts]),
                "all_gather": torch.cat(inputs),
                "all_reduce": torch.stack(inputs).sum(0, dtype=wide).to(dtype),
            }
            by_rows = torch.tensor(grads, dtype=dtype).repeat_interleave(8 // world_size)[:, None].expand(8, 3)
            of_input = {
                "all_to_all": by_rows,
                "all_gather": torch.full((8, 3), sum(grads), dtype=dtype),
                "all_reduce": torch.full((8, 3), grads[rank] * world_size, dtype=dtype),
            }
            for name, value in expected.items():
                # A sum on gloo has an order of its own, which matters to the last bits only.
                close = {
                    "rtol": 2**-7 if dtype == torch.bfloat16 else 1e-6,
                    "atol": 0.05 if name == "all_reduce" and dtype == torch.bfloat16 else 1e-6,
                }
                assert len(found[name, dtype]) == (2 if dtype == torch.float32 else 1)
                for y, grad, *_ in found[name, dtype]:
                    if name == "all_reduce":
                        torch.testing.assert_close(y, value, **close)
                    else:
                        assert torch.equal(y, value), (name, dtype)
                    assert torch.equal(grad, of_input[name]), (name, dtype)


def test_each_is_counted_in_bytes_of_its_input():
    for found in run_ranks(2, _run):
        _, _, calls, nbytes = found["all_to_all", torch.float32][0]
        assert (calls, nbytes) == ({"all_to_all": 2}, {"all_to_all": 2 * 96})
        _, _, calls, nbytes = found["all_gather", torch.float32][0]
        assert (calls, nbytes) == ({"all_gather": 1, "reduce_scatter": 1}, {"all_gather": 96, "reduce_scatter": 192})
        _, _, calls, _ = found["all_reduce", torch.float32][0]
        assert calls == {"all_reduce": 1}


def two_ranks() -> MeshAxis:
    return MeshAxis("sequence", 0, 2, SimpleNamespace(group_name="sequence"))


def test_gathers_that_were_given_before_go_first_in_forward_and_in_backward(monkeypatch):
    """Of another group on the device, two collectives in two orders may wait for one another."""
    happened: list[str] = []

    def issued(name):
        return lambda x, *_: (happened.append(name), torch.cat([x, x]) if name == "all_gather" else x.clone())[1]

    for name in COLLECTIVES:
        monkeypatch.setattr(in_graph, f"{name}_in_graph", issued(name))
    monkeypatch.setattr(in_graph, "start_shift_in_graph", issued("shift"))
    link = AxisLink(two_ranks(), wait_queued=lambda: happened.append("wait"))
    x = torch.ones(4, 3, requires_grad=True)
    sum_over_ranks(all_gather(all_to_all(x, link), link), link).sum().backward()
    RingShift.start(x.detach(), link)
    in_order = ["all_to_all", "all_gather", "all_reduce", "all_to_all", "all_to_all", "shift"]
    assert happened == [event for name in in_order for event in ("wait", name)]


@pytest.mark.parametrize(("backend", "waits"), [("cpu:gloo", False), ("cpu:gloo,cuda:nccl", True)])
def test_only_collectives_of_a_device_wait(monkeypatch, backend, waits):
    monkeypatch.setattr(collectives.dist, "get_backend_config", lambda _group: backend)
    alone, issued = single_mesh(), []
    assert AxisLink.along_sequence(alone).wait_queued is None
    device_type = "cuda" if waits else "cpu"
    mesh = replace(alone, sequence=two_ranks(), device_type=device_type, queued=[lambda: issued.append("gather")])
    link = AxisLink.along_sequence(mesh)
    assert (link.size, link.counts) == (2, mesh.counts)
    link.note("all_reduce", torch.ones(3))
    assert issued == (["gather"] if waits else [])

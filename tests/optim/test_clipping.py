"""Norms that are taken while backward runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_superscale.comm.mesh import DataMesh, MeshAxis, single_mesh
from lightning_superscale.optim.clipping import ClipByNorm, EarlyNorms, grad_norms, norm_of_scaled, total_norm
from lightning_superscale.optim.param_update import ParamUpdate
from lightning_superscale.optim.unit import GradientDelta
from tests.helpers.engines import build_engine
from tests.helpers.programs import Programs, plain_backward


class Unit:
    index = 3
    dtype = torch.bfloat16
    device = torch.device("cpu")


class OnHost:
    homes = frozenset({"host"})


def two_shares() -> DataMesh:
    shard, replicate, world, gather = (MeshAxis(name, 0, 2) for name in ("shard", "replicate", "world", "gather"))
    return DataMesh(shard, replicate, world, gather)


def due(i: int, grad: torch.Tensor) -> ParamUpdate:
    return ParamUpdate(param=None, group={}, unit=Unit(), state=OnHost(), i=i).with_grad(grad)


@pytest.mark.parametrize("mesh", [single_mesh(), two_shares()], ids=["whole", "shares"])
def test_measures_are_those_of_the_sum_of_all_deltas(mesh):
    torch.manual_seed(0)
    first, again, second = (torch.randn(n).bfloat16() for n in (100, 100, 7))
    norms, unused = EarlyNorms(mesh), EarlyNorms(mesh)
    unused.are_wanted = False
    for early in (norms, unused):
        early.take(GradientDelta(Unit(), [(0, first), (1, second)]))
        early.take(GradientDelta(Unit(), [(0, again)]))
    summed = first + again
    wrong = torch.full_like(second, torch.nan)  # taken early, so nobody looks at what has become of it
    found = norms.of([due(1, wrong), due(0, summed)])
    assert torch.equal(found, unused.of([due(1, second), due(0, summed)]))
    whole = mesh.num_shares == 1
    assert found.dtype == (torch.float32 if whole else torch.float64)
    expected = torch.stack([g.double().norm() if whole else g.double().square().sum() for g in (second, summed)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    norms.clear()
    assert norms.of([due(1, wrong)]).isnan().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the order of a GPU's sums shows on one")
def test_norms_on_a_gpu_are_those_of_clip_grad_norm():
    generator = torch.Generator("cuda").manual_seed(0)
    grads = [torch.randn(n, generator=generator, device="cuda") for n in (7, 4096, 70000, 300001)]
    assert torch.equal(total_norm(torch.stack(grad_norms(grads))), torch.nn.utils.get_total_norm(grads))


@pytest.mark.parametrize("is_deferred", [False, True])
def test_steps_that_clip_measure_no_gradient_again(monkeypatch, is_deferred):
    """Everything was measured when it left; in the first step that is at its end."""
    model = Programs(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = build_engine(model, optimizer, is_offloaded=True, is_streamed=True, is_deferred=is_deferred)
    early = engine._judge._early
    measured = []
    measure = early._measure
    monkeypatch.setattr(early, "_measure", lambda grads: measured.extend(grads) or measure(grads))
    counts = []
    for _ in range(3):
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        plain_backward(model, torch.randn(8, 12).bfloat16())
        before = len(measured)
        engine.request_clip(ClipByNorm(0.5))
        engine.step()
        counts.append((before, len(measured) - before))
        measured.clear()
    engine.close()
    used = 7  # all but the branch
    assert counts == [(0, used), (used, 0), (used, 0)]


@pytest.mark.parametrize("is_deferred", [False, True], ids=["cpu", "superoffload"])
def test_a_step_without_a_clip_leaves_no_norms_to_the_next(is_deferred):
    """Clipped, not clipped, clipped: the last one's norm is that of its own gradients."""
    torch.manual_seed(0)
    model = Programs(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = build_engine(model, optimizer, is_offloaded=True, is_streamed=True, is_deferred=is_deferred)
    for step, is_clipped in enumerate([True, False, True]):
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        plain_backward(model, torch.randn(8, 12).bfloat16() * (10 if step == 1 else 1))
        if is_clipped:
            engine.request_clip(ClipByNorm(0.5))
        engine.transport.collect()
        grads = [s.grad(i) for s in engine.states for i in range(len(s.unit.params)) if s.has_grad(i)]
        expected = sum(float(grad.double().square().sum()) for grad in grads) ** 0.5
        engine.step()
    assert float(engine.grad_norm()) == pytest.approx(expected, rel=1e-3)
    engine.close()


def test_the_norm_of_scaled_gradients_has_room_for_their_squares():
    params = [nn.Parameter(torch.zeros(3, dtype=torch.float16)) for _ in range(3)]
    params[0].grad, params[1].grad = torch.full((3,), 3e4, dtype=torch.float16), torch.full_like(params[1], 4e4)
    expected = (3 * (3e4 / 8) ** 2 + 3 * (4e4 / 8) ** 2) ** 0.5
    assert float(norm_of_scaled(params, 8.0)) == pytest.approx(expected, rel=1e-6)
    assert float(norm_of_scaled(params[2:], 8.0)) == 0.0

"""What applies an update on a GPU, as far as that is decided without one: here PyTorch's operations, and it says so."""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.ops import reference
from lightning_superscale.ops.triton import launch
from lightning_superscale.ops.types import AdamWHyper, AdamWSegment, Rounding
from lightning_superscale.ops.update import update_path

HYPER = AdamWHyper(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=3, grad_scale=0.5)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is none")


def make_segment(dtype: torch.dtype, rounding: Rounding | None) -> AdamWSegment:
    generator = torch.Generator().manual_seed(1)
    param, m, v, grad = (torch.randn(300, generator=generator).to(dtype) for _ in range(4))
    return AdamWSegment(param=param, exp_avg=m, exp_avg_sq=v.abs(), grad=grad, hyper=HYPER, rounding=rounding)


@needs_no_gpu
@pytest.mark.parametrize("is_low", [False, True])
def test_an_update_without_gpu_kernels_is_the_references_and_says_so(is_low, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dtype, rounding = (torch.bfloat16, Rounding(True, 5)) if is_low else (torch.float32, None)
    path = update_path(torch.device("cuda"), is_low_precision=is_low)
    reason = launch.unavailable_reason() if is_low else "torch.cuda.is_available() is False"
    assert path.name.startswith("PyTorch operations on the GPU, not fused (")
    assert reason in path.name
    ours, expected = make_segment(dtype, rounding), make_segment(dtype, rounding)
    [stats] = path.submit([ours]).wait()()
    reference.adamw_commit([expected])
    for field in ("param", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(ours, field), getattr(expected, field)), field
    assert stats.nonfinite == 0
    assert stats.sumsq == pytest.approx(float((expected.grad.float() * 0.5).square().sum()), rel=1e-5)


@needs_no_gpu
def test_low_precision_names_its_own_kernel(monkeypatch):
    monkeypatch.setattr(launch, "unavailable_reason", lambda: None)
    assert update_path(torch.device("cuda"), is_low_precision=True).name == "Triton AdamW"
    assert update_path(torch.device("cuda")).name != "Triton AdamW"

"""The CUDA and Triton ops on a real GPU, against the oracle on the CPU, bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lightning_superscale.ops import reference
from lightning_superscale.ops.cuda import kernels
from lightning_superscale.ops.types import AdamWSegment
from tests.ops.gpu import cuda_checks, triton_checks
from tests.ops.gpu.helpers import BASE_HYPER, IeeeSqrt, assert_same_bits, make_segment, move_segment

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", cuda_checks.CHECKS)
def test_cuda_op_equals_reference(name: str) -> None:
    assert kernels.unavailable_reason() is None
    cuda_checks.CHECKS[name]()


@pytest.mark.parametrize("name", triton_checks.CHECKS)
def test_triton_op_equals_reference(name: str) -> None:
    triton_checks.CHECKS[name]("cuda")


def test_adamw_commit_many_steps_equals_cpu() -> None:
    on_host = make_segment(100_003, 11, grad=torch.bfloat16)
    on_device = move_segment(on_host, "cuda")
    generator = torch.Generator().manual_seed(12)
    for step in range(1, 31):
        hyper = dataclasses.replace(BASE_HYPER, step=step)
        grad = torch.randn(100_003, generator=generator).bfloat16()
        on_host.grad, on_device.grad = grad, grad.cuda()
        on_host.hyper = on_device.hyper = hyper
        with IeeeSqrt():
            reference.adamw_commit([on_host])
        kernels.adamw_commit([on_device])
    for name in ("param", "exp_avg", "exp_avg_sq", "weight_out"):
        assert_same_bits(getattr(on_device, name), getattr(on_host, name), name)


def test_adamw_commit_clip_coefficient_from_device_never_synchronises() -> None:
    segments = [move_segment(make_segment(5000 + index, index), "cuda") for index in range(60)]
    expected = [move_segment(seg, "cpu") for seg in segments]
    kernels.unavailable_reason()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = kernels.grad_stats([seg.grad for seg in segments])
        coefficient = (1.0 / (total.sumsq.sum().sqrt() + 1e-6)).clamp(max=1.0).float()
        kernels.adamw_commit(segments, grad_scale=coefficient, skip=(total.nonfinite.sum() > 0).float(), stats=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    scale = float(coefficient)
    for seg in expected:
        seg.hyper = dataclasses.replace(seg.hyper, grad_scale=scale)
    with IeeeSqrt():
        reference.adamw_commit(expected)
    for found, want in zip(segments, expected, strict=True):
        assert_same_bits(found.param, want.param, "param")


def test_adamw_commit_on_side_stream_is_ordered() -> None:
    seg = move_segment(make_segment(1 << 20, 3), "cuda")
    expected = move_segment(seg, "cpu")
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
        seg.grad.mul_(0.5)
        kernels.adamw_commit([seg])
    torch.cuda.current_stream().wait_stream(stream)
    expected.grad.mul_(0.5)
    with IeeeSqrt():
        reference.adamw_commit([expected])
    assert_same_bits(seg.param, expected.param, "param")


@pytest.mark.parametrize("decoupled", [True, False])
def test_adamw_commit_close_to_torch_fused(decoupled: bool) -> None:
    # torch's fused GPU kernel orders its operations otherwise; both are within a few roundings (2**-23
    # relative each) of the exact update, whose size is at most about lr per step.
    numel, lr = 50_000, 1e-3
    start = torch.randn(numel, generator=torch.Generator().manual_seed(1)).cuda()
    parameter = torch.nn.Parameter(start.clone())
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind([parameter], lr=lr, weight_decay=0.01, fused=True)
    param, exp_avg, exp_avg_sq = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, 11):
        grad = torch.randn(numel, generator=torch.Generator().manual_seed(step)).cuda()
        parameter.grad = grad.clone()
        optimizer.step()
        hyper = dataclasses.replace(BASE_HYPER, lr=lr, step=step, decoupled=decoupled)
        kernels.adamw_commit(
            [AdamWSegment(param=param, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, grad=grad, hyper=hyper)]
        )
    torch.testing.assert_close(param, parameter.detach(), rtol=10 * 2**-22, atol=10 * lr * 1e-4)

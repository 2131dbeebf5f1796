"""The CUDA kernels' source, compiled for the CPU, against the oracle and torch's own optimizer.

What runs is csrc/cuda/*.cu itself, with its launch code and the ctypes binding; only the few
intrinsics of `host_cuda/` are replaced. See `helpers.IeeeSqrt` for the one correction to torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from math import isnan

import pytest
import torch

from lightning_superscale.ops import reference
from lightning_superscale.ops.cuda import kernels
from lightning_superscale.ops.types import GRAD_DTYPES, STATE_DTYPES, AdamWSegment, Rounding
from tests.ops.gpu.adamw_cases import HYPERS, MODES, dtype_segments, hostile_segment
from tests.ops.gpu.helpers import (
    BASE_HYPER,
    IeeeSqrt,
    assert_same_bits,
    assert_same_segments,
    host_library,
    make_segment,
    move_segment,
)


@pytest.fixture(autouse=True)
def _on_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library = host_library()
    monkeypatch.setattr(kernels, "_library", lambda: library)
    with IeeeSqrt():
        yield


def _assert_same_as_reference(mode: str, segments: list[AdamWSegment]) -> None:
    expected = [move_segment(seg, "cpu") for seg in segments]
    wanted = getattr(reference, mode)(expected, stats=True)
    seen = getattr(kernels, mode)(segments, stats=True)
    assert_same_segments(segments, expected)
    for found, want in zip(seen.to_host(), wanted, strict=True):
        assert found.sumsq == want.sumsq or (isnan(want.sumsq) and isnan(found.sumsq)), (found, want)
        assert found.nonfinite == want.nonfinite


@pytest.mark.parametrize("mode", MODES)
def test_adamw_every_dtype_equals_reference(mode: str) -> None:
    _assert_same_as_reference(mode, dtype_segments(mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", HYPERS)
def test_adamw_every_hyper_equals_reference(mode: str, name: str) -> None:
    next_grad = torch.bfloat16 if mode == "adamw_commit_peek" else None
    _assert_same_as_reference(mode, [make_segment(4096 + 333, 1, hyper=HYPERS[name], next_grad=next_grad)])


@pytest.mark.parametrize("mode", MODES)
def test_adamw_hostile_values_equals_reference(mode: str) -> None:
    _assert_same_as_reference(mode, [hostile_segment(mode)])


def test_adamw_hundreds_of_segments_many_hypers_equals_reference() -> None:
    segments = [
        make_segment(
            1 + 37 * index % 500, index, hyper=dataclasses.replace(BASE_HYPER, lr=1e-3 * (1 + index // 5 % 12))
        )
        for index in range(200)
    ]
    _assert_same_as_reference("adamw_commit", segments)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("beta1", [0.9, 0.4])
def test_adamw_commit_many_steps_equals_torch_optimizer(decoupled: bool, beta1: float) -> None:
    numel, steps = 2311, 60
    generator = torch.Generator().manual_seed(7)
    start = torch.randn(numel, generator=generator)
    parameter = torch.nn.Parameter(start.clone())
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind([parameter], lr=3e-3, betas=(beta1, 0.98), weight_decay=0.1, foreach=False, fused=False)
    param, exp_avg, exp_avg_sq = start.clone(), torch.zeros(numel), torch.zeros(numel)
    for step in range(1, steps + 1):
        grad = torch.randn(numel, generator=generator) * 10 ** (step % 5 - 2)
        optimizer.param_groups[0]["lr"] = lr = 3e-3 / step
        parameter.grad = grad.clone()
        optimizer.step()
        hyper = dataclasses.replace(
            BASE_HYPER, lr=lr, beta1=beta1, beta2=0.98, weight_decay=0.1, step=step, decoupled=decoupled
        )
        kernels.adamw_commit(
            [AdamWSegment(param=param, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, grad=grad, hyper=hyper)]
        )
    assert_same_bits(param, parameter.detach(), "param")
    assert_same_bits(exp_avg, optimizer.state[parameter]["exp_avg"], "exp_avg")
    assert_same_bits(exp_avg_sq, optimizer.state[parameter]["exp_avg_sq"], "exp_avg_sq")


@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES)
@pytest.mark.parametrize("moment_dtype", STATE_DTYPES)
def test_adamw_commit_peek_many_steps_equals_commit_of_each_step(
    grad_dtype: torch.dtype, moment_dtype: torch.dtype
) -> None:
    # Deferred commit: the weights seen after each step, and the state at the end, are those of a plain
    # sequence of commits by the oracle.
    numel, steps = 1500, 25
    generator = torch.Generator().manual_seed(21)
    grads = [(torch.randn(numel, generator=generator) * 8).to(grad_dtype) for _ in range(steps)]
    hypers = [dataclasses.replace(BASE_HYPER, step=step + 1, grad_scale=0.5**step) for step in range(steps)]
    plain = make_segment(numel, 8, moments=(moment_dtype, moment_dtype))
    deferred = move_segment(plain, "cpu")
    assert plain.weight_out is not None
    assert deferred.weight_out is not None
    for step in range(steps):
        plain.grad, plain.hyper = grads[step], hypers[step]
        reference.adamw_commit([plain])
        if step == 0:
            deferred.grad, deferred.hyper = grads[0], hypers[0]
            kernels.adamw_peek([deferred])
        else:
            deferred.grad, deferred.hyper = grads[step - 1], hypers[step - 1]
            deferred.next_grad, deferred.next_hyper = grads[step], hypers[step]
            kernels.adamw_commit_peek([deferred])
        assert_same_bits(deferred.weight_out, plain.weight_out, f"weight_out after step {step}")
    deferred.grad, deferred.hyper = grads[-1], hypers[-1]
    kernels.adamw_commit([deferred])
    for name in ("param", "exp_avg", "exp_avg_sq"):
        assert_same_bits(getattr(deferred, name), getattr(plain, name), name)


def test_adamw_weight_out_in_place_of_grad_equals_reference() -> None:
    seg = make_segment(5000, 2, grad=torch.bfloat16)
    expected = move_segment(seg, "cpu")
    reference.adamw_commit([expected])
    seg.weight_out = seg.grad
    kernels.adamw_commit([seg])
    assert seg.weight_out is not None
    assert expected.weight_out is not None
    assert_same_bits(seg.weight_out, expected.weight_out, "weight_out")
    assert_same_bits(seg.param, expected.param, "param")


def test_adamw_commit_device_scale_equals_host_scale() -> None:
    scale = torch.tensor([0.1234567])
    segments = [make_segment(5000, 3)]
    expected = [move_segment(segments[0], "cpu")]
    expected[0].hyper = dataclasses.replace(BASE_HYPER, grad_scale=float(scale))
    reference.adamw_commit(expected)
    kernels.adamw_commit(segments, grad_scale=scale)
    assert_same_segments_but_hyper(segments, expected)


def assert_same_segments_but_hyper(found: list[AdamWSegment], expected: list[AdamWSegment]) -> None:
    assert_same_segments(found, [dataclasses.replace(b, hyper=a.hyper) for a, b in zip(found, expected, strict=True)])


@pytest.mark.parametrize("skip", [1.0, float("nan")])
@pytest.mark.parametrize("mode", ["adamw_commit", "adamw_peek"])
def test_adamw_skip_set_writes_rounded_param_only(mode: str, skip: float) -> None:
    seg = make_segment(5000, 4)
    expected = move_segment(seg, "cpu")
    assert expected.weight_out is not None
    expected.weight_out.copy_(expected.param)
    seen = getattr(kernels, mode)([seg], stats=True, skip=torch.tensor([skip]))
    assert_same_segments([seg], [expected])
    assert seen.to_host()[0].sumsq == reference.sumsq(seg.grad)


def test_adamw_skip_zero_changes_nothing() -> None:
    segments = [make_segment(5000, 4)]
    expected = [move_segment(segments[0], "cpu")]
    reference.adamw_commit(expected)
    kernels.adamw_commit(segments, skip=torch.zeros(1))
    assert_same_segments(segments, expected)


def test_adamw_commit_peek_skip_commits_and_drops_next() -> None:
    segments = [make_segment(5000, 6, next_grad=torch.float16, moments=(torch.bfloat16, torch.bfloat16))]
    expected = [move_segment(segments[0], "cpu")]
    reference.adamw_commit(expected)  # its weight_out is the rounded committed param
    kernels.adamw_commit_peek(segments, skip=torch.ones(1))
    assert_same_segments(segments, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("numel", "misalign"), [(0, 0), (1, 0), (4095, 0), (4096, 0), (20001, 0), (9000, 1)])
def test_sumsq_and_count_nonfinite_equal_reference(dtype: torch.dtype, numel: int, misalign: int) -> None:
    x = torch.randn(numel + misalign, generator=torch.Generator().manual_seed(numel)).to(dtype)[misalign:]
    assert kernels.sumsq(x) == reference.sumsq(x)
    if numel:
        x[numel // 2], x[-1] = float("nan"), float("-inf")
    assert kernels.count_nonfinite(x) == reference.count_nonfinite(x)
    assert kernels.grad_stats([x]).nonfinite.tolist() == [reference.count_nonfinite(x)]


def test_grad_stats_many_tensors_equals_reference() -> None:
    tensors = [torch.randn(index * 101 % 6000, generator=torch.Generator().manual_seed(index)) for index in range(120)]
    found = kernels.grad_stats(tensors, scale=0.5).to_host()
    assert [stats.sumsq for stats in found] == [reference.sumsq(x * 0.5) for x in tensors]


def test_adamw_bad_segment_names_it_and_writes_nothing() -> None:
    good, bad = make_segment(100, 1), make_segment(100, 2)
    bad.exp_avg = bad.exp_avg.half()
    before = good.param.clone()
    with pytest.raises(TypeError, match=r"adamw_commit: segment 1\.exp_avg: expected dtype .*found torch\.float16"):
        kernels.adamw_commit([good, bad])
    assert_same_bits(good.param, before, "param")
    bad = make_segment(100, 2)
    bad.grad = bad.grad[:50]
    with pytest.raises(ValueError, match=r"segment 1\.grad: expected a contiguous 1D tensor of 100 elements"):
        kernels.adamw_commit([good, bad])
    with pytest.raises(ValueError, match=r"segment 0\.weight_out: expected a tensor, found None"):
        kernels.adamw_peek([make_segment(10, 1, weight_out=None)])
    with pytest.raises(ValueError, match="expected next_grad and next_hyper"):
        kernels.adamw_commit_peek([good])
    rounded = make_segment(10, 1)
    rounded.rounding = Rounding(False)
    with pytest.raises(ValueError, match=r"segment 0\.rounding: expected None, found Rounding.*adamw_low"):
        kernels.adamw_commit([rounded])
    scaled = make_segment(10, 1, hyper=HYPERS["scaled"])
    with pytest.raises(ValueError, match=r"grad_scale is given as a device scalar.*found 0\.37"):
        kernels.adamw_commit([scaled], grad_scale=torch.ones(1))
    with pytest.raises(ValueError, match="skip: expected one float32 element"):
        kernels.adamw_commit([good], skip=torch.ones(2))


def test_a_device_scale_is_what_the_same_number_is() -> None:
    scale = torch.tensor(0.37)
    numbers = [make_segment(1000 + 17 * i, i, hyper=dataclasses.replace(BASE_HYPER, grad_scale=0.37)) for i in range(3)]
    scaled = [
        dataclasses.replace(
            move_segment(seg, "cpu"), device_scale=scale, hyper=dataclasses.replace(seg.hyper, grad_scale=1.0)
        )
        for seg in numbers
    ]
    kernels.adamw_commit(numbers)
    _assert_same_as_reference("adamw_commit", scaled)
    assert_same_segments([dataclasses.replace(seg, device_scale=None) for seg in scaled], numbers)


def test_a_device_scale_that_a_launch_cant_take_is_refused() -> None:
    one, two = make_segment(100, 1, hyper=dataclasses.replace(BASE_HYPER, grad_scale=1.0)), make_segment(100, 2)
    one.device_scale = torch.tensor(0.5)
    with pytest.raises(ValueError, match=r"segment 1.device_scale: expected the tensor of segment 0"):
        kernels.adamw_commit([one, two])
    two.device_scale, two.hyper = one.device_scale, dataclasses.replace(BASE_HYPER, grad_scale=0.5)
    with pytest.raises(ValueError, match="device_scale is given as a device scalar, so the segment's own must be 1.0"):
        kernels.adamw_commit([one, two])

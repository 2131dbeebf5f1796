"""Builders shared by the GPU op tests: segments of every dtype, the kernels compiled for the CPU."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from lightning_superscale.ops.cuda.abi import CudaLibrary, open_library
from lightning_superscale.ops.types import AdamWHyper, AdamWSegment

ROOT = Path(__file__).resolve().parents[3]
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
BASE_HYPER = AdamWHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, step=3)


class IeeeSqrt(TorchFunctionMode):
    """Makes `Tensor.sqrt` correctly rounded.

    torch's CPU build takes fp32 square roots from MKL, which on some processors is off by one unit
    in the last place for about a fifth of all inputs; the kernels' is IEEE everywhere. Through
    fp64 it is exact: 53 bits are at least 2 * 24 + 2, so rounding twice is rounding once.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.sqrt and args[0].dtype == torch.float32:
            return args[0].double().sqrt().float()
        return func(*args, **(kwargs or {}))


@functools.cache
def host_library() -> CudaLibrary:
    """csrc/cuda compiled by g++ against `host_cuda/`: the same kernels and C ABI on CPU tensors."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on the PATH")
    here = Path(__file__).resolve().parent
    out = Path(tempfile.mkdtemp(prefix="lss_host_cuda_")) / "liblss_cuda_host.so"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-mfma", "-mf16c", "-fPIC", "-shared", "-fvisibility=hidden"]
    # -w: nvcc's pragmas mean nothing to g++.
    flags += ["-w", f"-I{here / 'host_cuda'}", f"-I{ROOT / 'csrc' / 'include'}", "-x", "c++"]
    subprocess.run([compiler, *flags, *map(str, CUDA_SOURCES), "-o", str(out)], check=True, timeout=120)
    return open_library(out, device_type="cpu")


def make_segment(
    numel: int,
    seed: int,
    *,
    hyper: AdamWHyper = BASE_HYPER,
    moments: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    grad: torch.dtype = torch.float32,
    weight_out: torch.dtype | None = torch.bfloat16,
    next_grad: torch.dtype | None = None,
    misalign: int = 0,
) -> AdamWSegment:
    """Random tensors; each starts `misalign` elements into its storage."""
    generator = torch.Generator().manual_seed(seed)

    def draw(dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        full = (torch.randn(numel + misalign, generator=generator) * scale).to(dtype)
        return full[misalign:]

    return AdamWSegment(
        param=draw(torch.float32),
        exp_avg=draw(moments[0], 0.1),
        exp_avg_sq=draw(moments[1], 0.1).square_(),
        grad=draw(grad),
        hyper=hyper,
        weight_out=None if weight_out is None else torch.zeros(numel + misalign, dtype=weight_out)[misalign:],
        next_grad=None if next_grad is None else draw(next_grad),
        next_hyper=None if next_grad is None else dataclasses.replace(hyper, step=hyper.step + 1, lr=hyper.lr * 0.9),
    )


def move_segment(seg: AdamWSegment, device: torch.device | str) -> AdamWSegment:
    """A copy on `device`."""
    values = {field.name: getattr(seg, field.name) for field in dataclasses.fields(seg)}
    moved: dict[str, Any] = {
        name: value.to(device, copy=True) for name, value in values.items() if isinstance(value, torch.Tensor)
    }
    return dataclasses.replace(seg, **moved)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Bitwise equality, -0 apart from 0; NaN equals NaN of any payload."""
    found, expected = found.cpu(), expected.cpu()
    if found.dtype != expected.dtype or found.shape != expected.shape:
        raise AssertionError(f"{what}: {found.dtype} {found.shape} against {expected.dtype} {expected.shape}")
    integer = {4: torch.int32, 2: torch.int16, 8: torch.int64}[found.element_size()]
    is_same = (found.view(integer) == expected.view(integer)) | (found.isnan() & expected.isnan())
    if not is_same.all():
        bad = (~is_same).nonzero().flatten()
        i = int(bad[0])
        raise AssertionError(
            f"{what}: {len(bad)} of {found.numel()} differ, first [{i}]: {found[i]!r}, {expected[i]!r}"
        )


def assert_same_segments(found: list[AdamWSegment], expected: list[AdamWSegment]) -> None:
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        for field in dataclasses.fields(a):
            value, wanted = getattr(a, field.name), getattr(b, field.name)
            if isinstance(value, torch.Tensor):
                assert_same_bits(value, wanted, f"segment {index}.{field.name}")

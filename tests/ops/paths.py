"""The ways an op can run here, and inputs that meet the corners of every dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_superscale.ops.native import loader

FALLBACK = "fallback"
NATIVE = loader.supported_isas()
PATHS = (*NATIVE, FALLBACK)
SIZES = (0, 1, 15, 16, 17, 255, 257, 4095, 4096, 4097, 65536 + 3)
LARGE = 1_000_003
THREADS = (1, 2, 7)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@contextlib.contextmanager
def running(path: str) -> Iterator[None]:
    """Within the block ops take the given instruction set, or the PyTorch fallback."""
    if path == FALLBACK:
        with loader.without_native():
            yield
        return
    before = loader.isa_name()
    loader.set_isa(path)
    try:
        yield
    finally:
        loader.set_isa(str(before))


def values(numel: int, dtype: torch.dtype = F32, *, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal values of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + numel)
    x = torch.randn(numel, generator=generator) * torch.rand(numel, generator=generator).pow(6)
    return (x * scale).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Bitwise equal, signs of zero included; any NaN equals any NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    ints = {4: torch.int32, 2: torch.int16, 8: torch.int64}[a.element_size()]
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(
        a.contiguous().view(ints).masked_fill(nan, 0), b.contiguous().view(ints).masked_fill(nan, 0)
    )


class ExactSqrt(TorchDispatchMode):
    """torch with a correctly rounded fp32 square root: see [Note: Square root] in reference.py."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.sqrt.default and args[0].dtype == torch.float32:
            return args[0].double().sqrt().float()
        return func(*args, **(kwargs or {}))

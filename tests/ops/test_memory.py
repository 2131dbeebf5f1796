"""Host buffers: views, lifetime, failure."""

from __future__ import annotations

import gc

import pytest
import torch

from lightning_superscale.ops import cuda_rt
from lightning_superscale.ops.memory import HostBuffer
from lightning_superscale.ops.pool import Pool
from tests.ops.paths import FALLBACK, NATIVE, running


def mapped_kib() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmSize"))


@pytest.mark.parametrize("path", [*NATIVE[:1], FALLBACK])
def test_host_buffer_is_zeroed_and_views_share_it(path):
    with running(path):
        buffer = HostBuffer(4096, huge_pages=True, pool=Pool(2))
        whole, part = buffer.tensor(torch.float32, 1024), buffer.tensor(torch.bfloat16, 10, offset_bytes=4)
        assert not whole.any()
        part.fill_(1.0)
        assert whole[1] != 0
        assert whole[0] == 0
        assert buffer.nbytes == 4096
        assert HostBuffer(0).tensor(torch.float32, 0).numel() == 0


@pytest.mark.parametrize("path", [*NATIVE[:1], FALLBACK])
def test_host_buffer_wrong_range_is_refused(path):
    with running(path):
        buffer = HostBuffer(100)
        for dtype, numel, offset in ((torch.float32, 26, 0), (torch.float32, 1, 2), (torch.float32, -1, 0)):
            with pytest.raises(ValueError, match="expected an aligned range within 100 bytes"):
                buffer.tensor(dtype, numel, offset_bytes=offset)
        with pytest.raises(ValueError, match="nbytes must be >= 0"):
            HostBuffer(-1)


@pytest.mark.skipif(not NATIVE, reason="no native library")
def test_host_buffer_lives_as_long_as_its_tensors():
    size = 256 << 20
    before = mapped_kib()
    buffer = HostBuffer(size)
    view = buffer.tensor(torch.float32, 1000)[10:20]
    del buffer
    gc.collect()
    assert mapped_kib() - before > size // 1024 // 2
    view.fill_(3.0)
    assert view.sum() == 30.0
    del view
    gc.collect()
    assert mapped_kib() - before < size // 1024 // 2


@pytest.mark.skipif(not NATIVE, reason="no native library")
def test_host_buffer_impossible_size_raises_memory_error():
    with pytest.raises(MemoryError, match="refused"):
        HostBuffer(1 << 60)


@pytest.mark.skipif(not NATIVE or cuda_rt.device_count() > 0, reason="needs a machine without CUDA")
def test_host_buffer_pinned_without_cuda_says_so():
    with pytest.raises(RuntimeError, match="cannot pin 4096 bytes of host memory: no CUDA"):
        HostBuffer(4096, pin=True)

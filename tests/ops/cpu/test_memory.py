"""Host buffers: views, lifetime, failure."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal

import pytest
import torch

from lightning_superscale.offload.link.arena import HostArena
from lightning_superscale.ops.cpu.memory import HostBuffer, RecycledMemory
from lightning_superscale.ops.cpu.pool import Pool
from lightning_superscale.ops.cuda import runtime
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
    gc.collect()  # or what earlier tests left behind goes in between
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


@pytest.mark.skipif(not NATIVE or runtime.device_count() > 0, reason="needs a machine without CUDA")
def test_host_buffer_pinned_without_cuda_says_so():
    with pytest.raises(RuntimeError, match="cannot pin 4096 bytes of host memory: no CUDA"):
        HostBuffer(4096, pin=True)


MIB = 2**20
CPU = torch.device("cpu")


def recycled(memory: RecycledMemory, num_mib: int) -> torch.Tensor:
    return memory.empty(num_mib, MIB // 4, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("path", [*NATIVE[:1], FALLBACK])
def test_recycled_memory_is_lent_again_when_no_view_is_left(path):
    with running(path):
        memory = RecycledMemory()
        first = recycled(memory, 3)
        address = first.data_ptr()
        view = first[1, 5:7].detach()
        del first
        gc.collect()
        second = recycled(memory, 3)
        assert second.data_ptr() != address  # two elements of it are still seen
        assert memory.free_bytes == 0
        del view
        gc.collect()
        assert memory.free_bytes == 3 * MIB
        third = memory.empty(MIB, dtype=torch.bfloat16, device=CPU)  # a smaller one, of another dtype
        assert third.data_ptr() == address
        assert third.shape == (MIB,)
        third.fill_(1.0)
        second.fill_(2.0)
        assert bool((third == 1.0).all())


def test_recycled_blocks_that_are_too_small_make_room():
    memory = RecycledMemory()
    small = [recycled(memory, 2) for _ in range(3)]
    del small
    gc.collect()
    assert memory.free_bytes == 6 * MIB
    large = recycled(memory, 4)
    assert memory.free_bytes == 2 * MIB
    del large
    gc.collect()
    assert memory.free_bytes == 6 * MIB
    tiny = recycled(memory, 1)
    assert memory.free_bytes == 4 * MIB  # the 2 MiB block serves it; 4 MiB for 1 would be waste
    memory.clear()
    assert memory.free_bytes == 0
    tiny.fill_(1.0)


def test_recycled_tensor_may_outlive_its_memory():
    memory = RecycledMemory()
    tensor = recycled(memory, 2)
    del memory
    gc.collect()
    tensor.fill_(3.0)
    assert float(tensor.sum()) == 3.0 * 2 * MIB / 4
    del tensor


def test_recycled_memory_leaves_small_tensors_and_devices_to_torch():
    memory = RecycledMemory()
    assert memory.empty(4, dtype=torch.float32, device=CPU).shape == (4,)
    assert memory.empty(8, MIB, dtype=torch.float32, device=torch.device("meta")).is_meta
    gc.collect()
    assert memory.free_bytes == 0


# Forks


def resident_kib_of_child(buffer: HostBuffer) -> int:
    """Change every page of a buffer while a forked child lives; returns what it keeps of the old pages, in KiB."""
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    buffer.tensor(torch.uint8, buffer.nbytes).add_(1)
    with open(f"/proc/{child}/smaps_rollup") as smaps:
        found = {line.split(":")[0]: int(line.split()[1]) for line in smaps if line.endswith("kB\n")}
    os.write(go[1], b"x")
    os.waitpid(child, 0)
    for end in (*ready, *go):
        os.close(end)
    return found["Private_Clean"] + found["Private_Dirty"]


@pytest.mark.skipif(not NATIVE, reason="no native library")
def test_data_loader_workers_do_not_double_states():
    size = 256 << 20
    kept, left_out = (HostBuffer(size, in_forks=in_forks) for in_forks in (True, False))
    for buffer in (kept, left_out):
        buffer.tensor(torch.uint8, size).fill_(1)
    assert resident_kib_of_child(left_out) < size // 1024 // 8
    assert resident_kib_of_child(kept) > size // 1024 // 2  # the measure sees what it should


@pytest.mark.skipif(not NATIVE, reason="no native library")
def test_states_are_left_out_of_forks_and_weights_that_parameters_view_are_not():
    arena = HostArena()
    states, weights = (
        arena.zeros(4096, torch.float32, is_pinned=False),
        arena.zeros(4096, torch.float32, is_pinned=False, in_forks=True),
    )
    child = os.fork()
    if child == 0:
        os._exit(0 if not weights.any() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        states.any()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV

"""Host buffers from mmap, optionally pinned for CUDA, freed or used again when no tensor uses them."""

from __future__ import annotations

import ctypes
import math
import warnings
import weakref
from collections.abc import Callable
from ctypes import byref, c_void_p

import torch
from torch import Tensor

from lightning_superscale.ops.cpu.pool import Pool
from lightning_superscale.ops.events import has_streams
from lightning_superscale.ops.native import loader

# Smaller tensors come from torch's allocator: malloc recycles memory of that size by itself.
_RECYCLED_FROM_BYTES = 2**20


class HostBuffer:
    """Zeroed host memory that tensors can view.

    The memory lives as long as the buffer or any tensor made from it. Without the native library torch
    allocates it. Where the system refuses to page-lock memory, torch is asked for memory that is; where it has none
    either, the buffer is pageable, with one warning: copies then block the thread that starts them.

    Args:
        nbytes: size; 0 is allowed.
        pin: page-lock it for asynchronous copies to and from CUDA devices.
        device: CUDA device whose context does the pinning, and whose work the release waits for; the pages are
            pinned for every device.
        huge_pages: advise the kernel to use huge pages.
        in_forks: whether processes that this one forks have the memory too. Without, they crash when they touch it;
            with, the system copies each page that this process writes while they live, as DataLoader workers do.
        pool: threads that touch the pages first, so that they lie on those threads' NUMA node.

    Raises:
        ValueError: a negative size.
        MemoryError: the system refused the memory.
        RuntimeError: `pin` without a usable CUDA driver.
    """

    def __init__(
        self,
        nbytes: int,
        pin: bool = False,
        *,
        device: int = 0,
        huge_pages: bool = False,
        in_forks: bool = True,
        pool: Pool | None = None,
    ) -> None:
        if nbytes < 0:
            raise ValueError(f"nbytes must be >= 0, found {nbytes}")
        self._nbytes = nbytes
        self._is_pinned = pin
        lib = loader.native()
        if lib is None or nbytes == 0:
            self._bytes = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pin and nbytes > 0)
            return
        try:
            self._bytes = _mapped(lib, nbytes, device if pin else None, huge_pages, in_forks, pool)
        except _PinRefused as refused:
            self._bytes = _pinned_by_torch(nbytes, str(refused))
            self._is_pinned = self._bytes.is_pinned()

    @property
    def nbytes(self) -> int:
        """Size of the buffer in bytes."""
        return self._nbytes

    @property
    def address(self) -> int:
        """Address of the first byte."""
        return self._bytes.data_ptr()

    @property
    def is_pinned(self) -> bool:
        """Whether the memory is page-locked for CUDA."""
        return self._is_pinned

    def tensor(self, dtype: torch.dtype, numel: int, *, offset_bytes: int = 0) -> Tensor:
        """A 1D view of `numel` elements from `offset_bytes` on, which must be a multiple of the element size.

        Raises:
            ValueError: a range that is not aligned or not within the buffer.
        """
        end = offset_bytes + numel * dtype.itemsize
        if numel < 0 or offset_bytes < 0 or offset_bytes % dtype.itemsize or end > self._nbytes:
            raise ValueError(
                f"expected an aligned range within {self._nbytes} bytes, found {numel} elements of {dtype} "
                f"({dtype.itemsize} bytes each) at byte {offset_bytes}"
            )
        return self._bytes[offset_bytes:end].view(dtype)


class RecycledMemory:
    """Temporary host tensors whose memory is used again as soon as no tensor views it.

    The first touch of a page of fresh memory costs several times what a copy does, and a buffer of a training step
    is fresh in every step otherwise. A buffer is free again when its last view dies, so one that is still read,
    sent or received is never handed out again. Memory stays mapped between steps; blocks that are too small are
    unmapped when a larger one is needed, so about as much is mapped as was in use at one time.
    """

    def __init__(self) -> None:
        self._free: list[HostBuffer] = []

    @property
    def free_bytes(self) -> int:
        """Bytes that are mapped and that no tensor uses."""
        return sum(block.nbytes for block in self._free)

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor. On other devices than the CPU torch's allocator recycles memory by itself."""
        nbytes = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or has_streams(device) or nbytes < _RECYCLED_FROM_BYTES:
            return torch.empty(shape, dtype=dtype, device=device)
        block = self._take(nbytes)
        return self._lend(block)[:nbytes].view(dtype).view(shape)

    def _take(self, nbytes: int) -> HostBuffer:
        fitting = [block for block in self._free if nbytes <= block.nbytes <= 2 * nbytes]
        if fitting:
            block = min(fitting, key=lambda block: block.nbytes)
            self._free.remove(block)
            return block
        too_small, dropped = sorted((b for b in self._free if b.nbytes < nbytes), key=lambda b: b.nbytes), 0
        for block in too_small:
            if dropped < nbytes:
                self._free.remove(block)
                dropped += block.nbytes
        return HostBuffer(nbytes, huge_pages=True)

    def _lend(self, block: HostBuffer) -> Tensor:
        # A weak reference: a tensor that outlives this object frees its block.
        free = weakref.WeakMethod(self._put_back)
        return _viewed(block.address, block.nbytes, lambda: (method := free()) and method(block))

    def _put_back(self, block: HostBuffer) -> None:
        self._free.append(block)

    def clear(self) -> None:
        """Give memory that no tensor uses back to the system."""
        self._free.clear()


class _PinRefused(RuntimeError):
    """The system does not page-lock memory that is mapped already."""


def _pinned_by_torch(nbytes: int, reason: str) -> Tensor:
    try:
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        warnings.warn(
            f"{reason}; torch's own pinned memory was refused too ({error}). Copies to and from the GPU do not overlap "
            "with anything. Raise the limit of locked memory (ulimit -l, docker --ulimit memlock=-1).",
            stacklevel=2,
        )
        return torch.zeros(nbytes, dtype=torch.uint8)


def _mapped(
    lib: ctypes.CDLL, nbytes: int, pin_device: int | None, huge_pages: bool, in_forks: bool, pool: Pool | None
) -> Tensor:
    memory = c_void_p()
    handle = pool.handle if pool else None
    loader.check(lib, lib.lss_mem_alloc(nbytes, int(huge_pages), int(in_forks), handle, byref(memory)))
    address = memory.value
    if address is None:
        raise AssertionError("lss_mem_alloc gave no memory")
    if pin_device is not None:
        status = lib.lss_cu_pin(pin_device, address, nbytes)
        if status != 0:
            reason = f"cannot pin {nbytes} bytes of host memory: {lib.lss_last_error().decode()}"
            lib.lss_mem_free(address, nbytes)
            raise (RuntimeError if status == loader.NO_CUDA else _PinRefused)(reason)
    return _viewed(address, nbytes, _release, lib, address, nbytes, pin_device)


def _viewed(address: int, nbytes: int, when_unused: Callable[..., object], *args: object) -> Tensor:
    """A tensor over bytes of memory; `when_unused(*args)` is called once neither it nor a view of it is left.

    torch.frombuffer keeps a reference to the exporter, and every view (also one that a collective works on) keeps
    the tensor's storage: when the exporter dies, nothing can reach the memory any more.
    """
    exporter = (ctypes.c_uint8 * nbytes).from_address(address)
    finalizer = weakref.finalize(exporter, when_unused, *args)
    finalizer.atexit = False  # tensors may be used until the very end; the process's exit frees the memory
    return torch.frombuffer(exporter, dtype=torch.uint8)


def _release(lib: ctypes.CDLL, address: int, nbytes: int, pin_device: int | None) -> None:
    if pin_device is not None:
        lib.lss_cu_unpin(pin_device, address)
    lib.lss_mem_free(address, nbytes)

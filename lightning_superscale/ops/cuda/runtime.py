"""Host side of CUDA transfers through the driver API: batched copies, events, callbacks without Python.

Streams and events are the integers that torch gives: `stream.cuda_stream`, `event.cuda_event`. Callers keep the
tensors of a copy alive until the stream has passed it, and use pinned host memory (`HostBuffer(pin=True)`): from
pageable memory the driver copies synchronously.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_int32, c_size_t, c_uint64, c_void_p

from torch import Tensor

from lightning_superscale.ops.cpu.pool import Ticket
from lightning_superscale.ops.native import loader


def device_count() -> int:
    """Number of CUDA devices that the driver reports; 0 without a driver or without the native library."""
    lib = loader.native()
    if lib is None:
        return 0
    count = c_int32()
    lib.lss_cu_device_count(byref(count))  # a failure leaves 0, which is the answer then
    return count.value


def pin(tensor: Tensor, *, device: int = 0) -> None:
    """Page-lock a contiguous CPU tensor's memory for every device; undo with `unpin` before it is freed."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"pin: expected a contiguous CPU tensor, found {tensor.device}, stride {tensor.stride()}")
    lib = loader.native_or_raise("runtime.pin")
    loader.check(lib, lib.lss_cu_pin(device, tensor.data_ptr(), tensor.nbytes))


def unpin(tensor: Tensor, *, device: int = 0) -> None:
    """Let memory that `pin` locked be paged again."""
    lib = loader.native_or_raise("runtime.unpin")
    loader.check(lib, lib.lss_cu_unpin(device, tensor.data_ptr()))


def copy_d2h(device: int, stream: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Enqueue copies of (host dst, device src) pairs on a stream, in order, with one native call."""
    _check_pairs("copy_d2h", [(dst, src) for dst, src in pairs])
    lib = loader.native_or_raise("runtime.copy_d2h")
    dst = (c_void_p * len(pairs))(*(dst.data_ptr() for dst, _ in pairs))
    src = (c_uint64 * len(pairs))(*(src.data_ptr() for _, src in pairs))
    sizes = (c_size_t * len(pairs))(*(src.nbytes for _, src in pairs))
    loader.check(lib, lib.lss_cu_d2h_batch(device, stream, dst, src, sizes, len(pairs)))


def copy_h2d(device: int, stream: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Enqueue copies of (device dst, host src) pairs on a stream, in order, with one native call."""
    _check_pairs("copy_h2d", [(src, dst) for dst, src in pairs])
    lib = loader.native_or_raise("runtime.copy_h2d")
    dst = (c_uint64 * len(pairs))(*(dst.data_ptr() for dst, _ in pairs))
    src = (c_void_p * len(pairs))(*(src.data_ptr() for _, src in pairs))
    sizes = (c_size_t * len(pairs))(*(src.nbytes for _, src in pairs))
    loader.check(lib, lib.lss_cu_h2d_batch(device, stream, dst, src, sizes, len(pairs)))


def record_event(device: int, event: int, stream: int) -> None:
    """Record an event on a stream. torch creates events lazily: call `event.record()` once to have a `cuda_event`."""
    lib = loader.native_or_raise("runtime.record_event")
    loader.check(lib, lib.lss_cu_event_record(device, event, stream))


def stream_wait_event(device: int, stream: int, event: int) -> None:
    """Let work that is enqueued on the stream from now on wait for the event."""
    lib = loader.native_or_raise("runtime.stream_wait_event")
    loader.check(lib, lib.lss_cu_stream_wait_event(device, stream, event))


def launch_notify(device: int, stream: int, ticket: Ticket[object]) -> None:
    """Release a held ticket when the stream reaches this point: a C callback, without the GIL."""
    lib = loader.native_or_raise("runtime.launch_notify")
    if ticket.handle is None:
        raise ValueError("launch_notify: expected a ticket of the native library, found one that ran without it")
    loader.check(lib, lib.lss_cu_launch_notify(device, stream, ticket.handle))


def _check_pairs(op: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Refuse (host, device) pairs that are not contiguous and of one dtype and size."""
    for index, (host, remote) in enumerate(pairs):
        fits = host.nbytes == remote.nbytes and host.dtype == remote.dtype
        if host.device.type != "cpu" or remote.device.type != "cuda" or not fits:
            raise ValueError(
                f"{op}: pair {index}: expected a CPU and a CUDA tensor of one dtype and size, found {host.dtype} "
                f"[{host.numel()}] on {host.device} and {remote.dtype} [{remote.numel()}] on {remote.device}"
            )
        if not (host.is_contiguous() and remote.is_contiguous()):
            raise ValueError(f"{op}: pair {index}: expected contiguous tensors")

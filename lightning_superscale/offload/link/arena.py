"""Memory at both ends of the link: an engine's host buffers, and the device memory that training leaves free.

States are in pageable memory; buffers of transfers are pinned where that lets copies overlap.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.link.cgroup import cgroup_free_bytes, memory_domain
from lightning_superscale.ops.cpu.memory import HostBuffer
from lightning_superscale.ops.cpu.pool import Pool


@dataclass(slots=True)
class HostArena:
    """Allocates zeroed host buffers and counts them.

    Attributes:
        pool: threads that touch each buffer first, so that it lies on their NUMA node; None leaves that to the first
            write.
        device: index of the CUDA device whose copies use pinned buffers.
        pageable_bytes, pinned_bytes: bytes allocated so far, also of buffers that were freed since.
    """

    pool: Pool | None = None
    device: int = 0
    pageable_bytes: int = 0
    pinned_bytes: int = 0

    def zeros(self, numel: int, dtype: torch.dtype, *, is_pinned: bool, in_forks: bool = False) -> Tensor:
        """A zeroed 1D host tensor [numel]; its memory is freed with its last view.

        Args:
            in_forks: whether forked processes may read it, as they may read the module's weights. Without, DataLoader
                workers don't double the memory of states, which every step writes.
        """
        nbytes = numel * dtype.itemsize
        if is_pinned:
            self.pinned_bytes += nbytes
        else:
            self.pageable_bytes += nbytes
        buffer = HostBuffer(max(nbytes, 1), pin=is_pinned, device=self.device, in_forks=in_forks, pool=self.pool)
        return buffer.tensor(dtype, numel)


MEMORY_VARIABLE = "LSS_HOST_MEMORY_GIB"


def available_host_bytes() -> int:
    """Bytes that this process can take now: what the host has available, or less if a container's limit leaves less.

    LSS_HOST_MEMORY_GIB, if set, is believed instead: some virtual machines have more memory as soon as it is used.

    Raises:
        SuperScaleError: the variable is no positive number.
    """
    said = os.environ.get(MEMORY_VARIABLE)
    if said:
        return _bytes_of(said)
    available, free = int(psutil.virtual_memory().available), cgroup_free_bytes()
    return available if free is None else min(available, free)


def _bytes_of(said: str) -> int:
    try:
        gib = float(said)
    except ValueError:
        gib = math.nan
    if not 0 < gib < math.inf:
        raise SuperScaleError(
            f"{MEMORY_VARIABLE} is {said!r}; expected the GiB of host memory that this process may take, such as 180. "
            "Without the variable the system is asked."
        )
    return int(gib * 2**30)


def fits_host_memory(needed_bytes: int) -> bool:
    """Whether this process can take this much memory of the host now."""
    return needed_bytes <= available_host_bytes()


def sharing_host_memory() -> str:
    """A text that processes have in common if what one takes is missing to the other; "" where that is not known.

    Where LSS_HOST_MEMORY_GIB says how much memory this process may take, others take none of it.
    """
    return "" if os.environ.get(MEMORY_VARIABLE) else memory_domain()


def check_host_memory(needed_bytes: int, num_processes: int = 1) -> None:
    """Refuse an allocation that the host, or this process's share of it, can't hold, before it is made.

    Args:
        needed_bytes: of all the processes together.
        num_processes: this run's processes that share this host's memory.

    Raises:
        SuperScaleError: less memory is available than `needed_bytes`.
    """
    available = available_host_bytes()
    if needed_bytes > available:
        on_host = int(psutil.virtual_memory().available)
        limited = (
            f" under the memory limit of this process's cgroup, of {_gib(on_host)} GiB that the host has; raise that "
            "limit (docker --memory, a pod's resources, Slurm's --mem)"
            if available < on_host
            else ""
        )
        raise SuperScaleError(
            f"offloading needs {_gib(needed_bytes)} GiB of host memory for master weights, optimizer states and "
            f"transfer buffers{_of(num_processes)}, and {_gib(available)} GiB are available{limited}. "
            f"{_way_out(needed_bytes, available)}"
            "Use a smaller model, fewer processes on this host, or a host with more memory. If this machine gets more "
            f"memory as it is used, say how much in {MEMORY_VARIABLE}."
        )


def _of(num_processes: int) -> str:
    return f" of {num_processes} processes on this host" if num_processes > 1 else ""


def _way_out(needed_bytes: int, available: int) -> str:
    """The advice to keep what does not fit on the device, where that has memory of its own."""
    if not torch.cuda.is_available():
        return ""
    share = math.ceil((1 - available / needed_bytes) * 100) / 100
    return f"Keep a share of them on the GPU from the start, with OffloadConfig(gpu_fraction={share}) or more. "


def _gib(nbytes: int) -> float:
    return math.ceil(nbytes / 2**30 * 100) / 100


# The share of device memory that is left for fragments of the caching allocator, and for longer batches than so far.
_RESERVE_SHARE = 0.05


def free_device_bytes(device: torch.device) -> int | None:
    """Bytes that were free on `device` at this process's peak so far, less a reserve of 5 % of the device.

    None where device memory is host memory, so that moving anything there frees nothing.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    return max(0, int(free + cached - _RESERVE_SHARE * total))

"""How much of a device's memory training leaves free."""

from __future__ import annotations

import torch

# Left alone: fragments of the caching allocator, and batches that are longer than those seen so far.
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

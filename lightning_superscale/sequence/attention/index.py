"""Numbers that the host knows as an index on a device, for which no host waits.

`torch.tensor(numbers, device="cuda")` copies from pageable memory: the host then waits until the device has done all
that was queued, in every layer. From page-locked memory the copy is queued like everything else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_superscale.torch_private import is_of_tracer


def index_on(numbers: Sequence[int], like: Tensor) -> Tensor:
    """Numbers as int64 on a tensor's device."""
    is_queued = like.is_cuda and not is_of_tracer(like)
    index = torch.tensor(numbers, dtype=torch.int64, device="cpu" if is_queued else like.device, pin_memory=is_queued)
    return index.to(like.device, non_blocking=True) if is_queued else index


def chosen(x: Tensor, dim: int, numbers: Sequence[int]) -> Tensor:
    """The slices of these numbers along a dim; the tensor itself where they are all, in order."""
    is_all = len(numbers) == x.shape[dim] and all(number == i for i, number in enumerate(numbers))
    return x if is_all else x.index_select(dim, index_on(numbers, x))

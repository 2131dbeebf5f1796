"""In which dtype gradients and weights cross the link, and how gradients keep their bits whichever it is.

In the weights' dtype they take the fewest bytes, and the host's kernel casts. In fp32 the device casts ([Note: Casts of
the device] in link.py) and the kernel reads and writes fp32: more bytes for the link and the host's memory, fewer
conversions for its cores. Where masters are fp32, no bit depends on it: bf16 and fp16 are exact in fp32, and both sides
round new weights to nearest even.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_superscale.offload.link.link import Link, LinkEvent
from lightning_superscale.ops.cpu.flat import accumulate

LinkDtype = Literal["weights", "fp32"]


def dtype_on_link(choice: LinkDtype, weights: torch.dtype) -> torch.dtype:
    """Dtype of a unit's transfer buffers: what crosses the link both ways."""
    return torch.float32 if choice == "fp32" else weights


def send_gradient(link: Link, here: Tensor, grad: Tensor, dtype: torch.dtype) -> LinkEvent:
    """Start moving one gradient to the host.

    Args:
        here: where to, 1D, of the dtype on the link.
        grad: on the device, perhaps summed up in a wider dtype than that of its weights.
        dtype: of the weights; the gradient is rounded to it whatever the link carries.
    """
    return link.d2h(here, grad.to(dtype))


def add_late_gradient(link: Link, here: Tensor, grad: Tensor, dtype: torch.dtype, arrival: LinkEvent) -> None:
    """Wait for one gradient more of a step and add it on the host, rounding the sum to the weights' dtype.

    Args:
        here: holds the sum so far once `arrival` is done, 1D, of the dtype on the link.
        grad, dtype: as `send_gradient`'s.
    """
    staged = torch.empty_like(here)
    late = send_gradient(link, staged, grad, dtype)
    arrival.synchronize()
    late.synchronize()
    accumulate(here, staged)
    if here.dtype != dtype:
        here.copy_(here.to(dtype))

"""Moves gradients over the link in the weights' dtype or fp32, with the same bits in either.

In the weights' dtype gradients and weights take the fewest bytes, and the host's kernel casts. In fp32 the device casts
([Note: Casts of the device] in link.py) and the kernel reads and writes fp32: more bytes for the link and the host's
memory, fewer conversions for its cores. Where masters are fp32, no bit depends on the choice: bf16 and fp16 are exact
in fp32, and both sides round new weights to nearest even.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_superscale.offload.link.link import Link, LinkEvent
from lightning_superscale.ops.cpu.flat import accumulate
from lightning_superscale.ops.state_dtypes import WIDE_DTYPES

LinkDtype = Literal["weights", "fp32"]


def dtype_on_link(choice: LinkDtype, weights: torch.dtype) -> torch.dtype:
    """The dtype in which both gradients and new weights of a unit cross the link, and of its transfer buffers."""
    return torch.float32 if choice == "fp32" and weights not in WIDE_DTYPES else weights


def send_gradient(link: Link, here: Tensor, grad: Tensor, dtype: torch.dtype) -> LinkEvent:
    """Start moving one gradient to the host.

    Args:
        here: 1D host buffer, of the dtype on the link.
        grad: 1D, on the device, perhaps summed up in a wider dtype than that of its weights.
        dtype: dtype of the weights; the gradient is rounded to it whatever the dtype on the link.
    """
    return link.d2h(here, grad.to(dtype))


def add_late_gradient(link: Link, here: Tensor, grad: Tensor, dtype: torch.dtype, arrival: LinkEvent) -> None:
    """Move one more gradient of a step to the host and add it there, rounding the sum to the weights' dtype.

    Blocks the calling thread until the sum is there.

    Args:
        here: 1D host buffer that holds the sum so far once `arrival` is complete, of the dtype on the link.
        grad: 1D, on the device.
        dtype: dtype of the weights.
        arrival: the copy of the sum so far.
    """
    staged = torch.empty_like(here)
    late = send_gradient(link, staged, grad, dtype)
    arrival.synchronize()
    late.synchronize()
    if dtype in WIDE_DTYPES:
        here.add_(staged)
    else:
        accumulate(here, staged)
    if here.dtype != dtype:
        here.copy_(here.to(dtype))

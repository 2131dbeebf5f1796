"""What fp32 masters and the weights rounded from them owe one another."""

from __future__ import annotations

import torch
from torch import Tensor


def follow_weights(master: Tensor, weights: Tensor) -> None:
    """Where `master` does not round to `weights`, make it `weights`; elsewhere it keeps its lower bits."""
    master.copy_(torch.where(master.to(weights.dtype) == weights, master, weights.float()))

"""The precision plugin of Fabric's strategies: dtypes of weights, of what a model takes, and of what it gives."""

from __future__ import annotations

from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_superscale.plugins.precision import PrecisionMixin


class FabricPrecisionMixin(PrecisionMixin):
    __doc__ = PrecisionMixin.__doc__

    # Where Fabric's own plugins convert what a model takes and gives, this does too: inputs to the dtype of forward,
    # outputs to the default dtype, in which the user's loop computes the loss.

    def convert_input(self, data: Any) -> Any:
        return data if self.precision == "32-true" else _to(data, self.choices.autocast or self.choices.weights)

    def convert_output(self, data: Any) -> Any:
        return data if self.precision == "32-true" else _to(data, torch.get_default_dtype())


def _to(data: Any, dtype: torch.dtype) -> Any:
    """A collection with its tensors of a floating point dtype converted to another."""
    return apply_to_collection(data, function=lambda t: t.to(dtype) if t.is_floating_point() else t, dtype=Tensor)

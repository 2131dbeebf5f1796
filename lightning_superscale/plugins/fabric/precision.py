"""The precision plugin of Fabric's strategies: dtypes of weights, of what a model takes, and of what it gives."""

from __future__ import annotations

from typing import Any

import torch

from lightning_superscale.plugins.precision import PrecisionMixin, converted


class FabricPrecisionMixin(PrecisionMixin):
    __doc__ = PrecisionMixin.__doc__

    # Where Fabric's own plugins convert what a model takes and gives, this does too: inputs to the dtype of forward,
    # outputs to the default dtype, in which the user's loop computes the loss.

    def convert_input(self, data: Any) -> Any:
        return data if self.precision == "32-true" else converted(data, self.choices.autocast or self.choices.weights)

    def convert_output(self, data: Any) -> Any:
        return data if self.precision == "32-true" else converted(data, torch.get_default_dtype())

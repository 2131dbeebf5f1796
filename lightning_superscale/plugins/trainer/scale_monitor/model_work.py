"""The floating-point operations of a model's step, counted once, and the share of the device's peak that they reach."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from lightning_superscale.config.values import PositiveFloat
from lightning_superscale.estimation.devices import profile_of_device
from lightning_superscale.torch_private import has_compiled_code

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


class ModelWork:
    """What a batch costs a device of this rank.

    Args:
        flops_per_token: of the model's forward and backward, in this rank's share of a token; "auto" counts them.
        peak_flops: floating-point operations per second of one device; "auto" takes the data sheet's.
        device: of the model.
        dtype: of its products, where they are not counted.

    Attributes:
        why_no_flops, why_no_peak: reasons why either is not known, for people; None where it is.
    """

    def __init__(
        self,
        flops_per_token: PositiveFloat | str,
        peak_flops: PositiveFloat | str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._per_token: Mapping[torch.dtype | None, float] = {}
        self.why_no_flops: str | None = "no batch was trained"
        self.why_no_peak: str | None = None
        if not isinstance(flops_per_token, str):
            self._per_token, self.why_no_flops = {dtype: flops_per_token}, None
        self._counts = isinstance(flops_per_token, str)
        self._counted: Mapping[torch.dtype | None, float] = {}
        self._undo: Callable[[], None] | None = None
        self._rate: Callable[[torch.dtype | None], float] | None = None
        if not isinstance(peak_flops, str):
            self._rate = lambda _: peak_flops
        else:
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
            profile = profile_of_device(name) if device.type == "cuda" else None
            self._rate = None if profile is None else profile.flops
            if profile is None:
                self.why_no_peak = f"no data sheet of {name!r} is known here; pass peak_flops"

    def count_next_step(self, module: LightningModule) -> None:
        """Count the operations of the module's next training step, which runs as it is."""
        if not self._counts:
            return
        if has_compiled_code():
            self.why_no_flops = "operations of compiled code can't be counted; pass flops_per_token"
            return
        before, step = vars(module).get("training_step"), module.training_step

        def undo() -> None:
            self._undo = None
            if before is None:
                del module.training_step
            else:
                module.training_step = before  # type: ignore[method-assign]

        @functools.wraps(step)
        def counted(*args: Any, **kwargs: Any) -> Any:
            from lightning_superscale.estimation.tracing.model_flops import ModelFlops  # its tables take time to load

            undo()
            with ModelFlops() as seen:
                result = step(*args, **kwargs)
            self._counted = dict(seen.by_dtype)
            return result

        module.training_step = counted  # type: ignore[method-assign]
        self._undo = undo

    def end_step(self, num_tokens: int) -> None:
        """Note the size of the batch of the training step that is over."""
        if self._counted and num_tokens:
            self._per_token = {dtype: flops / num_tokens for dtype, flops in self._counted.items()}
            self._counted, self.why_no_flops = {}, None

    def forget_next_step(self) -> None:
        """Count nothing any more: training is over, or failed."""
        if self._undo is not None:
            self._undo()

    def flops(self, num_tokens: int) -> float | None:
        """Floating-point operations of forward and backward for so many tokens; None where they are not known."""
        return num_tokens * sum(self._per_token.values()) if self._per_token else None

    def mfu(self, num_tokens: int, seconds: float) -> float | None:
        """Model FLOPs utilization (arXiv:2204.02311, section 4.1), from 0 to 1; None where it is not known."""
        if self._rate is None or not self._per_token:
            return None
        at_peak = sum(flops / self._rate(dtype) for dtype, flops in self._per_token.items())
        return num_tokens * at_peak / seconds

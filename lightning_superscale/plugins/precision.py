"""Dtypes of weights and of forward and backward; the optimizer step itself belongs to the engine.

[Note: Two namespaces] Lightning ships twice, as `lightning.pytorch` and as `pytorch_lightning`, with
unrelated class trees. All logic lives in mixins that import neither; `pytorch.py` and
`pytorch_lightning.py` bind them to real bases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Union

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.errors import SuperScaleError, did_you_mean
from lightning_superscale.zero.clip import ClipByNorm, ClipByValue
from lightning_superscale.zero.engine import OptimizerEngine

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.plugins.precision import Precision as _Base
else:
    _Base = object

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_precision(precision: str) -> None:
    """Refuse precisions that the engines don't step, before anything is built.

    Raises:
        SuperScaleError: names the precision and the ones to use.
    """
    if precision in PRECISIONS:
        return
    names = ", ".join(map(repr, PRECISIONS))
    if precision in ("16-mixed", "16-true"):
        raise SuperScaleError(
            f"precision={precision!r} needs a loss scaler, which this version's engines do not have yet. "
            f"Use one of {names}."
        )
    raise SuperScaleError(f"precision={precision!r} is not one of {names}{did_you_mean(precision, PRECISIONS)}")


class SuperScalePrecisionMixin(_Base):
    """Precision plugin of the superscale strategies.

    Args:
        precision: "32-true": fp32 throughout. "bf16-mixed": fp32 weights, forward under
            `torch.autocast`. "bf16-true": bf16 weights, gradients and activations, with fp32 master
            weights and optimizer states in the engine.
    """

    precision: Literal["32-true", "bf16-mixed", "bf16-true"]

    def __init__(self, precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true") -> None:
        check_precision(precision)
        self.precision = precision
        self._device_type = "cpu"
        self._engines: Mapping[Optimizer, OptimizerEngine] = {}

    # What the strategy tells us

    def attach(self, device_type: str, engines: Mapping[Optimizer, OptimizerEngine]) -> None:
        """Called by the strategy in setup, once its device and optimizers are known."""
        self._device_type = device_type
        self._engines = engines

    def _engine_of(self, optimizer: Any) -> OptimizerEngine | None:
        return self._engines.get(getattr(optimizer, "_optimizer", optimizer))

    # Dtypes

    @property
    def _weight_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float32

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module.to(torch.bfloat16) if self.precision == "bf16-true" else module

    def convert_input(self, data: Any) -> Any:
        if self.precision != "bf16-true":
            return data
        return apply_to_collection(
            data, function=lambda t: t.to(torch.bfloat16) if torch.is_floating_point(t) else t, dtype=Tensor
        )

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return _default_dtype(torch.bfloat16) if self.precision == "bf16-true" else nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        return self.tensor_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        if self.precision == "bf16-mixed":
            return torch.autocast(self._device_type, dtype=torch.bfloat16, cache_enabled=False)
        return self.tensor_init_context()

    # The step

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Run the closure (forward, backward), then the hooks and the clipping request, then the engine."""
        engine = self._engine_of(optimizer)
        if engine is None:
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        if kwargs:
            raise SuperScaleError(
                f"optimizer.step() takes only a closure under this strategy, found {', '.join(map(repr, kwargs))}."
            )
        evaluate = partial(self._wrap_closure, model, optimizer, closure)
        if engine.is_passthrough:
            return engine.passthrough_step(evaluate)
        if engine.needs_closure:
            return engine.closure_step(evaluate)
        try:
            result = evaluate()
        except BaseException:
            engine.discard_gradients()
            raise
        engine.step()
        return result

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: Union[int, float] = 0.0,
        gradient_clip_algorithm: Any = "norm",
    ) -> None:
        """Ask for clipping; the engine applies it inside the step, where it costs no pass of its own."""
        if clip_val <= 0:
            return
        engine = self._engine_of(optimizer)
        if engine is None or engine.is_passthrough:
            super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)
        elif gradient_clip_algorithm == "value":
            engine.request_clip(ClipByValue(float(clip_val)))
        else:
            engine.request_clip(ClipByNorm(float(clip_val)))

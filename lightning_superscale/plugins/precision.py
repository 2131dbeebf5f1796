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
from lightning_superscale.plugins.loss_scaler import LossScaler
from lightning_superscale.zero.clip import ClipByNorm, ClipByValue
from lightning_superscale.zero.engine import OptimizerEngine

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.plugins.precision import Precision as _Base
else:
    _Base = object

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true")
PrecisionName = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true"]
_WEIGHTS = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


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
    raise SuperScaleError(f"precision={precision!r} is not one of {names}{did_you_mean(precision, PRECISIONS)}")


class SuperScalePrecisionMixin(_Base):
    """Precision plugin of the superscale strategies.

    Args:
        precision: "32-true": fp32 throughout. "bf16-mixed", "16-mixed": fp32 weights, forward under
            `torch.autocast`. "bf16-true", "16-true": 16-bit weights, gradients and activations, with fp32 master
            weights and optimizer states in the engine. With fp16 losses are scaled; a step whose gradients
            overflow is dropped on all ranks, and the scale is halved.
        scaler: whose scale and factors losses take with fp16; None for GradScaler's defaults.

    Raises:
        SuperScaleError: another precision, or a scaler where nothing is fp16.
    """

    precision: PrecisionName

    def __init__(self, precision: PrecisionName = "32-true", scaler: Union[torch.amp.GradScaler, None] = None) -> None:
        check_precision(precision)
        self.precision = precision
        self.scaler: LossScaler | None = None
        if precision in ("16-mixed", "16-true"):
            self.scaler = LossScaler()
            if scaler is not None:
                self.scaler.load_state_dict(scaler.state_dict())
        elif scaler is not None:
            raise SuperScaleError(f"precision={precision!r} scales no losses; found a scaler. Remove it.")
        self._device_type = "cpu"
        self._engines: Mapping[Optimizer, OptimizerEngine] = {}

    # What the strategy tells us

    def attach(self, device_type: str, engines: Mapping[Optimizer, OptimizerEngine]) -> None:
        """Called by the strategy in setup, once its device and optimizers are known."""
        self._device_type = device_type
        self._engines = engines
        self._announce_scale()

    def _engine_of(self, optimizer: Any) -> OptimizerEngine | None:
        return self._engines.get(getattr(optimizer, "_optimizer", optimizer))

    # Dtypes

    def convert_module(self, module: nn.Module) -> nn.Module:
        dtype = _WEIGHTS.get(self.precision)
        return module if dtype is None else module.to(dtype)

    def convert_input(self, data: Any) -> Any:
        dtype = _WEIGHTS.get(self.precision)
        if dtype is None:
            return data
        return apply_to_collection(
            data, function=lambda t: t.to(dtype) if torch.is_floating_point(t) else t, dtype=Tensor
        )

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        dtype = _WEIGHTS.get(self.precision)
        return nullcontext() if dtype is None else _default_dtype(dtype)

    def module_init_context(self) -> AbstractContextManager[Any]:
        return self.tensor_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        dtype = _AUTOCAST.get(self.precision)
        if dtype is not None:
            return torch.autocast(self._device_type, dtype=dtype, cache_enabled=False)
        return self.tensor_init_context()

    # Scaled losses

    def pre_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # type: ignore[override]
        self._announce_scale()
        if self.scaler is not None:
            # The factor is a tensor of fp32, so that a loss in fp16 does not overflow before its gradients do.
            tensor = tensor * torch.tensor(self.scaler.scale, device=tensor.device)
        return super().pre_backward(tensor, module)

    def _announce_scale(self) -> None:
        if self.scaler is not None:
            for engine in self._engines.values():
                engine.scale_losses(self.scaler.scale)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.scaler is not None:
            self.scaler.load_state_dict(state_dict)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the scale of a run under Lightning's own plugin."""
        if type(self).__qualname__ not in checkpoint and checkpoint.get("MixedPrecision"):
            self.load_state_dict(checkpoint["MixedPrecision"])

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
            if self.scaler is not None:
                raise SuperScaleError(
                    f"{type(engine.optimizer).__name__} evaluates the loss itself, which precision={self.precision!r} "
                    "can't scale. Use 'bf16-mixed' or 'bf16-true'."
                )
            return engine.closure_step(evaluate)
        try:
            result = evaluate()
        except BaseException:
            engine.discard_gradients()
            raise
        has_stepped = engine.step()
        if self.scaler is not None and not (result is None and model.automatic_optimization):
            self.scaler.update(has_overflowed=not has_stepped)
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

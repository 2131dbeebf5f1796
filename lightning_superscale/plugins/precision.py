"""What the precision plugins of Trainer and Fabric share: the user's choice of dtypes, and the scale of losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Optional, TypeVar, Union

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_superscale.config.values import check_arguments
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.run.loss_scaler import LossScaler
from lightning_superscale.run.precision import PRECISIONS, PrecisionName, Seed, check_precision, choose
from lightning_superscale.run.run import Run

_Own = TypeVar("_Own", bound="PrecisionMixin")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def converted(data: Any, dtype: torch.dtype) -> Any:
    """A collection with its tensors of a floating point dtype converted to another."""
    return apply_to_collection(data, function=lambda t: t.to(dtype) if t.is_floating_point() else t, dtype=Tensor)


class PrecisionMixin:
    """Precision plugin of the superscale strategies.

    Args:
        precision: "32-true": fp32 throughout. "bf16-mixed", "16-mixed": fp32 weights, forward under
            `torch.autocast`. "bf16-true", "16-true": 16-bit weights, gradients and activations, with fp32 master
            weights and optimizer states in the engine. With fp16 losses are scaled; a step whose gradients
            overflow is dropped on all ranks, and the scale is halved.
        scaler: gives the initial loss scale and its factors with fp16; None for GradScaler's defaults.
        master_weights: "fp32", or with "bf16-true" "bf16": the weights are their own masters, and no fp32 copy
            of them exists anywhere.
        optimizer_states: "fp32" or "bf16", of Adam's exp_avg and exp_avg_sq.
        gradient_accumulation: dtype of `param.grad`, in which micro-batches and several backward calls of a step are
            summed up: "fp32", or "auto" for the weights' own.
        gradient_reduction: dtype in which ranks average gradients; "auto" for that of `param.grad`.
        stochastic_rounding: round masters and states that are stored in bf16 up or down at random, so that small
            updates are kept in the mean; False rounds to nearest, as DeepSpeed does. None rounds at random wherever
            anything is stored in bf16.
        kahan: keep the error of rounding bf16 master weights beside them, in bf16 (2 more bytes per parameter).
        autocast: run forward of "bf16-true" or "16-true" under `torch.autocast`, which computes the operations that
            suffer most from 16 bits (losses; on a GPU norms and softmax too) in fp32; inputs are not converted then.
            None runs it in the "-mixed" precisions only.
        seed: seed of stochastic rounding. The random numbers depend on it and on parameters and steps, not on the
            number of ranks, nor on a resume.

    Raises:
        SuperScaleError: another precision, a scaler where nothing is fp16, or a combination that can't work; it says
            why, and what to use.

    For the method of stochastic rounding see [Note: Stochastic rounding] in ops/reference.py.
    """

    precision: Any  # a PrecisionName, which is wider than what Lightning's plugins declare

    def __init__(
        self,
        precision: PrecisionName = "32-true",
        scaler: Union[torch.amp.GradScaler, None] = None,
        master_weights: Literal["fp32", "bf16"] = "fp32",
        optimizer_states: Literal["fp32", "bf16"] = "fp32",
        gradient_accumulation: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
        gradient_reduction: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
        stochastic_rounding: Optional[bool] = None,
        kahan: bool = False,
        autocast: Optional[bool] = None,
        seed: Seed = 0,
    ) -> None:
        check_arguments("SuperScalePrecision", PrecisionMixin.__init__, scaler=scaler)
        self.choices = choose(
            precision,
            master_weights=master_weights,
            optimizer_states=optimizer_states,
            gradient_accumulation=gradient_accumulation,
            gradient_reduction=gradient_reduction,
            stochastic_rounding=stochastic_rounding,
            kahan=kahan,
            autocast=autocast,
            seed=seed,
        )
        self.precision = precision
        self.scaler: LossScaler | None = None
        if precision in ("16-mixed", "16-true"):
            self.scaler = LossScaler()
            if scaler is not None:
                self.scaler.load_state_dict(scaler.state_dict())
        elif scaler is not None:
            raise SuperScaleError(f"precision={precision!r} scales no losses; found a scaler. Remove it.")
        self._device_type = "cpu"
        self.run: Run | None = None

    # Calls by the strategy

    def run_on(self, device_type: str) -> None:
        """Take the type of the device, for `torch.autocast`; the strategy calls it in setup, for training or not."""
        self._device_type = device_type

    def attach(self, run: Run) -> None:
        """Take the run whose losses are scaled and clipped; the strategy calls it in setup for training."""
        self.run = run

    def detach(self) -> None:
        """Forget the run; the strategy calls it once the run is over."""
        self.run = None

    @property
    def device(self) -> str:
        """The kind of device that `torch.autocast` runs on, as Lightning's own plugins say it."""
        return self._device_type

    # Dtypes

    @property
    def _keeps_weights(self) -> bool:
        """Whether weights and inputs have the dtype that the user gave them."""
        return self.choices.weights == torch.float32

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module if self._keeps_weights else module.to(self.choices.weights)

    def widen_module(self, module: nn.Module) -> None:
        """Give a module weights of 64 bits, if it is to have them, before it loads some.

        Lightning loads checkpoints before `convert_module`, where weights of 32 bits would round them.
        """
        if self.choices.weights == torch.float64:
            self.convert_module(module)

    def convert_input(self, data: Any) -> Any:
        if self._keeps_weights or self.choices.autocast is not None:
            return data
        return converted(data, self.choices.weights)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._keeps_weights else _default_dtype(self.choices.weights)

    def module_init_context(self) -> AbstractContextManager[Any]:
        return self.tensor_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        if self.choices.autocast is not None:
            return torch.autocast(self._device_type, dtype=self.choices.autocast, cache_enabled=False)
        return self.tensor_init_context()

    # Scaled losses

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose backward gives gradients that the step expects: times the scale, where losses are scaled."""
        if self.run is not None:
            self.run.announce_loss_scale()
        if self.scaler is None:
            return loss
        # The factor is a tensor of fp32, so that a loss in fp16 does not overflow before its gradients do.
        return loss * torch.tensor(self.scaler.scale, device=loss.device)

    def state_dict(self) -> dict[str, Any]:
        """The loss scale and its counts; nothing where no loss is scaled."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave, where losses are scaled."""
        if self.scaler is not None:
            self.scaler.load_state_dict(state_dict)


def own_precision(plugin: Any, own_class: type[_Own], strategy: str) -> _Own:
    """Translate a stock precision plugin of Lightning's or Fabric's into ours, so that `precision="bf16-true"` works.

    Args:
        plugin: a stock plugin, or one of ours, which is returned itself.
        own_class: our class for the same Lightning or Fabric.
        strategy: name of the strategy's class, for errors.

    Raises:
        SuperScaleError: a plugin whose dtypes are not known here; says what to pass.
    """
    if isinstance(plugin, own_class):
        return plugin
    if type(plugin).__name__ not in ("Precision", "HalfPrecision", "MixedPrecision", "DoublePrecision"):
        raise SuperScaleError(
            f"{strategy} can't work with the precision plugin {type(plugin).__name__}; "
            f"pass one of {', '.join(map(repr, PRECISIONS))}, or {own_class.__name__}."
        )
    precision = str(plugin.precision)
    check_precision(precision)
    return own_class(precision, getattr(plugin, "scaler", None))  # type: ignore[arg-type]

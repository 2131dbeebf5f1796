"""Finds out which gradients and weights user hooks can see, and so how far both may run ahead of the hooks."""

from __future__ import annotations

from typing import Any

from lightning_superscale.run.visibility import Visibility

# Hooks between backward and step: an override of one may read or change param.grad.
_GRAD_HOOKS = (
    "backward",
    "configure_gradient_clipping",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "optimizer_step",
    "optimizer_zero_grad",
)
_CALLBACK_GRAD_HOOKS = ("on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")

# Hooks between a step and the next forward: an override of one may read weights.
_WEIGHT_HOOKS = (
    "on_before_batch_transfer",
    "on_after_batch_transfer",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_train_batch_start",
    "on_train_epoch_end",
    "on_train_epoch_start",
    "on_validation_model_eval",
    "optimizer_step",
)

# Lightning's callbacks that read no weights (ModelCheckpoint reads them through the strategy, which waits).
_BLIND_CALLBACKS = frozenset(
    {
        "CheckpointBinder",
        "DeviceStatsMonitor",
        "EarlyStopping",
        "LearningRateMonitor",
        "ModelCheckpoint",
        "ModelSummary",
        "RichModelSummary",
        "RichProgressBar",
        "SaveConfigCallback",
        "ScaleMonitor",
        "TQDMProgressBar",
        "ThroughputMonitor",
        "Timer",
    }
)
_LIGHTNING_PACKAGES = ("lightning", "pytorch_lightning", "lightning_superscale")


def overrides(obj: Any, hooks: tuple[str, ...]) -> list[str]:
    """The hooks whose definition that `obj` uses is not in a module of Lightning's own."""
    found = []
    for hook in hooks:
        for cls in type(obj).__mro__:
            if hook in vars(cls):
                if cls.__module__.split(".")[0] not in ("lightning", "pytorch_lightning"):
                    found.append(hook)
                break
    return found


def visibility_of(module: Any, callbacks: list[Any], num_optimizers: int) -> Visibility:
    """Find out what the hooks of a LightningModule and of the Trainer's callbacks may look at."""
    return Visibility(
        why_gradients_stay=_why_gradients_stay(module, callbacks, num_optimizers),
        why_weights_awaited=_why_weights_awaited(module, callbacks),
        is_automatic=module.automatic_optimization,
    )


def _why_gradients_stay(module: Any, callbacks: list[Any], num_optimizers: int) -> str | None:
    """Why gradients stay in `param.grad` until the step; None when they may leave during backward."""
    if not module.automatic_optimization:
        return "manual optimization may read or clip param.grad at any time"
    if num_optimizers > 1:
        return "several optimizers share one backward pass"
    hooks = overrides(module, _GRAD_HOOKS)
    if hooks:
        return f"{type(module).__name__}.{hooks[0]} may read param.grad"
    for callback in callbacks:
        if type(callback).__name__ == "StochasticWeightAveraging":
            # The callback's batch-norm epoch ends with an optimizer step without a backward of its own.
            return "StochasticWeightAveraging steps once more with the last gradients"
        hooks = overrides(callback, _CALLBACK_GRAD_HOOKS)
        if hooks and not _is_blind(callback):
            return f"{type(callback).__name__}.{hooks[0]} may read param.grad"
    return None


def _why_weights_awaited(module: Any, callbacks: list[Any]) -> str | None:
    """Why new weights are waited for right after the step; None when they may arrive during the next forward."""
    if not module.automatic_optimization:
        return "manual optimization may read weights right after step()"
    hooks = overrides(module, _WEIGHT_HOOKS)
    if hooks:
        return f"{type(module).__name__}.{hooks[0]} may read weights"
    for callback in callbacks:
        if not _is_blind(callback):
            return f"callback {type(callback).__name__} may read weights"
    return None


def _is_blind(callback: Any) -> bool:
    cls = type(callback)
    return cls.__module__.split(".")[0] in _LIGHTNING_PACKAGES and cls.__name__ in _BLIND_CALLBACKS

"""One sentence per choice that was made for the user, for `explain()`."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_superscale.optim.engine import OptimizerEngine
from lightning_superscale.run.settings import RunSettings


def reasons_of(settings: RunSettings, *, is_model_compiled: bool) -> list[str]:
    """Sentences on how gradients, steps and weights move."""
    reasons = ["masters and optimizer states are on the device: offload is None"]
    if settings.engine is not None and settings.offload is not None:
        reasons = [settings.engine.how_it_steps(settings.offload, streams=settings.streams)]
    elif settings.mesh.is_single:
        return reasons
    if settings.visibility.why_gradients_stay is None:
        where_to = "for the host" if settings.offload is not None else "for the other ranks"
        reasons.append(f"gradients leave {where_to} during backward: nothing of yours reads param.grad")
    else:
        reasons.append(f"gradients stay in param.grad until the step: {settings.visibility.why_gradients_stay}")
    if settings.why_weights_awaited is not None:
        reasons.append(f"new weights are awaited right after the step: {settings.why_weights_awaited}")
    if is_model_compiled:
        reasons.append("new weights are awaited at the start of the training step: the model is compiled")
    return reasons


def reasons_of_rules(engines: Iterable[OptimizerEngine]) -> list[str]:
    """Sentences on what optimizers' rules have chosen so far, with the optimizer's number where several say any."""
    told = {number: reasons for number, engine in enumerate(engines) if (reasons := engine.rule.reasons())}
    return [
        reason if len(told) == 1 else f"optimizer {number}: {reason}"
        for number, reasons in told.items()
        for reason in reasons
    ]


def device_share(engines: Iterable[OptimizerEngine]) -> float:
    """Share of the trainable parameters that have all their states on the device, from 0 to 1."""
    numel_here = numel = 0
    for engine in engines:
        for unit, state in zip(engine.transport.units, engine.states, strict=True):
            numel_of_unit = sum(param.numel() for param in unit.params)
            numel += numel_of_unit
            numel_here += 0 if "host" in state.homes else numel_of_unit
    return numel_here / max(1, numel)


def where_states_are(engines: Iterable[OptimizerEngine], settings: RunSettings, *, has_adapted: bool) -> list[str]:
    """A sentence on the share of the parameters that steps on the device although there is a host to step on."""
    offload = settings.offload
    if offload is None:
        return []
    if offload.gpu_fraction != "auto":
        why = f"gpu_fraction={offload.gpu_fraction}"
    elif settings.device.type != "cuda":
        why = "gpu_fraction='auto', and device memory is host memory here"
    elif not has_adapted:
        why = "gpu_fraction='auto' waits for the first step, to see what memory it leaves free"
    else:
        why = "gpu_fraction='auto': what fits the memory that the first step left free"
    return [f"{device_share(engines):.0%} of the trainable parameters step on the device ({why})"]

"""Resolves the arguments of a SuperScalePrecision to dtypes, and refuses combinations that can't work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Optional

import torch
from torch.optim import Optimizer

from lightning_superscale.config import OffloadConfig, ZeroConfig
from lightning_superscale.config.values import Between, check_arguments, shown
from lightning_superscale.errors import SettingError, SuperScaleError, did_you_mean
from lightning_superscale.ops.state_dtypes import StateDtypes
from lightning_superscale.optim.grad_dtypes import GradientDtypes
from lightning_superscale.optim.param_update import why_not_native

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true")
Seed = Annotated[int, Between(0, 2**63 - 1)]
PrecisionName = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true"]
# What Lightning's Trainer takes the short names for.
_LIGHTNING_SHORT = {"16": "16-mixed", "32": "32-true", "64": "64-true", "bf16": "bf16-mixed"}
_WEIGHTS = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {**{dtype: name for name, dtype in _DTYPES.items()}, torch.float64: "fp64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionChoices:
    """Dtypes of one run.

    Attributes:
        name: Lightning's name of the precision.
        weights: dtype of weights in forward and backward.
        autocast: dtype of `torch.autocast` around forward; None without autocast.
        states: dtypes of master weights and moments, and how values are rounded to them.
        gradients: dtypes in which micro-batches are summed up and in which ranks reduce.
    """

    name: str
    weights: torch.dtype
    autocast: torch.dtype | None
    states: StateDtypes
    gradients: GradientDtypes

    def describe(self) -> str:
        """The precision in words: its name, then every choice that the name does not say already."""
        states, gradients = self.states, self.gradients
        words = []
        if self.autocast is not None and self.name in _WEIGHTS:
            words.append("under autocast")
        if states.masters == torch.bfloat16:
            words.append("masters in bf16" + (", compensated" if states.is_compensated else ""))
        if states.moments == torch.bfloat16:
            words.append("optimizer states in bf16")
        if states.is_stochastic:
            words.append(f"rounded stochastically, seed {states.seed}")
        if gradients.accumulation is not None:
            words.append(f"gradients summed up in {_NAMES[gradients.accumulation]}")
        if gradients.reduction is not None:
            words.append(f"reduced in {_NAMES[gradients.reduction]}")
        return ", ".join([self.name, *words])


def check_precision(precision: object) -> None:
    """Refuse names of precisions that the engines don't step, before anything is built.

    Raises:
        SuperScaleError: names the precision and the ones to use.
    """
    if precision in PRECISIONS:
        return
    names = ", ".join(map(repr, PRECISIONS))
    hint = _LIGHTNING_SHORT.get(str(precision))
    guess = did_you_mean(str(precision), PRECISIONS) if hint is None else f"; did you mean {hint!r}?"
    raise SettingError(f"precision={shown(precision)} is not one of {names}{guess}")


def choose(
    precision: str,
    *,
    master_weights: str = "fp32",
    optimizer_states: str = "fp32",
    gradient_accumulation: str = "auto",
    gradient_reduction: str = "auto",
    stochastic_rounding: Optional[bool] = None,
    kahan: bool = False,
    autocast: Optional[bool] = None,
    seed: Seed = 0,
) -> PrecisionChoices:
    """Resolve the arguments of a SuperScalePrecision, whose docstring says what each means.

    Raises:
        SuperScaleError: a value that the argument does not take, or a combination that can't work; says what to use.
    """
    check_precision(precision)
    check_arguments(
        "SuperScalePrecision",
        choose,
        stochastic_rounding=stochastic_rounding,
        kahan=kahan,
        autocast=autocast,
        seed=seed,
    )
    weights = _WEIGHTS.get(precision, torch.float32)
    states = StateDtypes(
        masters=_master_dtype(precision, weights, master_weights),
        moments=_moment_dtype(optimizer_states),
        is_compensated=kahan,
        seed=seed,
    )
    if kahan and states.masters != torch.bfloat16:
        raise _refusal("kahan", True, f"master_weights={master_weights!r} lose nothing that it could keep", "remove it")
    if stochastic_rounding and not states.is_low_precision:
        why = "masters and optimizer states are fp32, and nothing is rounded to bf16"
        raise _refusal("stochastic_rounding", True, why, "set master_weights or optimizer_states to 'bf16'")
    is_stochastic = states.is_low_precision if stochastic_rounding is None else stochastic_rounding
    return PrecisionChoices(
        name=precision,
        weights=weights,
        autocast=_autocast_dtype(precision, autocast),
        states=StateDtypes(states.masters, states.moments, is_stochastic, kahan, seed),
        gradients=GradientDtypes(
            _accumulation_dtype(precision, weights, gradient_accumulation),
            _reduction_dtype(precision, weights, gradient_reduction),
        ),
    )


def _refusal(key: str, value: object, why: str, remedy: str) -> SuperScaleError:
    return SuperScaleError(f"SuperScalePrecision.{key}={value!r} can't work: {why}. To mend it, {remedy}.")


def _dtype(key: str, value: object, allowed: Sequence[str]) -> torch.dtype | None:
    """The dtype of a name; None for 'auto'."""
    if value not in allowed:
        names = ", ".join(map(repr, allowed))
        hint = did_you_mean(value, allowed) if isinstance(value, str) else ""
        raise SettingError(f"SuperScalePrecision.{key} must be one of {names}, found {shown(value)}{hint}")
    return _DTYPES.get(str(value))


def _master_dtype(precision: str, weights: torch.dtype, value: str) -> torch.dtype:
    if value == "fp16":
        why = "fp16 has no numbers between 6e-8 and 0, where most updates are"
        raise _refusal("master_weights", value, why, "use 'fp32', or 'bf16' with precision='bf16-true'")
    if _dtype("master_weights", value, ("fp32", "bf16")) == torch.float32:
        return torch.float32
    if weights.itemsize >= 4:
        why = f"the weights of precision={precision!r} are {_NAMES[weights]} and their own masters"
        raise _refusal("master_weights", value, why, "use precision='bf16-true', or remove it")
    if weights == torch.float16:
        why = "fp16 weights have three binary digits more than a bf16 master of theirs"
        raise _refusal("master_weights", value, why, "use precision='bf16-true', or remove it")
    return torch.bfloat16


def _moment_dtype(value: str) -> torch.dtype:
    if value == "fp16":
        why = "the squares of gradients below 2e-4 are zero in fp16"
        raise _refusal("optimizer_states", value, why, "use 'bf16'")
    return _dtype("optimizer_states", value, ("fp32", "bf16")) or torch.float32


def _accumulation_dtype(precision: str, weights: torch.dtype, value: str) -> torch.dtype | None:
    dtype = _dtype("gradient_accumulation", value, ("auto", *_DTYPES))
    if dtype is None or dtype == weights:
        return None
    if weights == torch.float64:
        raise _refusal("gradient_accumulation", value, "it has fewer digits than gradients in fp64", "remove it")
    if dtype != torch.float32:
        why = f"gradients of precision={precision!r} are {_NAMES[weights]}, which has digits or a range that it lacks"
        raise _refusal("gradient_accumulation", value, why, f"use 'fp32' or 'auto', which is {_NAMES[weights]!r}")
    return dtype


def _reduction_dtype(precision: str, weights: torch.dtype, value: str) -> torch.dtype | None:
    dtype = _dtype("gradient_reduction", value, ("auto", *_DTYPES))
    if dtype is not None and weights == torch.float64:
        raise _refusal("gradient_reduction", value, "it has fewer digits than gradients in fp64", "remove it")
    if dtype == torch.float16 and not precision.startswith("16-"):
        why = f"gradients overflow in fp16 unless a loss scale watches, which precision={precision!r} has not"
        raise _refusal("gradient_reduction", value, why, "use 'bf16'")
    if dtype == torch.bfloat16 and weights == torch.float16:
        why = "gradients of fp16 weights have three binary digits more"
        raise _refusal("gradient_reduction", value, why, "use 'fp16', 'fp32' or 'auto'")
    return dtype


def _autocast_dtype(precision: str, value: Optional[bool]) -> torch.dtype | None:
    if precision in _AUTOCAST:
        if value is False:
            raise _refusal("autocast", value, f"precision={precision!r} is autocast", "use precision='32-true'")
        return _AUTOCAST[precision]
    if value and precision in ("32-true", "64-true"):
        why = f"precision={precision!r} names no 16-bit dtype to cast to"
        raise _refusal("autocast", value, why, "use precision='bf16-mixed' or '16-mixed'")
    return _WEIGHTS.get(precision) if value else None


def check_with_run(
    choices: PrecisionChoices,
    optimizers: Sequence[Optimizer],
    zero: ZeroConfig,
    offload: OffloadConfig | None,
    world_size: int,
) -> None:
    """Refuse choices that this run's optimizers or its way of sharding can't follow.

    Raises:
        SuperScaleError: names the argument, the reason and what to use.
    """
    states, gradients = choices.states, choices.gradients
    for optimizer in optimizers:
        reason = why_not_native(optimizer)
        if reason is not None and type(optimizer).__name__ != "_MockOptimizer":
            _check_own_step(type(optimizer).__name__, reason, states)
    if states.is_low_precision and offload is not None and offload.link_dtype == "fp32":
        key = "master_weights" if states.masters == torch.bfloat16 else "optimizer_states"
        raise SuperScaleError(
            f"OffloadConfig.link_dtype='fp32' can't work with SuperScalePrecision.{key}='bf16': the host rounds such "
            "states where it steps, and new weights with them. Use link_dtype='auto' or 'weights', or fp32 masters and "
            "states."
        )
    if gradients.accumulation is None or zero.reduces_once or world_size == 1:
        return
    is_narrow = gradients.reduction is not None and gradients.reduction.itemsize < 4
    if offload is not None or is_narrow:
        where = "the host sums" if offload is not None else "ranks sum"
        raise SuperScaleError(
            f"SuperScalePrecision.gradient_accumulation='fp32' can't work with zero={zero.stage}: every micro-batch is "
            f"reduced, and {where} what arrives in 16 bits. Set ZeroConfig.no_sync=True, which sums up before ranks "
            "talk, or remove gradient_accumulation."
        )


def _check_own_step(name: str, reason: str, states: StateDtypes) -> None:
    if not states.is_low_precision:
        return
    if states.masters != states.moments:
        raise SuperScaleError(
            f"{name} steps through its own code ({reason}), and keeps its states in the masters' dtype: expected "
            f"master_weights and optimizer_states alike, found {_NAMES[states.masters]!r} and "
            f"{_NAMES[states.moments]!r}. Use Adam or AdamW, or give both the same."
        )
    if states.is_stochastic or states.is_compensated:
        raise SuperScaleError(
            f"{name} steps through its own code ({reason}), which rounds to nearest: bf16 masters lose small updates. "
            "Use Adam or AdamW, or fp32 masters and states, or say stochastic_rounding=False (and no kahan) to accept "
            "that."
        )

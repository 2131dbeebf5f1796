"""Checks before anything changes: modules and optimizers that can't be trained, and facts that ranks must share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_superscale.config import OffloadConfig, SequenceConfig, ZeroConfig
from lightning_superscale.errors import SequenceParallelError, SettingError, SuperScaleError
from lightning_superscale.ops.state_dtypes import WIDE_DTYPES
from lightning_superscale.zero.fsdp2.wrap import wrap_plan

# torch's optimizers that treat every element by itself, so that rows can be stepped apart.
_ELEMENTWISE = frozenset(
    {"ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"}
)


_TRAINED = (torch.float32, torch.bfloat16, torch.float16, *WIDE_DTYPES)


WhyOneOptimizer = Callable[[nn.Parameter], str | None]
"""Why a parameter can't be in two optimizers, each of which would step it; None where it can."""


def check_parameters(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    fqn_of: Mapping[nn.Parameter, str],
    why_one_optimizer: WhyOneOptimizer,
) -> None:
    """Refuse modules and optimizers that can't be trained.

    Raises:
        SuperScaleError: names the parameter or optimizer and the remedy.
    """
    name = type(module).__name__
    lazy = [fqn for param, fqn in fqn_of.items() if is_lazy(param)]
    if lazy:
        raise SuperScaleError(
            f"parameter {lazy[0]!r} has no shape yet. Run one batch through {name} in configure_model(), so that its "
            "lazy modules are initialised before the optimizer's memory is planned."
        )
    _check_owners(name, optimizers, fqn_of, why_one_optimizer)


def check_verify(sequence: SequenceConfig | None, *, is_automatic: bool) -> None:
    """Refuse to run a training step on trial that steps by itself.

    Raises:
        SequenceParallelError: the config asks for it, and optimization is manual.
    """
    if sequence is not None and sequence.verify is not None and not is_automatic:
        raise SequenceParallelError(
            f"SequenceConfig.verify={sequence.verify!r} runs the training step of the first batch twice and forgets "
            "it, and this module's training step takes optimizer steps itself (automatic_optimization=False), which "
            "can't be forgotten. Use automatic optimization for a first run, or leave verify out."
        )


def check_trainable(module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Refuse a backward that can make no gradient that an optimizer steps.

    What is frozen when training is set up may be unfrozen before the first step, as Lightning's BaseFinetuning does.

    Raises:
        SuperScaleError: names the module, and trainable parameters that no optimizer holds.
    """
    name = type(module).__name__
    params = dict(module.named_parameters())
    trainable = [fqn for fqn, param in params.items() if param.requires_grad]
    if not trainable:
        raise SuperScaleError(
            f"{name} has no trainable parameters: expected at least one with requires_grad=True, found "
            f"{len(params)} parameters, all frozen. Unfreeze what is to be trained, or use trainer.validate()."
        )
    owned = [param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]
    if owned and not any(param.requires_grad for param in owned):
        raise SuperScaleError(
            f"none of the {len(owned)} parameters that the optimizers of {name} hold is trainable; "
            f"trainable ones of the module are, for example, {', '.join(trainable[:3])}."
        )


def _check_owners(
    name: str,
    optimizers: Sequence[Optimizer],
    fqn_of: Mapping[nn.Parameter, str],
    why_one_optimizer: WhyOneOptimizer,
) -> None:
    owner: dict[nn.Parameter, int] = {}
    for number, optimizer in enumerate(optimizers):
        if type(optimizer).__name__ == "_MockOptimizer":
            continue
        for group_number, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                where = f"optimizer {number} ({type(optimizer).__name__}), parameter group {group_number}"
                if param not in fqn_of:
                    raise SuperScaleError(
                        f"{where} holds a parameter of shape {tuple(param.shape)} that {name} does not own. "
                        "Build the optimizer from the parameters of the module that trains, in a LightningModule's "
                        "configure_optimizers from self.parameters(), and register every module in it as an attribute."
                    )
                reason = why_one_optimizer(param) if owner.setdefault(param, number) != number else None
                if reason is not None:
                    raise SuperScaleError(
                        f"parameter {fqn_of[param]!r} is in optimizer {owner[param]} and in {where}. Give every "
                        f"parameter to one optimizer: {reason}."
                    )
                if param.requires_grad and param.dtype not in _TRAINED:
                    raise SuperScaleError(
                        f"trainable parameter {fqn_of[param]!r} is {param.dtype}; expected torch.float32, "
                        "bfloat16, float16, float64, complex64 or complex128. Convert it, or freeze it."
                    )


def check_wrap(module: nn.Module, zero: ZeroConfig) -> None:
    """Refuse names of groups that the module does not have, also on one rank, which gathers nothing.

    Raises:
        SuperScaleError: a name in ZeroConfig.wrap matches nothing, or names a container that has no forward.
    """
    if zero.wrap is not None:
        wrap_plan(module, zero.wrap)


def check_optimizers_over_ranks(optimizers: Sequence[Optimizer], zero: ZeroConfig, world_size: int) -> None:
    """Refuse optimizers whose steps several ranks can't share.

    Raises:
        SuperScaleError: names the optimizer and the stage to use.
    """
    if world_size == 1:
        return
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if name == "LBFGS":
            raise SuperScaleError(
                f"LBFGS evaluates the loss itself, and {world_size} ranks have {world_size} losses. Train on one "
                "device, or use another optimizer."
            )
        is_known = type(optimizer).__module__.startswith("torch.optim") and name in _ELEMENTWISE
        if zero.stage > 0 and not is_known and not zero.assume_elementwise and name != "_MockOptimizer":
            raise SuperScaleError(
                f"zero={zero.stage} steps rows of each parameter on different ranks, which is right only for an "
                f"optimizer that treats every element by itself; {name} is not known to. Use zero=0, or set "
                "ZeroConfig.assume_elementwise=True if it does."
            )


def refuse_averaging(callbacks: Sequence[Any]) -> None:
    """Refuse callbacks that keep a second copy of all weights, or cut whole weights, which stage 3 shards.

    Raises:
        SuperScaleError: names the callback and the stage to use.
    """
    for callback in callbacks:
        names = {cls.__name__ for cls in type(callback).__mro__}
        if names & {"WeightAveraging", "StochasticWeightAveraging"}:
            raise SuperScaleError(
                f"{type(callback).__name__} averages whole weights, and with zero=3 every rank has only its rows of "
                "them. Use ShardedEMA, or zero=2."
            )
        if "ModelPruning" in names:
            raise SuperScaleError(
                f"{type(callback).__name__} ranks the elements of whole weights and puts masked ones in their place, "
                "and with zero=3 every rank has only its rows of them. Use zero=2, or prune before or after training."
            )


def check_clip_value(key: str, value: float | None) -> None:
    """Refuse limits of gradients that would leave them unclipped without a word, or make them NaN.

    Raises:
        SettingError: a limit that is negative or NaN.
    """
    if value is not None and not value >= 0:
        raise SettingError(f"{key} must be a number of at least 0 or None, found {value!r}. None and 0 clip nothing.")


def facts_of_run(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    zero: ZeroConfig,
    offload: OffloadConfig | None,
    precision: str,
    sequence: SequenceConfig | None = None,
) -> dict[str, str]:
    """Facts that must be the same on every rank, by the names that an error gives them."""
    facts = {"zero": repr(zero), "offload": repr(offload), "sequence": repr(sequence)}
    facts |= {"precision": precision, "torch": torch.__version__}
    for number, optimizer in enumerate(optimizers):
        facts[f"optimizer {number}"] = f"{type(optimizer).__name__}({_group_facts(optimizer)})"
    for fqn, param in module.named_parameters():
        state = "trainable" if param.requires_grad else "frozen"
        placed = f" {param.placements}" if isinstance(param, DTensor) else ""
        facts[f"parameter {fqn!r}"] = f"{tuple(param.shape)} {param.dtype} {state}{placed}"
    for fqn, buffer in module.named_buffers():
        facts[f"buffer {fqn!r}"] = f"{tuple(buffer.shape)} {buffer.dtype}"
    return facts


def _group_facts(optimizer: Optimizer) -> str:
    groups: list[dict[str, Any]] = optimizer.param_groups
    return "; ".join(
        f"{len(group['params'])} parameters, "
        + ", ".join(f"{key}={group[key]}" for key in sorted(group) if key != "params")
        for group in groups
    )

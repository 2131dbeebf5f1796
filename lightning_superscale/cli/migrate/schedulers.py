"""DeepSpeed's learning rate schedules as lambdas of torch's LambdaLR, which give every step the same rate.

A lambda multiplies the optimizer's own learning rate, so each schedule also says what that has to be. DeepSpeed's
warm-up schedules set the first step's rate when they are built and count from zero afterwards, so that the second
step repeats it: `step - 1` below. Formulas: https://deepspeed.readthedocs.io/en/latest/schedulers.html.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_superscale.cli.migrate.target import Source
from lightning_superscale.errors import SettingError, did_you_mean


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule as code.

    Attributes:
        lines: lines that define `factor(step)`, the multiple of the optimizer's rate at optimizer step 0, 1, ...
        lr: learning rate that the optimizer must be built with; None for the one that it has.
        params: every parameter of the schedule, with DeepSpeed's default.
        dropped: by parameter, what is not carried over.
    """

    lines: tuple[str, ...]
    lr: Any
    dropped: Mapping[str, str]


_WARMUP = {"warmup_num_steps": 1000, "warmup_type": "log"}
# By schedule, its parameters with DeepSpeed's defaults.
PARAMS: dict[str, dict[str, Any]] = {
    "WarmupLR": {"warmup_min_lr": 0.0, "warmup_max_lr": None, **_WARMUP},
    "WarmupDecayLR": {"total_num_steps": None, "warmup_min_lr": 0.0, "warmup_max_lr": 0.001, **_WARMUP},
    "WarmupCosineLR": {"total_num_steps": None, "warmup_min_ratio": 0.0, "cos_min_ratio": 0.0001, **_WARMUP},
    "LRRangeTest": {
        "lr_range_test_min_lr": 1e-3,
        "lr_range_test_step_size": 2000,
        "lr_range_test_step_rate": 1.0,
        "lr_range_test_staircase": False,
    },
    "OneCycle": {
        "cycle_min_lr": None,
        "cycle_max_lr": None,
        "decay_lr_rate": 0.0,
        "cycle_first_step_size": 2000,
        "cycle_second_step_size": None,
        "cycle_first_stair_count": 0,
        "cycle_second_stair_count": None,
        "decay_step_size": 0,
        "cycle_momentum": True,
        "cycle_min_mom": 0.8,
        "cycle_max_mom": 0.9,
        "decay_mom_rate": 0.0,
    },
}
# Parameters of every schedule that a resume sets.
_POSITION = "last_batch_iteration"


def schedule_of(name: str, given: Mapping[str, Any], lr: Any) -> Schedule:
    """The code of one of DeepSpeed's schedules.

    Args:
        name: its class.
        given: its parameters; expressions in Python where a value is not known yet.
        lr: the optimizer's learning rate in the configuration; None where it names none.

    Raises:
        SettingError: an unknown schedule, or parameters per parameter group.
    """
    if name not in PARAMS:
        raise SettingError(f"scheduler.type {name!r} is not of DeepSpeed{did_you_mean(name, PARAMS)}")
    for key, value in given.items():
        _check(key, value)
    if "total_num_steps" in PARAMS[name] and given.get("total_num_steps") is None:
        raise SettingError(f"{name} needs total_num_steps")
    return _MAKERS[name]({**PARAMS[name], **given}, lr)


# Parameters that are no numbers.
_WORDS = ("warmup_type", "lr_range_test_staircase", "cycle_momentum")
# Parameters that lines divide by.
_DIVISORS = ("warmup_max_lr", "lr_range_test_step_size", "cycle_max_lr", "cycle_first_step_size")


def _check(key: str, value: Any) -> None:
    if isinstance(value, (list, tuple)):
        raise SettingError(f"{key} is given per parameter group; write one lambda of LambdaLR for each")
    if key in _WORDS or value is None or isinstance(value, Source):
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise SettingError(f"{key} must be a number, found {value!r}")
    if key in _DIVISORS and value <= 0:
        raise SettingError(f"{key} must be above 0, found {value!r}")


def is_param(name: str, key: str) -> bool:
    """Whether a schedule has a parameter."""
    return key == _POSITION or key in PARAMS.get(name, {})


def _warm_up(p: Mapping[str, Any], start: str, peak: str) -> list[str]:
    warm = _steps(p["warmup_num_steps"])
    share = f"at / {warm}" if p["warmup_type"] == "linear" else f"math.log(at + 1) / math.log({warm})"
    return [
        "at = max(0, step - 1)",
        f"if at < {warm}:",
        f"    return {_between(start, peak, share)}",
    ]


def _steps(given: Any) -> str:
    """The number of warm-up steps, of which DeepSpeed takes at least two."""
    return repr(max(2, given)) if isinstance(given, int) else f"max(2, {given!r})"


def _between(start: str, peak: str, share: str) -> str:
    return share if (start, peak) == ("0.0", "1.0") else f"{start} + ({peak} - {start}) * {share}"


def _num(value: Any) -> str:
    return repr(float(value)) if isinstance(value, int) else repr(value)


def _warmup_lr(p: Mapping[str, Any], lr: Any) -> Schedule:
    peak = lr if p["warmup_max_lr"] is None else p["warmup_max_lr"]
    if peak is None and p["warmup_min_lr"] != 0:
        raise SettingError("warmup_min_lr needs warmup_max_lr, or a learning rate in the optimizer section")
    head, low = _lowest(p["warmup_min_lr"], peak)
    return Schedule((*head, *_warm_up(p, low, "1.0"), "return 1.0"), peak, {})


def _lowest(value: Any, peak: Any) -> tuple[list[str], str]:
    """A line that defines the lowest share of the optimizer's rate, and how that is written."""
    return ([], "0.0") if value == 0 else ([f"low = {value!r} / {peak!r}"], "low")


def _warmup_decay(p: Mapping[str, Any], lr: Any) -> Schedule:
    peak = p["warmup_max_lr"]
    head, low = _lowest(p["warmup_min_lr"], peak)
    warm, total = _steps(p["warmup_num_steps"]), p["total_num_steps"]
    fall = f"max(0.0, ({total!r} - at) / max(1, {total!r} - {warm}))"
    return Schedule((*head, *_warm_up(p, low, "1.0"), f"return {_between(low, '1.0', fall)}"), peak, {})


def _warmup_cosine(p: Mapping[str, Any], lr: Any) -> Schedule:
    warm, total, floor = _steps(p["warmup_num_steps"]), p["total_num_steps"], _num(p["cos_min_ratio"])
    lines = [
        "if step == 0:",
        "    return 0.0",
        *_warm_up(p, _num(p["warmup_min_ratio"]), "1.0"),
        f"progress = min(1.0, (at - {warm} + 1) / max(1, {total!r} - {warm}))",
        f"return {floor} + (1.0 - {floor}) * (1.0 + math.cos(math.pi * progress)) / 2",
    ]
    return Schedule(tuple(lines), lr, {})


def _range_test(p: Mapping[str, Any], lr: Any) -> Schedule:
    size, rate = p["lr_range_test_step_size"], p["lr_range_test_step_rate"]
    interval = f"step // {size!r}" if p["lr_range_test_staircase"] else f"step / {size!r}"
    return Schedule((f"return 1.0 + {rate!r} * ({interval})",), p["lr_range_test_min_lr"], {})


def _one_cycle(p: Mapping[str, Any], lr: Any) -> Schedule:
    needed = ("cycle_min_lr", "cycle_max_lr", "cycle_first_step_size")
    unknown = [key for key, value in p.items() if isinstance(value, Source) or (key in needed and value is None)]
    if unknown:
        raise SettingError(f"OneCycle needs numbers; found none for {', '.join(unknown)}")
    first = p["cycle_first_step_size"]
    second = first if p["cycle_second_step_size"] is None else p["cycle_second_step_size"]
    head, low = _lowest(p["cycle_min_lr"], p["cycle_max_lr"])
    stairs = p["cycle_first_stair_count"], p["cycle_second_stair_count"]
    up = _stair(f"step / {first!r}", stairs[0])
    down = _stair(f"({first + second!r} - step) / {second!r}", stairs[0] if stairs[1] is None else stairs[1])
    lines = [*head, f"if step <= {first!r}:", f"    return {_between(low, '1.0', up)}"]
    if second:
        lines += [f"if step <= {first + second!r}:", f"    return {_between(low, '1.0', down)}"]
    decays = p["decay_lr_rate"] and p["decay_step_size"]
    decay = (
        f" / (1.0 + {p['decay_lr_rate']!r} * (step - {first + second!r}) / {p['decay_step_size']!r})" if decays else ""
    )
    lines.append(f"return {low}{decay}")
    dropped = {}
    if p["cycle_momentum"]:
        why = "betas stay as the optimizer has them: torch.optim.lr_scheduler.CyclicLR(cycle_momentum=True) cycles them"
        dropped = dict.fromkeys(("cycle_momentum", "cycle_min_mom", "cycle_max_mom", "decay_mom_rate"), why)
    return Schedule(tuple(lines), p["cycle_max_lr"], dropped)


def _stair(share: str, count: int) -> str:
    return f"math.floor({count!r} * {share}) / {count!r}" if count else share


_MAKERS: dict[str, Callable[[Mapping[str, Any], Any], Schedule]] = {
    "WarmupLR": _warmup_lr,
    "WarmupDecayLR": _warmup_decay,
    "WarmupCosineLR": _warmup_cosine,
    "LRRangeTest": _range_test,
    "OneCycle": _one_cycle,
}

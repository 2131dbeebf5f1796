"""Optimizer and scheduler sections of DeepSpeed as the lines of `configure_optimizers`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from lightning_superscale.cli.migrate.rows import Fate, Row, became, left, none, retired, same
from lightning_superscale.cli.migrate.schedulers import Schedule, is_param, schedule_of
from lightning_superscale.cli.migrate.target import Source
from lightning_superscale.errors import SettingError, did_you_mean

# DeepSpeed's own optimizers are found by their lower-case name; any other is looked up in torch.optim as it is written.
_ADAMS = ("adam", "adamw")
_RETIRED = ("onebitadam", "zerooneadam", "onebitlamb")
_TORCHS = (
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "NAdam", "RAdam", "RMSprop",
    "Rprop", "SGD", "SparseAdam",
)  # fmt: skip
_ABSENT = {
    "lamb": "torch has no Lamb; another package's works where it is given whole parameters (zero=0), or AdamW",
    "lion": "torch has no Lion; another package's treats every element by itself: ZeroConfig(assume_elementwise=True)",
    "muon": "torch.optim.Muon needs whole matrices: zero=0, or AdamW",
    "muadam": "use mup.MuAdam in configure_optimizers()",
    "muadamw": "use mup.MuAdamW in configure_optimizers()",
    "musgd": "use mup.MuSGD in configure_optimizers()",
}
_ADAM_PARAMS = ("lr", "betas", "eps", "weight_decay", "amsgrad")
_SWITCHES = {
    "torch_adam": "Adam and AdamW take the native kernel, with the numbers of torch's",
    "adam_w_mode": "which of Adam and AdamW it is",
    "adamw_mode": "which of Adam and AdamW it is",
    "fp32_optimizer_states": "optimizer states are fp32",
}
_LINES_END = 'return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}'


class OptimizerSections:
    """The optimizer and scheduler sections of a configuration, as rows and as code.

    Args:
        optimizer: DeepSpeed's section, with `type` and `params`; empty without.
        scheduler: likewise.

    Attributes:
        rows: what became of every key.
        lines: lines of `configure_optimizers`; empty where neither section gives any.
    """

    def __init__(self, optimizer: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
        self.rows: list[Row] = []
        self.lines: list[str] = []
        self._params: dict[str, Any] = {}
        self._class_name = self._read_optimizer(optimizer) if optimizer else ""
        schedule = self._read_scheduler(scheduler) if scheduler else None
        if self._class_name or schedule is not None:
            self.lines = self._code(schedule)

    def _add(self, key: str, value: Any, fate: Fate) -> None:
        self.rows.append(Row(key, value, fate))

    # The optimizer

    def _read_optimizer(self, section: Mapping[str, Any]) -> str:
        name, params = str(section.get("type", "")), dict(section.get("params") or {})
        class_name, fate = _class_of(name, params)
        self._add("optimizer.type", name, fate)
        for key in section:
            if key == "legacy_fusion":
                self._add("optimizer.legacy_fusion", section[key], same("Adam and AdamW take the native kernel"))
            elif key not in ("type", "params"):
                self._add(f"optimizer.{key}", section[key], Fate("unknown", "expected type and params"))
        self._read_params(class_name, params, is_retired=fate.outcome == "retired")
        # DeepSpeed's Adam decays nothing by default, torch's AdamW by 0.01.
        if class_name == "AdamW" and "weight_decay" not in self._params and not params.get("torch_adam"):
            self._params["weight_decay"] = 0.0
        return class_name

    def _read_params(self, class_name: str, params: Mapping[str, Any], *, is_retired: bool) -> None:
        is_adam = class_name in ("Adam", "AdamW")
        for key, value in params.items():
            where = f"optimizer.params.{key}"
            if key in _SWITCHES:
                self._add(where, value, same(_SWITCHES[key]))
            elif key == "bias_correction" and is_adam:
                fate = (
                    same("torch's Adam corrects the bias") if value else none("torch's Adam always corrects the bias")
                )
                self._add(where, value, fate)
            elif key == "max_grad_norm":
                self._add(where, value, none("DeepSpeed refuses it; Trainer(gradient_clip_val=...) clips"))
            elif not class_name:
                self._add(where, value, none("an argument of that optimizer"))
            elif is_adam and key not in _ADAM_PARAMS and is_retired:
                self._add(where, value, retired("an argument of that optimizer"))
            elif is_adam and key not in _ADAM_PARAMS:
                self._add(where, value, Fate("unknown", f"torch.optim.{class_name} has no such argument"))
            elif value == "auto":
                self._params[key] = Source(f"self.hparams.{key}")
                self._add(where, value, left(f"{key}=self.hparams.{key}: save_hyperparameters() with {key} of yours"))
            else:
                self._params[key] = tuple(value) if isinstance(value, list) else value
                self._add(where, value, became(f"{key}={self._params[key]!r}"))

    # The scheduler

    def _read_scheduler(self, section: Mapping[str, Any]) -> Schedule | None:
        name, params = str(section.get("type", "")), dict(section.get("params") or {})
        for key in section:
            if key not in ("type", "params"):
                self._add(f"scheduler.{key}", section[key], Fate("unknown", "expected type and params"))
        given = {key: _known(key, value) for key, value in params.items() if is_param(name, key)}
        given.pop("last_batch_iteration", None)
        try:
            schedule = schedule_of(name, given, self._params.get("lr"))
        except SettingError as error:
            self._add("scheduler.type", name, none(str(error)))
            for key, value in params.items():
                self._add(f"scheduler.params.{key}", value, none("of that scheduler"))
            return None
        self._add("scheduler.type", name, became("torch.optim.lr_scheduler.LambdaLR, with the same rate at every step"))
        for key, value in params.items():
            self._add(f"scheduler.params.{key}", value, self._fate_of_param(name, key, value, schedule))
        return schedule

    def _fate_of_param(self, name: str, key: str, value: Any, schedule: Schedule) -> Fate:
        if key == "last_batch_iteration":
            return same("a checkpoint restores the scheduler's position")
        if not is_param(name, key):
            return Fate("unknown", f"{name} has no such parameter")
        if key in schedule.dropped:
            return none(schedule.dropped[key])
        if value == "auto":
            return left("the lines take what accelerate fills in: self.hparams, or the Trainer's number of steps")
        return became("a number in the schedule's lines")

    # Code

    def _code(self, schedule: Schedule | None) -> list[str]:
        params = dict(self._params)
        if schedule is not None and schedule.lr is not None:
            params = {"lr": schedule.lr, **{key: value for key, value in params.items() if key != "lr"}}
        arguments = "".join(f", {key}={value!r}" for key, value in params.items())
        built = f"torch.optim.{self._class_name}(self.parameters(){arguments})"
        if not self._class_name:
            rate = "" if schedule is None or schedule.lr is None else f", built with lr={schedule.lr!r}"
            built = f"self.make_optimizer()  # yours{rate}"
        body = [f"optimizer = {built}"]
        if schedule is None:
            body.append("return optimizer")
        else:
            body += [*_assignments(schedule), "", "def factor(step):", *(f"    {line}" for line in schedule.lines), ""]
            body += ["scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)", _LINES_END]
        uses_math = any("math." in line for line in body)
        head = (["import math", ""] if uses_math else []) + ["import torch", ""]
        code = ["def configure_optimizers(self):", *textwrap.indent("\n".join(body), "    ").split("\n")]
        return [line for line in head if line] + ["", ""] + code


def _class_of(name: str, params: Mapping[str, Any]) -> tuple[str, Fate]:
    """The class in torch.optim of a name that DeepSpeed takes, "" where there is none, and what to say of it."""
    lower = name.lower()
    if lower in _ADAMS:
        # DeepSpeed's "Adam" decays weights as AdamW does, unless told otherwise.
        class_name = "AdamW" if lower == "adamw" or params.get("adam_w_mode", True) else "Adam"
        why = ", as DeepSpeed's Adam is unless adam_w_mode is false" if class_name.lower() != lower else ""
        return class_name, became(f"torch.optim.{class_name}{why}")
    if lower in _RETIRED:
        return "AdamW", retired("DeepSpeed removed it in 2026-09 (its issue 8489); the lines make AdamW")
    if lower in _ABSENT:
        return "", none(_ABSENT[lower])
    class_name = "Adagrad" if lower == "adagrad" else name
    if class_name in _TORCHS:
        return class_name, became(f"torch.optim.{class_name}")
    return "", Fate("unknown", f"neither DeepSpeed nor torch.optim has such an optimizer{did_you_mean(name, _TORCHS)}")


# What transformers and accelerate fill in for "auto", where that is not the user's own number.
_FILLED_IN = {
    "warmup_type": "log",
    "warmup_min_lr": 0,
    "warmup_max_lr": Source("self.hparams.lr"),
    "total_num_steps": Source("total_num_steps"),
}


def _known(key: str, value: Any) -> Any:
    """A parameter of a schedule; a name in the code where a number will be known later."""
    return _FILLED_IN.get(key, Source(key)) if value == "auto" else value


def _assignments(schedule: Schedule) -> list[str]:
    """Lines that define the names that a schedule's lines use."""
    text = "\n".join(schedule.lines)
    names = [key for key in ("total_num_steps", "warmup_num_steps", "warmup_min_ratio", "cos_min_ratio") if key in text]
    values = {"total_num_steps": "self.trainer.estimated_stepping_batches"}
    return [f"{name} = {values.get(name, f'self.hparams.{name}')}" for name in names]

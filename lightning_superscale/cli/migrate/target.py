"""What is printed: settings of a Trainer with our strategy, as Python or as YAML of LightningCLI."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

# Lightning's own default arguments of a strategy are registered under these names, with nothing else set.
_NAMES: list[tuple[str, dict[str, Any]]] = [
    ("superscale", {}),
    ("zero1", {"zero": 1}),
    ("zero2", {"zero": 2}),
    ("zero3", {"zero": 3}),
    ("superoffload", {"zero": 2, "offload": "superoffload"}),
    ("zenflow", {"zero": 2, "offload": "zenflow"}),
]


@dataclass(frozen=True, slots=True)
class Source:
    """An argument that is known as Python code only, such as `timedelta(hours=1)`."""

    text: str

    def __repr__(self) -> str:
        return self.text


@dataclass(slots=True)
class Target:
    """Settings of a Trainer, of its strategy and of its precision plugin.

    Attributes:
        zero: fields of ZeroConfig; "stage" always.
        offload: fields of OffloadConfig; empty without offloading.
        sequence: fields of SequenceConfig; empty without.
        strategy: other arguments of SuperScaleStrategy.
        precision: the Trainer's precision; None for its default.
        dtypes: arguments of SuperScalePrecision beside the precision.
        scaler: arguments of torch.amp.GradScaler, with fp16.
        trainer: other arguments of the Trainer.
        optimizers: lines of `configure_optimizers`; empty where the configuration made no optimizer.
    """

    zero: dict[str, Any] = field(default_factory=lambda: {"stage": 0})
    offload: dict[str, Any] = field(default_factory=dict)
    sequence: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    precision: str | None = None
    dtypes: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    optimizers: list[str] = field(default_factory=list)

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.zero["stage"])

    def init_args(self) -> dict[str, Any]:
        """Arguments of SuperScaleStrategy, each as short as it can be said."""
        found: dict[str, Any] = {}
        if self.zero != {"stage": 0}:
            found["zero"] = _short(self.zero, "stage")
        if self.offload:
            found["offload"] = _short(self.offload, "engine")
        if self.sequence:
            found["sequence"] = _short(self.sequence, "size")
        return {**found, **self.strategy}

    def name(self) -> str | None:
        """The registered name that stands for these arguments; None where none does."""
        arguments = self.init_args()
        return next((name for name, stands_for in _NAMES if stands_for == arguments), None)

    def python(self) -> str:
        """Imports and the Trainer's construction."""
        name, plugin = self.name(), self._has_plugin
        ours = [] if name is None else ["import lightning_superscale"]
        classes = ["SuperScalePrecision"] * plugin + ["SuperScaleStrategy"] * (name is None)
        if classes and name is None:
            ours = [f"from lightning_superscale import {', '.join(classes)}"]
        elif classes:
            ours = ["import lightning_superscale", f"from lightning_superscale import {', '.join(classes)}"]
        if ours[0] == "import lightning_superscale":
            ours[0] += "  # registers the strategy's name"
        imports = ["import lightning as L"] + (["import torch"] if self.scaler else []) + ours
        imports += ["from datetime import timedelta"] if "timedelta" in repr(self.strategy) else []
        flags = {"strategy": repr(name) if name else f"SuperScaleStrategy({_arguments(self.init_args())})"}
        if plugin:
            flags["plugins"] = f"[SuperScalePrecision({self._plugin_arguments()})]"
        elif self.precision is not None:
            flags["precision"] = repr(self.precision)
        flags.update({key: repr(value) for key, value in self.trainer.items()})
        body = "".join(f"    {key}={text},\n" for key, text in flags.items())
        return "\n".join([*sorted(imports, key=_import_order), "", f"trainer = L.Trainer(\n{body})"])

    def yaml(self) -> str:
        """A `trainer:` section for LightningCLI.

        Arguments that are known as Python code only are left out; the caller has shown them.
        """
        name = self.name()
        given = {key: value for key, value in self.init_args().items() if not isinstance(value, Source)}
        strategy: Any = name or {"class_path": "lightning_superscale.SuperScaleStrategy", "init_args": given}
        section: dict[str, Any] = {"strategy": strategy}
        if self._has_plugin:
            arguments: dict[str, Any] = {"precision": self.precision or "32-true", **self.dtypes}
            if self.scaler:
                scaler = {"device": "cpu", **self.scaler}
                arguments["scaler"] = {"class_path": "torch.amp.GradScaler", "init_args": scaler}
            section["plugins"] = [{"class_path": "lightning_superscale.SuperScalePrecision", "init_args": arguments}]
        elif self.precision is not None:
            section["precision"] = self.precision
        section.update({key: value for key, value in self.trainer.items() if not isinstance(value, Source)})
        return OmegaConf.to_yaml(OmegaConf.create({"trainer": section})).rstrip()

    @property
    def _has_plugin(self) -> bool:
        return bool(self.dtypes or self.scaler)

    def _plugin_arguments(self) -> str:
        parts = [repr(self.precision or "32-true")] + ([_arguments(self.dtypes)] if self.dtypes else [])
        if self.scaler:
            # Only its numbers are read, on any device; a scaler for "cuda" has none where there is no GPU.
            parts.append(f"scaler=torch.amp.GradScaler('cpu', {_arguments(self.scaler)})")
        return ", ".join(parts)


def _short(fields: dict[str, Any], main: str) -> Any:
    """The main field's value alone, where no other field is given."""
    return fields[main] if fields.keys() == {main} else dict(fields)


def _arguments(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in values.items())


def _import_order(line: str) -> tuple[bool, str]:
    return line.startswith("from"), line

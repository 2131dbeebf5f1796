"""The options of offloading: where optimizer states live and where the optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Optional, Union

from lightning_superscale.config.values import (
    ModuleNames,
    PositiveInt,
    Share,
    ThreadCount,
    check_fields,
    config_from_mapping,
    shown,
)
from lightning_superscale.config.zenflow import ZenFlowConfig
from lightning_superscale.errors import SettingError, SuperScaleError, did_you_mean

# Name of an engine -> "module:class" of its OffloadEngine. The module is imported only when the engine is chosen.
ENGINES: dict[str, str] = {
    "cpu": "lightning_superscale.offload.cpu.engine:CpuEngine",
    "superoffload": "lightning_superscale.offload.superoffload.engine:SuperOffloadEngine",
    "zenflow": "lightning_superscale.offload.zenflow.engine:ZenFlowEngine",
}

# Engines after which a strategy is named that runs them with zero=2.
OWN_STRATEGIES = ("superoffload", "zenflow")


@dataclass(frozen=True)
class OffloadConfig:
    """Options for offloading: where optimizer states live and where the optimizer steps.

    Args:
        engine: "cpu" and "superoffload" keep fp32 master weights and optimizer states in host memory
            and step there: "cpu" after the backward pass, "superoffload" during it and the next forward. "zenflow"
            steps the most important columns on the device at every step, and the others on the host every few steps,
            while the device goes on; its result is another than AdamW's.
        bucket_mb: size of a bucket in MiB of weights, which move and step together. "auto" takes at most 64, and less
            where that gives a small model about 16 buckets.
        pin_memory: whether the host side of transfers is page-locked, where there is a CUDA device.
        cpu_threads: number of the host optimizer's worker threads. "auto" takes as few as step about as fast as all of
            this rank's cores but one, which stays with the launching thread.
        speculate: whether "superoffload" steps each bucket while backward still runs, before the gradient norm is
            known, and steps buckets again when a clip changes their gradients. "auto" does so where it leaves less of a
            step exposed than waiting for the norm, by the share of steps that are clipped and this machine's profile.
            False always waits for the norm, and overlaps with the next forward. The result is the same, bit for bit.
        weights: "stationary" keeps the weights of forward and backward on the device. "flow" keeps them in host memory
            too and streams them through the device block by block, in forward and in backward, so that the model need
            not fit on the device. "auto" chooses one of them; `explain()` tells the choice and its reason.
        wrap: with "flow", class names or names of the modules whose weights stream together; None finds the repeated
            blocks.
        gpu_fraction: share of the trainable parameters, from 0 to 1, whose master weights and states stay on the device
            and step there. They are the parameters whose gradients come last in backward, as nothing would hide their
            step on the host. "auto" takes as many as fit the device memory that the first step left free. The result is
            the same, bit for bit.
        link_dtype: dtype in which gradients and weights travel between device and host. "weights" takes the dtype of
            the weights, and the host's kernel casts. "fp32" casts on the device, which takes more of the link and of
            the host's memory and spares the host's cores the conversions. "auto" takes "fp32" only where this machine's
            profile says that it is faster. The result is the same, bit for bit.
        zenflow: the options of "zenflow"; None takes their defaults.
    """

    engine: str = "superoffload"
    bucket_mb: Union[PositiveInt, Literal["auto"]] = "auto"
    pin_memory: bool = True
    cpu_threads: Union[ThreadCount, Literal["auto"]] = "auto"
    speculate: Union[bool, Literal["auto"]] = "auto"
    weights: Literal["auto", "stationary", "flow"] = "auto"
    wrap: Optional[ModuleNames] = None
    gpu_fraction: Union[Share, Literal["auto"]] = "auto"
    link_dtype: Literal["auto", "weights", "fp32"] = "auto"
    zenflow: Optional[ZenFlowConfig] = None

    def __post_init__(self) -> None:
        self._check_engine()
        options: object = self.zenflow
        if isinstance(options, Mapping):
            object.__setattr__(self, "zenflow", config_from_mapping(ZenFlowConfig, options, "offload.zenflow"))
        check_fields(self)
        if self.zenflow is not None and self.engine != "zenflow":
            raise SettingError(
                f"OffloadConfig.zenflow holds the options of engine='zenflow'; found it with engine={self.engine!r}. "
                "Remove it, or use engine='zenflow'."
            )
        if self.wrap is not None and self.weights != "flow":
            raise SuperScaleError(
                "OffloadConfig.wrap chooses what weights='flow' streams together; found it with "
                f"weights={self.weights!r}. Remove it."
            )
        if self.weights == "flow" and self.gpu_fraction != "auto" and self.gpu_fraction > 0:
            raise SuperScaleError(
                "OffloadConfig.weights='flow' keeps weights off the device, and their states with them; found "
                f"gpu_fraction={self.gpu_fraction}. Use 'auto' or 0, or weights='stationary'."
            )
        if self.weights == "flow" and self.link_dtype == "fp32":
            raise SuperScaleError(
                "OffloadConfig.weights='flow' streams weights from host memory in their own dtype; found "
                "link_dtype='fp32'. Use link_dtype='auto' or 'weights', or weights='stationary'."
            )

    def _check_engine(self) -> None:
        engine: object = self.engine
        names = ", ".join(map(repr, ENGINES))
        if not isinstance(engine, str) or engine not in ENGINES:
            raise SettingError(
                f"unknown offload engine {shown(engine)}: expected one of {names}{did_you_mean(str(engine), ENGINES)}"
            )

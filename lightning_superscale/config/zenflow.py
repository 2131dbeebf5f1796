"""The options of ZenFlow: which columns are stepped at once, and when and how the others are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Optional, Union

from lightning_superscale.config.values import Between, PositiveInt, Share, check_fields
from lightning_superscale.errors import SettingError

Steps = Annotated[int, Between(0, 2**30)]
Factor = Annotated[float, Between(0, 2**20)]


@dataclass(frozen=True)
class ZenFlowConfig:
    """Options for ZenFlow (Lan et al. 2025, arXiv:2505.12242).

    The most important columns of every matrix are stepped on the device at every step. The gradients of the others add
    up, and the host applies them in windows of several steps.

    Args:
        topk: share of the columns of every matrix that are stepped at every step, from 0 to 1. What has one dim is
            stepped at every step whatever the share is. "auto" takes the smallest of 0.05 to 0.25 with which these
            columns hold half of the gradient's energy after warm-up, and until then the memory that 0.25 takes.
        update_interval: steps of the optimizer, not of accumulation, in a window. "auto" measures device and host
            during warm-up, and takes the shortest window with which the device waits for no host.
        select_interval: least number of steps after which the columns are chosen anew, in the first step of a window,
            by the norms of its gradients.
        overlap: whether the host applies a window during the step after it, at whose end the new weights are in place;
            windows of different parameters then end at different steps. False waits for the host at the end of each
            window.
        delay_correction: with overlap, the weights of deferred columns are put ahead of what the host has by this share
            of their last update, in the manner of error feedback (arXiv:2606.30634, section 3), until the next one.
            0 leaves it out.
        deferred_lr: learning rate of a window's update. "linear" is the sum of its steps' rates, "sqrt" their mean
            times the square root of their number, "none" the rate of the last one; a number is a factor of the rate of
            the last one. With "none" a window counts as one step of Adam on its mean gradient, as if gradients had been
            accumulated, which works where no columns change owners (topk 0 or 1); otherwise it counts as as many steps
            as it has.
        warmup_steps: first steps, at least one, or 8 with an "auto", in which every column is stepped at every step.
        accumulate_on: memory in which gradients of a window add up. "device" takes 4 bytes per deferred parameter of
            the device's memory, and sends one sum per window to the host, rounded to the weights' dtype, where "host"
            sends each gradient.
        exclude: patterns of names of parameters ("*.embed.weight") that are not split: the host has them whole.
    """

    topk: Union[Literal["auto"], Share] = 0.1
    update_interval: Union[Literal["auto"], PositiveInt] = 4
    select_interval: PositiveInt = 64
    overlap: bool = True
    delay_correction: Annotated[float, Between(0, 2)] = 0.75
    deferred_lr: Union[Literal["linear", "sqrt", "none"], Factor] = "linear"
    warmup_steps: Steps = 1
    accumulate_on: Literal["host", "device"] = "host"
    exclude: Optional[list[str]] = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.deferred_lr == "none" and self.topk not in (0, 1):
            raise SettingError(
                "ZenFlowConfig.deferred_lr='none' counts a window as one step of Adam, and a selected column's steps "
                f"one by one; found topk={self.topk}, with which columns change from one to the other. Use 'linear', "
                "'sqrt' or a number, or topk=0."
            )

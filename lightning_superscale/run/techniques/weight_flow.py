"""Weights that live in host memory and are on the device while a block uses them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from lightning_superscale.config import OffloadConfig
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.weight_flow.schedule import WeightFlow
from lightning_superscale.ops.state_dtypes import dtype_name
from lightning_superscale.run.report.plan import ByteClass
from lightning_superscale.run.techniques.technique import ModuleTechnique, TechniqueFacts
from lightning_superscale.run.weight_flow import WeightsChoice, choose_weights, flow_of, how_weights_flow
from lightning_superscale.zero.meta_init import materialise_all

# Part of torch's message where user code uses a weight that flows together with tensors of the device.
_ELSEWHERE = "Expected all tensors to be on the same device"


_WEIGHT_ON_HOST = (
    "weights='flow': a weight of a block was used outside of the block, together with tensors of the device, as "
    "penalties on all parameters are. Such weights are host tensors but for the time in which their block runs. "
    "Compute it in the block's forward(), use the optimizer's weight_decay for a penalty, move the weight with "
    ".to(device) for a value without gradient, or use OffloadConfig(weights='stationary')."
)


class WeightFlowTechnique(ModuleTechnique):
    """Weight flow of one run, or the reason why its weights stay on the device.

    Attributes:
        flow: brings weights to the device when they are used; None when they stay there.
    """

    def __init__(self, facts: TechniqueFacts, offload: OffloadConfig) -> None:
        self.flow: WeightFlow | None = None
        self._facts = facts
        self._offload = offload
        self._choice = WeightsChoice(False, "zero=3 shards them over ranks")
        self._module: nn.Module | None = None

    def prepare(self, module: nn.Module) -> None:
        self._module = module
        facts = self._facts
        if facts.shards_weights:
            return
        self._choice = choose_weights(
            self._offload, facts.zero, module, facts.free_bytes, is_compiled=facts.is_compiled
        )
        if self._choice.flow:
            materialise_all(module, torch.device("cpu"))
            self.flow = flow_of(module, self._offload, is_compiled=facts.is_compiled)

    def off_device(self) -> Collection[nn.Parameter]:
        return () if self.flow is None else self.flow.block_of.keys()

    def around_forward(self, *, trains: bool) -> AbstractContextManager[None]:
        return nullcontext() if self.flow is None else self._flowing(self.flow)

    @staticmethod
    @contextmanager
    def _flowing(flow: WeightFlow) -> Iterator[None]:
        flow.enter()
        try:
            yield
        except RuntimeError as error:
            if _ELSEWHERE in str(error):
                raise SuperScaleError(f"{_WEIGHT_ON_HOST} Torch said: {error}") from error
            raise

    def rest(self, *, is_visible: bool) -> None:
        if self.flow is not None:
            self.flow.rest()
            if is_visible:
                self.flow.synchronize()

    def cause_of(self, error: BaseException) -> str | None:
        """The place of weights, where an error of user code between steps (in a hook or a callback) comes of it."""
        is_torchs = isinstance(error, RuntimeError) and not isinstance(error, SuperScaleError)
        return _WEIGHT_ON_HOST if self.flow is not None and is_torchs and _ELSEWHERE in str(error) else None

    def reasons(self) -> list[str]:
        return [] if self._module is None else [how_weights_flow(self._choice, self.flow, self._module)]

    def bytes(self) -> list[ByteClass]:
        if self.flow is None:
            return []
        dtypes = sorted({dtype_name(param.dtype) for param in self.flow.block_of})
        most = f"at most {self.flow.most_blocks} of {self.flow.num_blocks} blocks at a time"
        return [ByteClass("weights (flowing)", "/".join(dtypes), self.flow.most_device_bytes, 0, most)]

    def close(self) -> None:
        flow, self.flow, self._module = self.flow, None, None
        if flow is not None:
            flow.close()


def flowing_weights(facts: TechniqueFacts) -> ModuleTechnique | None:
    """The weight flow of one run; None where nothing is offloaded."""
    return None if facts.offload is None else WeightFlowTechnique(facts, facts.offload)

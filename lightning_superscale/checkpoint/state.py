"""The vocabulary of checkpoints: what a training state is made of, and what this rank holds of it.

Strategies describe their state with it, our format and every foreign one is read through it, and neither knows the
other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lightning_superscale.layout.box import Box

Role = Literal["model", "buffer", "master", "state", "scalar", "extra"]

MODEL = "model"
MASTER = "master_param"
RULE_STATE = "rule_state"
EXTRA = "extra"


def optimizer_section(index: int) -> str:
    """The section of the `index`-th optimizer's states."""
    return f"optimizer.{index}"


@dataclass(frozen=True, slots=True, order=True)
class TensorKey:
    """The name of one tensor of a training state.

    Attributes:
        section: "model", "optimizer.<index>", or "extra" for tensors in the rest of Lightning's state.
        name: of a parameter or buffer, as the LightningModule's state_dict() has it; of an extra, where it lies.
        state: of an optimizer's tensor, the key in the parameter's state ("exp_avg", "step", any other), or
            "master_param"; otherwise "".
    """

    section: str
    name: str
    state: str = ""

    def __str__(self) -> str:
        return f"{self.section}: {self.name}" + (f" [{self.state}]" if self.state else "")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A whole tensor, as every rank knows it.

    Attributes:
        role: "model" a weight, "buffer" a buffer, "master" an fp32 (or other) master weight, "state" an optimizer's
            tensor of the parameter's shape, "scalar" one without dims or of a shape of its own, "extra" the rest.
        trainable: of "model": whether it has gradients; frozen weights are saved like all others.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    role: Role
    trainable: bool = False


@dataclass(frozen=True, slots=True)
class LocalShard:
    """A part of a tensor that this rank holds.

    Attributes:
        tensor: the part's values, of shape `box.size` and any device; the memory that training uses, so whoever
            keeps it past the call copies it.
    """

    box: Box
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class OptimizerRecord:
    """The state of an optimizer that is not tensors.

    Attributes:
        class_name: such as "AdamW".
        groups: each parameter group's options (lr, betas, ...; numbers, strings, booleans, lists, tuples, None).
        names: each group's parameters, by name, in the optimizer's order.
        values: by parameter name and state key, entries of the parameter's state that are not tensors.
        rule: what belongs to no parameter: numbers and small tensors by name, of the rule that stepped it.
    """

    class_name: str
    groups: tuple[dict[str, Any], ...]
    names: tuple[tuple[str, ...], ...]
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    rule: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LocalState:
    """A training state as one rank has it; every rank's shards together cover every tensor.

    Attributes:
        tensors: all tensors of the state, the same on every rank.
        shards: this rank's parts. Where ranks hold equal copies, each gives its copy, and the writer shares the work.
        optimizers: by index.
        aliases: name of a tied parameter or buffer -> the name under which its tensor is.
        rest: Lightning's checkpoint without tensors of the above: loops, callbacks, schedulers, hyperparameters,
            versions; rank 0's is written.
    """

    tensors: dict[TensorKey, TensorInfo]
    shards: dict[TensorKey, tuple[LocalShard, ...]]
    optimizers: tuple[OptimizerRecord, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """Fill `out` with a part of a tensor.

    Attributes:
        out: of shape `box.size`, any device, contiguous or not. Of another dtype than the tensor's only where the
            caller wants the values converted, as `Tensor.copy_` does.
    """

    key: TensorKey
    box: Box
    out: Tensor


class StateSource(Protocol):
    """A training state that lies in a checkpoint of any format; opening one reads no tensor's values.

    Attributes:
        path: what was opened, for messages.
        step: optimizer steps taken; None where the format does not say.
    """

    @property
    def path(self) -> str: ...
    @property
    def step(self) -> int | None: ...
    @property
    def tensors(self) -> Mapping[TensorKey, TensorInfo]: ...
    @property
    def optimizers(self) -> tuple[OptimizerRecord, ...]: ...
    @property
    def aliases(self) -> Mapping[str, str]: ...
    @property
    def rest(self) -> dict[str, Any]: ...

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Fill each request, in bounded memory. Every rank of the mesh that it was opened with calls it.

        Raises:
            CheckpointError: a tensor or box that the checkpoint does not have, or bytes that are damaged (which file,
                tensor and block).
        """

    def close(self) -> None: ...

"""The vocabulary of checkpoints: the tensors, optimizers and values of a training state, and a rank's shards of them.

Strategies describe their state with these types, and checkpoints of every format are read through them, so that no
strategy knows a format and no format knows a strategy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_superscale.layout.box import Box

Role = Literal["model", "buffer", "master", "state", "scalar", "extra"]

MODEL = "model"
MASTER = "master_param"
RULE_STATE = "rule_state"
EXTRA = "extra"


def optimizer_section(index: int) -> str:
    """The section of a TensorKey for states of the `index`-th optimizer, counted from 0."""
    return f"optimizer.{index}"


class TensorKey(NamedTuple):
    """The name of one tensor of a training state.

    Attributes:
        section: "model", "optimizer.<index>", or "extra" for tensors in the rest of Lightning's state.
        name: of a parameter or buffer, its name in the LightningModule's state_dict(); of an extra, its place in
            Lightning's state.
        state: of an optimizer's tensor, its key in the parameter's state ("exp_avg", "step", any other), or
            "master_param"; otherwise "".
    """

    section: str
    name: str
    state: str = ""

    def __str__(self) -> str:
        return f"{self.section}: {self.name}" + (f" [{self.state}]" if self.state else "")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Description of an unsharded tensor, the same on every rank.

    Attributes:
        shape: shape of the unsharded tensor.
        role: "model" for a weight, "buffer" for a buffer, "master" for an fp32 (or other) master weight, "state" for an
            optimizer's tensor of the parameter's shape, "scalar" for an optimizer's tensor without dims or of another
            shape, "extra" for all others.
        trainable: whether a weight ("model") has gradients; frozen weights are saved like all others.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    role: Role
    trainable: bool = False


@dataclass(frozen=True, slots=True)
class LocalShard:
    """A box of a tensor that this rank holds.

    Attributes:
        box: the place of the shard in the unsharded tensor.
        tensor: the shard's values, of shape `box.size` and any device. It is the memory that training uses, so code
            that keeps the values past its call copies them.
    """

    box: Box
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class OptimizerRecord:
    """The part of an optimizer's state that is not its parameters' tensors.

    Attributes:
        class_name: name of the optimizer's class, such as "AdamW".
        groups: each parameter group's options (lr, betas, ...; numbers, strings, booleans, lists, tuples, None).
        names: each group's parameters, by name, in the optimizer's order.
        values: entries of the parameters' states that are not tensors, by parameter name and state key.
        rule: state of the update rule that belongs to no parameter: numbers and small tensors, by name.
    """

    class_name: str
    groups: tuple[dict[str, Any], ...]
    names: tuple[tuple[str, ...], ...]
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    rule: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LocalState:
    """A training state as one rank has it; all ranks' shards together cover every tensor.

    Attributes:
        tensors: all tensors of the state, the same on every rank.
        shards: this rank's shards of each tensor. Where ranks hold equal copies, each gives its copy, and the writer
            divides the work among them.
        optimizers: a record for each optimizer, by index.
        aliases: name of a tied parameter or buffer -> the name under which its tensor is saved.
        rest: Lightning's checkpoint without the weights and the optimizers' states: loops, callbacks, schedulers,
            hyperparameters, versions. Only rank 0's is written.
    """

    tensors: dict[TensorKey, TensorInfo]
    shards: dict[TensorKey, tuple[LocalShard, ...]]
    optimizers: tuple[OptimizerRecord, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """A request to fill `out` with the values of a box of a tensor.

    Attributes:
        box: the wanted box, in the unsharded tensor.
        out: a plain tensor of shape `box.size`, on any device, contiguous or not. Values are converted to its dtype as
            `Tensor.copy_` does.
    """

    key: TensorKey
    box: Box
    out: Tensor


class StateSource(Protocol):
    """A training state in a checkpoint of any format; opening one reads no tensor's values.

    Attributes:
        path: path or URL of the checkpoint, for messages.
        step: optimizer steps taken; None where the format does not say.
        tensors: all tensors of the checkpoint but those within `rest`.
        optimizers: a record for each optimizer, by index.
        aliases: name of a tied parameter or buffer -> the name under which its tensor is saved.
        rest: Lightning's part of the state (`LocalState.rest`), with its tensors on the host.
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
        """Fill each request, in bounded memory. Every rank of the mesh that the source was opened with calls it.

        Raises:
            CheckpointError: a tensor or box that the checkpoint does not have, or damaged bytes; names the file, tensor
                and block.
        """

    def close(self) -> None:
        """Close the checkpoint's files; nothing can be read after it."""

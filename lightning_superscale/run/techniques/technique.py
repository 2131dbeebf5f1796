"""The seam of module techniques: they act on the module and its batches, whichever engine steps the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.config import OffloadConfig, SequenceConfig, ZeroConfig
from lightning_superscale.offload.link.link import Link
from lightning_superscale.run.report.plan import ByteClass


@dataclass(frozen=True, slots=True, kw_only=True)
class TechniqueFacts:
    """The facts of a run that a technique is made from.

    Attributes:
        sequence: how ranks share the sequences of a batch; None where each has samples of its own.
        trains: whether the run trains; a run that only evaluates has no optimizer.
        is_compiled: whether any part of the module is a product of `torch.compile`.
        is_compiled_whole: whether the framework compiled the module and its steps as a whole.
        shards_weights: whether the run shards weights over ranks (stage 3), so that no rank ever has the whole model.
        free_bytes: bytes free on the device of the rank that has the fewest, the module's own included; None where
            device memory is host memory.
    """

    zero: ZeroConfig
    offload: OffloadConfig | None
    sequence: SequenceConfig | None
    mesh: DataMesh
    device: torch.device
    trains: bool
    is_compiled: bool
    is_compiled_whole: bool
    shards_weights: bool
    free_bytes: int | None


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """What a training step found that was rehearsed: run, with its backward, and forgotten.

    Attributes:
        loss: of this rank's batch.
        norms: 2-norm of each parameter's gradient, averaged over ranks, by name; without those of zeros.
        eps: the distance from 1 to the next number in the coarsest dtype that the run is set to compute in.
    """

    loss: float
    norms: Mapping[str, float]
    eps: float


Rehearse = Callable[[Callable[[], Any]], Rehearsed]
"""Rehearses the training step of a batch, which it asks for, perhaps more than once. Every rank calls it."""


class ModuleTechnique:
    """One technique during one run. A subclass overrides the hooks that it needs.

    Every rank calls each hook at the same place of its run, in the order of the registry.
    """

    def prepare(self, module: nn.Module) -> None:
        """Look at the module, and hook it, before it is on the device, sharded or wrapped.

        Tensors on the meta device have no values yet. Buffers that a technique registers are saved with the module.

        Raises:
            SuperScaleError: the module can't be trained with this technique; says why and what to do.
        """

    def off_device(self) -> Collection[nn.Parameter]:
        """The parameters that stay in host memory when the module moves to the device."""
        return ()

    def connect(self, ranks: Communicator, link: Link | None) -> None:
        """Take the connections, once the module is sharded. Called only in a run that trains.

        Args:
            ranks: to the other ranks.
            link: between the device and its host; None where nothing crosses it.
        """

    def uses_link(self) -> bool:
        """Whether the technique copies between the device and its host, asked for once the module was prepared."""
        return False

    def batch(self, batch: Any, *, trains: bool) -> Any:
        """The batch that this rank's step gets, from the one that the data loader gave, on the device.

        Args:
            trains: whether the batch is for a training step.
        """
        return batch

    def output(self, output: Any, *, trains: bool) -> Any:
        """What user code and the framework get for the output of the module's step.

        Args:
            trains: whether it is a training step's, with the loss; it is asked for within `around_forward`.
        """
        return output

    def around_forward(self, *, trains: bool) -> AbstractContextManager[None]:
        """A context around every step of the module.

        Args:
            trains: whether it is a training step, whose backward follows once the context is closed or runs inside;
                False for a step that evaluates.
        """
        return nullcontext()

    def first_batch(self, batch: Any, rehearse: Rehearse) -> None:
        """Look at the first batch of training before the module does, as its step will get it.

        Args:
            rehearse: leaves weights, optimizers, buffers, random numbers and logs as they were.

        Raises:
            SuperScaleError: on every rank: nothing should be trained.
        """

    def rehearsing(self) -> AbstractContextManager[None]:
        """A context around a training step that is rehearsed: what it lets the technique count is to be forgotten."""
        return nullcontext()

    def before_evaluation(self) -> None:
        """Get ready for an evaluation that begins, perhaps between two training steps."""

    def rest(self, *, is_visible: bool) -> None:
        """Come to rest: no forward or backward runs until the next `around_forward`.

        Args:
            is_visible: whether user code may look at the module now, so that its weights must be there to read.
        """

    def cause_of(self, error: BaseException) -> str | None:
        """What an error that ended the run comes of, for a note on it; None if it does not come of this technique."""
        return None

    def reasons(self) -> list[str]:
        """One sentence per choice that was made for the user, for `explain()`."""
        return []

    def bytes(self) -> list[ByteClass]:
        """Bytes that the technique keeps besides the module's own tensors, for `explain()`."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs, in values that checkpoints take; every rank gives the same."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state that `state_dict` gave in the interrupted run."""

    def close(self) -> None:
        """Give the module back as it was, but for its weights. The hooks that came before may not all have run."""

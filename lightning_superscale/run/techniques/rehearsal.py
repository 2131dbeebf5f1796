"""Rehearses training steps: runs one with its backward, measures loss and gradients, and forgets it.

[Note: Rehearsed steps] The step is the user's own, and takes the way of every training step, through the techniques,
the gates, backward and the engines' gradients, up to the point where an optimizer would step. There the gradients,
averaged over ranks, are measured where they are, as for clipping, and dropped, as those of a step that overflowed. So
whatever the engine and the stage, nothing is kept that training would not keep, and nothing is measured that it would
not step with.

Then all is as before: weights, masters and moments, which no backward changes; buffers; the states of the generators
of Python, NumPy and torch; what engines and techniques learn and count of a step. The module is in evaluation mode
meanwhile: ranks that share a sequence drop weights of attention by random numbers of their own, and no two steps with
dropout are alike. Only what user code changes itself, such as counters and metrics, sees a step more.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_superscale.comm.agreement import raise_together
from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.link.link import Link
from lightning_superscale.run.assemble import Assembly
from lightning_superscale.run.report.phases import PhaseSeconds
from lightning_superscale.run.run import Run
from lightning_superscale.run.techniques.sequence_parallel import random_state, set_random_state
from lightning_superscale.run.techniques.technique import Rehearsed
from lightning_superscale.torch_private import version_of

# Where gradients overflow in fp16, the loss scale is divided by this before the next try.
_BACK_OFF = 16.0
# The dtypes in which `torch.set_float32_matmul_precision` lets factors of fp32 be rounded: TF32 has fp16's mantissa.
_FACTORS = {"highest": torch.float32, "high": torch.float16, "medium": torch.bfloat16}


class Rehearsal:
    """Rehearses training steps of one run. Satisfies `Rehearse`.

    Args:
        step: runs the training step of a batch, logs nothing, and returns what user code returned.
        backward: runs the backward of a loss as the framework would.
        loss_scale: the factor of the next loss, with fp16; 1 without.
    """

    def __init__(
        self, run: Run, step: Callable[[Any], Any], backward: Callable[[Tensor], None], *, loss_scale: float = 1.0
    ) -> None:
        self._run, self._step, self._backward, self._loss_scale = run, step, backward, loss_scale

    def first_batch(self, batch: Any) -> None:
        """Let the run's techniques look at the first batch of training; called with every batch, on every rank."""
        if self._run.assembly is not None:
            self._run.assembly.settings.techniques.first_batch(batch, self)

    def __call__(self, make_batch: Callable[[], Any]) -> Rehearsed:
        """Rehearse one training step. Every rank calls it.

        Args:
            make_batch: makes the batch, anew for each try.

        Raises:
            SuperScaleError: on every rank: the step gave no loss that a backward could begin at.
        """
        scale = self._loss_scale
        while True:
            found = self._rehearsed(make_batch(), scale)
            if scale <= 1 or all(map(math.isfinite, found.norms.values())):
                return found
            scale = max(1.0, scale / _BACK_OFF)

    def _rehearsed(self, batch: Any, scale: float) -> Rehearsed:
        run, assembly = self._run, self._run.assembly
        if assembly is None:
            raise AssertionError("steps are rehearsed while a run trains")
        norms: dict[str, float] = {}
        with without_a_trace(run, assembly):
            with run.forward():
                result = run.output(self._step(batch), trains=True)
            loss = _loss_of(result, assembly.mesh)
            with run.backward():
                # A factor in fp32, so that a loss in fp16 does not overflow before its gradients do.
                self._backward(loss if scale == 1 else loss * torch.tensor(scale, device=loss.device))
            run.after_backward()
            for engine in assembly.engines.values():
                norms.update(engine.measure_gradients())
        return Rehearsed(
            float(loss.detach()), {name: norm / scale for name, norm in norms.items()}, coarsest_eps(assembly)
        )


def _loss_of(result: Any, mesh: DataMesh) -> Tensor:
    """The loss in what a training step returned. Every rank calls it."""
    loss: Any = result.get("loss") if isinstance(result, Mapping) else result
    is_loss = isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad
    raise_together(mesh, None if is_loss else _no_loss(loss))
    found: Tensor = loss
    return found


def _no_loss(loss: Any) -> SuperScaleError:
    found = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    return SuperScaleError(
        "the rehearsal of a training step (SequenceConfig.verify) expected a loss of one element that requires grad, "
        f"and training_step returned {found}. Return a loss for the first batch, or leave verify out."
    )


def coarsest_eps(assembly: Assembly) -> float:
    """The distance from 1 to the next number in the coarsest dtype that a run is set to compute in."""
    precision = assembly.settings.precision
    dtypes = {param.dtype for param in assembly.module.parameters() if param.dtype.is_floating_point}
    dtypes |= {precision.weights, _FACTORS[torch.get_float32_matmul_precision()]}
    dtypes |= {one for one in (precision.autocast, precision.gradients.reduction) if one is not None}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


@contextmanager
def without_a_trace(run: Run, assembly: Assembly) -> Iterator[None]:
    """A context after which all is as before but for what user code itself changed; see [Note: Rehearsed steps]."""
    with ExitStack() as stack:
        stack.enter_context(_phases_kept(run))
        stack.enter_context(_random_numbers_kept(assembly.settings.device))
        stack.enter_context(_buffers_kept(assembly.module))
        stack.enter_context(_gradients_kept(assembly.module))
        stack.enter_context(_evaluating(assembly.module))
        if assembly.link is not None:
            stack.enter_context(_counts_kept(assembly.link))
        for engine in assembly.engines.values():
            stack.enter_context(engine.transport.rehearsal())
        stack.enter_context(assembly.settings.techniques.rehearsing())
        yield


@contextmanager
def _phases_kept(run: Run) -> Iterator[None]:
    before, run.phases = run.phases, PhaseSeconds()
    try:
        yield
    finally:
        run.phases = before


@contextmanager
def _counts_kept(link: Link) -> Iterator[None]:
    before = copy.copy(link.bytes)
    try:
        yield
    finally:
        link.bytes = before


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    before, of_numpy = random_state(device), np.random.get_state()
    try:
        yield
    finally:
        set_random_state(before, device)
        np.random.set_state(of_numpy)


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Keep buffers and their values. A buffer that is replaced comes back; one that is new stays."""
    before = [
        (owner, name, buffer, version_of(buffer), buffer.clone())
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, version, value in before:
                if version_of(buffer) != version:
                    buffer.copy_(value)
                if owner.get_buffer(name) is not buffer:
                    owner.__setattr__(name, buffer)


@contextmanager
def _gradients_kept(module: nn.Module) -> Iterator[None]:
    before = [(param, param.grad) for param in module.parameters()]
    for param, _ in before:
        param.grad = None
    try:
        yield
    finally:
        for param, grad in before:
            param.grad = grad


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, without the methods `train()` of modules, which may do more."""
    before = [(one, one.training) for one in module.modules()]
    for one, _ in before:
        one.training = False
    try:
        yield
    finally:
        for one, was_training in before:
            one.training = was_training

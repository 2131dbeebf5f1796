"""Backward as the strategy runs it, and what a training_step may do about gradients besides."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.optim.transport import IsScaling
from lightning_superscale.plugins.trainer.evaluation import EvaluationMixin
from lightning_superscale.run.report.phases import PhaseSeconds
from lightning_superscale.timeline import Lane
from lightning_superscale.zero.grad_schedule import Flag

# What torch says where user code meets shards that it takes for whole parameters.
_NOT_IN_GRAPH = "appears to not have been used in the graph"
_MIXED = "got mixed torch.Tensor and DTensor"


class BackwardMixin(EvaluationMixin):
    """Mixed into the strategies of both Lightning distributions.

    Attributes:
        _is_blocked: whether more micro-batches of the step follow.
        _shows_weights: whether user code may look at weights right after backward.
        _in_backward: raised while Lightning runs backward; what is made then is scaled, where losses are.
    """

    phase_seconds: PhaseSeconds
    _is_blocked: bool
    _shows_weights: bool
    _in_backward: Flag

    def _recorded(self, lane: Lane) -> AbstractContextManager[None]:
        raise NotImplementedError

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        _check_inputs(kwargs.get("inputs"))
        start = time.perf_counter()
        try:
            with self._recorded("backward"), self._in_backward.raised():
                return super().backward(closure_loss, optimizer, *args, **kwargs)
        finally:
            self.phase_seconds.backward += time.perf_counter() - start

    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        self._rest_weights(are_visible=self._shows_weights)
        if self._assembly is not None and not self._is_blocked:
            self._assembly.after_backward()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """While open, more micro-batches of the same step follow: gradients accumulate where they are."""
        before, self._is_blocked = self._is_blocked, True
        try:
            with ExitStack() as stack:
                if self._assembly is not None:
                    for engine in self._assembly.engines.values():
                        stack.enter_context(engine.transport.blocked())
                yield
        finally:
            self._is_blocked = before

    @property
    def _is_scaling(self) -> IsScaling | None:
        """Whether losses are scaled now; None where they never are."""
        has_scaler = getattr(self.precision_plugin, "scaler", None) is not None
        return (lambda: bool(self._in_backward)) if has_scaler else None

    @contextmanager
    def _in_training_step(self) -> Iterator[None]:
        """Around the user's training_step, which may run backward on its own.

        Lightning zeroes gradients after training_step and before its own backward, so what leaves during backward
        must not leave before.
        """
        with ExitStack() as stack:
            if self._assembly is not None:
                for engine in self._assembly.engines.values():
                    stack.enter_context(engine.transport.holding())
            try:
                yield
            except RuntimeError as error:
                if self._assembly is not None and self._assembly.settings.shards_weights:
                    _explain(error)
                raise


def _check_inputs(inputs: Tensor | Iterable[Tensor] | None) -> None:
    """Refuse a backward into sharded parameters, which are in no graph.

    Raises:
        SuperScaleError: says what to do instead.
    """
    if isinstance(inputs, Tensor):
        inputs = [inputs]
    if inputs is not None and any(isinstance(tensor, DTensor) for tensor in inputs):
        raise SuperScaleError(
            "backward(inputs=...) was given parameters, which are shards between forward and step with ZeRO-3, and in "
            "no graph. Freeze the other parameters instead (toggle_optimizer, requires_grad_), or use ZeRO-2."
        )


def _explain(error: RuntimeError) -> None:
    """Say in our words what torch can't know about sharded parameters.

    Raises:
        SuperScaleError: from `error`, where it is of that kind.
    """
    if _NOT_IN_GRAPH in str(error):
        raise SuperScaleError(
            "torch.autograd.grad was given tensors that are in no graph. With ZeRO-3 parameters are shards outside of "
            "their module's forward: gradients of a loss by parameters are made by backward() alone. Take them by "
            "activations or inputs, or use ZeRO-2."
        ) from error
    if _MIXED in str(error):
        raise SuperScaleError(
            "a part of a module was called while the module's parameters were shards. With ZeRO-3 the modules that are "
            "gathered together are used by calling the outermost of them: call that, or name the parts that your code "
            "calls, as in ZeroConfig(stage=3, wrap=['vision', 'text']), or use ZeRO-2."
        ) from error

"""The module that a Fabric strategy gives back: the user's, whose every call is a forward of the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from lightning_superscale.run.run import Run
from lightning_superscale.torch_private import compiles_calls


class RunModule(nn.Module):
    """Calls a module within the run that trains it, as DistributedDataParallel wraps its module.

    A call in which gradients are recorded is one of training, any other is an evaluation. Every rank makes it.

    Where `fabric.setup` is given a product of `torch.compile`, Fabric hands the module behind it to the strategy, and
    compiles what it gets back. So a call finds out whether it is compiled, and keeps all but the user's module out.

    Args:
        module: the user's.
        run: the run that was prepared for it.

    Attributes:
        has_trained: whether it was called with gradients recorded since its first optimizer was set up.
    """

    def __init__(self, module: nn.Module, run: Run) -> None:
        super().__init__()
        self.module = module
        self._run = run
        self._is_evaluating = False
        self.has_trained = False

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives for the same arguments."""
        trains = torch.is_grad_enabled()
        with _Uncompiled(self._call(trains=trains, is_compiled=compiles_calls())):
            return self._finish(self.module(*args, **kwargs), trains)

    @contextmanager
    def _call(self, *, trains: bool, is_compiled: bool) -> Iterator[None]:
        """A context around a call of the module."""
        run = self._run
        if is_compiled and run.assembly is not None:
            run.assembly.compile_forward()
        if trains:
            self.has_trained = run.assembly is not None
        elif not self._is_evaluating:
            run.before_evaluation()
        self._is_evaluating = not trains
        with run.forward() if trains else run.evaluating():
            yield

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _finish(self, output: Any, trains: bool) -> Any:
        return self._run.output(output, trains=trains)


class _Uncompiled:
    """A context that is entered and left outside of what `torch.compile` compiles, which is what lies inside."""

    def __init__(self, context: AbstractContextManager[None]) -> None:
        self._context = context

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __enter__(self) -> None:
        self._context.__enter__()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._context.__exit__(kind, error, traceback)

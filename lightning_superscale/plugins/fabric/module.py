"""The module that a Fabric strategy gives back: the user's, whose every call is a forward of the run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_superscale.run.run import Run


class RunModule(nn.Module):
    """Calls a module within the run that trains it, as DistributedDataParallel wraps its module.

    A call in which gradients are recorded is one of training, any other is an evaluation. Every rank makes it.

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

    # Fabric compiles what it sets up where the user compiled the module: that is to be compiled, and not the run.
    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives for the same arguments."""
        if torch.is_grad_enabled():
            self._is_evaluating = False
            self.has_trained = self._run.assembly is not None
            with self._run.forward():
                return self.module(*args, **kwargs)
        if not self._is_evaluating:
            self._run.before_evaluation()
            self._is_evaluating = True
        with self._run.evaluating():
            return self.module(*args, **kwargs)

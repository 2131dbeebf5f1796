"""Keeps the user's optimizer from stepping the module's weights behind their masters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from lightning_superscale.errors import SuperScaleError


class StepGuard:
    """Refuses `optimizer.step()` unless the engine itself calls it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._is_open = False
        self._hook = optimizer.register_step_pre_hook(self._check)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While open, `optimizer.step()` runs."""
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False

    def _check(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_open:
            raise SuperScaleError(
                f"{type(optimizer).__name__}.step() was called on the bare optimizer, which would step the module's "
                "weights behind their fp32 masters. Call step() on what self.optimizers() returns."
            )

    def remove(self) -> None:
        self._hook.remove()

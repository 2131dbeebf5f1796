"""Runs a module's training step on a batch that is not trained with: nothing is logged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_superscale.plugins.lightning_private import arguments_of_step

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


def silent_step(module: LightningModule, training_step: Callable[..., Any], batch_idx: int, batch: Any) -> Any:
    """What the training step returns for a batch, without its logs.

    Args:
        training_step: the strategy's, which runs the module's with the arguments that the Trainer would give.
    """
    with _muted(module):
        return training_step(*arguments_of_step(module.trainer, batch, batch_idx))


@contextmanager
def _muted(module: LightningModule) -> Iterator[None]:
    """While open, `self.log()` and `self.log_dict()` take no notice, so that no metric and no logger sees the step."""

    def log(*args: Any, **options: Any) -> None:
        return

    own = vars(module)
    before = {name: own.get(name) for name in ("log", "log_dict")}
    own.update(dict.fromkeys(before, log))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del own[name]
            else:
                own[name] = value

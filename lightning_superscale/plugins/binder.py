"""The callback that binds a UniversalCheckpointIO to the strategy of its Trainer ([Note: Bound to a strategy]).

Lightning asks an entry point of this package for callbacks whenever a Trainer is made. It gives the binder as long as
there is a UniversalCheckpointIO in the process, and nothing otherwise: Trainers that do not use this package stay as
they are. The binder does nothing where its Trainer has another checkpoint IO.
"""

from __future__ import annotations

import importlib
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from lightning_superscale.errors import CheckpointError
from lightning_superscale.plugins.lightning_private import checkpoint_io_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback as _Base
else:
    _Base = object

_made: set[type] = set()
_ios: weakref.WeakSet[Any] = weakref.WeakSet()


def expect(io: Any) -> None:
    """A UniversalCheckpointIO was made, so that the Trainers that are made from now on may have it."""
    _ios.add(io)


class CheckpointBinderMixin(_Base):
    """Binds the Trainer's UniversalCheckpointIO to the Trainer's strategy, whichever it is."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Every rank calls it, before anything is saved or loaded.

        Raises:
            CheckpointError: a strategy that writes checkpoints past any IO in a way that is not known here.
        """
        io = checkpoint_io_of(trainer.strategy)
        if io is None or not any(one.__name__ == "UniversalCheckpointIOMixin" for one in type(io).__mro__):
            return
        bind(trainer.strategy)


def bind(strategy: Any) -> None:
    """Let a strategy save and load through its UniversalCheckpointIO, on every rank.

    Raises:
        CheckpointError: a strategy that writes checkpoints past any IO in a way that is not known here.
    """
    base = type(strategy)
    if base in _made or any(one.__name__ == "SuperScaleStrategyMixin" for one in base.__mro__):
        return
    owner = next(one.__name__ for one in base.__mro__ if "save_checkpoint" in one.__dict__)
    known = importlib.import_module("lightning_superscale.plugins.checkpoint.lightning_strategies").BOUND
    if owner not in known:
        raise CheckpointError(
            f"{base.__name__} writes checkpoints by itself ({owner}.save_checkpoint), past UniversalCheckpointIO. Use "
            "that with Lightning's single-device, DDP, FSDP or ModelParallel strategy or with one of "
            "lightning_superscale, or remove it from the Trainer's plugins."
        )
    bound = known[owner](base)
    bound.__name__ = bound.__qualname__ = f"Universal{base.__name__}"
    _made.add(bound)
    strategy.__class__ = bound
    strategy.checkpoint_io.bind()


def lightning_callbacks() -> list[Any]:
    """The callbacks that the entry point gives `lightning.pytorch`."""
    return _binders("lightning.pytorch.callbacks")


def pytorch_lightning_callbacks() -> list[Any]:
    """The callbacks that the entry point gives `pytorch_lightning`."""
    return _binders("pytorch_lightning.callbacks")


def _binders(callbacks: str) -> list[Any]:
    """One binder, of the Lightning that has these callbacks, if any Trainer may need it.

    Every Trainer calls it. So the rest of this package, whose import takes a quarter of a second, is imported only for
    a Trainer that uses it, and an import that fails must not stop a Trainer that does not.

    Warns:
        UserWarning: the binder could not be made; an unbound IO then refuses to write.
    """
    if not _ios:
        return []
    try:
        return [_binder(callbacks)]
    except Exception as error:
        warnings.warn(
            f"lightning-superscale could not be imported ({type(error).__name__}: {error}); UniversalCheckpointIO "
            "won't work in this Trainer. Reinstall or uninstall it.",
            stacklevel=2,
        )
        return []


def _binder(callbacks: str) -> Any:
    base = importlib.import_module(callbacks).Callback
    # The class is in no module, so it is pickled, for launchers that spawn ranks, as the call that made it.
    found = {"__reduce__": lambda self: (_binder, (callbacks,))}
    return type("CheckpointBinder", (CheckpointBinderMixin, base), found)()

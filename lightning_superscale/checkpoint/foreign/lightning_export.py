"""Writes a training state as a Lightning checkpoint file, which a plain Trainer resumes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_superscale.checkpoint.foreign.lightning import EXTRA_STATE, LAYOUT_VERSION, OPTIMIZER_NAMES
from lightning_superscale.checkpoint.foreign.staging import copies_on_disk, staged
from lightning_superscale.checkpoint.foreign.torch_optimizer import pack_optimizer
from lightning_superscale.checkpoint.state import MODEL, StateSource

# Entries that Trainer.fit(ckpt_path=...) needs, for states that were not Lightning's.
_DEFAULTS: dict[str, Any] = {"epoch": 0, "global_step": 0, **LAYOUT_VERSION, "lr_schedulers": []}
_OF_OPTIMIZERS = ("optimizer_states", OPTIMIZER_NAMES, "lr_schedulers", "callbacks")


def export_lightning(source: StateSource, path: Path, *, weights_only: bool = False) -> None:
    """Write the file `path`, a Lightning checkpoint whose optimizer states are numbered.

    Master weights are entries of the states, beside the moments, as this package saves them. Beside tensors the file
    holds `source.rest`, and the names of the numbered parameters, which `open_lightning` finds. Memory stays at a few
    pages: tensors pass through files beside `path`, which take as much disk as the result while it is written. One
    process calls it.

    Args:
        source: the state.
        path: file to make; its directory is made where it is missing.
        weights_only: whether optimizers, schedulers, callbacks and their keys are left out, as by Lightning's
            `save_weights_only`. A Trainer loads weights from such a file and refuses to resume from it.

    Raises:
        CheckpointError: `path` exists, the source is damaged, or its optimizers' parameters have no names.
    """
    records, rest = () if weights_only else source.optimizers, dict(source.rest)
    extra = rest.pop(EXTRA_STATE, {})
    with staged(path) as staging:
        keys = [key for key in source.tensors if key.section == MODEL or not weights_only]
        tensors = copies_on_disk(source, keys, staging / "tensors")
        weights = {key.name: tensor for key, tensor in tensors.items() if key.section == MODEL}
        weights.update({alias: weights[name] for alias, name in source.aliases.items()})
        checkpoint = {
            **_DEFAULTS,
            **({} if source.step is None else {"global_step": source.step, "loops": _loops(source.step)}),
            **rest,
            "state_dict": {**weights, **extra},
            "optimizer_states": [pack_optimizer(record, tensors, index) for index, record in enumerate(records)],
            OPTIMIZER_NAMES: [[name for names in record.names for name in names] for record in records],
        }
        if weights_only:
            checkpoint = {key: value for key, value in checkpoint.items() if key not in _OF_OPTIMIZERS}
        torch.save(checkpoint, staging / path.name)


def _loops(step: int) -> dict[str, Any]:
    """States of loops that make `Trainer.global_step` go on from `step`; the Trainer ignores "global_step" for it."""
    count = {"ready": step, "completed": step}
    started = {**count, "started": step}
    progress = {"step": {"total": count, "current": count}, "zero_grad": {"total": started, "current": started}}
    return {
        "fit_loop": {
            "epoch_loop.state_dict": {"_batches_that_stepped": step},
            "epoch_loop.automatic_optimization.optim_progress": {"optimizer": progress},
            "epoch_loop.manual_optimization.optim_step_progress": {"total": count, "current": count},
        }
    }

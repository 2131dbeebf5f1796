"""Writes a training state as a Lightning checkpoint file, which a plain Trainer resumes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_superscale.checkpoint.formats.lightning import EXTRA_STATE
from lightning_superscale.checkpoint.formats.staging import copies_on_disk, staged
from lightning_superscale.checkpoint.formats.torch_optimizer import pack_optimizer
from lightning_superscale.checkpoint.state import MODEL, StateSource

# What Trainer.fit(ckpt_path=...) can't do without, for states that were not Lightning's. The version is that of the
# layout, for Lightning's migrations.
_DEFAULTS: dict[str, Any] = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.6.0", "lr_schedulers": []}


def export_lightning(source: StateSource, path: Path) -> None:
    """Write `path`, a Lightning checkpoint with integer keys, and masters beside moments, as this package saves them.

    Beside tensors it is `source.rest`. Memory stays at a few pages: tensors pass through files beside `path`, which
    take as much disk as the result while it is written. One process calls it.

    Raises:
        CheckpointError: `path` exists, the source is damaged, or its optimizers can't be told.
    """
    records, rest = source.optimizers, dict(source.rest)
    extra = rest.pop(EXTRA_STATE, {})
    with staged(path) as staging:
        tensors = copies_on_disk(source, source.tensors, staging / "tensors")
        weights = {key.name: tensor for key, tensor in tensors.items() if key.section == MODEL}
        weights.update({alias: weights[name] for alias, name in source.aliases.items()})
        checkpoint = {
            **_DEFAULTS,
            **({} if source.step is None else {"global_step": source.step, "loops": _loops(source.step)}),
            **rest,
            "state_dict": {**weights, **extra},
            "optimizer_states": [pack_optimizer(record, tensors, index) for index, record in enumerate(records)],
        }
        torch.save(checkpoint, staging / path.name)


def _loops(step: int) -> dict[str, Any]:
    """What makes `Trainer.global_step` go on from `step`: it counts in its loops, not in "global_step"."""
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

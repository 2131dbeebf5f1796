"""The Trainer of the benchmarks that train the demo's language model for its validation loss alone."""

from __future__ import annotations

from typing import Any

CLIP_NORM = 1.0


def quiet_trainer(steps: int, validate_every: int, **flags: Any) -> Any:
    """A Trainer on one CPU, clipped at `CLIP_NORM`, that validates every so many steps and neither logs nor saves."""
    import lightning as L  # late: a benchmark sets threads and warnings first

    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        gradient_clip_val=CLIP_NORM,
        val_check_interval=validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **flags,
    )

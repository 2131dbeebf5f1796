"""The options of universal checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_superscale.config.values import check_fields


@dataclass(frozen=True)
class CheckpointConfig:
    """Options for writing and reading universal checkpoints.

    Args:
        asynchronous: whether training goes on while a snapshot is written. One snapshot is in flight at a time. All
            ranks raise its errors together, at the next step or at the end of the run.
        allow: shell patterns of names of weights that a checkpoint may lack, or may have while the module lacks them.
    """

    asynchronous: bool = False
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)

"""How universal checkpoints are written and read."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_superscale.errors import SuperScaleError


@dataclass(frozen=True)
class CheckpointConfig:
    """Options for writing and reading universal checkpoints.

    Args:
        asynchronous: training goes on while a snapshot is written; one is in flight at a time, and its errors are
            raised at the next step, by all ranks at the same, or at the end.
        allow: patterns (as of shell globs) of names of weights that a checkpoint may lack, or may have besides.
    """

    asynchronous: bool = False
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.asynchronous, bool):
            raise SuperScaleError(f"CheckpointConfig.asynchronous must be true or false, found {self.asynchronous!r}.")
        patterns: object = self.allow
        if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
            raise SuperScaleError(f"CheckpointConfig.allow must be a list of patterns, found {self.allow!r}.")
        object.__setattr__(self, "allow", tuple(self.allow))

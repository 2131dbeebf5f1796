"""The dynamic loss scale of fp16: as large as gradients allow, smaller after one overflows.

Its numbers and its state are those of `torch.amp.GradScaler`, so that a run under one resumes from a checkpoint of the
other. Only the search for overflow differs: the optimizer engine finds it, since it sees all ranks' gradients anyway
and drops the step on all of them.

[Note: Scale of a step] A step is unscaled by the scale of its last backward. The scale changes only after a step, so
all backward calls of a step have one scale; unless several optimizers take turns and one accumulates over another's
step, which plain GradScaler gets wrong too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_superscale.errors import SuperScaleError

_KEYS = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


class LossScaler:
    """A dynamic loss scale: a power of two by default, which multiplies losses exactly.

    Attributes:
        scale: the factor of the loss of the next backward.
        num_skipped: number of steps that were dropped.

    Raises:
        SuperScaleError: a scale, a factor or an interval out of its range.
    """

    def __init__(
        self,
        scale: float = 2.0**16,
        *,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        if not (scale > 0 and growth_factor > 1 and 0 < backoff_factor < 1 and growth_interval >= 1):
            raise SuperScaleError(
                "a loss scaler needs scale > 0, growth_factor > 1, 0 < backoff_factor < 1 and growth_interval >= 1; "
                f"found {scale}, {growth_factor}, {backoff_factor} and {growth_interval}."
            )
        self.scale = float(scale)
        self.num_skipped = 0
        self._growth_factor = growth_factor
        self._backoff_factor = backoff_factor
        self._growth_interval = growth_interval
        self._growth_tracker = 0

    def update(self, *, has_overflowed: bool) -> None:
        """Adapt the scale after a step: back off if its gradients overflowed, grow after enough steps that did not."""
        if has_overflowed:
            self.num_skipped += 1
            self.scale *= self._backoff_factor
            self._growth_tracker = 0
            return
        self._growth_tracker += 1
        if self._growth_tracker == self._growth_interval:
            self._growth_tracker = 0
            # As in GradScaler, the scale never becomes infinite.
            if self.scale * self._growth_factor < float("inf"):
                self.scale *= self._growth_factor

    def state_dict(self) -> dict[str, Any]:
        """The scale and its factors, under the keys of `torch.amp.GradScaler.state_dict()`."""
        return {
            "scale": self.scale,
            "growth_factor": self._growth_factor,
            "backoff_factor": self._backoff_factor,
            "growth_interval": self._growth_interval,
            "_growth_tracker": self._growth_tracker,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state that this scaler or a `torch.amp.GradScaler` saved.

        Raises:
            SuperScaleError: a state that lacks a key; nothing was changed.
        """
        missing = [key for key in _KEYS if key not in state]
        if missing:
            raise SuperScaleError(f"the checkpoint's loss scaler lacks {', '.join(missing)}; found {sorted(state)}.")
        self.scale = float(state["scale"])
        self._growth_factor = float(state["growth_factor"])
        self._backoff_factor = float(state["backoff_factor"])
        self._growth_interval = int(state["growth_interval"])
        self._growth_tracker = int(state["_growth_tracker"])

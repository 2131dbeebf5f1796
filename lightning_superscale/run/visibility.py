"""How much of a run user code looks at between its passes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Visibility:
    """The gradients and weights that user code may look at, as the adapter of a framework found out.

    Attributes:
        why_gradients_stay: why gradients stay in `param.grad` until the step: user code may read or change them there.
            None: they may leave during backward.
        why_weights_awaited: why user code may read weights between a step and the next forward; None where none does.
            Reads wait by themselves; see `RunSettings.why_weights_awaited` for the exception.
        is_automatic: the framework runs backward and step; False where the user's training step does.
    """

    why_gradients_stay: str | None = None
    why_weights_awaited: str | None = None
    is_automatic: bool = True

    @property
    def shows_weights(self) -> bool:
        """Whether user code may read weights right after backward."""
        return self.why_weights_awaited is not None or self.why_gradients_stay is not None

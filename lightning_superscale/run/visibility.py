"""How much of a run user code looks at between its passes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Visibility:
    """The gradients and weights that user code may look at, as the adapter of a framework found out.

    Attributes:
        why_gradients_stay: why gradients stay in `param.grad` until the step: user code may read or change them there.
            None: they may leave during backward.
        why_weights_awaited: why new weights are waited for right after the step: user code may read them. None: they
            may arrive during the next forward.
        is_automatic: the framework runs backward and step; False where the user's training step does.
    """

    why_gradients_stay: str | None = None
    why_weights_awaited: str | None = None
    is_automatic: bool = True

    @property
    def shows_weights(self) -> bool:
        """Whether user code may read weights right after backward."""
        return self.why_weights_awaited is not None or self.why_gradients_stay is not None

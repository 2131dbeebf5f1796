"""How the host's time divides over the phases of training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class PhaseSeconds:
    """Host seconds in forward and backward, summed over `num_steps` optimizer steps."""

    forward: float = 0.0
    backward: float = 0.0
    num_steps: int = 0

"""Every module technique by name, in the order in which a run asks them."""

from __future__ import annotations

from collections.abc import Callable

from lightning_superscale.run.techniques.buffer_sync import synchronized_buffers
from lightning_superscale.run.techniques.long_context import long_context
from lightning_superscale.run.techniques.sequence_parallel import sequence_parallel
from lightning_superscale.run.techniques.technique import ModuleTechnique, TechniqueFacts
from lightning_superscale.run.techniques.weight_flow import flowing_weights

# Each function makes the technique of one run, or None where the run does without it.
TECHNIQUES: dict[str, Callable[[TechniqueFacts], ModuleTechnique | None]] = {
    "weight flow": flowing_weights,
    "buffers": synchronized_buffers,
    "sequence": sequence_parallel,
    "long context": long_context,
}

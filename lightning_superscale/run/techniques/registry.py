"""Every module technique by name, in the order in which a run asks them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.weight_flow.schedule import WeightFlow
from lightning_superscale.run.techniques.buffer_sync import synchronized_buffers
from lightning_superscale.run.techniques.technique import ModuleTechnique, TechniqueFacts
from lightning_superscale.run.techniques.weight_flow import WeightFlowTechnique, flowing_weights

# Each function makes the technique of one run, or None where the run does without it.
TECHNIQUES: dict[str, Callable[[TechniqueFacts], ModuleTechnique | None]] = {
    "weight flow": flowing_weights,
    "buffers": synchronized_buffers,
}


def techniques_of(facts: TechniqueFacts) -> dict[str, ModuleTechnique]:
    """The techniques of one run, by name."""
    made = {name: make(facts) for name, make in TECHNIQUES.items()}
    return {name: technique for name, technique in made.items() if technique is not None}


def flow_among(techniques: Iterable[ModuleTechnique]) -> WeightFlow | None:
    """The schedule of weight flow, if one of the techniques has it: the states of a run join it."""
    return next((one.flow for one in techniques if isinstance(one, WeightFlowTechnique)), None)


def states_of(techniques: Mapping[str, ModuleTechnique]) -> dict[str, dict[str, Any]]:
    """The states of those techniques that have any, by name."""
    states = {name: technique.state_dict() for name, technique in techniques.items()}
    return {name: state for name, state in states.items() if state}


def load_states(techniques: Mapping[str, ModuleTechnique], states: Mapping[str, Mapping[str, Any]]) -> None:
    """Load the states that `states_of` gave into the techniques of the same names.

    Raises:
        SuperScaleError: a state of a technique that this run does without; nothing was loaded.
    """
    unknown = [name for name in states if name not in techniques]
    if unknown:
        raise SuperScaleError(
            f"the checkpoint has a state of the technique {unknown[0]!r}, which this run does without; this run has "
            f"{', '.join(map(repr, techniques)) or 'none'}. Switch it on, or load the weights alone."
        )
    for name, state in states.items():
        techniques[name].load_state_dict(state)


def note_causes(techniques: Mapping[str, ModuleTechnique], error: BaseException) -> None:
    """Note on an error of user code which technique it comes of, where Python can (from 3.11 on)."""
    for technique in techniques.values():
        cause = technique.cause_of(error)
        if cause is not None and hasattr(error, "add_note"):
            error.add_note(cause)

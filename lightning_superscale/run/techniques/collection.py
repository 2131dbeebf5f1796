"""The techniques of one run, which it asks together, in the order of the registry."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.weight_flow.schedule import WeightFlow
from lightning_superscale.run.techniques.registry import TECHNIQUES
from lightning_superscale.run.techniques.technique import ModuleTechnique, Rehearse, TechniqueFacts
from lightning_superscale.run.techniques.weight_flow import WeightFlowTechnique


class Techniques(dict[str, ModuleTechnique]):
    """The techniques of one run by name. Methods named as a technique's ask all of them."""

    _has_begun = False

    @classmethod
    def of(cls, facts: TechniqueFacts) -> Techniques:
        """Those of the registry that a run with these facts has."""
        made = {name: make(facts) for name, make in TECHNIQUES.items()}
        return cls({name: technique for name, technique in made.items() if technique is not None})

    @property
    def flow(self) -> WeightFlow | None:
        """The schedule of weight flow, if one of them has it: the states of a run join it."""
        return next((one.flow for one in self.values() if isinstance(one, WeightFlowTechnique)), None)

    def prepare(self, module: nn.Module) -> None:
        for technique in self.values():
            technique.prepare(module)

    def off_device(self) -> Collection[nn.Parameter]:
        return [param for technique in self.values() for param in technique.off_device()]

    def batch(self, batch: Any, *, trains: bool) -> Any:
        for technique in self.values():
            batch = technique.batch(batch, trains=trains)
        return batch

    def output(self, output: Any, *, trains: bool) -> Any:
        for technique in reversed(self.values()):
            output = technique.output(output, trains=trains)
        return output

    @contextmanager
    def around_forward(self, *, trains: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for technique in self.values():
                stack.enter_context(technique.around_forward(trains=trains))
            yield

    def first_batch(self, batch: Any, rehearse: Rehearse) -> None:
        """Let all look at the first batch of training; called with every batch."""
        if not self._has_begun:
            self._has_begun = True
            for technique in self.values():
                technique.first_batch(batch, rehearse)

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        with ExitStack() as stack:
            for technique in self.values():
                stack.enter_context(technique.rehearsing())
            yield

    def before_evaluation(self) -> None:
        for technique in self.values():
            technique.before_evaluation()

    def rest(self, *, is_visible: bool) -> None:
        for technique in self.values():
            technique.rest(is_visible=is_visible)

    def states(self) -> dict[str, dict[str, Any]]:
        """The states of those that have any, by name."""
        states = {name: technique.state_dict() for name, technique in self.items()}
        return {name: state for name, state in states.items() if state}

    def load_states(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Load the states that `states` gave into the techniques of the same names.

        Raises:
            SuperScaleError: a state of a technique that this run does without; nothing was loaded.
        """
        unknown = [name for name in states if name not in self]
        if unknown:
            raise SuperScaleError(
                f"the checkpoint has a state of the technique {unknown[0]!r}, which this run does without; this run "
                f"has {', '.join(map(repr, self)) or 'none'}. Switch it on, or load the weights alone."
            )
        for name, state in states.items():
            self[name].load_state_dict(state)

    def note_causes(self, error: BaseException) -> None:
        """Note on an error of user code which technique it comes of, where Python can (from 3.11 on)."""
        for technique in self.values():
            cause = technique.cause_of(error)
            if cause is not None and hasattr(error, "add_note"):
                error.add_note(cause)

    def close(self) -> None:
        for technique in reversed(self.values()):
            technique.close()

"""Lets superoffload's plans take turns, so that tests of exactness meet each of them after each of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

from lightning_superscale.offload.planner.forecast import Plan
from lightning_superscale.offload.superoffload.plan import PlanChooser

# Each plan follows each, itself included, once in nine steps.
# Of direct steps every second one is awaited, so that in eighteen steps each is either.
TURNS = ("ahead", "ahead", "direct", "direct", "early commit", "early commit", "direct", "ahead", "early commit")
_CHOSEN = PlanChooser._chosen


def _in_turn(self: PlanChooser):
    if self._speculate != "auto":
        return _CHOSEN(self)
    turn = self.__dict__.get("_turn", -1) + 1
    self.__dict__["_turn"] = turn
    plan = TURNS[turn % len(TURNS)]
    return "early commit" if plan == "ahead" and not self._streams else plan, "each in its turn"


def _awaited_in_turn(self: PlanChooser) -> bool:
    turn = self.__dict__["_direct_turn"] = self.__dict__.get("_direct_turn", -1) + 1
    return turn % 2 == 0


def take_turns(chooser: PlanChooser) -> None:
    """From now on, one chooser whose plan is "auto" takes each in its turn."""
    chooser._chosen = MethodType(_in_turn, chooser)
    chooser._is_better_awaited = MethodType(_awaited_in_turn, chooser)
    chooser._choose()


def keep_to(chooser: PlanChooser, plan: Plan, *, awaits: bool = False) -> None:
    """From now on, one chooser takes this plan only.

    Args:
        awaits: whether direct steps are awaited.
    """
    chooser._chosen, chooser._is_better_awaited = lambda: (plan, "fixed"), lambda: awaits
    chooser._choose()


def take_turns_in_process() -> None:
    """Every chooser of this process does, until it ends."""
    PlanChooser._chosen, PlanChooser._is_better_awaited = _in_turn, _awaited_in_turn


@contextmanager
def taking_turns() -> Iterator[None]:
    """While open, every chooser of this process does."""
    before = PlanChooser._chosen, PlanChooser._is_better_awaited
    take_turns_in_process()
    try:
        yield
    finally:
        PlanChooser._chosen, PlanChooser._is_better_awaited = before

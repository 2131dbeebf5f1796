"""Finds out which of two ways of a step takes less time, by taking both while training goes on.

[Note: Trials] The two ways take turns of a few steps each, so that a disturbance meets both, and the way whose median
step was shorter is kept until the next trial. A model's batches, and whoever else uses the machine, change; so a trial
comes again, later and later while nothing changes, which makes what trials cost vanish. A step's time is counted from
the end of the step before, because what one leaves to a thread makes the next one longer; so the first step of each
turn, which has a part of each way, isn't counted.
"""

from __future__ import annotations

from statistics import median

# The first steps of a run make buffers and warm caches.
_FIRST = 3
_TURN, _NUM_TURNS = 5, 6
# Steps from one trial to the next: as many again each time the same way won, from the first number to the second.
_REST, _LONGEST_REST = 250, 4000
# Steps of a run until its first trial is decided.
FIRST_TRIAL_STEPS = 1 + _FIRST + _TURN * _NUM_TURNS


class Trial:
    """Chooses between two ways of a step by their times.

    Attributes:
        takes_second: whether the next step is to go the second way.
        medians: seconds of a step in the first way and in the second, of the last trial; None before one ended.
    """

    def __init__(self) -> None:
        self.takes_second = False
        self.medians: tuple[float, float] | None = None
        self._best: bool | None = None
        self._num_steps = -_FIRST  # of the trial; below 0 between trials
        self._rest = _REST
        self._seconds: dict[bool, list[float]] = {False: [], True: []}

    def end_step(self, seconds: float) -> None:
        """Note how long the step took that ended, and choose the way of the next one."""
        if self._num_steps >= 0 and self._num_steps % _TURN:
            self._seconds[self.takes_second].append(seconds)
        self._num_steps += 1
        if self._num_steps == _TURN * _NUM_TURNS:
            self._decide()
        elif self._num_steps >= 0:
            self.takes_second = self._num_steps // _TURN % 2 == 1

    def _decide(self) -> None:
        self.medians = (median(self._seconds[False]), median(self._seconds[True]))
        self.takes_second = self.medians[1] < self.medians[0]
        self._rest = min(2 * self._rest, _LONGEST_REST) if self.takes_second == self._best else _REST
        self._best, self._num_steps = self.takes_second, -self._rest
        self._seconds = {False: [], True: []}
